"""Markdown for MLflow, Prefect and model cards, in which text from outside stays text, without credentials."""

from __future__ import annotations

import re
from html import escape

from markupsafe import Markup

from deleatur.redaction import redact


def escape_markdown(text: object) -> str:
    """The text on one line, as it stands: no markup, HTML, link or image. `commands` between backticks are code.

    Markup, which is made here and nowhere else, is returned as it is.
    """
    if isinstance(text, Markup):
        return text
    parts = re.split(r"`([^`]+)`", _one_line(text))
    return "".join(code(part) if i % 2 else _escape(part) for i, part in enumerate(parts))


def code(text: object) -> Markup:
    """The text as a code span, also in a table."""
    line = _one_line(text).replace("`", "'").replace("|", r"\|")
    return Markup(f"`{line}`")


def _one_line(text: object) -> str:
    return " ".join(redact(str(text)).split())


def _escape(text: str) -> str:
    inline = re.sub(r"([\\`*\[\]!|~])", r"\\\1", escape(text, quote=False))
    words = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", inline)  # between letters it is no emphasis
    # At the beginning of a block: headings, quotations, lists and rules.
    return re.sub(r"^(\d*)([#+=.)-])(?!\d)", r"\1\\\2", words)
