"""What was signed is what is loaded: another byte, file or key is refused, and so is whatever could run."""

from __future__ import annotations

import base64
import json
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deleatur.errors import ModelError, SettingsError
from deleatur.registry import signing
from deleatur.registry.safe_files import demand_plain
from deleatur.registry.signing import KEY, Keys

SAYS = {"evidence": "e" * 64, "delta": "d" * 64}


def key(name: str, *more: str) -> tuple[Path, Path]:
    """A key pair as people make one."""
    private, public = Path(f"{name}.pem"), Path(f"{name}.pub.pem")
    if not private.exists():
        subprocess.run(
            ["openssl", "genpkey", "-quiet", "-out", private, *(more or ("-algorithm", "ed25519"))], check=True
        )
        subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stored model, as the current directory has it."""
    monkeypatch.chdir(tmp_path)
    folder = Path("model")
    (folder / "artifacts" / "pipeline" / "unet").mkdir(parents=True)
    save_file({"w": torch.ones(3)}, folder / "artifacts" / "pipeline" / "unet" / "w.safetensors")
    (folder / "artifacts" / "pipeline" / "model_index.json").write_text("{}")
    (folder / "MLmodel").write_text("flavors: {}\n")
    return folder


def sealed(model: Path, keys: Keys) -> signing.Statement:
    envelope, statement = signing.seal(model, SAYS, keys)
    (model / signing.PLACE).mkdir(parents=True, exist_ok=True)
    (model / signing.PLACE / signing.NAME).write_bytes(envelope)
    return statement


def opened(model: Path, *trusted: Path) -> signing.Statement:
    found = signing.read(model / signing.PLACE / signing.NAME, Keys.load(trusted))
    assert found is not None
    found.demand(model)
    found.demand(model / "artifacts" / "pipeline", "artifacts/pipeline")
    return found


def test_what_was_signed_is_what_is_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = key("release")
    with pytest.raises(SettingsError, match="names no key"):
        Keys.load([public]).demand_signer()
    monkeypatch.setenv(KEY, str(private))
    said = sealed(model, Keys.load([public]))
    assert sorted(said.files) == [
        "MLmodel",
        "artifacts/pipeline/model_index.json",
        "artifacts/pipeline/unet/w.safetensors",
    ]
    monkeypatch.delenv(KEY)
    (model / "registered_model_meta").write_text("left by MLflow when it loads")
    assert opened(model, public) == said
    assert (said.says, said.signed_by) == (SAYS, Keys.load([public]).trusted[0].keyid)


def test_openssl_alone_can_check_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formats are the published ones: payload type and payload with their lengths, and a plain signature."""
    private, public = key("release")
    monkeypatch.setenv(KEY, str(private))
    sealed(model, Keys.load([public]))
    envelope = json.loads((model / signing.PLACE / signing.NAME).read_bytes())
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"].encode()
    Path("signed").write_bytes(b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload))
    Path("signature").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", "signed"]
    subprocess.run([*command, "-sigfile", "signature"], check=True, capture_output=True)
    told = json.loads(payload)
    sha256 = subprocess.run(
        ["sha256sum", model / "MLmodel"], check=True, capture_output=True, text=True
    ).stdout.split()[0]
    assert {"name": "MLmodel", "digest": {"sha256": sha256}} in told["subject"]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


WEIGHTS = Path("artifacts/pipeline/unet/w.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: _flip(m / WEIGHTS), "w.safetensors is not what was signed"),
        (lambda m: (m / "MLmodel").write_text("flavors: {python_function: evil}\n"), "MLmodel is not what was signed"),
        (lambda m: (m / WEIGHTS).unlink(), "is missing"),
        (lambda m: (m / "artifacts" / "pipeline" / "more.py").write_text(""), "was added"),
        (lambda m: (m / signing.PLACE / signing.NAME).unlink(), "there is none"),
        (lambda m: (m / signing.PLACE / signing.NAME).write_text("{}"), "no statement"),
        (lambda m: sealed(m, Keys(None, ())), "no key"),
        (lambda m: sealed(m, Keys.load([key("stranger")[1]])), "no key"),
    ],
)
def test_what_was_changed_is_not_read(
    model: Path, change: Callable[[Path], object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = key("release")
    monkeypatch.setenv(KEY, str(private))
    sealed(model, Keys.load([public]))
    assert opened(model, public)
    monkeypatch.setenv(KEY, str(key("stranger")[0]))  # whoever changes it has a key, and not ours
    change(model)
    monkeypatch.delenv(KEY)
    with pytest.raises(ModelError, match=said):
        opened(model, public)


def test_a_payload_under_another_payloads_signature_is_not_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = key("release")
    monkeypatch.setenv(KEY, str(private))
    sealed(model, Keys.load([public]))
    place = model / signing.PLACE / signing.NAME
    envelope = json.loads(place.read_bytes())
    _flip(model / WEIGHTS)
    forged = json.loads(signing.seal(model, SAYS, Keys(None, ()))[0])
    place.write_text(json.dumps(envelope | {"payload": forged["payload"]}))
    with pytest.raises(ModelError, match="no key"):
        opened(model, public)


def test_without_a_key_it_is_unsigned_and_changes_are_found_all_the_same(model: Path) -> None:
    said = sealed(model, Keys.load([]))
    assert (opened(model).signed, said.signed_by) == (False, "nobody")
    _flip(model / WEIGHTS)
    with pytest.raises(ModelError, match="was changed"):
        opened(model)


@pytest.mark.parametrize("kind", [("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"), ("-algorithm", "RSA")])
def test_other_keys_and_several_of_them_sign_too(
    model: Path, kind: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = key("other", *kind)
    old = key("old")[1]
    monkeypatch.setenv(KEY, str(private))
    sealed(model, Keys.load([old, public]))
    monkeypatch.delenv(KEY)
    assert opened(model, old, public).signed, "as while keys are changed"


def test_keys_that_are_none_are_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = key("release")
    for bad in (private, Path("none.pem")):
        with pytest.raises(SettingsError, match="no public key") as refused:
            Keys.load([bad])
        assert "openssl genpkey" in refused.value.hint
    monkeypatch.setenv(KEY, str(public))
    with pytest.raises(SettingsError, match="no private key"):
        Keys.load([])
    monkeypatch.setenv(KEY, str(key("stranger")[0]))
    with pytest.raises(SettingsError, match=r"none of register\.trusted_keys"):
        Keys.load([public])


def test_the_command_of_the_hint_makes_a_key(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(signing.MAKE, shell=True, check=True, capture_output=True)
    monkeypatch.setenv(KEY, "release.pem")
    assert Keys.load([Path("release.pub.pem")]).signer is not None


@pytest.mark.parametrize("name", ["w.safetensors", "w.json", "w.bin", "w.txt"])
def test_what_could_run_is_refused_whatever_its_name(model: Path, name: str) -> None:
    folder = model / "artifacts"
    torch.save({"w": torch.ones(3)}, folder / "torch")
    (folder / "pickle").write_bytes(pickle.dumps({"w": [1.0]}))
    for made in ("torch", "pickle"):
        shutil.move(folder / made, folder / name)
        with pytest.raises(ModelError, match="not loaded"):
            demand_plain(folder / name)
        with pytest.raises(ModelError, match="not loaded"):
            signing.seal(model, SAYS, Keys(None, ()))
