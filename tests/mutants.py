"""Mutation testing: which small faults in a module do its tests miss?

    python tests/mutants.py src/deleatur/maths/noise.py tests/maths/test_noise.py

A mutant is a function with one expression changed. pytest collects once; each mutant is a fork of that process in which
the function has other code: milliseconds, instead of the seconds of importing torch. What is evaluated when the module
is imported, such as defaults, is not mutated. A survivor is a missing test, or code that changes nothing.
"""

from __future__ import annotations

import ast
import copy
import gc
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

NUMBER, SEED = 25, 0  # of mutants that are tried
PAIRS = [(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn), (ast.Is, ast.IsNot)]
PAIRS += [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitAnd, ast.BitOr), (ast.And, ast.Or), (ast.Pow, ast.FloorDiv)]
OPPOSITE: dict[type, Any] = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
TRANSPARENT = {"abs", "clamp", "clip", "clone", "detach", "double", "eval", "float", "round", "sqrt", "square", "to"}
"""Methods that a mutant leaves out."""


def changed(node: Any, **fields: object) -> ast.AST:
    new = copy.copy(node)
    vars(new).update(fields)
    return new


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of a node."""
    match node:
        case ast.Compare(ops=[op]):
            yield changed(node, ops=[OPPOSITE[type(op)]()])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OPPOSITE:
            yield changed(node, op=OPPOSITE[type(op)]())
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            yield changed(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.Constant(value=bool(value)):
            yield changed(node, value=not value)
        case ast.Constant(value=int(value) | float(value)):
            yield changed(node, value=value + 1)
        case ast.Call(func=ast.Attribute(value=inner, attr=name)) if name in TRANSPARENT:
            yield inner
        case ast.Call(args=[first, second, *rest]):
            yield changed(node, args=[second, first, *rest])
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            yield ast.copy_location(ast.Pass(), node)


class Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else self.generic_visit(node)


def mutants(source: str, path: Path) -> Iterator[tuple[str, list[CodeType]]]:
    """A description of each mutant, and its functions."""
    tree = ast.parse(source)
    for node in [*ast.walk(tree)]:
        for new in changes(node):
            before, after = (ast.unparse(n).splitlines()[0] for n in (node, new))
            mutated = ast.fix_missing_locations(Replace(node, new).visit(copy.deepcopy(tree, {id(node): node})))
            yield f"{node.lineno}: {before}  →  {after}", functions(compile(mutated, path, "exec", dont_inherit=True))  # type: ignore[attr-defined]


def functions(code: CodeType) -> list[CodeType]:
    """The functions of a module and of its classes, in order."""
    nested = [c for c in code.co_consts if isinstance(c, CodeType)]
    return [f for c in nested for f in ([c] if c.co_flags & 1 else functions(c))]


class Mutation:
    """pytest plug-in: in place of the run of all tests, one for each mutant, until the first failure."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        source = self.path.read_text("utf-8")
        original = functions(compile(source, self.path, "exec", dont_inherit=True))
        live = {f.__code__: f for f in gc.get_objects() if type(f) is FunctionType}
        candidates = [
            (text, swaps)
            for text, mutated in mutants(source, self.path)
            if (swaps := [(live[a], b) for a, b in zip(original, mutated, strict=True) if a != b and a in live])
        ]
        selected = random.Random(SEED).sample(candidates, min(NUMBER, len(candidates)))
        survivors = sorted(text for text, swaps in selected if self.survives(session, swaps))
        print(f"\n{len(selected) - len(survivors)} of {len(selected)} killed; survivors:", *survivors, sep="\n  ")
        return True

    def survives(self, session: pytest.Session, swaps: list[tuple[FunctionType, CodeType]]) -> bool:
        if (pid := os.fork()) == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            for function, code in swaps:
                function.__code__ = code
            for item, following in zip(session.items, [*session.items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if session.testsfailed:
                    break
            os._exit(bool(session.testsfailed))
        return os.waitpid(pid, 0)[1] == 0


if __name__ == "__main__":
    module, *tests = sys.argv[1:]
    pytest.main(["-q", "-s", "-n", "0", "-p", "no:cacheprovider", *tests], plugins=[Mutation(Path(module))])
