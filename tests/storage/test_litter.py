"""Killed processes of tests leave nothing among the system's temporary files."""

from __future__ import annotations

import tempfile
from pathlib import Path

from child_processes import die, killed


def test_temporary_files_of_a_killed_process_are_deleted(tmp_path: Path) -> None:
    place = tmp_path / "place"

    def work() -> None:
        place.write_text(tempfile.mkdtemp())
        die()

    before = tempfile.gettempdir()
    assert killed(work)
    folder = Path(place.read_text())
    assert folder.parent.parent == Path(before)
    assert not folder.parent.exists()
    assert tempfile.gettempdir() == before
