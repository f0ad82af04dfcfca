"""Commands of the group Operations: check and repair a deployment."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deleatur.cli.common import (
    PARAMS,
    VERDICT_EXIT_CODES,
    AsJson,
    Operator,
    ParamsFile,
    Reason,
    err,
    load_settings,
    print_json,
    print_text,
    split_list,
)
from deleatur.cli.registry import print_rollback

if TYPE_CHECKING:
    from deleatur.operations.doctor import Diagnosis

commands = typer.Typer()


@commands.command()
def canary(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and quarantine nothing.")] = False,
    params: ParamsFile = PARAMS,
    as_json: AsJson = False,
) -> None:
    """Check that every concept is still erased in the live version: sample it again from the same noise as last time.

    A version in which a concept is back is quarantined, and the one before it is live again. The section `canary` of
    params.yaml defines the thresholds. Exit code: 0 all concepts are gone, or nothing is live; 10 one is back; 11 not
    enough evidence.
    """
    from deleatur.operations import canary

    settings = load_settings(params)
    result, taken_back = canary.run(settings, dry_run=dry_run) or (None, None)
    if as_json:
        plain = result and {"outcome": result.outcome, **asdict(result)}
        print_json({"canary": plain, "quarantined": taken_back and taken_back.quarantined})
    elif result is None:
        print_text("No live version has anything erased")
    else:
        for concept in result.checks:
            style = {"pass": "green", "fail": "red"}.get(concept.outcome, "yellow")
            print_text((f"{concept.outcome.upper():<20} ", style), f"{concept.concept}: {concept.reason}")
        if taken_back:
            print_rollback(taken_back)
        print_text(f"Images: {settings.canary.folder}/")
    raise typer.Exit(VERDICT_EXIT_CODES[result.outcome] if result else 0)


@commands.command()
def emergency(
    concepts: Annotated[str, typer.Argument(metavar="CONCEPT,…", help="What to erase, by the names in params.yaml.")],
    operator: Operator,
    reason: Reason,
    words: Annotated[str, typer.Option(metavar="WORD,…", help="Words of a concept that params.yaml lacks.")] = "",
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt that asks for it; may be repeated.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with such prompts, one per line.")] = None,
    params: ParamsFile = PARAMS,
    as_json: AsJson = False,
) -> None:
    """Release within minutes, outside the chain: a closed-form edit instead of training, fewer images, its own policy.

    A new concept need not be in params.yaml: its name, --words and --prompt or --prompts are enough.
    Everything erased in the live version stays erased. The section `emergency` of params.yaml configures it; see
    docs/release.md. The next release of the chain replaces it. Exit code: 0 pass, 10 fail, 11 not enough evidence.
    """
    from deleatur import gate
    from deleatur.operations import emergency

    settings = load_settings(params)
    targets, definition = split_list(concepts), None
    if words or prompt or prompts:
        texts = [*(prompt or ()), *(emergency.read_prompts(prompts) if prompts else ())]
        described_by = [word.strip() for word in words.split(",") if word.strip()]  # a word may have several parts
        definition = emergency.define(settings, targets, described_by, texts)
        settings = definition.settings
    verdict = emergency.run(settings, targets, operator, reason, definition)
    if as_json:
        print_json(asdict(verdict))
    else:
        print_text(gate.explain(verdict))
        print_text(f"Report: {emergency.emergency_settings(settings, targets).paths.verdict / 'report.html'}")
    raise typer.Exit(VERDICT_EXIT_CODES[verdict.outcome])


@commands.command()
def doctor(params: ParamsFile = PARAMS, as_json: AsJson = False) -> None:
    """Check a deployment: versions, stores, pools, schedules, aliases, signatures, disk, clock, credentials.

    Each line is ok, warn or fail, with the next command. Exit code: 1 if one fails.
    """
    from deleatur.operations.doctor import diagnose

    lines = []
    for line in diagnose(params):
        lines.append(line)
        if not as_json:
            _print_line(line)
    if as_json:
        print_json([asdict(line) for line in lines])
    raise typer.Exit(int(any(line.status == "fail" for line in lines)))


def _print_line(line: Diagnosis) -> None:
    colour = {"ok": "green", "warn": "yellow", "fail": "red"}[line.status]
    print_text((f"{line.status:<5}", colour), (f"{line.topic:<13}", "dim"), line.message)
    if line.next_command:
        print_text(" " * 18, "Next: ", (line.next_command, "bold"))


@commands.command()
def backup(
    folder: Annotated[Path, typer.Argument(help="The folder to write; must not exist yet.")],
    params: ParamsFile = PARAMS,
) -> None:
    """Copy registry, ledger and DVC's pointers to a folder, as one consistent set."""
    from deleatur.operations import backup

    saved = backup.backup(load_settings(params), folder)
    print_text(f"Written: {folder}, {saved.versions} versions and {saved.decisions} decisions")
    print_text("Not included: the contents of the DVC remote and the feedback sources. Copy it to another machine.")


@commands.command()
def restore(
    folder: Annotated[Path, typer.Argument(help="A folder that `deleatur backup` has written.")],
    params: ParamsFile = PARAMS,
) -> None:
    """Restore a backup into an empty registry and a clone of the project. If interrupted, run it again to resume."""
    from deleatur.operations import backup

    saved = backup.restore(load_settings(params), folder)
    print_text(
        f"Restored as of {saved.created_at}: {saved.versions} versions, {saved.decisions} decisions; "
        "ledger and registry agree"
    )
    if saved.commit:
        print_text(f"Next: git checkout {saved.commit} (the code of that time), then: dvc pull")


@commands.command()
def exporter(
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port that Prometheus scrapes; 0 selects a free one.")
    ] = 9105,
    host: Annotated[str, typer.Option(help="0.0.0.0 to be reachable from other machines.")] = "127.0.0.1",
    params: ParamsFile = PARAMS,
) -> None:
    """Serve Prometheus metrics: the live version, harm and margins, waiting feedback, stages, the state of the ledger.

    Reads ledger, registry and evidence at each scrape and changes nothing. Runs until interrupted.
    """
    from deleatur.operations.exporter import serve

    serve(params, host, port, lambda port: print_text(f"http://{host}:{port}/metrics", console=err))
