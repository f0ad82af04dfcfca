"""Diagnoses a deployment: one line per finding, with the next command. Changes nothing, apart from a small file that
it writes to the DVC remote and removes.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import httpx
from packaging.requirements import Requirement

from deleatur.config.settings import Settings
from deleatur.errors import DeleaturError
from deleatur.operations.http_clients import PrefectClient, Response, request
from deleatur.redaction import redact
from deleatur.registry import mlflow_client, signing
from deleatur.registry.decisions import checked_ledger, open_registry
from deleatur.registry.history import history
from deleatur.registry.mlflow_registry import CHAMPION, LAST_KNOWN_GOOD
from deleatur.registry.verify import signing_keys, verify
from deleatur.storage import dvc_remote
from deleatur.storage.yaml_files import read_yaml

Status = Literal["ok", "warn", "fail"]
AUTOMATION_PREFIX = "deleatur: "
"""Prefix of the names of the automations that flows/setup.py creates."""
CLOCK_WARN_SECONDS, CLOCK_FAIL_SECONDS = 5, 60
"""Clock skew that is a warning, and that is a failure. S3 refuses requests from 15 minutes on."""
MIN_FREE_SHARE = 0.1
"""Free share of a disk below which it is a warning."""
FREE_SPACE_COMMAND = "python flows/housekeeping.py"
"""Lists what can be deleted. Unlike a bare `dvc gc --workspace`, it keeps what registered versions need."""


TEST_CONTENT = b"deleatur doctor"
"""Content of the file that is written to the DVC remote."""


@dataclass(frozen=True)
class Diagnosis:
    """The result of one check, and the command that helps if it is not ok."""

    topic: str
    status: Status
    message: str
    next_command: str = ""


def ok(message: str) -> Diagnosis:
    return Diagnosis("", "ok", redact(message))


def warn(message: str, next_command: str) -> Diagnosis:
    return Diagnosis("", "warn", redact(message), next_command)


def fail(message: str, next_command: str) -> Diagnosis:
    return Diagnosis("", "fail", redact(message), next_command)


def diagnose(params: Path) -> Iterator[Diagnosis]:
    """Runs every check; a failing one does not keep the others from running."""
    yield from _run_check("versions", _versions)
    try:
        settings = Settings.load(params)
    except DeleaturError as e:
        yield Diagnosis("settings", "fail", str(e), e.hint)
        return
    yield Diagnosis("settings", "ok", f"{params} validates; for its methods and files: deleatur check")
    scheduler = PrefectClient.from_environment()
    for topic, check in _checks_by_topic(settings, scheduler).items():
        yield from _run_check(topic, check)


def _checks_by_topic(
    settings: Settings, scheduler: PrefectClient | None
) -> dict[str, Callable[[], Iterator[Diagnosis]]]:
    return {
        "registry": lambda: _registry(settings, scheduler),
        "results": lambda: _dvc_remote(scheduler),
        "scheduler": lambda: _scheduler(scheduler),
        "pools": lambda: _pools(scheduler),
        "schedules": lambda: _schedules(scheduler),
        "aliases": lambda: _aliases(settings),
        "signatures": lambda: _signatures(settings),
        "policy": lambda: _policy(settings, scheduler),
        "disk": lambda: _disk(settings),
        "clock": lambda: _clock(settings, scheduler),
        "credentials": _credentials,
    }


def _run_check(topic: str, check: Callable[[], Iterator[Diagnosis]]) -> Iterator[Diagnosis]:
    try:
        for line in check():
            yield Diagnosis(topic, line.status, line.message, line.next_command)
    except DeleaturError as e:
        yield Diagnosis(topic, "fail", str(e), e.hint)
    except OSError as e:
        yield Diagnosis(topic, "fail", redact(str(e)), f"ls -ld {e.filename or '.'}")


def _versions() -> Iterator[Diagnosis]:
    yield ok(f"deleatur {version('deleatur')}, Python {sys.version.split()[0]}, torch {version('torch')}")
    mismatches = 0
    for requirement in (Requirement(text) for text in requires("deleatur") or []):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = "none"
        if installed == "none" or not requirement.specifier.contains(installed, prereleases=True):
            mismatches += 1
            yield fail(f"expected {requirement}, {installed} is installed", "pip install -c constraints.txt deleatur")
    if not mismatches:
        yield ok("all required libraries have supported versions")


def _registry(settings: Settings, scheduler: PrefectClient | None) -> Iterator[Diagnosis]:
    registry = open_registry(settings)
    uri = mlflow_client.ENVIRONMENT_URI or registry.uri
    if uri.startswith(("http://", "https://")):
        server, client = str(_mlflow(uri).body), version("mlflow")
        yield _same_version("MLflow", server, client)
    elif scheduler and uri.startswith("sqlite:"):
        yield warn(
            f"{uri} is a local file, which the workers of the Prefect server cannot reach",
            "export MLFLOW_TRACKING_URI=http://…",
        )
    if uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).is_file():
        yield ok(f"{uri}: the first verdict creates it")
        return
    count = len(registry.versions())
    yield ok(f"{uri.rpartition('@')[2]} responds: {count} versions of {registry.model}")


def _dvc_remote(scheduler: PrefectClient | None) -> Iterator[Diagnosis]:
    """The store of stage outputs, which is all that a run resumes from: flows keep no results of their own."""
    store = dvc_remote.remote_url(Path())
    if scheduler and "://" not in store:
        yield warn(
            f"the DVC remote {store} is a local folder, which workers on other machines cannot reach",
            "dvc remote add --default --force store s3://BUCKET/dvc",
        )
    yield from _round_trip(store, "the DVC remote")


def _round_trip(address: str, name: str) -> Iterator[Diagnosis]:
    import fsspec
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        options = {} if "://" in address else {"auto_mkdir": True}
        files, path = fsspec.core.url_to_fs(f"{address.rstrip('/')}/doctor-{os.getpid()}", **options)
        files.pipe_file(path, TEST_CONTENT)
        try:
            content = files.cat_file(path)
        finally:
            files.rm_file(path)
    except (OSError, ValueError, ImportError, BotoCoreError, ClientError) as e:
        yield fail(f"{name}, {address}, is not usable: {e}", "check AWS_ENDPOINT_URL_S3, AWS_* and the bucket")
        return
    if content == TEST_CONTENT:
        yield ok(f"{name}, {address}: writes, reads and deletes work")
    else:
        yield fail(f"{name}, {address}, returns another content than was written", "check the store's log")


def _scheduler(scheduler: PrefectClient | None) -> Iterator[Diagnosis]:
    if scheduler is None:
        yield warn("PREFECT_API_URL is not set: nothing runs on a schedule", "export PREFECT_API_URL=http://…/api")
        return
    yield _same_version("Prefect", str(scheduler.version.body), version("prefect"))
    ours = {name: on for name, on in scheduler.automations().items() if name.startswith(AUTOMATION_PREFIX)}
    if not ours:
        yield fail("the automations that notice crashed runs are missing", "python flows/setup.py")
    elif disabled := [name for name, enabled in ours.items() if not enabled]:
        yield warn(f"disabled: {', '.join(disabled)}", "python flows/setup.py")
    else:
        yield ok(f"{len(ours)} automations watch for crashed runs")


def _pools(scheduler: PrefectClient | None) -> Iterator[Diagnosis]:
    expected = dict.fromkeys(d["work_pool"]["name"] for d in _deployments() if d.get("work_pool"))
    if scheduler is None or not expected:
        return
    pools = scheduler.pools()
    for name in expected:
        if name not in pools:
            yield fail(f"the server has no work pool {name}", "python flows/setup.py")
        elif pools[name]["is_paused"]:
            yield warn(f"{name} is paused", f"prefect work-pool resume {name}")
        elif not (workers := scheduler.workers(name)):
            yield fail(f"{name} has no worker", f"prefect worker start --pool {name}")
        else:
            yield ok(f"{name}: {len(workers)} worker{'s' * (len(workers) > 1)}")
    if "gpu" in expected and not scheduler.concurrency_limits():
        yield warn("no concurrency limit for GPUs: two stages may share one", "python flows/setup.py")


def _schedules(scheduler: PrefectClient | None) -> Iterator[Diagnosis]:
    if scheduler is None:
        return
    deployments, expected = scheduler.deployments(), {(d["entrypoint"], d["name"]): d for d in _deployments()}
    deployed = {key: deployments[key] for key in expected if key in deployments}
    if missing := [name for _, name in expected.keys() - deployed.keys()]:
        yield fail(f"not deployed: {', '.join(sorted(missing))}", "prefect --no-prompt deploy --all")
    if paused := [name for (_, name), deployment in deployed.items() if deployment["paused"]]:
        yield warn(f"paused: {', '.join(paused)}", "resume them on their pages in Prefect")
    active = 0
    for key, deployment in deployed.items():
        enabled = {s["schedule"].get("cron") for s in deployment["schedules"] if s["active"]}
        active += len(enabled)
        if disabled := {s.get("cron") for s in expected[key].get("schedules", [])} - enabled:
            crons = ", ".join(map(str, disabled))
            yield warn(f"{key[1]}: the schedule {crons} is disabled", "prefect --no-prompt deploy --all")
    yield ok(f"{len(deployed)} deployments, {active} schedules")
    if late := scheduler.count_runs("Late"):
        yield warn(f"{late} runs are late: no worker has started them", "prefect flow-run ls --state LATE")


def _deployments() -> list[dict[str, Any]]:
    path = Path("prefect.yaml")
    if not path.is_file():
        return []
    deployments = read_yaml(path).get("deployments") or []
    return list(deployments)


def _aliases(settings: Settings) -> Iterator[Diagnosis]:
    report = history(settings)
    if not report.entries and not report.problems:
        yield ok("the ledger has no decisions yet")
        return
    for problem in report.problems:
        yield fail(str(problem), problem.hint)
    if not report.problems:
        yield ok(report.summary)
        champion = report.entries[-1].aliases.get(CHAMPION)
        yield ok(f"version {champion} is champion") if champion else warn("there is no champion", "deleatur history")
        if champion and (reason := open_registry(settings).tags(champion).get("emergency")):
            yield warn(
                f"version {champion} was released in an emergency: {reason}", "deleatur demo (the chain replaces it)"
            )


def _signatures(settings: Settings) -> Iterator[Diagnosis]:
    if not signing_keys(settings).trusted:
        yield warn(
            "register.trusted_keys is empty: anyone with write access to the store can replace a model",
            signing.MAKE_KEY_COMMAND,
        )
    decisions = checked_ledger(settings)
    for alias in (CHAMPION, LAST_KNOWN_GOOD):
        if number := decisions.aliases.get(alias):
            statement = verify(settings, number, decisions.entries, fetch=False)
            signed = "signed" if statement and statement.signed else "unsigned"
            yield ok(f"{alias}, version {number}: files as registered, {signed}")


def _policy(settings: Settings, scheduler: PrefectClient | None) -> Iterator[Diagnosis]:
    if settings.register_.approval:
        yield ok("a person approves each release")
    elif scheduler:
        yield warn("a passing version becomes champion without approval", "register.approval: true in params.yaml")


def _disk(settings: Settings) -> Iterator[Diagnosis]:
    base = Path(settings.base.model)
    model_bytes = sum(f.stat().st_size for f in base.rglob("*") if f.is_file()) if base.is_dir() else 0
    for name, path in (("workspace", Path()), ("temporary files", Path(tempfile.gettempdir()))):
        usage = shutil.disk_usage(path)
        free = f"{name}: {usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.1f}"
        if usage.free < 2 * model_bytes:
            yield fail(
                f"{free}; a release needs twice the model, {2 * model_bytes / 2**30:.1f} GiB", FREE_SPACE_COMMAND
            )
        elif usage.free < MIN_FREE_SHARE * usage.total:
            yield warn(free, FREE_SPACE_COMMAND)
        else:
            yield ok(free)


def _clock(settings: Settings, scheduler: PrefectClient | None) -> Iterator[Diagnosis]:
    uri = mlflow_client.ENVIRONMENT_URI or settings.register_.tracking_uri
    servers: dict[str, Callable[[], Response]] = {}
    if uri.startswith(("http://", "https://")):
        servers["MLflow"] = lambda: _mlflow(uri)
    if scheduler:
        servers["Prefect"] = lambda: scheduler.version
    for name, version_of in servers.items():
        if clock := version_of().clock:
            seconds = abs((datetime.now(UTC) - clock).total_seconds())
            message = f"{seconds:.0f} s off the clock of {name}"
            if seconds <= CLOCK_WARN_SECONDS:
                yield ok(message)
            else:
                severity = warn if seconds <= CLOCK_FAIL_SECONDS else fail
                yield severity(message, "on the host, not in a container: timedatectl set-ntp true")


def _credentials() -> Iterator[Diagnosis]:
    """Whether secrets are readable by others or empty; that they are accepted, the other checks have shown."""
    for path in (Path("infra/.env"), Path(os.environ.get(signing.KEY_VARIABLE) or "none")):
        if path.is_file() and path.stat().st_mode & 0o077:
            yield warn(f"{path} is readable by other users of this machine", f"chmod 600 {path}")
    for name in ("PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY"):
        if name in os.environ and not os.environ[name]:
            yield warn(f"{name} is set and empty", f"unset {name}")
    yield ok("none is readable by other users")


def _mlflow(url: str) -> Response:
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{what}", "") for what in ("USERNAME", "PASSWORD"))
    auth = httpx.BasicAuth(user, password) if user else None
    credentials = "MLFLOW_TRACKING_USERNAME=… MLFLOW_TRACKING_PASSWORD=…"
    return request(f"{url.rstrip('/')}/version", auth=auth, credentials=credentials)


def _same_version(name: str, server: str, client: str) -> Diagnosis:
    if server.split(".")[:2] == client.split(".")[:2]:
        return ok(f"{name} {server} responds")
    return warn(f"the {name} server is {server}, this client {client}", "rebuild both images of infra/Dockerfile")
