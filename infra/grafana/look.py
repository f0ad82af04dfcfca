"""The board without Grafana: the same panels and queries, asked of a Prometheus, drawn into one picture.

python infra/grafana/look.py http://127.0.0.1:9090 board.png

It is no Grafana: colours of thresholds, mappings and units are kept, hovering and zooming are not. What a query has no
answer for says so.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

BOARD = Path(__file__).parent / "dashboards" / "deleatur.json"
CELL = (0.72, 0.34)
"""Inches of one cell of the board's grid."""
COLOURS = {"red": "#e02f44", "orange": "#ff9830", "green": "#299c46", "blue": "#3274d9", "text": "#444444"}
DAY = 86400

Row = tuple[str, list[tuple[float, float]]]
"""Legend and points (time, value)."""


def ask(address: str, target: dict[str, Any], hours: float) -> list[Row]:
    """What Prometheus says to a query of the board: the newest value, or the last hours."""
    now = time.time()
    given: dict[str, Any] = {"query": target["expr"]}
    if target.get("instant"):
        path = "query"
    else:
        path, step = "query_range", max(1, round(hours * 3600 / 200))
        given |= {"start": now - hours * 3600, "end": now, "step": step}
    with urlopen(f"{address}/api/v1/{path}?{urlencode(given)}", timeout=30) as answer:
        found = json.load(answer)["data"]["result"]
    return [(_legend(target["legendFormat"], r["metric"]), _points(r)) for r in found]


def _legend(wanted: str, labels: dict[str, str]) -> str:
    if wanted == "__auto":
        return ", ".join(v for k, v in labels.items() if k not in ("__name__", "instance", "job"))
    for name, value in labels.items():
        wanted = wanted.replace("{{" + name + "}}", value)
    return wanted


def _points(result: dict[str, Any]) -> list[tuple[float, float]]:
    values = result.get("values") or [result["value"]]
    return [(float(at), float(value)) for at, value in values]


def say(value: float, panel: dict[str, Any]) -> str:
    """A number as the panel says it."""
    own = panel["fieldConfig"]["defaults"]
    for mapping in own.get("mappings", []):
        if (key := f"{value:g}") in mapping["options"]:
            return str(mapping["options"][key]["text"])
    match own.get("unit"):
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
    own = panel["fieldConfig"]["defaults"]
    steps = own.get("thresholds", {}).get("steps", [])
    return COLOURS[next((s["color"] for s in reversed(steps) if s["value"] is None or value >= s["value"]), "text")]


def stat(axes: Axes, panel: dict[str, Any], rows: Sequence[Row]) -> None:
    axes.axis("off")
    names = panel["options"]["textMode"]
    for i, (name, points) in enumerate(rows):
        value = points[-1][1]
        text = name if names == "name" else say(value, panel) + (f"\n{name}" if names == "value_and_name" else "")
        x = (i + 0.5) / len(rows)
        axes.text(
            x, 0.45, text, ha="center", va="center", fontsize=9 if names != "value" else 15, color=colour(value, panel)
        )


def bargauge(axes: Axes, panel: dict[str, Any], rows: Sequence[Row]) -> None:
    values = [points[-1][1] for _, points in rows]
    places = range(len(rows))
    axes.barh(places, values, color=[colour(v, panel) for v in values], height=0.6)
    axes.set_yticks(places, [name for name, _ in rows], fontsize=7)
    axes.invert_yaxis()
    for place, value in zip(places, values, strict=True):
        axes.text(max(value, 0), place, f" {say(value, panel)}", va="center", fontsize=7)
    own = panel["fieldConfig"]["defaults"]
    axes.set_xlim(own.get("min"), own.get("max"))
    axes.tick_params(axis="x", labelsize=6)
    axes.margins(x=0.25)


def timeseries(axes: Axes, panel: dict[str, Any], rows: Sequence[Row]) -> None:
    now = time.time()
    for name, points in rows:
        dashed = name.endswith((", low", ", high"))
        x = [(at - now) / 60 for at, _ in points]
        axes.step(
            x, [v for _, v in points], where="post", label=name, lw=0.8 if dashed else 1.5, ls="--" if dashed else "-"
        )
    own = panel["fieldConfig"]["defaults"]
    axes.set_ylim(own.get("min"), own.get("max"))
    axes.set_xlabel("minutes", fontsize=6)
    axes.tick_params(labelsize=6)
    axes.legend(fontsize=5, loc="upper left", ncols=2)


DRAWN = {"stat": stat, "bargauge": bargauge, "timeseries": timeseries}


def draw(address: str, picture: Path, hours: float = 1.0) -> dict[str, int]:
    """Title of each panel → how many series it shows."""
    panels = json.loads(BOARD.read_text("utf-8"))["panels"]
    height = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)
    figure = plt.figure(figsize=(24 * CELL[0], height * CELL[1]), dpi=110)
    shown = {}
    for panel in panels:
        at = panel["gridPos"]
        top = 1 - at["y"] / height
        if panel["type"] == "row":
            figure.text(0.01, top - 0.6 / height, panel["title"], fontsize=12, weight="bold")
            continue
        pad = (0.35 * max(len(panel["title"]), 14) / 60, 1.1 / height)
        box = ((at["x"] + 0.1) / 24, top - at["h"] / height, at["w"] / 24, at["h"] / height)
        left = 0.3 * box[2] if panel["type"] == "bargauge" else 0.1 * box[2]
        axes = figure.add_axes((box[0] + left, box[1] + 0.7 * pad[1], box[2] - left - 0.012, box[3] - 1.9 * pad[1]))
        figure.text(box[0], top - 0.75 / height, panel["title"], fontsize=8, color="#666666")
        rows = [row for target in panel["targets"] for row in ask(address, target, hours)]
        shown[panel["title"]] = len(rows)
        if rows:
            DRAWN[panel["type"]](axes, panel, rows)
        else:
            axes.axis("off")
            nothing = panel["fieldConfig"]["defaults"].get("noValue", "no data")
            axes.text(0.5, 0.45, nothing, ha="center", va="center", fontsize=9, color="#999999")
    figure.savefig(picture, facecolor="white")
    plt.close(figure)
    return shown


if __name__ == "__main__":
    for title, series in draw(sys.argv[1].rstrip("/"), Path(sys.argv[2])).items():
        print(f"{series:>4}  {title}")
