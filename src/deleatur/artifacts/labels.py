"""Validation of the detectors and labels that concepts, metrics and prompts refer to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from deleatur import metrics
from deleatur.artifacts import prompts
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.errors import SettingsError


def require_labels(settings: Settings) -> None:
    """Raises SettingsError if a concept, a metric or a prompt refers to a detector or label that does not exist."""
    labels_of = {name: detector.read_labels() for name, detector in methods.detectors(settings).items()}
    detections = {n: s.detection for n, s in settings.concepts.items() if n in settings.targets}
    concept_labels = {n: (d.detector, d.labels) for n, d in detections.items()}
    for name, (detector, labels) in concept_labels.items():
        for label in labels:
            _require_label(labels_of, detector, label, f"concepts.{name}.detection")
    evaluated = prompts.read_all(settings, settings.sample.split)
    first_prompt = {metrics.split_label(p): p.id for p in reversed(evaluated)}
    for name, metric in methods.metrics(settings).items():
        for detector, label in sorted(metric.required_labels(evaluated, concept_labels)):
            prompt_id = first_prompt.get((detector, label))
            prompt = f", for the prompt {prompt_id}" if prompt_id else ""
            _require_label(labels_of, detector, label, f"evaluate.metrics.{name}{prompt}")


def _require_label(labels_of: Mapping[str, Sequence[str] | None], detector: str, label: str, setting: str) -> None:
    if detector not in labels_of:
        raise SettingsError(
            f"{setting}: expected a detector of evaluate.detectors ({', '.join(labels_of)}), got {detector!r}",
            hint="correct it or add the detector, then: deleatur check",
        )
    labels = labels_of[detector]
    if labels is not None and label not in labels:
        near = get_close_matches(label, labels, 3) or sorted(labels)[:5]
        raise SettingsError(
            f"{setting}: {detector} has no label {label!r}; closest: {', '.join(near)}",
            hint="correct the label, then: deleatur check",
        )
