"""What a run takes, told before it begins: network calls, memory, time.

Counts come from the methods, operations and memory from the networks' shapes (see `diffusion.cost`), the time from one
network call on this machine: operations divided by those it does in a second. Only the UNet is counted, which takes
nearly all of it; what is kept from an earlier run is not drawn again, and takes nothing.
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
from deleatur.config.settings import Numbers, Settings
from deleatur.diffusion import architecture, folders
from deleatur.erasers import Eraser
from deleatur.guides import Guide
from deleatur.guides.cfg import CFG
from deleatur.inversion import Inverter
from deleatur.stages import erase, invert
from deleatur.training.cost import Cost, Work, cost, drawn, speed

STEPS = 50
"""Of the sampler that published guides are meant for."""


HOW = {
    False: "rows: latents that go through the UNet once; memory without Python and the libraries.",
    True: "rows: latents that go through the UNet once; memory without Python and the libraries; time: operations "
    "divided by those that one call of two rows did in a second, so only the UNet's, and as if nothing were kept.",
}
"""What the columns of a table of costs are, without and with times."""


def duration(seconds: float) -> str:
    """In the largest unit that it has two of: 90 s, 25 min, 3 h."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


@dataclass(frozen=True)
class Estimate:
    """One stage of the chain, one method, or one row of a comparison."""

    name: str
    """Of the stage, the shelf, or the concept that is compared."""
    method: str
    """Of several, or a row: its name."""
    cost: Cost
    seconds: float | None = None
    """None: nobody knows the machine."""


def published(shelf: str | None = None) -> list[Estimate]:
    """Every method with its own numbers, for Stable Diffusion 1.4 in float32; a guide for one picture of 50 steps."""
    sd = architecture.stable_diffusion()
    return [Estimate(*which, cost(work, sd)) for which, work in _methods({}, STEPS) if shelf in (None, which[0])]


def of_methods(settings: Settings, shelf: str | None = None) -> list[Estimate]:
    """Every method with the settings' numbers, where they have some, for the base model."""
    numbers = {s.shelf: {n: s.numbers(n) for n in s.named} for s in (settings.invert, settings.erase, settings.guide)}
    numbers["attacks"] = settings.attack.methods
    works = _methods(numbers, settings.sample.steps)
    return _estimated(settings, [(which, work) for which, work in works if shelf in (None, which[0])])


def chain(settings: Settings) -> list[Estimate]:
    """The stages that use the UNet, from an empty folder to their end."""
    return _estimated(settings, list(_stages(settings)))


def rows(settings: Settings, cells: Iterable[plan.Cell]) -> list[Estimate]:
    """Rows of a comparison, each from an empty folder with one seed; tokens, which rows share, are not in it."""
    works = []
    for concept, row in dict.fromkeys((cell.concept, cell.row) for cell in cells):
        own = plan.settings_of(settings, plan.Cell(concept, row, settings.seed))
        runs = plan.stages_of(settings, concept, row)
        works.append(((concept, row), sum((work for (stage, _), work in _stages(own) if stage in runs), Work())))
    return _estimated(settings, works)


Which = tuple[str, str]


def _estimated(settings: Settings, works: Sequence[tuple[Which, Work]]) -> list[Estimate]:
    """Empty where the base model is not on this disk: nobody knows its size."""
    base, address = settings.base, settings.base.model
    far = "://" in address or address.startswith("models:/")
    folder = None if far else folders.find(address, "model_index.json")
    if folder is None:
        return []
    of = architecture.read(folder)
    rate = speed(folder, of, base.dtype, base.device)
    found = [(which, cost(work, of, base.dtype)) for which, work in works]
    return [Estimate(*which, c, c.operations / rate) for which, c in found]


def _methods(numbers: Mapping[str, Mapping[str, Numbers]], steps: int) -> Iterator[tuple[Which, Work]]:
    for shelf, (base, work) in WORKS.items():
        for name in plugins.names(shelf):
            own = numbers.get(shelf, {}).get(name, {})
            if not own and any(f.is_required() for f in plugins.find(shelf, name, base).model_fields.values()):
                continue  # what it takes depends on numbers that nobody has given
            yield (shelf, name), work(methods.instantiate(shelf, base, name, own, f"the numbers of {name}"), steps)


WORKS: dict[str, tuple[type[BaseModel], Callable[[Any, int], Work]]] = {
    "erasers": (Eraser, lambda method, steps: method.work("words")),
    "inversion": (Inverter, lambda method, steps: method.work()),
    "attacks": (Attack, lambda method, steps: method.work()),
    "guides": (Guide, lambda method, steps: drawn(1, steps, method.predictions(1), 1)),
}


def _stages(settings: Settings) -> Iterator[tuple[Which, Work]]:
    batch, steps, targets = settings.sample.batch, settings.sample.steps, settings.targets
    guide, eraser = methods.guide(settings), methods.eraser(settings)

    def plain(pictures: int) -> Work:
        return drawn(pictures, steps, CFG().predictions(0), batch)

    def steered(pictures: int) -> Work:
        return drawn(pictures, steps, guide.predictions(len(targets)), batch)

    def candidate(pictures: int) -> Work:
        return steered(pictures) if eraser.one_step is None else drawn(pictures, 1, 1, batch)

    def looked(times: int, calls: Sequence[int], draw: Callable[[int], Work]) -> Work:
        """calls: pictures of each call of the sampler."""
        return sum([draw(n) for n in calls] * times, Work())

    learned = {name: methods.inverter(settings, name).work() for name in targets}
    bare = [work + looked(work.looks, [invert.LOOK * work.found], plain) for work in learned.values()]
    yield ("invert", settings.invert.method), sum(bare, Work())

    found = {name: work.found if settings.erase.source == "token" else None for name, work in learned.items()}
    erasing = eraser.work(settings.erase.source)
    calls, first = _looked_at(settings, found), min(erasing.looks, 1)  # the first look is at the base model
    looks = looked(first, calls, steered) + looked(erasing.looks - first, calls, candidate)
    yield ("erase", settings.erase.method), erasing + looks

    asked = methods.attacks(settings, eraser.one_step)
    attacks = [attack.work() for attack in asked.values()]
    yield ("attack", ", ".join(asked)), sum(attacks * len(targets), Work())

    each, pictures = settings.sample.per_prompt, sum(prompts.image_counts(settings).values())
    pictures += sum(work.found for work in learned.values()) * each.get("token", 1)
    pictures += len(targets) * sum(work.found for work in attacks) * each.get("attack", 1)
    sides = [plain(pictures)] * (2 if settings.sample.champion else 1)
    yield ("sample", settings.guide.method), sum(sides, candidate(pictures))


def _looked_at(settings: Settings, tokens: Mapping[str, int | None]) -> list[int]:
    """Pictures of each call at a look of `erase`: of every concept, and of what is preserved."""
    out = []
    for name, found in tokens.items():
        spec = settings.concepts[name]
        asked = len(prompts.read(spec.prompts, "dev", name, "concept"))
        said = len(spec.words) if found is None else found
        out.append(min(asked, erase.LOOK) + said * len(spec.sentences))
    return [*out, min(len(prompts.to_preserve(settings)), erase.LOOK)]
