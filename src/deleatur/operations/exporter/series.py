"""Builds Prometheus metric families from plain values.

Label values are names from params.yaml or fixed words, so their number is bounded and no prompt, image or person can
appear in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

LabelledValues = Mapping[Any, float]
"""Tuple of label values → value."""


def gauge(name: str, description: str, values: LabelledValues | float, *labels: str) -> GaugeMetricFamily:
    """A gauge of labelled values or, without labels, of one number."""
    family = GaugeMetricFamily(f"deleatur_{name}", description, labels=labels)
    for label_values, value in (values if isinstance(values, Mapping) else {(): values}).items():
        family.add_metric(label_values, float(value))
    return family


def counter(name: str, description: str, values: LabelledValues, *labels: str) -> CounterMetricFamily:
    """A counter whose values are recounted from files at every scrape."""
    family = CounterMetricFamily(f"deleatur_{name}", description, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, float(value))
    return family


def unix_time(timestamp: str) -> float:
    """ISO 8601 → Unix time."""
    return datetime.fromisoformat(timestamp).timestamp()
