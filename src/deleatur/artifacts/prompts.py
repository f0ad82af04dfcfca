"""Prompt files → prompts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import get_args

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.records.sampling import Prompt, Role
from deleatur.storage import files

HINT = "see prompts/README.md"


def read(path: Path, split: str, concept: str, role: Role | None = None) -> list[Prompt]:
    """The prompts of one file and split, or of one role of it. Raises DataError naming file and row, or that there is
    none: nothing is learned from no prompt, and nothing measured.
    """
    frame = files.read_csv(path)
    missing = {"id", "text", "label", "role", "split"} - set(frame.columns)
    if missing:
        raise DataError(f"{path}: the columns {', '.join(sorted(missing))} are missing", hint=HINT)
    out = []
    for row, line in zip(frame.to_dict("records"), range(2, len(frame) + 2), strict=True):
        if row["role"] not in get_args(Role):
            listed = ", ".join(get_args(Role))
            raise DataError(f"{path}, line {line}: role {row['role']!r} is none of {listed}", hint=HINT)
        if row["split"] == split and role in (None, row["role"]):
            asks = concept if row["role"] == "concept" else ""
            out.append(Prompt(row["id"], row["text"], row["role"], row["label"], asks))
    if not out:
        wanted = f"prompts of the split {split!r}" + (f" and the role {role!r}" if role else "")
        raise DataError(f"{path}: expected {wanted}, and there is none", hint=HINT)
    return out


def for_evaluation(settings: Settings, concept: str = "") -> list[Prompt]:
    """The prompts that are drawn for a concept, or for none."""
    path = settings.concepts[concept].prompts if concept else settings.paths.prompts
    return read(path, settings.sample.split, concept)


def image_counts(settings: Settings) -> dict[tuple[Role, str], int]:
    """(role, concept) → pictures of one side, of all that is known before tokens and attacks are learned."""
    asked = Counter[tuple[Role, str]](
        (p.role, p.concept) for name in ("", *settings.targets) for p in for_evaluation(settings, name)
    )
    asked |= {("word", name): len(settings.concepts[name].words) for name in settings.targets}
    return {which: n * settings.sample.per_prompt.get(which[0], 1) for which, n in asked.items()}


def to_preserve(settings: Settings) -> list[str]:
    """What fine-tuning erasers hold on to: preserved prompts, and the neighbours that must survive. Dev split only.

    Neighbours are the fewer and lie the nearest, so they are repeated until they are about half of the list.
    """
    written = read(settings.paths.prompts, "dev", "")
    written += [p for n in settings.targets for p in read(settings.concepts[n].prompts, "dev", n)]
    keep, near = ([p.text for p in written if p.role == role] for role in ("keep", "neighbour"))
    if not keep + near:
        raise DataError(
            f"{settings.paths.prompts}: expected prompts of the split 'dev' and the role 'keep', and there is none",
            hint=HINT,
        )
    return keep + near * max(1, round(len(keep) / max(len(near), 1)))
