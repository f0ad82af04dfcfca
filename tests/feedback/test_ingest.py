"""Ingest is deterministic and append-only, loses nothing, and its errors name the next command."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import EventFactory
from PIL import Image

from deleatur.artifacts.simulated_feedback import simulate
from deleatur.config.sections import ConceptSpec, Detection, EraseSection, IngestSection, Paths
from deleatur.config.settings import Settings
from deleatur.errors import DataError, SettingsError
from deleatur.feedback import events
from deleatur.feedback.events import QuarantineRow
from deleatur.feedback.simulated import Panel
from deleatur.records.feedback import FeedbackEvent
from deleatur.stages import ingest
from deleatur.storage import files, images


def concept(kind: Any) -> ConceptSpec:
    return ConceptSpec(
        kind=kind,
        initializer_token="x",
        words=("x",),
        guideline="Is there an x?",
        prompts=Path("x.csv"),
        detection=Detection(detector="judge", labels=("x",)),
    )


CONCEPTS = {"weapon": concept("binary"), "style": concept("rank")}


def settings(root: Path, *, targets: tuple[str, ...] = ("weapon", "style"), pattern: str = "*.jsonl") -> Settings:
    """The sections that ingest reads."""
    return Settings.model_construct(
        targets=targets,
        concepts=CONCEPTS,
        erase=EraseSection.model_construct(source="token"),
        ingest=IngestSection(sources=(str(root / "sources" / pattern),), min_raters=2),
        paths=Paths.model_construct(feedback=root / "out" / "feedback", data_docs=root / "out" / "data_docs"),
    )


def squares(n: int, shade: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4), (shade, i, 0)) for i in range(n)]


def make_source(root: Path, name: str, shade: int) -> None:
    oracle = np.linspace(0.01, 0.99, 20)
    prompts = [f"prompt {i % 2}" for i in range(20)]
    simulate(
        name,
        CONCEPTS[name],
        squares(20, shade),
        prompts,
        range(20),
        list(oracle),
        panel=Panel(raters=5),
        model_version="base",
        seed=1,
        out=root / "sources",
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two simulated sources: 20 images and 60 answers about one concept, 12 rankings about the other."""
    make_source(tmp_path, "weapon", 10)
    make_source(tmp_path, "style", 20)
    return tmp_path


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def append(path: Path, lines: Iterable[bytes]) -> None:
    with path.open("ab") as file:
        file.writelines(line + b"\n" for line in lines)


def summary(root: Path) -> Any:
    return files.read_json(root / "out" / "feedback" / "summary.json")


def test_ingest_is_deterministic_and_summarises_its_sources(root: Path) -> None:
    ingest.run(settings(root))
    first, pages = digests(root / "out" / "feedback"), digests(root / "out" / "data_docs")
    ingest.run(settings(root))
    assert digests(root / "out" / "feedback") == first
    assert digests(root / "out" / "data_docs") == pages, "without wall-clock times and random ids"
    assert "index.html" in pages
    assert set(first) == {
        *(f"{n}.parquet" for n in ("events", "answers", "votes", "pairs", "raters", "quarantine", "images-0000")),
        "summary.json",
    }
    result = summary(root)
    assert (result["simulated"], result["events"], result["images"]) == (True, 72, 40)
    assert result["concepts"]["weapon"]["simulated_raters"] == 5
    assert result["quarantined"] == {"rows": 0, "by_rule": {}}
    assert result["expectations"]["success"]
    ingested = list(images.read_shards(root / "out" / "feedback"))
    assert len(ingested) == 40
    assert not any(map(images.find_mismatch, ingested))


def test_events_are_kept_and_withdrawn_answers_are_removed_from_the_votes(root: Path) -> None:
    source, out = root / "sources" / "weapon.jsonl", root / "out" / "feedback"
    ingest.run(settings(root))
    before, num_votes = (
        files.read_table(out / "events.parquet"),
        files.read_table(out / "votes.parquet")["raters"].sum(),
    )
    parsed = events.parse({"": files.read_lines(source)})
    old = next(row.event for row in parsed.rows if row.event.answer == "yes")
    withdrawal = {**vars(old), "event_id": "w", "answer": "withdrawn", "replaces": old.event_id}
    append(source, [events.to_json(FeedbackEvent(**withdrawal)).encode()])
    ingest.run(settings(root))
    after = files.read_table(out / "events.parquet")
    others = after[after["event_id"] != "w"].reset_index(drop=True)
    assert others.astype(str).equals(before.astype(str))
    answers = files.read_table(out / "answers.parquet")
    assert old.event_id not in set(answers["event_id"])
    assert files.read_table(out / "votes.parquet")["raters"].sum() == num_votes - 1
    assert summary(root)["concepts"]["weapon"]["withdrawals"] == 1


