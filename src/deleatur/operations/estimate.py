"""Estimates what a run costs before it begins: network calls, FLOP, memory, time.

The methods report their numbers of network calls; FLOP and memory follow from the networks' shapes (see
`training.cost`), the time from the measured FLOP rate of this machine. Only the UNet is counted, which takes nearly all
of it. Cached results of earlier runs are not subtracted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from deleatur import plugins
from deleatur.artifacts import prompts
from deleatur.attacks import Attack
from deleatur.benchmark import plan
from deleatur.config import methods
from deleatur.config.plugin_config import Hyperparameters
from deleatur.config.settings import Settings
from deleatur.diffusion import architecture, folders
from deleatur.erasers import Eraser
from deleatur.errors import SettingsError
from deleatur.evaluation import probe
from deleatur.guides import Guide
from deleatur.guides.cfg import CFG
from deleatur.inversion import Inverter
from deleatur.training.cost import CostEstimate, Workload, estimate_cost, measure_speed, sampling_workload

PUBLISHED_STEPS = 50
"""Sampler steps that the hyperparameters of published guides are meant for."""


CAPTIONS = {
    False: "rows: latents that pass the UNet once; memory without Python and its libraries.",
    True: "rows: latents that pass the UNet once; memory without Python and its libraries; time: FLOP of the UNet "
    "divided by this machine's rate in calls of two rows (median, and 10th to 90th percentile if they differ), with "
    "nothing cached.",
}
"""Caption of a table of estimates, without and with times."""


def duration(seconds: float) -> str:
    """Seconds as text, in the largest unit of which there are at least two: 90 s, 25 min, 3 h."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


@dataclass(frozen=True)
class Estimate:
    """Cost of one stage of the chain, one method, or one method entry of the benchmark."""

    name: str
    """The stage, the kind of plug-in, or the benchmark's concept."""
    method: str
    cost: CostEstimate
    seconds: float | None = None
    """By the median speed of repeated calls. None: for no particular machine."""
    seconds_low: float | None = None
    """By the 90th percentile of the speed."""
    seconds_high: float | None = None
    """By the 10th percentile of the speed."""

    @property
    def time(self) -> str:
        """The seconds and, if it differs, their range: 3 h (2 h–4 h). Empty: for no particular machine."""
        if self.seconds is None or self.seconds_low is None or self.seconds_high is None:
            return ""
        low, high = duration(self.seconds_low), duration(self.seconds_high)
        return duration(self.seconds) + (f" ({low}–{high})" if low != high else "")


def published_estimates(kind: str | None = None) -> list[Estimate]:
    """Every method with default hyperparameters, for Stable Diffusion 1.4 in float32; guides: one image, 50 steps.

    Raises SettingsError for a kind that has no workload.
    """
    if kind not in (None, *WORKLOADS):
        raise SettingsError(
            f"expected a kind of plug-in that uses the UNet ({', '.join(WORKLOADS)}), got {kind!r}",
            hint="deleatur methods --cost",
        )
    stable_diffusion = architecture.stable_diffusion()
    return [
        Estimate(*label, estimate_cost(work, stable_diffusion))
        for label, work in _method_workloads({}, PUBLISHED_STEPS)
        if kind in (None, label[0])
    ]


def method_estimates(settings: Settings, kind: str | None = None) -> list[Estimate]:
    """Every method with the hyperparameters of the settings, or else its defaults, for the base model."""
    hyperparameters = {
        s.kind: {n: s.config(n) for n in s.configured} for s in (settings.invert, settings.erase, settings.guide)
    }
    hyperparameters["attacks"] = settings.attack.methods
    works = _method_workloads(hyperparameters, settings.sample.steps)
    return _estimates(settings, [(label, work) for label, work in works if kind in (None, label[0])])


def chain_estimates(settings: Settings) -> list[Estimate]:
    """The stages that use the UNet, each run from its beginning."""
    return _estimates(settings, list(_stage_workloads(settings)))


def benchmark_estimates(settings: Settings, trials: Iterable[plan.Trial]) -> list[Estimate]:
    """Method entries of the benchmark, each with one seed, without the inversion, which they share."""
    workloads = []
    for concept, row in dict.fromkeys((trial.concept, trial.row) for trial in trials):
        trial_settings = plan.trial_settings(settings, plan.Trial(concept, row, settings.seed))
        stages = plan.stages_of(settings, concept, row)
        workloads.append(
            (
                (concept, row),
                sum((work for (stage, _), work in _stage_workloads(trial_settings) if stage in stages), Workload()),
            )
        )
    return _estimates(settings, workloads)


Label = tuple[str, str]


