"""Licences of the dependencies, by their files: allowed, or excepted with a reason, and in docs/licences.md."""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "infra"))
import licences

AGPL = "                    GNU AFFERO GENERAL PUBLIC LICENSE\n                       Version 3, 19 November 2007\n"
MIT = "Copyright (c) 2026 Somebody\n\nPermission is hereby granted, free of charge, to any person\n"


def package(root: Path, **texts: str) -> Distribution:
    folder = root / "thing-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: thing\nVersion: 1\nLicense-Expression: MIT\n")
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "RECORD").write_text("".join(f"{p.relative_to(root).as_posix()},,\n" for p in folder.iterdir()))
    return Distribution.at(folder)


@pytest.fixture(scope="module")
def packages() -> list[licences.Package]:
    return licences.packages()


def test_every_dependency_is_allowed_and_in_the_table(packages: list[licences.Package]) -> None:
    assert [p.name for p in packages if not p.is_allowed] == []
    assert licences.TABLE.read_text("utf-8") == licences.table(packages), "run: python infra/licences.py"


def test_exceptions_are_needed(packages: list[licences.Package]) -> None:
    by_name = {p.name: p for p in packages}
    assert [n for n in licences.EXCEPTIONS if set(by_name[n].licences) <= set(licences.ALLOWED)] == []
    assert [n for n in licences.VENDORED if not by_name[n].vendored] == []


def test_the_core_is_without_nudenet_and_without_the_agpl(packages: list[licences.Package]) -> None:
    core = [p for p in packages if not p.extra]
    assert len(core) > 100, "the core's dependencies are followed"
    assert "nudenet" not in {p.name for p in core}
    assert [p.name for p in core if "AGPL" in p.files] == []
    assert {p.extra for p in packages if p.name == "nudenet"} == {"nudity"}


@pytest.mark.parametrize(
    ("texts", "expected", "allowed"),
    [
        ({"LICENSE": MIT}, {"MIT"}, True),
        ({"LICENSE": AGPL}, {"AGPL"}, False),
        ({"LICENSE": MIT, "COPYING.txt": AGPL}, {"MIT", "AGPL"}, False),
        ({"LICENSE": "Pay me.\n"}, {"unknown"}, False),
        ({}, set(), True),  # by its metadata
    ],
)
def test_files_count_more_than_metadata(
    texts: dict[str, str], expected: set[str], allowed: bool, tmp_path: Path
) -> None:
    described = licences.describe(package(tmp_path, **texts), "")
    assert set(described.files) == expected
    assert described.is_allowed == allowed


def test_vendored_copyleft_needs_a_reason(tmp_path: Path) -> None:
    vendored = tmp_path / "thing" / "_vendor" / "LICENSE"
    vendored.parent.mkdir(parents=True)
    vendored.write_text(AGPL)
    thing = package(tmp_path, LICENSE=MIT)
    with (tmp_path / "thing-1.dist-info" / "RECORD").open("a") as record:
        record.write("thing/_vendor/LICENSE,,\n")
    described = licences.describe(thing, "")
    assert (described.files, described.vendored, described.is_allowed) == (("MIT",), ("AGPL",), False)


def test_nudenets_files_are_recognised() -> None:
    described = licences.describe(distribution("nudenet"), "")
    assert described.files == ("AGPL",)
    assert described.metadata == "MIT License"
