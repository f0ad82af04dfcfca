"""Stages run through DVC, as child processes (`dvc.repo.Repo` requires the calling process to change its directory).

A stage is reproduced by `dvc repro --single-item NAME`: DVC runs it if a dependency changed, and records the result.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from deleatur import dependencies
from deleatur.errors import (
    DataError,
    DeleaturError,
    ErasureRefused,
    Interrupted,
    ModelError,
    ServiceError,
    SettingsError,
)
from deleatur.storage.processes import StageProgress, last_line, run_captured, run_command
from deleatur.storage.yaml_files import read_yaml

PULL = ("--pull",)

CODE_STAGE = "code"
"""The stage that writes code digests. DVC does not notice an installed plug-in package, so they are refreshed before
DVC is called."""

FEEDBACK_STAGE, FEEDBACK = "ingest", "feedback"
"""The stage that reads feedback, and the folder that dvc.yaml names as its input."""

STAGE_ERRORS: tuple[type[DeleaturError], ...] = (SettingsError, DataError, ModelError, ErasureRefused, Interrupted)
"""Errors with an exit code of their own. Any other exit code becomes a ServiceError, which is worth a retry."""


def reproduce(
    stage: str,
    root: Path,
    on_line: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[StageProgress], None] = lambda progress: None,
    options: Sequence[str] = (),
) -> bool:
    """Brings one stage of dvc.yaml up to date. Returns whether it had to run.

    options: of `dvc repro`. With PULL, results computed elsewhere from the same inputs are fetched from the DVC remote.
    The inputs of the stage must exist here: DVC considers a missing one unchanged.

    Raises the error of the stage itself (only Interrupted and ServiceError are worth a retry), ServiceError when it
    crashed or was killed, and DataError if DVC refused to run it. SIGINT or SIGTERM to this process is passed on to
    the stage, which saves its state; the interruption itself then propagates, because a scheduler would retry after an
    error of this package.

    A failed stage leaves the outputs of its last success, which DVC removes before the run. (`persist` in dvc.yaml
    would keep them too, but DVC's run cache does not take outputs that persist.)
    """
    ran = False

    def record_line(line: str) -> None:
        nonlocal ran
        ran = ran or line == f"Running stage '{stage}':"
        on_line(line)

    _require_valid_files(root)
    _refresh_digests(root)
    if stage == FEEDBACK_STAGE:
        _create_feedback_folder(root)
    exit_code, tail = run_command(
        dvc_command("repro", "--single-item", *options, stage), root, record_line, on_progress
    )
    if exit_code:
        _restore_outputs(stage, root)
        raise _repro_error(stage, root, tail)
    return ran


def _restore_outputs(stage: str, root: Path) -> None:
    """Restores the outputs of the last success, which DVC deleted before the run that has failed."""
    lock = root / "dvc.lock"
    entry = read_yaml(lock)["stages"].get(stage, {}) if lock.is_file() else {}
    if missing := [out["path"] for out in entry.get("outs", []) if not (root / out["path"]).exists()]:
        run_captured(dvc_command("checkout", "--quiet", *missing), root)


def reproduce_all(
    targets: Sequence[str],
    root: Path,
    on_line: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[StageProgress], None] = lambda progress: None,
) -> None:
    """Brings stages of any dvc.yaml and everything they depend on up to date. Raises as `reproduce` does, for the first
    stage that fails.
    """
    _require_valid_files(root)
    _refresh_digests(root)
    _create_feedback_folder(root)
    exit_code, tail = run_command(dvc_command("repro", *targets), root, on_line, on_progress)
    if exit_code:
        raise _repro_error(" ".join(targets), root, tail)


def run_untracked(
    stage: str,
    root: Path,
    on_line: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[StageProgress], None] = lambda progress: None,
) -> None:
    """Runs a stage outside DVC, because it writes no file: `register`. Raises as `reproduce` does."""
    exit_code, tail = run_command([sys.executable, "-m", "deleatur", "stage", stage], root, on_line, on_progress)
    if exit_code:
        raise _stage_error(stage, exit_code, tail)


def status(root: Path, stage: str = "dvc.yaml") -> dict[str, Any]:
    """Stage → changes since its last run; empty when everything is up to date, or without a DVC repository."""
    if not (root / ".dvc").is_dir():
        return {}
    _require_valid_files(root)
    _refresh_digests(root)
    process = run_captured(dvc_command("status", "--json", stage), root)
    if process.returncode:
        message = last_line(process.stderr.splitlines())
        raise DataError(f"DVC cannot tell what is up to date: {message}", hint=_init_command(root) or "dvc status")
    changes: dict[str, Any] = json.loads(process.stdout)
    return changes


def _require_valid_files(root: Path) -> None:
    """Raises DataError for a file of DVC that is not YAML: DVC's message ends with that of the YAML parser."""
    for name in ("dvc.yaml", "dvc.lock", "params.yaml"):
        if (root / name).is_file():
            read_yaml(root / name)


def _refresh_digests(root: Path) -> None:
    """Updates the code digests and commits them to DVC, which would otherwise restore the files it knows."""
    if dependencies.write_digests(root) and (root / ".dvc").is_dir():
        run_captured(dvc_command("commit", "--force", "--quiet", CODE_STAGE), root)


def _create_feedback_folder(root: Path) -> None:
    """Creates the folder of feedback, since DVC refuses to run a stage whose input does not exist. If the folder is
    empty and ratings are required, the stage itself raises an error.
    """
    if not (folder := root / FEEDBACK).exists():
        folder.mkdir()


def lock_digest(root: Path) -> str | None:
    """SHA-256 of dvc.lock, which names every input and output by digest."""
    lock = root / "dvc.lock"
    return hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else None


def dvc_command(command: str, *arguments: str) -> list[str]:
    """The command line of a DVC command, which waits for DVC's lock."""
    return [sys.executable, "-m", "dvc", "--wait-for-lock", command, *arguments]


def _repro_error(stage: str, root: Path, tail: Sequence[str]) -> DeleaturError:
    """The error behind a failed `dvc repro`: of the stage, or of DVC itself."""
    for line in reversed(tail):
        if match := re.search(r"failed to reproduce '([^']+)'.* exited with (-?\d+)", line):
            return _stage_error(match[1], int(match[2]), tail)
    return DataError(f"DVC did not run {stage}: {last_line(tail)}", hint=_init_command(root) or f"dvc repro {stage}")


def _init_command(root: Path) -> str:
    """The command that turns a folder into a DVC project; empty if it is one."""
    if run_captured(["git", "rev-parse", "--git-dir"], root).returncode:
        return "git init" if (root / ".dvc").is_dir() else "git init && dvc init"
    return "" if (root / ".dvc").is_dir() else "dvc init"


def _stage_error(stage: str, exit_code: int, tail: Sequence[str]) -> DeleaturError:
    """Rebuilds the error that a stage raised from its exit code and last lines."""
    error_type = next((k for k in STAGE_ERRORS if k.exit_code == exit_code), ServiceError)
    starts = [i for i, line in enumerate(tail) if line.startswith(f"{error_type.__name__}: ")]
    retry = f"dvc repro {stage}" if ":" in stage else f"deleatur stage {stage}"
    if not starts:
        return error_type(f"{stage} crashed with exit code {exit_code}: {last_line(tail)}", hint=retry)
    message_lines = list(takewhile(lambda line: not line.startswith(("Next: ", "ERROR: ")), tail[starts[-1] :]))
    hints = [line.removeprefix("Next: ") for line in tail[starts[-1] :] if line.startswith("Next: ")]
    message = "\n".join(message_lines).removeprefix(f"{error_type.__name__}: ")
    return error_type(f"{stage}: {message.strip()}", hint=hints[0] if hints else retry)
