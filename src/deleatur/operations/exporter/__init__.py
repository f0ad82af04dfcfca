"""Prometheus exporter: ledger, registry, results, feedback and event log as series, read from files at every scrape.

It keeps no state, so a restart changes nothing. For a source that cannot be read, `deleatur_readable` is 0 and its
series are absent; all others stay.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.registry import Collector

from deleatur.config.settings import Settings
from deleatur.errors import DeleaturError
from deleatur.operations.exporter import feedback, releases, results, runs
from deleatur.operations.exporter.series import gauge

SOURCES: dict[str, Callable[[Settings], Iterator[Metric]]] = {
    "ledger": releases.ledger_metrics,
    "registry": releases.registry_metrics,
    "signatures": releases.signature_metrics,
    "report": results.report_metrics,
    "verdict": results.verdict_metrics,
    "canary": results.canary_metrics,
    "sources": feedback.source_metrics,
    "feedback": feedback.ingest_metrics,
    "pending_reports": feedback.waiting_metrics,
    "event_log": runs.stage_metrics,
    "disk": runs.disk_metrics,
}

MLFLOW_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
"""A scrape that waits for the registry longer than Prometheus waits for the scrape would be lost as a whole."""


class Exporter(Collector):
    """Collects the series of all SOURCES at every scrape."""

    def __init__(self, params: Path) -> None:
        self._params = params
        self._logged: dict[str, str] = {}

    def collect(self) -> Iterator[Metric]:
        readable: dict[tuple[str, ...], float] = {}
        try:
            settings = Settings.load(self._params)
        except DeleaturError as e:
            self._log("settings", e)
            readable["settings",] = 0.0
        else:
            readable["settings",] = 1.0
            for name, read in SOURCES.items():
                series, problem = self._read(read, settings)
                self._log(name, problem)
                readable[name,] = float(problem is None)
                yield from series
        yield gauge("readable", "0: this source cannot be read.", readable, "source")

    def _read(
        self, read: Callable[[Settings], Iterator[Metric]], settings: Settings
    ) -> tuple[list[Metric], Exception | None]:
        try:
            return list(read(settings)), None
        except Exception as e:  # whatever a file contains, the other series are served
            return [], e

    def _log(self, name: str, problem: Exception | None) -> None:
        """Logs a problem once; of exceptions other than ours only the type: their message could quote a prompt."""
        text = "" if problem is None else str(problem) if isinstance(problem, DeleaturError) else type(problem).__name__
        if text and text != self._logged.get(name):
            print(f"{name} cannot be read: {text}", file=sys.stderr, flush=True)
        self._logged[name] = text


def serve(params: Path, host: str, port: int, on_start: Callable[[int], None]) -> None:
    """Serves metrics until SIGTERM or SIGINT. Port 0 selects a free port; `on_start` receives the port in use."""
    os.environ |= MLFLOW_TIMEOUTS
    stop = threading.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, lambda *_: stop.set())
    registry = CollectorRegistry()
    registry.register(Exporter(params))
    server, _ = start_http_server(port, host, registry)
    on_start(server.server_port)
    stop.wait()
    server.shutdown()
    server.server_close()
