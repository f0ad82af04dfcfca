"""The one training loop of the fine-tuning erasers. A method supplies its target; the plumbing is here.

θ: student, trained            θ*: teacher, its exponential moving average (EMA)         θ₀: the base model, frozen
c₀: the empty prompt           c_p: what trajectories are prompted with                  c_s: what is being removed
m: EMA decay                   s_g: guidance of the trajectories                         N: their sampler steps

L = mean (ε_θ(z, τ_k, c_s) − sg[target(z, τ_k, c_s)])²  +  preserve · mean (ε_θ(z', τ, c_keep) − ε_θ₀(z', τ, c_keep))²

The second term is ours, not any paper's: off (0) in the parity presets, and named in every report when on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from deleatur.diffusion.load import Model
from deleatur.diffusion.overlay import difference
from deleatur.diffusion.predict import Weights, predict
from deleatur.diffusion.select import Selector, select
from deleatur.diffusion.trajectories import Law, Replay, Resumable, Source, Trajectories, trajectories
from deleatur.errors import ErasureRefused, SettingsError
from deleatur.maths.seeds import generator

PRESETS: dict[str, dict[str, Any]] = {
    # SDD as published: one fresh trajectory per step, nothing of ours.
    "parity": {"trajectories": "fresh", "steps": 50, "batch": 1},
    # Staggered pools: every state of a trajectory is used, 2.7, 5.4 and 10.8 times fewer operations than `parity` at
    # equal iterations. Under Adam a batch of b moves the weights up to √b as far: the rate is divided by √b.
    "fast-safe": {"trajectories": "pool", "steps": 25, "batch": 4, "slots": 32, "lr": 5e-6},
    "fast": {"trajectories": "pool", "steps": 25, "batch": 2, "slots": 24, "lr": 7e-6},
    "sweep": {"trajectories": "pool", "steps": 25, "batch": 1, "slots": 12},
}


class Loop(BaseModel):
    """Numbers of the loop. Defaults are SDD's released ones at Stable Diffusion's size."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    preset: Literal["parity", "fast-safe", "fast", "sweep"] = "parity"
    """Where the numbers below come from that are not given."""
    train: Selector = "xattn"
    iterations: int = Field(1500, gt=0)
    lr: float = Field(1e-5, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    clip: float = Field(1.0, gt=0)
    """Cap of the global gradient norm over the trained tensors."""
    ema: float = Field(0.999, ge=0, le=1)
    """m. 0.999 over 1500 steps keeps 22 % of θ₀: the returned teacher lags by design."""
    guidance: float = 3.0
    """s_g."""
    steps: int = Field(50, gt=0)
    """N."""
    trajectories: Literal["fresh", "pool"] = "fresh"
    batch: int = Field(1, gt=0)
    """b, states per iteration."""
    slots: int = Field(32, gt=0)
    """M, trajectories of the pool; M/b of 8 or more keeps successive gradients apart.
    Preserved ones are made M at once."""
    law: Law = "uniform"
    """Which stages are trained on: uniform (SDD) or beta33, mid-trajectory (HFI)."""
    preserve: float = Field(0.0, ge=0)
    """Weight of the keep-loss on prompts to preserve."""
    check_every: int = Field(0, ge=0)
    """Iterations between two looks at sampled pictures; 0: never, train to the end."""
    stop_at: float = Field(0.0, ge=0, le=1)
    """Stop once the concept's rate on the looked-at pictures is at or below this."""
    guard: float = Field(1.0, ge=0)
    """Stop, and go back to the best earlier look, once preserved prompts score worse than the base by this share."""
    least_change: float = Field(1e-5, ge=0)
    """A run whose relative change of the trained weights is smaller is refused: it did nothing."""

    @model_validator(mode="before")
    @classmethod
    def fill(cls, given: Any) -> Any:
        """The preset's numbers under those that were given; an unknown preset is left for validation to refuse."""
        return {**PRESETS.get(given.get("preset", "parity"), {}), **given} if isinstance(given, dict) else given


@dataclass(frozen=True)
class Networks:
    """ε(z, t, c) of the three weight sets."""

    student: Callable[[Tensor, Tensor, Tensor], Tensor]
    teacher: Callable[[Tensor, Tensor, Tensor], Tensor]
    base: Callable[[Tensor, Tensor, Tensor], Tensor]


Target = Callable[[Networks, Tensor, Tensor, Tensor], Tensor]
"""(networks, z, t, c_s) → what ε_θ(z, t, c_s) should be. Called without gradient."""


@dataclass(frozen=True)
class Reading:
    """What a look at sampled pictures says."""

    concept: float
    """Share of the concept's pictures that still show it."""
    kept: float
    """How well preserved prompts are still followed; any scale, higher is better."""


Probe = Callable[[Weights], Reading]


@dataclass
class State:
    """All of a run: what one save must hold for the next process to go on with the same bits."""

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    optimiser: torch.optim.AdamW
    source: Trajectories
    """Of the states that are erased."""
    calm: Replay | None
    """Of the states that are preserved, all of them the base model's."""
    generators: dict[str, torch.Generator]
    best: dict[str, Tensor]
    step: int = 0
    looks: list[dict[str, float]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    stop: str = ""

    @property
    def sources(self) -> dict[str, Resumable]:
        return {"erase": self.source} | ({"keep": self.calm} if self.calm else {})

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is a tensor, by a flat name."""
        flat = {
            f"{part}/{n}": t.detach() for part in ("student", "teacher", "best") for n, t in getattr(self, part).items()
        }
        for name, parameter in self.student.items():
            flat |= {f"adam/{k}/{name}": v for k, v in self.optimiser.state.get(parameter, {}).items()}
        flat |= {f"source/{s}/{n}": t for s, source in self.sources.items() for n, t in source.tensors().items()}
        return flat | {f"generator/{n}": g.get_state() for n, g in self.generators.items()}

    def numbers(self) -> dict[str, Any]:
        """Everything that is not."""
        return {"step": self.step, "looks": self.looks, "curve": self.curve, "stop": self.stop}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Puts a saved run back into this freshly started one."""
        by_part: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, rest = name.split("/", 1)
            by_part.setdefault(part, {})[rest] = tensor
        for part in ("student", "teacher"):
            for name, value in by_part[part].items():
                getattr(self, part)[name].copy_(value)
        self.best = by_part.get("best", {})
        for name, value in by_part.get("adam", {}).items():
            key, parameter = name.split("/", 1)
            self.optimiser.state.setdefault(self.student[parameter], {})[key] = value
        for name, source in self.sources.items():
            saved = by_part.get("source", {})
            source.restore({k.split("/", 1)[1]: v for k, v in saved.items() if k.startswith(f"{name}/")})
        for name, g in self.generators.items():
            g.set_state(by_part["generator"][name])
        for key, value in numbers.items():
            setattr(self, key, value)


@dataclass(frozen=True)
class Progress:
    """What the callback is told after every iteration."""

    step: int
    total: int
    loss: float
    reading: Reading | None
    state: State | None = None
    """None where a run is too short to be worth saving."""


def start(model: Model, loop: Loop, c_p: Tensor, c_0: Tensor, keep: Tensor | None, seed: int) -> State:
    """A run before its first step. c_p (n, L, d) prompts the trajectories, keep (q, L, d) those to preserve."""
    own = select(model.unet, loop.train)
    student = {n: p.detach().clone().float().requires_grad_() for n, p in own.items()}
    teacher = {n: p.detach().clone().float() for n, p in own.items()}
    # The rate can differ per run only through settings: no schedule, no warm-up, as released.
    optimiser = torch.optim.AdamW(student.values(), lr=loop.lr, weight_decay=loop.weight_decay)
    generators = {"erase": generator(seed, "erase", "trajectories")}
    prompted = Source(model, c_0, c_p, loop.guidance, loop.steps, generators["erase"])
    shape = {"batch": loop.batch, "slots": loop.slots}
    source = trajectories(loop.trajectories, prompted, _cast(model, teacher), law=loop.law, **shape)
    calm = None
    if loop.preserve:
        if keep is None:
            raise SettingsError("erase.loop.preserve is above 0 but there is no prompt to preserve")
        generators["keep"] = generator(seed, "erase", "keep")
        calm = Replay(Source(model, c_0, keep, loop.guidance, loop.steps, generators["keep"]), {}, **shape)
    return State(student, teacher, optimiser, source, calm, generators, {})


def _cast(model: Model, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp32 master weights in the network's precision; the same tensors when that is fp32."""
    return {n: w.to(model.dtype) for n, w in weights.items()}


def finetune(
    model: Model,
    loop: Loop,
    target: Target,
    *,
    c_p: Tensor,
    c_s: Tensor,
    c_0: Tensor,
    paired: bool,
    keep: Tensor | None,
    seed: int,
    on_step: Callable[[Progress], None],
    probe: Probe | None = None,
    state: State | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trains and returns (θ* − θ₀ by name, record of the run). The model itself is not touched.

    `paired`: c_s has a row for each row of c_p, and a state is trained under the condition that made it; otherwise
    rows of c_s are taken in turn. Raises ErasureRefused when the weights hardly moved or the run destroyed the model.
    """
    run = state or start(model, loop, c_p, c_0, keep, seed)
    average = get_ema_multi_avg_fn(loop.ema)
    taus = torch.tensor(model.schedule.taus(loop.steps), device=model.device)
    if loop.check_every and probe and not run.looks:
        _look(run, probe({}))
    while run.step < loop.iterations and not run.stop:
        loss = _iterate(model, loop, target, run, taus, c_s, c_0, paired, keep, average)
        run.step += 1
        run.curve.append({"step": run.step, **loss})
        reading = None
        if loop.check_every and probe and run.step % loop.check_every == 0:
            reading = probe(_cast(model, run.teacher))
            _judge(loop, run, _look(run, reading))
        on_step(Progress(run.step, loop.iterations, loss["loss"], reading, run))
    weights = run.best if run.stop == "guard" else run.teacher
    delta = difference(model, weights)
    _refuse_nothing(model, loop, delta)
    record = {"steps": run.step, "stop": run.stop or "end", "looks": run.looks, "curve": run.curve}
    return delta, record


def _iterate(
    model: Model,
    loop: Loop,
    target: Target,
    run: State,
    taus: Tensor,
    c_s: Tensor,
    c_0: Tensor,
    paired: bool,
    keep: Tensor | None,
    average: Callable[..., None],
) -> dict[str, float]:
    student, teacher = _cast(model, run.student), _cast(model, run.teacher)

    def network(weights: Weights) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda z, t, c: predict(model, weights, z, t, c)

    nets = Networks(network(student), network(teacher), network({}))
    visit = run.source.visit(teacher)
    t = taus[visit.k.to(taus.device)]
    which = visit.condition if paired else (run.step * loop.batch + torch.arange(len(visit.k))) % len(c_s)
    c = c_s[which.to(c_s.device)]
    with torch.no_grad():
        goal = target(nets, visit.z, t, c)
    z, tau, conditions = visit.z, t, c
    if run.calm and keep is not None:
        calm, eps = run.calm.visit()
        # One pass of the student over both costs less than two, for the same gradient.
        z, goal = torch.cat([z, calm.z]), torch.cat([goal, eps])
        tau = torch.cat([t, taus[calm.k.to(taus.device)]])
        conditions = torch.cat([c, keep[calm.condition.to(keep.device)]])
    run.optimiser.zero_grad(set_to_none=True)
    # ε₀ and ε_s are not batched together: the backward pass would then run over both.
    error = (nets.student(z, tau, conditions).float() - goal.float()).square().flatten(1).mean(1)
    erased, kept = error.split([len(visit.k), len(error) - len(visit.k)])
    loss = erased.mean()
    numbers = {"loss": float(loss.detach())}
    if len(kept):
        numbers["keep_loss"] = float(kept.detach().mean())
        loss = loss + loop.preserve * kept.mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.student.values(), loop.clip)
    numbers["grad_norm"] = float(norm)
    if run.step % 25 == 0:
        with torch.no_grad():
            drift = F.mse_loss(nets.student(visit.z, t, c_0), nets.base(visit.z, t, c_0))
        numbers["drift"] = float(drift)
    if not math.isfinite(numbers["loss"]):
        raise ErasureRefused(f"the loss became {numbers['loss']} at step {run.step}", hint="lower erase.loop.lr")
    run.optimiser.step()
    with torch.no_grad():
        average(list(run.teacher.values()), [p.detach() for p in run.student.values()], run.step)
    return numbers


def _look(run: State, reading: Reading) -> Reading:
    run.looks.append({"step": run.step, "concept": reading.concept, "kept": reading.kept})
    return reading


def _judge(loop: Loop, run: State, reading: Reading) -> None:
    """Stops at the target, or at the guard; remembers the best look in between."""
    first = run.looks[0]
    spoiled = first["kept"] - reading.kept > loop.guard * abs(first["kept"])
    if spoiled and not run.best:
        raise ErasureRefused(
            f"preserved prompts fell from {first['kept']:.3f} to {reading.kept:.3f} before the concept went",
            hint="lower erase.loop.lr, raise erase.loop.preserve or check more often (erase.loop.check_every)",
        )
    if spoiled:
        run.stop = "guard"
        return
    run.best = {n: w.clone() for n, w in run.teacher.items()}
    if reading.concept <= loop.stop_at:
        run.stop = "target"


def _refuse_nothing(model: Model, loop: Loop, delta: dict[str, Tensor]) -> None:
    own = select(model.unet, loop.train)
    moved = math.sqrt(sum(float(d.square().sum()) for d in delta.values()))
    size = math.sqrt(sum(float(p.float().square().sum()) for p in own.values()))
    if moved < loop.least_change * size:
        raise ErasureRefused(
            f"the trained weights moved by {moved / size:.1e} of their norm: nothing was erased",
            hint="raise erase.loop.iterations or erase.loop.lr",
        )
