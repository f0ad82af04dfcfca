"""Feedback sources → validated, append-only tables; invalid rows are quarantined with the reason."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.errors import DataError, SettingsError
from deleatur.feedback import answers as resolution
from deleatur.feedback import events, expectations, votes
from deleatur.feedback.events import EventRow, QuarantineRow
from deleatur.runtime.progress import bar
from deleatur.storage import files, images


def run(settings: Settings) -> None:
    """Writes the folders `paths.feedback` and `paths.data_docs`, functions of the sources and the settings alone.

    events      every valid event in the order of sources and lines, replaced and withdrawn ones included
    answers     the events in effect, without replaced and withdrawn ones
    votes, pairs, raters   aggregated from the answers (`feedback.votes`), for people: stages aggregate for themselves
    images-…    every image whose bytes match its digest
    quarantine  every unusable row and image, with reason and remedy (also as CSV, when there are any)
    summary     counts, agreement, expectations, and the digest that identifies this feedback

    Raises DataError, after writing all of these, when a target that has to be rated has no usable answer. A concept
    that is erased by its words need not be rated: without any feedback, the tables are empty.
    """
    with bar("ingest", 1) as advance:
        paths = settings.paths
        with files.replace_folder(paths.feedback) as out, files.replace_folder(paths.data_docs) as docs:
            summary, rejected = _ingest(settings, out, docs)
        note = f"{summary['events']} events, {summary['answers']} answers"
        if quarantined := summary["quarantined"]["rows"]:
            note += f"; {quarantined} rows could not be used: {settings.paths.feedback / 'quarantine.csv'}"
        advance(note=note)
    if methods.requires_ratings(settings):
        _require_answers(settings, summary["concepts"], rejected)


def _ingest(settings: Settings, out: Path, docs: Path) -> tuple[dict[str, Any], list[QuarantineRow]]:
    """Writes everything; returns the summary and the quarantined rows."""
    sources = find_sources(settings, required=methods.requires_ratings(settings))
    parsed = events.parse({path.as_posix(): files.read_lines(path) for path in sources})
    rejected, digests = list(parsed.rejected), set[str]()
    images.write_shards(out, valid_images(sources, digests, rejected))

    kinds = {name: concept.kind for name, concept in settings.concepts.items()}
    given = [row for row in parsed.rows if not row.is_withdrawal]
    checked = expectations.validate(events.to_frame(given), kinds, digests, docs, now=datetime.now(UTC))
    rejected += [_quarantine_row(given[v.position], v) for v in checked.violations]
    invalid = [given[position] for position in sorted({v.position for v in checked.violations})]
    resolved = resolution.resolve(parsed.rows, invalid, {r.event_id for r in rejected if r.event_id})
    rejected += resolved.rejected

    valid, answers = resolved.events, events.to_frame(resolved.answers)
    raters = votes.rater_table(answers)
    vote_table, pair_table = votes.vote_table(answers, raters), votes.pair_table(answers, raters)
    files.write_table(out / "events.parquet", events.to_frame(valid), events.EVENT_SCHEMA)
    files.write_table(out / "answers.parquet", answers, events.EVENT_SCHEMA)
    files.write_table(out / "votes.parquet", vote_table, votes.VOTE_SCHEMA)
    files.write_table(out / "pairs.parquet", pair_table, votes.PAIR_SCHEMA)
    files.write_table(out / "raters.parquet", raters, votes.RATER_SCHEMA)
    _write_quarantine(out, rejected)
    tables = (answers, vote_table, pair_table, raters)
    concepts = {name: _concept_summary(settings, name, valid, *tables) for name in settings.concepts}
    summary = {
        "feedback": events.digest(valid),
        "simulated": any(c["simulated"] for c in concepts.values()),
        "sources": len(sources),
        "events": len(valid),
        "answers": len(answers),
        "repeated_lines": dict(Counter(row.file for row in parsed.repeats)),
        "images": len(digests),
        "quarantined": {"rows": len({(r.file, r.line) for r in rejected}), "by_rule": _by_rule(rejected)},
        "concepts": concepts,
        "expectations": checked.summary,
    }
    files.write_json(out / "summary.json", summary)
    return summary, rejected


def require_rated(settings: Settings, concept: str) -> None:
    """Raises DataError when the sources hold no positive or no negative image of a concept by majority vote: a method
    that learns from rated images needs both.
    """
    answers = current_answers(settings, concept)
    share = votes.vote_shares(answers, votes.rater_table(answers))
    positive, negative = int((share >= 0.5).sum()), int((share < 0.5).sum())
    if not (positive and negative):
        raise DataError(
            f"the eraser learns from rated images: expected positive and negative ones of {concept}, got {positive} "
            f"positive and {negative} negative",
            hint="bring feedback (docs/feedback.md), or choose an erase.method that works from words or tokens",
        )


def require_answered(settings: Settings, concept: str) -> None:
    """Raises DataError when the sources hold no usable answer about a concept: its tokens are learned from ratings."""
    if not current_answers(settings, concept)["answer"].isin(("yes", "no", "ranked")).any():
        raise DataError(
            f"{concept} is to be erased by tokens, which are learned from ratings: expected usable answers about it at "
            f"{', '.join(settings.ingest.sources)}, got none",
            hint="bring feedback (docs/feedback.md; deleatur stage ingest names unusable rows), or erase it by its "
            "words (erase.source: words)",
        )


def current_answers(settings: Settings, concept: str) -> pd.DataFrame:
    """The answers in effect about a concept, read from the sources; images and most expectations are not checked."""
    sources = find_sources(settings, required=False)
    rows = [
        row
        for row in _parsed(*((path.resolve(), path.stat().st_mtime_ns) for path in sources))
        if row.is_withdrawal or row.event.concept == concept
    ]
    now = datetime.now(UTC)
    invalid = [row for row in rows if not row.is_withdrawal and not events.event_time(row.event.created_at, now)]
    return events.to_frame(resolution.resolve(rows, invalid, ()).answers)


@lru_cache(maxsize=1)
def _parsed(*sources: tuple[Path, int]) -> list[EventRow]:
    """The rows of sources, each with its modification time; a benchmark needs them for each of its entries."""
    return events.parse({path.as_posix(): files.read_lines(path) for path, _ in sources}).rows


def find_sources(settings: Settings, *, required: bool = True) -> list[Path]:
    """The files of `ingest.sources`, by pattern, sorted by name within each.

    Raises DataError when a required pattern matches none, SettingsError for a file in a folder that a stage empties.
    """
    sources = dict[Path, None]()
    for pattern in settings.ingest.sources:
        paths = files.matching_files(pattern)
        if required and not paths:
            hint = "put JSON-lines files there or correct ingest.sources in params.yaml, then: deleatur stage ingest"
            raise DataError(f"expected feedback at {pattern}, found no file", hint=hint)
        for path in paths:
            if path.is_symlink() and not path.exists():  # withdrawals in it would not count
                raise DataError(
                    f"{path} links to {path.readlink()}, which is missing",
                    hint="put the file there or delete the link, then: deleatur stage ingest",
                )
        sources |= dict.fromkeys(paths)
    for path, (name, folder) in product(sources, settings.paths.outputs.items()):
        if path.resolve().is_relative_to(folder.resolve()):
            raise SettingsError(
                f"ingest.sources match {path}, and a stage empties paths.{name}, {folder}",
                hint="move the file, or name another folder in params.yaml, then: deleatur check",
            )
    return list(sources)


def archive_path(source: Path) -> Path:
    """The image archive beside a source: answers.jsonl → answers.images.parquet."""
    return source.with_name(f"{source.stem}.images.parquet")


def valid_images(
    sources: Iterable[Path], digests: set[str], rejected: list[QuarantineRow]
) -> Iterator[images.EncodedImage]:
    """Yields every valid image once; adds its digest to `digests`, and invalid ones to `rejected`.

    A source needs no archive when others hold its images; events about missing images are quarantined later.
    """
    for path in filter(os.path.lexists, map(archive_path, sources)):
        line = 0
        try:
            for line, image in enumerate(images.read_archive(path), 1):
                if problem := images.find_mismatch(image):
                    rejected.append(_invalid_image(path, line, image.sha256, "image bytes", *problem))
                elif image.sha256 not in digests:
                    digests.add(image.sha256)
                    yield image
        except DataError as e:
            expected = "a Parquet file with sha256, image, width, height"
            invalid = _invalid_image(path, line + 1, "", "image archive", expected, str(e))
            recomputed = e.hint == files.RECOMPUTE_HINT  # which is for archives that stages write
            rejected.append(invalid if recomputed else replace(invalid, remedy=e.hint))


def _invalid_image(path: Path, line: int, row: str, rule: str, expected: str, got: str) -> QuarantineRow:
    remedy = "write the archive again from the images that were shown"
    return QuarantineRow(path.as_posix(), line, None, rule, expected, got, remedy, row)


def _quarantine_row(row: EventRow, v: expectations.Violation) -> QuarantineRow:
    return events.reject(row, v.rule, v.expected, v.got, v.remedy)


def _write_quarantine(out: Path, rejected: Sequence[QuarantineRow]) -> None:
    table = events.quarantine_frame(rejected)
    files.write_table(out / "quarantine.parquet", table, events.QUARANTINE_SCHEMA)
    if rejected:
        # A spreadsheet would evaluate a cell that starts like a formula.
        files.write_csv(out / "quarantine.csv", table.replace(r"^(?=[=+\-@\t\r])", "'", regex=True))


def _by_rule(rejected: Sequence[QuarantineRow]) -> dict[str, int]:
    return dict(sorted(Counter(r.rule for r in rejected).items()))


def _concept_summary(
    settings: Settings,
    name: str,
    valid: Sequence[EventRow],
    answers: pd.DataFrame,
    vote_table: pd.DataFrame,
    pair_table: pd.DataFrame,
    raters: pd.DataFrame,
) -> dict[str, Any]:
    """Counts of one concept. `few_raters`: images with a vote, but from fewer raters than `min_raters`."""
    of_concept = [row.event for row in valid if row.event.concept == name]
    answers, raters = answers[answers["concept"] == name], raters[raters["concept"] == name]
    voted = vote_table[(vote_table["concept"] == name) & (vote_table["raters"] > 0)]
    return {
        "kind": settings.concepts[name].kind,
        "target": name in settings.targets,
        "simulated": any(e.source.startswith("simulated") for e in of_concept),
        "events": len(of_concept),
        "withdrawals": sum(e.answer == "withdrawn" for e in of_concept),
        "answers": {str(k): int(v) for k, v in answers["answer"].value_counts().sort_index().items()},
        "raters": len(raters),
        "simulated_raters": int(raters["simulated"].sum()),
        "voted_images": len(voted),
        "few_raters": int((voted["raters"] < settings.ingest.min_raters).sum()),
        "pairs": int((pair_table["concept"] == name).sum()),
        "agreement": votes.rater_agreement(answers, name),
    }


def _require_answers(settings: Settings, concepts: dict[str, Any], rejected: Sequence[QuarantineRow]) -> None:
    unrated = [name for name in settings.targets if not concepts[name]["voted_images"] + concepts[name]["pairs"]]
    if not unrated:
        return
    counts = "; ".join(f"{name}: {concepts[name]['events']} valid events, no vote and no pair" for name in unrated)
    quarantined = ", ".join(f"{rule} {n}" for rule, n in _by_rule(rejected).items()) or "none"
    csv = settings.paths.feedback / "quarantine.csv"
    first = f"read {csv}, append the corrected rows" if rejected else "collect answers and append them to a source"
    raise DataError(
        f"expected usable answers about every target, got {counts}. Rows in quarantine: {quarantined}",
        hint=f"{first}, then: deleatur stage ingest",
    )
