"""What servers say of themselves, over HTTP: the package knows no scheduler, and asks one all the same how it is."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from deleatur.errors import ServiceError, SettingsError
from deleatur.storage.remote import without_password

PATIENCE = 10.0
"""Seconds until a server counts as one that does not answer."""


@dataclass(frozen=True)
class Answer:
    said: Any
    clock: datetime | None
    """What time it was there."""


def ask(
    address: str, authorization: str = "", body: Mapping[str, Any] | None = None, *, credentials: str = ""
) -> Answer:
    """A GET, or a POST of `body`. credentials: the environment variables that a server which refuses wants right.

    Raises ServiceError where nobody answers, SettingsError where the credentials are not taken.
    """
    shown = without_password(address)
    headers = {"Content-Type": "application/json"} | ({"Authorization": authorization} if authorization else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(address, data=data, headers=headers), timeout=PATIENCE) as answer:
            text, date = answer.read().decode(), answer.headers.get("Date")
    except HTTPError as e:
        if e.code in (401, 403):
            raise SettingsError(f"{shown} refuses the credentials ({e.code})", hint=f"export {credentials}") from e
        raise ServiceError(f"{shown} answers {e.code} {e.reason}", hint=f"curl {shown}") from e
    except (OSError, HTTPException, ValueError) as e:
        raise ServiceError(f"{shown} does not answer: {e}", hint=f"curl {shown}") from e
    try:
        said = json.loads(text)
    except ValueError:
        said = text.strip()
    return Answer(said, parsedate_to_datetime(date) if date else None)


def basic(user_and_password: str) -> str:
    return f"Basic {base64.b64encode(user_and_password.encode()).decode()}"


@dataclass(frozen=True)
class Scheduler:
    """A Prefect server, by its HTTP interface."""

    url: str
    """…/api"""
    authorization: str

    @classmethod
    def named(cls) -> Scheduler | None:
        """The one that the environment names."""
        if not (url := os.environ.get("PREFECT_API_URL")):
            return None
        if key := os.environ.get("PREFECT_API_KEY"):
            return cls(url.rstrip("/"), f"Bearer {key}")
        password = os.environ.get("PREFECT_API_AUTH_STRING", "")
        return cls(url.rstrip("/"), basic(password) if password else "")

    @cached_property
    def greeting(self) -> Answer:
        """Its version, and its clock."""
        return self._ask("admin/version")

    def pools(self) -> dict[str, dict[str, Any]]:
        return {pool["name"]: pool for pool in self._ask("work_pools/filter", {}).said}

    def workers(self, pool: str) -> list[str]:
        """Names of those that are there."""
        found = self._ask(f"work_pools/{pool}/workers/filter", {}).said
        return [worker["name"] for worker in found if worker["status"] == "ONLINE"]

    def deployments(self) -> dict[tuple[str, str], dict[str, Any]]:
        """By the flow's entrypoint and the name: deployments of other flows may have the same one."""
        return {(found["entrypoint"], found["name"]): found for found in self._ask("deployments/filter", {}).said}

    def slots(self) -> dict[str, int]:
        """Name → how many may hold one of it at a time; what Prefect counts for a deployment's own limit left out."""
        found = {limit["name"]: limit["limit"] for limit in self._ask("v2/concurrency_limits/filter", {}).said}
        return {name: limit for name, limit in found.items() if not name.startswith("deployment:")}

    def automations(self) -> dict[str, bool]:
        """Name → whether it is switched on."""
        return {a["name"]: bool(a["enabled"]) for a in self._ask("automations/filter", {}).said}

    def runs(self, state: str) -> int:
        """How many flow runs are in a state, by its name."""
        return int(self._ask("flow_runs/count", {"flow_runs": {"state": {"name": {"any_": [state]}}}}).said)

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Answer:
        return ask(f"{self.url}/{path}", self.authorization, body, credentials="PREFECT_API_AUTH_STRING=admin:PASSWORD")
