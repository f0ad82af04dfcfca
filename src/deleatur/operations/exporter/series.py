"""Families of series from plain values. Labels are names from params.yaml and words of ours, so there are never many:
no prompt, no picture, no person.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

Rows = Mapping[Any, float]
"""Tuple of label values → value."""


def gauge(name: str, about: str, rows: Rows | float, *labels: str) -> GaugeMetricFamily:
    """`rows` is a number where there are no labels."""
    family = GaugeMetricFamily(f"deleatur_{name}", about, labels=labels)
    for values, value in (rows if isinstance(rows, Mapping) else {(): rows}).items():
        family.add_metric(values, float(value))
    return family


def counter(name: str, about: str, rows: Rows, *labels: str) -> CounterMetricFamily:
    """Counted anew from what lies on disk at every scrape."""
    family = CounterMetricFamily(f"deleatur_{name}", about, labels=labels)
    for values, value in rows.items():
        family.add_metric(values, float(value))
    return family


def seconds(moment: str) -> float:
    """ISO 8601 → Unix time."""
    return datetime.fromisoformat(moment).timestamp()
