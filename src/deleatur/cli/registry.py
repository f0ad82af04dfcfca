"""Commands of the group Registry: decide which version is live, and check that the registry is as it was decided."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from deleatur.cli.common import (
    PARAMS,
    AsJson,
    Operator,
    ParamsFile,
    Reason,
    err,
    load_settings,
    out,
    print_json,
    print_text,
)

if TYPE_CHECKING:
    from deleatur.registry.rollback import RollbackResult

commands = typer.Typer()


@commands.command()
def approve(
    version: Annotated[str, typer.Argument(help="Number of the version that awaits approval, as `demo` printed it.")],
    approver: Operator,
    reason: Reason = "",
    params: ParamsFile = PARAMS,
) -> None:
    """Release a version that passed the gate and awaits approval. The ledger records who approved it, and why.

    With `register.approval: true` in params.yaml, versions await approval, for `register.approval_days`. The person who
    started the run cannot approve its result.
    """
    from deleatur.registry.approval import promote

    evidence = promote(load_settings(params), version, approver, reason=reason)
    print_text(f"Version {version} is champion, on evidence sha256:{evidence}")


@commands.command()
def decline(
    version: Annotated[str, typer.Argument(help="Number of the version that awaits approval.")],
    approver: Operator,
    reason: Reason = "",
    params: ParamsFile = PARAMS,
) -> None:
    """Decline a version that awaits approval. The live version does not change."""
    from deleatur.registry import approval

    approval.decline(load_settings(params), version, approver, reason=reason)
    print_text(f"Version {version} is declined; the live version has not changed")


@commands.command()
def rollback(
    operator: Operator,
    reason: Reason,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="VERSION", help="The version to go back to. Default: the last good one."),
    ] = None,
    params: ParamsFile = PARAMS,
) -> None:
    """Roll back the last release: make the version before it live again, and quarantine the one that was live.

    Takes seconds and needs no GPU. Idempotent: repeating it changes nothing. To go further back, use --to; also to
    bring a version back where none is live.
    """
    from deleatur.registry import rollback as registry

    print_rollback(registry.rollback(load_settings(params), operator, reason, to))


@commands.command()
def quarantine(
    version: Annotated[str, typer.Argument(help="Number of the version that must not be used.")],
    operator: Operator,
    reason: Reason,
    params: ParamsFile = PARAMS,
) -> None:
    """Bar a version from ever going live. If it is live, the last good version replaces it, or none."""
    from deleatur.registry import rollback as registry

    print_rollback(registry.quarantine(load_settings(params), version, operator, reason))


def print_rollback(result: RollbackResult) -> None:
    was = "was already" if result.already else "is"
    live = f"version {result.champion} is" if result.champion else "none is"
    print_text(f"{f'Version {result.quarantined} {was} quarantined; ' if result.quarantined else ''}{live} champion")


@commands.command()
def verify(
    version: Annotated[str, typer.Argument(help="Number of a registered version.")],
    params: ParamsFile = PARAMS,
    as_json: AsJson = False,
) -> None:
    """Compare every file of a version with what was evaluated and signed, before another program loads it.

    Exit code: 4 if a file was changed, added or removed, could run code when loaded, or no trusted key signed it.
    """
    from deleatur.registry import verify
    from deleatur.registry.decisions import checked_ledger

    settings = load_settings(params)
    statement = verify.verify(settings, version, checked_ledger(settings).entries)
    verdict = verify.verdict_summary(settings, version)
    if as_json:
        print_json({"version": version, "files": dict(statement.files) if statement else None, "verdict": verdict})
    else:
        files = f"{len(statement.files)} files are as evaluated" if statement else "its files have no signed digests"
        print_text(f"Version {version}: {files}\nVerdict: {verdict}")


@commands.command()
def history(params: ParamsFile = PARAMS, as_json: AsJson = False) -> None:
    """Print who released or rolled back which version, and why; check that ledger and registry agree.

    Exit code: 3 if the ledger was tampered with, or an alias was moved by hand.
    """
    from deleatur.registry import history

    recorded = history.history(load_settings(params))
    if as_json:
        print_json(recorded.as_dict)
    else:
        out.print(recorded.table)
        print_text(recorded.summary)
    for problem in recorded.problems[:-1]:
        print_text(f"{problem}. Next: {problem.hint}", console=err)
    if recorded.problems:
        raise recorded.problems[-1]


@commands.command()
def settle(
    operator: Operator,
    reason: Reason,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="The reverse: the ledger adopts the registry's aliases.")
    ] = False,
    params: ParamsFile = PARAMS,
) -> None:
    """Reset the registry's aliases to what the ledger says. The ledger records who did it, and why.

    With --adopt, a ledger that was lost or tampered with is restarted after the last line that the registry knows.
    """
    from deleatur.registry import history

    for difference in history.settle(load_settings(params), operator, reason, adopt=adopt):
        print_text(f"Was: {difference}")
    print_text("Ledger and registry agree")
