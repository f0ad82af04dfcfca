"""Rehearses a day in production on one machine with real servers, in about twenty minutes:

    python infra/rehearsal.py FOLDER

Feedback arrives, a schedule starts the chain, the chain loses its workers three times, a person approves the version,
the canary finds a concept that is back and quarantines it, and a person rolls back another version. Concepts and
simulated raters are the built-in model's; everything else is as in production: PostgreSQL, an S3-compatible store,
MLflow with users, Prefect with a worker for the chain and two for stages, the exporter, and Prometheus with
Alertmanager if installed. Exits with 0 if everything happened as expected and nothing was lost. FOLDER keeps the logs,
the project and screenshots.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import yaml
from local import BUCKET, DEFAULT_PORTS, MissingProgram, Stack, free_ports
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from rich.console import Console

from deleatur.config.settings import merged
from deleatur.runtime import event_log

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "infra" / "grafana"))
PYTHON = sys.executable
TIMEOUT = 1800.0
"""Seconds that any single event may take."""
BOTH_CONCEPTS, ONE_CONCEPT = "weapon,ink", "weapon"

PARAMS_CHANGES: dict[str, Any] = {
    "register": {"approval": True},
    "feedback": {"inbox": f"s3://{BUCKET}/inbox", "min_new": 50},
    "workers": {"checkpoint_uri": f"s3://{BUCKET}/state", "checkpoint_interval": 2},
    "invert": {"hfi": {"num_tokens": 8}},
    "erase": {"sdd": {"training": {"iterations": 160, "eval_every": 80}}},
    "attack": {"methods": {"concept_inversion": {"num_attempts": 2, "training": {"iterations": 40}}}},
    "gate": {"rules": {"concept_is_gone": {"max": 0.5}, "token_is_gone": {"max": 0.7, "min_n": 8}}},
}
"""Changes of params.yaml: approval by a person, short stages, and a policy that these can pass."""


class RehearsalError(Exception):
    """An expected event did not happen, or something was lost."""


@dataclass
class NotificationSink:
    """A webhook that records the notifications and alerts that it receives."""

    messages: list[str] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)

    @contextmanager
    def listening(self) -> Iterator[str]:
        sink = self

        class Webhook(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                sink.messages += [body["text"]] if "text" in body else []
                sink.alerts += [a["labels"]["alertname"] for a in body.get("alerts", []) if a["status"] == "firing"]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Webhook)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class Worker:
    """A worker of a pool, in a folder that stands for a machine; it can be killed or evicted."""

    def __init__(self, pool: str, name: str, folder: Path, env: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name, log = name, folder.parent / f"{name}.log"
        command = [PYTHON, "-m", "prefect", "worker", "start", "--pool", pool, "--name", name, "--limit", "1"]
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                command, cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def children(self) -> list[psutil.Process]:
        """Its child processes: the flow runs."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).children()
        return []

    def lose_power(self) -> None:
        with suppress(psutil.NoSuchProcess):
            machine = psutil.Process(self._process.pid)
            for process in [machine, *machine.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait()

    def evict(self) -> None:
        """SIGTERM with a grace period, as Kubernetes and clouds do."""
        self._process.terminate()

    def kill_run(self) -> None:
        for process in self.children():
            process.send_signal(signal.SIGKILL)


@dataclass
class Rehearsal:
    folder: Path
    stack: Stack
    notifications: NotificationSink
    console: Console = field(default_factory=lambda: Console(highlight=False))
    started: float = field(default_factory=time.monotonic)
    workers: dict[str, Worker] = field(default_factory=dict)
    """Workers that have not been lost."""
    all_workers: list[Worker] = field(default_factory=list)
    timeline: list[tuple[str, str]] = field(default_factory=list)

    @property
    def project(self) -> Path:
        return self.folder / "project"

    @property
    def env(self) -> dict[str, str]:
        quick = {"PREFECT_WORKER_QUERY_SECONDS": "2", "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "1"}
        extra = {"PYTHONPATH": "src", "DO_NOT_TRACK": "true", "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "AWS_", "DELEATUR_"))}
        path = os.pathsep.join([str(Path(PYTHON).parent), clean.get("PATH", os.defpath)])
        return clean | {"PATH": path} | self.stack.client_environment | quick | extra

    def log(self, message: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        clock = datetime.now().strftime("%H:%M:%S")
        self.timeline.append((clock, message))
        self.console.print(f"[dim]{clock}  {minutes:>3}:{seconds:02}[/dim]  {message}")

    def run(self, *command: str, cwd: Path | None = None, codes: Sequence[int] = (0,)) -> str:
        with (self.folder / "commands.log").open("a") as log:
            done = subprocess.run(
                command, cwd=cwd or self.project, env=self.env, capture_output=True, text=True, check=False
            )
            log.write(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}\n[{done.returncode}]\n")
        if done.returncode not in codes:
            raise RehearsalError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def deleatur(self, *arguments: str, codes: Sequence[int] = (0,)) -> str:
        return self.run(PYTHON, "-m", "deleatur", *arguments, codes=codes)

    def prefect(self, *arguments: str) -> str:
        return self.run(PYTHON, "-m", "prefect", "--no-prompt", *arguments)

    def wait_until(self, condition: Callable[[], Any], description: str) -> Any:
        deadline = time.monotonic() + TIMEOUT
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise RehearsalError(f"{description}: not within {TIMEOUT:.0f} s")
            time.sleep(0.5)
        return value

    @property
    def client(self) -> SyncPrefectClient:
        return get_client(sync_client=True)

    def newest_run(self, flow: str) -> FlowRun | None:
        """The latest run of a flow that has started."""
        named = FlowFilter(name=FlowFilterName(any_=[flow]))
        with self.client as client:
            runs = client.read_flow_runs(flow_filter=named, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=20)
        return next((run for run in runs if run.start_time), None)

    def aliases(self) -> dict[str, str]:
        lines = json.loads(self.deleatur("history", "--json"))["lines"]
        return dict(lines[-1]["aliases"]) if lines else {}

    def start_worker(self, pool: str, name: str, folder: Path) -> None:
        self.all_workers.append(worker := Worker(pool, name, folder, self.env))
        self.workers[name] = worker

    def create_project(self) -> dict[str, bytes]:
        """Create a repository with half of the feedback; the files of the other half."""
        origin = self.folder / "origin.git"
        self.run("git", "clone", "--quiet", "--bare", str(ROOT), str(origin), cwd=self.folder)
        self.run("git", "clone", "--quiet", str(origin), str(self.project), cwd=self.folder)
        path = self.project / "params.yaml"
        params = merged(yaml.safe_load(path.read_text("utf-8")), PARAMS_CHANGES)
        path.write_text(yaml.safe_dump(params, sort_keys=False), "utf-8")
        answers = self.project / "feedback" / "weapon.jsonl"
        lines = answers.read_bytes().splitlines(keepends=True)
        answers.write_bytes(b"".join(lines[::2]))
        late = {"late.jsonl": b"".join(lines[1::2])}
        late["late.images.parquet"] = answers.with_suffix(".images.parquet").read_bytes()
        self.run("dvc", "remote", "add", "--default", "--force", "store", f"s3://{BUCKET}/dvc")
        identity = ("-c", "user.name=Ops", "-c", "user.email=ops@example.org")
        self.run("git", *identity, "commit", "--quiet", "--all", "--message", "Ours")
        self.run("git", "push", "--quiet")
        return late

    def prepare_servers(self, webhook: str) -> None:
        self.run(PYTHON, "flows/setup.py", "--gpu", "gpu:1", "--notify", webhook)
        self.prefect("deploy", "--all")
        self.prefect("deployment", "schedule", "clear", "feedback/sync", "--accept-yes")  # until the feedback is there
        self.start_worker("cpu", "workspace", self.project)
        for name in ("gpu-a", "gpu-b"):
            self.start_worker("gpu", name, self.folder / "machines" / name)

    def release_emergency(self, concepts: str, reason: str) -> str:
        """Release an emergency version with the approval of a second person; the version."""
        self.deleatur("emergency", concepts, "--as", "Ada", "--reason", reason)
        version = self.aliases()["challenger"]
        self.deleatur("approve", version, "--as", "Grace", "--reason", "I looked at the sheet")
        return version

    def upload_feedback(self, files: dict[str, bytes]) -> None:
        store = self.stack.s3_client()
        for name, content in reversed(files.items()):  # answers last, after their images
            store.put_object(Bucket=BUCKET, Key=f"inbox/{name}", Body=content)

    def has_checkpoint(self, stage: str) -> bool:
        """Whether a stage on a worker has uploaded something that another worker can resume from."""
        objects = self.stack.s3_client().list_objects_v2(Bucket=BUCKET, Prefix=f"state/{stage}-").get("Contents", [])
        return any(file["Key"].endswith((".safetensors", ".parquet")) for file in objects)

    def lose_worker(self, stage: str, cause: str) -> None:
        """Lose the worker that runs the stage, as soon as the stage has a checkpoint."""
        self.wait_until(lambda: self.has_checkpoint(stage), f"a checkpoint of {stage}")
        [busy] = [w for n, w in self.workers.items() if n.startswith("gpu") and w.children()]
        getattr(busy, cause)()
        self.log(f"{stage}: worker {busy.name} {cause.replace('_', ' ')}")
        if cause != "kill_run":
            del self.workers[busy.name]
            name = f"{busy.name}'"
            self.start_worker("gpu", name, self.folder / "machines" / name)

    def approve(self, run: FlowRun, approver: str) -> None:
        """Approve through the form of the suspended run."""
        form = {"approver": approver, "decision": "approve", "reason": "I looked at the sheet"}
        with self.client as client:
            client.resume_flow_run(run.id, run_input=form)


def rehearse(rehearsal: Rehearsal, webhook: str) -> None:
    late = rehearsal.create_project()
    rehearsal.prepare_servers(webhook)
    rehearsal.log("deployed: pools, limits, schedules, automations; one worker for the chain, two for stages")
    has_monitoring = start_monitoring(rehearsal)

    first = rehearsal.release_emergency(BOTH_CONCEPTS, "reported by many")
    rehearsal.log(f"emergency: {BOTH_CONCEPTS} erased in closed form, approved; version {first} is champion")
    second = release_by_chain(rehearsal, late, first)
    quarantine_by_canary(rehearsal, second, has_monitoring=has_monitoring)
    third = rehearsal.release_emergency(BOTH_CONCEPTS, "the canary's finding")
    rehearsal.log(f"emergency: version {third} is champion")
    started = time.monotonic()
    rehearsal.deleatur("rollback", "--as", "Grace", "--reason", "it spoils the background")
    seconds, champion = time.monotonic() - started, rehearsal.aliases()["champion"]
    rehearsal.log(f"rolled back by one command in {seconds:.1f} s; version {champion} is champion")

    check_nothing_is_lost(rehearsal, [first, second, third])
    if has_monitoring:
        render_dashboard(rehearsal)
    with suppress(ImportError):
        take_screenshots(rehearsal)


def start_monitoring(rehearsal: Rehearsal) -> bool:
    try:
        rehearsal.stack.start("exporter", "alertmanager", "prometheus", project=rehearsal.project)
    except MissingProgram as e:
        rehearsal.log(f"no monitoring: {e}")
        return False
    rehearsal.log("monitoring: exporter, Prometheus, Alertmanager")
    return True


def release_by_chain(rehearsal: Rehearsal, feedback: dict[str, bytes], champion: str) -> str:
    """New feedback starts the chain by schedule, which loses a worker in three stages; the version it releases."""
    rows = sum(len(content.splitlines()) for name, content in feedback.items() if name.endswith(".jsonl"))
    rehearsal.upload_feedback(feedback)
    rehearsal.log(f"feedback arrives: {rows} answers")
    rehearsal.prefect("deployment", "schedule", "create", "feedback/sync", "--interval", "20", "--active")
    rehearsal.wait_until(lambda: rehearsal.newest_run("erase"), "a run of the chain")
    # Late runs of this schedule would come before the runs below.
    rehearsal.prefect("deployment", "schedule", "clear", "feedback/sync", "--accept-yes")
    rehearsal.log("the schedule has started the chain")
    for stage, cause in (("invert", "lose_power"), ("erase", "evict"), ("sample", "kill_run")):
        rehearsal.lose_worker(stage, cause)
    run = rehearsal.wait_until(lambda: _if_paused(rehearsal.newest_run("erase")), "a run that waits for approval")
    rehearsal.log("the chain is complete and waits for approval")
    rehearsal.approve(run, "Grace")
    rehearsal.wait_until(lambda: rehearsal.aliases().get("champion") != champion, "the approved version")
    version = rehearsal.aliases()["champion"]
    rehearsal.log(f"approved; version {version} is champion, which has erased only {ONE_CONCEPT}")
    return version


def quarantine_by_canary(rehearsal: Rehearsal, version: str, *, has_monitoring: bool) -> None:
    rehearsal.prefect("deployment", "run", "canary/nightly")
    rehearsal.wait_until(lambda: rehearsal.aliases().get("quarantined") == version, "the canary's quarantine")
    champion = rehearsal.aliases()["champion"]
    rehearsal.log(f"canary: ink is back in version {version}; quarantined, version {champion} is champion again")
    sink = rehearsal.notifications
    if has_monitoring:
        rehearsal.wait_until(lambda: "DeleaturCanaryBreach" in sink.alerts, "the alert of the canary's breach")
        rehearsal.log(f"alerts sent: {', '.join(dict.fromkeys(sink.alerts))}")
    failed = "canary failed"
    rehearsal.wait_until(lambda: any(failed in message for message in sink.messages), "Prefect's notification of it")
    rehearsal.log(f"notifications sent: {', '.join(m.splitlines()[0] for m in sink.messages)}")


def _if_paused(run: FlowRun | None) -> FlowRun | None:
    return run if run and run.state and run.state.is_paused() else None


def check_nothing_is_lost(rehearsal: Rehearsal, versions: Sequence[str]) -> None:
    first, second, third = versions
    history = json.loads(rehearsal.deleatur("history", "--json"))
    events = [(line["event"], line["version"]) for line in history["lines"]]
    expected = [
        *[(event, first) for event in ("registration", "approval", "promotion")],
        *[(event, second) for event in ("registration", "approval", "promotion", "quarantine")],
        *[(event, third) for event in ("registration", "approval", "promotion")],
        ("rollback", first),
    ]
    require(history["consistent"] and events == expected, f"expected the decisions {expected}, got {events}")
    summary = json.loads((rehearsal.project / "out/feedback/summary.json").read_text())
    answers = sum(len(p.read_bytes().splitlines()) for p in (rehearsal.project / "feedback").glob("*.jsonl"))
    accounted = summary["events"] + summary["quarantined"]["rows"]
    require(accounted == answers, f"{answers} answers arrived, {accounted} are accounted for")
    rehearsal.log(f"ledger: {len(events)} lines, intact; feedback: {answers} answers, none lost")
    repeated = {
        line.stage: line.lost
        for line in event_log.read(rehearsal.project / "out/checkpoints")
        if line.kind == "resumed"
    }
    require({"invert", "erase"} <= repeated.keys(), f"expected invert and erase to resume, got {sorted(repeated)}")
    rehearsal.log(f"repeated steps: {', '.join(f'{lost} of {stage}' for stage, lost in repeated.items())}")


def render_dashboard(rehearsal: Rehearsal) -> None:
    """Render the dashboard of the whole rehearsal."""
    import render

    address = f"http://127.0.0.1:{rehearsal.stack.ports['prometheus']}"
    hours = (time.monotonic() - rehearsal.started) / 3600 + 0.05
    series_by_panel = render.render(address, rehearsal.folder / "dashboard.png", hours=hours)
    shown = sum(map(bool, series_by_panel.values()))
    rehearsal.log(f"dashboard: {shown} of {len(series_by_panel)} panels have data")


def take_screenshots(rehearsal: Rehearsal) -> None:
    from playwright.sync_api import sync_playwright

    clients, ports = rehearsal.stack.client_environment, rehearsal.stack.ports
    prefect, mlflow = (f"http://127.0.0.1:{ports[name]}" for name in ("prefect", "mlflow"))
    run = rehearsal.newest_run("erase")
    assert run
    secret = b64encode(clients["PREFECT_API_AUTH_STRING"].encode()).decode()
    visits = {
        "prefect-runs": (f"{prefect}/runs", "Authorization"),
        "prefect-chain": (f"{prefect}/runs/flow-run/{run.id}", "Authorization"),
        "prefect-deployments": (f"{prefect}/deployments", "Authorization"),
        "mlflow-model": (f"{mlflow}/#/models/deleatur", ""),
        "mlflow-runs": (f"{mlflow}/#/experiments/1/runs", ""),
    }
    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (address, header) in visits.items():
            credentials = {"username": "admin", "password": clients["MLFLOW_TRACKING_PASSWORD"]}
            context = browser.new_context(
                viewport={"width": 1400, "height": 1000},
                http_credentials=None if header else credentials,  # type: ignore[arg-type]
                extra_http_headers={header: f"Basic {secret}"} if header else {},
            )
            page = context.new_page()
            page.add_init_script(f"localStorage.setItem('prefect-password', '{secret}')")
            page.goto(address)
            page.wait_for_timeout(6000)
            page.screenshot(path=rehearsal.folder / f"{name}.png")
            context.close()
        browser.close()
    rehearsal.log(f"screenshots: {', '.join(f'{name}.png' for name in visits)}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RehearsalError(message)


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(sys.argv[1:] not in (["-h"], ["--help"]))
    folder = Path(sys.argv[1]).resolve()
    if folder.exists():
        sys.exit(f"{folder} exists already; name a new folder")
    folder.mkdir(parents=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # so that servers are stopped, also when started in the background
        signal.signal(number, signal.default_int_handler)
    with free_ports(len(DEFAULT_PORTS)) as ports:
        stack = Stack(folder / "servers", dict(zip(DEFAULT_PORTS, ports, strict=True)), scrape_interval=5)
    rehearsal = Rehearsal(folder, stack, notifications := NotificationSink())
    try:
        with notifications.listening() as webhook:
            stack.webhook = webhook
            stack.start("postgres", "s3", "mlflow", "prefect")
            rehearsal.log("PostgreSQL, S3, MLflow with users, Prefect: up")
            env = stack.client_environment
            settings = {
                PREFECT_API_URL: env["PREFECT_API_URL"],
                PREFECT_API_AUTH_STRING: env["PREFECT_API_AUTH_STRING"],
            }
            with temporary_settings(settings):
                rehearse(rehearsal, webhook)
    except (MissingProgram, RehearsalError, RuntimeError) as e:
        rehearsal.console.print(f"[red]{type(e).__name__}:[/red] {e}\nNext: the logs in {folder}", markup=True)
        sys.exit(1)
    finally:
        for worker in rehearsal.all_workers:
            worker.lose_power()
        stack.stop()
        shutil.rmtree(stack.database_folder, ignore_errors=True)


if __name__ == "__main__":
    main()
