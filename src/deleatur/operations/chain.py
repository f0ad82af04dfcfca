"""Brings the chain up to date: runs, through DVC, every stage whose outputs are missing or out of date."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import dropwhile
from pathlib import Path

from rich.console import Console

from deleatur.errors import Interrupted
from deleatur.runtime.progress import child_progress
from deleatur.stages import STAGES
from deleatur.storage import dvc


def remaining(project: Path) -> list[str]:
    """The stages to run, in order: from the first that DVC reports as changed. `register` writes no file for DVC to
    compare, so it always runs.
    """
    # One `dvc status` for all stages instead of one for each: the stages before the first changed one are up to date.
    changed = dvc.status(project) if (project / ".dvc").is_dir() else STAGES
    if dvc.CODE_STAGE in changed:
        dvc.reproduce(dvc.CODE_STAGE, project)
    return list(dropwhile(lambda name: name not in (*changed, "register"), STAGES))


def run(stages: Sequence[str], project: Path, console: Console) -> None:
    """Runs stages one after the other, with progress bars on the console.

    Raises what a stage raises, and Interrupted when interrupted: the stage saves its state first.
    """
    name = ""
    try:
        for name in stages:
            with child_progress(name, console) as followed:
                if name == "register":
                    dvc.run_untracked(name, project, followed.line, followed.update)
                else:
                    ran = dvc.reproduce(name, project, followed.line, followed.update)
                    followed.finish("done" if ran else "up to date")
    except KeyboardInterrupt:
        raise Interrupted(f"{name} was interrupted; its saved state is kept", hint="deleatur demo (resumes)") from None
