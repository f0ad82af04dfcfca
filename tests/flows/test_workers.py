"""Stages on real workers that are killed meanwhile: another worker resumes, with bit-identical outputs."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]

import prefect_workers  # noqa: E402
from prefect import flow  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId  # noqa: E402
from prefect_workers import Worker, wait_until  # noqa: E402
from test_deployments import clear_server, prefect  # noqa: E402

from deleatur.errors import ErasureRefused, SettingsError  # noqa: E402
from deleatur.runtime import event_log  # noqa: E402
from deleatur.storage import dvc  # noqa: E402

LONG: dict[str, Any] = {
    "invert": {"hfi": {"training": {"iterations": 300, "eval_every": 300}}},
    "erase": {"sdd": {"training": {"iterations": 120, "eval_every": 0}}},
    "sample": {"steps": 10, "images_per_prompt": {"concept": 30, "unseen": 30}},
}
"""Settings with which stages run for some seconds, long enough to be killed."""

OUTPUTS = {"sample": "out/samples", "invert": "out/tokens", "erase": "out/delta"}
"""Outputs in the order in which the stages run: `sample` uses an earlier delta."""


@pytest.fixture(scope="module")
def deployed(server: dict[str, str], shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project with its deployments, pools, limits and automations, with half the usual heartbeat timeout."""
    from setup import setup

    place = tmp_path_factory.mktemp("deployed")
    root = prefect_workers.project(
        shared, place, workers={"checkpoint_uri": str(place / "state"), "checkpoint_interval": 0.5}
    )
    setup("process", [("gpu", 1)], [], heartbeat_timeout=40)
    prefect(server, root, "--no-prompt", "deploy", "--name", "stage/gpu")
    yield root
    clear_server()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def logs(name: str) -> list[list[str]]:
    """Log messages of a stage's runs, in the order of their start."""
    with get_client(sync_client=True) as client:
        runs = sorted((r for r in client.read_flow_runs() if r.name.startswith(f"{name} ")), key=lambda r: r.created)
        return [
            [log.message for log in client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id])))]
            for run in runs
        ]


@pytest.mark.large
def test_a_lost_worker_is_replaced_and_outputs_are_bit_identical(
    deployed: Path, server: dict[str, str], shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import workers

    monkeypatch.setattr(workers, "POLL_INTERVAL", 0.5)
    monkeypatch.chdir(deployed)
    prefect_workers.change_params(deployed, **LONG)
    local = prefect_workers.project(shared, tmp_path, **LONG)
    for stage in OUTPUTS:
        assert dvc.reproduce(stage, local)

    @flow
    def one(stage: str) -> bool:
        return workers.run_on_worker.with_options(retry_delay_seconds=0)(stage)  # type: ignore[arg-type]

    names = iter(range(100))
    pool = [Worker(server, tmp_path / f"w{i}", f"w{i}") for i in (next(names), next(names))]
    lost: list[Worker] = []

    def lose(stage: str, cause: str) -> None:
        """Lose the worker as soon as a checkpoint was uploaded."""
        state = deployed.parent / "state"
        kinds = ("safetensors", "parquet")
        wait_until(lambda: any(any(state.glob(f"{stage}-*/out/**/[!.]*.{k}")) for k in kinds), f"state of {stage}")
        [busy] = [worker for worker in pool if worker.processes()]
        if cause == "flow":
            busy.flow_process().kill()
            return
        getattr(busy, cause)()
        pool.remove(busy)
        lost.append(busy)
        pool.append(Worker(server, tmp_path / f"w{next(names)}", "again"))

    try:
        for stage, cause in zip(OUTPUTS, ("kill", "flow", "evict"), strict=True):
            thread = threading.Thread(target=contextvars.copy_context().run, args=(lose, stage, cause), daemon=True)
            thread.start()
            assert one(stage)
            thread.join()
            first, *_, last = logs(stage)
            assert not any("go on" in line or "reused" in line for line in first)
            assert any("resumes after step" in line or "reused" in line for line in last), "\n".join(last)
            assert files(deployed / OUTPUTS[stage]) == files(local / OUTPUTS[stage])
            assert dvc.status(deployed, stage) == {}
            kinds_logged = [line.kind for line in event_log.read(deployed / "out/checkpoints") if line.stage == stage]
            assert kinds_logged[:1] + kinds_logged[-1:] == ["started", "done"]
            assert kinds_logged.count("started") >= 2, "the lost worker's events are known too"
            assert not one(stage), "up to date"
        assert not list((deployed.parent / "state").rglob("*.safetensors")), "checkpoints are removed"
    finally:
        for worker in (*pool, *lost):
            print(worker.name, worker.log)
            worker.stop()


def test_the_flow_raises_the_error_of_the_worker(
    deployed: Path, server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import workers
    from erase import erase

    monkeypatch.setattr(workers, "POLL_INTERVAL", 0.5)
    monkeypatch.chdir(deployed)
    prefect_workers.change_params(deployed, erase={"sdd": {"training": {"iterations": 2, "max_relative_change": 1e-9}}})
    worker = Worker(server, tmp_path, "w")
    try:
        with pytest.raises(ErasureRefused):
            erase()
        assert [line.kind for line in event_log.read(deployed / "out/checkpoints") if line.stage == "erase"][
            -1
        ] == "failed"
        before = (deployed / "params.yaml").read_text()
        prefect_workers.change_params(deployed, erase={"sdd": {"bogus": 1}})
        with pytest.raises(SettingsError, match=r"bogus(.|\n)*\nNext: correct params\.yaml, then: deleatur check$"):
            erase()
        (deployed / "params.yaml").write_text(before)
    finally:
        worker.stop()
    assert not [run for run in logs("erase") if any("bogus" in line for line in run)], "no worker is asked"


def test_cancelling_a_flow_cancels_its_worker_runs(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import workers
    from prefect import runtime

    monkeypatch.chdir(deployed)

    def job(commit: str) -> workers.WorkerJob:
        return workers.WorkerJob(
            workers.STAGE_DEPLOYMENT, "erase", commit * 40, {"name": "erase", "params": "", "lock": ""}
        )

    @flow
    def parent() -> tuple[Any, Any]:
        sent = workers.submit(job("0"), store="nowhere")
        return runtime.flow_run.id, sent.id

    with get_client(sync_client=True) as client:
        ours, sent = parent()
        other = workers.submit(job("1"), store="nowhere")
        workers.cancel_worker_runs(None, client.read_flow_run(ours), None)
        states = {run: client.read_flow_run(run).state for run in (sent, other.id)}
        client.delete_flow_run(other.id)
    assert states[sent].is_cancelled() or states[sent].is_cancelling()
    assert states[other.id].is_scheduled()


def test_uncommitted_code_is_refused_before_submission(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from erase import erase

    monkeypatch.chdir(deployed)
    (deployed / "src" / "deleatur" / "mine.py").write_text("")
    with pytest.raises(SettingsError, match=r"mine\.py has uncommitted changes\nNext: git commit"):
        erase()
    (deployed / "src" / "deleatur" / "mine.py").unlink()


def test_without_a_deployment_stages_run_in_process(server: dict[str, str]) -> None:
    from workers import use_workers

    clear_server()
    assert use_workers("auto") is False
    assert use_workers("local") is False
    with pytest.raises(SettingsError, match="expected the deployment stage/gpu"):
        use_workers("workers")
