"""Renders the dashboard into one image without Grafana: the same panels and queries, against a Prometheus server.

python infra/grafana/render.py http://127.0.0.1:9090 dashboard.png

Supports threshold colours, value mappings and units. A panel without data shows its placeholder.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

DASHBOARD = Path(__file__).parent / "dashboards" / "deleatur.json"
CELL = (0.72, 0.34)
"""Inches of one cell of the dashboard's grid."""
COLOURS = {"red": "#e02f44", "orange": "#ff9830", "green": "#299c46", "blue": "#3274d9", "text": "#444444"}
DAY = 86400

Row = tuple[str, list[tuple[float, float]]]
"""Legend and points (Unix time, value)."""


def query(address: str, target: dict[str, Any], hours: float) -> list[Row]:
    """Results of a dashboard query from Prometheus: the newest value if it is instant, else the last hours."""
    now = time.time()
    parameters: dict[str, Any] = {"query": target["expr"]}
    if target.get("instant"):
        path = "query"
    else:
        path, step = "query_range", max(1, round(hours * 3600 / 200))
        parameters |= {"start": now - hours * 3600, "end": now, "step": step}
    response = httpx.get(f"{address}/api/v1/{path}", params=parameters, timeout=30).raise_for_status()
    results = response.json()["data"]["result"]
    return [(_legend(target["legendFormat"], r["metric"]), _points(r)) for r in results]


def _legend(template: str, labels: dict[str, str]) -> str:
    if template == "__auto":
        return ", ".join(v for k, v in labels.items() if k not in ("__name__", "instance", "job"))
    for name, value in labels.items():
        template = template.replace("{{" + name + "}}", value)
    return template


def _points(result: dict[str, Any]) -> list[tuple[float, float]]:
    values = result.get("values") or [result["value"]]
    return [(float(time_), float(value)) for time_, value in values]


def format_value(value: float, panel: dict[str, Any]) -> str:
    """Format a value with the panel's mapping and unit."""
    defaults = panel["fieldConfig"]["defaults"]
    for mapping in defaults.get("mappings", []):
        if (key := f"{value:g}") in mapping["options"]:
            return str(mapping["options"][key]["text"])
    match defaults.get("unit"):
        case "s":
            return (
                f"{value / DAY:.1f} d"
                if value >= DAY
                else f"{value / 3600:.1f} h"
                if value >= 3600
                else f"{value:.1f} s"
            )
        case "percentunit":
            return f"{value:.1%}"
        case "bytes":
            return f"{value / 2**20:.0f} MiB"
    return f"{value:.3g}" if value % 1 else f"{value:.0f}"


def colour(value: float, panel: dict[str, Any]) -> str:
    defaults = panel["fieldConfig"]["defaults"]
    steps = defaults.get("thresholds", {}).get("steps", [])
    return COLOURS[next((s["color"] for s in reversed(steps) if s["value"] is None or value >= s["value"]), "text")]


def stat(axes: Axes, panel: dict[str, Any], rows: Sequence[Row]) -> None:
    axes.axis("off")
    names = panel["options"]["textMode"]
    for i, (name, points) in enumerate(rows):
        value = points[-1][1]
        text = (
            name if names == "name" else format_value(value, panel) + (f"\n{name}" if names == "value_and_name" else "")
        )
        x = (i + 0.5) / len(rows)
        axes.text(
            x, 0.45, text, ha="center", va="center", fontsize=9 if names != "value" else 15, color=colour(value, panel)
        )


def bargauge(axes: Axes, panel: dict[str, Any], rows: Sequence[Row]) -> None:
    values = [points[-1][1] for _, points in rows]
    positions = range(len(rows))
    axes.barh(positions, values, color=[colour(v, panel) for v in values], height=0.6)
    axes.set_yticks(positions, [name for name, _ in rows], fontsize=7)
    axes.invert_yaxis()
    for position, value in zip(positions, values, strict=True):
        axes.text(max(value, 0), position, f" {format_value(value, panel)}", va="center", fontsize=7)
    defaults = panel["fieldConfig"]["defaults"]
    axes.set_xlim(defaults.get("min"), defaults.get("max"))
    axes.tick_params(axis="x", labelsize=6)
    axes.margins(x=0.25)


def timeseries(axes: Axes, panel: dict[str, Any], rows: Sequence[Row]) -> None:
    now = time.time()
    for name, points in rows:
        dashed = name.endswith((", low", ", high"))
        x = [(time_ - now) / 60 for time_, _ in points]
        axes.step(
            x, [v for _, v in points], where="post", label=name, lw=0.8 if dashed else 1.5, ls="--" if dashed else "-"
        )
    defaults = panel["fieldConfig"]["defaults"]
    axes.set_ylim(defaults.get("min"), defaults.get("max"))
    axes.set_xlabel("minutes", fontsize=6)
    axes.tick_params(labelsize=6)
    axes.legend(fontsize=5, loc="upper left", ncols=2)


RENDERERS = {"stat": stat, "bargauge": bargauge, "timeseries": timeseries}


def render(address: str, path: Path, hours: float = 1.0) -> dict[str, int]:
    """Render the dashboard into an image file; the number of series per panel title."""
    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    height = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)
    figure = plt.figure(figsize=(24 * CELL[0], height * CELL[1]), dpi=110)
    series_counts = {}
    for panel in panels:
        position = panel["gridPos"]
        top = 1 - position["y"] / height
        if panel["type"] == "row":
            figure.text(0.01, top - 0.6 / height, panel["title"], fontsize=12, weight="bold")
            continue
        pad = (0.35 * max(len(panel["title"]), 14) / 60, 1.1 / height)
        box = ((position["x"] + 0.1) / 24, top - position["h"] / height, position["w"] / 24, position["h"] / height)
        left = 0.3 * box[2] if panel["type"] == "bargauge" else 0.1 * box[2]
        axes = figure.add_axes((box[0] + left, box[1] + 0.7 * pad[1], box[2] - left - 0.012, box[3] - 1.9 * pad[1]))
        figure.text(box[0], top - 0.75 / height, panel["title"], fontsize=8, color="#666666")
        rows = [row for target in panel["targets"] for row in query(address, target, hours)]
        series_counts[panel["title"]] = len(rows)
        if rows:
            RENDERERS[panel["type"]](axes, panel, rows)
        else:
            axes.axis("off")
            placeholder = panel["fieldConfig"]["defaults"].get("noValue", "no data")
            axes.text(0.5, 0.45, placeholder, ha="center", va="center", fontsize=9, color="#999999")
    figure.savefig(path, facecolor="white")
    plt.close(figure)
    return series_counts


if __name__ == "__main__":
    for title, series in render(sys.argv[1].rstrip("/"), Path(sys.argv[2])).items():
        print(f"{series:>4}  {title}")
