"""Stages on real workers that vanish in the middle of them: another one goes on, and the bits are those of a run that
was never stopped.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]

import machines  # noqa: E402
from machines import Worker, awaited  # noqa: E402
from prefect import flow  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId  # noqa: E402
from test_deployments import cleared, prefect  # noqa: E402

from deleatur.errors import ErasureRefused, SettingsError  # noqa: E402
from deleatur.runtime import event_log  # noqa: E402
from deleatur.storage import dvc  # noqa: E402

LONG: dict[str, Any] = {
    "invert": {"hfi": {"loop": {"iterations": 300, "check_every": 300}}},
    "erase": {"sdd": {"loop": {"iterations": 120, "check_every": 0}}},
    "sample": {"steps": 10, "per_prompt": {"concept": 30, "unseen": 30}},
}
"""Stages that take some seconds: there is time to be killed, and nothing sleeps."""

MADE = {"sample": "out/shots", "invert": "out/tokens", "erase": "out/delta"}
"""In the order in which they run: what is drawn is what was erased before."""


@pytest.fixture(scope="module")
def net(server: dict[str, str], shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The project, deployed: pools, slots, automations that wait for the silent half as long as otherwise."""
    from setup import setup

    place = tmp_path_factory.mktemp("net")
    root = machines.project(shared, place, workers={"state": str(place / "state"), "save_every": 0.5})
    setup("process", [("gpu", 1)], [], silent=40)
    prefect(server, root, "--no-prompt", "deploy", "--name", "gpu")
    yield root
    cleared()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def logs(name: str) -> list[list[str]]:
    """What the runs of a stage said, in the order in which they began."""
    with get_client(sync_client=True) as client:
        runs = sorted((r for r in client.read_flow_runs() if r.name.startswith(f"{name} ")), key=lambda r: r.created)
        return [
            [log.message for log in client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id])))]
            for run in runs
        ]


@pytest.mark.large
def test_a_worker_that_is_lost_is_replaced_and_the_bits_stay(
    net: Path, server: dict[str, str], shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import workers

    monkeypatch.setattr(workers, "POLL", 0.5)
    monkeypatch.chdir(net)
    machines.change(net, **LONG)
    at_home = machines.project(shared, tmp_path, **LONG)
    for stage in MADE:
        assert dvc.reproduce(stage, at_home)

    @flow
    def one(stage: str) -> bool:
        return workers.send.with_options(retry_delay_seconds=0)(stage)  # type: ignore[arg-type]

    names = iter(range(100))
    pool = [Worker(server, tmp_path / f"w{i}", f"w{i}") for i in (next(names), next(names))]
    gone: list[Worker] = []

    def lose(stage: str, how: str) -> None:
        """As soon as something has arrived that can be gone on from."""
        state = net.parent / "state"
        kinds = ("safetensors", "parquet")
        awaited(lambda: any(any(state.glob(f"{stage}-*/out/**/[!.]*.{k}")) for k in kinds), f"state of {stage}")
        [busy] = [worker for worker in pool if worker.running()]
        if how == "flow":
            busy.flow().kill()
            return
        getattr(busy, how)()
        pool.remove(busy)
        gone.append(busy)
        pool.append(Worker(server, tmp_path / f"w{next(names)}", "again"))

    try:
        for stage, how in zip(MADE, ("vanishes", "flow", "evicted"), strict=True):
            taking = threading.Thread(target=contextvars.copy_context().run, args=(lose, stage, how), daemon=True)
            taking.start()
            assert one(stage)
            taking.join()
            first, *_, last = logs(stage)
            assert not any("go on" in line or "reused" in line for line in first)
            assert any("goes on after step" in line or "reused" in line for line in last), "\n".join(last)
            assert files(net / MADE[stage]) == files(at_home / MADE[stage])
            assert dvc.status(net, stage) == {}
            told = [line.what for line in event_log.read(net / "out/state") if line.stage == stage]
            assert told[:1] + told[-1:] == ["began", "done"]
            assert told.count("began") >= 2, "what the lost worker began is known here too"
            assert not one(stage), "there is nothing left to do"
        assert not list((net.parent / "state").rglob("*.safetensors")), "nobody has to go on with it"
    finally:
        for worker in (*pool, *gone):
            print(worker.name, worker.log)
            worker.stop()


def test_what_a_stage_fails_with_on_a_worker_is_what_the_flow_fails_with(
    net: Path, server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import workers
    from erase import erase

    monkeypatch.setattr(workers, "POLL", 0.5)
    monkeypatch.chdir(net)
    machines.change(net, erase={"sdd": {"loop": {"iterations": 2, "most_change": 1e-9}}})
    worker = Worker(server, tmp_path, "w")
    try:
        with pytest.raises(ErasureRefused):
            erase()
        assert [line.what for line in event_log.read(net / "out/state") if line.stage == "erase"][-1] == "failed"
        machines.change(net, erase={"sdd": {"bogus": 1}})
        with pytest.raises(SettingsError, match=r"bogus(.|\n)*\nNext: deleatur methods erasers$"):
            erase()
    finally:
        worker.stop()
    assert len([run for run in logs("erase") if any("bogus" in line for line in run)]) == 1, "not tried again"


def test_who_cancels_a_flow_cancels_its_stages(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import workers
    from prefect import runtime

    monkeypatch.chdir(net)

    def job(commit: str) -> workers.Job:
        return workers.Job(workers.STAGE, "erase", commit * 40, {"name": "erase", "params": "", "lock": ""})

    @flow
    def parent() -> tuple[Any, Any]:
        sent = workers.submit(job("0"), store="nowhere")
        return runtime.flow_run.id, sent.id

    with get_client(sync_client=True) as client:
        ours, sent = parent()
        other = workers.submit(job("1"), store="nowhere")
        workers.call_back(None, client.read_flow_run(ours), None)
        states = {run: client.read_flow_run(run).state for run in (sent, other.id)}
        client.delete_flow_run(other.id)
    assert states[sent].is_cancelled() or states[sent].is_cancelling()
    assert states[other.id].is_scheduled()


def test_what_workers_would_not_get_is_said_before_anything_is_sent(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from erase import erase

    monkeypatch.chdir(net)
    (net / "src" / "deleatur" / "mine.py").write_text("")
    with pytest.raises(SettingsError, match=r"mine\.py is not as it is there\nNext: git commit"):
        erase()
    (net / "src" / "deleatur" / "mine.py").unlink()


def test_where_there_are_no_workers_it_is_said_or_done_here(server: dict[str, str]) -> None:
    from workers import there

    cleared()
    assert there("auto") is False
    assert there("here") is False
    with pytest.raises(SettingsError, match="expected the deployment stage/gpu"):
        there("workers")
