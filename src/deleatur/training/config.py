"""Hyperparameters of the fine-tuning erasers, their presets, and the compute that a training with them takes."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deleatur.training.cost import Workload
from deleatur.training.parameters import Selector
from deleatur.training.trajectories import FreshTrajectories, TimestepDistribution, TrajectoryPool, TrajectoryReplay

DRIFT_INTERVAL = 25
"""Iterations between two measurements of how far the prediction for the empty prompt has moved."""

PRESETS: dict[str, dict[str, Any]] = {
    # The method as published, with the defaults of `PARITY_FIELDS`; of SDD and ESD, one fresh trajectory per iteration.
    "parity": {},
    # Staggered pools train on every state of a trajectory: 2.7, 5.4 and 10.8 times fewer operations than `parity` at
    # equal iterations. Under Adam a batch of b moves the weights up to √b as far: the learning rate is divided by √b.
    "fast-safe": {"trajectories": "pool", "sampler_steps": 25, "batch_size": 4, "pool_size": 32, "lr": 5e-6},
    "fast": {"trajectories": "pool", "sampler_steps": 25, "batch_size": 2, "pool_size": 24, "lr": 7e-6},
    "sweep": {"trajectories": "pool", "sampler_steps": 25, "batch_size": 1, "pool_size": 12},
}

PARITY_FIELDS = (
    "trajectories",
    "trajectory_model",
    "batch_size",
    "train_timesteps",
    "timestep_distribution",
    "preservation_weight",
    "eval_every",
)
"""Hyperparameters that the preset parity leaves at the method's defaults. Lengths, rates and tensors may fit the model
at hand."""

DISTRIBUTION_NOTES: dict[TimestepDistribution, str] = {
    "uniform": "Training timesteps were sampled uniformly, as in SDD and ESD; HFI samples mid-trajectory ones most.",
    "beta33": "Training timesteps were sampled mid-trajectory most, as in HFI; SDD and ESD sample uniformly.",
}


class TrainingConfig(BaseModel):
    """Hyperparameters of every fine-tuning, whatever its training states. Defaults are those of SDD's release."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    also_published: ClassVar[tuple[Selector, ...]] = ()
    """Values of `trainable` that are published too, beside the default."""

    trainable: Selector = "xattn"
    """Which tensors of the UNet train."""
    iterations: int = Field(1500, gt=0)
    """Optimizer steps."""
    lr: float = Field(1e-5, gt=0)
    """Learning rate of AdamW; constant, without warm-up."""
    weight_decay: float = Field(1e-4, ge=0)
    """Of AdamW; it pulls the weights towards zero, not towards the base model."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """β₁ of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this global norm over the trained tensors."""
    ema_decay: float = Field(0.999, ge=0, le=1)
    """m. 0.999 over 1500 steps keeps 22 % of θ₀: the returned teacher lags by design.
    0: teacher and student are the same."""
    batch_size: int = Field(1, gt=0)
    """b, states per iteration."""
    eval_every: int = Field(0, ge=0)
    """Evaluation interval: iterations between two evaluations of sampled images, with one after the last iteration.
    0: never evaluate, train to the end."""
    target_rate: float = Field(0.0, ge=0, le=1)
    """Stop once the share of evaluation images that show the concept is at or below this."""
    max_preserved_drop: float = Field(1.0, ge=0)
    """Stop, and return to the best earlier evaluation, once preserved prompts certainly score worse than the base model
    by this share: the lower 95 % bound of the paired drop over the prompts counts, for noise is no reason to stop.
    The best evaluation is the one with the fewest images of the concept."""
    min_relative_change: float = Field(1e-5, ge=0)
    """A run whose relative change of the trained weights is smaller is refused: it did nothing."""
    max_relative_change: float = Field(2.0, gt=0)
    """A run whose relative change is larger, or NaN, is refused: it destroyed the model. Adam moves a weight by at most
    `lr` per iteration: 1500 of 1e-5 are half of the 0.03 that weights of Stable Diffusion have."""

    @model_validator(mode="after")
    def check_eval_every(self) -> Self:
        unused = {"target_rate": self.target_rate > 0, "max_preserved_drop": self.max_preserved_drop < 1}
        if not self.eval_every and any(unused.values()):
            names = ", ".join(name for name, is_set in unused.items() if is_set)
            raise ValueError(f"{names} needs evaluations of sampled images: set eval_every too, or leave {names} out")
        return self

    def notes(self) -> list[str]:
        """Deviations from the paper that change what the method does; lengths and rates do not count."""
        notes = []
        published = type(self).model_fields["trainable"].default
        if self.trainable not in (published, *self.also_published):
            notes.append(f"The {self.trainable} tensors were trained; the first publication trains {published}.")
        if self.eval_every:
            notes.append("Evaluations of sampled images could stop the training early, or return to the best of them.")
        return notes

    def workload(self, erase_rows: int, preserve_rows: int = 0) -> Workload:
        """Of a student that predicts so many rows per iteration for the erasing term and for the others."""
        # Student, teacher, Adam's two moments and the best evaluation in fp32; the gradient is part of a pass's memory.
        bytes_per_parameter = 4 * (4 + bool(self.eval_every))
        drift_measurements = -(-self.iterations // DRIFT_INTERVAL)
        return Workload(
            forward=2 * erase_rows * drift_measurements,
            backward=(erase_rows + preserve_rows) * self.iterations,
            max_forward_batch=erase_rows,
            max_backward_batch=erase_rows + preserve_rows,
            trainable=self.trainable,
            bytes_per_parameter=bytes_per_parameter,
            evaluations=1 + -(-self.iterations // self.eval_every) if self.eval_every else 0,
        )


class TrajectoryTrainingConfig(TrainingConfig):
    """Hyperparameters of a training on states of the sampler's trajectories."""

    preset: Literal["parity", "fast-safe", "fast", "sweep"] | None = None
    """Source of the values that are not set; none: the method's defaults. parity allows only what is published."""
    guidance_scale: float = 3.0
    """s_g, of the trajectories' sampler."""
    sampler_steps: int = Field(50, gt=0)
    """N, steps of that sampler."""
    train_timesteps: int | None = Field(None, gt=0)
    """S: train only on the first S of the N sampler steps, which decide what an image shows; none: on all."""
    trajectories: Literal["fresh", "pool"] = "fresh"
    """Source of training states: fresh, one new trajectory for each (SDD); pool, all states of M staggered ones."""
    trajectory_model: Literal["teacher", "base"] = "teacher"
    """Which model makes the trajectories: the current teacher, or the base model."""
    pool_size: int = Field(32, gt=0)
    """M, trajectories of the pool; with M/b of 8 or more, successive batches differ.
    Trajectories of preserved prompts are made M at a time."""
    timestep_distribution: TimestepDistribution | None = None
    """Distribution of training timesteps: uniform, or beta33, mid-trajectory. None: the method's own; SDD's is
    uniform for words, and beta33 for tokens, as in HFI."""
    preservation_weight: float = Field(0.0, ge=0)
    """Weight of the preservation loss on prompts to preserve."""

    @model_validator(mode="before")
    @classmethod
    def apply_preset(cls, values: Any) -> Any:
        """Fills in the preset's values; an unknown preset is left for validation to refuse."""
        preset = values.get("preset") if isinstance(values, dict) else None
        return {**PRESETS.get(preset, {}), **values} if isinstance(preset, str) else values

    @model_validator(mode="after")
    def check_parity(self) -> Self:
        fields = type(self).model_fields
        changed = [name for name in PARITY_FIELDS if getattr(self, name) != fields[name].default]
        if self.preset == "parity" and changed:
            raise ValueError(
                f"preset parity is the method as published, without {', '.join(changed)}; "
                f"leave out preset, or {', '.join(changed)}"
            )
        return self

    @model_validator(mode="after")
    def check_sizes(self) -> Self:
        if self.trained_steps > self.sampler_steps:
            raise ValueError(
                f"expected train_timesteps, the number of trained steps, up to sampler_steps "
                f"({self.sampler_steps}), got {self.train_timesteps}; null trains on all"
            )
        if self.trajectories == "pool" and self.batch_size > self.pool_size:
            raise ValueError(
                f"expected batch_size up to pool_size ({self.pool_size}), since a batch has each trajectory once at "
                f"most, got {self.batch_size}"
            )
        return self

    @property
    def trained_steps(self) -> int:
        """S."""
        return self.train_timesteps or self.sampler_steps

    def notes(self) -> list[str]:
        notes = super().notes()
        if self.preservation_weight:
            notes.append(
                f"A preservation loss was added to the paper's loss, with weight {self.preservation_weight:g}."
            )
        if self.trajectories == "pool":
            notes.append(
                f"Training states came from a pool of {self.pool_size} staggered trajectories; all states were used."
            )
        if self.trained_steps < self.sampler_steps:
            notes.append(f"Only the first {self.trained_steps} of {self.sampler_steps} sampler steps were trained on.")
        if self.timestep_distribution:
            notes.append(DISTRIBUTION_NOTES[self.timestep_distribution])
        return notes

    def trajectory_workload(
        self, target_rows: int, *, extra_conditions: int = 0, default_distribution: TimestepDistribution = "uniform"
    ) -> Workload:
        """Of a training on `loop.trajectory_terms`. target_rows: rows that the target function takes for a state."""
        n, b, preserves = self.iterations, self.batch_size, bool(self.preservation_weight)
        if self.trajectories == "fresh":
            states = FreshTrajectories.workload(n, self.trained_steps, b)
        else:
            distribution = self.timestep_distribution or default_distribution
            states = TrajectoryPool.workload(n, self.trained_steps, b, self.pool_size, distribution)
        replay = TrajectoryReplay.workload(n, self.sampler_steps, b, self.pool_size) if preserves else Workload()
        targets = Workload(forward=n * b * target_rows, max_forward_batch=b * target_rows)
        student = self.workload(b * (1 + extra_conditions), b if preserves else 0)
        # Both kinds of trajectories are stored at the same time, while `+` takes the larger of the two.
        stored = Workload(stored_latents=states.stored_latents + replay.stored_latents)
        return student + states + replay + targets + stored
