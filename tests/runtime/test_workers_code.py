"""A Dask worker whose code differs from that of the process that starts the run computes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from deleatur import dependencies
from deleatur.detectors.classifier import Classifier
from deleatur.errors import SettingsError
from deleatur.evaluation.predictions import predict_on_worker
from deleatur.guides.cfg import CFG
from deleatur.runtime import distributed
from deleatur.stages.sample import sample_on_worker


def double(shared: int, batch: int) -> int:
    return shared * batch


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Of a worker in this process."""
    dask = pytest.importorskip("distributed", reason="pip install 'deleatur[dask]'")
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": "127.0.0.1:0"}
    with dask.LocalCluster(**options) as cluster, dask.Client(cluster) as client:
        yield client


def codes(monkeypatch: pytest.MonkeyPatch, *answers: dict[str, str]) -> None:
    """The code of this process, then of the worker."""
    remaining = iter(answers)
    monkeypatch.setattr(distributed, "code_of", lambda *entries: next(remaining))


def test_the_same_code_runs(client: Any) -> None:
    results = dict(distributed.map_batches(client, double, 2, [1, 2, 3], int))
    assert results == {1: 2, 2: 4, 3: 6}


@pytest.mark.parametrize(
    "worker", [{"a": "1", "b": "3", "torch": "2.0"}, {"a": "1"}, {"a": "1", "b": "2", "torch": "3"}]
)
def test_another_code_is_refused(client: Any, worker: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    codes(monkeypatch, here := {"a": "1", "b": "2", "torch": "2.0"}, worker)
    differing = ", ".join(name for name in here if worker.get(name) != here[name])
    with pytest.raises(SettingsError, match=f"has another {differing}$") as raised:
        list(distributed.map_batches(client, double, 2, [1], int))
    assert raised.value.hint == distributed.SAME_CODE_HINT


def test_a_definition_that_the_worker_lacks_is_refused(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(shared: int, batch: int) -> int:
        raise ImportError("cannot import name 'new' from 'deleatur'")

    codes(monkeypatch, {}, {})
    with pytest.raises(SettingsError, match="cannot import name 'new'"):
        list(distributed.map_batches(client, lacks, 2, [1], int))


@pytest.mark.parametrize(
    ("entries", "module"),
    [
        ((sample_on_worker, CFG), "deleatur.diffusion.sample"),
        ((sample_on_worker, CFG), "deleatur.guides.cfg"),
        ((predict_on_worker, Classifier), "deleatur.detectors.classifier"),
    ],
)
def test_the_code_has_the_stage_its_plug_ins_and_the_libraries(
    entries: tuple[Any, ...], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = distributed.code_of(*entries)
    assert {*distributed.LIBRARIES} <= before.keys()
    assert "+" not in before["torch"], "builds for other devices have the same version"
    path = dependencies.PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    other = dependencies._Sources(dependencies.PACKAGE, {path: f"{path.read_text('utf-8')}\nlen('changed')\n"})
    monkeypatch.setattr(dependencies, "_RUNNING", other)
    after = distributed.code_of.__wrapped__(*entries)
    assert {name for name in before if before[name] != after.get(name)} == {module}
