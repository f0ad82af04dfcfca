"""Checkpoints of long training loops: interrupted anywhere, a loop resumes, and ends with the same bits.

A checkpoint is one file, `paths.checkpoints`/NAME.safetensors: the state of the loop and the identity of its run. It is
written atomically, and apart from the stage's outputs, which DVC removes before it runs a stage.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor

from deleatur.config.settings import Settings
from deleatur.diffusion.clip import Clip
from deleatur.diffusion.model import Model, digest_module
from deleatur.errors import DataError, ErasureRefused, Interrupted, SettingsError
from deleatur.runtime import event_log
from deleatur.storage import tensors
from deleatur.training.optimizer_state import SavedState

MAX_OVERHEAD = 0.01
"""Share of the time that saving may take: a checkpoint that takes a second is written every hundred seconds."""

LIBRARIES = ("torch", "diffusers", "transformers")
"""Libraries whose next version may round differently."""


def interval(settings: Settings) -> float:
    """Seconds between two checkpoints, which is what a `kill -9` costs at most."""
    return settings.workers.checkpoint_interval


class Checkpointable(Protocol):
    """The state of a loop: all that the next step depends on."""

    step: int

    def tensors(self) -> dict[str, Tensor]: ...
    def metadata(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class _Metadata:
    identity: dict[str, dict[str, Any]]
    progress: str
    """JSON of the loop's own metadata."""


class Checkpoint:
    """The checkpoint of one loop of a stage. `state` is what to resume from, or None.

    Used as a context around the loop, which calls it after every step. Inside, the first Ctrl-C or SIGTERM lets the
    step end, saves and raises Interrupted; a second one does not wait. A refused erasure leaves no checkpoint; after
    any other end it stays until `remove`, which is called when the stage's output is complete.
    """

    def __init__(self, settings: Settings, stage: str, name: str, identity: Mapping[str, Any]) -> None:
        self.path = settings.paths.checkpoints / f"{name}.safetensors"
        self._stage, self._identity = stage, json.loads(json.dumps(identity))
        self._interrupted = False
        self._newest: Checkpointable | None = None
        self._interval = interval(settings)
        self._due = time.monotonic() + self._interval
        self._steps = self.path.with_suffix(".steps")
        self.state = self._load()
        self._log_lost_steps()

    def __call__(self, state: Checkpointable) -> None:
        self._newest = state
        os.pwrite(self._counter, b"%d\n" % state.step, 0)  # steps only grow, so no digit of an older one remains
        if self._interrupted:
            self._stop(state)
        if time.monotonic() >= self._due:
            self._save(state)

    def __enter__(self) -> Checkpoint:
        main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGINT, signal.SIGTERM) if main else ()
        handled = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores them
        self._previous = {number: signal.signal(number, self._interrupt) for number in handled}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._counter = os.open(self._steps, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._counter)
        if isinstance(error, ErasureRefused):
            self.remove()
        if error is None and self._interrupted and self._newest:
            self._stop(self._newest)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._steps.unlink(missing_ok=True)
        for partial in self.path.parent.glob(f".{self.path.name}.*.partial"):  # of a process killed while it wrote
            partial.unlink()

    def _interrupt(self, *_: object) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True

    def _stop(self, state: Checkpointable) -> None:
        self._save(state)
        raise Interrupted(
            f"{self._stage} was interrupted and saved a checkpoint after step {state.step}",
            hint="the same command, to resume",
        )

    def _save(self, state: Checkpointable) -> None:
        start = time.monotonic()
        progress = json.dumps(state.metadata())  # as text, so that keys keep their order
        tensors.save(self.path, state.tensors(), {"identity": self._identity, "progress": progress})
        now = time.monotonic()
        self._due = now + max(self._interval, (now - start) / MAX_OVERHEAD)

    def _log_lost_steps(self) -> None:
        """The step counter is on disk after every step, a checkpoint more seldom: steps between them are repeated."""
        if self._steps.is_file():
            done = int(self._steps.read_text() or 0)
            saved = self.state[1]["step"] if self.state else 0
            event_log.append(self.path.parent, self._stage, "resumed", lost=max(0, done - saved))

    def _load(self) -> SavedState | None:
        """Raises SettingsError, naming what differs, when the file is the checkpoint of another run."""
        if not self.path.is_file():
            return None
        try:
            saved, metadata = tensors.load(self.path, _Metadata)
        except DataError as e:
            raise DataError(f"{self.path} cannot be read as a checkpoint", hint=f"rm {self.path}") from e
        progress = json.loads(metadata.progress)
        if changes := list(_changes(metadata.identity, self._identity)):
            lines = "".join(f"\n  {change}" for change in changes)
            raise SettingsError(
                f"{self._stage} was interrupted after step {progress['step']}, and has changed since:{lines}\n"
                "Undo the change to resume, or remove the checkpoint to start again.",
                hint=f"rm {self.path}",
            )
        print(f"{self._stage} resumes after step {progress['step']}", file=sys.stderr)
        return saved, progress


def run_identity(
    settings: Settings,
    *,
    sections: Iterable[str],
    code: Mapping[str, str],
    model: Model,
    clip: Clip,
    content: Mapping[str, str],
) -> dict[str, Any]:
    """Everything that can change a loop's result: settings by value, networks, inputs and code by digest.

    sections: dotted names in params.yaml. code: digests of `dependencies`. content: name of an input → digest.
    """
    networks = {
        "UNet of base.model": model.unet_digest,
        "text encoder of base.model": model.text_encoder_digest,
        "VAE of base.model": digest_module(model.vae),
        "network reward.clip": clip.digest,
    }
    return {
        "settings": {dotted: _at(settings, dotted) for dotted in sections},
        "content": networks | dict(content),
        "code": dict(code),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _at(value: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        value = value[key] if isinstance(value, Mapping) else getattr(value, key)
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """One line for each thing that differs."""
    before, after = (dict(_flat("", identity.get("settings", {}))) for identity in (saved, now))
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            yield f"{name}: it was {json.dumps(before.get(name))}, now it is {json.dumps(after.get(name))}"
    for kind, what in (("content", "its content"), ("code", "its code"), ("versions", "its version")):
        for name in sorted(saved.get(kind, {}).keys() | now[kind].keys()):
            if saved.get(kind, {}).get(name) != now[kind].get(name):
                yield f"{name}: {what}"


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flat(f"{prefix}.{key}" if prefix else key, inner)
