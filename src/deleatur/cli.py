"""The command line. Heavy imports stay inside commands: `--help` answers at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console

from deleatur.errors import DataError, DeleaturError, ServiceError

P = ParamSpec("P")

app = typer.Typer(
    name="deleatur",
    help="Remove unwanted concepts from text-to-image diffusion models, guided by human feedback.\n\n"
    "Start with [bold]deleatur demo[/bold]: the whole chain on the built-in model, on a CPU, in minutes.",
    epilog="Exit codes: 0 done or pass · 2 settings · 3 data · 4 model · 5 erasure refused · 6 service · "
    "10 verdict fail · 11 not enough evidence · 75 stopped and saved, run again to go on.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

VERDICT_CODES = {"pass": 0, "fail": 10, "not enough evidence": 11}

Params = Annotated[Path, typer.Option("--params", help="The file of numbers.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Errors that a person can act on become a message, the next command and an exit code; never a stack trace."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except DeleaturError as e:
            err.print(f"[red]{type(e).__name__}:[/red] {e}", highlight=False)
            if e.hint:
                err.print(f"Next: [bold]{e.hint}[/bold]", highlight=False)
            raise typer.Exit(e.exit_code) from e

    return run


def tell(value: Any) -> None:
    out.print_json(json.dumps(value))


@app.command()
@guarded
def check(params: Params = Path("params.yaml"), as_json: Json = False) -> None:
    """Validate params.yaml, every method's numbers and every input file, without running anything."""
    from deleatur.settings import Settings
    from deleatur.stages.check import check as run

    lines = run(Settings.load(params))
    if as_json:
        tell({"ok": True, "checked": lines})
    else:
        for line in lines:
            out.print(f"[green]ok[/green]  {line}", highlight=False)


@app.command()
@guarded
def stage(
    name: Annotated[
        str, typer.Argument(help="ingest, reward, invert, erase, attack, sample, evaluate, gate or register")
    ],
    params: Params = Path("params.yaml"),
) -> None:
    """Run one stage here and now. `dvc repro` runs those that need it, and remembers."""
    from deleatur import stages
    from deleatur.settings import Settings

    stages.run(name, Settings.load(params))


@app.command()
@guarded
def methods(
    shelf: Annotated[
        str | None, typer.Argument(help="erasers, inversion, guides, detectors, metrics or attacks")
    ] = None,
    as_json: Json = False,
) -> None:
    """What is on each shelf: every method with its numbers, their defaults and its source."""
    from deleatur.stages.check import catalogue

    found = catalogue(shelf)
    if as_json:
        tell(found)
        return
    for room, entries in found.items():
        out.rule(f"[bold]{room}[/bold]", align="left")
        for name, entry in entries.items():
            out.print(f"[bold cyan]{name}[/bold cyan]  {entry['source']}", highlight=False)
            for key, number in entry["numbers"].items():
                out.print(f"    {key} = {number['default']}  [dim]{number['meaning']}[/dim]", highlight=False)


@app.command()
@guarded
def report(
    params: Params = Path("params.yaml"),
    as_json: Json = False,
    browse: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """The newest report: every number with its interval, and where the page and the sheet are."""
    from deleatur.stages.gate import show

    found = show(params)
    if as_json:
        tell(found.plain)
        return
    out.print(found.table)
    out.print(f"Page:  {found.page}\nSheet: {found.sheet}", highlight=False)
    if browse:
        typer.launch(str(found.page))


@app.command()
@guarded
def explain(params: Params = Path("params.yaml"), as_json: Json = False) -> None:
    """Why the verdict is what it is: which rule decided, by what margin, what would change it.

    Exit code: 0 pass, 10 fail, 11 not enough evidence.
    """
    from deleatur import gate
    from deleatur.stages.gate import show

    found = show(params)
    if as_json:
        tell(found.plain["verdict"])
    else:
        out.print(gate.explain(found.verdict), highlight=False, markup=False)
    raise typer.Exit(VERDICT_CODES[found.verdict.outcome])


@app.command()
@guarded
def export(
    folder: Annotated[Path, typer.Argument(help="Where the pipeline folder is written; must not exist yet.")],
    params: Params = Path("params.yaml"),
) -> None:
    """Write the erased model as a folder that plain diffusers loads. It never holds the soft token."""
    from deleatur.settings import Settings
    from deleatur.stages.export import export as run

    if folder.exists():
        raise DataError(f"{folder} exists already", hint="name a new folder")
    run(Settings.load(params), folder)
    out.print(f"Written: {folder}", highlight=False)
    out.print(
        f'Next: python -c "from diffusers import StableDiffusionPipeline as P; P.from_pretrained({str(folder)!r})"'
    )


@app.command()
@guarded
def demo(params: Params = Path("params.yaml")) -> None:
    """The whole chain on the built-in model: rated pictures in, a judged and registered model out.

    Runs what is not done yet (`dvc repro`), registers the result in MLflow, prints the verdict and what to do next.
    """
    from deleatur.io.versions import attached
    from deleatur.stages.gate import show

    if attached([sys.executable, "-m", "dvc", "repro", "dvc.yaml"]):
        raise ServiceError(
            "a stage did not end well; what it said is above", hint="deleatur demo (goes on where it stopped)"
        )
    if attached([sys.executable, "-m", "deleatur", "stage", "register"]):
        raise ServiceError("the result was not registered; what went wrong is above", hint="deleatur stage register")
    found = show(params)
    out.print(found.table)
    out.print(
        f"\nVerdict: [bold]{found.verdict.outcome}[/bold]" + ("  (simulated raters)" if found.verdict.simulated else "")
    )
    out.print(f"Before and after, side by side: {found.sheet}", highlight=False)
    out.print("\nNext:")
    out.print("  deleatur report --open                  every number and picture on one page", highlight=False)
    out.print("  deleatur explain                        which rule decided, and by what margin", highlight=False)
    out.print(
        "  dvc exp run -S 'targets=[vice]'         erase what a single word describes badly",
        highlight=False,
        markup=False,
    )
    raise typer.Exit(VERDICT_CODES[found.verdict.outcome])
