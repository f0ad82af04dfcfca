"""Digests of the code that a result depends on, for DVC, checkpoints, caches and the benchmark.

A stage depends on the functions, classes and constants that can be reached from its entry point. Names are resolved
definition by definition through the package's sources, so unrelated code in the same files does not count. Comments,
docstrings and formatting do not change a digest. Plug-ins are loaded by name, which no import shows: a stage that loads
plug-ins of a kind depends on those that params.yaml selects.

Sources are parsed, never imported, so that the sources of another checkout can be digested as well. Results of this
process are digested by the sources that it was started with: an edit while it runs does not change what it computes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from deleatur import plugins

PACKAGE = Path(__file__).parent
STAGES = ("ingest", "reward", "invert", "erase", "attack", "sample", "evaluate", "gate", "register")
"""The stages in the order of the pipeline. All but `register`, which writes no file, are stages of dvc.yaml."""
DIGESTS = Path("out/code")
"""Folder of the digests that dvc.yaml depends on: STAGE.json, and packages.json for plug-ins of other packages."""

ACCESSORS = {
    "deleatur.config.methods.inverter": "inversion",
    "deleatur.config.methods.eraser": "erasers",
    "deleatur.config.methods.guide": "guides",
    "deleatur.config.methods.attacks": "attacks",
    "deleatur.config.methods.detectors": "detectors",
    "deleatur.config.methods.metrics": "metrics",
}
"""Functions that load the plug-ins that params.yaml selects → kind of plug-in."""

Definition = tuple[str, str]
"""Module, and the name of a top-level definition in it; "" for a module's own top-level statements."""


def stage_digests(stage: str, params: Mapping[str, Any], source: Path | None = None) -> dict[str, str]:
    """Module, data file or plug-in package → SHA-256 of its code that a stage can reach.

    params: params.yaml as a mapping, which selects the plug-ins. source: folder of the package `deleatur`, as it is on
    disk; None: the code that this process runs.
    """
    reached, external = reachable(stage, params, source)
    return _sources(source).digests(reached) | {f"{p.package} {p.name}": _sha256(p.code()) for p in external}


def reachable(
    stage: str, params: Mapping[str, Any], source: Path | None = None
) -> tuple[set[Definition], list[plugins.Plugin]]:
    """The definitions that a stage can reach, and the plug-ins of other packages that it loads."""
    sources = _sources(source)
    reached = sources.reach([("deleatur.stages", "run"), (f"deleatur.stages.{stage}", "run")])
    loaded = [kind for accessor, kind in ACCESSORS.items() if _definition(accessor) in reached]
    selected = [plugin for plugin in selected_plugins(params, source or PACKAGE) if plugin.kind in loaded]
    built_in = [(plugin.module, "*") for plugin in selected if not plugin.package]
    return reached | sources.reach(built_in), [plugin for plugin in selected if plugin.package]


def code_digests(*entries: Callable[..., Any], source: Path | None = None) -> dict[str, str]:
    """Like `stage_digests`, for the code reachable from functions and classes, including plug-ins of other packages."""
    external = {e.__module__: plugin for e in entries if (plugin := plugins.external_plugin(e.__module__))}
    built_in = [(e.__module__, e.__qualname__.partition(".")[0]) for e in entries if e.__module__ not in external]
    sources = _sources(source)
    digests = sources.digests(sources.reach(built_in))
    return digests | {f"{p.package} {p.name}": _sha256(p.code()) for p in external.values()}


def selected_plugins(params: Mapping[str, Any], source: Path = PACKAGE) -> list[plugins.Plugin]:
    """The plug-ins that params.yaml selects, once each, even if the file is otherwise invalid."""
    named: list[tuple[str, Any]] = []
    for section, kind in (("invert", "inversion"), ("erase", "erasers"), ("guide", "guides")):
        named.append((kind, _lookup(params, section, "method")))
    named += [("attacks", name) for name in _mapping(_lookup(params, "attack", "methods"))]
    for kind in ("detectors", "metrics"):
        entries = _mapping(_lookup(params, "evaluate", kind)).values()
        named += [(kind, _lookup(entry, "method")) for entry in entries]
    known = {kind: plugins.names(kind, source) for kind in plugins.KINDS}
    selected = dict.fromkeys((kind, name) for kind, name in named if name in known[kind])
    return [plugins.get(kind, name, source) for kind, name in selected]