def test_bad_rows_and_images_are_quarantined_and_the_rest_is_ingested(
    root: Path, event: EventFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = root / "sources" / "weapon.jsonl", root / "out" / "feedback"
    rows = source.read_bytes().splitlines()
    corrupt, *intact = images.read_archive(ingest.archive_path(source))
    images.write_archive(ingest.archive_path(source), [replace(corrupt, image=intact[0].image), *intact])
    num_affected = sum(corrupt.sha256.encode() in row for row in rows)
    bad = [event("u", concept="wepon", items=(intact[0].sha256,)), event("l", replaces="no", items=(intact[0].sha256,))]
    append(source, [b"{", rows[0], *(events.to_json(e).encode() for e in bad)])
    ingest.run(settings(root))

    result = summary(root)
    assert f"{num_affected + 4} rows could not be used" in capsys.readouterr().err
    assert num_affected > 0
    by_rule = {"concept": 1, "json": 1, "image": num_affected, "image bytes": 1, "replaces": 1}
    assert result["quarantined"] == {"rows": sum(by_rule.values()), "by_rule": by_rule}
    assert (result["events"], result["repeated_lines"]) == (72 - num_affected, {source.as_posix(): 1})
    [rule] = [rule for rule in result["expectations"]["rules"] if rule["rule"] == "concept"]
    assert rule["event_ids"] == ["u"]
    quarantined = files.read_table(out / "quarantine.parquet")
    assert (quarantined[["file", "expected", "got", "remedy", "row"]].map(len) > 0).all(axis=None)
    lines = quarantined.set_index("rule")["line"]
    assert (lines["json"], lines["concept"], lines["replaces"], lines["image bytes"]) == (61, 63, 64, 1)
    assert "wepon" in (out / "quarantine.csv").read_text("utf-8")


def test_target_without_usable_answers_raises_with_a_hint(root: Path) -> None:
    ingest.archive_path(root / "sources" / "weapon.jsonl").unlink()
    with pytest.raises(DataError, match=r"weapon: 0 valid events.*image 60") as caught:
        ingest.run(settings(root))
    assert "deleatur stage ingest" in caught.value.hint
    assert (root / "out" / "feedback" / "quarantine.csv").is_file()
    ingest.run(settings(root, targets=("style",)))


def test_invalid_archive_is_reported(root: Path) -> None:
    ingest.archive_path(root / "sources" / "weapon.jsonl").write_bytes(b"PAR1 or so")
    ingest.run(settings(root, targets=("style",)))
    assert summary(root)["quarantined"]["by_rule"]["image archive"] == 1


def test_archive_that_is_a_pointer_of_git_lfs_is_named(root: Path) -> None:
    archive = ingest.archive_path(root / "sources" / "weapon.jsonl")
    archive.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")
    rejected: list[QuarantineRow] = []
    assert list(ingest.valid_images([root / "sources" / "weapon.jsonl"], set(), rejected)) == []
    assert [("pointer of Git LFS" in row.got, "lfs pull" in row.remedy) for row in rejected] == [(True, True)]


def test_link_to_a_missing_archive_is_reported(root: Path) -> None:
    archive = ingest.archive_path(root / "sources" / "weapon.jsonl")
    archive.unlink()
    archive.symlink_to(root / "gone.parquet")
    ingest.run(settings(root, targets=("style",)))
    assert summary(root)["quarantined"]["by_rule"]["image archive"] == 1


def test_link_to_a_missing_source_is_refused(root: Path) -> None:
    """Its withdrawals would silently not count."""
    (root / "sources" / "gone.jsonl").symlink_to("elsewhere.jsonl")
    with pytest.raises(DataError, match=r"gone.jsonl links to elsewhere.jsonl, which is missing"):
        ingest.run(settings(root))


def test_missing_source_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no file"):
        ingest.run(settings(tmp_path))


WITHDRAWN = {
    "clock behind": {"created_at": "2000-01-01T00:00:00Z"},
    "far in the future": {"created_at": "9999-01-01T00:00:00Z"},
    "negative seconds": {"seconds_spent": -1.0},
    "unknown concept": {"concept": "wepon"},
    "image gone": {"items": ("0" * 64,)},
}


@pytest.mark.parametrize("changes", WITHDRAWN.values(), ids=WITHDRAWN.keys())
def test_withdrawal_with_invalid_fields_counts(root: Path, changes: dict[str, Any]) -> None:
    source, out = root / "sources" / "weapon.jsonl", root / "out" / "feedback"
    answer = events.parse({"": files.read_lines(source)}).rows[0].event
    withdrawal = replace(answer, event_id="w", answer="withdrawn", replaces=answer.event_id, **changes)
    source.write_bytes(events.to_json(withdrawal).encode() + b"\n" + source.read_bytes())
    ingest.run(settings(root))
    assert answer.event_id not in set(files.read_table(out / "answers.parquet")["event_id"])
    assert "w" in set(files.read_table(out / "events.parquet")["event_id"])
    assert summary(root)["quarantined"]["rows"] == 0


@pytest.mark.parametrize("answer", ["Withdrawn", "WITHDRAWN ", " withdrawn"])
def test_withdrawal_counts_however_it_is_spelled(root: Path, answer: str) -> None:
    source, out = root / "sources" / "weapon.jsonl", root / "out" / "feedback"
    first = events.parse({"": files.read_lines(source)}).rows[0].event
    withdrawal = vars(first) | {"event_id": "w", "answer": answer, "replaces": first.event_id}
    append(source, [json.dumps(withdrawal).encode()])
    ingest.run(settings(root))
    assert first.event_id not in set(files.read_table(out / "answers.parquet")["event_id"])


@pytest.mark.parametrize("created_at", ["2999-01-01T00:00:00Z", "9999-12-31T23:59:59Z"])
def test_event_of_the_future_is_quarantined(root: Path, created_at: str) -> None:
    source, out = root / "sources" / "weapon.jsonl", root / "out" / "feedback"
    answer = events.parse({"": files.read_lines(source)}).rows[0].event
    append(source, [events.to_json(replace(answer, event_id="future", created_at=created_at)).encode()])
    ingest.run(settings(root))
    assert "future" not in set(files.read_table(out / "events.parquet")["event_id"])
    assert summary(root)["quarantined"]["by_rule"] == {"time": 1}


def test_brackets_in_the_name_of_a_source_are_literal(root: Path) -> None:
    folder = root / "[2024] a*b?"
    folder.mkdir()
    for path in list((root / "sources").iterdir()):
        path.rename(folder / path.name.replace("weapon", "[weapon]"))
    names = ["[weapon].jsonl", "style.jsonl"]

    def matched(pattern: str) -> list[str]:
        return [path.name for path in ingest.find_sources(settings(root, pattern=f"../{folder.name}/{pattern}"))]

    assert matched("[[]*.jsonl") == [names[0]]
    assert matched(names[0]) == [names[0]]
    assert matched("*.jsonl") == names
    assert matched("[a-z]*.jsonl") == [names[1]]


@pytest.mark.parametrize("pattern", ["../**/*.jsonl", "../o*/feedback/*.jsonl", "../link/*.jsonl"])
def test_a_source_in_a_folder_that_is_emptied_is_refused(root: Path, pattern: str) -> None:
    emptied = root / "out" / "feedback"
    emptied.mkdir(parents=True)
    (root / "link").symlink_to(emptied)
    shutil.copy(root / "sources" / "weapon.jsonl", emptied)
    with pytest.raises(SettingsError, match=r"ingest.sources match .*weapon.jsonl, and a stage empties paths.feedback"):
        ingest.run(settings(root, pattern=pattern))
    assert (emptied / "weapon.jsonl").is_file()


def test_no_cell_of_the_quarantine_table_is_a_formula(root: Path, event: EventFactory) -> None:
    formulas = ["=HYPERLINK(1)", "+1", "-1", "@SUM(1)"]
    append(root / "sources" / "weapon.jsonl", [events.to_json(event(f, concept="x")).encode() for f in formulas])
    append(root / "sources" / "weapon.jsonl", [b"=1+1"])
    ingest.run(settings(root))
    quarantined = pd.read_csv(root / "out" / "feedback" / "quarantine.csv", dtype=str, keep_default_na=False)
    assert {f"'{f}" for f in formulas} <= set(quarantined["event_id"])
    assert not quarantined.apply(lambda column: column.str.match(r"[=+\-@]")).any(axis=None)