def _estimates(settings: Settings, workloads: Sequence[tuple[Label, Workload]]) -> list[Estimate]:
    """Empty if the base model, whose shape decides the cost, is not on this disk."""
    base, address = settings.base, settings.base.model
    is_remote = "://" in address or address.startswith("models:/")
    folder = None if is_remote else folders.locate(address, "model_index.json")
    if folder is None:
        return []
    network = architecture.from_folder(folder)
    speed = measure_speed(folder, network, base.dtype, base.device)
    costs = [(label, estimate_cost(work, network, base.dtype)) for label, work in workloads]
    return [
        Estimate(*label, cost, cost.flops / speed.median, cost.flops / speed.high, cost.flops / speed.low)
        for label, cost in costs
    ]


def _method_workloads(
    hyperparameters: Mapping[str, Mapping[str, Hyperparameters]], steps: int
) -> Iterator[tuple[Label, Workload]]:
    for kind, (base, work) in WORKLOADS.items():
        for name in plugins.names(kind):
            configured = hyperparameters.get(kind, {}).get(name, {})
            if not configured and any(f.is_required() for f in plugins.load(kind, name, base).model_fields.values()):
                continue  # has required hyperparameters, and the settings do not configure it
            method = methods.instantiate(kind, base, name, configured, f"the hyperparameters of {name}")
            yield (kind, name), work(method, steps)


WORKLOADS: dict[str, tuple[type[BaseModel], Callable[[Any, int], Workload]]] = {
    "erasers": (Eraser, lambda method, steps: method.workload("words")),
    "inversion": (Inverter, lambda method, steps: method.workload()),
    "attacks": (Attack, lambda method, steps: method.workload()),
    "guides": (Guide, lambda method, steps: sampling_workload(1, steps, method.predictions_per_step(1), 1)),
}


def _stage_workloads(settings: Settings) -> Iterator[tuple[Label, Workload]]:
    """Workload of each stage that uses the UNet, by stage and method; sampled evaluations included."""
    batch, steps, targets = settings.sample.batch_size, settings.sample.steps, settings.targets
    guide, eraser = methods.guide(settings), methods.eraser(settings)

    def plain(images: int) -> Workload:
        return sampling_workload(images, steps, CFG().predictions_per_step(0), batch)

    def guided(images: int) -> Workload:
        return sampling_workload(images, steps, guide.predictions_per_step(len(targets)), batch)

    def candidate(images: int) -> Workload:
        return guided(images) if eraser.one_step is None else sampling_workload(images, 1, 1, batch)

    def evaluations(times: int, batches: Sequence[int], sample: Callable[[int], Workload]) -> Workload:
        """batches: images of each call of the sampler in one evaluation."""
        return sum([sample(images) for images in batches] * times, Workload())

    inversions = {name: methods.inverter(settings, name).workload() for name in targets}
    evaluated = [
        work + evaluations(work.evaluations, [probe.IMAGES_PER_TOKEN * work.num_tokens], plain)
        for work in inversions.values()
    ]
    yield ("invert", settings.invert.method), sum(evaluated, Workload())

    tokens = {name: work.num_tokens if settings.erase.source == "token" else None for name, work in inversions.items()}
    erasure, batches = eraser.workload(settings.erase.source), _evaluation_batches(settings, tokens)
    first = min(erasure.evaluations, 1)  # the first evaluation is of the base model
    of_base, of_candidate = (
        evaluations(first, batches, guided),
        evaluations(erasure.evaluations - first, batches, candidate),
    )
    yield ("erase", settings.erase.method), erasure + (of_base + of_candidate)

    by_name = methods.attacks(settings, eraser.one_step)
    attacks = [attack.workload() for attack in by_name.values()]
    yield ("attack", ", ".join(by_name)), sum(attacks * len(targets), Workload())

    per_prompt, images = settings.sample.images_per_prompt, sum(prompts.image_counts(settings).values())
    images += sum(work.num_tokens for work in inversions.values()) * per_prompt.get("token", 1)
    images += len(targets) * sum(work.num_tokens for work in attacks) * per_prompt.get("attack", 1)
    references = [plain(images)] * (2 if settings.sample.champion else 1)
    yield ("sample", settings.guide.method), sum(references, candidate(images))


def _evaluation_batches(settings: Settings, tokens: Mapping[str, int | None]) -> list[int]:
    """Images of each sampler call in one evaluation of `erase`: one call per concept, one for the preserved prompts.

    tokens: number of soft tokens per concept, None if words specify it.
    """
    batches = []
    for name, num_tokens in tokens.items():
        spec = settings.concepts[name]
        concept_prompts = len(prompts.read(spec.prompts, "dev", name, "concept"))
        terms = len(spec.words) if num_tokens is None else num_tokens
        states = terms * len(spec.prompt_templates)
        batches.append(min(concept_prompts, probe.EVAL_PROMPTS) + min(states, probe.EVAL_PROMPTS))
    return [*batches, len(prompts.preserved_validation_prompts(settings, probe.EVAL_PROMPTS))]
