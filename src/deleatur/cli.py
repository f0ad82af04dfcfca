"""The command line. Heavy imports stay inside commands: `--help` answers at once."""

from __future__ import annotations

import atexit
import gc
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import wraps
from itertools import dropwhile
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from deleatur.errors import ContinueMe, DataError, DeleaturError, ServiceError

if TYPE_CHECKING:
    from deleatur.config.settings import Settings
    from deleatur.operations.estimate import Estimate
    from deleatur.registry.rollback import TakenBack

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
Approver = Annotated[str, typer.Option("--as", metavar="NAME", help="Who decides; it stays with the version.")]
Reason = Annotated[str, typer.Option("--reason", metavar="WHY", help="For whoever asks later.")]
Several = Annotated[str, typer.Option(metavar="A,B,…", help="Some of those in params.yaml; all, if left out.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Errors that a person can act on become a message, the next command and an exit code; never a stack trace."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:  # whoever reads us has read enough
            raise
        except (DeleaturError, OSError) as found:
            e = found if isinstance(found, DeleaturError) else _of_machine(found)
            # Not as markup: messages quote lists and prompts in brackets. Not folded: commands are copied.
            err.print(Text.assemble((f"{type(e).__name__}:", "red"), f" {e}"), soft_wrap=True)
            if e.hint:
                err.print(Text.assemble("Next: ", (here(e.hint), "bold")), soft_wrap=True)
            raise typer.Exit(e.exit_code) from found

    return run


def _of_machine(e: OSError) -> DeleaturError:
    """A disk that is full, a folder nobody may write; or a host that does not answer, which it may the next time."""
    kind = ServiceError if isinstance(e, ConnectionError | TimeoutError) else DataError
    return kind(f"{e.strerror or e}{f': {e.filename}' if e.filename else ''}")


def here(text: str) -> str:
    """Commands in a text as they work in this terminal: without an activated venv, our programs are not on its PATH."""
    folder = Path(sys.executable).parent
    if (known := shutil.which("deleatur")) and Path(known).parent.samefile(folder):
        return text
    near = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else None
    text = re.sub(r"(^|: )(deleatur|mlflow|python) ", lambda m: f"{m[1]}{quote(str((near or folder) / m[2]))} ", text)
    # DVC looks for `deleatur` there itself.
    path = f"$PWD/{near}" if near else str(folder)
    return re.sub(r"(^|: )dvc ", lambda m: f'{m[1]}PATH="{path}:$PATH" dvc ', text)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.print(f"deleatur {version('deleatur')}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Which release this is.")
    ] = False,
) -> None:
    pass


def tell(value: Any) -> None:
    out.print_json(json.dumps(value))


@app.command()
@guarded
def check(params: Params = Path("params.yaml"), as_json: Json = False) -> None:
    """Validate params.yaml, every method's numbers and every input file, and say what running would take.

    Nothing is run but one network call, to measure time with.
    """
    from deleatur.config.settings import Settings
    from deleatur.operations.estimate import chain
    from deleatur.operations.preflight import check as run

    settings = Settings.load(params)
    lines = run(settings)
    costs = chain(settings)
    if as_json:
        tell({"ok": True, "checked": lines, "cost": [asdict(line) for line in costs]})
        return
    for line in lines:
        out.print(f"[green]ok[/green]  {line}", highlight=False)
    _costs("What the chain takes on this machine, from an empty folder", costs)


