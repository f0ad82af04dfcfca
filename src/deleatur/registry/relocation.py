"""Corrects the paths of artifacts in MLflow's database after the project was moved.

MLflow makes the artifact root of a local store absolute when it creates an experiment, so after `mv` it would read from
and write to the old folder. A server records artifacts relative to its root, so its database needs no correction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
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
    """Rewrites the paths of experiments whose artifact root no longer exists, and whose folder is in the artifact root
    of the current folder instead. Raises sqlite3.Error if the database cannot be written.
    """
    with closing(sqlite3.connect(database, TIMEOUT)) as connection, connection:
        for old, new in list(_moved_experiments(connection)):
            for table, column in COLUMNS:
                connection.execute(
                    f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1) "
                    f"WHERE {column} = :old OR substr({column}, 1, length(:old) + 1) = :old || '/'",
                    {"old": str(old), "new": str(new)},
                )


def _moved_experiments(connection: sqlite3.Connection) -> Iterator[tuple[Path, Path]]:
    """The recorded and the actual folder of each experiment that was moved."""
    has_runs = "EXISTS (SELECT 1 FROM runs WHERE runs.experiment_id = experiments.experiment_id)"
    try:
        recorded = connection.execute(f"SELECT artifact_location, {has_runs} FROM experiments").fetchall()
    except sqlite3.DatabaseError:
        return  # damaged, locked or without tables: MLflow's own query says so
    for location, filled in recorded:
        old = Path(location or "")
        new = Path(ARTIFACT_ROOT).absolute() / old.name
        gone = old.is_absolute() and old.parent.name == ARTIFACT_ROOT and not old.parent.exists()
        if gone and old != new and (new.is_dir() or not filled):
            yield old, new
