"""Programs that tests run: beside our Python, or on the PATH."""

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
    """Skips where it is missing, and says how to install it; in CI, which sets PROGRAMS_REQUIRED, fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        missing = f"{name} is not installed: {install}"
        pytest.fail(missing) if required and os.environ.get("PROGRAMS_REQUIRED") else pytest.skip(missing)
    return found


def run(*command: str | Path, env: Mapping[str, str] = {}, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Whatever it ends with."""
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def ran(*command: str | Path, env: Mapping[str, str] = {}, cwd: Path = ROOT) -> str:
    """What it said, when it ended well."""
    done = run(*command, env=env, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
