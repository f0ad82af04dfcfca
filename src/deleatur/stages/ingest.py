"""Feedback sources → validated, append-only tables; bad rows are kept aside with their reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import pandas as pd

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.feedback import events, expectations, votes
from deleatur.feedback.events import Rejected, Row
from deleatur.runtime.progress import bar
from deleatur.storage import files, images


def run(settings: Settings) -> None:
    """Writes the folders `paths.feedback` and `paths.data_docs`, functions of the sources and the settings alone.

    events     every valid event, in the order of the sources and their lines, replaced and withdrawn ones included
    answers    the events that count today       votes, pairs, raters   what they say (`feedback.votes`)
    images-…   every picture that is what its digest says
    quarantine every row and picture that cannot be used, with reason and remedy (also as CSV, when there are any)
    summary    counts, agreement, expectations, and the digest that identifies this feedback

    Raises DataError, after writing all that, when a target concept has no usable answer left.
    """
    with bar("ingest", 1) as advance:
        summary, rejected = _ingest(settings)
        note = f"{summary['events']} events, {summary['answers']} answers"
        if aside := summary["quarantined"]["rows"]:
            note += f"; {aside} rows could not be used: {settings.paths.feedback / 'quarantine.csv'}"
        advance(note=note)
    _demand_answers(settings, summary["concepts"], rejected)


def _ingest(settings: Settings) -> tuple[dict[str, Any], list[Rejected]]:
    """Writes everything; the summary, and what is in quarantine."""
    sources = find(settings.ingest.sources)
    out, docs = files.emptied(settings.paths.feedback), files.emptied(settings.paths.data_docs)
    parsed = events.parse({path.as_posix(): files.read_lines(path) for path in sources})
    rejected, digests = list(parsed.rejected), set[str]()
    images.write_shards(out, pictures(sources, digests, rejected))

    kinds = {name: concept.kind for name, concept in settings.concepts.items()}
    checked = expectations.validate(events.table(parsed.rows), kinds, digests, docs)
    rejected += [_refuse(parsed.rows[v.place], v) for v in checked.violations]
    broken = {v.place for v in checked.violations}
    refused = {r.event_id for r in rejected if r.event_id}
    valid, unlinked = events.link([r for i, r in enumerate(parsed.rows) if i not in broken], refused)
    rejected += unlinked

    current = events.current(valid)
    answers = events.table(current)
    raters = votes.raters(answers)
    found, ordered = votes.votes(answers, raters), votes.pairs(answers, raters)
    files.write_table(out / "events.parquet", events.table(valid), events.SCHEMA)
    files.write_table(out / "answers.parquet", answers, events.SCHEMA)
    files.write_table(out / "votes.parquet", found, votes.VOTES)
    files.write_table(out / "pairs.parquet", ordered, votes.PAIRS)
    files.write_table(out / "raters.parquet", raters, votes.RATERS)
    _write_quarantine(out, rejected)
    concepts = {name: _count(name, settings, valid, answers, found, ordered, raters) for name in settings.concepts}
    summary = {
        "feedback": events.digest(valid),
        "simulated": any(c["simulated"] for c in concepts.values()),
        "sources": len(sources),
        "events": len(valid),
        "answers": len(current),
        "repeated_lines": dict(Counter(row.file for row in parsed.repeats)),
        "pictures": len(digests),
        "quarantined": {"rows": len({(r.file, r.line) for r in rejected}), "by_rule": _by_rule(rejected)},
        "concepts": concepts,
        "expectations": checked.summary,
    }
    files.write_json(out / "summary.json", summary)
    return summary, rejected


def demand_rated(settings: Settings, concept: str) -> None:
    """Raises DataError where no picture of a concept was marked by most raters, or none passed, in the sources as they
    lie there: then a method that learns from rated pictures cannot.
    """
    parsed = events.parse({path.as_posix(): files.read_lines(path) for path in find(settings.ingest.sources)})
    sound = [row for row in parsed.rows if row.event.concept == concept and events.utc(row.event.created_at)]
    answers = events.table(events.current(events.link(sound, set())[0]))
    share = votes.seen(answers, votes.raters(answers))
    marked, passed = int((share >= 0.5).sum()), int((share < 0.5).sum())
    if not (marked and passed):
        raise DataError(
            f"the eraser learns from rated pictures, and of {concept} raters marked {marked} and passed {passed}",
            hint="bring feedback (docs/feedback.md), or choose an erase.method that works from words or tokens",
        )


def find(patterns: Sequence[str]) -> list[Path]:
    """The sources, pattern by pattern, sorted by name within each. Raises DataError when a pattern finds none."""
    found = dict[Path, None]()
    for pattern in patterns:
        paths = sorted(path for path in map(Path, glob(pattern, recursive=True)) if path.is_file())
        if not paths:
            hint = "put JSON-lines files there or correct ingest.sources in params.yaml, then: deleatur stage ingest"
            raise DataError(f"expected feedback at {pattern}, found no file", hint=hint)
        found |= dict.fromkeys(paths)
    return list(found)


def archive(source: Path) -> Path:
    """The pictures of a source lie beside it: answers.jsonl → answers.images.parquet."""
    return source.with_name(f"{source.stem}.images.parquet")


def pictures(sources: Iterable[Path], digests: set[str], rejected: list[Rejected]) -> Iterator[images.Picture]:
    """Every sound picture once; fills in `digests` and, with what is wrong, `rejected`.

    A source without an archive is fine as long as other archives hold its pictures; if not, its events say so.
    """
    for path in filter(Path.exists, map(archive, sources)):
        line = 0
        try:
            for line, picture in enumerate(images.read(path), 1):
                if problem := images.problem(picture):
                    rejected.append(_spoilt(path, line, picture.sha256, "picture bytes", *problem))
                elif picture.sha256 not in digests:
                    digests.add(picture.sha256)
                    yield picture
        except DataError as e:
            expected = "a Parquet file with sha256, image, width, height"
            rejected.append(_spoilt(path, line + 1, "", "picture archive", expected, str(e)))


def _spoilt(path: Path, line: int, row: str, rule: str, expected: str, got: str) -> Rejected:
    remedy = "write the archive anew from the pictures that were shown"
    return Rejected(path.as_posix(), line, None, rule, expected, got, remedy, row)


def _refuse(row: Row, v: expectations.Violation) -> Rejected:
    return events.reject(row, v.rule, v.expected, v.got, v.remedy)


def _write_quarantine(out: Path, rejected: Sequence[Rejected]) -> None:
    table = events.quarantine(rejected)
    files.write_table(out / "quarantine.parquet", table, events.QUARANTINE)
    if rejected:
        files.write_csv(out / "quarantine.csv", table)


def _by_rule(rejected: Sequence[Rejected]) -> dict[str, int]:
    return dict(sorted(Counter(r.rule for r in rejected).items()))


def _count(
    name: str,
    settings: Settings,
    valid: Sequence[Row],
    answers: pd.DataFrame,
    found: pd.DataFrame,
    ordered: pd.DataFrame,
    raters: pd.DataFrame,
) -> dict[str, Any]:
    """What there is about one concept. `few_raters`: pictures with a vote, but from fewer than `min_raters`."""
    own = [row.event for row in valid if row.event.concept == name]
    mine, people = answers[answers["concept"] == name], raters[raters["concept"] == name]
    voted = found[(found["concept"] == name) & (found["raters"] > 0)]
    return {
        "kind": settings.concepts[name].kind,
        "target": name in settings.targets,
        "simulated": any(e.source.startswith("simulated") for e in own),
        "events": len(own),
        "withdrawals": sum(e.answer == "withdrawn" for e in own),
        "answers": {str(k): int(v) for k, v in mine["answer"].value_counts().sort_index().items()},
        "raters": len(people),
        "simulated_raters": int(people["simulated"].sum()),
        "voted_pictures": len(voted),
        "few_raters": int((voted["raters"] < settings.ingest.min_raters).sum()),
        "pairs": int((ordered["concept"] == name).sum()),
        "agreement": votes.agreement(answers, name),
    }


def _demand_answers(settings: Settings, concepts: dict[str, Any], rejected: Sequence[Rejected]) -> None:
    bare = [name for name in settings.targets if not concepts[name]["voted_pictures"] + concepts[name]["pairs"]]
    if not bare:
        return
    counts = "; ".join(f"{name}: {concepts[name]['events']} valid events, no vote and no pair" for name in bare)
    aside = ", ".join(f"{rule} {n}" for rule, n in _by_rule(rejected).items()) or "none"
    csv = settings.paths.feedback / "quarantine.csv"
    first = f"read {csv}, append the mended rows" if rejected else "collect answers and append them to a source"
    raise DataError(
        f"expected usable answers about every target, got {counts}. Rows in quarantine: {aside}",
        hint=f"{first}, then: deleatur stage ingest",
    )
