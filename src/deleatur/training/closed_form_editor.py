"""The editor of the closed-form erasers. A method supplies the states to erase, this module all the rest.

W: a key or value projection of cross-attention      M: product of all edits so far, W' = W M for every projection
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from deleatur.diffusion.encode import count_tokens, encode_text, replace_description
from deleatur.diffusion.model import Model
from deleatur.diffusion.overlay import edited_weights
from deleatur.errors import ErasureRefused, SettingsError
from deleatur.maths import closed_form
from deleatur.records.model import Concept, Delta, LowRank
from deleatur.training.cost import Workload
from deleatur.training.early_stopping import describe, is_acceptable
from deleatur.training.loop import ErasureContext, TrainingProgress
from deleatur.training.parameters import select

Columns = Literal["concept", "to_end", "all"]


class ClosedFormConfig(BaseModel):
    """Hyperparameters of a closed-form edit. Defaults are those of UCE's first release, which RECE builds on."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    columns: Literal["concept", "to_end"] = "to_end"
    """Which states of a prompt are erased: concept, those of the concept (of words the last token, as in UCE's current
    release; of soft tokens all vectors); or to_end, from there to the end, as in the first release, since the end token
    and the padding carry the concept too."""
    erase: float = Field(1.0, gt=0)
    """η_e. Large values damage the model: blank or noisy images."""
    preserve: float | None = Field(None, ge=0)
    """η_p, of each preserved state. None: 1/q for q prompts, at least 0.1, as in the first release; the current one's
    is 1."""
    preserve_columns: Literal["all", "last"] = "all"
    """Which states of a preserved prompt are preserved: all of them, as in the first release; or last, the last
    token's, as in the current one (of the empty prompt, the start token's)."""
    lam: float = Field(0.1, gt=0)
    """λ, which holds W in the directions that no state above constrains. 0.1 in the first release, 0.5 in the current
    one; the squared norm of a state is close to its width."""
    max_preserved_drop: float | None = Field(None, ge=0)
    """Evaluate sampled images after every step, and undo a step after which preserved prompts certainly score worse
    than the base model by this share (see `deleatur.training.early_stopping`). None: never evaluate."""
    min_relative_change: float = Field(1e-5, ge=0)
    """An edit whose relative change of the projections is smaller is refused: it did nothing."""
    max_relative_change: float = Field(10.0, gt=0)
    """An edit whose relative change is larger, or NaN, is refused: it destroyed the model."""

    def workload(self, steps: int) -> Workload:
        """No network calls. Memory of the projections and of their difference, both in fp64."""
        evaluations = 0 if self.max_preserved_drop is None else 1 + steps
        return Workload(trainable="xattn_kv", bytes_per_parameter=8 + 8, evaluations=evaluations)


def text_projections(model: Model) -> dict[str, Tensor]:
    """Every key and value projection of cross-attention by name: the only tensors that read the text."""
    return {n: p for n, p in select(model.unet, "xattn_kv").items() if p.ndim == 2}


def edit_pairs(
    model: Model, concepts: Sequence[Concept], alternatives: Mapping[str, str], columns: Columns
) -> tuple[Tensor, Tensor]:
    """(c, g), each (n, d): states to erase, and the states whose values they get.

    g: states of the prompt with the alternative in the concept's place, aligned at the last content token of each, as
    both releases do; without an alternative, the empty prompt's states at the same positions.
    """
    c, g = [], []
    for concept in concepts:
        text = alternatives.get(concept.name, "")
        alternative = replace_description(model, concept, text) if count_tokens(model, text) else None
        states = alternative.states if alternative else encode_text(model, [""]).expand(len(concept.states), -1, -1)
        for i, content in enumerate(concept.content_positions):
            content = content or (concept.end_positions[i],)  # of an empty description
            # The first tokens of a word are parts of other words too; the vectors of a soft token are its own.
            erased = content[-1:] if concept.source == "words" else content
            positions = {
                "concept": [*erased],
                "to_end": [*erased, *range(content[-1] + 1, model.max_tokens)],
                "all": [*range(model.max_tokens)],
            }[columns]
            counterparts = positions
            if alternative:
                end = alternative.content_positions[i][-1]
                if columns == "to_end":  # as many states as both prompts have after the last content token
                    positions = [p for p in positions if p - content[-1] < model.max_tokens - end]
                counterparts = [_counterpart(p, content, end, model.max_tokens) for p in positions]
            c.append(concept.states[i, positions])
            g.append(states[i, counterparts])
    return _flatten(c), _flatten(g)


def _counterpart(position: int, content: Sequence[int], end: int, length: int) -> int:
    """Where a position of a concept's prompt is in its alternative's, whose last content token is at `end`."""
    if position < content[0]:
        return position
    return min(end + max(position - content[-1], 0), length - 1)


