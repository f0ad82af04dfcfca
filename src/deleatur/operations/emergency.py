"""A release within minutes, beside the chain: no token is learned, nothing is trained, fewer pictures are drawn, and
nothing is measured that its policy does not ask for.

The same stages with other numbers and under a policy of its own, in a folder of its own; the chain's results stay as
they are. Ledger, registry and the model's own card say that it is one, and why. It is registered, approved and taken
back like any release, and the next one of the chain replaces it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from deleatur import stages
from deleatur.config.methods import PLAIN_GUIDE
from deleatur.config.settings import Settings, merged
from deleatur.errors import DataError, SettingsError
from deleatur.records.report import Verdict
from deleatur.registry import ledger
from deleatur.registry.decisions import STARTED_BY, registry_of
from deleatur.registry.mlflow_client import CHAMPION
from deleatur.stages import evaluate, gate, register
from deleatur.storage import json_records

MADE_BY = ("ingest", "reward", "erase", "attack", "sample")
"""Stages that are as in the chain. `invert` is what takes the time."""


def run(settings: Settings, concepts: Sequence[str], who: str, reason: str) -> Verdict:
    """Erases these, and what is live has erased, by the section `emergency`; judges it, and registers the verdict.

    Raises SettingsError where params.yaml has no such section, DataError where nobody is named or nothing said.
    """
    if not (who.strip() and reason.strip()):
        raise DataError(
            "an emergency has a name and a reason to it", hint="the same command with --as NAME --reason WHY"
        )
    own = settings_of(settings, concepts)
    os.environ[STARTED_BY] = who
    for name in MADE_BY:
        stages.run(name, own)
    evaluate.run(own, [note(own, reason)])
    gate.run(own)
    register.run(own, reason)
    return json_records.read(own.paths.verdict / "verdict.json", Verdict)


def settings_of(settings: Settings, concepts: Sequence[str]) -> Settings:
    """params.yaml as an emergency sees it. Raises SettingsError where it says nothing of one, or of a concept."""
    asked = settings.emergency
    if asked is None:
        raise SettingsError(
            "params.yaml has no section `emergency`: by which method, and under which policy",
            hint="add it, as docs/release.md says; then: deleatur check",
        )
    targets = list(dict.fromkeys([*concepts, *_live(settings)]))
    if unknown := [name for name in targets if name not in settings.concepts]:
        raise SettingsError(
            f"expected {', '.join(settings.concepts)}, got {', '.join(unknown)}, of which params.yaml says nothing",
            hint="describe it in the section `concepts`; then: deleatur check",
        )
    changes = {
        "targets": targets,
        "erase": asked.erase,
        "guide": {"method": PLAIN_GUIDE},
        "sample": {"per_prompt": {"token": 0, **asked.per_prompt}, "champion": None},
        "paths": {name: asked.folder / name for name in settings.paths.written},
    }
    whole = merged(settings.model_dump(by_alias=True), changes)
    wanted = {rule.metric for rule in asked.rules.values()}
    whole["evaluate"]["metrics"] = {n: m for n, m in whole["evaluate"]["metrics"].items() if n in wanted}
    whole |= {"gate": {"rules": asked.rules}, "attack": {"methods": {}}, "emergency": None}
    return Settings.of(whole, "params.yaml with its section emergency")


def note(settings: Settings, reason: str) -> str:
    method, rules = settings.erase.method, ", ".join(settings.gate.rules)
    return (
        f"EMERGENCY RELEASE: {reason}. Made by {method} within minutes, attacked by nobody, judged by the policy for "
        f"emergencies ({rules}); a release of the chain is to replace it."
    )


def _live(settings: Settings) -> list[str]:
    """What is erased in what is live, and would come back otherwise."""
    live = ledger.read(settings.register_.ledger).aliases.get(CHAMPION)
    return [n for n in registry_of(settings).tags(live).get("concepts", "").split("+") if n] if live else []
