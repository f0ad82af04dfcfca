"""HTTP requests to the MLflow and Prefect servers. The package does not depend on Prefect: it uses its REST API."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any

import httpx

from deleatur.errors import ServiceError, SettingsError
from deleatur.redaction import redact

TIMEOUT_SECONDS = 10.0


class Bearer(httpx.Auth):
    """Authentication by a bearer token."""

    def __init__(self, token: str) -> None:
        self._header = f"Bearer {token}"

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response]:
        request.headers["Authorization"] = self._header
        yield request


@dataclass(frozen=True)
class Response:
    body: Any
    """Parsed JSON, or the text if it is not JSON."""
    clock: datetime | None
    """The server's time when it responded."""


def request(
    url: str, *, body: Mapping[str, Any] | None = None, auth: httpx.Auth | None = None, credentials: str = ""
) -> Response:
    """Sends a GET request or, with a body, a POST request with it as JSON.

    Raises ServiceError if the server does not respond, SettingsError if it refuses the credentials; `credentials` are
    the environment variables to set then, for the hint.
    """
    shown, method = redact(url), "GET" if body is None else "POST"
    try:
        response = httpx.request(method, url, json=body, auth=auth, timeout=TIMEOUT_SECONDS, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL) as e:
        raise ServiceError(f"{shown} does not respond: {e}", hint=f"curl {shown}") from e
    if response.status_code in (401, 403):
        raise SettingsError(f"{shown} refuses the credentials ({response.status_code})", hint=f"export {credentials}")
    if response.is_error:
        raise ServiceError(
            f"{shown} responds with {response.status_code} {response.reason_phrase}", hint=f"curl {shown}"
        )
    date = response.headers.get("Date")
    try:
        content = response.json()
    except ValueError:
        content = response.text.strip()
    return Response(content, parsedate_to_datetime(date) if date else None)


@dataclass(frozen=True)
class PrefectClient:
    """A Prefect server, through its REST API."""

    url: str
    """Ends with /api."""
    auth: httpx.Auth | None

    @classmethod
    def from_environment(cls) -> PrefectClient | None:
        """The server that Prefect's own environment variables name, if any."""
        if not (url := os.environ.get("PREFECT_API_URL")):
            return None
        key, credentials = (os.environ.get(f"PREFECT_API_{name}", "") for name in ("KEY", "AUTH_STRING"))
        return cls.with_credentials(url, key, credentials)

    @classmethod
    def with_credentials(cls, url: str, key: str, credentials: str) -> PrefectClient:
        """key: of Prefect Cloud; credentials: USER:PASSWORD of a server. Empty: none."""
        user, _, password = credentials.partition(":")
        basic = httpx.BasicAuth(user, password) if user else None
        return cls(url.rstrip("/"), Bearer(key) if key else basic)

    @cached_property
    def version(self) -> Response:
        return self._request("admin/version")

    def pools(self) -> dict[str, dict[str, Any]]:
        """Work pools by name."""
        return {pool["name"]: pool for pool in self._request("work_pools/filter", {}).body}

    def workers(self, pool: str) -> list[str]:
        """Names of a work pool's workers that are online."""
        workers = self._request(f"work_pools/{pool}/workers/filter", {}).body
        return [worker["name"] for worker in workers if worker["status"] == "ONLINE"]

    def deployments(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Deployments by their flow's entrypoint and their name: names are unique only within one flow."""
        return {(d["entrypoint"], d["name"]): d for d in self._request("deployments/filter", {}).body}

    def concurrency_limits(self) -> dict[str, int]:
        """Global concurrency limits by name, without those that Prefect creates for single deployments."""
        limits = {limit["name"]: limit["limit"] for limit in self._request("v2/concurrency_limits/filter", {}).body}
        return {name: limit for name, limit in limits.items() if not name.startswith("deployment:")}

    def automations(self) -> dict[str, bool]:
        """Automation name → whether it is enabled."""
        return {a["name"]: bool(a["enabled"]) for a in self._request("automations/filter", {}).body}

    def count_runs(self, state: str) -> int:
        """Number of flow runs in a state, by the state's name."""
        return int(self._request("flow_runs/count", {"flow_runs": {"state": {"name": {"any_": [state]}}}}).body)

    def _request(self, path: str, body: Mapping[str, Any] | None = None) -> Response:
        return request(
            f"{self.url}/{path}", body=body, auth=self.auth, credentials="PREFECT_API_AUTH_STRING=admin:PASSWORD"
        )
