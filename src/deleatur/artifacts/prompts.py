"""Prompts read from CSV files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import get_args

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.records.sampling import Prompt, Role
from deleatur.storage import files

FORMAT_HINT = "see prompts/README.md"


def read(path: Path, split: str, concept: str, role: Role | None = None) -> list[Prompt]:
    """The prompts of one file and split, optionally of one role. Raises DataError naming file and line of an invalid
    row, or when no prompt is left.
    """
    frame = files.read_csv(path)
    missing = {"id", "text", "label", "role", "split"} - set(frame.columns)
    if missing:
        raise DataError(f"{path}: the columns {', '.join(sorted(missing))} are missing", hint=FORMAT_HINT)
    prompts = []
    for row, line in zip(frame.to_dict("records"), range(2, len(frame) + 2), strict=True):
        if row["role"] not in get_args(Role):
            listed = ", ".join(get_args(Role))
            raise DataError(f"{path}, line {line}: role {row['role']!r} is none of {listed}", hint=FORMAT_HINT)
        if row["split"] == split and role in (None, row["role"]):
            requested_concept = concept if row["role"] == "concept" else ""
            prompts.append(Prompt(row["id"], row["text"], row["role"], row["label"], requested_concept))
    if not prompts:
        wanted = f"prompts of the split {split!r}" + (f" and the role {role!r}" if role else "")
        raise DataError(f"{path}: expected {wanted}, found none", hint=FORMAT_HINT)
    return prompts


def evaluation_prompts(settings: Settings, concept: str = "") -> list[Prompt]:
    """The prompts that are sampled for a concept, or, for "", those that belong to no concept."""
    path = settings.concepts[concept].prompts if concept else settings.paths.prompts
    return read(path, settings.sample.split, concept)


def image_counts(settings: Settings) -> dict[tuple[Role, str], int]:
    """(role, concept) → images per variant, for all prompts known before tokens and attacks are learned."""
    counts = Counter[tuple[Role, str]](
        (p.role, p.concept) for name in ("", *settings.targets) for p in evaluation_prompts(settings, name)
    )
    counts |= {("word", name): len(settings.concepts[name].words) for name in settings.targets}
    return {key: n * settings.sample.images_per_prompt.get(key[0], 1) for key, n in counts.items()}


def preserved_prompts(settings: Settings) -> list[str]:
    """Prompts of the preservation loss: those of the roles `keep` and `neighbour`, dev split only.

    Neighbours are few and closest to the concept, so they are repeated until they make up about half of the list.
    """
    dev_prompts = read(settings.paths.prompts, "dev", "")
    dev_prompts += [p for n in settings.targets for p in read(settings.concepts[n].prompts, "dev", n)]
    keep, neighbours = ([p.text for p in dev_prompts if p.role == role] for role in ("keep", "neighbour"))
    if not keep + neighbours:
        raise DataError(
            f"{settings.paths.prompts}: expected prompts of the split 'dev' and the role 'keep', found none",
            hint=FORMAT_HINT,
        )
    return keep + neighbours * max(1, round(len(keep) / max(len(neighbours), 1)))
