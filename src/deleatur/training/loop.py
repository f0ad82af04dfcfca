"""The training loop of the fine-tuning erasers. A method supplies the terms of its loss, this module all the rest.

θ: student, trained            θ*: teacher, its exponential moving average (EMA)         θ₀: the base model, frozen
c₀: the empty prompt           c_p: condition of the trajectories                        c_s: condition to be erased
m: EMA decay                   s_g: guidance scale of the trajectories                   N: their sampler steps

For methods that train on the sampler's trajectories:

L = mean (ε_θ(z, τ_k, c_s) − sg[target(z, τ_k, c_s)])²  +  w · mean (ε_θ(z', τ, c_keep) − ε_θ₀(z', τ, c_keep))²

The second term is a prior preservation of ours and of no paper: w is 0 by default, and reports name it when it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from deleatur.diffusion.model import Model
from deleatur.diffusion.overlay import weight_difference
from deleatur.errors import ErasureRefused, SettingsError
from deleatur.maths.seeds import generator
from deleatur.training.config import DRIFT_INTERVAL, TrainingConfig, TrajectoryTrainingConfig
from deleatur.training.early_stopping import Evaluation, Probe, acceptable, advice, best, describe
from deleatur.training.losses import (
    Batch,
    Denoiser,
    Denoisers,
    ErrorFunction,
    LossTerm,
    PreservationTerm,
    TargetFunction,
    TrajectoryTerm,
    mean_squared_error,
)
from deleatur.training.optimizer_state import (
    SavedState,
    check_finite,
    group_by_prefix,
    optimizer_tensors,
    restore_optimizer,
)
from deleatur.training.parameters import select
from deleatur.training.trajectories import (
    TimestepDistribution,
    TrajectoryReplay,
    TrajectorySampler,
    build_trajectories,
)


@dataclass
class TrainingState:
    """The complete state of a run. Saved and restored, the run continues bit for bit."""

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    terms: Mapping[str, LossTerm]
    best: dict[str, Tensor] = field(default_factory=dict)
    """Teacher weights of the best evaluation so far."""
    step: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    stop: str = ""
    """Why the run stopped early: "target" or "guard"."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by a flat name."""
        flat = {
            f"{part}/{n}": t.detach() for part in ("student", "teacher", "best") for n, t in getattr(self, part).items()
        }
        flat |= {f"adam/{path}": t for path, t in optimizer_tensors(self.optimizer, self.student).items()}
        flat |= {f"term/{name}/{n}": t for name, term in self.terms.items() for n, t in term.tensors().items()}
        return flat | {f"generator/{name}": term.generator.get_state() for name, term in self.terms.items()}

    def metadata(self) -> dict[str, Any]:
        """Everything else, as JSON values."""
        return {"step": self.step, "evaluations": self.evaluations, "curve": self.curve, "stop": self.stop}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Loads a saved state into this initial one."""
        saved = group_by_prefix(tensors)
        for part in ("student", "teacher"):
            for name, value in saved[part].items():
                getattr(self, part)[name].copy_(value)
        # In the teacher's memory layout: a file has none, and kernels round by layout.
        self.best = {n: torch.empty_like(self.teacher[n]).copy_(w) for n, w in saved.get("best", {}).items()}
        restore_optimizer(self.optimizer, self.student, saved["adam"])
        states = group_by_prefix(saved.get("term", {}))
        for name, term in self.terms.items():
            term.restore(states.get(name, {}))
            term.generator.set_state(saved["generator"][name])
        for key, value in metadata.items():
            setattr(self, key, value)


@dataclass(frozen=True)
class TrainingProgress:
    """Argument of the callback after every iteration, and once after restoring a checkpoint."""

    step: int
    total: int
    """Equal to `step` once the run has stopped."""
    loss: float
    state: TrainingState | None = None
    """None for runs too short to checkpoint."""


@dataclass(frozen=True)
class ErasureContext:
    """Arguments of one erasure beside the model and the concepts."""

    seed: int
    preserve: Tensor | None = None
    """(q, L, d): states of prompts to preserve, for methods that use them."""
    preserve_ends: tuple[int, ...] = ()
    """(q,) positions of their end tokens, for methods that preserve single tokens."""
    on_step: Callable[[TrainingProgress], None] = lambda progress: None
    """Called after every step."""
    probe: Probe | None = None
    """Called at every evaluation interval."""
    state: SavedState | None = None
    """Checkpoint of a run with the same arguments, to resume from."""


def trajectory_terms(
    model: Model,
    config: TrajectoryTrainingConfig,
    target: TargetFunction,
    *,
    c_p: Tensor,
    c_s: Tensor,
    c_0: Tensor,
    paired: bool,
    context: ErasureContext,
    default_distribution: TimestepDistribution = "uniform",
    extra_conditions: Tensor | None = None,
    error: ErrorFunction = mean_squared_error,
) -> dict[str, LossTerm]:
    """The terms of a method that trains on the sampler's trajectories, those to erase prompted with c_p (n, L, d),
    those to preserve with `context.preserve`. The other arguments are those of `TrajectoryTerm`.

    Raises SettingsError where a preservation loss lacks prompts.
    """
    timesteps = torch.tensor(model.schedule.timesteps(config.sampler_steps), device=model.device)
    g = generator(context.seed, "erase", "trajectories")
    sampler = TrajectorySampler(model, c_0, c_p, config.guidance_scale, config.sampler_steps, g, config.train_timesteps)
    trajectories = build_trajectories(
        config.trajectories,
        sampler,
        batch_size=config.batch_size,
        pool_size=config.pool_size,
        distribution=config.timestep_distribution or default_distribution,
    )
    erasing = TrajectoryTerm(
        trajectories,
        config.batch_size,
        g,
        timesteps,
        config.trajectory_model == "base",
        c_s,
        paired,
        c_0[:0] if extra_conditions is None else extra_conditions,
        target,
        error,
    )
    if not config.preservation_weight:
        return {"erase": erasing}
    if (c_keep := context.preserve) is None:
        raise SettingsError(
            "training.preservation_weight is above 0 but there is no prompt to preserve",
            hint="add prompts of the dev split to paths.prompts, or set preservation_weight: 0",
        )
    g = generator(context.seed, "erase", "keep")
    sampler = TrajectorySampler(model, c_0, c_keep, config.guidance_scale, config.sampler_steps, g)
    replay = TrajectoryReplay(sampler, {}, batch_size=config.batch_size, pool_size=config.pool_size)
    return {"erase": erasing, "keep": PreservationTerm(replay, timesteps, c_keep, config.preservation_weight)}


def finetune(
    model: Model, config: TrainingConfig, terms: Mapping[str, LossTerm], *, c_0: Tensor, context: ErasureContext
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trains, and returns (θ* − θ₀ by name, record of the run). The model itself is not modified.

    `terms`: "erase", and "keep" where the method preserves something. Resuming from `context.state` gives the same
    bits as an uninterrupted run. Raises ErasureRefused when the weights hardly moved or the run destroyed the model.
    """
    run = _initial_state(model, config, terms)
    if context.state:
        run.restore(*context.state)
        context.on_step(_progress(config, run))
    update_average = get_ema_multi_avg_fn(config.ema_decay)
    probe = context.probe if config.eval_every else None
    with torch.random.fork_rng(devices=[]):  # the caller's global generator stays as it was
        if probe and not run.evaluations:
            _evaluate(run, probe({}))
        while run.step < config.iterations and not run.stop:
            values = _train_step(model, config, run, c_0, update_average)
            run.step += 1
            run.curve.append({"step": run.step, **values})
            if probe and (run.step % config.eval_every == 0 or run.step == config.iterations):
                _evaluate(run, probe(_cast(model, run.teacher)))
                _early_stopping(model, config, run)
            context.on_step(_progress(config, run))
    if run.stop == "guard":
        weights, selected = run.best, best(acceptable(run.evaluations, config.max_preserved_drop))["step"]
    else:  # not the evaluation with the fewest images: r_ψ takes what resembles the concept for it, and ranks poorly
        weights, selected = run.teacher, run.step
    delta = weight_difference(model, weights)
    _check_relative_change(model, config, delta)
    record = {"steps": run.step, "selected": selected, "stop": run.stop or "end"}
    return delta, record | {"evaluations": run.evaluations, "curve": run.curve}


