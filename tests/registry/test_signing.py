"""Signed statements: changed bytes, files and keys are refused, and so is executable content."""

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
from deleatur.registry.safe_files import require_safe_file
from deleatur.registry.signing import KEY_VARIABLE, Keys

PREDICATE = {"evidence": "e" * 64, "delta": "d" * 64}


def make_key(name: str, *more: str) -> tuple[Path, Path]:
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


def sign(model: Path, keys: Keys) -> signing.Statement:
    envelope, statement = signing.create_statement(model, PREDICATE, keys)
    (model / signing.STATEMENT_FOLDER).mkdir(parents=True, exist_ok=True)
    (model / signing.STATEMENT_FOLDER / signing.STATEMENT_FILE).write_bytes(envelope)
    return statement


def verify(model: Path, *trusted: Path) -> signing.Statement:
    statement = signing.read_statement(model / signing.STATEMENT_FOLDER / signing.STATEMENT_FILE, Keys.load(trusted))
    assert statement is not None
    statement.verify_files(model)
    statement.verify_files(model / "artifacts" / "pipeline", "artifacts/pipeline")
    return statement


def test_signed_statement_round_trip(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = make_key("release")
    with pytest.raises(SettingsError, match="names no key"):
        Keys.load([public]).require_signer()
    monkeypatch.setenv(KEY_VARIABLE, str(private))
    statement = sign(model, Keys.load([public]))
    assert sorted(statement.files) == [
        "MLmodel",
        "artifacts/pipeline/model_index.json",
        "artifacts/pipeline/unet/w.safetensors",
    ]
    monkeypatch.delenv(KEY_VARIABLE)
    (model / "registered_model_meta").write_text("left by MLflow when it loads")
    assert verify(model, public) == statement
    assert (statement.predicate, statement.signed_by) == (PREDICATE, Keys.load([public]).trusted[0].keyid)


def test_openssl_verifies_the_signature(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formats are the published ones: payload type and payload with their lengths, and a plain signature."""
    private, public = make_key("release")
    monkeypatch.setenv(KEY_VARIABLE, str(private))
    sign(model, Keys.load([public]))
    envelope = json.loads((model / signing.STATEMENT_FOLDER / signing.STATEMENT_FILE).read_bytes())
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"].encode()
    Path("signed").write_bytes(b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload))
    Path("signature").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", "signed"]
    subprocess.run([*command, "-sigfile", "signature"], check=True, capture_output=True)
    statement = json.loads(payload)
    sha256 = subprocess.run(
        ["sha256sum", model / "MLmodel"], check=True, capture_output=True, text=True
    ).stdout.split()[0]
    assert {"name": "MLmodel", "digest": {"sha256": sha256}} in statement["subject"]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


WEIGHTS = Path("artifacts/pipeline/unet/w.safetensors")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: _flip(m / WEIGHTS), "w.safetensors is not the file that was signed"),
        (
            lambda m: (m / "MLmodel").write_text("flavors: {python_function: evil}\n"),
            "MLmodel is not the file that was signed",
        ),
        (lambda m: (m / WEIGHTS).unlink(), "is missing"),
        (lambda m: (m / "artifacts" / "pipeline" / "more.py").write_text(""), "was added"),
        (lambda m: (m / signing.STATEMENT_FOLDER / signing.STATEMENT_FILE).unlink(), "it is missing"),
        (lambda m: (m / signing.STATEMENT_FOLDER / signing.STATEMENT_FILE).write_text("{}"), "not a statement"),
        (lambda m: sign(m, Keys(None, ())), "no key"),
        (lambda m: sign(m, Keys.load([make_key("stranger")[1]])), "no key"),
    ],
)
def test_changed_model_is_refused(
    model: Path, change: Callable[[Path], object], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = make_key("release")
    monkeypatch.setenv(KEY_VARIABLE, str(private))
    sign(model, Keys.load([public]))
    assert verify(model, public)
    monkeypatch.setenv(KEY_VARIABLE, str(make_key("stranger")[0]))  # the attacker has a key that is not trusted
    change(model)
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(ModelError, match=problem):
        verify(model, public)


def test_signature_of_another_payload_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = make_key("release")
    monkeypatch.setenv(KEY_VARIABLE, str(private))
    sign(model, Keys.load([public]))
    place = model / signing.STATEMENT_FOLDER / signing.STATEMENT_FILE
    envelope = json.loads(place.read_bytes())
    _flip(model / WEIGHTS)
    forged = json.loads(signing.create_statement(model, PREDICATE, Keys(None, ()))[0])
    place.write_text(json.dumps(envelope | {"payload": forged["payload"]}))
    with pytest.raises(ModelError, match="no key"):
        verify(model, public)


def test_unsigned_statement_still_detects_changes(model: Path) -> None:
    statement = sign(model, Keys.load([]))
    assert (verify(model).signed, statement.signed_by) == (False, "nobody")
    _flip(model / WEIGHTS)
    with pytest.raises(ModelError, match="was changed"):
        verify(model)


@pytest.mark.parametrize("kind", [("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"), ("-algorithm", "RSA")])
def test_ecdsa_rsa_and_several_trusted_keys(
    model: Path, kind: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = make_key("other", *kind)
    old = make_key("old")[1]
    monkeypatch.setenv(KEY_VARIABLE, str(private))
    sign(model, Keys.load([old, public]))
    monkeypatch.delenv(KEY_VARIABLE)
    assert verify(model, old, public).signed, "as while keys are changed"


def test_invalid_keys_are_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = make_key("release")
    for bad in (private, Path("none.pem")):
        with pytest.raises(SettingsError, match="not a public key") as refused:
            Keys.load([bad])
        assert "openssl genpkey" in refused.value.hint
    monkeypatch.setenv(KEY_VARIABLE, str(public))
    with pytest.raises(SettingsError, match="not a private key"):
        Keys.load([])
    monkeypatch.setenv(KEY_VARIABLE, str(make_key("stranger")[0]))
    with pytest.raises(SettingsError, match=r"none of register\.trusted_keys"):
        Keys.load([public])


def test_command_in_the_hint_creates_a_key(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(signing.MAKE_KEY_COMMAND, shell=True, check=True, capture_output=True)
    monkeypatch.setenv(KEY_VARIABLE, "release.pem")
    assert Keys.load([Path("release.pub.pem")]).signer is not None


@pytest.mark.parametrize("name", ["w.safetensors", "w.json", "w.bin", "w.txt"])
def test_executable_content_is_refused_under_any_name(model: Path, name: str) -> None:
    folder = model / "artifacts"
    torch.save({"w": torch.ones(3)}, folder / "torch")
    (folder / "pickle").write_bytes(pickle.dumps({"w": [1.0]}))
    for source in ("torch", "pickle"):
        shutil.move(folder / source, folder / name)
        with pytest.raises(ModelError, match="not loaded"):
            require_safe_file(folder / name)
        with pytest.raises(ModelError, match="not loaded"):
            signing.create_statement(model, PREDICATE, Keys(None, ()))
