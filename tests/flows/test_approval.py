"""A run of a deployment that waits for approval is suspended, without a process; an answer is about one evidence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import finished
import prefect_workers
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]

from prefect.client.orchestration import SyncPrefectClient, get_client  # noqa: E402
from prefect.deployments import run_deployment  # noqa: E402
from prefect.exceptions import Pause  # noqa: E402
from prefect.flow_engine import run_flow  # noqa: E402
from prefect.input import read_flow_run_input  # noqa: E402
from prefect.states import AwaitingRetry, Crashed, Failed, Pending  # noqa: E402
from test_deployments import clear_server, prefect  # noqa: E402

from deleatur.config.settings import Settings  # noqa: E402
from deleatur.errors import DataError  # noqa: E402
from deleatur.registry import ledger  # noqa: E402
from deleatur.registry.decisions import STARTED_BY, open_registry  # noqa: E402
from deleatur.registry.mlflow_registry import CHALLENGER, CHAMPION  # noqa: E402
from deleatur.stages import STAGES, gate, register  # noqa: E402
from deleatur.storage import dvc  # noqa: E402

ADA = {"approver": "Ada", "decision": "approve", "reason": "looked at the sheet"}


class ChainRun:
    """A run of the deployment erase/chain, executed as a worker does."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self._client = client
        self.id: Any = run_deployment("erase/chain", timeout=0, as_subflow=False).id  # type: ignore[union-attr]

    @property
    def state(self) -> Any:
        return self._client.read_flow_run(self.id).state

    @property
    def slots(self) -> int:
        """Active slots of the deployment's concurrency limit of one."""
        limit = self._client.read_deployment_by_name("erase/chain").global_concurrency_limit
        assert limit is not None
        return limit.active_slots

    @property
    def requested_evidence(self) -> str:
        """The evidence digest in the form and in its key."""
        keys = self.state.state_details.run_input_keyset
        evidence: str = keys["response"].split("-")[1]
        assert f"evidence sha256:`{evidence}`" in read_flow_run_input(keys["description"], flow_run_id=self.id)
        return evidence

    def execute(self) -> Any:
        """Run the flow until its process ends; its result."""
        from erase import erase

        assert self._client.set_flow_run_state(self.id, Pending()).status.value == "ACCEPT"
        assert self.slots == 1
        try:
            return run_flow(erase, flow_run=self._client.read_flow_run(self.id))
        except Pause:
            assert self.state.name == "Suspended"
            return None
        finally:
            assert self.slots == 0

    def answer(self, answer: dict[str, str]) -> None:
        self._client.resume_flow_run(self.id, run_input=answer)

    def reschedule(self) -> None:
        self._client.set_flow_run_state(self.id, AwaitingRetry())

    def set_state(self, state: Any) -> None:
        self._client.set_flow_run_state(self.id, state)


@pytest.fixture
def run(shared: Path, server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ChainRun]:
    """A run whose stages are up to date; for speed it has only the last stage, and registers in this process."""
    from setup import setup

    root = tmp_path / "project"
    finished.copy(shared, root)
    for name in ("flows", "prefect.yaml"):
        (root / name).symlink_to(prefect_workers.ROOT / name)
    prefect_workers.change_params(root, register={"approval": True})
    monkeypatch.chdir(root)
    monkeypatch.setenv(STARTED_BY, "Grace")
    monkeypatch.setattr("erase.STAGES", STAGES[-2:])
    monkeypatch.setattr(dvc, "status", lambda root: {})
    monkeypatch.setattr(dvc, "reproduce", lambda stage, *_: False)
    monkeypatch.setattr(dvc, "run_untracked", lambda stage, *_: register.run(Settings.load()))
    setup("process", [], [])
    prefect(server, root, "--no-prompt", "deploy", "--name", "chain")
    try:
        with get_client(sync_client=True) as client:
            yield ChainRun(client)
    finally:
        clear_server()


def aliases() -> dict[str, str]:
    return open_registry(Settings.load()).aliases()


def test_an_answer_is_void_if_the_candidate_has_changed(run: ChainRun) -> None:
    run.execute()
    assert aliases() == {CHALLENGER: "1"}
    first = run.requested_evidence

    prefect_workers.change_params(Path(), gate=finished.passing_policy(limit=-4.0))
    gate.run(Settings.load())
    run.answer(ADA)
    run.execute()
    assert aliases() == {CHALLENGER: "2"}, "Ada has seen only the first"
    assert run.requested_evidence != first

    run.answer(ADA | {"reason": "looked at both"})
    assert run.execute().decision == "approve"
    assert run.state.is_completed()
    assert aliases() == {CHAMPION: "2"}
    entries = ledger.read(Settings.load().register_.ledger).entries
    decided = [(e.event, e.version, e.reason) for e in entries if e.actor == "Ada"]
    assert decided == [("approval", "2", "looked at both"), ("promotion", "2", "looked at both")]


def test_approval_is_requested_again_and_an_answer_survives_a_lost_process(run: ChainRun) -> None:
    run.execute()
    first = run.requested_evidence
    run.set_state(Failed(message="The flow was paused and never resumed."))  # as a server says after `approval_seconds`
    run.reschedule()
    run.execute()
    assert run.requested_evidence == first

    run.answer(ADA | {"approver": "grace"})
    with pytest.raises(DataError, match=r"another person has to approve it\nNext: deleatur approve 1 --as NAME"):
        run.execute()
    assert run.state.is_failed()

    run.reschedule()
    run.execute()
    assert (run.requested_evidence, aliases()) == (first, {CHALLENGER: "1"})
    run.answer(ADA)
    run.set_state(Crashed(name="Lost"))
    prefect_workers.wait_until(lambda: run.state.name == "AwaitingRetry", "the server's restart of the run")
    assert run.execute().decision == "approve"
    assert aliases() == {CHAMPION: "1"}
