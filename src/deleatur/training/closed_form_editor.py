"""The one editor of the closed-form erasers. A method supplies the states to erase; the plumbing is here.

W: a key or value projection of cross-attention      M: what all of them have been multiplied by so far, W' = W M
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from deleatur.diffusion.encode import encode_replacement, encode_text
from deleatur.diffusion.model import Model
from deleatur.diffusion.overlay import edited_weights
from deleatur.errors import ErasureRefused
from deleatur.maths import closed_form
from deleatur.records.model import Concept, Delta, LowRank
from deleatur.training.cost import Work
from deleatur.training.finetune import ErasureContext, Progress
from deleatur.training.parameters import select

Columns = Literal["onward", "own", "all"]


class Edit(BaseModel):
    """Numbers of a closed-form edit. Defaults are those of UCE's first release, which RECE builds on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    columns: Literal["onward", "own"] = "onward"
    """Which states of a sentence are erased: the concept's own (the last of its words, as in UCE's current release; all
    of its soft rows), or from there to the end, as in the first one: the end and the padding carry the concept too."""
    erase: float = Field(1.0, gt=0)
    """η_e. Large ones wear the model out: white or noisy pictures."""
    preserve: float | None = Field(None, ge=0)
    """η_p, of every state of every preserved prompt. Left out: 1/q for q prompts, no less than 0.1, as released."""
    lam: float = Field(0.1, gt=0)
    """λ, what holds W where it is in directions that no state above says anything about. 0.1 in the first release,
    0.5 in the current one; states have a squared norm near their width."""
    max_preserved_drift: float | None = Field(None, ge=0)
    """Look at sampled pictures after every step; refuse it once preserved prompts score worse than the base by this
    share. Left out: never look, so that no picture is drawn."""
    min_relative_change: float = Field(1e-5, ge=0)
    """An edit whose relative change of the projections is smaller is refused: it did nothing."""
    max_relative_change: float = Field(10.0, gt=0)
    """An edit whose relative change is larger, or is no number, is refused: it destroyed the model."""

    def work(self, steps: int) -> Work:
        """No network is asked. Projections are there once more, in fp64, and so is their difference."""
        return Work(train="xattn_kv", held=8 + 8, looks=0 if self.max_preserved_drift is None else 1 + steps)


def touched(model: Model) -> dict[str, Tensor]:
    """Every key and value projection of cross-attention by name: what reads the text, and nothing else."""
    return {n: p for n, p in select(model.unet, "xattn_kv").items() if p.ndim == 2}


def pairs(
    model: Model, concepts: Sequence[Concept], alternatives: Mapping[str, str], which: Columns
) -> tuple[Tensor, Tensor]:
    """(c, g), each (n, d): states to erase, and where each is led, the state at its place with the alternative there.

    Without an alternative that is the empty prompt's.
    """
    c, g = [], []
    for concept in concepts:
        led = encode_replacement(model, concept, alternatives.get(concept.name, ""))
        for i, own in enumerate(concept.content_positions):
            at = _places(concept.source, own or (concept.end_positions[i],), which)
            c.append(concept.states[i, at])
            g.append(led[i, at])
    return _rows(c), _rows(g)


def _places(source: str, own: tuple[int, ...], which: Columns) -> slice:
    # A word's first pieces are pieces of other words too; a soft token's rows are nobody else's.
    start = own[-1] if source == "words" else own[0]
    return {"own": slice(start, own[-1] + 1), "onward": slice(start, None), "all": slice(None)}[which]


def _rows(states: Sequence[Tensor]) -> Tensor:
    """Any number of (…, d) as one (n, d), in float64 on the CPU: small, and the same on every machine."""
    return torch.cat([s.reshape(-1, s.shape[-1]) for s in states]).double().cpu()


