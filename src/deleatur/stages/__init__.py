"""A stage is one function, `run(settings)`: read → call → write, a page each."""

from __future__ import annotations

from importlib import import_module

from deleatur.errors import SettingsError
from deleatur.settings import Settings

STAGES = ("ingest", "reward", "invert", "erase", "attack", "sample", "evaluate", "gate", "register")
"""In the order of the chain. All but `register` are stages of dvc.yaml: register makes no file."""


def run(name: str, settings: Settings) -> None:
    """Runs one stage. Raises SettingsError when there is none of that name."""
    if name not in STAGES:
        raise SettingsError(f"no stage {name!r}: there is {', '.join(STAGES)}", hint="deleatur stage --help")
    import_module(f"deleatur.stages.{name}").run(settings)
