"""Progress of a stage in a child process: bars on a terminal, its lines in a log."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from deleatur.runtime.progress import child_progress
from deleatur.storage.processes import StageProgress


def progress_output(terminal: bool) -> str:
    shown = StringIO()
    console = Console(file=shown, force_terminal=terminal, width=120, color_system=None, _environ={})
    with child_progress("erase", console) as followed:
        followed.line("Running stage 'erase':")
        followed.update(StageProgress("erase weapon", 3, 12, "loss 0.25"))
        followed.update(StageProgress("erase weapon", 12, 12, "loss 0.125"))
        followed.update(StageProgress("evaluation", 1, 2, ""))
        followed.finish("done")
    with child_progress("gate", console) as followed:
        followed.line("Stage 'gate' didn't change, skipping")
        followed.finish("up to date")
    return shown.getvalue()


def test_a_terminal_shows_bars() -> None:
    shown = progress_output(terminal=True)
    last = shown.rpartition("erase weapon")[2].partition("\n")[0]
    assert "12/12" in last
    assert "loss 0.125" in last
    assert "evaluation" in shown
    assert "1/2" in shown
    assert "up to date" in shown
    assert "Running stage" not in shown


def test_a_log_gets_the_lines_and_no_bars() -> None:
    assert progress_output(terminal=False) == "Running stage 'erase':\nStage 'gate' didn't change, skipping\n"