class Editing:
    """An edit under way: W ← W M for every projection, one `step` after the other. The model itself is not touched."""

    def __init__(
        self,
        model: Model,
        numbers: Edit,
        context: ErasureContext,
        *,
        steps: int,
    ) -> None:
        self._model, self._numbers, self._steps, self._on_step = model, numbers, steps, context.on_step
        self._probe = context.probe if numbers.max_preserved_drift is not None else None
        self._projections = {n: p.detach().double().cpu() for n, p in touched(model).items()}
        kept = encode_text(model, [""]) if context.preserve is None else context.preserve
        self._kept = _rows([kept])
        self._eta_p = max(0.1, 1 / len(kept)) if numbers.preserve is None else numbers.preserve
        self.gram = closed_form.gram(self._projections.values())
        self.m = torch.eye(len(self.gram), dtype=torch.float64)
        self.stop = ""
        self._curve: list[dict[str, float]] = []
        self._looks: list[dict[str, float]] = []

    def step(self, c: Tensor, g: Tensor, **seen: float) -> None:
        """Gives states c (n, d) the values that g has now. `seen`: what else the curve is to say of this step."""
        n = self._numbers
        t = closed_form.edit_matrix(c, g, self._kept, erase=n.erase, preserve=self._eta_p, lam=n.lam)
        m = self.m + self.m @ t
        before = closed_form.projected_distance(self.gram, c @ self.m.T, g @ self.m.T)
        after = closed_form.projected_distance(self.gram, c @ m.T, g @ self.m.T)
        self._curve.append({"step": len(self._curve) + 1, "loss": after / before if before else 0.0, **seen})
        if self._spoiled(m):
            self.stop = "guard"
        else:
            self.m = m
        done = len(self._curve)
        self._on_step(Progress(done, done if self.stop else self._steps, self._curve[-1]["loss"], None))

    def delta(self, method: str, settings: Mapping[str, Any], concepts: Sequence[Concept]) -> Delta:
        """The edit so far. Raises ErasureRefused when it changed nothing, or far too much."""
        self._refuse_extremes()
        steps, back = len(self._curve), self.stop == "guard"
        record = {"steps": steps, "kept": steps - back, "stop": self.stop or "end"}
        record |= {"looks": self._looks, "curve": self._curve}
        return Delta(
            self._differences(self.m),
            self._model.unet_digest,
            method,
            settings,
            tuple(c.name for c in concepts),
            record,
        )

    def _differences(self, m: Tensor) -> LowRank:
        left, right = closed_form.low_rank_factors(m - torch.eye(len(m), dtype=m.dtype))
        return LowRank({n: (w @ left).float() for n, w in self._projections.items()}, right.float())

    def _spoiled(self, m: Tensor) -> bool:
        """Whether pictures of preserved prompts are worse than the guard allows with the model edited by m."""
        if self._probe is None:
            return False
        if not self._looks:
            self._looks.append({"step": 0, **asdict(self._probe({}))})
        edited = Delta(self._differences(m), self._model.unet_digest, "", {}, ())
        self._looks.append({"step": len(self._curve), **asdict(self._probe(edited_weights(self._model, edited)))})
        first, last = self._looks[0]["kept"], self._looks[-1]["kept"]
        spoiled = first - last > (self._numbers.max_preserved_drift or 0) * abs(first)
        if spoiled and len(self._curve) == 1:
            raise ErasureRefused(
                f"preserved prompts fell from {first:.3f} to {last:.3f} with the first edit",
                hint="lower edit.erase, raise edit.preserve or edit.lam",
            )
        return spoiled

    def _refuse_extremes(self) -> None:
        t = self.m - torch.eye(len(self.m), dtype=self.m.dtype)
        change = float(((t.T @ self.gram @ t).trace() / self.gram.trace()).sqrt())
        if change < self._numbers.min_relative_change:
            raise ErasureRefused(
                f"the projections moved by {change:.1e} of their norm: nothing was erased",
                hint="name another alternative than the concept itself, raise edit.erase or lower edit.preserve",
            )
        if not change <= self._numbers.max_relative_change:  # also where it is not a number
            raise ErasureRefused(
                f"the projections moved by {change:.1f} times their norm: little of the model is left",
                hint="raise edit.lam",
            )
