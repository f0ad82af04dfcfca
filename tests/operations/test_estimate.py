"""Estimates of the chain, compared with its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import network_calls
import pytest
import workspace

from deleatur import stages
from deleatur.diffusion import architecture
from deleatur.operations import estimate
from deleatur.training.cost import Workload, estimate_cost

CHAIN = ("ingest", "reward", "invert", "erase", "attack", "sample")
LAST = {"eval_every": 6, "max_preserved_drop": 9.0}
"""One evaluation after the first, at the end: nothing stops before."""
SFD: dict[str, Any] = {
    "erase": {
        "method": "sfd",
        "source": "words",
        "sfd": {"training": {"iterations": 6, "batch_size": 2, "lr": 1e-4, **LAST}},
    },
    "attack": {"methods": {}},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sdd", "sfd"])
def test_every_stage_uses_the_estimated_number_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.chdir(tmp_path)
    params = workspace.small_params(tmp_path)
    params["erase"]["sdd"]["training"] |= LAST
    settings = workspace.create(tmp_path, **params | (SFD if method == "sfd" else {}))
    estimated, measured = {line.name: line.cost.workload for line in estimate.chain_estimates(settings)}, {}
    for name in CHAIN:
        with network_calls.rows() as measured[name]:
            stages.run(name, settings)
    for name, work in estimated.items():
        assert measured[name]["backward"] == work.backward, name
        tolerance = 0.2 if name == "erase" else 0  # trajectories end at random steps
        assert measured[name]["forward"] == pytest.approx(work.forward, rel=tolerance), name


def test_times_state_their_range() -> None:
    cost = estimate_cost(Workload(), architecture.stable_diffusion())
    assert estimate.Estimate("erase", "sdd", cost, 7300.0, 7250.0, 7400.0).time == "2 h"
    assert estimate.Estimate("erase", "sdd", cost, 7300.0, 3700.0, 15000.0).time == "2 h (62 min–4 h)"
    assert estimate.Estimate("erase", "sdd", cost).time == ""
