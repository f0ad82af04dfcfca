"""The command line, a file for each group of commands.

Heavy imports stay inside the commands: `deleatur --help` loads neither torch nor MLflow.
"""

from __future__ import annotations

from typing import Annotated

import typer

from deleatur.cli import operations, pipeline, registry, results
from deleatur.cli.common import Commands, out

__all__ = ["app"]

EXIT_CODES = (
    "Exit codes: 0 done or pass · 2 settings · 3 data · 4 model · 5 erasure refused · 6 service · 10 verdict fail · "
    "11 not enough evidence · 75 interrupted with its state saved: run the same command again to resume."
)

app = typer.Typer(
    name="deleatur",
    cls=Commands,
    help="Remove unwanted concepts from text-to-image diffusion models, guided by human feedback.\n\n"
    "Start with `deleatur demo`: the whole pipeline on the built-in model, on a CPU, in minutes.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for group in (pipeline, results, registry, operations):
    for command in group.commands.registered_commands:
        command.rich_help_panel = group.__name__.rpartition(".")[2].capitalize()
    app.add_typer(group.commands)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        out.print(f"deleatur {version('deleatur')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
