"""Prompts read from CSV files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from deleatur.config.sections import Split
from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.maths.subsets import stratified
from deleatur.records.sampling import Prompt, Role
from deleatur.storage import files

FORMAT_HINT = "see prompts/README.md"
FILE_ROLES: tuple[Role, ...] = ("concept", "neighbour", "keep", "unseen")
"""Roles of prompts in files; the first only in a concept's own. Words, tokens and attacks come from elsewhere."""


@dataclass(frozen=True)
class _Row:
    """A prompt with its file and line."""

    path: Path
    line: int
    prompt: Prompt

    @property
    def is_preserved(self) -> bool:
        """Whether its role is preserved: erasers train on prompts of such roles in the dev split."""
        return self.prompt.role in ("keep", "neighbour")

    @property
    def folded_text(self) -> str:
        """Equal for texts that are the same prompt to the text encoder."""
        return " ".join(self.prompt.text.lower().split())


def read(path: Path, split: str, concept: str, role: Role | None = None) -> list[Prompt]:
    """The prompts of one file and split, optionally of one role.

    Raises DataError naming file and line of an invalid or repeated row, or when no prompt is left.
    """
    rows = list(_rows(path, split, concept))
    _require_distinct(rows)
    prompts = [row.prompt for row in rows if role in (None, row.prompt.role)]
    if not prompts:
        wanted = f"prompts of the split {split!r}" + (f" and the role {role!r}" if role else "")
        raise DataError(f"{path}: expected {wanted}, got none", hint=FORMAT_HINT)
    return prompts


def read_all(settings: Settings, split: str) -> list[Prompt]:
    """The prompts of all targets, then those that belong to no concept. Raises DataError as `read` does, also for a
    prompt that is repeated in another file.
    """
    sources = [*((settings.concepts[name].prompts, name) for name in settings.targets), (settings.paths.prompts, "")]
    rows = [row for path, concept in sources for row in _rows(path, split, concept)]
    _require_distinct(rows)
    preserved = (row for path, concept in sources for row in _rows(path, "dev", concept) if row.is_preserved)
    _require_unseen(rows, preserved)
    return [prompt for path, concept in sources for prompt in read(path, split, concept)]


def read_splits(path: Path, splits: Collection[str], concept: str) -> list[Prompt]:
    """The prompts of one file in any of these splits. Raises DataError naming file and line of an invalid row."""
    return [row.prompt for split in sorted(splits) for row in _rows(path, split, concept)]


def _rows(path: Path, split: str, concept: str) -> Iterator[_Row]:
    frame = files.read_csv(path)
    missing = {"id", "text", "label", "role", "split"} - set(frame.columns)
    if missing:
        raise DataError(f"{path}: the columns {', '.join(sorted(missing))} are missing", hint=FORMAT_HINT)
    for row, line in zip(frame.to_dict("records"), range(2, len(frame) + 2), strict=True):
        roles = FILE_ROLES if concept else FILE_ROLES[1:]
        for column, values in (("role", roles), ("split", get_args(Split))):
            if row[column] not in values:
                raise DataError(
                    f"{path}, line {line}: {column} {row[column]!r} is none of {', '.join(values)}", hint=FORMAT_HINT
                )
        if blank := [column for column in ("id", "text") if not row[column].strip()]:
            raise DataError(f"{path}, line {line}: expected its {blank[0]}, got {row[blank[0]]!r}", hint=FORMAT_HINT)
        if row["split"] == split:
            requested_concept = concept if row["role"] == "concept" else ""
            yield _Row(path, line, Prompt(row["id"], row["text"], row["role"], row["label"], requested_concept))


def _require_distinct(rows: Iterable[_Row]) -> None:
    """Raises DataError for two rows with the same id or text: a prompt is one piece of evidence, however often it is
    listed, and its images would be the same samples again.
    """
    first: dict[tuple[str, str], _Row] = {}
    for row in rows:
        for field, value in (("id", row.prompt.id), ("text", row.folded_text)):
            earlier = first.setdefault((field, value), row)
            if earlier is not row:
                raise DataError(
                    f"{row.path}, line {row.line}: expected a new {field}, got that of "
                    f"{earlier.path}, line {earlier.line}: {getattr(row.prompt, field)!r}",
                    hint="delete one of the lines or put it into another split, then: deleatur check",
                )


def _require_unseen(rows: Iterable[_Row], preserved: Iterable[_Row]) -> None:
    """Raises DataError for an unseen prompt that an eraser may preserve: it would measure what training has seen."""
    seen = {row.folded_text: row for row in preserved}
    for row in rows:
        if row.prompt.role == "unseen" and (earlier := seen.get(row.folded_text)):
            raise DataError(
                f"{row.path}, line {row.line}: expected an unseen prompt, got one that erasers preserve, that of "
                f"{earlier.path}, line {earlier.line}: {row.prompt.text!r}",
                hint="delete one of the lines, then: deleatur check",
            )


def evaluation_prompts(settings: Settings, concept: str = "") -> list[Prompt]:
    """The prompts that are sampled for a concept, or, for "", those that belong to no concept."""
    path = settings.concepts[concept].prompts if concept else settings.paths.prompts
    return read(path, settings.sample.split, concept)


def image_counts(settings: Settings) -> dict[tuple[Role, str], int]:
    """(role, concept) → images per variant, for all prompts known before tokens and attacks are learned."""
    counts = Counter[tuple[Role, str]]((p.role, p.concept) for p in read_all(settings, settings.sample.split))
    counts |= {("word", name): len(settings.concepts[name].words) for name in settings.targets}
    return {key: n * settings.sample.images_per_prompt.get(key[0], 1) for key, n in counts.items()}


def validation_prompts(settings: Settings, concept: str, n: int) -> list[str]:
    """At most n prompts of the dev split that ask for a concept, spread over the labels they name."""
    concept_prompts = read(settings.concepts[concept].prompts, "dev", concept, "concept")
    return [p.text for p in stratified(concept_prompts, n, lambda p: p.text, lambda p: p.label)]


def preserved_validation_prompts(settings: Settings, n: int) -> list[str]:
    """At most n distinct preserved prompts, half of them neighbours, spread over the labels they name."""
    preserved = [p for p in read_all(settings, "dev") if p.role in ("keep", "neighbour")]
    return [p.text for p in stratified(preserved, n, lambda p: p.text, lambda p: p.role, lambda p: p.label)]


def preserved_prompts(settings: Settings) -> list[str]:
    """Prompts of the preservation loss: those of the roles `keep` and `neighbour`, dev split only.

    Neighbours are few and closest to the concept, so they are repeated until they make up about half of the list.
    """
    dev_prompts = read_all(settings, "dev")
    keep, neighbours = ([p.text for p in dev_prompts if p.role == role] for role in ("keep", "neighbour"))
    if not keep + neighbours:
        raise DataError(
            f"{settings.paths.prompts}: expected prompts of the split 'dev' and the role 'keep', got none",
            hint=FORMAT_HINT,
        )
    return keep + neighbours * max(1, round(len(keep) / max(len(neighbours), 1)))
