"""What the commands share: consoles, options, error messages, tables of estimates."""

from __future__ import annotations

import atexit
import errno
import gc
import json
import re
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from deleatur.errors import DataError, DeleaturError, ServiceError

if TYPE_CHECKING:
    from deleatur.config.settings import Settings
    from deleatur.operations.estimate import Estimate

# Text is printed as it is: brackets and colons in paths, prompts and reasons are neither markup nor emoji.
out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)

VERDICT_EXIT_CODES = {"pass": 0, "fail": 10, "not enough evidence": 11}

PARAMS = Path("params.yaml")

ParamsFile = Annotated[Path, typer.Option("--params", metavar="FILE", help="The settings file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _as_unicode(text: str) -> str:
    """Bytes of the command line that are not UTF-8 become question marks: the ledger is JSON."""
    return text.encode("utf-8", "replace").decode()


Operator = Annotated[
    str,
    typer.Option("--as", metavar="NAME", help="Who makes this decision; recorded in the ledger.", callback=_as_unicode),
]
Reason = Annotated[
    str, typer.Option("--reason", metavar="WHY", help="Why; recorded in the ledger.", callback=_as_unicode)
]
CommaSeparated = Annotated[str, typer.Option(metavar="A,B,…", help="A subset of those in params.yaml. Default: all.")]


class Commands(TyperGroup):
    """Turns errors that a user can act on into a message, the next command and an exit code, never a stack trace."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        # A terminal that is not UTF-8 lacks some of our characters, and none shows file names that are not UTF-8: they
        # become question marks. Set before options are parsed, since that is when --help prints.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="replace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:  # typer.Context, or click.Context with older releases of Typer
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader has closed its end: click ends quietly
            raise
        except (DeleaturError, OSError) as caught:
            error = caught if isinstance(caught, DeleaturError) else _from_os_error(caught)
            print_text((f"{type(error).__name__}:", "red"), f" {error}", console=err)
            if error.hint:
                print_next(error.hint)
            raise typer.Exit(error.exit_code) from caught


def _from_os_error(error: OSError) -> DeleaturError:
    """A full disk, a folder without write permission or in place of a file; or a host that does not answer, which is
    worth a retry.
    """
    kind = ServiceError if isinstance(error, ConnectionError | TimeoutError) else DataError
    path = error.filename2 or error.filename  # the second one is the target of a copy
    hint = "the same command, to try again" if kind is ServiceError else f"ls -ld {path or '.'}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        hint = f"df -h {path or '.'}"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        hint = f"ls -ld {path or '.'} (this account has to be able to write there)"
    elif error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST):
        hint = f"ls -ld {path or '.'} (a folder is in the place of a file, or a file in that of a folder: move it away)"
    elif error.errno == errno.EBUSY:
        hint = f"findmnt {path or '.'} (a mount point cannot be deleted or renamed: mount the disk elsewhere)"
    return kind(f"{error.strerror or error}{f': {path}' if path else ''}", hint=hint)


def load_settings(params: Path = PARAMS) -> Settings:
    from deleatur.config.settings import Settings

    return Settings.load(params)


def print_text(*parts: str | tuple[str, str], console: Console = out) -> None:
    """Prints text or (text, style) as one text that is not wrapped, since commands and paths in it are copied."""
    console.print(Text.assemble(*parts), soft_wrap=True)


def print_json(value: Any) -> None:
    out.print_json(json.dumps(value))


def print_next(command: str) -> None:
    print_text("Next: ", (command, "bold"), console=err)


def print_estimates(title: str, estimates: Sequence[Estimate], console: Console = out) -> None:
    """Prints a table of network calls, memory and time, if there are estimates."""
    from rich.table import Table

    from deleatur.operations.estimate import CAPTIONS

    if not estimates:
        return
    timed = estimates[0].seconds is not None
    columns = ("", "rows", "with gradient", "trained", "FLOP", "memory", *(["time"] if timed else []))
    table = Table(
        *columns, title=title, caption=CAPTIONS[timed], box=None, title_justify="left", caption_justify="left"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    group = ""
    for estimate in estimates:
        if estimate.name != group:
            table.add_row(group := estimate.name, style="dim")
        work, cost = estimate.cost.workload, estimate.cost
        table.add_row(
            f"  {estimate.method}",
            f"{work.forward:,.0f}",
            f"{work.backward:,.0f}",
            f"{cost.trainable_parameters / 1e6:.1f} M",
            f"{cost.flops:.2g}",
            f"{cost.peak_memory / 1e9:.1f} GB" if cost.peak_memory >= 1e9 else f"{cost.peak_memory / 1e6:.0f} MB",
            *([estimate.time] if timed else []),
        )
    console.print(table)


def split_list(text: str) -> list[str]:
    """Items separated by commas or white space."""
    return [item for item in re.split(r"[,\s]+", text) if item]


def collect_less_garbage() -> None:
    """For processes that run one stage. What a stage imports lives as long as the process: looking through it for
    garbage repeatedly, and once more at exit, takes a fifth of the start-up time.
    """
    gc.set_threshold(100_000, 50, 100)
    atexit.register(gc.freeze)
