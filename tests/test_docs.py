"""The documentation names paths, commands, options and settings that exist, and its drawings match the code."""

from __future__ import annotations

import re
import runpy
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from deleatur.cli import app
from deleatur.config.schema import json_schema

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "flows/*.md", "infra/*.md", "prompts/*.md", "mlflow/*.md", "emoji/*.md")
    for path in ROOT.glob(pattern)
)
CURRENT = [page for page in PAGES if page.name not in ("CHANGELOG.md", "ATTRIBUTION.md")]
"""The changelog also names what there was."""
GENERATED = re.compile(r"^(out|compare/dvc\.yaml|\.venv|mlflow\.db|ledger\.jsonl|artifacts/|\.dvc/config|infra/\.env)")
OTHERS = ("src/deleatur/erasers/mine.py", "src/deleatur/erasers/shave.py")
"""Files that a reader is told to write."""

pages = pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    return page.read_text("utf-8")


def code(page: Path) -> Iterator[str]:
    """Inline code, and the lines of code blocks that are typed into a terminal."""
    text = prose(page)
    blocks = r"^```.*?^```$"
    for block in re.findall(blocks, text, re.MULTILINE | re.DOTALL):
        yield from re.findall(r"^\$ (.*)$", block, re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", re.sub(blocks, "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)#?([^)\s]*)\)", prose(page)):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


FILES = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
FOLDERS = {f"{folder}/" for file in FILES for folder in Path(file).parents}
KNOWN = "\n".join([*FILES, *FOLDERS])


@pages
def test_paths_exist(page: Path) -> None:
    for path in code(page):
        if re.fullmatch(r"[\w.\-]+(/[\w.\-]+)*(/|\.(py|md|yaml|toml|csv|html|ya?ml|svg|txt))", path):
            exists = re.search(rf"(^|/){re.escape(path.removeprefix('../'))}$", KNOWN, re.MULTILINE)
            assert exists or GENERATED.match(path) or path in OTHERS or re.search("[A-Z]{4}", path), path


@pages
def test_commands_and_their_options_exist(page: Path) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for line in code(page):
        for words in re.findall(r"(?:^|&& |worker-\w+ )deleatur ((?:[a-z]+|--).*?)(?: [#&;|]|$)", line):
            name, *arguments = words.split()
            if name.startswith("--"):
                continue
            assert name in commands, line
            known = {option for parameter in commands[name].params for option in parameter.opts}
            assert {a.partition("=")[0] for a in arguments if a.startswith("--")} <= known, line


@pages
def test_scripts_and_their_options_exist(page: Path) -> None:
    for line in code(page):
        for script, arguments in re.findall(r"python ((?!-)\S+\.py)((?: \S+)*)", line):
            source = (ROOT / script).read_text("utf-8")
            for option in re.findall(r" (--[a-z-]+)", arguments.partition(" && ")[0]):
                names = (f'"{option}"', f"{option.strip('-').replace('-', '_')}:")  # argparse's, or a parameter
                assert any(name in source for name in names), f"{script} {option}"


@pages
def test_environment_variables_exist(page: Path) -> None:
    for variable in set(re.findall(r"DELEATUR_[A-Z_]+", prose(page))):
        assert any(variable in text for text in _sources()), variable


@pages
def test_classes_exist(page: Path) -> None:
    for name in code(page):
        if re.fullmatch(r"(?:[A-Z][a-z]+){2,}", name):
            assert any(f"class {name}" in text for text in _sources()), name


@cache
def _sources() -> list[str]:
    return [
        (ROOT / file).read_text("utf-8") for file in FILES if re.match(r"(src|flows|infra)/.*(py|yaml|file|sh)$", file)
    ]


SCHEMA = json_schema()


def knows(schema: Any, keys: list[str]) -> bool:
    """Whether params.yaml may have these keys."""
    if not isinstance(schema, dict) or not keys:
        return schema is not False
    variants = [variant for kind in ("anyOf", "allOf", "oneOf") for variant in schema.get(kind, [])]
    named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    others = [*patterns.values(), schema.get("additionalProperties", False)]
    below = [named[keys[0]]] if keys[0] in named else others
    return any(knows(each, keys[1:]) for each in below) or any(knows(variant, keys) for variant in variants)


def test_the_schema_tells_known_settings_from_unknown() -> None:
    for dotted in ("register.approval", "erase.sdd.training.preservation_weight", "concepts.NAME.detection"):
        assert knows(SCHEMA, dotted.split(".")), dotted
    for dotted in ("register.aproval", "erase.sdd.loop", "erase.sdd.training.preserve", "concepts.NAME.found"):
        assert not knows(SCHEMA, dotted.split(".")), dotted


@pages
def test_settings_exist(page: Path) -> None:
    sections = SCHEMA["properties"]
    for text in code(page):
        for dotted in re.findall(r"(?:^|-S )([a-z_]+(?:\.(?:\w+|\*))+)(?=$|[:=])", text):
            if dotted.split(".")[0] in sections and not dotted.endswith((".py", ".yaml", ".md", ".csv", ".html")):
                assert knows(SCHEMA, dotted.split(".")), dotted


def test_drawings_match_the_code() -> None:
    drawings = runpy.run_path(str(ROOT / "docs" / "draw.py"))["DRAWINGS"]
    for name, draw in drawings.items():
        committed = (ROOT / "docs" / name).read_text("utf-8")
        assert _without_counts(draw()) == _without_counts(committed), f"docs/{name} is out of date: python docs/draw.py"


def test_line_counts_in_the_drawing_are_about_right() -> None:
    drawing = (ROOT / "docs" / "rooms.svg").read_text("utf-8")
    shown = sum(int(count) for count in re.findall(r'class="lines"[^>]*>(\d+)<', drawing))
    rooms = runpy.run_path(str(ROOT / "docs" / "draw.py"))["rooms"]()
    assert abs(shown - sum(room.lines for room in rooms)) < 0.2 * shown, "python docs/draw.py"


def _without_counts(drawing: str) -> str:
    return re.sub(r'(class="lines"[^>]*>)\d+<', r"\1<", drawing)
