"""Stages that load networks hold a GPU slot; other stages do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]

from prefect import flow  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402

from deleatur.storage import dvc  # noqa: E402

CHAIN: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "dvc.yaml").read_text("utf-8"))["stages"]


def active_slots() -> int:
    with get_client(sync_client=True) as client:
        return client.read_global_concurrency_limit_by_name("gpu").active_slots


def test_a_stage_that_loads_networks_holds_the_slot_while_it_runs(
    one_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tasks

    in_use: dict[str, int] = {}
    after: list[int] = []

    def looking(stage: str, *_: Any) -> bool:
        in_use[stage] = active_slots()
        return True

    monkeypatch.setattr(dvc, "reproduce", looking)

    @flow
    def chain() -> None:
        for stage in CHAIN:
            tasks.reproduce(stage)
            after.append(active_slots())

    chain()
    assert in_use == {stage: int("${paths.models}" in CHAIN[stage]["deps"]) for stage in CHAIN}
    assert in_use["evaluate"] == 1
    assert in_use["ingest"] == 0
    assert after == [0] * len(CHAIN), "released"


def test_a_failing_stage_releases_the_slot(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import tasks

    from deleatur.errors import ErasureRefused

    def refused(stage: str, *_: Any) -> bool:
        assert active_slots() == 1
        raise ErasureRefused("nothing was erased")

    monkeypatch.setattr(dvc, "reproduce", refused)

    @flow
    def one() -> None:
        tasks.reproduce("erase")

    with pytest.raises(ErasureRefused):
        one()
    assert active_slots() == 0
