"""The Jinja environment of the HTML pages. What they share is in base.html, macros.html, page.css and page.js."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from io import BytesIO
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from PIL import Image

from deleatur.diffusion.rgb import to_rgb
from deleatur.storage.images import encode

FOLDER = Path(__file__).parent
SCRIPT = (FOLDER / "page.js").read_text("utf-8")
MAX_PNG_SIZE = 128
"""Pixels of a side up to which an image is embedded without loss."""


def load_template(path: Path) -> Template:
    """A page's template, which may extend base.html."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader([path.parent, FOLDER]),
    )
    environment.filters |= {"number": _number, "data_uri": _data_uri, "code": _code}
    # The only script that the content security policy lets run.
    environment.globals |= {
        "script": Markup(SCRIPT),
        "script_digest": b64encode(sha256(SCRIPT.encode()).digest()).decode(),
    }
    return environment.get_template(path.name)


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _data_uri(image: Image.Image) -> str:
    """Small images as PNG, large ones as WebP at a visually lossless quality."""
    if max(image.size) <= MAX_PNG_SIZE:
        return "data:image/png;base64," + b64encode(encode(image)).decode()
    buffer = BytesIO()
    to_rgb(image).save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + b64encode(buffer.getvalue()).decode()


def _code(text: str) -> Markup:
    """`commands` between backticks become <code>; all else is escaped."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
