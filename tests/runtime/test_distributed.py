"""Images sampled and evaluated in worker processes are bit-identical to those of this process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import finished
import pytest
from child_processes import CONTEXT

from deleatur import stages
from deleatur.config.sections import WorkersSection
from deleatur.config.settings import Settings
from deleatur.errors import ModelError, ServiceError, SettingsError
from deleatur.evaluation import cache, predictions
from deleatur.runtime import distributed, models
from deleatur.stages import sample

pytestmark = pytest.mark.slow

FOLDERS = ("out/samples", "out/scores", "out/report")


@pytest.fixture(scope="module")
def root(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished project, as the current directory, without samples."""
    pytest.importorskip("distributed", reason="pip install 'deleatur[dask]'")
    root = tmp_path_factory.mktemp("distributed")
    finished.copy(shared, root)
    with chdir(root):
        yield root


def files() -> dict[str, bytes]:
    return {str(p): p.read_bytes() for folder in FOLDERS for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_two_processes_give_the_files_of_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dask.config

    before = files()
    for folder in FOLDERS:
        shutil.rmtree(folder)
    monkeypatch.setattr(sample, "_sample_shard", None)  # not in this process; workers import their own
    monkeypatch.setattr(cache, "SHARD_SIZE", 16)
    # Workers are forks of a process that has imported torch. By default each imports it itself.
    monkeypatch.setitem(
        dask.config.config["distributed"]["worker"], "multiprocessing-method", CONTEXT.get_start_method()
    )
    settings = Settings.load().model_copy(update={"workers": WorkersSection(dask=2)})
    stages.run("sample", settings)
    stages.run("evaluate", settings)
    monkeypatch.setattr(cache, "SHARD_SIZE", 128)
    stages.run("evaluate", Settings.load())  # in shards as before: nothing is evaluated again
    assert files() == before


def test_another_model_on_a_worker_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.load()
    [config] = [
        config
        for variant, config in sample.sampling_configs(settings, models.base_model(settings)).items()
        if variant == "base"
    ]
    other = sample.replace(config, recipe=sample.replace(config.recipe, pipeline="0" * 64))
    with pytest.raises(ModelError, match="is another model on"):
        sample.sample_on_worker((settings, other), [])
    with pytest.raises(ModelError, match="judge is another network on"):
        predictions.predict_on_worker((settings, "judge", "0" * 64), [])


def test_a_scheduler_that_does_not_answer_is_a_service(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "TIMEOUT", 1.0)
    with (
        pytest.raises(ServiceError, match=r"tcp://127\.0\.0\.1:9 did not answer"),
        distributed.dask_client(WorkersSection(dask="tcp://127.0.0.1:9")),
    ):
        pass


def test_without_dask_the_error_has_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SettingsError) as raised, distributed.dask_client(WorkersSection(dask=2)):
        pass
    assert raised.value.hint == "pip install 'deleatur[dask]'"
