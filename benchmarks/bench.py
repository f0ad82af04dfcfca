"""What the benchmarks share: a variant of the settings in a folder of its own, stages run in it, a table at the end."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from deleatur import stages
from deleatur.config.settings import Settings, merged
from deleatur.runtime.progress import bar
from deleatur.storage import json_records
from deleatur.training.finetune import Progress

ROOT = Path(__file__).parents[1]
OUT = Path("out/bench")


def variant(name: str, changes: Mapping[str, Any], shared: Mapping[str, str] | None = None) -> Settings:
    """params.yaml with changes, writing under out/bench; `shared` stages' folders are somewhere else.

    The folder's name tells what all numbers are: after an edit of params.yaml nothing old is taken for new.
    """
    params = merged(yaml.safe_load((ROOT / "params.yaml").read_text("utf-8")), changes)
    digest = json_records.digest({"params": params, "shared": shared})[:8]
    for key in ("reward", "tokens", "delta", "attacks", "state", "shots", "scores", "report", "verdict"):
        params["paths"][key] = str(OUT / f"{name}-{digest}" / key)
    params["paths"]["feedback"] = str(OUT / "feedback")
    params["paths"] |= shared or {}
    return Settings.model_validate(params)


def folder(settings: Settings) -> Path:
    """Where a variant writes, but for what it shares."""
    return settings.paths.shots.parent


def run(settings: Settings, names: Iterable[str]) -> dict[str, float]:
    """Runs stages that have not run yet for this variant; seconds of each, kept beside its results."""
    path = folder(settings) / "seconds.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    for name in names:
        if name not in seconds:
            left = settings.paths.shots if name == "sample" else settings.paths.state
            shutil.rmtree(left, ignore_errors=True)  # a stage that goes on would look quick
            began = time.perf_counter()
            stages.run(name, settings)
            seconds[name] = round(time.perf_counter() - began, 1)
            path.write_text(json.dumps(seconds))
    return seconds


@contextmanager
def watching(what: str) -> Iterator[Callable[[Progress], None]]:
    """Inside, a bar that an eraser's `on_step` moves."""
    with bar(what, 1) as advance:
        yield lambda p: advance.at(p.step, p.total, f"loss {p.loss:.4f}")


def interval(score: Mapping[str, Any]) -> str:
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def show(title: str, rows: list[dict[str, str]]) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*row.values())
    Console(width=200).print(table)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads")