def _initial_state(model: Model, config: TrainingConfig, terms: Mapping[str, LossTerm]) -> TrainingState:
    parameters = select(model.unet, config.trainable)
    # Master weights in fp32 whatever the network's precision: an update of `lr` is below the resolution of bfloat16.
    student = {n: p.detach().clone().float().requires_grad_() for n, p in parameters.items()}
    teacher = {n: p.detach().clone().float() for n, p in parameters.items()}
    optimizer = torch.optim.AdamW(
        student.values(), lr=config.lr, betas=(config.adam_beta1, 0.999), weight_decay=config.weight_decay
    )
    return TrainingState(student, teacher, optimizer, terms)


def _cast(model: Model, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp32 master weights in the network's precision; the same tensors when that is fp32."""
    return {n: w.to(model.dtype) for n, w in weights.items()}


def _train_step(
    model: Model, config: TrainingConfig, run: TrainingState, c_0: Tensor, update_average: Callable[..., None]
) -> dict[str, float]:
    """One optimizer step and one EMA step. Returns the row of the curve."""
    denoisers = Denoisers(*(Denoiser(model, _cast(model, weights)) for weights in (run.student, run.teacher, {})))
    with torch.no_grad():  # trajectories and targets carry no gradient
        batches = {name: term.batch(denoisers, run.step) for name, term in run.terms.items()}
    run.optimizer.zero_grad(set_to_none=True)
    errors = _term_errors(denoisers.student, run.terms, batches)
    loss = torch.stack([term.weight * errors[name] for name, term in run.terms.items()]).sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.student.values(), config.max_grad_norm)
    values = {"loss" if name == "erase" else f"{name}_loss": float(e.detach()) for name, e in errors.items()}
    values["grad_norm"] = float(norm)
    if run.step % DRIFT_INTERVAL == 0:
        # Side effect on the unconditional prediction, which guidance uses for every prompt.
        batch = batches["erase"]
        with torch.no_grad():
            drift = F.mse_loss(denoisers.student(batch.z, batch.t, c_0), denoisers.base(batch.z, batch.t, c_0))
        values["drift"] = float(drift)
    check_finite(values, run.step + 1, config.lr, "training.lr", trained=run.step > 0)
    run.optimizer.step()
    with torch.no_grad():
        update_average(list(run.teacher.values()), [p.detach() for p in run.student.values()], run.step)
    return values


