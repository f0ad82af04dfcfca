"""Is this deployment as it has to be? One line for each thing, with what to do next. Changes nothing but for one small
file that it puts into each store and takes away again.
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

import yaml
from packaging.requirements import Requirement

from deleatur.config.settings import Settings
from deleatur.errors import DeleaturError
from deleatur.operations.http_clients import Answer, Scheduler, ask, basic
from deleatur.registry import ledger, mlflow_client, signing
from deleatur.registry.decisions import registry_of
from deleatur.registry.history import history
from deleatur.registry.mlflow_client import CHAMPION, LAST
from deleatur.registry.verify import keys, verify
from deleatur.storage import dvc_remote

State = Literal["ok", "warn", "fail"]
PREFIX = "deleatur: "
"""Of the names of our automations, see flows/setup.py."""
SLOW, WRONG = 5, 60
"""Seconds that a clock may differ before we say so, and before it is a fault. S3 refuses at 15 minutes."""
SHARE = 0.1
"""Of a disk that should be free."""
CLEAR = "python flows/housekeeping.py"
"""Says what could go. It keeps what versions need, which `dvc gc --workspace` by itself does not."""


@dataclass(frozen=True)
class Line:
    about: str
    state: State
    what: str
    next: str = ""


def ok(what: str) -> Line:
    return Line("", "ok", what)


def warn(what: str, next: str) -> Line:
    return Line("", "warn", what, next)


def fail(what: str, next: str) -> Line:
    return Line("", "fail", what, next)


def look(params: Path) -> Iterator[Line]:
    """What is wrong with one thing never hides another."""
    yield from _about("versions", _versions)
    try:
        settings = Settings.load(params)
    except DeleaturError as e:
        yield Line("settings", "fail", str(e), e.hint)
        return
    yield Line("settings", "ok", f"{params} validates; whether the rest of it fits: deleatur check")
    scheduler = Scheduler.named()
    for about, check in _checks(settings, scheduler).items():
        yield from _about(about, check)


def _checks(settings: Settings, scheduler: Scheduler | None) -> dict[str, Callable[[], Iterator[Line]]]:
    return {
        "registry": lambda: _registry(settings, scheduler),
        "results": lambda: _results(scheduler),
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


def _about(about: str, check: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    try:
        for line in check():
            yield Line(about, line.state, line.what, line.next)
    except DeleaturError as e:
        yield Line(about, "fail", str(e), e.hint)


def _versions() -> Iterator[Line]:
    yield ok(f"deleatur {version('deleatur')}, Python {sys.version.split()[0]}, torch {version('torch')}")
    wrong = 0
    for requirement in (Requirement(text) for text in requires("deleatur") or []):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "none"
        if found == "none" or not requirement.specifier.contains(found, prereleases=True):
            wrong += 1
            yield fail(f"{requirement} is wanted, and {found} is installed", "pip install -c constraints.txt deleatur")
    if not wrong:
        yield ok("every library is of a version that deleatur is made for")


def _registry(settings: Settings, scheduler: Scheduler | None) -> Iterator[Line]:
    registry = registry_of(settings)
    where = mlflow_client.GIVEN or registry.uri
    if where.startswith(("http://", "https://")):
        theirs, ours = str(_mlflow(where).said), version("mlflow")
        yield _same_version("MLflow", theirs, ours)
    elif scheduler and where.startswith("sqlite:"):
        yield warn(
            f"{where} is a file of this machine, and a Prefect server is in use", "export MLFLOW_TRACKING_URI=http://…"
        )
    if where.startswith("sqlite:") and not Path(where.removeprefix("sqlite:///")).is_file():
        yield ok(f"{where}: made by the first verdict")
        return
    count = len(registry.versions())
    yield ok(f"{where.rpartition('@')[2]} answers: {count} versions of {registry.model}")


def _results(scheduler: Scheduler | None) -> Iterator[Line]:
    """Where stages leave what they made, which is all that a run goes on from: no flow keeps results of its own."""
    store = dvc_remote.store(Path())
    if scheduler and "://" not in store:
        yield warn(
            f"the DVC remote {store} is a folder of this machine: other workers cannot reach it",
            "dvc remote add --default --force store s3://BUCKET/dvc",
        )
    yield from _round_trip(store, "the DVC remote")


def _round_trip(address: str, what: str) -> Iterator[Line]:
    import fsspec
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        options = {} if "://" in address else {"auto_mkdir": True}
        files, place = fsspec.core.url_to_fs(f"{address.rstrip('/')}/doctor-{os.getpid()}", **options)
        files.pipe_file(place, b"sound")
        try:
            back = files.cat_file(place)
        finally:
            files.rm_file(place)
    except (OSError, ValueError, ImportError, BotoCoreError, ClientError) as e:
        yield fail(f"{what}, {address}, does not do it: {e}", "check AWS_ENDPOINT_URL_S3, AWS_* and the bucket")
        return
    if back == b"sound":
        yield ok(f"{what}, {address}, takes, gives back and removes")
    else:
        yield fail(f"{what}, {address}, gives back something else than was put there", "look at its log")


def _scheduler(scheduler: Scheduler | None) -> Iterator[Line]:
    if scheduler is None:
        yield warn("PREFECT_API_URL names no server: nothing runs by itself", "export PREFECT_API_URL=http://…/api")
        return
    yield _same_version("Prefect", str(scheduler.greeting.said), version("prefect"))
    ours = {name: on for name, on in scheduler.automations().items() if name.startswith(PREFIX)}
    if not ours:
        yield fail("no automation of ours is there: runs that die are never noticed", "python flows/setup.py")
    elif off := [name for name, on in ours.items() if not on]:
        yield warn(f"switched off: {', '.join(off)}", "python flows/setup.py")
    else:
        yield ok(f"{len(ours)} automations look after runs that die")


def _pools(scheduler: Scheduler | None) -> Iterator[Line]:
    wanted = dict.fromkeys(d["work_pool"]["name"] for d in _deployments() if d.get("work_pool"))
    if scheduler is None or not wanted:
        return
    known = scheduler.pools()
    for name in wanted:
        if name not in known:
            yield fail(f"the server has no work pool {name}", "python flows/setup.py")
        elif known[name]["is_paused"]:
            yield warn(f"{name} is paused", f"prefect work-pool resume {name}")
        elif not (there := scheduler.workers(name)):
            yield fail(f"{name} has no worker", f"prefect worker start --pool {name}")
        else:
            yield ok(f"{name}: {len(there)} worker{'s' * (len(there) > 1)}")
    if "gpu" in wanted and not scheduler.slots():
        yield warn("no limit counts the slots of a GPU: two stages may meet on one", "python flows/setup.py")


def _schedules(scheduler: Scheduler | None) -> Iterator[Line]:
    if scheduler is None:
        return
    known, wanted = scheduler.deployments(), {(d["entrypoint"], d["name"]): d for d in _deployments()}
    there = {key: known[key] for key in wanted if key in known}
    if missing := [name for _, name in wanted.keys() - there.keys()]:
        yield fail(f"not deployed: {', '.join(sorted(missing))}", "prefect --no-prompt deploy --all")
    if paused := [name for (_, name), found in there.items() if found["paused"]]:
        yield warn(f"paused: {', '.join(paused)}", "resume them on their pages in Prefect")
    active = 0
    for key, found in there.items():
        on = {s["schedule"].get("cron") for s in found["schedules"] if s["active"]}
        active += len(on)
        if off := {s.get("cron") for s in wanted[key].get("schedules", [])} - on:
            yield warn(f"{key[1]}: the schedule {', '.join(map(str, off))} is off", "prefect --no-prompt deploy --all")
    yield ok(f"{len(there)} deployments, {active} schedules")
    if late := scheduler.runs("Late"):
        yield warn(f"{late} runs are late: no worker has taken them", "prefect flow-run ls --state LATE")


def _deployments() -> list[dict[str, Any]]:
    path = Path("prefect.yaml")
    if not path.is_file():
        return []
    return list(yaml.safe_load(path.read_text("utf-8")).get("deployments") or [])


def _aliases(settings: Settings) -> Iterator[Line]:
    known = ledger.read(settings.register_.ledger)
    if not known.entries and not known.problem:
        yield ok("nothing was decided yet")
        return
    found = history(settings)
    for problem in found.problems:
        yield fail(str(problem), problem.hint)
    if not found.problems:
        yield ok(found.standing)
        live = known.aliases.get(CHAMPION)
        yield ok(f"version {live} is live") if live else warn("nothing is live", "deleatur history")
        if live and (why := registry_of(settings).tags(live).get("emergency")):
            yield warn(f"version {live} was released in an emergency: {why}", "deleatur demo (the chain replaces it)")


def _signatures(settings: Settings) -> Iterator[Line]:
    if not keys(settings).trusted:
        yield warn("register.trusted_keys is empty: whoever can write to the store can exchange a model", signing.MAKE)
    known = ledger.read(settings.register_.ledger)
    for alias in (CHAMPION, LAST):
        if found := known.aliases.get(alias):
            statement = verify(settings, found, known.entries, fetch=False)
            yield ok(
                f"{alias}, version {found}: {'signed' if statement and statement.signed else 'unsigned'}, as registered"
            )


def _policy(settings: Settings, scheduler: Scheduler | None) -> Iterator[Line]:
    if settings.register_.approval:
        yield ok("a person approves what goes live")
    elif scheduler:
        yield warn("a pass goes live and nobody is asked", "register.approval: true in params.yaml")


def _disk(settings: Settings) -> Iterator[Line]:
    base = Path(settings.base.model)
    model = sum(f.stat().st_size for f in base.rglob("*") if f.is_file()) if base.is_dir() else 0
    for what, place in (("workspace", Path()), ("temporary files", Path(tempfile.gettempdir()))):
        found = shutil.disk_usage(place)
        free = f"{what}: {found.free / 2**30:.1f} GiB free of {found.total / 2**30:.1f}"
        if found.free < 2 * model:
            yield fail(f"{free}; a release needs twice the model, {2 * model / 2**30:.1f} GiB", CLEAR)
        elif found.free < SHARE * found.total:
            yield warn(free, CLEAR)
        else:
            yield ok(free)


def _clock(settings: Settings, scheduler: Scheduler | None) -> Iterator[Line]:
    where = mlflow_client.GIVEN or settings.register_.tracking_uri
    asked: dict[str, Callable[[], Answer]] = {}
    if where.startswith(("http://", "https://")):
        asked["MLflow"] = lambda: _mlflow(where)
    if scheduler:
        asked["Prefect"] = lambda: scheduler.greeting
    for name, greeting in asked.items():
        if clock := greeting().clock:
            off = abs((datetime.now(UTC) - clock).total_seconds())
            said = f"{off:.0f} s off the clock of {name}"
            yield (
                ok(said)
                if off <= SLOW
                else (warn if off <= WRONG else fail)(said, "on the host, not in a container: timedatectl set-ntp true")
            )


def _credentials() -> Iterator[Line]:
    """Those that were taken have been taken above."""
    for path in (Path("infra/.env"), Path(os.environ.get(signing.KEY) or "none")):
        if path.is_file() and path.stat().st_mode & 0o077:
            yield warn(f"{path} can be read by others on this machine", f"chmod 600 {path}")
    for name in ("PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY"):
        if name in os.environ and not os.environ[name]:
            yield warn(f"{name} is set and empty", f"unset {name}")
    yield ok("none lies where it should not")


def _mlflow(url: str) -> Answer:
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{what}", "") for what in ("USERNAME", "PASSWORD"))
    wanted = "MLFLOW_TRACKING_USERNAME=… MLFLOW_TRACKING_PASSWORD=…"
    return ask(f"{url.rstrip('/')}/version", basic(f"{user}:{password}") if user else "", credentials=wanted)


def _same_version(what: str, theirs: str, ours: str) -> Line:
    if theirs.split(".")[:2] == ours.split(".")[:2]:
        return ok(f"{what} {theirs} answers")
    return warn(f"the {what} server is {theirs}, and here is {ours}", "build infra/Dockerfile anew, both of its images")
