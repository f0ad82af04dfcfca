"""The one training loop of the fine-tuning erasers. A method supplies the terms of its loss; the plumbing is here.

θ: student, trained            θ*: teacher, its exponential moving average (EMA)         θ₀: the base model, frozen
c₀: the empty prompt           c_p: what trajectories are prompted with                  c_s: what is being removed
m: EMA decay                   s_g: guidance of the trajectories                         N: their sampler steps

Of methods whose states are made by the sampler:

L = mean (ε_θ(z, τ_k, c_s) − sg[target(z, τ_k, c_s)])²  +  preserve · mean (ε_θ(z', τ, c_keep) − ε_θ₀(z', τ, c_keep))²

The second term is ours, not any paper's: off (0) unless asked for, and named in every report when on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from deleatur.diffusion.model import Model
from deleatur.diffusion.overlay import weight_difference
from deleatur.diffusion.predict import Weights
from deleatur.errors import ErasureRefused, SettingsError
from deleatur.maths.seeds import generator
from deleatur.training.cost import Work
from deleatur.training.losses import Error, Network, Networks, Preserved, Prompted, Rows, Target, Term, squared
from deleatur.training.optimizer_state import Saved, moments, parts, restore_moments
from deleatur.training.parameters import Selector, select
from deleatur.training.trajectories import Fresh, Law, Pool, Replay, Source, trajectories

PRESETS: dict[str, dict[str, Any]] = {
    # The method as published, `AS_PUBLISHED` included: of SDD and ESD, one fresh trajectory per step.
    "parity": {},
    # Staggered pools: every state of a trajectory is used, 2.7, 5.4 and 10.8 times fewer operations than `parity` at
    # equal iterations. Under Adam a batch of b moves the weights up to √b as far: the rate is divided by √b.
    "fast-safe": {"trajectories": "pool", "sampler_steps": 25, "batch_size": 4, "pool_size": 32, "lr": 5e-6},
    "fast": {"trajectories": "pool", "sampler_steps": 25, "batch_size": 2, "pool_size": 24, "lr": 7e-6},
    "sweep": {"trajectories": "pool", "sampler_steps": 25, "batch_size": 1, "pool_size": 12},
}


class Training(BaseModel):
    """Numbers of every training, wherever its states come from. Defaults are SDD's released ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    also_published: ClassVar[tuple[Selector, ...]] = ()
    """What else than the default of `train` is the method as published."""

    trainable: Selector = "xattn"
    """Which tensors of the UNet train."""
    iterations: int = Field(1500, gt=0)
    """Steps of the optimiser."""
    lr: float = Field(1e-5, gt=0)
    """Learning rate of AdamW; no schedule, no warm-up."""
    weight_decay: float = Field(1e-4, ge=0)
    """Of AdamW; it pulls the weights to zero, not to the base model's."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """β₁ of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Cap of the global gradient norm over the trained tensors."""
    ema_decay: float = Field(0.999, ge=0, le=1)
    """m. 0.999 over 1500 steps keeps 22 % of θ₀: the returned teacher lags by design.
    0: teacher and student are one."""
    batch_size: int = Field(1, gt=0)
    """b, states per iteration."""
    eval_every: int = Field(0, ge=0)
    """Iterations between two looks at sampled pictures, the last of them at the end; 0: never, train to the end."""
    target_rate: float = Field(0.0, ge=0, le=1)
    """Stop once the concept's rate on the looked-at pictures is at or below this."""
    max_preserved_drop: float = Field(1.0, ge=0)
    """Stop, and go back to the best earlier look, once preserved prompts score worse than the base by this share.
    The best is the one with the fewest of the concept's pictures."""
    min_relative_change: float = Field(1e-5, ge=0)
    """A run whose relative change of the trained weights is smaller is refused: it did nothing."""
    max_relative_change: float = Field(2.0, gt=0)
    """A run whose relative change is larger, or is no number, is refused: it destroyed the model. Adam moves a weight
    by `lr` per iteration at most: 1500 of 1e-5 are half of the 0.03 that weights of Stable Diffusion have."""

    @model_validator(mode="after")
    def looks_are_needed(self) -> Self:
        idle = {"target_rate": self.target_rate > 0, "max_preserved_drop": self.max_preserved_drop < 1}
        if not self.eval_every and any(idle.values()):
            named = ", ".join(name for name, given in idle.items() if given)
            raise ValueError(f"{named} needs looks at sampled pictures: give check_every too, or leave {named} out")
        return self

    def notes(self) -> list[str]:
        """What is not the method's own in these numbers, and changes what it does; lengths and rates do not."""
        found = []
        own = type(self).model_fields["trainable"].default
        if self.trainable not in (own, *self.also_published):
            found.append(f"The tensors called {self.trainable} were trained; as first published, those called {own}.")
        if self.eval_every:
            found.append("Looks at sampled pictures could end the training early, or take back what followed the best.")
        return found

    def work(self, erase: int, keep: int = 0) -> Work:
        """Of iterations that ask the student so many rows, those of the term that erases and the others."""
        # Student, teacher and Adam's two moments, and the best look, in fp32; the gradient comes and goes with a pass.
        held = 4 * (4 + bool(self.eval_every))
        drifts = -(-self.iterations // DRIFT)
        return Work(
            forward=2 * erase * drifts,
            backward=(erase + keep) * self.iterations,
            wide=erase,
            deep=erase + keep,
            train=self.trainable,
            held=held,
            looks=1 + -(-self.iterations // self.eval_every) if self.eval_every else 0,
        )


AS_PUBLISHED = (
    "trajectories",
    "trajectory_model",
    "batch_size",
    "train_timesteps",
    "timestep_distribution",
    "preservation_weight",
    "eval_every",
)
"""Numbers of a `Loop` that parity leaves at the method's own. Lengths, rates and tensors may fit the model at hand."""


LAWS: dict[Law, str] = {
    "uniform": "All trained sampler steps were visited alike, as in SDD and ESD; HFI visits those in the middle most.",
    "beta33": "Trained sampler steps in the middle were visited most, as in HFI; SDD and ESD visit all alike.",
}


class Loop(Training):
    """Numbers of a training whose states are made by the sampler."""

    preset: Literal["parity", "fast-safe", "fast", "sweep"] | None = None
    """Where the numbers come from that are not given; none: from the method's own. parity takes nothing of ours."""
    guidance_scale: float = 3.0
    """s_g, of the trajectories' sampler."""
    sampler_steps: int = Field(50, gt=0)
    """N, steps of that sampler."""
    train_timesteps: int | None = Field(None, gt=0)
    """S: only the first S of the N stages are trained on, where it is decided what a picture will show; none: all."""
    trajectories: Literal["fresh", "pool"] = "fresh"
    """Where training states come from: fresh, a new trajectory for each (SDD); pool, all states of M staggered ones."""
    trajectory_model: Literal["teacher", "base"] = "teacher"
    """Whose trajectories: the teacher's of the moment, or the base model's."""
    pool_size: int = Field(32, gt=0)
    """M, trajectories of the pool; M/b of 8 or more keeps successive gradients apart.
    Preserved ones are made M at once."""
    timestep_distribution: Law | None = None
    """Which stages are trained on: uniform, or beta33, mid-trajectory. None: the method's own; SDD's for words is
    uniform, and for tokens beta33, as in HFI."""
    preservation_weight: float = Field(0.0, ge=0)
    """Weight of the keep-loss on prompts to preserve."""

    @model_validator(mode="before")
    @classmethod
    def fill(cls, given: Any) -> Any:
        """The preset's numbers under those that were given; an unknown preset is left for validation to refuse."""
        named = given.get("preset") if isinstance(given, dict) else None
        return {**PRESETS.get(named, {}), **given} if isinstance(named, str) else given

    @model_validator(mode="after")
    def is_what_it_says(self) -> Loop:
        fields = type(self).model_fields
        if self.preset == "parity" and (ours := [n for n in AS_PUBLISHED if getattr(self, n) != fields[n].default]):
            raise ValueError(
                f"preset parity is the method as published, without {', '.join(ours)}; "
                "leave preset out, or leave out what is ours"
            )
        return self

    def notes(self) -> list[str]:
        """What is not the method's own in these numbers, and changes what it does; lengths and rates do not."""
        found = super().notes()
        if self.preservation_weight:
            found.append(
                f"A loss on prompts to preserve was added to the paper's, with weight {self.preservation_weight:g}."
            )
        if self.trajectories == "pool":
            found.append(
                f"Training states came from a pool of {self.pool_size} staggered trajectories, and all were used."
            )
        if self.train_timesteps and self.train_timesteps < self.sampler_steps:
            found.append(
                f"Only the first {self.train_timesteps} of {self.sampler_steps} sampler steps were trained on, not all."
            )
        if self.timestep_distribution:
            found.append(LAWS[self.timestep_distribution])
        return found

    def prompted(self, targets: int, *, beside: int = 0, law: Law = "uniform") -> Work:
        """Of the terms that `prompted` makes, where a target takes so many rows for a state, and the student is asked
        so much beside it.
        """
        n, b, used = (
            self.iterations,
            self.batch_size,
            min(self.train_timesteps or self.sampler_steps, self.sampler_steps),
        )
        fresh = self.trajectories == "fresh"
        states = (
            Fresh.work(n, used, b)
            if fresh
            else Pool.work(n, used, b, self.pool_size, self.timestep_distribution or law)
        )
        calm = Replay.work(n, self.sampler_steps, b, self.pool_size) if self.preservation_weight else Work()
        goals = Work(forward=n * b * targets, wide=b * targets)
        student = self.work(b * (1 + beside), b if self.preservation_weight else 0)
        held = Work(latents=states.latents + calm.latents)
        return student + states + calm + goals + held


@dataclass(frozen=True)
class Reading:
    """What a look at sampled pictures says."""

    concept: float
    """Share of the concept's pictures that still show it."""
    kept: float
    """How well preserved prompts are still followed; any scale, higher is better."""
    contrast: float = 1.0
    """How much the preserved prompts' pictures vary in the large; blank ones and noise do not."""


Probe = Callable[[Weights], Reading]

DRIFT = 25
"""Iterations between two measurements of how far the empty prompt's prediction has moved."""

BLANK = 0.25
"""Share of the base pictures' contrast below which pictures count as blank or as noise."""


@dataclass
class State:
    """All of a run: what one save must hold for the next process to go on with the same bits."""

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    optimiser: torch.optim.AdamW
    terms: Mapping[str, Term]
    best: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    looks: list[dict[str, float]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    stop: str = ""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is a tensor, by a flat name."""
        flat = {
            f"{part}/{n}": t.detach() for part in ("student", "teacher", "best") for n, t in getattr(self, part).items()
        }
        flat |= {f"adam/{path}": t for path, t in moments(self.optimiser, self.student).items()}
        flat |= {f"term/{name}/{n}": t for name, term in self.terms.items() for n, t in term.tensors().items()}
        return flat | {f"generator/{name}": term.generator.get_state() for name, term in self.terms.items()}

    def numbers(self) -> dict[str, Any]:
        """Everything that is not."""
        return {"step": self.step, "looks": self.looks, "curve": self.curve, "stop": self.stop}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Puts a saved run back into this freshly started one."""
        saved = parts(tensors)
        for part in ("student", "teacher"):
            for name, value in saved[part].items():
                getattr(self, part)[name].copy_(value)
        self.best = {n: torch.empty_like(self.teacher[n]).copy_(w) for n, w in saved.get("best", {}).items()}
        restore_moments(self.optimiser, self.student, saved["adam"])
        states = parts(saved.get("term", {}))
        for name, term in self.terms.items():
            term.restore(states.get(name, {}))
            term.generator.set_state(saved["generator"][name])
        for key, value in numbers.items():
            setattr(self, key, value)


@dataclass(frozen=True)
class Progress:
    """What the callback is told after every iteration, and once by a run that goes on before its next."""

    step: int
    total: int
    """No more than `step` once the run has stopped."""
    loss: float
    state: State | None = None
    """None where a run is too short to be worth saving."""


@dataclass(frozen=True)
class ErasureContext:
    """Arguments of one erasure beside the model and the concepts."""

    seed: int
    preserve: Tensor | None = None
    """(q, L, d): states of prompts to preserve, for methods that use them."""
    on_step: Callable[[Progress], None] = lambda progress: None
    """Called after every step."""
    probe: Probe | None = None
    """Evaluates sampled images at every evaluation interval."""
    state: Saved | None = None
    """Checkpoint of a run with the same arguments, to resume from."""


def prompted(
    model: Model,
    loop: Loop,
    target: Target,
    *,
    c_p: Tensor,
    c_s: Tensor,
    c_0: Tensor,
    paired: bool,
    context: ErasureContext,
    law: Law = "uniform",
    beside: Tensor | None = None,
    error: Error = squared,
) -> dict[str, Term]:
    """The terms of a method whose states are made by the sampler. c_p (n, L, d) prompts the trajectories that erase,
    `context.preserve` those that preserve; the others as in `Prompted`.
    """
    shape = {"batch": loop.batch_size, "slots": loop.pool_size}
    taus = torch.tensor(model.schedule.timesteps(loop.sampler_steps), device=model.device)
    draws = generator(context.seed, "erase", "trajectories")
    own = Source(model, c_0, c_p, loop.guidance_scale, loop.sampler_steps, draws, loop.train_timesteps)
    states = trajectories(loop.trajectories, own, law=loop.timestep_distribution or law, **shape)
    base, besides = loop.trajectory_model == "base", c_0[:0] if beside is None else beside
    terms: dict[str, Term] = {
        "erase": Prompted(states, loop.batch_size, draws, taus, base, c_s, paired, besides, target, error)
    }
    if loop.preservation_weight:
        if (keep := context.preserve) is None:
            raise SettingsError("loop.preserve is above 0 but there is no prompt to preserve")
        calm = Source(
            model, c_0, keep, loop.guidance_scale, loop.sampler_steps, generator(context.seed, "erase", "keep")
        )
        terms["keep"] = Preserved(Replay(calm, {}, **shape), taus, keep, loop.preservation_weight)
    return terms


def _start(model: Model, loop: Training, terms: Mapping[str, Term]) -> State:
    """A run before its first step."""
    own = select(model.unet, loop.trainable)
    student = {n: p.detach().clone().float().requires_grad_() for n, p in own.items()}
    teacher = {n: p.detach().clone().float() for n, p in own.items()}
    # The rate can differ per run only through settings: no schedule, no warm-up, as released.
    optimiser = torch.optim.AdamW(
        student.values(), lr=loop.lr, betas=(loop.adam_beta1, 0.999), weight_decay=loop.weight_decay
    )
    return State(student, teacher, optimiser, terms)


def _cast(model: Model, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp32 master weights in the network's precision; the same tensors when that is fp32."""
    return {n: w.to(model.dtype) for n, w in weights.items()}


def finetune(
    model: Model,
    loop: Training,
    terms: Mapping[str, Term],
    *,
    c_0: Tensor,
    context: ErasureContext,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trains and returns (θ* − θ₀ by name, record of the run). The model itself is not touched.

    `terms`: "erase" and, where something is held on to, "keep". Resumed from `context.state`,
    the result is the same to the bit as if that run had never been left.
    Raises ErasureRefused when the weights hardly moved or the run destroyed the model.
    """
    run = _start(model, loop, terms)
    probe, on_step = context.probe, context.on_step
    if context.state:
        run.restore(*context.state)
        on_step(_told(loop, run))
    average = get_ema_multi_avg_fn(loop.ema_decay)
    with torch.random.fork_rng(devices=[]):  # nothing below may lean on the global generator
        if loop.eval_every and probe and not run.looks:
            _look(run, probe({}))
        while run.step < loop.iterations and not run.stop:
            numbers = _iterate(model, loop, run, c_0, average)
            run.step += 1
            run.curve.append({"step": run.step, **numbers})
            if loop.eval_every and probe and (run.step % loop.eval_every == 0 or run.step == loop.iterations):
                _look(run, probe(_cast(model, run.teacher)))
                _judge(loop, run)
            on_step(_told(loop, run))
    stopped = run.stop == "guard"
    weights, kept = (run.best, _best(_good(loop, run))["step"]) if stopped else (run.teacher, run.step)
    delta = weight_difference(model, weights)
    _refuse_extremes(model, loop, delta)
    record = {"steps": run.step, "kept": kept, "stop": run.stop or "end", "looks": run.looks, "curve": run.curve}
    return delta, record


def _iterate(model: Model, loop: Training, run: State, c_0: Tensor, average: Callable[..., None]) -> dict[str, float]:
    networks = Networks(*(Network(model, _cast(model, weights)) for weights in (run.student, run.teacher, {})))
    with torch.no_grad():
        asked = {name: term.rows(networks, run.step) for name, term in run.terms.items()}
    run.optimiser.zero_grad(set_to_none=True)
    errors = _errors(networks.student, run.terms, asked)
    loss = torch.stack([term.weight * errors[name] for name, term in run.terms.items()]).sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.student.values(), loop.max_grad_norm)
    numbers = {"loss" if name == "erase" else f"{name}_loss": float(e.detach()) for name, e in errors.items()}
    numbers["grad_norm"] = float(norm)
    if run.step % DRIFT == 0:
        rows = asked["erase"]
        with torch.no_grad():
            drift = F.mse_loss(networks.student(rows.z, rows.t, c_0), networks.base(rows.z, rows.t, c_0))
        numbers["drift"] = float(drift)
    for name in ("loss", "grad_norm"):
        if not math.isfinite(numbers[name]):
            raise ErasureRefused(f"{name} became {numbers[name]} at step {run.step}", hint="lower the eraser's loop.lr")
    run.optimiser.step()
    with torch.no_grad():
        average(list(run.teacher.values()), [p.detach() for p in run.student.values()], run.step)
    return numbers


def _errors(student: Network, terms: Mapping[str, Term], asked: Mapping[str, Rows]) -> dict[str, Tensor]:
    """Mean error of each term. One pass of the student over all costs less than one each, for the same gradient."""
    z, t, c = (torch.cat([getattr(rows, part) for rows in asked.values()]) for part in ("z", "t", "c"))
    said = student(z, t, c).float().split([len(rows.z) for rows in asked.values()])
    return {
        name: terms[name].error(own, asked[name].goal.float()).mean() for name, own in zip(asked, said, strict=True)
    }


def _told(loop: Training, run: State) -> Progress:
    return Progress(run.step, run.step if run.stop else loop.iterations, run.curve[-1]["loss"], run)


def _look(run: State, reading: Reading) -> None:
    run.looks.append({"step": run.step, **asdict(reading)})


def _judge(loop: Training, run: State) -> None:
    """Stops at the target, or at the guard; remembers the best look in between."""
    first, last, least, good = run.looks[0], run.looks[-1], _least(loop, run), _good(loop, run)
    if not good:
        fell = [f"{what} from {first[what]:.3f} to {last[what]:.3f}" for what in least if not last[what] >= least[what]]
        raise ErasureRefused(
            f"preserved prompts fell before the concept went: {', '.join(fell)}",
            hint="lower the eraser's loop.lr, raise loop.preserve or check more often (loop.check_every)",
        )
    if last not in good:
        run.stop = "guard"
        return
    if last is _best(good):
        run.best = {n: w.clone() for n, w in run.teacher.items()}
    if last["concept"] <= loop.target_rate:
        run.stop = "target"


def _least(loop: Training, run: State) -> dict[str, float]:
    """A look is spoiled when preserved prompts are followed less, or when their pictures are blank or noise."""
    first = run.looks[0]
    return {"kept": first["kept"] - loop.max_preserved_drop * abs(first["kept"]), "contrast": BLANK * first["contrast"]}


def _good(loop: Training, run: State) -> list[dict[str, float]]:
    least = _least(loop, run)
    return [look for look in run.looks[1:] if all(look[what] >= value for what, value in least.items())]


def _best(looks: list[dict[str, float]]) -> dict[str, float]:
    """The least concept, then the most kept."""
    return min(looks, key=lambda look: (look["concept"], -look["kept"]))


def _refuse_extremes(model: Model, loop: Training, delta: dict[str, Tensor]) -> None:
    own = select(model.unet, loop.trainable)
    moved = math.sqrt(sum(float(d.square().sum()) for d in delta.values()))
    change = moved / math.sqrt(sum(float(p.float().square().sum()) for p in own.values()))
    if change < loop.min_relative_change:
        raise ErasureRefused(
            f"the trained weights moved by {change:.1e} of their norm: nothing was erased",
            hint="raise the eraser's loop.iterations or loop.lr",
        )
    if not change <= loop.max_relative_change:  # also where it is not a number
        raise ErasureRefused(
            f"the trained weights moved by {change:.1f} times their norm: little of the model is left",
            hint="lower the eraser's loop.lr or loop.iterations",
        )