def _costs(title: str, lines: Sequence[Estimate], console: Console = out) -> None:
    from rich.table import Table

    from deleatur.operations.estimate import HOW, duration

    if not lines:
        return
    timed = lines[0].seconds is not None
    names = ("", "rows", "with gradient", "trained", "FLOP", "memory", *(["time"] if timed else []))
    table = Table(*names, title=title, caption=HOW[timed], box=None, title_justify="left", caption_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    above = ""
    for line in lines:
        if line.name != above:
            table.add_row(above := line.name, style="dim")
        work, c = line.cost.work, line.cost
        cells = [f"{work.forward:,.0f}", f"{work.backward:,.0f}", f"{c.trained / 1e6:.1f} M", f"{c.operations:.2g}"]
        cells.append(f"{c.memory / 1e9:.1f} GB" if c.memory >= 1e9 else f"{c.memory / 1e6:.0f} MB")
        cells += [duration(line.seconds)] if line.seconds is not None else []
        table.add_row(f"  {line.method}", *cells)
    console.print(table)


@app.command()
@guarded
def stage(
    name: Annotated[
        str, typer.Argument(help="ingest, reward, invert, erase, attack, sample, evaluate, gate or register")
    ],
    params: Params = Path("params.yaml"),
) -> None:
    """Run one stage here and now. `dvc repro` runs those that need it, and remembers."""
    _short_lived()
    from deleatur import stages
    from deleatur.config.settings import Settings

    stages.run(name, Settings.load(params))


def _short_lived() -> None:
    # What a stage imports lives as long as its process: to look through it for garbage, again and again and at the end,
    # would be a fifth of the start.
    gc.set_threshold(100_000, 50, 100)
    atexit.register(gc.freeze)


@app.command(hidden=True)
@guarded
def cell(
    row: Annotated[str, typer.Argument(help="A row of the comparison; or plan, ratings, tokens: what rows share.")],
    concept: str,
    seed: Annotated[int | None, typer.Argument()] = None,
) -> None:
    """One part of `deleatur compare`, here and now: the only command in compare/dvc.yaml."""
    from deleatur.benchmark import plan
    from deleatur.benchmark import trial as cells
    from deleatur.config.settings import Settings

    _short_lived()
    settings = Settings.load()
    plan.chosen([concept], plan.section(settings).concepts, "concepts")
    plan.chosen([row], [plan.PLAN, *plan.SHARED, *plan.rows(settings)], "methods")
    if row == plan.PLAN:
        plan.write(settings, concept)
    else:
        asked = plan.Cell(concept, row, settings.seed if seed is None else seed)
        cells.run(settings, cells.Stamps(settings), asked)


@app.command(hidden=True)
@guarded
def digests() -> None:
    """Write the digests by which DVC knows what code each stage depends on: the only command of the stage `code`."""
    from deleatur import dependencies

    dependencies.write(Path())


@app.command()
@guarded
def methods(
    shelf: Annotated[
        str | None, typer.Argument(help="erasers, inversion, guides, detectors, metrics or attacks")
    ] = None,
    as_json: Json = False,
    cost: Annotated[
        bool, typer.Option("--cost", help="Network calls, memory and time of each method, known before it runs.")
    ] = False,
) -> None:
    """What is on each shelf: every method with its numbers, their defaults and its source, and the package that brings
    it where that is not ours.
    """
    from deleatur.config.catalogue import catalogue

    if cost:
        _methods_cost(shelf, as_json)
        return
    found = catalogue(shelf)
    if as_json:
        tell(found)
        return
    for room, entries in found.items():
        out.rule(f"[bold]{room}[/bold]", align="left")
        for name, entry in entries.items():
            origin = f"  [dim]of {entry['package']}[/dim]" if entry["package"] != "deleatur" else ""
            out.print(f"[bold cyan]{name}[/bold cyan]  {entry['source']}{origin}", highlight=False)
            for key, number in entry["numbers"].items():
                choices = f"  ({' | '.join(map(str, number['choices']))})" if number["choices"] else ""
                meaning = number["meaning"].replace("\n", "\n        ")
                out.print(Text.assemble(f"    {key} = {number['default']}{choices}  ", (meaning, "dim")))


def _methods_cost(shelf: str | None, as_json: bool) -> None:
    from deleatur.config.settings import Settings
    from deleatur.operations import estimate as cost

    sd = cost.published(shelf)
    here = cost.of_methods(Settings.load(), shelf) if Path("params.yaml").is_file() else []
    if as_json:
        tell({"Stable Diffusion 1.4": [asdict(line) for line in sd], "here": [asdict(line) for line in here]})
        return
    _costs("Each method with its own numbers, on Stable Diffusion 1.4 in float32", sd)
    _costs("Each method with the numbers of params.yaml, on its base model and this machine", here)


@app.command()
@guarded
def report(
    params: Params = Path("params.yaml"),
    as_json: Json = False,
    browse: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """The newest report: every number with its interval, and where the page and the sheet are."""
    from deleatur.report.latest import show

    found = show(params)
    if as_json:
        tell(found.plain)
        return
    out.print(found.table)
    _warn(found.stale, params)
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
    from deleatur.report.latest import show

    found = show(params)
    if as_json:
        tell(found.plain["verdict"])
    else:
        out.print(gate.explain(found.verdict), highlight=False, markup=False)
    _warn(found.stale, params)
    raise typer.Exit(VERDICT_CODES[found.verdict.outcome])


def _warn(stale: str, params: Path) -> None:
    if stale:
        # Of another file than DVC reads, stages are run by hand.
        again = "deleatur demo" if params == Path("params.yaml") else f"deleatur stage gate --params {params}"
        err.print(f"[yellow]Not up to date:[/yellow] {stale}. Next: {here(again)}", soft_wrap=True)


@app.command()
@guarded
def compare(
    methods: Several = "",
    concepts: Several = "",
    seeds: Several = "",
    show: Annotated[bool, typer.Option("--show", help="Run nothing: the table of what is there.")] = False,
    as_json: Json = False,
) -> None:
    """Every method side by side, from the same noise by the same sampler: what goes, what stays, what it costs.

    The section `compare` of params.yaml names methods, concepts and training seeds; options choose among them. What is
    there is not done again, so it can be stopped at any time. Rows that cannot be are named before anything runs.
    """
    from deleatur.benchmark import aggregate as collect
    from deleatur.benchmark import log, plan
    from deleatur.benchmark import schedule as drive
    from deleatur.benchmark.trial import Stamps
    from deleatur.config.settings import Settings
    from deleatur.operations import estimate as cost
    from deleatur.operations.preflight import check

    settings = Settings.load()
    check(settings)
    asked = plan.section(settings)
    names = plan.chosen(_listed(concepts), asked.concepts, "concepts")
    numbers = plan.chosen([int(s) if s.isdecimal() else s for s in _listed(seeds)], asked.seeds, "seeds")
    known = plan.rows(settings)
    rows = plan.chosen([plan.NONE, *given] if (given := _listed(methods)) else [], known, "methods")
    stamps = Stamps(settings)
    if not show:
        for concept in names:
            for row in rows:
                if why := stamps.refused(plan.Cell(concept, row, numbers[0])):
                    err.print(f"[yellow]Refused:[/yellow] {row} on {concept}: {escape(why)}", soft_wrap=True)
        ahead = drive.missing(settings, stamps, drive.cells_of(names, rows, numbers))
        _costs("What is ahead, each row with one seed", cost.rows(settings, ahead), err)
        try:
            drive.run(settings, stamps, ahead)
        except KeyboardInterrupt:
            raise ContinueMe("stopped; what is done is kept", hint="deleatur compare (goes on there)") from None
    tables = [collect.aggregate(settings, stamps, name, rows, numbers) for name in names]
    made = collect.write(settings, tables)
    if not show:
        log.run(settings, tables, made.files)
    if as_json:
        tell(made.plain)
        return
    out.print(made.shown)
    for what, path in made.files.items():
        out.print(f"{what + ':':<8} {path}", highlight=False)


def _listed(text: str) -> list[str]:
    return [part for part in re.split(r"[,\s]+", text) if part]


@app.command()
@guarded
def export(
    folder: Annotated[Path, typer.Argument(help="Where the pipeline folder is written; must not exist yet.")],
    version: Annotated[
        str | None, typer.Option("--version", metavar="VERSION", help="A registered version, not the newest weights.")
    ] = None,
    params: Params = Path("params.yaml"),
    as_json: Json = False,
) -> None:
    """Write the erased model as a folder that plain diffusers loads, and say how it was judged.

    It is written whatever the verdict is, and never holds the soft token.
    """
    from deleatur.artifacts.export import export as run
    from deleatur.artifacts.export import export_version, standing
    from deleatur.config.settings import Settings
    from deleatur.registry.verify import standing_of

    if folder.exists():
        raise DataError(f"{folder} exists already", hint="name a new folder")
    settings = Settings.load(params)
    if version:
        export_version(settings, version, folder)
    else:
        run(settings, folder)
    said = standing_of(settings, version) if version else standing(settings)
    if as_json:
        tell({"folder": str(folder), "verdict": said})
        return
    out.print(f"Written: {folder}\nVerdict: {said}", highlight=False)
    code = f"from diffusers import StableDiffusionPipeline as P; P.from_pretrained({str(folder)!r})"
    out.print(here(f'Next: python -c "{code}"'), highlight=False, markup=False, soft_wrap=True)


@app.command()
@guarded
def approve(
    version: Annotated[str, typer.Argument(help="Number of the version that waits, as `deleatur demo` named it.")],
    approver: Approver,
    reason: Reason = "",
    params: Params = Path("params.yaml"),
) -> None:
    """Let a version that passed and waits for a person go live. The ledger keeps who wanted that, and why.

    Versions wait where `register.approval` is true in params.yaml, for `register.approval_days`. Who started the run
    cannot approve what it made.
    """
    from deleatur.config.settings import Settings
    from deleatur.registry.approval import promote

    evidence = promote(Settings.load(params), version, approver, reason=reason)
    out.print(f"Version {version} is champion, on evidence sha256:{evidence}", highlight=False, soft_wrap=True)


@app.command()
@guarded
def decline(
    version: Annotated[str, typer.Argument(help="Number of the version that waits.")],
    approver: Approver,
    reason: Reason = "",
    params: Params = Path("params.yaml"),
) -> None:
    """Let a version that waits for a person's word wait no longer. What is live stays."""
    from deleatur.config.settings import Settings
    from deleatur.registry.approval import decline as run

    run(Settings.load(params), version, approver, reason=reason)
    out.print(f"Version {version} waits no longer; what is live stays", highlight=False)


@app.command()
@guarded
def rollback(
    who: Approver,
    reason: Reason,
    to: Annotated[
        str | None, typer.Option("--to", metavar="VERSION", help="Not the last known good one, but this.")
    ] = None,
    params: Params = Path("params.yaml"),
) -> None:
    """Take the last release back: the version before it is live again, and the one that was is quarantined.

    Takes seconds and no GPU. Said twice, it is done once; to go further back, name a version.
    """
    from deleatur.config.settings import Settings
    from deleatur.registry.rollback import rollback as run

    _say_taken_back(run(Settings.load(params), who, reason, to))


@app.command()
@guarded
def quarantine(
    version: Annotated[str, typer.Argument(help="Number of the version that must not be used.")],
    who: Approver,
    reason: Reason,
    params: Params = Path("params.yaml"),
) -> None:
    """Keep a version from ever going live again. If it is live, the last known good one is instead, or none."""
    from deleatur.config.settings import Settings
    from deleatur.registry.rollback import quarantine as run

    _say_taken_back(run(Settings.load(params), version, who, reason))


def _say_taken_back(done: TakenBack) -> None:
    was, live = "was already" if done.already else "is", f"version {done.live} is" if done.live else "none is"
    out.print(f"Version {done.left} {was} quarantined; {live} champion", highlight=False)


@app.command()
@guarded
def canary(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look, and quarantine nothing.")] = False,
    params: Params = Path("params.yaml"),
    as_json: Json = False,
) -> None:
    """Draw what is live again, with the noise of last time, for every concept that was ever erased.

    A version that a concept is back in is quarantined, and what was live before it is live again. What counts as back
    is in the section `canary` of params.yaml. Exit code: 0 all are gone, or nothing is live; 10 one is back; 11 not
    enough evidence.
    """
    from deleatur.config.settings import Settings
    from deleatur.operations import canary as stage

    settings = Settings.load(params)
    found, taken_back = stage.run(settings, dry=dry_run) or (None, None)
    if as_json:
        plain = found and {"outcome": found.outcome, **asdict(found)}
        tell({"canary": plain, "quarantined": taken_back and taken_back.left})
    elif found is None:
        out.print("Nothing is live that has anything erased", highlight=False)
    else:
        for look in found.looks:
            style = {"pass": "green", "fail": "red"}.get(look.outcome, "yellow")
            out.print(Text.assemble((f"{look.outcome.upper():<20} ", style), f"{look.concept}: {look.reason}"))
        if taken_back:
            _say_taken_back(taken_back)
        out.print(f"Pictures: {settings.canary.folder}/", highlight=False)
    raise typer.Exit(VERDICT_CODES[found.outcome] if found else 0)


@app.command()
@guarded
def emergency(
    concepts: Annotated[str, typer.Argument(metavar="CONCEPT,…", help="What has to go, by the names in params.yaml.")],
    who: Approver,
    reason: Reason,
    params: Params = Path("params.yaml"),
    as_json: Json = False,
) -> None:
    """Release within minutes, beside the chain: a formula instead of training, fewer pictures, a policy of its own.

    What is live has erased stays erased. By the section `emergency` of params.yaml; docs/release.md says more. The next
    release of the chain replaces it. Exit code: that of the verdict.
    """
    from deleatur import gate
    from deleatur.config.settings import Settings
    from deleatur.operations import emergency as stage

    settings = Settings.load(params)
    verdict = stage.run(settings, concepts.split(","), who, reason)
    if as_json:
        tell(asdict(verdict))
    else:
        out.print(gate.explain(verdict), markup=False, highlight=False, soft_wrap=True)
        page = stage.settings_of(settings, concepts.split(",")).paths.verdict / "report.html"
        out.print(f"Pictures and all numbers: {page}", highlight=False)
    raise typer.Exit(VERDICT_CODES[verdict.outcome])


@app.command()
@guarded
def verify(
    version: Annotated[str, typer.Argument(help="Number of a registered version.")],
    params: Params = Path("params.yaml"),
    as_json: Json = False,
) -> None:
    """Compare every file of a version with what was judged and signed, before something else loads it.

    Exit code: 4 where a file was changed, added or removed, could run when it is loaded, or no trusted key has signed.
    """
    from deleatur.config.settings import Settings
    from deleatur.registry import ledger
    from deleatur.registry.verify import standing_of
    from deleatur.registry.verify import verify as run

    settings = Settings.load(params)
    found = run(settings, version, ledger.read(settings.register_.ledger).entries)
    said = standing_of(settings, version)
    if as_json:
        tell({"version": version, "files": dict(found.files) if found else None, "standing": said})
    else:
        files = f"{len(found.files)} files are as they were judged" if found else "nothing is said of its files"
        out.print(f"Version {version}: {files}\nVerdict: {said}", highlight=False)


@app.command()
@guarded
def history(params: Params = Path("params.yaml"), as_json: Json = False) -> None:
    """Who released which version, why, and who took it back; whether ledger and registry still say the same.

    Exit code: 3 where somebody changed the ledger, or moved an alias by hand.
    """
    from deleatur.config.settings import Settings
    from deleatur.registry.history import history as read

    found = read(Settings.load(params))
    if as_json:
        tell(found.plain)
    else:
        out.print(found.table)
        out.print(found.standing, highlight=False, markup=False, soft_wrap=True)
    for problem in found.problems[:-1]:
        err.print(f"{problem}. Next: {here(problem.hint)}", markup=False, highlight=False, soft_wrap=True)
    if found.problems:
        raise found.problems[-1]


@app.command()
@guarded
def settle(
    who: Approver,
    reason: Reason,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="The other way round: the ledger takes over what the registry says.")
    ] = False,
    params: Params = Path("params.yaml"),
) -> None:
    """Put the registry's aliases back to what the ledger says. The ledger keeps who wanted that, and why.

    With --adopt a ledger that was lost or changed is begun anew, behind the last line that the registry knows of.
    """
    from deleatur.config.settings import Settings
    from deleatur.registry.history import settle as run

    for line in run(Settings.load(params), who, reason, adopt=adopt):
        out.print(f"Was: {line}", markup=False, highlight=False, soft_wrap=True)
    out.print("Ledger and registry say the same")


