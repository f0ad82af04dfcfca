"""A run of a deployment that waits for a person is no process; an answer is about what was shown, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import finished
import machines
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]

from prefect.client.orchestration import SyncPrefectClient, get_client  # noqa: E402
from prefect.deployments import run_deployment  # noqa: E402
from prefect.exceptions import Pause  # noqa: E402
from prefect.flow_engine import run_flow  # noqa: E402
from prefect.input import read_flow_run_input  # noqa: E402
from prefect.states import AwaitingRetry, Crashed, Failed, Pending  # noqa: E402
from test_deployments import cleared, prefect  # noqa: E402

from deleatur.config.settings import Settings  # noqa: E402
from deleatur.errors import DataError  # noqa: E402
from deleatur.registry import ledger  # noqa: E402
from deleatur.registry.decisions import STARTED_BY, registry_of  # noqa: E402
from deleatur.registry.mlflow_client import CHALLENGER, CHAMPION  # noqa: E402
from deleatur.stages import STAGES, gate, register  # noqa: E402
from deleatur.storage import dvc  # noqa: E402

ADA = {"approver": "Ada", "decision": "approve", "reason": "looked at the sheet"}


class Run:
    """A run of the deployment erase/chain, each of its lives begun as a worker does it."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self._client = client
        self.id: Any = run_deployment("erase/chain", timeout=0, as_subflow=False).id  # type: ignore[union-attr]

    @property
    def state(self) -> Any:
        return self._client.read_flow_run(self.id).state

    @property
    def slots(self) -> int:
        """Of the deployment, which one run at a time may hold."""
        limit = self._client.read_deployment_by_name("erase/chain").global_concurrency_limit
        assert limit is not None
        return limit.active_slots

    @property
    def asks_about(self) -> str:
        """The digest that the form names, and the question is known by."""
        keys = self.state.state_details.run_input_keyset
        evidence: str = keys["response"].split("-")[1]
        assert f"evidence sha256:`{evidence}`" in read_flow_run_input(keys["description"], flow_run_id=self.id)
        return evidence

    def lives(self) -> Any:
        """Up to its end, which is the end of its process; what it gives back."""
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

    def answered(self, answer: dict[str, str]) -> None:
        self._client.resume_flow_run(self.id, run_input=answer)

    def begins_again(self) -> None:
        self._client.set_flow_run_state(self.id, AwaitingRetry())

    def ends(self, state: Any) -> None:
        self._client.set_flow_run_state(self.id, state)


@pytest.fixture
def run(shared: Path, server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Its stages are done, and all but the gate left out, which is quicker; as is a registration in this process."""
    from setup import setup

    root = tmp_path / "project"
    finished.copy(shared, root)
    for name in ("flows", "prefect.yaml"):
        (root / name).symlink_to(machines.ROOT / name)
    machines.change(root, register={"approval": True})
    monkeypatch.chdir(root)
    monkeypatch.setenv(STARTED_BY, "Grace")
    monkeypatch.setattr("erase.STAGES", STAGES[-2:])
    monkeypatch.setattr(dvc, "status", lambda root: {})
    monkeypatch.setattr(dvc, "reproduce", lambda stage, *_: False)
    monkeypatch.setattr(dvc, "perform", lambda stage, *_: register.run(Settings.load()))
    setup("process", [], [])
    prefect(server, root, "--no-prompt", "deploy", "--name", "chain")
    try:
        with get_client(sync_client=True) as client:
            yield Run(client)
    finally:
        cleared()


def aliases() -> dict[str, str]:
    return registry_of(Settings.load()).aliases()


def test_no_process_waits_and_an_answer_is_void_where_the_candidate_was_made_anew(run: Run) -> None:
    run.lives()
    assert aliases() == {CHALLENGER: "1"}
    first = run.asks_about

    machines.change(Path(), gate=finished.passing(limit=-4.0))
    gate.run(Settings.load())
    run.answered(ADA)
    run.lives()
    assert aliases() == {CHALLENGER: "2"}, "Ada has seen the first, and nobody the second"
    assert run.asks_about != first

    run.answered(ADA | {"reason": "looked at both"})
    assert run.lives().decision == "approve"
    assert run.state.is_completed()
    assert aliases() == {CHAMPION: "2"}
    entries = ledger.read(Settings.load().register_.ledger).entries
    decided = [(e.event, e.version, e.why) for e in entries if e.who == "Ada"]
    assert decided == [("approval", "2", "looked at both"), ("promotion", "2", "looked at both")]


def test_who_is_late_or_may_not_decide_is_asked_again_and_an_answer_outlives_a_lost_process(run: Run) -> None:
    run.lives()
    first = run.asks_about
    run.ends(Failed(message="The flow was paused and never resumed."))  # as a server says after `approval_seconds`
    run.begins_again()
    run.lives()
    assert run.asks_about == first

    run.answered(ADA | {"approver": "grace"})
    with pytest.raises(DataError, match=r"another person has to approve it\nNext: deleatur approve 1 --as NAME"):
        run.lives()
    assert run.state.is_failed()

    run.begins_again()
    run.lives()
    assert (run.asks_about, aliases()) == (first, {CHALLENGER: "1"})
    run.answered(ADA)
    run.ends(Crashed(name="Lost"))
    machines.awaited(lambda: run.state.name == "AwaitingRetry", "another life, which the server gives")
    assert run.lives().decision == "approve"
    assert aliases() == {CHAMPION: "1"}
