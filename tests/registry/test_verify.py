"""A registered version is loaded only as it was evaluated and signed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import finished
import pytest
import torch
from registry import change_tags
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from deleatur.cli import app
from deleatur.config.settings import Settings
from deleatur.errors import ModelError, SettingsError
from deleatur.registry import ledger, model_files
from deleatur.registry.decisions import open_registry, without_ledger
from deleatur.registry.signing import KEY_VARIABLE, Keys, create_statement
from deleatur.runtime import models
from deleatur.stages import gate, register, sample
from deleatur.storage import dvc, tensors


@pytest.fixture
def signing(done: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A finished project that signs what it registers."""
    monkeypatch.setattr(dvc, "status", lambda root: {})  # takes seconds
    subprocess.run(["openssl", "genpkey", "-quiet", "-algorithm", "ed25519", "-out", "release.pem"], check=True)
    subprocess.run(["openssl", "pkey", "-in", "release.pem", "-pubout", "-out", "release.pub.pem"], check=True)
    monkeypatch.setenv(KEY_VARIABLE, "release.pem")
    params = Path("params.yaml")
    text = params.read_text("utf-8").replace("trusted_keys: []", "trusted_keys: [release.pub.pem]")
    params.write_text(text, "utf-8")
    return Settings.load()


def register_with_limit(settings: Settings, limit: float) -> None:
    plain = settings.model_dump(mode="json", by_alias=True) | {"gate": finished.passing_policy(limit=limit)}
    changed = Settings.model_validate(plain)
    gate.run(changed)
    register.run(changed)


def run_cli(*command: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(command))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def _replace_weights(version: Path) -> None:
    path = version / "artifacts" / "delta" / tensors.DELTA_FILE
    changed = {n: t + 1 for n, t in load_file(path).items()}
    with path.open("rb") as f:  # the same header: it loads, and nothing but its digest tells
        head = f.read(8)
        metadata = json.loads(f.read(int.from_bytes(head, "little")))["__metadata__"]
    save_file(changed, path, metadata=metadata)
    unet = version / "artifacts" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({n: torch.zeros_like(t) for n, t in load_file(unet).items()}, unet, metadata={"format": "pt"})


def _delete_signature(version: Path) -> None:
    (version / "artifacts" / "statement" / "statement.json").unlink()


@pytest.mark.parametrize(
    ("change", "problem"),
    [(_replace_weights, "is not the file that was signed"), (_delete_signature, "is missing")],
)
def test_changed_version_is_refused_by_every_command(
    signing: Settings, change: Callable[[Path], None], problem: str
) -> None:
    register_with_limit(signing, -5.0)
    register_with_limit(signing, -6.0)
    tags = open_registry(signing).tags("1")
    assert len(tags["signed_by"]) == 64
    assert run_cli("verify", "1") == (
        0,
        f"Version 1: {len(json.loads(run_cli('verify', '1', '--json')[1])['files'])} files are as evaluated "
        f"Verdict: pass, signed by {tags['signed_by'][:12]}",
    )
    entries = ledger.read(signing.register_.ledger).entries
    assert f"signed by {tags['signed_by'][:12]}" in entries[0].reason
    assert entries[0].files == tags["files"]
    assert run_cli("export", "before", "--version", "1")[0] == 0
    against = signing.model_copy(
        update={"sample": signing.sample.model_copy(update={"champion": "models:/deleatur/1"})}
    )
    sample.run(against)

    change(Path(model_files.local_folder("models:/deleatur/1", "delta")).parents[1])
    for work in (
        lambda: sample.run(against),
        lambda: models.local_path(signing, "models:/deleatur/1"),
        lambda: models.local_path(signing, "models:/deleatur/1", "delta"),
    ):
        with pytest.raises(ModelError, match=problem):
            work()
    for command in (
        ("verify", "1"),
        ("export", "after", "--version", "1"),
        ("rollback", "--as", "Ada", "--reason", "seen in the wild"),
    ):
        code, text = run_cli(*command)
        assert (code, problem in text, "Next: " in text) == (4, True, True)
    assert not Path("after").exists()
    assert open_registry(signing).alias("champion") == "2"
    assert models.local_path(signing, "models:/deleatur/2"), "the other version still loads"


def _delete_statement(statement: Path, _: Path) -> None:
    statement.unlink()


def _rewrite_statement(statement: Path, _: Path) -> None:
    envelope, _ = create_statement(statement.parents[2], {"outcome": "pass"}, Keys(None, ()))
    statement.write_bytes(envelope)


def _swap_versions(statement: Path, other: Path) -> None:
    shutil.rmtree(statement.parents[2])
    shutil.copytree(other.parents[2], statement.parents[2])


CHANGES = (
    (_delete_statement, "is missing", "restore"),
    (_rewrite_statement, "is not the statement that the registry records", "quarantine"),
    (_swap_versions, "is not the statement that the registry records", "quarantine"),
)