@app.command()
@guarded
def doctor(params: Params = Path("params.yaml"), as_json: Json = False) -> None:
    """Look a deployment over: versions, stores, pools, schedules, aliases, signatures, disk, clock, credentials.

    Each line is ok, warn or fail, with what to do next. Exit code: 1 where one fails.
    """
    from deleatur.operations.doctor import Line, look

    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    lines: list[Line] = []
    for line in look(params):
        lines.append(line)
        if not as_json:
            state = (f"{line.state:<5}", colours[line.state])
            out.print(Text.assemble(state, (f"{line.about:<13}", "dim"), line.what), soft_wrap=True)
            if line.next:
                out.print(Text.assemble(" " * 18, "Next: ", (here(line.next), "bold")), soft_wrap=True)
    if as_json:
        tell([asdict(line) for line in lines])
    raise typer.Exit(int(any(line.state == "fail" for line in lines)))


@app.command()
@guarded
def backup(
    folder: Annotated[Path, typer.Argument(help="Where the set is written; must not exist yet.")],
    params: Params = Path("params.yaml"),
) -> None:
    """Copy registry, ledger and DVC's pointers as one set that belongs together."""
    from deleatur.config.settings import Settings
    from deleatur.operations.backup import backup as run

    found = run(Settings.load(params), folder)
    out.print(f"Written: {folder}, {found.versions} versions and {found.decisions} decisions", highlight=False)
    out.print("Not in it: what the DVC remote and the feedback sources hold. Copy it to another machine.")