def write_digests(project: Path) -> bool:
    """Updates the files in DIGESTS, one per stage. A project with its own `src/deleatur` is digested by that code.

    Returns whether anything changed; files that are up to date are not written.
    """
    project_source = project / "src" / "deleatur"
    source = project_source if project_source.is_dir() else PACKAGE
    plugins.refresh()
    try:
        params = yaml.safe_load((project / "params.yaml").read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False  # no project, or an invalid params.yaml, which Settings.load reports
    folder = project / DIGESTS
    texts = {folder / f"{stage}.json": stage_digests(stage, _mapping(params), source) for stage in STAGES[:-1]}
    texts[folder / "packages.json"] = {f"{p.origin} {p.kind}/{p.name}": _sha256(p.code()) for p in plugins.external()}
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
    """One source file: its top-level definitions, and the names that its imports bind."""

    name: str
    path: Path
    tree: ast.Module
    """Without docstrings."""

    @cached_property
    def definitions(self) -> dict[str, list[ast.stmt]]:
        """Name → statements that define it; "" → the other statements, which run at import."""
        definitions: dict[str, list[ast.stmt]] = {"": []}
        for statement in self.tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                continue
            for name in _defined_names(statement) or [""]:
                definitions.setdefault(name, []).append(statement)
        return definitions

    @cached_property
    def imports(self) -> dict[str, Definition]:
        """Local name → the definition or module of this package that an import anywhere in the file binds it to."""
        imports: dict[str, Definition] = {}
        for node in (statement for _, _, block in _blocks(self.tree) for statement in block):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deleatur" and not node.level:
                for alias in node.names:
                    imports[alias.asname or alias.name] = (node.module or "", alias.name)
        return imports


@dataclass(frozen=True)
class _Sources:
    """The package's sources below one folder."""

    root: Path
    _loaded: Mapping[Path, str] = field(default_factory=dict)
    """Texts that take precedence over the files."""
    _modules: dict[str, _Module | None] = field(default_factory=dict)
    _texts: dict[Definition, str] = field(default_factory=dict)
    _edges: dict[Definition, frozenset[Definition]] = field(default_factory=dict)
    _named: dict[Definition, set[Path]] = field(default_factory=dict)

    def module(self, name: str) -> _Module | None:
        if name not in self._modules:
            stem = self.root.joinpath(*name.split(".")[1:])
            path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
            exists = path.is_file() and (name == "deleatur" or name.startswith("deleatur."))
            text = self._loaded.get(path) or (path.read_text("utf-8") if exists else "")
            self._modules[name] = _Module(name, path, _without_docstrings(ast.parse(text))) if exists else None
        return self._modules[name]

    def reach(self, entries: list[Definition]) -> set[Definition]:
        """All definitions that can be reached from these. (module, "*") stands for all definitions of a module."""
        reached: set[Definition] = set()
        pending = [definition for entry in entries for definition in self._resolve(*entry)]
        while pending:
            if (definition := pending.pop()) not in reached:
                reached.add(definition)
                pending += self._references(definition)
        return reached

    def digests(self, reached: set[Definition]) -> dict[str, str]:
        """Module or data file → SHA-256 over the text of its reached definitions."""
        texts: dict[str, list[str]] = {}
        for definition in sorted(reached):
            if text := self._text(definition):
                texts.setdefault(definition[0], []).append(text)
        digests = {module: _sha256(of_module) for module, of_module in texts.items()}
        for path in sorted({path for definition in reached for path in self._data_files(definition)}):
            digests[path.relative_to(self.root.parent).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
        return digests

    def _resolve(self, module: str, name: str) -> Iterator[Definition]:
        """What `module.name` refers to: a definition of that module, one that it imports, or a submodule."""
        if source := self.module(module):
            if name == "*":
                yield from ((module, definition) for definition in source.definitions)
            elif name in source.definitions:
                yield module, name
            elif self.module(f"{module}.{name}"):
                yield from self._resolve(f"{module}.{name}", "*")
            elif name in source.imports:
                yield from self._resolve(*source.imports[name])

    def _references(self, definition: Definition) -> frozenset[Definition]:
        if definition not in self._edges:
            self._edges[definition] = frozenset(self._find_references(definition))
        return self._edges[definition]

    def _find_references(self, definition: Definition) -> Iterator[Definition]:
        source = self._of(definition)
        yield source.name, ""  # runs when the module is imported
        resolved: set[int] = set()
        for node in (node for statement in source.definitions[definition[1]] for node in ast.walk(statement)):
            match node:
                # `files.write_json` after `from deleatur.storage import files`: one name of the module, not all of it.
                # ast.walk visits the attribute before the name in it.
                case ast.Attribute(value=ast.Name(id=name)) if name in source.imports:
                    if self.module(module := ".".join(source.imports[name])):
                        resolved.add(id(node.value))
                        yield from self._resolve(module, node.attr)
                case ast.Name(id=name) if id(node) not in resolved:
                    if name in source.imports:
                        yield from self._resolve(*source.imports[name])
                    if name in source.definitions:
                        yield source.name, name

    def _of(self, definition: Definition) -> _Module:
        module = self.module(definition[0])
        assert module is not None
        return module

    def _text(self, definition: Definition) -> str:
        if definition not in self._texts:
            statements = self._of(definition).definitions[definition[1]]
            self._texts[definition] = "\n".join(map(ast.unparse, statements))
        return self._texts[definition]

    @cached_property
    def files(self) -> dict[str, list[Path]]:
        """Name → files that code may refer to by it: templates, styles, modules that MLflow loads by path."""
        files: dict[str, list[Path]] = {}
        for path in sorted(self.root.rglob("*.*")):
            if path.is_file() and path.suffix not in (".pyc", ".typed"):
                files.setdefault(path.name, []).append(path)
        return files

    def _data_files(self, definition: Definition) -> set[Path]:
        """Files that a definition names, and those that these files name in turn."""
        if definition not in self._named:
            pending, named = [self._text(definition)], self._named.setdefault(definition, set())
            while pending:
                quoted = _QUOTED.findall(pending.pop())
                new = {path for name in quoted for path in self.files.get(name, ())} - named
                named |= new
                pending += [path.read_text("utf-8", errors="replace") for path in new]
        return self._named[definition]


_QUOTED = re.compile(r"""(?<=["'])[\w.-]+(?=["'])""")
"""What may be a file's name in a text."""


def _blocks(node: ast.AST) -> Iterator[tuple[ast.AST, str, list[ast.stmt]]]:
    """All blocks of statements in a node, as (owner, field, statements), outer ones first. Expressions have none."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        if isinstance(getattr(node, name, None), list):
            yield node, name, getattr(node, name)
            for statement in getattr(node, name):
                yield from _blocks(statement)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """The same tree, without docstrings, including those of attributes."""
    for owner, name, statements in _blocks(tree):
        code = [statement for statement in statements if not _is_docstring(statement)]
        setattr(owner, name, code or ([ast.Pass()] if name == "body" and owner is not tree else []))
    return tree


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _defined_names(statement: ast.stmt) -> list[str]:
    """Names that a definition or an assignment defines; empty for other statements."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return []


@cache
def _sources_at(root: Path, stamp: str) -> _Sources:
    return _Sources(root)


_RUNNING = _Sources(PACKAGE, {path: path.read_text("utf-8") for path in PACKAGE.rglob("*.py")})
"""The sources of this process. Read when it starts: it keeps running this code when a file is edited."""


def _sources(root: Path | None) -> _Sources:
    """The sources in a folder, parsed again when a file has changed; None: those of this process."""
    if root is None:
        return _RUNNING
    stamp = _sha256([[str(p), p.stat().st_mtime_ns, p.stat().st_size] for p in sorted(root.rglob("*.py"))])
    return _sources_at(root, stamp)


def _definition(dotted: str) -> Definition:
    module, _, name = dotted.rpartition(".")
    return module, name


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _lookup(value: Any, *keys: str) -> Any:
    for key in keys:
        value = _mapping(value).get(key)
    return value


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
