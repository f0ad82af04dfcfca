"""Detectors and labels that concepts, metrics and prompts name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from deleatur import metrics
from deleatur.artifacts import prompts
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.errors import SettingsError


def demand_labels(settings: Settings) -> None:
    """Raises SettingsError where a concept, a metric or a prompt asks for a detector, or for a label of one, that there
    is not.
    """
    known = {name: detector.peek() for name, detector in methods.detectors(settings).items()}
    counts = {n: (s.found.detector, s.found.labels) for n, s in settings.concepts.items() if n in settings.targets}
    for name, (detector, labels) in counts.items():
        for label in labels:
            _demand(known, detector, label, f"concepts.{name}.found")
    asked = [p for name in ("", *settings.targets) for p in prompts.for_evaluation(settings, name)]
    of_prompt = {metrics.labelled(p): p.id for p in reversed(asked)}
    for name, metric in methods.metrics(settings).items():
        for detector, label in sorted(metric.needs(asked, counts)):
            prompt = f", for the prompt {found}" if (found := of_prompt.get((detector, label))) else ""
            _demand(known, detector, label, f"evaluate.metrics.{name}{prompt}")


def _demand(known: Mapping[str, Sequence[str] | None], detector: str, label: str, where: str) -> None:
    if detector not in known:
        raise SettingsError(
            f"{where}: expected a detector of evaluate.detectors ({', '.join(known)}), got {detector!r}",
            hint="correct it or add the detector, then: deleatur check",
        )
    labels = known[detector]
    if labels is not None and label not in labels:
        near = get_close_matches(label, labels, 3) or sorted(labels)[:5]
        raise SettingsError(
            f"{where}: {detector} has no label {label!r}; near are {', '.join(near)}",
            hint="correct the label, then: deleatur check",
        )
