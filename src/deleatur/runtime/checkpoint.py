"""What a long loop saves as it goes: killed anywhere and started again, it goes on, and ends with the same bits.

A checkpoint is one file, `paths.state`/NAME.safetensors: the state of the loop, and what it belongs to. It is written
whole or not at all. It lies apart from what the stage writes, which DVC removes before it runs a stage.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor

from deleatur.config.settings import Settings
from deleatur.diffusion.clip import Clip
from deleatur.diffusion.model import Model, fingerprint
from deleatur.errors import ContinueMe, DataError, ErasureRefused, SettingsError
from deleatur.runtime import event_log
from deleatur.storage import tensors
from deleatur.training.optimizer_state import Saved

SHARE = 0.01
"""Of the time may go into saving: where it takes a second, it is done every hundred seconds."""

LIBRARIES = ("torch", "diffusers", "transformers")
"""Those whose next version may round differently."""


def every(settings: Settings) -> float:
    """Seconds from one save to the next: what a `kill -9` costs at most."""
    return settings.workers.save_every


class State(Protocol):
    step: int

    def tensors(self) -> dict[str, Tensor]: ...
    def numbers(self) -> dict[str, Any]: ...


class Checkpoint:
    """The saved state of one loop of a stage. `state` is where to go on, if there is anything.

    Used as a context around the loop, which calls it after every step. Inside, the first Ctrl-C or SIGTERM lets the
    step end, saves and raises ContinueMe; a second one does not wait. An erasure that is refused leaves nothing to go
    on with; all else stays until `remove`, which is for when the stage's output is complete.
    """

    def __init__(self, settings: Settings, stage: str, name: str, belongs: Mapping[str, Any]) -> None:
        self.path = settings.paths.state / f"{name}.safetensors"
        self._stage, self._belongs = stage, json.loads(json.dumps(belongs))
        self._asked = False
        self._newest: State | None = None
        self._every = every(settings)
        self._due = time.monotonic() + self._every
        self._steps = self.path.with_suffix(".steps")
        self.state = self._load()
        self._tell_what_was_lost()

    def __call__(self, state: State) -> None:
        self._newest = state
        os.pwrite(self._counter, b"%d\n" % state.step, 0)  # steps only grow, so nothing of an older number is left
        if self._asked:
            self._stop(state)
        if time.monotonic() >= self._due:
            self._save(state)

    def __enter__(self) -> Checkpoint:
        main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGINT, signal.SIGTERM) if main else ()
        heard = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]  # nohup, and the like
        self._before = {number: signal.signal(number, self._ask) for number in heard}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._counter = os.open(self._steps, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._counter)
        if isinstance(error, ErasureRefused):
            self.remove()
        if error is None and self._asked and self._newest:
            self._stop(self._newest)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._steps.unlink(missing_ok=True)
        for partial in self.path.parent.glob(f".{self.path.name}.*.partial"):  # of a process killed while it wrote
            partial.unlink()

    def _ask(self, *_: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def _stop(self, state: State) -> None:
        self._save(state)
        raise ContinueMe(
            f"{self._stage} was stopped and is saved after step {state.step}", hint="the same command, to go on"
        )

    def _save(self, state: State) -> None:
        began = time.monotonic()
        numbers = json.dumps(state.numbers())  # as text, so that keys keep their order
        tensors.save(self.path, state.tensors(), {"belongs": self._belongs, "numbers": numbers})
        now = time.monotonic()
        self._due = now + max(self._every, (now - began) / SHARE)

    def _tell_what_was_lost(self) -> None:
        """The last step is told to the disk as it is done, the state more seldom: what lies between is done again."""
        if self._steps.is_file():
            done = int(self._steps.read_text() or 0)
            kept = self.state[1]["step"] if self.state else 0
            event_log.write(self.path.parent, self._stage, "resumed", lost=max(0, done - kept))

    def _load(self) -> Saved | None:
        """Raises SettingsError, naming what differs, when the file belongs to another run."""
        if not self.path.is_file():
            return None
        try:
            saved, facts = tensors.load(self.path)
        except DataError as e:
            raise DataError(f"{self.path} is no checkpoint that can be read", hint=f"rm {self.path}") from e
        numbers = json.loads(facts["numbers"])
        if changes := list(_changes(facts["belongs"], self._belongs)):
            lines = "".join(f"\n  {change}" for change in changes)
            raise SettingsError(
                f"{self._stage} was stopped after step {numbers['step']}, and since then has changed:{lines}\n"
                "Changed back, it goes on. To give up what is saved and start anew, remove it.",
                hint=f"rm {self.path}",
            )
        print(f"{self._stage} goes on after step {numbers['step']}", file=sys.stderr)
        return saved, numbers


def belongs(
    settings: Settings,
    *,
    sections: Iterable[str],
    code: Mapping[str, str],
    model: Model,
    clip: Clip,
    content: Mapping[str, str],
) -> dict[str, Any]:
    """All that can change a loop's result, by name: settings in full, networks, files and code by digest.

    sections: dotted names within params.yaml. code: of `dependencies`. content: name → digest.
    """
    networks = {
        "UNet of base.model": model.digest,
        "text encoder of base.model": model.text_digest,
        "VAE of base.model": fingerprint(model.vae),
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
    """One line for each thing that is no longer as it was."""
    was, is_ = (dict(_flat("", side["settings"])) for side in (saved, now))
    for name in sorted(was.keys() | is_.keys()):
        if was.get(name) != is_.get(name):
            yield f"{name}: it was {json.dumps(was.get(name))}, now it is {json.dumps(is_.get(name))}"
    for kind, what in (("content", "its content"), ("code", "its code"), ("versions", "its version")):
        for name in sorted(saved[kind].keys() | now[kind].keys()):
            if saved[kind].get(name) != now[kind].get(name):
                yield f"{name}: {what}"


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flat(f"{prefix}.{key}" if prefix else key, inner)
