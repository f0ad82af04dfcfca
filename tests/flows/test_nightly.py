"""The canary flow checks the champion, in process or on a worker, and quarantines it if a concept is back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import canaries
import prefect_workers
import pytest
from canaries import ALL_LABELS, detect_labels, label_of_white
from prefect_workers import Worker

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]

from prefect.client.orchestration import get_client  # noqa: E402
from test_deployments import clear_server, prefect  # noqa: E402
from test_tasks import active_slots  # noqa: E402

from deleatur.config.settings import Settings  # noqa: E402
from deleatur.errors import DeleaturError  # noqa: E402
from deleatur.operations import canary as stage  # noqa: E402
from deleatur.records.report import CanaryResult  # noqa: E402
from deleatur.registry.decisions import open_registry  # noqa: E402
from deleatur.registry.mlflow_registry import CHAMPION, LAST_KNOWN_GOOD, QUARANTINED  # noqa: E402
from deleatur.storage import json_records  # noqa: E402


@pytest.fixture(scope="module")
def two_releases(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two_releases")
    canaries.create(shared, root)
    return root


@pytest.fixture
def released(two_releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    canaries.copy(two_releases, root := tmp_path / "project")
    monkeypatch.chdir(root)
    return root


def aliases() -> dict[str, str]:
    return open_registry(Settings.load()).aliases()


def canary_result() -> CanaryResult:
    return json_records.read(Path("out/canary/canary.json"), CanaryResult)


def test_the_flow_fails_only_if_a_concept_is_back(
    released: Path,
    one_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from canary import canary

    slots_in_use: list[tuple[str, int]] = []
    check, decide = stage.check, stage.decide

    def checking(*args: Any) -> CanaryResult:
        slots_in_use.append(("check", active_slots()))
        return check(*args)

    def deciding(*args: Any) -> Any:
        slots_in_use.append(("decide", active_slots()))
        return decide(*args)

    monkeypatch.setattr(stage, "check", checking)
    monkeypatch.setattr(stage, "decide", deciding)

    detect_labels(label_of_white())
    assert canary() == "pass"
    assert slots_in_use == [("check", 1), ("decide", 0)], "the slot is slots_held while sampling"
    detect_labels("axe")
    assert canary() == "not enough evidence"
    assert any(r.levelname == "WARNING" and "Version 2: not enough evidence" in r.message for r in caplog.records)
    assert aliases() == {CHAMPION: "2", LAST_KNOWN_GOOD: "1"}

    detect_labels(*ALL_LABELS)
    message = r"^weapon is back: (.|\n)*\. Version 2 is quarantined; version 1 is champion now\nNext: deleatur canary$"
    with pytest.raises(DeleaturError, match=message):
        canary()
    assert (canary_result().version, canary_result().outcome) == ("2", "fail")
    assert aliases() == {CHAMPION: "1", QUARANTINED: "2"}
    with pytest.raises(
        DeleaturError, match=r"there is no champion now\nNext: deleatur emergency weapon --as NAME --reason WHY$"
    ):
        canary()
    assert canary() is None, "there is no champion"


@pytest.fixture
def worker(released: Path, server: dict[str, str], tmp_path: Path) -> Iterator[Worker]:
    """A worker of the pool gpu, whose checkouts of the project's commit have no ledger."""
    from setup import setup

    prefect_workers.commit_flows(released)
    detect_labels(*ALL_LABELS)
    prefect_workers.change_params(released, workers={"checkpoint_uri": str(tmp_path / "state")})
    setup("process", [("gpu", 1)], [])
    prefect(server, released, "--no-prompt", "deploy", "--name", "canary-check/gpu")
    worker = Worker(server, tmp_path / "worker", "w")
    try:
        yield worker
    finally:
        print(worker.log)
        worker.stop()
        clear_server()


def test_a_worker_checks_and_this_machine_decides(
    released: Path, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import workers
    from canary import canary

    stage.check(Settings.load(), "2", ["weapon"])
    expected = canary_result()
    contact_sheet = Path("out/canary/weapon.png").read_bytes()
    for file in Path("out/canary").iterdir():
        file.unlink()
    monkeypatch.setattr(workers, "POLL_INTERVAL", 0.5)
    monkeypatch.setattr(stage, "check", None)  # nothing is sampled in this process
    with pytest.raises(DeleaturError, match="Version 2 is quarantined; version 1 is champion now"):
        canary()
    assert canary_result().checks == expected.checks, "the same seeds"
    assert Path("out/canary/weapon.png").read_bytes() == contact_sheet
    assert not list((tmp_path / "state").rglob("*.png"))
    assert aliases() == {CHAMPION: "1", QUARANTINED: "2"}
    with get_client(sync_client=True) as client:
        [run] = [r for r in client.read_flow_runs() if r.name.startswith("canary-check ")]
    assert run.work_pool_name == "gpu"