def _term_errors(student: Denoiser, terms: Mapping[str, LossTerm], batches: Mapping[str, Batch]) -> dict[str, Tensor]:
    """Mean error of each term. One pass over all rows is faster than one per term, and has the same gradient."""
    z, t, c = (torch.cat([getattr(batch, part) for batch in batches.values()]) for part in ("z", "t", "c"))
    predictions = student(z, t, c).float().split([len(batch.z) for batch in batches.values()])
    return {
        name: terms[name].error(prediction, batches[name].target.float()).mean()
        for name, prediction in zip(batches, predictions, strict=True)
    }


def _progress(config: TrainingConfig, run: TrainingState) -> TrainingProgress:
    return TrainingProgress(run.step, run.step if run.stop else config.iterations, run.curve[-1]["loss"], run)


def _evaluate(run: TrainingState, evaluation: Evaluation) -> None:
    run.evaluations.append({"step": run.step, **asdict(evaluation)})


def _early_stopping(model: Model, config: TrainingConfig, run: TrainingState) -> None:
    """Stops at the target rate or at degraded preserved prompts; copies the weights of the best evaluation.

    Raises ErasureRefused where no evaluation was acceptable: there are no weights to return to.
    """
    last = run.evaluations[-1]
    candidates = acceptable(run.evaluations, config.max_preserved_drop)
    if not candidates:
        raise ErasureRefused(
            f"preserved prompts degraded before the concept was erased:{describe(run.evaluations)}",
            hint=advice(run.evaluations),
            record={"steps": run.step, "evaluations": run.evaluations, "curve": run.curve},
            weights=weight_difference(model, run.teacher),
        )
    if last not in candidates:
        run.stop = "guard"
        return
    if last is best(candidates):
        run.best = {n: w.clone() for n, w in run.teacher.items()}
    if last["concept"] <= config.target_rate:
        run.stop = "target"


def _check_relative_change(model: Model, config: TrainingConfig, delta: dict[str, Tensor]) -> None:
    """Raises ErasureRefused when ‖θ* − θ₀‖ / ‖θ₀‖ over the trained tensors is too small or too large."""
    parameters = select(model.unet, config.trainable)
    moved = math.sqrt(sum(float(d.square().sum()) for d in delta.values()))
    change = moved / math.sqrt(sum(float(p.float().square().sum()) for p in parameters.values()))
    if change < config.min_relative_change:
        raise ErasureRefused(
            f"the trained weights moved by {change:.1e} of their norm: nothing was erased",
            hint="raise training.iterations or training.lr",
        )
    if not change <= config.max_relative_change:  # true for NaN as well
        raise ErasureRefused(
            f"the trained weights moved by {change:.1f} times their norm: little of the model is left",
            hint="lower training.lr or training.iterations",
        )
