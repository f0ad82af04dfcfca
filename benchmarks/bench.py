"""Shared by the benchmarks: variants of the settings in folders of their own, running stages, and the table."""

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
from deleatur.training.loop import TrainingProgress

ROOT = Path(__file__).parents[1]
OUT = Path("out/bench")


def variant(name: str, changes: Mapping[str, Any], shared: Mapping[str, str] | None = None) -> Settings:
    """params.yaml with changes, whose outputs are under out/bench. shared: paths of outputs of other variants.

    The folder's name has a digest of all settings: after an edit of params.yaml no old result is reused.
    """
    params = merged(yaml.safe_load((ROOT / "params.yaml").read_text("utf-8")), changes)
    digest = json_records.digest({"params": params, "shared": shared})[:8]
    for key in ("reward", "tokens", "delta", "attacks", "checkpoints", "samples", "scores", "report", "verdict"):
        params["paths"][key] = str(OUT / f"{name}-{digest}" / key)
    params["paths"]["feedback"] = str(OUT / "feedback")
    params["paths"] |= shared or {}
    return Settings.model_validate(params)


def folder(settings: Settings) -> Path:
    """The folder of a variant's outputs."""
    return settings.paths.samples.parent


def run(settings: Settings, names: Iterable[str]) -> dict[str, float]:
    """Runs the stages that have not run yet for this variant; returns the seconds of each."""
    path = folder(settings) / "seconds.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    for name in names:
        if name not in seconds:
            partial = settings.paths.samples if name == "sample" else settings.paths.checkpoints
            shutil.rmtree(partial, ignore_errors=True)  # a resumed stage would take less time
            started = time.perf_counter()
            stages.run(name, settings)
            seconds[name] = round(time.perf_counter() - started, 1)
            path.write_text(json.dumps(seconds))
    return seconds


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[TrainingProgress], None]]:
    """Yields an `on_step` callback for erasers."""
    with bar(description, 1) as progress:
        yield lambda p: progress.set(p.step, p.total, f"loss {p.loss:.4f}")


def interval(score: Mapping[str, Any]) -> str:
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def print_table(title: str, rows: list[dict[str, str]]) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*row.values())
    Console(width=200).print(table)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads")
