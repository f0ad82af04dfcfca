"""Sources in, tables out: deterministic, append-only, nothing lost, and an error that says what to do."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Make
from PIL import Image

from deleatur.artifacts.simulated_feedback import simulate
from deleatur.config.settings import ConceptSpec, Found, Ingest, Paths, Settings
from deleatur.errors import DataError
from deleatur.feedback import events
from deleatur.feedback.simulated import Panel
from deleatur.records.feedback import Feedback
from deleatur.stages import ingest
from deleatur.storage import files, images


def concept(kind: Any) -> ConceptSpec:
    found = Found(detector="judge", labels=("x",))
    return ConceptSpec(
        kind=kind, initial="x", words=("x",), guideline="Is there an x?", prompts=Path("x.csv"), found=found
    )


CONCEPTS = {"weapon": concept("binary"), "style": concept("rank")}


def settings(root: Path, *, targets: tuple[str, ...] = ("weapon", "style"), pattern: str = "*.jsonl") -> Settings:
    """The sections that ingest reads."""
    return Settings.model_construct(
        targets=targets,
        concepts=CONCEPTS,
        ingest=Ingest(sources=(str(root / "given" / pattern),), min_raters=2),
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
        out=root / "given",
    )


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """Two simulated sources: 20 pictures and 60 answers about one concept, 12 rankings about the other."""
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


def test_ingest_is_deterministic_and_says_what_it_saw(given: Path) -> None:
    ingest.run(settings(given))
    first, pages = digests(given / "out" / "feedback"), digests(given / "out" / "data_docs")
    ingest.run(settings(given))
    assert digests(given / "out" / "feedback") == first
    assert digests(given / "out" / "data_docs") == pages, "no clock and no dice in them"
    assert "index.html" in pages
    assert set(first) == {
        *(f"{n}.parquet" for n in ("events", "answers", "votes", "pairs", "raters", "quarantine", "images-0000")),
        "summary.json",
    }
    found = summary(given)
    assert (found["simulated"], found["events"], found["pictures"]) == (True, 72, 40)
    assert found["concepts"]["weapon"]["simulated_raters"] == 5
    assert found["quarantined"] == {"rows": 0, "by_rule": {}}
    assert found["expectations"]["success"]
    held = list(images.read_shards(given / "out" / "feedback"))
    assert len(held) == 40
    assert not any(map(images.problem, held))


def test_what_was_ingested_stays_and_withdrawn_answers_leave_the_votes(given: Path) -> None:
    source, out = given / "given" / "weapon.jsonl", given / "out" / "feedback"
    ingest.run(settings(given))
    before, voted = files.read_table(out / "events.parquet"), files.read_table(out / "votes.parquet")["raters"].sum()
    parsed = events.parse({"": files.read_lines(source)})
    old = next(row.event for row in parsed.rows if row.event.answer == "yes")
    gone = {**vars(old), "event_id": "w", "answer": "withdrawn", "replaces": old.event_id}
    append(source, [events.to_json(Feedback(**gone)).encode()])
    ingest.run(settings(given))
    after = files.read_table(out / "events.parquet")
    kept = after[after["event_id"] != "w"].reset_index(drop=True)
    assert kept.astype(str).equals(before.astype(str))
    answers = files.read_table(out / "answers.parquet")
    assert old.event_id not in set(answers["event_id"])
    assert files.read_table(out / "votes.parquet")["raters"].sum() == voted - 1
    assert summary(given)["concepts"]["weapon"]["withdrawals"] == 1


def test_bad_rows_and_pictures_go_to_quarantine_and_the_rest_survives(
    given: Path, event: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = given / "given" / "weapon.jsonl", given / "out" / "feedback"
    rows = source.read_bytes().splitlines()
    spoilt, *sound = images.read(ingest.archive(source))
    images.write(ingest.archive(source), [replace(spoilt, image=sound[0].image), *sound])
    hit = sum(spoilt.sha256.encode() in row for row in rows)
    bad = [event("u", concept="wepon", items=(sound[0].sha256,)), event("l", replaces="no", items=(sound[0].sha256,))]
    append(source, [b"{", rows[0], *(events.to_json(e).encode() for e in bad)])
    ingest.run(settings(given))

    found = summary(given)
    assert f"{hit + 4} rows could not be used" in capsys.readouterr().err
    assert hit > 0
    by_rule = {"concept": 1, "json": 1, "picture": hit, "picture bytes": 1, "replaces": 1}
    assert found["quarantined"] == {"rows": sum(by_rule.values()), "by_rule": by_rule}
    assert (found["events"], found["repeated_lines"]) == (72 - hit, {source.as_posix(): 1})
    [rule] = [rule for rule in found["expectations"]["rules"] if rule["rule"] == "concept"]
    assert rule["event_ids"] == ["u"]
    aside = files.read_table(out / "quarantine.parquet")
    assert (aside[["file", "expected", "got", "remedy", "row"]].map(len) > 0).all(axis=None)
    lines = aside.set_index("rule")["line"]
    assert (lines["json"], lines["concept"], lines["replaces"], lines["picture bytes"]) == (61, 63, 64, 1)
    assert "wepon" in (out / "quarantine.csv").read_text("utf-8")


def test_no_usable_answer_about_a_target_is_an_error_that_says_what_to_do(given: Path) -> None:
    ingest.archive(given / "given" / "weapon.jsonl").unlink()
    with pytest.raises(DataError, match=r"weapon: 0 valid events.*picture 60") as caught:
        ingest.run(settings(given))
    assert "deleatur stage ingest" in caught.value.hint
    assert (given / "out" / "feedback" / "quarantine.csv").is_file()
    ingest.run(settings(given, targets=("style",)))


def test_an_archive_that_is_none_is_reported(given: Path) -> None:
    ingest.archive(given / "given" / "weapon.jsonl").write_bytes(b"PAR1 or so")
    ingest.run(settings(given, targets=("style",)))
    assert summary(given)["quarantined"]["by_rule"]["picture archive"] == 1


def test_no_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no file"):
        ingest.run(settings(tmp_path))
