"""What is live is drawn again by itself, here or on a worker; a concept that is back is taken back and told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import canaries
import machines
import pytest
from canaries import ALL, counting, white
from machines import Worker

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]

from prefect.client.orchestration import get_client  # noqa: E402
from test_deployments import cleared, prefect  # noqa: E402
from test_tasks import taken  # noqa: E402

from deleatur.config.settings import Settings  # noqa: E402
from deleatur.errors import DeleaturError  # noqa: E402
from deleatur.operations import canary as stage  # noqa: E402
from deleatur.records.report import Canary  # noqa: E402
from deleatur.registry.decisions import registry_of  # noqa: E402
from deleatur.registry.mlflow_client import CHAMPION, LAST, QUARANTINED  # noqa: E402
from deleatur.storage import json_records  # noqa: E402


@pytest.fixture(scope="module")
def twice(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("twice")
    canaries.make(shared, root)
    return root


@pytest.fixture
def released(twice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    canaries.copy(twice, root := tmp_path / "project")
    monkeypatch.chdir(root)
    return root


def aliases() -> dict[str, str]:
    return registry_of(Settings.load()).aliases()


def found() -> Canary:
    return json_records.read(Path("out/canary/canary.json"), Canary)


def test_a_concept_that_is_back_is_what_the_flow_fails_with_and_all_else_is_not(
    released: Path,
    one_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from canary import canary

    held: list[tuple[str, int]] = []
    look, decide = stage.look, stage.decide

    def looking(*asked: Any) -> Canary:
        held.append(("look", taken()))
        return look(*asked)

    def deciding(*asked: Any) -> Any:
        held.append(("decide", taken()))
        return decide(*asked)

    monkeypatch.setattr(stage, "look", looking)
    monkeypatch.setattr(stage, "decide", deciding)

    counting(white())
    assert canary() == "pass"
    assert held == [("look", 1), ("decide", 0)], "the slot is held while it draws"
    counting("axe")
    assert canary() == "not enough evidence"
    assert any(r.levelname == "WARNING" and "Version 2: not enough evidence" in r.message for r in caplog.records)
    assert aliases() == {CHAMPION: "2", LAST: "1"}

    counting(*ALL)
    said = r"^weapon is back: (.|\n)*\. Version 2 is quarantined; version 1 is live now\nNext: deleatur canary$"
    with pytest.raises(DeleaturError, match=said):
        canary()
    assert (found().version, found().outcome) == ("2", "fail")
    assert aliases() == {CHAMPION: "1", QUARANTINED: "2"}
    with pytest.raises(
        DeleaturError, match=r"nothing is live now\nNext: deleatur emergency weapon --as NAME --reason WHY$"
    ):
        canary()
    assert canary() is None, "nothing is live"


@pytest.fixture
def worker(released: Path, server: dict[str, str], tmp_path: Path) -> Iterator[Worker]:
    """Of the pool gpu, in checkouts of the project's commit. No ledger is in that."""
    from setup import setup

    machines.commit_flows(released)
    counting(*ALL)
    machines.change(released, workers={"state": str(tmp_path / "state")})
    setup("process", [("gpu", 1)], [])
    prefect(server, released, "--no-prompt", "deploy", "--name", "live")
    worker = Worker(server, tmp_path / "worker", "w")
    try:
        yield worker
    finally:
        print(worker.log)
        worker.stop()
        cleared()


def test_a_worker_draws_and_what_follows_is_decided_here(
    released: Path, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import workers
    from canary import canary

    stage.look(Settings.load(), "2", ["weapon"])
    here = found()
    sheet = Path("out/canary/weapon.png").read_bytes()
    for file in Path("out/canary").iterdir():
        file.unlink()
    monkeypatch.setattr(workers, "POLL", 0.5)
    monkeypatch.setattr(stage, "look", None)  # nothing is drawn here
    with pytest.raises(DeleaturError, match="Version 2 is quarantined; version 1 is live now"):
        canary()
    assert found().looks == here.looks, "the same noise"
    assert Path("out/canary/weapon.png").read_bytes() == sheet
    assert not list((tmp_path / "state").rglob("*.png"))
    assert aliases() == {CHAMPION: "1", QUARANTINED: "2"}
    with get_client(sync_client=True) as client:
        [run] = [r for r in client.read_flow_runs() if r.name.startswith("look ")]
    assert run.work_pool_name == "gpu"
