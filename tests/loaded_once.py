"""Networks are loaded from equal files once per process: stages on the tiny model spend half of their time on loading
the same networks. They are frozen, so stages and tests may share them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from deleatur.detectors.classifier import Classifier
from deleatur.diffusion import clip, model
from deleatur.runtime import models

LOADED: dict[Hashable, Any] = {}


def install(patch: pytest.MonkeyPatch) -> None:
    """For the stages. Tests of loading itself import the functions from the modules that define them."""
    for name, load in (("load", model.load), ("load_clip", clip.load_clip)):
        patch.setattr(models, name, _once(load, lambda path: (path, ())))
    patch.setattr(Classifier, "load", _once(Classifier.load, lambda c: (c.path, (c.batch_size, c.device))))


def _once(load: Callable[..., Any], identify: Callable[[Any], tuple[str, Hashable]]) -> Callable[..., Any]:
    """identify: the first argument → folder to load, and whatever else the result depends on."""

    @wraps(load)
    def loaded(source: Any, *args: Any, **options: Any) -> Any:
        folder, rest = identify(source)
        try:
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            content = tuple((path.relative_to(folder), hashlib.sha256(path.read_bytes()).digest()) for path in files)
        except OSError:
            content = ()
        key = (load.__qualname__, content, rest, args, *options.items())
        if not content or key not in LOADED:
            LOADED[key] = load(source, *args, **options)
        return LOADED[key]

    return loaded