@app.command()
@guarded
def restore(
    folder: Annotated[Path, typer.Argument(help="A set that `deleatur backup` has written.")],
    params: Params = Path("params.yaml"),
) -> None:
    """Put a set back: into an empty registry, and a clone of the project. Killed, the same command goes on."""
    from deleatur.config.settings import Settings
    from deleatur.operations.backup import restore as run

    found = run(Settings.load(params), folder)
    out.print(
        f"As it was at {found.taken}: {found.versions} versions, {found.decisions} decisions; "
        "ledger and registry say the same",
        highlight=False,
        soft_wrap=True,
    )
    if found.commit:
        out.print(here(f"Next: git checkout {found.commit} (the code of then), then: dvc pull"), soft_wrap=True)


@app.command()
@guarded
def exporter(
    port: Annotated[int, typer.Option(help="Where Prometheus asks; 0 takes a free one.")] = 9105,
    host: Annotated[str, typer.Option(help="0.0.0.0 to be asked from other machines.")] = "127.0.0.1",
    params: Params = Path("params.yaml"),
) -> None:
    """Answer Prometheus: what is live, harm and margins, feedback that waits, stages, the ledger's state.

    Reads ledger, registry and evidence at every scrape; changes nothing. Runs until it is stopped.
    """
    from deleatur.operations.exporter import serve

    serve(params, host, port, lambda port: err.print(f"http://{host}:{port}/metrics", highlight=False))


