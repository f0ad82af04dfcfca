"""A registered version is loaded only as it was judged and signed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import finished
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from deleatur.cli import app
from deleatur.config.settings import Settings
from deleatur.errors import ModelError, SettingsError
from deleatur.registry import ledger, mlflow_client
from deleatur.registry.decisions import registry_of
from deleatur.registry.signing import KEY
from deleatur.runtime import models
from deleatur.stages import gate, register, sample
from deleatur.storage import dvc, tensors


@pytest.fixture
def signing(done: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A finished project that signs what it registers."""
    monkeypatch.setattr(dvc, "status", lambda root: {})  # it takes seconds to ask DVC
    subprocess.run(["openssl", "genpkey", "-quiet", "-algorithm", "ed25519", "-out", "release.pem"], check=True)
    subprocess.run(["openssl", "pkey", "-in", "release.pem", "-pubout", "-out", "release.pub.pem"], check=True)
    monkeypatch.setenv(KEY, "release.pem")
    params = Path("params.yaml")
    text = params.read_text("utf-8").replace("trusted_keys: []", "trusted_keys: [release.pub.pem]")
    params.write_text(text, "utf-8")
    return Settings.load()


def registered(settings: Settings, limit: float) -> None:
    plain = settings.model_dump(mode="json", by_alias=True) | {"gate": finished.passing(limit=limit)}
    changed = Settings.model_validate(plain)
    gate.run(changed)
    register.run(changed)


def told(*command: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(command))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def _other_weights(version: Path) -> None:
    path = version / "artifacts" / "delta" / tensors.DELTA_FILE
    changed = {n: t + 1 for n, t in load_file(path).items()}
    with path.open("rb") as f:  # the same header: it loads, and nothing but its digest tells
        head = f.read(8)
        metadata = json.loads(f.read(int.from_bytes(head, "little")))["__metadata__"]
    save_file(changed, path, metadata=metadata)
    unet = version / "artifacts" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({n: torch.zeros_like(t) for n, t in load_file(unet).items()}, unet, metadata={"format": "pt"})


def _no_signature(version: Path) -> None:
    (version / "artifacts" / "statement" / "statement.json").unlink()


@pytest.mark.parametrize(
    ("change", "said"), [(_other_weights, "is not what was signed"), (_no_signature, "and there is none")]
)
def test_a_version_that_was_changed_is_not_loaded_by_anybody(
    signing: Settings, change: Callable[[Path], None], said: str
) -> None:
    registered(signing, -5.0)
    registered(signing, -6.0)
    tags = registry_of(signing).tags("1")
    assert len(tags["signed_by"]) == 64
    assert told("verify", "1") == (
        0,
        f"Version 1: {len(json.loads(told('verify', '1', '--json')[1])['files'])} files are as they were judged "
        f"Verdict: pass, signed by {tags['signed_by'][:12]}",
    )
    entries = ledger.read(signing.register_.ledger).entries
    assert f"signed by {tags['signed_by'][:12]}" in entries[0].why
    assert entries[0].files == tags["files"]
    assert told("export", "before", "--version", "1")[0] == 0
    against = signing.model_copy(
        update={"sample": signing.sample.model_copy(update={"champion": "models:/deleatur/1"})}
    )
    sample.run(against)

    change(Path(mlflow_client.local("models:/deleatur/1", "delta")).parents[1])
    for work in (
        lambda: sample.run(against),
        lambda: models.local_path(signing, "models:/deleatur/1"),
        lambda: models.local_path(signing, "models:/deleatur/1", "delta"),
    ):
        with pytest.raises(ModelError, match=said):
            work()
    for command in (
        ("verify", "1"),
        ("export", "after", "--version", "1"),
        ("rollback", "--as", "Ada", "--reason", "seen in the wild"),
    ):
        code, text = told(*command)
        assert (code, said in text, "Next: " in text) == (4, True, True)
    assert not Path("after").exists()
    assert registry_of(signing).alias("champion") == "2"
    assert models.local_path(signing, "models:/deleatur/2"), "the other one is as it was"


def test_without_the_key_nothing_is_registered(signing: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY)
    with pytest.raises(SettingsError, match="names no key"):
        register.run(signing)
    assert registry_of(signing).aliases() == {}
    monkeypatch.setenv(KEY, "release.pem")
    register.run(signing)
    assert registry_of(signing).aliases() == {"champion": "1"}


def test_where_no_key_is_configured_everything_says_unsigned(
    signing: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY)
    params = Path("params.yaml")
    params.write_text(params.read_text("utf-8").replace("[release.pub.pem]", "[]"), "utf-8")
    unsigned = Settings.load()
    register.run(unsigned)
    assert registry_of(unsigned).tags("1")["signed_by"] == "nobody"
    assert "unsigned" in told("history")[1]
    assert told("verify", "1")[1].endswith("Verdict: pass, unsigned")
    assert "unsigned" in told("export", "out1", "--version", "1")[1]
    with pytest.raises(ModelError, match="no key"):
        models.local_path(signing, "models:/deleatur/1")
    _other_weights(Path(mlflow_client.local("models:/deleatur/1", "delta")).parents[1])
    code, said = told("verify", "1")
    assert (code, "was changed" in said) == (4, True), "the ledger knows the files all the same"
