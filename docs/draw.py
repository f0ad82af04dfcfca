"""Draw the diagrams of docs/architecture.md from the code: `python docs/draw.py`.

    chain.svg  the stages and what each reads and writes, from dvc.yaml
    rooms.svg  the packages of deleatur in their layers, from pyproject.toml and the import graph

Both are deterministic and adapt to a dark page.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import grimp
import yaml

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "deleatur"

STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328; }
  .name { font-weight: 600; } .note, .lines { font-size: 11.5px; fill: #59636e; }
  .page { fill: #fff; } .box { fill: #eef4fb; stroke: #8cb4dc; }
  .band { fill: #f3f5f7; } .grid { stroke: #d8dee4; }
  .flow { stroke: #3a7abd; stroke-width: 2; } .dot { fill: #3a7abd; stroke: #3a7abd; stroke-width: 2; }
  .ring { fill: #fff; stroke: #3a7abd; stroke-width: 2; } .outside { stroke-dasharray: 4 3; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .note, .lines { fill: #9198a1; }
    .page { fill: #0d1117; } .box { fill: #15263b; stroke: #3a6ea5; }
    .band { fill: #151b23; } .grid { stroke: #30363d; }
    .flow { stroke: #6cb0f5; } .dot { fill: #6cb0f5; stroke: #6cb0f5; } .ring { fill: #0d1117; stroke: #6cb0f5; }
  }
"""


def svg(width: int, height: int, title: str, shapes: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n'
        f'<rect class="page" width="{width}" height="{height}"/>\n' + "\n".join(shapes) + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'


def dot(x: float, y: float, radius: float, kind: str) -> str:
    return f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="{radius:g}"/>'


def rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5"/>'


def wrap(words: str, width: int) -> list[str]:
    """Lines of at most `width` characters."""
    lines = [""]
    for word in words.split():
        lines[-1:] = [f"{lines[-1]} {word}".strip()] if len(f"{lines[-1]} {word}") <= width else [lines[-1], word]
    return lines


# The chain


@dataclass(frozen=True)
class Data:
    """One folder or file that stages hand to each other. Columns are positions of stages in the chain."""

    name: str
    writer: int | None
    """None: it is in the repository."""
    readers: Sequence[int]


def chain() -> str:
    """Stages as columns; what they read and write as rows: a filled dot writes, a ring reads."""
    stages: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]
    columns = [name for name in stages if name != "code"]
    left, top, column, row = 130, 112, 112, 30
    described = {name: stages[name].get("desc", "") for name in columns}
    columns.append("register")  # it writes no file, so dvc.yaml does not have it
    described["register"] = "a version in MLflow, with its decision"
    rows = list(_data(stages, columns))

    def x(position: int) -> float:
        return left + column * (position + 0.5)

    shapes = []
    for position, name in enumerate(columns):
        outside = "box outside" if name == "register" else "box"
        shapes.append(rect(x(position) - 50, 14, 100, 28, outside))
        shapes.append(text(x(position), 33, name, "name", "middle"))
        for i, words in enumerate(wrap(described[name], 18)):
            shapes.append(text(x(position), 60 + 15 * i, words, "note", "middle"))
    for first, second in pairwise(range(len(columns))):
        shapes.append(line(x(first) + 50, 28, x(second) - 50, 28, "flow"))
    for i, data in enumerate(rows):
        y = top + row * (i + 0.5)
        start = left if data.writer is None else x(data.writer)
        shapes.append(text(left - 14, y + 4, data.name, "", "end"))
        shapes.append(line(left, y, x(len(columns) - 1) + 50, y, "grid"))
        shapes.append(line(start, y, x(max(data.readers, default=data.writer or 0)), y, "flow"))
        shapes += [dot(x(reader), y, 5, "ring") for reader in data.readers]
        shapes += [dot(start, y, 5, "dot")] if data.writer is not None else []
    height = top + row * len(rows) + 34
    shapes.append(text(left, height - 12, "●  written by the stage     ○  read by the stage", "note"))
    return svg(left + column * len(columns) + 10, height, "The chain: what each stage reads and writes", shapes)


