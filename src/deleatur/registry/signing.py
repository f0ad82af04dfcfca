"""Signed statements of a version's files: their SHA-256 digests as an in-toto statement in a DSSE envelope.

Signed offline with a key from a file (PEM; Ed25519, ECDSA, RSA). Anyone with the public key can check a signature, with
any tool that reads these two formats. Without a key, the statement is stored unsigned.

    https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
    https://github.com/secure-systems-lab/dsse/blob/master/envelope.md
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, Key, SSlibKey

from deleatur.errors import ModelError, SettingsError
from deleatur.registry.safe_files import require_safe_file

KEY_VARIABLE, PASSWORD_VARIABLE = "DELEATUR_SIGNING_KEY", "DELEATUR_SIGNING_PASSWORD"
"""Environment variables: path of the private key, and its password."""
MAKE_KEY_COMMAND = (
    "openssl genpkey -algorithm ed25519 -out release.pem && openssl pkey -in release.pem -pubout -out release.pub.pem"
)

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:deleatur:release:v1"
UNSIGNED = "nobody"
"""`signed_by` of an unsigned statement."""

STATEMENT_FOLDER = "artifacts/statement"
STATEMENT_FILE = "statement.json"
EXCLUDED = (f"{STATEMENT_FOLDER}/", "registered_model_meta")
"""Files that a statement does not cover, because they are added later: the statement itself, and a file that MLflow
writes when it loads the model."""

UNTRUSTED_HINT = "deleatur history (who made this version); deleatur quarantine VERSION --as NAME --reason WHY"


@dataclass(frozen=True)
class Keys:
    signer: CryptoSigner | None
    """Signs new versions."""
    trusted: tuple[Key, ...]
    """Public keys whose signatures are accepted. Empty: unsigned versions are accepted."""

    @classmethod
    def load(cls, trusted: Iterable[Path]) -> Keys:
        """Reads the public keys, and the private key that the environment names.

        Raises SettingsError if a file is not a key in PEM.
        """
        public_keys = [_load_public_key(path) for path in trusted]
        if not (private_key_path := os.environ.get(KEY_VARIABLE)):
            return cls(None, tuple(public_keys))
        signer = _load_private_key(Path(private_key_path))
        if public_keys and signer.public_key.keyid not in {key.keyid for key in public_keys}:
            raise SettingsError(
                f"the key of {KEY_VARIABLE} is none of register.trusted_keys: its signatures would not be accepted",
                hint=f"openssl pkey -in {private_key_path} -pubout -out release.pub.pem, and list that file there",
            )
        return cls(signer, tuple(public_keys) or (signer.public_key,))

    def require_signer(self) -> None:
        """Raises SettingsError if versions have to be signed, and no private key is configured."""
        if self.trusted and self.signer is None:
            raise SettingsError(
                f"register.trusted_keys requires signed versions, and {KEY_VARIABLE} names no key",
                hint=f"export {KEY_VARIABLE}=release.pem",
            )


@dataclass(frozen=True)
class Statement:
    """The files of a version, by digest."""

    digest: str
    """SHA-256 of the signed payload."""
    files: Mapping[str, str]
    """Path relative to the model's folder → SHA-256."""
    predicate: Mapping[str, str]
    """Digests of the version's evidence and of its inputs."""
    signed_by: str
    """Id of the key, or UNSIGNED."""

    def verify_files(self, folder: Path, part: str = "") -> None:
        """Raises ModelError unless the folder, which is this part of the model, holds exactly these files, unchanged,
        and none that could execute code when it is loaded.
        """
        prefix = f"{part}/" if part else ""
        expected = {name.removeprefix(prefix): d for name, d in self.files.items() if name.startswith(prefix)}
        actual = {name: path for name, path in _files(folder) if prefix or not name.startswith(EXCLUDED)}
        for name in sorted(expected.keys() | actual.keys()):
            if name not in actual:
                raise _mismatch(folder / name, "is missing")
            if name not in expected:
                raise _mismatch(folder / name, "was added")
            if _sha256(actual[name]) != expected[name]:
                raise _mismatch(folder / name, "is not the file that was signed" if self.signed else "was changed")
            require_safe_file(actual[name])

    @property
    def signed(self) -> bool:
        return self.signed_by != UNSIGNED


def create_statement(folder: Path, predicate: Mapping[str, str], keys: Keys) -> tuple[bytes, Statement]:
    """Creates the envelope and statement of a folder's files. Raises ModelError if a file could execute code."""
    files = {}
    for name, path in _files(folder):
        if not name.startswith(EXCLUDED):
            require_safe_file(path)
            files[name] = _sha256(path)
    payload = _json(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in files.items()],
            "predicateType": PREDICATE_TYPE,
            "predicate": dict(predicate),
        }
    )
    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    if keys.signer:
        envelope.sign(keys.signer)
    signer = keys.signer.public_key.keyid if keys.signer else UNSIGNED
    return _json(envelope.to_dict()), Statement(hashlib.sha256(payload).hexdigest(), files, predicate, signer)


def read_statement(path: Path, keys: Keys) -> Statement | None:
    """Reads a statement and verifies its signature; None if the file is missing and no key is configured.

    Raises ModelError if a key is configured and no trusted key has signed.
    """
    if not path.is_file():
        if keys.trusted:
            raise ModelError(f"{path}: expected the signature of a version, but it is missing", hint=UNTRUSTED_HINT)
        return None
    try:
        envelope = Envelope.from_dict(json.loads(path.read_bytes()))
        signer = next(iter(envelope.verify(list(keys.trusted), 1))) if keys.trusted else UNSIGNED
        payload: dict[str, Any] = json.loads(envelope.payload)
        files = {subject["name"]: subject["digest"]["sha256"] for subject in payload["subject"]}
        types = (envelope.payload_type, payload["_type"], payload["predicateType"])
        predicate = {str(k): str(v) for k, v in payload["predicate"].items()}
    except VerificationError as e:
        raise ModelError(f"{path}: no key of register.trusted_keys has signed this version", hint=UNTRUSTED_HINT) from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ModelError(f"{path} is not a statement of a version's files: {e!r}", hint=UNTRUSTED_HINT) from e
    if types != (PAYLOAD_TYPE, STATEMENT_TYPE, PREDICATE_TYPE):
        raise ModelError(f"{path} is a statement of another type: {types}", hint=UNTRUSTED_HINT)
    return Statement(hashlib.sha256(envelope.payload).hexdigest(), files, predicate, signer)


def _load_public_key(path: Path) -> SSlibKey:
    try:
        return SSlibKey.from_crypto(load_pem_public_key(path.read_bytes()))
    except (OSError, ValueError, UnsupportedAlgorithm) as e:
        raise SettingsError(f"{path} is not a public key in PEM: {e}", hint=MAKE_KEY_COMMAND) from e


def _load_private_key(path: Path) -> CryptoSigner:
    password = os.environ.get(PASSWORD_VARIABLE)
    try:
        key = load_pem_private_key(path.read_bytes(), password.encode() if password else None)
        return CryptoSigner(key)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise SettingsError(f"{KEY_VARIABLE}={path} is not a private key in PEM: {e}", hint=MAKE_KEY_COMMAND) from e


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _mismatch(path: Path, difference: str) -> ModelError:
    return ModelError(f"{path} {difference}: the version is not loaded", hint=UNTRUSTED_HINT)
