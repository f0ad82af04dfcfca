"""A real Prometheus scrapes a real exporter of a finished project, and every panel has data."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import finished
import httpx
import pytest
from programs import INFRA, program
from prometheus_client import CollectorRegistry, start_http_server
from test_monitoring import PROMTOOL, alerts, dashboard

from deleatur.operations import canary
from deleatur.operations.exporter import Exporter
from deleatur.runtime import event_log
from deleatur.stages import register
from deleatur.storage import dvc

sys.path.insert(0, str(INFRA / "grafana"))
import render

pytestmark = pytest.mark.slow

EMPTY_PANELS = {
    "MLflow: requests": "there is no MLflow server",
    "Memory of the servers": "there is no Prefect server, and Prometheus does not scrape itself",
    "Awaits approval": "no version awaits approval",
    "Last known good": "there was one release",
    "Oldest pending report": "no report is pending",
    "Running for": "no stage runs",
}
"""Panels without data, and why."""


@pytest.fixture(scope="module")
def exporter(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    root = tmp_path_factory.mktemp("watched")
    settings = finished.copy(shared, root)
    with pytest.MonkeyPatch.context() as patch, chdir(root):
        patch.setattr(dvc, "status", lambda root: {})
        register.run(settings)
        canary.run(settings, dry_run=True)
        event_log.append(settings.paths.checkpoints, "erase", "resumed", lost=3)
        collectors = CollectorRegistry()
        collectors.register(Exporter(Path("params.yaml")))
        server, _ = start_http_server(0, "127.0.0.1", collectors)
        yield server.server_port
        server.shutdown()
        server.server_close()


@contextmanager
def prometheus(folder: Path, target: int) -> Iterator[str]:
    """Address of a Prometheus that scrapes the exporter."""
    rules = INFRA / "prometheus/alerts.yml"
    scraped = [{"job_name": "deleatur", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}]
    config = {
        "global": {"scrape_interval": "4s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": scraped,
    }
    (folder / "prometheus.yml").write_text(json.dumps(config), "utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        program("prometheus", PROMTOOL),
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or query(address, "deleatur_readable"), "a first scrape")
        assert process.poll() is None, (folder / "log").read_text("utf-8")
        yield address
    finally:
        process.terminate()
        process.wait(60)


def wait_until(condition: Callable[[], object], description: str) -> None:
    """Wait for a condition, however slow the machine; the limit only ends a test that would wait for ever."""
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline, description
        time.sleep(0.2)


def query(address: str, expr: str) -> list[dict[str, Any]]:
    try:
        response = httpx.get(f"{address}/api/v1/query", params={"query": expr}, timeout=60)
        response.raise_for_status()
    except httpx.HTTPError:  # it is starting
        return []
    return list(response.json()["data"]["result"])


def empty_panels(address: str) -> set[str]:
    """Titles of the panels whose queries have no results; rates need several scrapes."""
    panels = [panel for panel in dashboard()["panels"] if panel.get("targets")]
    return {
        panel["title"]
        for panel in panels
        if not any(render.query(address, target, hours=0.1) for target in panel["targets"])
    }


def test_every_panel_has_data(exporter: int, tmp_path: Path) -> None:
    with prometheus(tmp_path, exporter) as address:
        wait_until(lambda: empty_panels(address) <= set(EMPTY_PANELS), "data in every panel")
        series_counts = render.render(address, tmp_path / "dashboard.png", hours=0.1)
    assert {title for title, series in series_counts.items() if not series} == set(EMPTY_PANELS)
    assert (tmp_path / "dashboard.png").stat().st_size > 100_000


def test_alert_rules_are_evaluated_and_the_right_ones_are_pending(exporter: int, tmp_path: Path) -> None:
    with prometheus(tmp_path, exporter) as address:
        pending = 'ALERTS{alertname="DeleaturSimulatedLive"}'  # the raters are simulated
        wait_until(lambda: query(address, pending), "a pending alert")
        names = {result["metric"]["alertname"] for result in query(address, "ALERTS")}
        groups = httpx.get(f"{address}/api/v1/rules", timeout=60).json()["data"]["groups"]
    rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert set(rules) == set(alerts())
    assert {name for name, rule in rules.items() if rule["health"] == "err"} == set()
    assert "DeleaturLedgerBroken" not in names
