"""External programs that tests run, from the virtual environment or the PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"


def program(name: str, install: str = "make setup", *, required: bool = True) -> str:
    """Path of a program. Skips the test if it is missing; with PROGRAMS_REQUIRED, which CI sets, fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    executable = shutil.which(name, path=path)
    if executable is None:
        missing = f"{name} is not installed: {install}"
        pytest.fail(missing) if required and os.environ.get("PROGRAMS_REQUIRED") else pytest.skip(missing)
    return executable


def run(*command: str | Path, env: Mapping[str, str] = {}, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command, whatever its exit code."""
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def run_checked(*command: str | Path, env: Mapping[str, str] = {}, cwd: Path = ROOT) -> str:
    """Run a command that must succeed; its stdout."""
    done = run(*command, env=env, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
