"""Runs, versions and aliases in MLflow, and its errors."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from registry import empty_store
from safetensors.torch import save_file

from deleatur.errors import DataError, ServiceError, SettingsError
from deleatur.registry import mlflow_client, mlflow_registry
from deleatur.registry.ledger import LedgerPosition
from deleatur.registry.mlflow_registry import CHALLENGER, CHAMPION, LAST_KNOWN_GOOD, QUARANTINED, Registry
from deleatur.registry.mlflow_runs import Evidence
from deleatur.registry.model_files import local_folder
from deleatur.registry.signing import Keys


@pytest.fixture
def registry(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store(shared), tmp_path / "mlflow.db")
    return Registry(f"sqlite:///{tmp_path}/mlflow.db", "erasing", "guard")


@pytest.fixture
def evidence(tmp_path: Path) -> Evidence:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("{}")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    (tmp_path / "delta").mkdir()
    save_file({"w": torch.ones(3)}, tmp_path / "delta" / "delta.safetensors")
    return Evidence(
        digest="e" * 64,
        name="sdd weapon",
        tags={"outcome": "pass", "delta": "d" * 64},
        summary="PASS: weapon 0.97 → 0.03",
        settings={"erase": {"lr": 1e-3, "train": ["a", "b"]}, "seed": 42, "word": "<x>"},
        scores={"concept_rate/concept/candidate": 0.1},
        curves=[("erase/loss", step, 1 / step) for step in range(1, 1502)],  # exceeds one request
        files={"report": tmp_path / "report", "lock": tmp_path / "none"},
        feedback=pd.DataFrame({"answer": ["yes", "no"], "seed": [1, 2]}),
        feedback_digest="f" * 64,
        feedback_source="feedback/answers.parquet",
    )


DOWNLOAD = """The following failures occurred while downloading one or more artifacts from models:/m-1:
##### File delta/delta.safetensors #####
{cause}"""


def test_failed_download_names_its_cause(tmp_path: Path) -> None:
    def fail(cause: str) -> None:
        with mlflow_client.translated_errors("sqlite:///mlflow.db", target=tmp_path):
            raise MlflowException(DOWNLOAD.format(cause=cause))

    with pytest.raises(OSError, match="No space left") as full:
        fail("[Errno 28] No space left on device")
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(tmp_path))
    with pytest.raises(ServiceError, match="downloading one or more artifacts from models:/m-1: timed out"):
        fail("timed out")


def add(registry: Registry, evidence: Evidence) -> str:
    place = Path.cwd()
    with registry.runs.recording(evidence) as run_id:
        return registry.add_version(run_id, evidence, place / "pipeline", place / "delta", "about", Keys(None, ()))


def test_run_holds_settings_scores_curves_files_and_lineage(registry: Registry, evidence: Evidence) -> None:
    assert not registry.runs.finished(evidence.digest)
    for _ in range(2):  # the second time as after a kill: nothing is duplicated
        with registry.runs.recording(evidence) as run_id:
            registry.runs.log(run_id, evidence)
    assert registry.runs.finished(evidence.digest)
    [run] = registry.client.search_runs([registry.runs.experiment_id])
    assert run.data.params == {"erase.lr": "0.001", "erase.train": '["a", "b"]', "seed": "42", "word": "<x>"}
    assert run.data.metrics["concept_rate/concept/candidate"] == 0.1
    curve = registry.client.get_metric_history(run.info.run_id, "erase/loss")
    assert [(m.step, m.value) for m in sorted(curve, key=lambda m: m.step)] == [(s, 1 / s) for s in range(1, 1502)]
    assert run.data.tags["deleatur.evidence"] == evidence.digest
    assert [f.path for f in registry.client.list_artifacts(run.info.run_id)] == ["report"]
    [dataset_input] = run.inputs.dataset_inputs
    assert (dataset_input.dataset.name, dataset_input.dataset.digest) == ("feedback", "f" * 36)


def test_logged_files_and_settings_have_no_credentials(registry: Registry, evidence: Evidence, tmp_path: Path) -> None:
    address = "postgresql://me:PW@host/db"
    path = tmp_path / "params.yaml"
    path.write_text(f"register:\n  tracking_uri: {address}\n", "utf-8")
    evidence = replace(evidence, curves=(), settings={"base": {"model": address}}, files={"params": path})
    with registry.runs.recording(evidence) as run_id:
        registry.runs.log(run_id, evidence)
        logged = Path(registry.client.download_artifacts(run_id, "params/params.yaml", str(tmp_path / "logged")))
    assert logged.read_text("utf-8") == "register:\n  tracking_uri: postgresql://***@host/db\n"
    assert registry.client.get_run(run_id).data.params == {"base.model": "postgresql://***@host/db"}
    assert "PW" in path.read_text("utf-8")


def test_failed_run_is_resumed(registry: Registry, evidence: Evidence) -> None:
    with pytest.raises(ZeroDivisionError), registry.runs.recording(evidence):
        raise ZeroDivisionError
    assert not registry.runs.finished(evidence.digest)
    with registry.runs.recording(evidence):
        pass
    assert registry.runs.finished(evidence.digest)
    assert len(registry.client.search_runs([registry.runs.experiment_id])) == 1


def test_version_is_found_by_evidence_and_its_files_by_address(registry: Registry, evidence: Evidence) -> None:
    assert registry.version(evidence.digest) is None
    version = add(registry, evidence)
    assert registry.version(evidence.digest) == version
    assert registry.tags(version)["delta"] == "d" * 64
    assert registry.client.get_model_version("guard", version).tags == {"outcome": "pass"}
    registry.client.set_model_version_tag("guard", version, "outcome", "edited")
    assert registry.tags(version)["outcome"] == "pass", "a version's tags are copies for people"
    registry.set_aliases({CHAMPION: version})
    for address in (f"models:/guard/{version}", "models:/guard@champion"):
        stored = Path(local_folder(address, "delta")) / "delta.safetensors"
        assert stored.read_bytes() == Path("delta/delta.safetensors").read_bytes()
        assert (Path(local_folder(address)) / "model_index.json").is_file()
    with pytest.raises(DataError, match="no such model"):
        local_folder("models:/guard@nobody")


def test_disposable_runs_are_found_on_all_pages(
    registry: Registry, evidence: Evidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_client, "PAGE_SIZE", 1)
    add(registry, evidence)
    for name in ("one", "two"):
        run = registry.client.create_run(registry.runs.experiment_id, run_name=name)
        registry.client.set_terminated(run.info.run_id, "FAILED", end_time=1000)
    registry.client.create_run(registry.runs.experiment_id, run_name="at work")
    assert sorted(registry.disposable_runs(before=2.0).values()) == ["one", "two"]
    assert sorted(registry.disposable_runs(before=2e9).values()) == ["one", "two"], "runs of versions stay"


def test_aliases_and_ledger_position_are_set(registry: Registry, evidence: Evidence) -> None:
    assert (registry.aliases(), registry.alias(CHAMPION), registry.ledger_position()) == ({}, None, None), (
        "no model yet"
    )
    registry.set_ledger_position(LedgerPosition(1, "a" * 64))
    first, second = (add(registry, replace(evidence, digest=letter * 64)) for letter in "ab")
    assert registry.aliases() == {}, "adding a version sets no alias"
    registry.client.set_registered_model_alias("guard", "theirs", first)
    for wanted in (
        {CHAMPION: first, CHALLENGER: second},
        {CHAMPION: second, LAST_KNOWN_GOOD: first},
        {QUARANTINED: second},
    ):
        for _ in range(2):  # the second time changes nothing
            registry.set_aliases(wanted)
            assert registry.aliases() == wanted
    assert registry.client.get_model_version_by_alias("guard", "theirs").version == int(first)
    registry.set_ledger_position(LedgerPosition(2, "b" * 64))
    assert registry.ledger_position() == LedgerPosition(2, "b" * 64)


def test_errors_of_a_store_hide_passwords(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    unreachable = Registry("http://me:secret@127.0.0.1:9", "erasing", "guard")
    with pytest.raises(ServiceError, match="MLflow at http") as refused:
        unreachable.runs.finished("e" * 64)
    assert "127.0.0.1:9" in str(refused.value)
    assert "secret" not in str(refused.value)
    assert refused.value.hint
    with pytest.raises(SettingsError, match="register"):
        Registry(registry.uri, "erasing", "with/slash").set_ledger_position(LedgerPosition(1, "a" * 64))


@pytest.mark.slow
def test_mlflow_prints_nothing(tmp_path: Path) -> None:
    code = (
        "from deleatur.registry.mlflow_registry import Registry\n"
        "from deleatur.registry.mlflow_runs import Evidence\n"
        "r = Registry('sqlite:///mlflow.db', 'erasing', 'guard')\n"
        "e = Evidence('e' * 64, 'name', {}, {'a': 1})\n"
        "with r.runs.recording(e) as run_id: r.runs.log(run_id, e)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")


def test_model_signature_matches_model_code() -> None:
    names = [c.name for c in mlflow_registry.MODEL_SIGNATURE.inputs.inputs]
    assert names == ["prompt", "seed"]
    assert {p.name for p in mlflow_registry.MODEL_SIGNATURE.params.params} == {"steps", "guidance"}
