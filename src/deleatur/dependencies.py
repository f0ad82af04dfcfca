"""What code a result depends on, computed from the import graph: one digest for DVC, checkpoints, caches and benchmark.

From an entry point, names are followed through the package's sources, definition by definition: a stage depends on the
functions, classes and constants that it can reach, not on the files they happen to share with others. Comments,
docstrings and formatting are no part of a digest. Plug-ins are loaded by name, which no import shows: a stage that asks
for one depends on the plug-in that params.yaml selects.

Sources are parsed, never imported, so the sources of another checkout can be digested as well.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from deleatur import plugins

PACKAGE = Path(__file__).parent
STAGES = ("ingest", "reward", "invert", "erase", "attack", "sample", "evaluate", "gate", "register")
"""The stages in the order of the chain. All but `register` are stages of dvc.yaml: register makes no file."""
DIGESTS = Path("out/code")
"""Where a project keeps the digests by which DVC knows code: STAGE.json, and packages.json for plug-ins of others."""

ACCESSORS = {
    "deleatur.config.methods.inverter": "inversion",
    "deleatur.config.methods.eraser": "erasers",
    "deleatur.config.methods.guide": "guides",
    "deleatur.config.methods.attacks": "attacks",
    "deleatur.config.methods.detectors": "detectors",
    "deleatur.config.methods.metrics": "metrics",
}
"""Functions that load the plug-ins that params.yaml selects → plug-in registry."""

Definition = tuple[str, str]
"""Module, and the name of a top-level definition in it; "" for a module's own top-level statements."""


def of_stage(stage: str, params: Mapping[str, Any], source: Path = PACKAGE) -> dict[str, str]:
    """Module, data file or package → SHA-256 of what one stage can reach of it.

    params: params.yaml as a mapping; it selects the plug-ins. source: folder of the package `deleatur`.
    """
    reached, packages = reach(stage, params, source)
    return _sources(source).digests(reached) | {f"{m.package} {m.name}": _sha256(m.code()) for m in packages}


def reach(
    stage: str, params: Mapping[str, Any], source: Path = PACKAGE
) -> tuple[set[Definition], list[plugins.Method]]:
    """The definitions that one stage can reach, and the plug-ins of other packages that it loads."""
    sources = _sources(source)
    reached = sources.reach([("deleatur.stages", "run"), (f"deleatur.stages.{stage}", "run")])
    loaded = [registry for accessor, registry in ACCESSORS.items() if _split(accessor) in reached]
    selected = [method for method in select(params, source) if method.shelf in loaded]
    ours = [(method.module, "*") for method in selected if not method.package]
    return reached | sources.reach(ours), [method for method in selected if method.package]


def of(*entries: Callable[..., Any], source: Path = PACKAGE) -> dict[str, str]:
    """As `of_stage`, of functions and classes, of ours or of a package's plug-in."""
    brought = {e.__module__: method for e in entries if (method := plugins.brought(e.__module__))}
    ours = [(e.__module__, e.__qualname__.partition(".")[0]) for e in entries if e.__module__ not in brought]
    sources = _sources(source)
    digests = sources.digests(sources.reach(ours))
    return digests | {f"{m.package} {m.name}": _sha256(m.code()) for m in brought.values()}


def select(params: Mapping[str, Any], source: Path = PACKAGE) -> list[plugins.Method]:
    """Every plug-in that params.yaml selects, once each, also where the file is not valid in other respects."""
    named: list[tuple[str, Any]] = []
    for section, registry in (("invert", "inversion"), ("erase", "erasers"), ("guide", "guides")):
        named.append((registry, _at(params, section, "method")))
    named += [("attacks", name) for name in _mapping(_at(params, "attack", "methods"))]
    for registry in ("detectors", "metrics"):
        named += [(registry, _at(each, "method")) for each in _mapping(_at(params, "evaluate", registry)).values()]
    known = {registry: plugins.names(registry, source) for registry in plugins.SHELVES}
    found = dict.fromkeys((registry, name) for registry, name in named if name in known[registry])
    return [plugins.method(registry, name, source) for registry, name in found]


