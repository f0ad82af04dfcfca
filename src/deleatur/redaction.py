"""Removes credentials from texts that leave the process: errors, logs, artifacts, backups, flow parameters."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

MASK = "***"
MIN_SECRET_LENGTH = 16
"""Shorter values of environment variables may be ordinary words of a message."""

# Linear on any text: no pattern searches further from a place where another one has begun.
_URL = re.compile(r"(?<=://)[^\s'\"<>]+")
_PARAMETER = re.compile(r"(?<![\w-])([\w-]+)=")
_VALUE = re.compile(r"'[^']*'|\"[^\"]*\"|[^&;\s'\"<>]+")
_SECRET_PARAMETER = re.compile(
    r"password|passwd|pwd|secret|token|signature|credential|api_?key|access_?key|account_?key|^(sig|key|auth)$",
    re.IGNORECASE,
)
_DSN_PARAMETERS = frozenset({"password", "passwd", "pwd", "sslpassword"})
"""Of connection strings like host=db password=secret, whose parameters are separated by spaces."""
_CONFIG = re.compile(
    r"^([ \t]*['\"]?(?:secret_access_key|access_key_id|session_token|sas_token|account_key|connection_string|"
    r"client_secret|api_key|password|authorization)['\"]?[ \t]*[:=]\s*)\S.*$",
    re.IGNORECASE | re.MULTILINE,
)
_AWS_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")
_SECRET_VARIABLE = re.compile(r"PASSWORD|SECRET|TOKEN|API_KEY|AUTH_STRING")


def redact(text: str) -> str:
    """The text without user names and passwords in URLs, secret query parameters and keys of S3.

    postgresql://me:secret@host/db → postgresql://***@host/db. A text without credentials is returned unchanged.
    """
    for name, value in os.environ.items() if len(text) >= MIN_SECRET_LENGTH else ():
        if _SECRET_VARIABLE.search(name) and len(value) >= MIN_SECRET_LENGTH and not os.path.exists(value):
            text = text.replace(value, MASK)
    text = _URL.sub(lambda match: _without_userinfo(match[0]), text)
    text = _mask_parameters(text)
    return _AWS_KEY_ID.sub(MASK, _CONFIG.sub(rf"\1{MASK}", text))


@contextmanager
def redacted_file(path: Path) -> Iterator[Path]:
    """The file or, where its text has credentials, a copy without them under the same name."""
    text = path.read_text("utf-8", errors="surrogateescape")
    if (redacted := redact(text)) == text:
        yield path
        return
    with TemporaryDirectory(prefix="deleatur-") as folder:
        copy = Path(folder) / path.name
        copy.write_text(redacted, "utf-8", errors="surrogateescape")
        yield copy


def _mask_parameters(text: str) -> str:
    parts, end = list[str](), 0
    for match in _PARAMETER.finditer(text):
        if match.start() >= end and _is_secret(match) and (value := _VALUE.match(text, match.end())):
            parts += [text[end : match.end()], MASK]
            end = value.end()
    return "".join([*parts, text[end:]])


def _is_secret(parameter: re.Match[str]) -> bool:
    in_url = parameter.string[max(parameter.start() - 1, 0) : parameter.start()] in ("?", "&", ";")
    return bool(_SECRET_PARAMETER.search(parameter[1])) if in_url else parameter[1].lower() in _DSN_PARAMETERS


def _without_userinfo(url: str) -> str:
    """A URL from behind its scheme. Passwords may contain / and @ that are not quoted, so the last @ ends them."""
    authority = re.split(r"[/?#]", url, maxsplit=1)[0]
    port = authority.partition(":")[2]
    has_userinfo = "@" in authority or ("@" in url and port and not port.isdigit())
    return f"{MASK}@{url.rpartition('@')[2]}" if has_userinfo else url