@pytest.mark.parametrize("keys", ["signed", "unsigned"])
def test_every_load_compares_the_statement_with_registry_and_ledger(
    signing: Settings, keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = signing
    if keys == "unsigned":
        monkeypatch.delenv(KEY_VARIABLE)
        params = Path("params.yaml")
        params.write_text(params.read_text("utf-8").replace("[release.pub.pem]", "[]"), "utf-8")
        settings = Settings.load()
    register_with_limit(settings, -5.0)
    register_with_limit(settings, -6.0)
    based = settings.model_copy(update={"base": settings.base.model_copy(update={"model": "models:/deleatur/2"})})
    first, second = (
        Path(model_files.local_folder(f"models:/deleatur/{v}", "statement")) / "statement.json" for v in "12"
    )
    model = second.parents[2]
    shutil.copytree(model, "intact")
    # A rewritten statement of a signed version is refused for its signature.
    for change, message, advice in CHANGES if keys == "unsigned" else (CHANGES[0], CHANGES[2]):
        change(second, first)
        for command in (("verify", "2"), ("export", "after", "--version", "2")):
            code, text = run_cli(*command)
            assert (code, message in text, advice in text.partition("Next: ")[2]) == (4, True, True), text
        assert not Path("after").exists()
        for address in ("models:/deleatur/2", "models:/deleatur@champion", f"models:/{model.parent.name}"):
            for part in ("pipeline", "delta"):
                with pytest.raises(ModelError, match=message):
                    models.local_path(settings, address, part)
        with pytest.raises(ModelError, match=message):
            models.base_model(based)
        assert models.local_path(settings, "models:/deleatur/1"), "the other version still loads"
        shutil.rmtree(model)
        shutil.copytree("intact", model)
        assert models.local_path(settings, "models:/deleatur/2")


def test_every_load_verifies_all_files_of_the_version(signing: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE)
    params = Path("params.yaml")
    params.write_text(params.read_text("utf-8").replace("[release.pub.pem]", "[]"), "utf-8")
    settings = Settings.load()
    register_with_limit(settings, -5.0)
    model = model_files.local_model("models:/deleatur/1")
    shutil.copytree(model, "intact")
    for name, problem in {
        "MLmodel": "was changed",
        "artifacts/delta/delta.safetensors": "was changed",
        "artifacts/pipeline/model_index.json": "was changed",
        "loader.py": "was added",
        "artifacts/delta/pytorch_model.bin": "was added",
    }.items():
        with (model / name).open("a") as file:
            file.write("# changed\n")
        for command in (("verify", "1"), ("export", "after", "--version", "1")):
            code, text = run_cli(*command)
            assert (code, f"{name} {problem}" in text, "Next: " in text) == (4, True, True), text
        assert not list(Path().glob("*after*"))
        for part in ("pipeline", "delta"):
            with pytest.raises(ModelError, match=problem):
                models.local_path(settings, "models:/deleatur/1", part)
        shutil.rmtree(model)
        shutil.copytree("intact", model)
    assert run_cli("export", "after", "--version", "1")[0] == 0


def test_tags_that_were_changed_too_are_detected_by_the_ledger(
    signing: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_with_limit(signing, -5.0)
    register_with_limit(signing, -6.0)
    registry = open_registry(signing)
    first, second = (Path(model_files.local_folder(f"models:/deleatur/{v}", "statement")) for v in "12")
    _swap_versions(second / "statement.json", first / "statement.json")
    change_tags(signing, "2", files=registry.tags("1")["files"])
    with pytest.raises(ModelError, match="line 3 of the ledger"):
        models.local_path(signing, "models:/deleatur/2")


def test_lost_ledger_is_reported_by_every_command(signing: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    register_with_limit(signing, -5.0)
    signing.register_.ledger.unlink()
    for command in (
        ("history",),
        ("verify", "1"),
        ("export", "out1", "--version", "1"),
        ("canary", "--dry-run"),
        ("emergency", "weapon", "--as", "Ada", "--reason", "seen"),
        ("rollback", "--as", "Ada", "--reason", "seen"),
    ):
        code, text = run_cli(*command)
        assert (code, "lines were removed or changed" in text, "settle --adopt" in text) == (3, True, True), text
    code, text = run_cli("doctor")
    assert (code, text.count("lines were removed or changed")) == (1, 2), text
    with without_ledger():  # a worker never has one
        assert models.local_path(signing, "models:/deleatur/1")


def test_missing_files_are_not_called_changed(signing: Settings) -> None:
    register_with_limit(signing, -5.0)
    mlruns = Path("mlruns")
    mlruns.rename("elsewhere")
    code, text = run_cli("verify", "1")
    assert (code, "is missing" in text, "quarantine" in text) == (4, True, False), text
    Path("elsewhere").rename(mlruns)
    assert run_cli("verify", "1")[0] == 0


def test_nothing_is_registered_without_the_key(signing: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(SettingsError, match="names no key"):
        register.run(signing)
    assert open_registry(signing).aliases() == {}
    monkeypatch.setenv(KEY_VARIABLE, "release.pem")
    register.run(signing)
    assert open_registry(signing).aliases() == {"champion": "1"}


def test_without_keys_versions_are_reported_unsigned(signing: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE)
    params = Path("params.yaml")
    params.write_text(params.read_text("utf-8").replace("[release.pub.pem]", "[]"), "utf-8")
    unsigned = Settings.load()
    register.run(unsigned)
    assert open_registry(unsigned).tags("1")["signed_by"] == "nobody"
    assert "unsigned" in run_cli("history")[1]
    assert run_cli("verify", "1")[1].endswith("Verdict: pass, unsigned")
    assert "unsigned" in run_cli("export", "out1", "--version", "1")[1]
    with pytest.raises(ModelError, match="no key"):
        models.local_path(signing, "models:/deleatur/1")
    _replace_weights(Path(model_files.local_folder("models:/deleatur/1", "delta")).parents[1])
    code, output = run_cli("verify", "1")
    assert (code, "was changed" in output) == (4, True), "the statement holds the digests unsigned as well"