@app.command()
@guarded
def demo(as_json: Json = False) -> None:
    """The whole chain on the built-in model: rated pictures in, a judged and registered model out.

    Brings every stage up to date with params.yaml, as `dvc repro` does, registers the result in MLflow, prints the
    verdict and what to do next.
    """
    from deleatur.config.settings import Settings
    from deleatur.operations import estimate as cost
    from deleatur.report.latest import show
    from deleatur.runtime.progress import following
    from deleatur.stages import STAGES
    from deleatur.storage import dvc as versions

    settings = Settings.load()  # what is wrong with it is said before anything runs
    # One look at all stages instead of one for each: what lies before the first that is stale is done.
    stale = versions.status(Path()) if Path(".dvc").is_dir() else STAGES
    if versions.CODE in stale:
        versions.reproduce(versions.CODE, Path())
    left = list(dropwhile(lambda name: name not in (*stale, "register"), STAGES))
    if done := STAGES[: -len(left)]:
        err.print(f"Up to date: {', '.join(done)}", highlight=False)
    if {"invert", "erase", "attack", "sample"} & {*left}:
        _costs("What is ahead", [line for line in cost.chain(settings) if line.name in left], err)
    try:
        for name in left:
            with following(name, err) as followed:
                if name == "register":  # makes no file, so DVC does not know it
                    versions.perform(name, Path(), followed.line, followed.told)
                else:
                    ran = versions.reproduce(name, Path(), followed.line, followed.told)
                    followed.ended("done" if ran else "up to date")
    except KeyboardInterrupt:
        raise ContinueMe(
            f"{name} was stopped; what it had saved is kept", hint="deleatur demo (goes on there)"
        ) from None
    found = show(Path("params.yaml"))
    told = [(here(command), meaning) for command, meaning in _next(settings)]
    code = typer.Exit(VERDICT_CODES[found.verdict.outcome])
    if as_json:
        tell(found.plain | {"sheet": str(found.sheet), "page": str(found.page), "next": [what for what, _ in told]})
        raise code
    out.print(found.table)
    simulated = "  (simulated raters)" if found.verdict.simulated else ""
    out.print(f"\nVerdict: [bold]{found.verdict.outcome}[/bold]{simulated}")
    out.print(f"Before and after, side by side: {found.sheet}\n\nNext:", highlight=False)
    width = max(len(command) for command, _ in told)
    for command, meaning in told:
        out.print(f"  {command:<{width}}  {meaning}", highlight=False, markup=False, soft_wrap=True)
    raise code


def _next(settings: Settings) -> Iterator[tuple[str, str]]:
    from deleatur.registry.approval import waiting

    yield "deleatur report --open", "every number and picture on one page"
    yield "deleatur explain", "which rule decided, and by what margin"
    if found := waiting(settings):
        yield f"deleatur approve {found[0]} --as NAME", "release it; `decline` to keep it back"
    yield "deleatur export erased", "the erased model as a folder that plain diffusers loads"
