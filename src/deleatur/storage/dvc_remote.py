"""Stage outputs shared between checkouts through the DVC remote, and their entries in dvc.lock."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from deleatur.errors import DataError, ServiceError, SettingsError
from deleatur.storage.dvc import CODE_STAGE, dvc_command
from deleatur.storage.processes import last_line, run_captured
from deleatur.storage.yaml_files import nested_mapping, parse_yaml, read_yaml


def push(root: Path, *stages: str) -> None:
    """Uploads the outputs of these stages and the run cache (which inputs gave which outputs) to the DVC remote."""
    _run_dvc("push", root, "--run-cache", *stages)


def pull(root: Path, *stages: str, complete: bool = True) -> None:
    """Downloads the outputs of these stages, as named in dvc.lock. complete: a missing output is an error."""
    _run_dvc("pull", root, "--force", *([] if complete else ["--allow-missing"]), *stages)


def collect_garbage(root: Path, locks: Sequence[str], *, dry_run: bool, remote: bool) -> list[str]:
    """Removes from DVC's cache, and its remote, what neither a commit nor the workspace nor one of `locks` refers to.

    locks: contents of dvc.lock files. dry_run: reports only. Returns DVC's messages.
    """
    with TemporaryDirectory(prefix="deleatur-") as directory:
        projects = [Path(directory) / str(i) for i in range(len(locks))]
        for project, lock in zip(projects, locks, strict=True):
            _create_lock_project(project, lock, root)
        options = ["--dry" if dry_run else "--force", *(["--cloud"] if remote else [])]
        options += ["--projects", *map(str, projects)] if projects else []
        process = run_captured(dvc_command("gc", "--workspace", "--all-commits", *options), root)
    if process.returncode:
        raise ServiceError(
            f"dvc gc failed: {last_line(process.stderr.splitlines())}", hint="dvc gc --workspace --all-commits --dry"
        )
    return [
        line for line in (process.stdout + process.stderr).splitlines() if line.startswith(("Removed", "No unused"))
    ]


def _create_lock_project(folder: Path, lock: str, root: Path) -> None:
    """A DVC project whose outputs are those of a dvc.lock, with the cache and the remote of the project in `root`."""
    folder.mkdir()
    _run_dvc("init", folder, "--quiet", "--no-scm")
    for config in ("config", "config.local"):
        if (root / ".dvc" / config).is_file():
            shutil.copyfile(root / ".dvc" / config, folder / ".dvc" / config)
    _run_dvc("config", folder, "--local", "core.no_scm", "true")
    _run_dvc("config", folder, "--local", "cache.dir", run_captured(dvc_command("cache", "dir"), root).stdout.strip())
    source = "dvc.lock of a registered version"
    stages = nested_mapping(parse_yaml(lock, source, hint="deleatur verify VERSION"), "stages")
    if not stages:
        raise DataError(f"{source}: expected stages, got none", hint="deleatur verify VERSION")
    outs = {
        n: {"cmd": s["cmd"], "outs": [out["path"] for out in s.get("outs", [])]}
        for n, s in stages.items()
        if n != CODE_STAGE
    }
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": outs}), "utf-8")
    (folder / "dvc.lock").write_text(lock, "utf-8")


def file_at_last_run(stage: str, folder: Path, file: str, root: Path) -> bytes | None:
    """A file of a dependency folder as it was when the stage last ran; None if it is not in DVC's cache."""
    lock = root / "dvc.lock"
    stages = nested_mapping(read_yaml(lock), "stages") if lock.is_file() else {}
    digests = {dep["path"]: dep["md5"] for dep in stages.get(stage, {}).get("deps", [])}
    cache = Path(run_captured(dvc_command("cache", "dir"), root).stdout.strip()) / "files" / "md5"
    try:
        digest = digests[folder.as_posix()]
        entries = json.loads((cache / digest[:2] / digest[2:]).read_text("utf-8"))
        [content] = [str(entry["md5"]) for entry in entries if entry["relpath"] == file]
        return (cache / content[:2] / content[2:]).read_bytes()
    except (KeyError, FileNotFoundError, ValueError):
        return None


def remote_url(root: Path) -> str:
    """URL of the default DVC remote, absolute. Raises SettingsError if none is configured."""
    listed = run_captured(dvc_command("config", "--list"), root).stdout.splitlines()
    config = dict(line.split("=", 1) for line in listed if "=" in line)
    if not (url := config.get(f"remote.{config.get('core.remote')}.url")):
        raise SettingsError(
            "expected a DVC remote, through which machines share stage outputs; none is configured",
            hint="dvc remote add --default NAME s3://BUCKET/PREFIX",
        )
    return url


def use_remote(root: Path, url: str) -> None:
    """Sets the default DVC remote of this checkout only."""
    _run_dvc("remote", root, "add", "--local", "--force", "--default", "shared", url)


def lock_entry(stage: str, root: Path) -> str:
    """The text of one stage's entry in dvc.lock. Raises DataError if there is none."""
    if match := re.search(_ENTRY.format(stage), (root / "dvc.lock").read_text("utf-8"), re.MULTILINE):
        return match[0]
    raise DataError(f"dvc.lock has no entry for the stage {stage}", hint=f"dvc repro {stage}")


def set_lock_entry(stage: str, entry: str, root: Path) -> None:
    """Adds or replaces one stage's entry in dvc.lock. All other lines stay as DVC wrote them."""
    lock = root / "dvc.lock"
    text = lock.read_text("utf-8") if lock.is_file() else "schema: '2.0'\nstages:\n"
    text, replaced = re.subn(_ENTRY.format(stage), lambda _: entry, text, flags=re.MULTILINE)
    partial = lock.with_name(f".{lock.name}.{os.getpid()}.partial")
    partial.write_text(text if replaced else text + entry, "utf-8")
    partial.replace(lock)


_ENTRY = r"^  {}:\n(?:    .*\n|\n)*"
"""Pattern of a stage's entry in dvc.lock, which DVC indents by two."""


def _run_dvc(command: str, root: Path, *arguments: str) -> None:
    process = run_captured(dvc_command(command, *arguments), root)
    if process.returncode:
        message = last_line((process.stderr or process.stdout).splitlines())
        raise ServiceError(f"dvc {command} failed: {message}", hint=f"dvc {' '.join([command, *arguments])}")
