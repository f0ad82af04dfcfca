"""Corrects the paths of artifacts in MLflow's database after the project was moved.

MLflow makes the artifact root of a local store absolute when it creates an experiment, so after `mv` it would read from
and write to the old folder. A server records artifacts relative to its root, so its database needs no correction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator
from contextlib import closing
from pathlib import Path

ARTIFACT_ROOT = "mlruns"
"""Name of MLflow's artifact root; by default it is in the folder that its process runs in."""
COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)
TIMEOUT = 1.0
"""Seconds to wait for a locked database."""


def relocate(database: Path) -> None:
    """Rewrites the paths of experiments whose artifact root no longer exists, or was copied with the database, and
    whose folder is in the artifact root of the current folder. Raises sqlite3.Error if the database cannot be written.
    """
    with closing(sqlite3.connect(database, TIMEOUT)) as connection, connection:
        for old, new in list(_moved_experiments(connection, database)):
            for table, column in COLUMNS:
                connection.execute(
                    f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1) "
                    f"WHERE {column} = :old OR substr({column}, 1, length(:old) + 1) = :old || '/'",
                    {"old": str(old), "new": str(new)},
                )


def _moved_experiments(connection: sqlite3.Connection, database: Path) -> Iterator[tuple[Path, Path]]:
    """The recorded and the actual folder of each experiment that was moved or copied."""
    has_runs = "EXISTS (SELECT 1 FROM runs WHERE runs.experiment_id = experiments.experiment_id)"
    try:
        recorded = connection.execute(f"SELECT artifact_location, {has_runs} FROM experiments").fetchall()
        runs = {run for (run,) in connection.execute("SELECT run_uuid FROM runs")}
    except sqlite3.DatabaseError:
        return  # damaged, locked or without tables: MLflow's own query says so
    for location, filled in recorded:
        old = Path(location or "")
        new = Path(ARTIFACT_ROOT).absolute() / old.name
        if not old.is_absolute() or old.parent.name != ARTIFACT_ROOT or old == new:
            continue
        if not old.parent.exists():
            moved = new.is_dir() or not filled
        else:  # otherwise the original's files would be verified instead of the copy's, and artifacts written there
            moved = database.absolute().parent == Path.cwd() and _is_copy(old, new, runs)
        if moved:
            yield old, new


def _is_copy(old: Path, new: Path, runs: Collection[str]) -> bool:
    """Whether the artifacts that the database knows are in both folders."""
    if not (old.is_dir() and new.is_dir()):
        return False
    known = {path.name for path in old.iterdir()} & {*runs, "models"}
    return bool(known) and known <= {path.name for path in new.iterdir()}