def write(project: Path) -> bool:
    """Brings DIGESTS of a project up to date: a file for each stage, of the code that lies in the project where it has
    some of its own. Returns whether anything changed; a file that is right is not touched.
    """
    own = project / "src" / "deleatur"
    source = own if own.is_dir() else PACKAGE
    plugins.refresh()
    try:
        params = yaml.safe_load((project / "params.yaml").read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False  # no project, or one whose params.yaml is refused with a message by whoever loads it
    folder = project / DIGESTS
    texts = {folder / f"{stage}.json": of_stage(stage, _mapping(params), source) for stage in STAGES[:-1]}
    texts[folder / "packages.json"] = {f"{m.origin} {m.shelf}/{m.name}": _sha256(m.code()) for m in plugins.foreign()}
    changed = False
    for path, digests in texts.items():
        text = json.dumps(digests, indent=1, sort_keys=True)
        if not path.is_file() or path.read_text("utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            changed = True
    for path in set(folder.rglob("*.json")) - set(texts):
        path.unlink()
        changed = True
    return changed


@dataclass(frozen=True)
class _Module:
    """One source file: its top-level definitions, and what its imports bind."""

    name: str
    path: Path
    tree: ast.Module

    @cached_property
    def definitions(self) -> dict[str, list[ast.stmt]]:
        """Name → statements that define it; "" → the other statements, which run at import."""
        found: dict[str, list[ast.stmt]] = {"": []}
        for statement in self.tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom) or _is_text(statement):
                continue
            for name in _defined(statement) or [""]:
                found.setdefault(name, []).append(statement)
        return found

    @cached_property
    def bound(self) -> dict[str, Definition]:
        """Local name → what of ours an import binds it to, wherever in the file the import stands. A name of a module
        itself is bound to (module, "*").
        """
        found: dict[str, Definition] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deleatur" and not node.level:
                for alias in node.names:
                    found[alias.asname or alias.name] = (node.module or "", alias.name)
        return found


@dataclass(frozen=True)
class _Sources:
    """The package's sources below one folder."""

    root: Path
    _modules: dict[str, _Module | None] = field(default_factory=dict)
    _texts: dict[Definition, str] = field(default_factory=dict)
    _edges: dict[Definition, frozenset[Definition]] = field(default_factory=dict)

    def module(self, name: str) -> _Module | None:
        if name not in self._modules:
            place = self.root.joinpath(*name.split(".")[1:])
            path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            found = path.is_file() and (name == "deleatur" or name.startswith("deleatur."))
            self._modules[name] = _Module(name, path, ast.parse(path.read_text("utf-8"))) if found else None
        return self._modules[name]

    def reach(self, entries: list[Definition]) -> set[Definition]:
        """Every definition that can be reached from these. (module, "*") stands for all of a module."""
        reached: set[Definition] = set()
        ahead = [each for entry in entries for each in self._resolve(*entry)]
        while ahead:
            if (definition := ahead.pop()) not in reached:
                reached.add(definition)
                ahead += self._references(definition)
        return reached

    def digests(self, reached: set[Definition]) -> dict[str, str]:
        """Module or data file → SHA-256 over the text of what is reached of it."""
        of: dict[str, list[str]] = {}
        for definition in sorted(reached):
            if text := self._text(definition):
                of.setdefault(definition[0], []).append(text)
        found = {module: _sha256(texts) for module, texts in of.items()}
        for path in sorted({path for definition in reached for path in self._data(definition)}):
            found[path.relative_to(self.root.parent).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def _resolve(self, module: str, name: str) -> Iterator[Definition]:
        """What `module.name` is: a definition of that module, one that it imports, or a module of its own."""
        if of := self.module(module):
            if name == "*":
                yield from ((module, each) for each in of.definitions)
            elif name in of.definitions:
                yield module, name
            elif self.module(f"{module}.{name}"):
                yield from self._resolve(f"{module}.{name}", "*")
            elif name in of.bound:
                yield from self._resolve(*of.bound[name])

    def _references(self, definition: Definition) -> frozenset[Definition]:
        if definition not in self._edges:
            self._edges[definition] = frozenset(self._find(definition))
        return self._edges[definition]

    def _find(self, definition: Definition) -> Iterator[Definition]:
        of = self.module(definition[0])
        assert of is not None
        yield of.name, ""  # runs when the module is imported
        handled: set[int] = set()
        for statement in of.definitions[definition[1]]:
            for node in ast.walk(statement):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in of.bound:
                    module = ".".join(of.bound[node.value.id])
                    if self.module(module):  # `files.write_json` of `from deleatur.storage import files`
                        handled.add(id(node.value))
                        yield from self._resolve(module, node.attr)
                if isinstance(node, ast.Name) and id(node) not in handled:
                    if node.id in of.bound:
                        yield from self._resolve(*of.bound[node.id])
                    if node.id in of.definitions:
                        yield of.name, node.id

    def _text(self, definition: Definition) -> str:
        if definition not in self._texts:
            of = self.module(definition[0])
            assert of is not None
            bare = (_Bare().visit(ast.parse(ast.unparse(s))) for s in of.definitions[definition[1]])
            self._texts[definition] = "\n".join(filter(None, map(ast.unparse, bare)))
        return self._texts[definition]

    @cached_property
    def files(self) -> list[Path]:
        """What code may read or run by its name: templates, styles, modules that MLflow loads from their path."""
        return [p for p in sorted(self.root.rglob("*.*")) if p.is_file() and p.suffix not in (".pyc", ".typed")]

    def _data(self, definition: Definition) -> Iterator[Path]:
        """Files that a definition names, and those that these name in turn."""
        ahead = [self._text(definition)]
        found: set[Path] = set()
        while ahead:
            text = ahead.pop()
            for path in self.files:
                if path not in found and f'"{path.name}"' in text.replace("'", '"'):
                    found.add(path)
                    ahead.append(path.read_text("utf-8", errors="replace"))
        yield from found


class _Bare(ast.NodeTransformer):
    """Takes docstrings away, those of attributes too."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if _is_text(node) else node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if getattr(node, "body", None) == [] and not isinstance(node, ast.Module):
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _defined(statement: ast.stmt) -> list[str]:
    """Names that a top-level statement defines and does nothing else."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return []


@cache
def _sources_at(root: Path, stamp: str) -> _Sources:
    return _Sources(root)


def _sources(root: Path) -> _Sources:
    """Parsed once for as long as no file changes."""
    stamp = _sha256([[str(p), p.stat().st_mtime_ns, p.stat().st_size] for p in sorted(root.rglob("*.py"))])
    return _sources_at(root, stamp)


def _split(dotted: str) -> Definition:
    module, _, name = dotted.rpartition(".")
    return module, name


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = _mapping(value).get(key)
    return value


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
