"""What one checkout hands to another, on this machine or on others: products through the DVC remote, what dvc.lock says
of them, code through git.
"""

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
from deleatur.storage.dvc import CODE, dvc, last, quietly


def push(root: Path, *stages: str) -> None:
    """What these stages made, and the memory of what they made it from, into the DVC remote."""
    _exchange("push", root, "--run-cache", *stages)


def pull(root: Path, *stages: str, all_of_it: bool = True) -> None:
    """What these stages made, as dvc.lock names it, out of the DVC remote, or as much of it as there is."""
    _exchange("pull", root, "--force", *([] if all_of_it else ["--allow-missing"]), *stages)


def collect(root: Path, locks: Sequence[str], *, dry: bool, remote: bool) -> list[str]:
    """Removes from DVC's cache, and its remote, what no commit needs, nothing here, and nothing that one of `locks`
    names, each the text of a dvc.lock; what DVC says of it. dry: it is only said.
    """
    with TemporaryDirectory(prefix="deleatur-") as place:
        projects = [Path(place) / str(i) for i in range(len(locks))]
        for project, lock in zip(projects, locks, strict=True):
            _project(project, lock, root)
        how = ["--dry" if dry else "--force", *(["--cloud"] if remote else [])]
        how += ["--projects", *map(str, projects)] if projects else []
        done = quietly(dvc("gc", "--workspace", "--all-commits", *how), root)
    if done.returncode:
        raise ServiceError(
            f"dvc gc failed: {last(done.stderr.splitlines())}", hint="dvc gc --workspace --all-commits --dry"
        )
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("Removed", "No unused"))]


def _project(folder: Path, lock: str, root: Path) -> None:
    """A DVC project that holds what a dvc.lock names, in the cache and the remote of another."""
    folder.mkdir()
    _exchange("init", folder, "--quiet", "--no-scm")
    for config in ("config", "config.local"):
        if (root / ".dvc" / config).is_file():
            shutil.copyfile(root / ".dvc" / config, folder / ".dvc" / config)
    _exchange("config", folder, "--local", "core.no_scm", "true")
    _exchange("config", folder, "--local", "cache.dir", quietly(dvc("cache", "dir"), root).stdout.strip())
    stages = yaml.safe_load(lock)["stages"]
    outs = {n: {"cmd": s["cmd"], "outs": [out["path"] for out in s["outs"]]} for n, s in stages.items() if n != CODE}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": outs}), "utf-8")
    (folder / "dvc.lock").write_text(lock, "utf-8")


def last_read(stage: str, folder: Path, file: str, root: Path) -> bytes | None:
    """A file of a folder as it was when the stage last ran; None where nobody knows any more."""
    lock = root / "dvc.lock"
    stages = yaml.safe_load(lock.read_text("utf-8"))["stages"] if lock.is_file() else {}
    read = {dep["path"]: dep["md5"] for dep in stages.get(stage, {}).get("deps", [])}
    cache = Path(quietly(dvc("cache", "dir"), root).stdout.strip()) / "files" / "md5"
    try:
        digest = read[folder.as_posix()]
        listed = json.loads((cache / digest[:2] / digest[2:]).read_text("utf-8"))
        [content] = [str(entry["md5"]) for entry in listed if entry["relpath"] == file]
        return (cache / content[:2] / content[2:]).read_bytes()
    except (KeyError, FileNotFoundError, ValueError):
        return None


def store(root: Path) -> str:
    """Address of the DVC remote, a relative folder made absolute. Raises SettingsError where there is none."""
    listed = quietly(dvc("config", "--list"), root).stdout.splitlines()
    config = dict(line.split("=", 1) for line in listed if "=" in line)
    if not (url := config.get(f"remote.{config.get('core.remote')}.url")):
        raise SettingsError(
            "expected a DVC remote, through which machines hand work to each other; there is none",
            hint="dvc remote add --default NAME s3://BUCKET/PREFIX",
        )
    return url


def use_store(root: Path, url: str) -> None:
    """Another DVC remote for this checkout alone."""
    _exchange("remote", root, "add", "--local", "--force", "--default", "given", url)


def entry(stage: str, root: Path) -> str:
    """What dvc.lock says of one stage, as it stands there. Raises DataError when it says nothing."""
    if found := re.search(_ENTRY.format(stage), (root / "dvc.lock").read_text("utf-8"), re.MULTILINE):
        return found[0]
    raise DataError(f"dvc.lock does not know the stage {stage}", hint=f"dvc repro {stage}")


def enter(stage: str, entry: str, root: Path) -> None:
    """Puts into dvc.lock what it says of a stage elsewhere. All other lines stay as DVC has written them."""
    lock = root / "dvc.lock"
    text = lock.read_text("utf-8") if lock.is_file() else "schema: '2.0'\nstages:\n"
    text, known = re.subn(_ENTRY.format(stage), lambda _: entry, text, flags=re.MULTILINE)
    partial = lock.with_name(f".{lock.name}.{os.getpid()}.partial")
    partial.write_text(text if known else text + entry, "utf-8")
    partial.replace(lock)


_ENTRY = r"^  {}:\n(?:    .*\n|\n)*"
"""A stage's lines in dvc.lock, which DVC indents by two."""


def check_out(root: Path, commit: str, target: Path) -> None:
    """A repository of its own in `target`, at a commit of this one."""
    for where, command in (
        (root, ["git", "clone", "--quiet", "--no-checkout", str(root.resolve()), str(target)]),
        (target, ["git", "checkout", "--quiet", "--detach", commit]),
    ):
        done = quietly(command, where)
        if done.returncode:
            raise DataError(
                f"commit {commit} cannot be checked out: {last(done.stderr.splitlines())}", hint="git fetch"
            )


def uncommitted(root: Path, *paths: str) -> list[str]:
    """Which files below these paths are not as the commit has them, new ones included."""
    listed = quietly(["git", "status", "--porcelain", "--no-renames", "--", *paths], root).stdout.splitlines()
    return [line[3:] for line in listed]


def origin(root: Path) -> str:
    """Where others clone this repository from: its remote, or the folder itself."""
    return quietly(["git", "remote", "get-url", "origin"], root).stdout.strip() or str(root.resolve())


def published(root: Path) -> bool:
    """Whether those who clone it get this commit, as far as is known here."""
    if not quietly(["git", "remote"], root).stdout.strip():
        return True
    return bool(quietly(["git", "branch", "--remotes", "--contains", "HEAD"], root).stdout.strip())


def _exchange(command: str, root: Path, *arguments: str) -> None:
    done = quietly(dvc(command, *arguments), root)
    if done.returncode:
        said = last((done.stderr or done.stdout).splitlines())
        raise ServiceError(f"dvc {command} failed: {said}", hint=f"dvc {' '.join([command, *arguments])}")
