"""The git repository of a project: its commit, its tracked files, its remote."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from deleatur.errors import DataError
from deleatur.storage.processes import last_line, run_captured


@dataclass(frozen=True)
class Commit:
    hash: str | None
    """None: no git repository, or no commit yet."""
    dirty: bool
    """Whether tracked files differ from the commit."""


def current_commit(root: Path) -> Commit:
    """The commit that is checked out, and whether tracked files differ from it."""
    head = run_captured(["git", "rev-parse", "--verify", "--quiet", "HEAD"], root)
    changed = run_captured(["git", "status", "--porcelain", "--untracked-files=no"], root)
    return Commit(head.stdout.strip() or None, bool(changed.stdout.strip()))


def user_name(root: Path) -> str | None:
    """The user name in git's configuration; None without git or without a name."""
    if not shutil.which("git"):
        return None
    return run_captured(["git", "config", "user.name"], root).stdout.strip() or None


def first_tracked_file(folder: Path) -> str | None:
    """The first file in a folder that git tracks; None without git or outside a repository.

    Raises DataError if git fails: the caller is about to delete the folder.
    """
    if not shutil.which("git"):
        return None
    listed = run_captured(["git", "ls-files", "--", "."], folder)
    if listed.returncode and "not a git repository" not in listed.stderr:
        raise DataError(
            f"git cannot list the files it tracks in {folder}: {last_line(listed.stderr.splitlines())}",
            hint=f"git -C {folder} status",
        )
    return next(iter(listed.stdout.splitlines()), None)


def clone_at_commit(root: Path, commit: str, target: Path) -> None:
    """Clones the repository to `target` and checks out a commit. Raises DataError if that fails."""
    for folder, command in (
        (root, ["git", "clone", "--quiet", "--no-checkout", str(root.resolve()), str(target)]),
        (target, ["git", "checkout", "--quiet", "--detach", commit]),
    ):
        process = run_captured(command, folder)
        if process.returncode:
            raise DataError(
                f"commit {commit} cannot be checked out: {last_line(process.stderr.splitlines())}", hint="git fetch"
            )


def uncommitted_files(root: Path, *paths: str) -> list[str]:
    """Files below these paths that differ from the commit, untracked ones included."""
    listed = run_captured(["git", "status", "--porcelain", "--no-renames", "--", *paths], root).stdout.splitlines()
    return [line[3:] for line in listed]


def origin_url(root: Path) -> str:
    """URL that other machines clone from: the remote `origin`, or the folder itself."""
    return run_captured(["git", "remote", "get-url", "origin"], root).stdout.strip() or str(root.resolve())


def is_pushed(root: Path) -> bool:
    """Whether a clone contains the current commit: it is on a remote branch, or there is no remote."""
    if not run_captured(["git", "remote"], root).stdout.strip():
        return True
    return bool(run_captured(["git", "branch", "--remotes", "--contains", "HEAD"], root).stdout.strip())
