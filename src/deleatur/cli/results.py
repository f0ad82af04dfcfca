"""Commands of the group Results: read reports and verdicts, compare methods, export the erased model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deleatur.cli.common import (
    PARAMS,
    VERDICT_EXIT_CODES,
    AsJson,
    CommaSeparated,
    ParamsFile,
    collect_less_garbage,
    err,
    load_settings,
    out,
    print_estimates,
    print_json,
    print_text,
    split_list,
)
from deleatur.errors import DataError

commands = typer.Typer()


@commands.command()
def report(
    params: ParamsFile = PARAMS,
    as_json: AsJson = False,
    browse: Annotated[bool, typer.Option("--open", help="Open the HTML report in a browser.")] = False,
) -> None:
    """Print the newest report: every metric with its confidence interval, and the paths of HTML report and images."""
    from deleatur.report.latest import latest_report

    latest = latest_report(params)
    if as_json:
        print_json(latest.json)
        return
    out.print(latest.summary)
    _warn_if_stale(latest.stale, params)
    print_text(f"HTML report:   {latest.html}\nContact sheet: {latest.contact_sheet}")
    if browse:
        typer.launch(str(latest.html))


@commands.command()
def explain(params: ParamsFile = PARAMS, as_json: AsJson = False) -> None:
    """Explain the verdict: which rule decided, by what margin, and what would change it.

    Exit code: 0 pass, 10 fail, 11 not enough evidence.
    """
    from deleatur import gate
    from deleatur.report.latest import latest_report

    latest = latest_report(params)
    if as_json:
        print_json(latest.json["verdict"])
    else:
        print_text(gate.explain(latest.verdict))
    _warn_if_stale(latest.stale, params)
    raise typer.Exit(VERDICT_EXIT_CODES[latest.verdict.outcome])


def _warn_if_stale(change: str, params: Path) -> None:
    if change:
        # DVC reads params.yaml only; with any other file, stages are run by hand.
        command = "deleatur demo" if params == PARAMS else f"deleatur stage gate --params {params}"
        print_text(("Not up to date:", "yellow"), f" {change}. Next: {command}", console=err)


@commands.command()
def compare(
    methods: CommaSeparated = "",
    concepts: CommaSeparated = "",
    seeds: CommaSeparated = "",
    show: Annotated[bool, typer.Option("--show", help="Run nothing: print the table of what has run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods from the same noise with the same sampler: what is removed, what is preserved, what it costs.

    The section `compare` of params.yaml names methods, concepts and training seeds; the options select among them.
    Trials that are up to date are not run again, so the command can be interrupted at any time. Methods that cannot be
    run are named, with the reason, before anything runs.
    """
    from deleatur.benchmark.runner import Benchmark
    from deleatur.operations import estimate, preflight

    settings = load_settings()
    preflight.check(settings)
    benchmark = Benchmark.select(settings, split_list(methods), split_list(concepts), split_list(seeds))
    if not show:
        for row, concept, reason in benchmark.refused():
            print_text(("Refused:", "yellow"), f" {row} on {concept}: {reason}", console=err)
        missing = benchmark.missing()
        print_estimates("Methods to run, each with one seed", estimate.benchmark_estimates(settings, missing), err)
        benchmark.run(missing)
    result = benchmark.write(log_to_mlflow=not show)
    if as_json:
        print_json(result.json)
        return
    out.print(result.summary)
    for name, path in result.files.items():
        print_text(f"{name + ':':<8} {path}")


@commands.command(hidden=True)
def trial(
    row: Annotated[str, typer.Argument(help="A row of the benchmark, or one of plan, ratings and tokens.")],
    concept: str,
    seed: Annotated[int | None, typer.Argument()] = None,
) -> None:
    """Run one trial of `deleatur compare`: the command of every stage in compare/dvc.yaml."""
    collect_less_garbage()
    from deleatur.benchmark import runner

    runner.run_trial(load_settings(), concept, row, seed)


@commands.command()
def export(
    folder: Annotated[Path, typer.Argument(help="The folder to write; must not exist yet.")],
    version: Annotated[
        str | None,
        typer.Option("--version", metavar="VERSION", help="A registered version. Default: the newest weights here."),
    ] = None,
    params: ParamsFile = PARAMS,
    as_json: AsJson = False,
) -> None:
    """Write the erased model as a folder that plain diffusers loads, and print its verdict.

    Writes it whatever the verdict is. The folder never contains the soft token.
    """
    from deleatur.artifacts import export as exporting
    from deleatur.registry.verify import verdict_summary

    if folder.exists():
        raise DataError(f"{folder} exists already", hint="name a new folder")
    settings = load_settings(params)
    if version:
        exporting.export_version(settings, version, folder)
        verdict = verdict_summary(settings, version)
    else:
        exporting.export(settings, folder)
        verdict = exporting.verdict_status(settings)
    if as_json:
        print_json({"folder": str(folder), "verdict": verdict})
        return
    print_text(f"Written: {folder}\nVerdict: {verdict}")
    code = f"from diffusers import StableDiffusionPipeline as P; P.from_pretrained({str(folder)!r})"
    print_text(f'Next: python -c "{code}"')
