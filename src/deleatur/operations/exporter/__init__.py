"""What Prometheus asks for: ledger, registry, evidence, feedback and journal as series, read anew at every scrape.

Nothing is pushed and nothing remembered, so a series says what is so, also after a restart. What cannot be read is a
series too: `deleatur_readable` is 0 for it, its own series are gone, and all others stay.
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
from deleatur.operations.exporter import evidence, machines, people, released
from deleatur.operations.exporter.series import gauge

SOURCES: dict[str, Callable[[Settings], Iterator[Metric]]] = {
    "ledger": released.decided,
    "registry": released.registered,
    "signatures": released.signed,
    "report": evidence.measured,
    "verdict": evidence.judged,
    "canary": evidence.watched,
    "sources": people.said,
    "feedback": people.ingested,
    "waiting": people.answered,
    "journal": machines.ran,
    "disk": machines.disk,
}

PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
"""A scrape that waits longer for the registry than Prometheus waits for the scrape says nothing at all."""


class Exporter(Collector):
    def __init__(self, params: Path) -> None:
        self._params = params
        self._said: dict[str, str] = {}

    def collect(self) -> Iterator[Metric]:
        readable: dict[tuple[str, ...], float] = {}
        try:
            settings = Settings.load(self._params)
        except DeleaturError as e:
            self._say("settings", e)
            readable["settings",] = 0.0
        else:
            readable["settings",] = 1.0
            for name, read in SOURCES.items():
                found, problem = self._read(read, settings)
                self._say(name, problem)
                readable[name,] = float(problem is None)
                yield from found
        yield gauge("readable", "0: this could not be read.", readable, "source")

    def _read(
        self, read: Callable[[Settings], Iterator[Metric]], settings: Settings
    ) -> tuple[list[Metric], Exception | None]:
        try:
            return list(read(settings)), None
        except Exception as e:  # whatever lies on the disk, the other series are worth having
            return [], e

    def _say(self, name: str, problem: Exception | None) -> None:
        """What is wrong, into the log, once; of an error that is not ours its kind alone: it could quote a prompt."""
        text = "" if problem is None else str(problem) if isinstance(problem, DeleaturError) else type(problem).__name__
        if text and text != self._said.get(name):
            print(f"{name} cannot be read: {text}", file=sys.stderr, flush=True)
        self._said[name] = text


def serve(params: Path, host: str, port: int, on_start: Callable[[int], None]) -> None:
    """Answers until it is asked to stop. on_start is told the port, which is a free one where 0 was asked for."""
    os.environ |= PATIENCE
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    registry = CollectorRegistry()
    registry.register(Exporter(params))
    server, _ = start_http_server(port, host, registry)
    on_start(server.server_port)
    ended.wait()
    server.shutdown()
    server.server_close()
