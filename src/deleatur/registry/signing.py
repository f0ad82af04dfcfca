"""Which files a version has, by digest, and who says so: an in-toto statement in a DSSE envelope.

Signed with a key in a file (PEM; Ed25519, ECDSA, RSA), without a network. Whoever knows the public key checks it, with
any tool that reads these two formats. Without a key the statement is there all the same, with nobody's signature.

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
from deleatur.registry.safe_files import demand_plain

KEY, PASSWORD = "DELEATUR_SIGNING_KEY", "DELEATUR_SIGNING_PASSWORD"
"""Environment variables: path of the private key, and its password if it has one."""
MAKE = (
    "openssl genpkey -algorithm ed25519 -out release.pem && openssl pkey -in release.pem -pubout -out release.pub.pem"
)

PAYLOAD = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:deleatur:release:v1"
NOBODY = "nobody"
"""Who signed what is unsigned."""


@dataclass(frozen=True)
class Keys:
    signer: CryptoSigner | None
    """Who signs here."""
    trusted: tuple[Key, ...]
    """Whose word counts. None: no key is configured, and unsigned versions are let through."""

    @classmethod
    def load(cls, trusted: Iterable[Path]) -> Keys:
        """The public keys named and, where the environment names a private one, that one too.

        Raises SettingsError where a file holds no such key.
        """
        known = [_public(path) for path in trusted]
        if not (place := os.environ.get(KEY)):
            return cls(None, tuple(known))
        signer = _private(Path(place))
        if known and signer.public_key.keyid not in {key.keyid for key in known}:
            raise SettingsError(
                f"the key of {KEY} is none of register.trusted_keys: nobody would trust what it signs",
                hint=f"openssl pkey -in {place} -pubout -out release.pub.pem, and name that there",
            )
        return cls(signer, tuple(known) or (signer.public_key,))

    def demand_signer(self) -> None:
        """Raises SettingsError where versions have to be signed, and there is nothing to sign with."""
        if self.trusted and self.signer is None:
            raise SettingsError(
                f"register.trusted_keys wants versions signed, and {KEY} names no key", hint=f"export {KEY}=release.pem"
            )


@dataclass(frozen=True)
class Statement:
    """What is said of a version's files."""

    digest: str
    """SHA-256 of what was signed."""
    files: Mapping[str, str]
    """Place below the model's folder → SHA-256."""
    says: Mapping[str, str]
    """What the version is: the digests of its evidence and all it rests on."""
    signed_by: str
    """Id of the key, or nobody."""

    def demand(self, folder: Path, part: str = "") -> None:
        """Raises ModelError unless the folder, which is this part of the model, holds these files and no others, each
        as it was, and none that could run.
        """
        prefix = f"{part}/" if part else ""
        wanted = {name.removeprefix(prefix): d for name, d in self.files.items() if name.startswith(prefix)}
        found = {name: path for name, path in _files(folder) if prefix or not name.startswith(UNSIGNED)}
        for name in sorted(wanted.keys() | found.keys()):
            if name not in found:
                raise _changed(folder / name, "is missing")
            if name not in wanted:
                raise _changed(folder / name, "was added")
            if _sha256(found[name]) != wanted[name]:
                raise _changed(folder / name, "is not what was signed" if self.signed else "was changed")
            demand_plain(found[name])

    @property
    def signed(self) -> bool:
        return self.signed_by != NOBODY


PLACE = "artifacts/statement"
NAME = "statement.json"
UNSIGNED = (f"{PLACE}/", "registered_model_meta")
"""What comes into the folder later: the statement itself, and a note that MLflow leaves when it loads the model."""


def seal(folder: Path, says: Mapping[str, str], keys: Keys) -> tuple[bytes, Statement]:
    """The envelope of a statement about all files of a folder. Raises ModelError where one of them could run."""
    files = {}
    for name, path in _files(folder):
        if not name.startswith(UNSIGNED):
            demand_plain(path)
            files[name] = _sha256(path)
    payload = _json(
        {
            "_type": STATEMENT,
            "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in files.items()],
            "predicateType": PREDICATE,
            "predicate": dict(says),
        }
    )
    envelope = Envelope(payload, PAYLOAD, {})
    if keys.signer:
        envelope.sign(keys.signer)
    by = keys.signer.public_key.keyid if keys.signer else NOBODY
    return _json(envelope.to_dict()), Statement(hashlib.sha256(payload).hexdigest(), files, says, by)


def read(path: Path, keys: Keys) -> Statement | None:
    """The statement, if the signature is one of a trusted key; None where there is none, and none is asked for.

    Raises ModelError where there is no signature that counts, and one is asked for.
    """
    if not path.is_file():
        if keys.trusted:
            raise ModelError(f"{path}: expected the signature of a version, and there is none", hint=UNTRUSTED)
        return None
    try:
        envelope = Envelope.from_dict(json.loads(path.read_bytes()))
        by = next(iter(envelope.verify(list(keys.trusted), 1))) if keys.trusted else NOBODY
        told: dict[str, Any] = json.loads(envelope.payload)
        files = {subject["name"]: subject["digest"]["sha256"] for subject in told["subject"]}
        kind = (envelope.payload_type, told["_type"], told["predicateType"])
        says = {str(k): str(v) for k, v in told["predicate"].items()}
    except VerificationError as e:
        raise ModelError(f"{path}: no key of register.trusted_keys has signed this version", hint=UNTRUSTED) from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ModelError(f"{path} is no statement about a version's files: {e!r}", hint=UNTRUSTED) from e
    if kind != (PAYLOAD, STATEMENT, PREDICATE):
        raise ModelError(f"{path} is a statement about something else: {kind}", hint=UNTRUSTED)
    return Statement(hashlib.sha256(envelope.payload).hexdigest(), files, says, by)


UNTRUSTED = "deleatur history (who made this version); deleatur quarantine VERSION --as NAME --reason WHY"


def _public(path: Path) -> SSlibKey:
    try:
        return SSlibKey.from_crypto(load_pem_public_key(path.read_bytes()))
    except (OSError, ValueError, UnsupportedAlgorithm) as e:
        raise SettingsError(f"{path} is no public key in PEM: {e}", hint=MAKE) from e


def _private(path: Path) -> CryptoSigner:
    password = os.environ.get(PASSWORD)
    try:
        key = load_pem_private_key(path.read_bytes(), password.encode() if password else None)
        return CryptoSigner(key)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise SettingsError(f"{KEY}={path} is no private key in PEM: {e}", hint=MAKE) from e


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _changed(path: Path, how: str) -> ModelError:
    return ModelError(f"{path} {how}: the version is not loaded", hint=UNTRUSTED)
