"""A day in production, rehearsed on one machine with real servers, in about twenty minutes:

    python infra/day.py FOLDER

Feedback arrives, a schedule finds it and starts the chain, its workers are lost three times, a person approves, the
canary finds what the new version has let back in and takes it back by itself, a person takes another one back. The
concepts are the built-in model's and its raters are simulated; everything else is what production runs: PostgreSQL, an
S3-compatible store, MLflow with users, Prefect with a worker for the chain and two for stages, the exporter, and
Prometheus with Alertmanager where they are installed. Ends with 0 if everything happened as it had to and nothing was
lost. FOLDER keeps all of it: logs, the project, pictures of the pages.
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
from local import BUCKET, USUAL, Missing, Stack, free
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
PATIENCE = 1800.0
"""Seconds that anything may take."""
BOTH, ONE = "weapon,ink", "weapon"

DAY: dict[str, Any] = {
    "register": {"approval": True},
    "feedback": {"inbox": f"s3://{BUCKET}/inbox", "min_new": 50},
    "workers": {"checkpoint_uri": f"s3://{BUCKET}/state", "checkpoint_interval": 2},
    "invert": {"hfi": {"tokens": 8}},
    "erase": {"sdd": {"training": {"iterations": 160, "eval_every": 80}}},
    "attack": {"methods": {"concept_inversion": {"num_attempts": 2, "training": {"iterations": 40}}}},
    "gate": {"rules": {"concept_is_gone": {"max": 0.5}, "token_is_gone": {"max": 0.7, "min_n": 8}}},
}
"""What is other than in params.yaml: a person approves, stages are short, and the policy is one that they can keep."""


class Rehearsal(Exception):
    """Something did not happen, or was lost."""


@dataclass
class Told:
    """Who is told: a web page that keeps what was sent to it."""

    messages: list[str] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)

    @contextmanager
    def listening(self) -> Iterator[str]:
        told = self

        class Page(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                told.messages += [said["text"]] if "text" in said else []
                told.alerts += [a["labels"]["alertname"] for a in said.get("alerts", []) if a["status"] == "firing"]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class Worker:
    """A worker of a pool on a machine of its own: a folder, and processes that can be taken away."""

    def __init__(self, pool: str, name: str, folder: Path, env: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name, log = name, folder.parent / f"{name}.log"
        command = [PYTHON, "-m", "prefect", "worker", "start", "--pool", pool, "--name", name, "--limit", "1"]
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                command, cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def runs(self) -> list[psutil.Process]:
        """What it has started: a flow, and below it a stage."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).children()
        return []

    def loses_power(self) -> None:
        with suppress(psutil.NoSuchProcess):
            machine = psutil.Process(self._process.pid)
            for process in [machine, *machine.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait()

    def is_evicted(self) -> None:
        """As Kubernetes and clouds do: SIGTERM, and some time."""
        self._process.terminate()

    def loses_its_run(self) -> None:
        for process in self.runs():
            process.send_signal(signal.SIGKILL)


@dataclass
class Day:
    folder: Path
    stack: Stack
    told: Told
    console: Console = field(default_factory=lambda: Console(highlight=False))
    began: float = field(default_factory=time.monotonic)
    workers: dict[str, Worker] = field(default_factory=dict)
    """That have not been taken away."""
    hired: list[Worker] = field(default_factory=list)
    timeline: list[tuple[str, str]] = field(default_factory=list)

    @property
    def project(self) -> Path:
        return self.folder / "project"

    @property
    def env(self) -> dict[str, str]:
        quick = {"PREFECT_WORKER_QUERY_SECONDS": "2", "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "1"}
        own = {"PYTHONPATH": "src", "DO_NOT_TRACK": "true", "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "AWS_", "DELEATUR_"))}
        path = os.pathsep.join([str(Path(PYTHON).parent), clean.get("PATH", os.defpath)])
        return clean | {"PATH": path} | self.stack.clients | quick | own

    def says(self, what: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        clock = datetime.now().strftime("%H:%M:%S")
        self.timeline.append((clock, what))
        self.console.print(f"[dim]{clock}  {minutes:>3}:{seconds:02}[/dim]  {what}")

    def run(self, *command: str, cwd: Path | None = None, codes: Sequence[int] = (0,)) -> str:
        with (self.folder / "commands.log").open("a") as log:
            done = subprocess.run(
                command, cwd=cwd or self.project, env=self.env, capture_output=True, text=True, check=False
            )
            log.write(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}\n[{done.returncode}]\n")
        if done.returncode not in codes:
            raise Rehearsal(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def deleatur(self, *arguments: str, codes: Sequence[int] = (0,)) -> str:
        return self.run(PYTHON, "-m", "deleatur", *arguments, codes=codes)

    def prefect(self, *arguments: str) -> str:
        return self.run(PYTHON, "-m", "prefect", "--no-prompt", *arguments)

    def until(self, true: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (found := true()):
            if time.monotonic() > deadline:
                raise Rehearsal(f"{what} never came")
            time.sleep(0.5)
        return found

    @property
    def client(self) -> SyncPrefectClient:
        return get_client(sync_client=True)

    def newest(self, flow: str) -> FlowRun | None:
        """The run of a flow that was made last."""
        named = FlowFilter(name=FlowFilterName(any_=[flow]))
        with self.client as client:
            runs = client.read_flow_runs(flow_filter=named, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=20)
        began = [run for run in runs if run.start_time]
        return began[0] if began else None

    def aliases(self) -> dict[str, str]:
        lines = json.loads(self.deleatur("history", "--json"))["lines"]
        return dict(lines[-1]["aliases"]) if lines else {}

    def hire(self, pool: str, name: str, folder: Path) -> None:
        self.hired.append(worker := Worker(pool, name, folder, self.env))
        self.workers[name] = worker

    # ------------------------------------------------------------------ the day

    def project_is_made(self) -> dict[str, bytes]:
        """A repository of one's own with its settings and half of the feedback; the files of the other half."""
        origin = self.folder / "origin.git"
        self.run("git", "clone", "--quiet", "--bare", str(ROOT), str(origin), cwd=self.folder)
        self.run("git", "clone", "--quiet", str(origin), str(self.project), cwd=self.folder)
        path = self.project / "params.yaml"
        path.write_text(yaml.safe_dump(merged(yaml.safe_load(path.read_text("utf-8")), DAY), sort_keys=False), "utf-8")
        answers = self.project / "feedback" / "weapon.jsonl"
        lines = answers.read_bytes().splitlines(keepends=True)
        answers.write_bytes(b"".join(lines[::2]))
        late = {"late.jsonl": b"".join(lines[1::2])}
        late["late.images.parquet"] = answers.with_suffix(".images.parquet").read_bytes()
        self.run("dvc", "remote", "add", "--default", "--force", "store", f"s3://{BUCKET}/dvc")
        who = ("-c", "user.name=Ops", "-c", "user.email=ops@example.org")
        self.run("git", *who, "commit", "--quiet", "--all", "--message", "Ours")
        self.run("git", "push", "--quiet")
        return late

    def servers_are_prepared(self, page: str) -> None:
        self.run(PYTHON, "flows/setup.py", "--gpu", "gpu:1", "--notify", page)
        self.prefect("deploy", "--all")
        self.prefect("deployment", "schedule", "clear", "feedback/sync", "--accept-yes")  # it may not come too early
        self.hire("cpu", "workspace", self.project)
        for name in ("gpu-a", "gpu-b"):
            self.hire("gpu", name, self.folder / "machines" / name)

    def emergency(self, concepts: str, why: str) -> str:
        """Released by two people; the version."""
        self.deleatur("emergency", concepts, "--as", "Ada", "--reason", why)
        version = self.aliases()["challenger"]
        self.deleatur("approve", version, "--as", "Grace", "--reason", "I looked at the sheet")
        return version

    def feedback_arrives(self, files: dict[str, bytes]) -> None:
        store = self.stack.store()
        for name, content in reversed(files.items()):  # answers last: their pictures are there then
            store.put_object(Bucket=BUCKET, Key=f"inbox/{name}", Body=content)

    def saved(self, stage: str) -> bool:
        """Whether a stage on a worker has put away something that another one can go on from."""
        found = self.stack.store().list_objects_v2(Bucket=BUCKET, Prefix=f"state/{stage}-").get("Contents", [])
        return any(file["Key"].endswith((".safetensors", ".parquet")) for file in found)

    def is_lost(self, stage: str, how: str) -> None:
        """The worker that has this stage, as soon as it has something to lose."""
        self.until(lambda: self.saved(stage), f"a saved state of {stage}")
        [busy] = [w for n, w in self.workers.items() if n.startswith("gpu") and w.runs()]
        getattr(busy, how)()
        self.says(f"{stage}: worker {busy.name} {how.replace('_', ' ')}")
        if how != "loses_its_run":
            del self.workers[busy.name]
            name = f"{busy.name}'"
            self.hire("gpu", name, self.folder / "machines" / name)

    def approved(self, run: FlowRun, who: str) -> None:
        """By the form on the run's page."""
        form = {"approver": who, "decision": "approve", "reason": "I looked at the sheet"}
        with self.client as client:
            client.resume_flow_run(run.id, run_input=form)


def rehearse(day: Day, page: str) -> None:
    late = day.project_is_made()
    day.servers_are_prepared(page)
    day.says("deployed: pools, slots, schedules, automations; one worker for the chain, two for stages")

    watched = ("exporter", "alertmanager", "prometheus")
    try:
        day.stack.start(*watched, root=day.project)
        day.says("watched: exporter, Prometheus, Alertmanager")
    except Missing as e:
        watched = ()
        day.says(f"not watched: {e}")

    first = day.emergency(BOTH, "reported by many")
    day.says(f"emergency: {BOTH} erased by a formula, approved by another person; version {first} is live")

    rows = sum(len(content.splitlines()) for name, content in late.items() if name.endswith(".jsonl"))
    day.feedback_arrives(late)
    day.says(f"feedback arrives: {rows} answers")
    day.prefect("deployment", "schedule", "create", "feedback/sync", "--interval", "20", "--active")
    day.until(lambda: day.newest("erase"), "a run of the chain")
    day.prefect("deployment", "schedule", "clear", "feedback/sync", "--accept-yes")  # or its late runs go first later
    day.says("the schedule has found it: the chain has begun")
    for stage, how in (("invert", "loses_power"), ("erase", "is_evicted"), ("sample", "loses_its_run")):
        day.is_lost(stage, how)
    run = day.until(lambda: _waits(day.newest("erase")), "a run that waits for a person")
    day.says("the chain has run to its end and waits for a person")
    day.approved(run, "Grace")
    day.until(lambda: day.aliases().get("champion") != first, "the approved version")
    second = day.aliases()["champion"]
    day.says(f"approved by the form; version {second} is live, which has only {ONE} erased")

    day.prefect("deployment", "run", "canary/nightly")
    day.until(lambda: day.aliases().get("quarantined") == second, "the canary's quarantine")
    day.says(f"canary: ink is back in version {second}; quarantined, version {day.aliases()['champion']} is live again")

    if watched:
        day.until(lambda: "DeleaturCanaryBreach" in day.told.alerts, "the alert of the canary's breach")
        day.says(f"alerts sent: {', '.join(dict.fromkeys(day.told.alerts))}")
    day.until(lambda: any("canary failed" in message for message in day.told.messages), "Prefect's message of it")
    day.says(f"messages sent: {', '.join(m.splitlines()[0] for m in day.told.messages)}")

    third = day.emergency(BOTH, "the canary's finding")
    day.says(f"version {third} is live, by another emergency")
    began = time.monotonic()
    day.deleatur("rollback", "--as", "Grace", "--reason", "it spoils the background")
    day.says(
        f"taken back by one command in {time.monotonic() - began:.1f} s; version {day.aliases()['champion']} is live"
    )
    nothing_is_lost(day, [first, second, third])
    if watched:
        board_is_drawn(day)
    with suppress(ImportError):
        pages_are_looked_at(day)


def _waits(run: FlowRun | None) -> FlowRun | None:
    return run if run and run.state and run.state.is_paused() else None


def nothing_is_lost(day: Day, versions: Sequence[str]) -> None:
    first, second, third = versions
    told = json.loads(day.deleatur("history", "--json"))
    events = [(line["event"], line["version"]) for line in told["lines"]]
    wanted = [
        *[(event, first) for event in ("registration", "approval", "promotion")],
        *[(event, second) for event in ("registration", "approval", "promotion", "quarantine")],
        *[(event, third) for event in ("registration", "approval", "promotion")],
        ("rollback", first),
    ]
    demand(told["whole"] and events == wanted, f"the ledger says {events}, and wanted was {wanted}")
    summary = json.loads((day.project / "out/feedback/summary.json").read_text())
    answers = sum(len(p.read_bytes().splitlines()) for p in (day.project / "feedback").glob("*.jsonl"))
    kept = summary["events"] + summary["quarantined"]["rows"]
    demand(kept == answers, f"{answers} answers are there, and {kept} are accounted for")
    day.says(f"ledger: {len(events)} lines, whole; feedback: {answers} answers, none lost")
    again = {line.stage: line.lost for line in event_log.read(day.project / "out/checkpoints") if line.kind == "resumed"}
    demand({"invert", "erase"} <= again.keys(), f"of the loops that were stopped only {sorted(again)} went on")
    day.says(f"steps done twice: {', '.join(f'{lost} of {stage}' for stage, lost in again.items())}")


def board_is_drawn(day: Day) -> None:
    """What Prometheus knows of the day, as the board shows it, and the pages of Prefect and MLflow."""
    import look

    address = f"http://127.0.0.1:{day.stack.ports['prometheus']}"
    hours = (time.monotonic() - day.began) / 3600 + 0.05
    shown = look.draw(address, day.folder / "board.png", hours=hours)
    day.says(f"board: {sum(map(bool, shown.values()))} of {len(shown)} panels have something to show")


def pages_are_looked_at(day: Day) -> None:
    from playwright.sync_api import sync_playwright

    clients, ports = day.stack.clients, day.stack.ports
    prefect, mlflow = (f"http://127.0.0.1:{ports[name]}" for name in ("prefect", "mlflow"))
    run = day.newest("erase")
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
            known = {"username": "admin", "password": clients["MLFLOW_TRACKING_PASSWORD"]}
            context = browser.new_context(
                viewport={"width": 1400, "height": 1000},
                http_credentials=None if header else known,  # type: ignore[arg-type]
                extra_http_headers={header: f"Basic {secret}"} if header else {},
            )
            page = context.new_page()
            page.add_init_script(f"localStorage.setItem('prefect-password', '{secret}')")
            page.goto(address)
            page.wait_for_timeout(6000)
            page.screenshot(path=day.folder / f"{name}.png")
            context.close()
        browser.close()
    day.says(f"pages: {', '.join(f'{name}.png' for name in visits)}")


def demand(true: bool, what: str) -> None:
    if not true:
        raise Rehearsal(what)


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(sys.argv[1:] not in (["-h"], ["--help"]))
    folder = Path(sys.argv[1]).resolve()
    if folder.exists():
        sys.exit(f"{folder} exists already; name a new folder")
    folder.mkdir(parents=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # nothing stays behind; what is started in a background hears us too
        signal.signal(number, signal.default_int_handler)
    with free(len(USUAL)) as ports:
        stack = Stack(folder / "servers", dict(zip(USUAL, ports, strict=True)), scrape=5)
    day = Day(folder, stack, told := Told())
    try:
        with told.listening() as page:
            stack.webhook = page
            stack.start("postgres", "s3", "mlflow", "prefect")
            day.says("PostgreSQL, S3, MLflow with users, Prefect: up")
            own = stack.clients
            where = {PREFECT_API_URL: own["PREFECT_API_URL"], PREFECT_API_AUTH_STRING: own["PREFECT_API_AUTH_STRING"]}
            with temporary_settings(where):
                rehearse(day, page)
    except (Missing, Rehearsal, RuntimeError) as e:
        day.console.print(f"[red]{type(e).__name__}:[/red] {e}\nNext: the logs in {folder}", markup=True)
        sys.exit(1)
    finally:
        for worker in day.hired:
            worker.loses_power()
        stack.stop()
        shutil.rmtree(stack.database, ignore_errors=True)


if __name__ == "__main__":
    main()
