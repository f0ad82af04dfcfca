"""Commands of the group Pipeline: run the chain, or a part of it, and learn what can be configured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.padding import Padding
from rich.text import Text

from deleatur.cli.common import (
    PARAMS,
    VERDICT_EXIT_CODES,
    AsJson,
    ParamsFile,
    collect_less_garbage,
    err,
    load_settings,
    out,
    print_estimates,
    print_json,
    print_text,
)

if TYPE_CHECKING:
    from deleatur.config.settings import Settings

commands = typer.Typer()


@commands.command()
def demo(as_json: AsJson = False) -> None:
    """Run the whole chain on the built-in model: rated images in, an evaluated and registered model out.

    Brings every stage up to date with params.yaml, as `dvc repro` does, registers the result in MLflow, and prints the
    verdict and the next commands. Exit code: 0 pass, 10 fail, 11 not enough evidence.
    """
    from deleatur.operations import chain, estimate
    from deleatur.report.latest import latest_report
    from deleatur.stages import STAGES

    settings = load_settings()  # a mistake in it is reported before anything runs
    remaining = chain.remaining(Path())
    if done := STAGES[: -len(remaining)]:
        print_text(f"Up to date: {', '.join(done)}", console=err)
    if {"invert", "erase", "attack", "sample"} & {*remaining}:
        print_estimates(
            "Stages to run", [line for line in estimate.chain_estimates(settings) if line.name in remaining], err
        )
    chain.run(remaining, Path(), err)

    latest = latest_report(PARAMS)
    next_commands = list(_next_commands(settings))
    if as_json:
        links = {"contact_sheet": str(latest.contact_sheet), "html_report": str(latest.html)}
        print_json(latest.json | links | {"next": [command for command, _ in next_commands]})
    else:
        out.print(latest.summary)
        simulated = "  (simulated raters)" if latest.verdict.simulated else ""
        print_text("\nVerdict: ", (latest.verdict.outcome, "bold"), simulated)
        print_text(f"Before and after, side by side: {latest.contact_sheet}\n\nNext:")
        width = max(len(command) for command, _ in next_commands)
        for command, purpose in next_commands:
            print_text(f"  {command:<{width}}  {purpose}")
    raise typer.Exit(VERDICT_EXIT_CODES[latest.verdict.outcome])


def _next_commands(settings: Settings) -> Iterator[tuple[str, str]]:
    """(command, what it is for)."""
    from deleatur.registry.approval import pending_approval

    yield "deleatur report --open", "every metric and image in one HTML report"
    yield "deleatur explain", "which rule decided, and by what margin"
    if candidate := pending_approval(settings):
        yield f"deleatur approve {candidate[0]} --as NAME", "release it, or decline it with `deleatur decline`"
    yield "deleatur export erased", "the erased model as a folder that plain diffusers loads"


@commands.command()
def check(
    params: ParamsFile = PARAMS,
    as_json: AsJson = False,
    cost: Annotated[
        bool, typer.Option("--cost", help="Estimate also network calls, memory and time, by timing the UNet.")
    ] = False,
) -> None:
    """Validate params.yaml, every method's hyperparameters and every prompt, word and input file, in seconds.

    Warns of preserved prompts that name a target, or are close to one by the local CLIP model, and of rules about
    targets without ratings. Loads no other network, except with --cost.
    """
    from deleatur.operations import preflight, preserved_prompts

    settings = load_settings(params)
    lines, estimates = preflight.check(settings), []
    warnings = [*preflight.rules_without_evidence(settings), *preserved_prompts.naming_targets(settings)]
    if preflight.local_folder(settings.reward.clip, "config.json"):
        from deleatur.runtime import models

        warnings += preserved_prompts.similar_to_targets(settings, models.clip_model(settings))
    if cost:
        from deleatur.operations import estimate  # imports diffusers' networks, which take as long as the checks

        estimates = estimate.chain_estimates(settings)
    if as_json:
        costs = [asdict(line) for line in estimates]
        print_json({"ok": True, "checked": lines, "warnings": warnings, "cost": costs})
        return
    for warning in warnings:
        print_text(("warning", "yellow"), f"  {warning}")
    for line in lines:
        print_text(("ok", "green"), f"  {line}")
    print_estimates("What the chain takes on this machine, with nothing cached", estimates)


@commands.command()
def stage(
    name: Annotated[
        str, typer.Argument(help="ingest, reward, invert, erase, attack, sample, evaluate, gate or register.")
    ],
    params: ParamsFile = PARAMS,
) -> None:
    """Run one stage now, whether or not it is up to date. `dvc repro` runs those that are not."""
    collect_less_garbage()
    from deleatur import stages

    stages.run(name, load_settings(params))


@commands.command()
def methods(
    kind: Annotated[
        str | None, typer.Argument(help="erasers, inversion, guides, detectors, metrics or attacks. Default: all.")
    ] = None,
    as_json: AsJson = False,
    cost: Annotated[
        bool, typer.Option("--cost", help="Network calls, memory and time of each method instead, without running it.")
    ] = False,
) -> None:
    """List every method with its hyperparameters, their defaults and its source."""
    if cost:
        _print_costs(kind, as_json)
        return
    from deleatur.config.catalogue import catalogue

    entries = catalogue(kind)
    if as_json:
        print_json(entries)
        return
    for title, named in entries.items():
        out.rule(Text(title, "bold"), align="left")
        for name, entry in named.items():
            origin = f"  of {entry['package']}" if entry["package"] != "deleatur" else ""
            out.print(Text.assemble((name, "bold cyan"), f"  {entry['source']}", (origin, "dim")))
            for key, field in entry["hyperparameters"].items():
                choices = f"  ({' | '.join(map(str, field['choices']))})" if field["choices"] else ""
                described = Text.assemble(f"{key} = {field['default']}{choices}  ", (field["meaning"], "dim"))
                out.print(Padding(described, (0, 0, 0, 4), expand=False))


def _print_costs(kind: str | None, as_json: bool) -> None:
    from deleatur.operations import estimate

    stable_diffusion = estimate.published_estimates(kind)
    configured = estimate.method_estimates(load_settings(), kind) if PARAMS.is_file() else []
    if as_json:
        named = {"Stable Diffusion 1.4": stable_diffusion, "params.yaml": configured}
        print_json({name: [asdict(line) for line in lines] for name, lines in named.items()})
        return
    print_estimates(
        "Each method with its default hyperparameters, on Stable Diffusion 1.4 in float32", stable_diffusion
    )
    print_estimates("Each method as params.yaml configures it, on its base model and this machine", configured)


@commands.command()
def schema(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="The file to write. Default: print it.")] = None,
) -> None:
    """Write the JSON Schema of params.yaml, by which editors complete and check settings."""
    from deleatur.config.schema import json_schema
    from deleatur.storage import files

    if file is None:
        print_json(json_schema())
        return
    files.write_json(file, json_schema())
    print_text(f"Written: {file}")


@commands.command(hidden=True)
def digests() -> None:
    """Write the digests of the code that each stage depends on: the command of the DVC stage `code`."""
    from deleatur import dependencies

    dependencies.write_digests(Path())