def _data(stages: Mapping[str, Any], columns: Sequence[str]) -> Iterator[Data]:
    """Inputs in the repository first, then what stages write, in the order of the chain."""
    reads = {name: [_short(path) for path in stages[name]["deps"]] for name in stages}
    writes = {name: [_short(path) for path in stages[name]["outs"]] for name in stages}
    writes["register"], reads["register"] = [], ["verdict", "report", "delta"]
    written = {path: columns.index(name) for name in columns for path in writes[name]}
    inputs = dict.fromkeys(path for name in columns for path in reads[name] if path not in written)
    for path in [*(path for path in inputs if not path.startswith("out/")), *written]:
        readers = [i for i, name in enumerate(columns) if path in reads[name]]
        if readers or path in ("verdict",):
            yield Data(f"{path}/", written.get(path), readers)


def _short(path: str | Mapping[str, Any]) -> str:
    """`${paths.delta}` → `delta`; a mapping has one key, the path."""
    name = path if isinstance(path, str) else next(iter(path))
    return re.sub(r"\$\{paths\.(\w+)\}", r"\1", name)


# The rooms


@dataclass(frozen=True)
class Room:
    """A package or module directly below `deleatur`."""

    name: str
    layer: int
    purpose: str
    lines: int
    """Lines of code that are not blank."""


def rooms() -> list[Room]:
    """From the top layer to the bottom."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [_room(name.strip(), i) for i, layer in enumerate(layers) for name in layer.split("|")]


def _room(name: str, layer: int) -> Room:
    package = SOURCE / name
    files = sorted(package.rglob("*.py")) if package.is_dir() else [package.with_suffix(".py")]
    docstring = ast.get_docstring(
        ast.parse((package / "__init__.py" if package.is_dir() else files[0]).read_text("utf-8"))
    )
    purpose = re.split(r"(?<=\.) ", (docstring or "").splitlines()[0])[0].rstrip(".").removeprefix("Shelf: ")
    count = sum(bool(row.strip()) for file in files for row in file.read_text("utf-8").splitlines())
    return Room(name, layer, purpose, count)


def imports(names: Sequence[str]) -> dict[tuple[str, str], int]:
    """(importing room, imported room) → number of imports between their modules."""
    graph = grimp.build_graph("deleatur", exclude_type_checking_imports=True, cache_dir=None)
    of = {module: module.split(".")[1] for module in graph.modules if "." in module}
    counts: dict[tuple[str, str], int] = {}
    for importer in of:
        for imported in graph.find_modules_directly_imported_by(importer):
            pair = (of[importer], of.get(imported, ""))
            if pair[0] != pair[1] and set(pair) <= set(names):
                counts[pair] = counts.get(pair, 0) + 1
    return counts


def layers() -> str:
    """Rooms as rows, top layer first; a dot in a row says which room below it is imported."""
    known = rooms()
    names = [room.name for room in known]
    edges = imports(names)
    left, top, row, cell, columns = 720, 112, 26, 23, names[1:]  # nothing imports the topmost room

    def x(name: str) -> float:
        return left + cell * (columns.index(name) + 0.5)

    width, height = left + cell * len(columns) + 70, top + row * len(known) + 34
    shapes = []
    for name in columns:
        turned = f'<text class="note" transform="translate({x(name) + 4:g} {top - 8}) rotate(-55)">{name}</text>'
        shapes.append(turned)
    for i, room in enumerate(known):
        y = top + row * i
        if room.layer % 2 == 0:
            shapes.append(f'<rect class="band" x="0" y="{y}" width="{width}" height="{row}"/>')
        shapes.append(text(12, y + 18, room.name, "name"))
        shapes.append(text(122, y + 18, _shortened(room.purpose, 84), "note"))
        shapes.append(text(left - 14, y + 18, f"{room.lines}", "lines", "end"))
        for name in columns:
            if edges.get((room.name, name)):
                shapes.append(dot(x(name), y + row / 2, 5, "dot"))
    shapes.append(text(left - 14, top - 8, "lines", "note", "end"))
    legend = (
        "A shade is a layer: its rooms may import only rooms below. ●  the room of the row imports that of the column."
    )
    shapes.append(text(12, height - 12, legend, "note"))
    return svg(width, height, "The rooms of deleatur in their layers, and which imports which", shapes)


def _shortened(words: str, width: int) -> str:
    return words if len(words) <= width else words[: words.rindex(" ", 0, width)].rstrip(",;:") + " …"


DRAWINGS = {"chain.svg": chain, "rooms.svg": layers}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (ROOT / "docs" / name).write_text(draw(), "utf-8")
