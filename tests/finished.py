"""A project in git and DVC whose pipeline has run, with a verdict that passes: built once, copied for each test."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import registry
import workspace
from filelock import FileLock

from deleatur import dependencies, stages
from deleatur.config.settings import Settings
from deleatur.storage.processes import environment

ROOT = Path(__file__).parents[1]


def passing_policy(limit: float = -5.0) -> dict[str, object]:
    """A policy that random weights pass."""
    rule = {"metric": "clip_score", "slice": "unseen", "versus": "base", "min": limit, "min_n": 2}
    return {"rules": {"images_match_prompts": rule}}


def template(shared: Path) -> Path:
    """`shared` may be used by several test processes: one builds the project, the others wait."""
    root = shared / "finished"
    with FileLock(shared / "finished.lock"):
        if not root.exists():
            partial = shared / "finished.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            with chdir(partial):
                _build(partial, registry.empty_store(shared))
            partial.rename(root)
    return root


def copy(shared: Path, root: Path) -> Settings:
    """A copy for one test, which must make it the current directory."""
    shutil.copytree(template(shared), root, dirs_exist_ok=True)
    params = root / "params.yaml"
    # MLflow caches connections by address: a relative one would reuse the first test's database.
    params.write_text(params.read_text("utf-8").replace("sqlite:///mlflow.db", f"sqlite:///{root}/mlflow.db"), "utf-8")
    return Settings.load(params)


def _build(root: Path, store: Path) -> None:
    settings = workspace.create(root, gate=passing_policy())
    for name in stages.STAGES[:-1]:
        stages.run(name, settings)
    shutil.copy(store, root / "mlflow.db")
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    dependencies.write_digests(root)
    git(root, "init", "--quiet")
    dvc(root, "init", "--quiet")
    dvc(root, "commit", "--force", "--quiet")  # records the outputs above as those of the stages
    git(root, "add", "--all")
    git(root, "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "--quiet", "-m", "finished")


def git(root: Path, *arguments: str) -> str:
    return _run(root, "git", *arguments)


def dvc(root: Path, *arguments: str) -> str:
    return _run(root, sys.executable, "-m", "dvc", *arguments)


def _run(root: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=root, env=environment(), check=True, capture_output=True, text=True)
    return done.stdout