def _preserved_states(model: Model, config: ClosedFormConfig, context: ErasureContext) -> Sequence[Tensor]:
    """(…, d) of each preserved prompt, of the empty prompt where there is none."""
    states, ends = context.preserve, context.preserve_ends
    if states is None:
        states, ends = encode_text(model, [""]), (1,)
    if config.preserve_columns == "all":
        return list(states)
    if len(ends) != len(states):
        raise SettingsError(
            f"edit.preserve_columns: last needs the end position of each of {len(states)} preserved prompts, "
            f"got {len(ends)}",
            hint="pass ErasureContext.preserve_ends, or preserve_columns: all",
        )
    return [prompt[end - 1] for prompt, end in zip(states, ends, strict=True)]


def _flatten(states: Sequence[Tensor]) -> Tensor:
    """Any number of (…, d) as one (n, d), in float64 on the CPU: small, and the same on every device."""
    return torch.cat([s.reshape(-1, s.shape[-1]) for s in states]).double().cpu()


class ClosedFormEditor:
    """Edits every projection in `step`s, W ← W M. The model itself is not modified."""

    def __init__(self, model: Model, config: ClosedFormConfig, context: ErasureContext, *, steps: int) -> None:
        self._model, self._config, self._steps, self._on_step = model, config, steps, context.on_step
        self._probe = context.probe if config.max_preserved_drop is not None else None
        self._projections = {n: p.detach().double().cpu() for n, p in text_projections(model).items()}
        preserved = _preserved_states(model, config, context)
        self._preserved = _flatten(preserved)
        self._eta_p = max(0.1, 1 / len(preserved)) if config.preserve is None else config.preserve
        self.gram = closed_form.gram(self._projections.values())
        self.m = torch.eye(len(self.gram), dtype=torch.float64)
        self.stop = ""
        self._curve: list[dict[str, float]] = []
        self._evaluations: list[dict[str, Any]] = []

    def step(self, c: Tensor, g: Tensor, **values: float) -> None:
        """Gives states c (n, d) the values that g has now. `values`: further columns of the curve."""
        config = self._config
        t = closed_form.edit_matrix(c, g, self._preserved, erase=config.erase, preserve=self._eta_p, lam=config.lam)
        m = self.m + self.m @ t
        before = closed_form.projected_distance(self.gram, c @ self.m.T, g @ self.m.T)
        after = closed_form.projected_distance(self.gram, c @ m.T, g @ self.m.T)
        self._curve.append({"step": len(self._curve) + 1, "loss": after / before if before else 0.0, **values})
        if self._degrades(m):
            self.stop = "guard"
        else:
            self.m = m
        done = len(self._curve)
        self._on_step(TrainingProgress(done, done if self.stop else self._steps, self._curve[-1]["loss"], None))

    def delta(self, method: str, settings: Mapping[str, Any], concepts: Sequence[Concept]) -> Delta:
        """The result of all steps. Raises ErasureRefused when it changed nothing, or far too much."""
        self._check_relative_change()
        steps, undone = len(self._curve), self.stop == "guard"
        record = {"steps": steps, "selected": steps - undone, "stop": self.stop or "end"}
        record |= {"evaluations": self._evaluations, "curve": self._curve}
        names = tuple(c.name for c in concepts)
        return Delta(self._differences(self.m), self._model.unet_digest, method, settings, names, record)

    def _differences(self, m: Tensor) -> LowRank:
        left, right = closed_form.low_rank_factors(m - torch.eye(len(m), dtype=m.dtype))
        return LowRank({n: (w @ left).float() for n, w in self._projections.items()}, right.float())

    def _degrades(self, m: Tensor) -> bool:
        """Whether preserved prompts score too low with the model edited by m. Raises ErasureRefused after step 1."""
        if self._probe is None:
            return False
        if not self._evaluations:
            self._evaluations.append({"step": 0, **asdict(self._probe({}))})
        edited = edited_weights(self._model, Delta(self._differences(m), self._model.unet_digest, "", {}, ()))
        self._evaluations.append({"step": len(self._curve), **asdict(self._probe(edited))})
        base, last = self._evaluations[0], self._evaluations[-1]
        degraded = not is_acceptable(base, last, self._config.max_preserved_drop or 0)
        if degraded and len(self._curve) == 1:
            raise ErasureRefused(
                f"preserved prompts degraded with the first edit:{describe(self._evaluations)}",
                hint="lower edit.erase, raise edit.preserve or edit.lam",
                record={"steps": 1, "evaluations": self._evaluations, "curve": self._curve},
                weights=self._differences(m),
            )
        return degraded

    def _check_relative_change(self) -> None:
        """Relative change over all projections: ‖W T‖ / ‖W‖ from the Gram matrix, without forming W T."""
        t = self.m - torch.eye(len(self.m), dtype=self.m.dtype)
        change = float(((t.T @ self.gram @ t).trace() / self.gram.trace()).sqrt())
        if change < self._config.min_relative_change:
            raise ErasureRefused(
                f"the projections moved by {change:.1e} of their norm: nothing was erased",
                hint="name another alternative than the concept itself, raise edit.erase or lower edit.preserve",
            )
        if not change <= self._config.max_relative_change:  # true for NaN as well
            raise ErasureRefused(
                f"the projections moved by {change:.1f} times their norm: little of the model is left",
                hint="raise edit.lam",
            )
