"""What several stages read: the base model, methods by name, prompts, tokens, heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from torch import Tensor

from deleatur import plug
from deleatur.attacks import Attack
from deleatur.detectors import Detector
from deleatur.diffusion import encode
from deleatur.diffusion.features import Clip, load_clip
from deleatur.diffusion.load import Model, load
from deleatur.erasers import Eraser
from deleatur.errors import DataError, SettingsError
from deleatur.feedback import votes
from deleatur.feedback.reward import Head
from deleatur.guides import Guide
from deleatur.inversion import Inverter
from deleatur.io import images, objects, tables, tensors
from deleatur.metrics import Metric
from deleatur.records import Concept, Pictures, Prompt, Role, SoftToken
from deleatur.settings import Choice, Settings, explain, merged

M = TypeVar("M", bound=BaseModel)

DELTA = "delta.safetensors"
PLAIN = "cfg"
"""The guide that plain diffusers draws with."""
PROMPTS = "see prompts/README.md"


def method(shelf: str, base: type[M], name: str, numbers: Mapping[str, Any], where: str) -> M:
    """The method `name` of a shelf with its numbers. Raises SettingsError naming each wrong key."""
    found = plug.find(shelf, name, base)
    try:
        return found(**numbers)
    except ValidationError as e:
        raise SettingsError(explain(e, where), hint=f"deleatur methods {shelf}") from e


def chosen(section: Choice, base: type[M], where: str, name: str | None = None) -> M:
    """The method that a section uses, or the one named, with its numbers."""
    name = name or section.method
    return method(section.shelf, base, name, section.numbers(name), f"{where}.{name}")


def guide(settings: Settings) -> Guide:
    """Raises SettingsError for one that the sampler would finish without."""
    found = chosen(settings.guide, Guide, "guide")
    late = {name: found.starts(name) for name in settings.targets if found.starts(name) >= settings.sample.steps}
    if late:
        names, first = ", ".join(late), min(late.values())
        raise SettingsError(
            f"guide ({settings.guide.method}) steers away from {names} from step {first} on (its warm_up), and the "
            f"sampler's steps are 0 to {settings.sample.steps - 1}: it would do nothing",
            hint="lower the guide's warm_up, or raise sample.steps; then: deleatur check",
        )
    return found


def eraser(settings: Settings) -> Eraser:
    """Raises SettingsError also when the method does not fit one of the targets, or the guide."""
    found = chosen(settings.erase, Eraser, "erase")
    found.fits(settings.targets)
    if found.one_step is not None and settings.guide.method != PLAIN:
        raise SettingsError(
            f"guide.method: expected {PLAIN}, since what erase.method {settings.erase.method} makes draws in one call "
            f"and nothing can steer it on the way, got {settings.guide.method}",
            hint=f"guide.method: {PLAIN}, or another erase.method; then: deleatur check",
        )
    return found


def beyond_weights(settings: Settings) -> str:
    """What the candidate is drawn with that neither a version nor an export holds; empty: its weights are all."""
    if settings.guide.method != PLAIN:
        return f"the guide {settings.guide.method}"
    return "" if eraser(settings).one_step is None else "a sampler of one step"


def attacks(settings: Settings, one_step: int | None) -> dict[str, Attack]:
    """On weights that `one_step` is said of, as of a Delta. Raises SettingsError for one that has nothing to ask."""
    given = settings.attack.methods
    found = {name: method("attacks", Attack, name, own, f"attack.methods.{name}") for name, own in given.items()}
    if found and one_step is not None:
        raise SettingsError(
            "attack.methods: expected none, since attacks ask what a network says at every noise level, and what the "
            f"eraser makes draws from one alone; got {', '.join(found)}",
            hint="attack: {methods: {}}, or another erase.method; then: deleatur check",
        )
    return found


def inverter(settings: Settings, concept: str, name: str | None = None) -> Inverter:
    """The inversion method with the concept's own numbers over those of `invert`."""
    name, own = name or settings.invert.method, settings.concepts[concept].invert
    numbers = merged(settings.invert.numbers(name), own.get(name, {}))
    return method("inversion", Inverter, name, numbers, f"invert.{name} with concepts.{concept}.invert")


def detectors(settings: Settings) -> dict[str, Detector]:
    return _named("detectors", Detector, settings.evaluate.detectors)


def metrics(settings: Settings) -> dict[str, Metric]:
    return _named("metrics", Metric, settings.evaluate.metrics)


def _named(shelf: str, base: type[M], section: Mapping[str, Mapping[str, Any]]) -> dict[str, M]:
    """Methods that are used several at a time, each under a name of the user's, `method` among its numbers."""
    out = {}
    for name, given in section.items():
        where, numbers = f"evaluate.{shelf}.{name}", dict(given)
        if not isinstance(kind := numbers.pop("method", None), str):
            raise SettingsError(
                f"{where}: expected `method`, one of {shelf}, got {kind!r}", hint=f"deleatur methods {shelf}"
            )
        out[name] = method(shelf, base, kind, numbers, where)
    return out


def used(settings: Settings) -> list[plug.Method]:
    """Every method that the chain runs, each once."""
    named = [(section.shelf, section.method) for section in (settings.invert, settings.erase, settings.guide)]
    named += [("attacks", name) for name in settings.attack.methods]
    for shelf, section in (("detectors", settings.evaluate.detectors), ("metrics", settings.evaluate.metrics)):
        named += [(shelf, numbers["method"]) for numbers in section.values()]
    return [plug.method(shelf, name) for shelf, name in dict.fromkeys(named)]


def local(settings: Settings, address: str, part: str = "pipeline") -> str:
    """Where it lies on this disk, or its name on a hub; models:/… is looked up where we register, and its files are
    those that were registered, signed where keys are configured. Raises ModelError where they are not.
    """
    if not address.startswith("models:/"):
        return objects.local(address, part)
    from deleatur.io import tracking
    from deleatur.stages import verify

    tracking.use(settings.register_.tracking_uri)
    found = objects.local(address, part)
    verify.demand(settings, address, Path(found), part)
    return found


def model(settings: Settings) -> Model:
    return load(local(settings, settings.base.model), dtype=settings.base.dtype, device=settings.base.device)


def clip(settings: Settings) -> Clip:
    return load_clip(local(settings, settings.reward.clip), settings.base.device)


def prompts(path: Path, split: str, concept: str, role: Role | None = None) -> list[Prompt]:
    """The prompts of one file and split, or of one role of it. Raises DataError naming file and row, or that there is
    none: nothing is learned from no prompt, and nothing measured.
    """
    frame = tables.read_csv(path)
    missing = {"id", "text", "label", "role", "split"} - set(frame.columns)
    if missing:
        raise DataError(f"{path}: the columns {', '.join(sorted(missing))} are missing", hint=PROMPTS)
    out = []
    for row, line in zip(frame.to_dict("records"), range(2, len(frame) + 2), strict=True):
        if row["role"] not in get_args(Role):
            listed = ", ".join(get_args(Role))
            raise DataError(f"{path}, line {line}: role {row['role']!r} is none of {listed}", hint=PROMPTS)
        if row["split"] == split and role in (None, row["role"]):
            asks = concept if row["role"] == "concept" else ""
            out.append(Prompt(row["id"], row["text"], row["role"], row["label"], asks))
    if not out:
        wanted = f"prompts of the split {split!r}" + (f" and the role {role!r}" if role else "")
        raise DataError(f"{path}: expected {wanted}, and there is none", hint=PROMPTS)
    return out


def written(settings: Settings, concept: str = "") -> list[Prompt]:
    """The prompts that are drawn for a concept, or for none."""
    path = settings.concepts[concept].prompts if concept else settings.paths.prompts
    return prompts(path, settings.sample.split, concept)


def drawn(settings: Settings) -> dict[tuple[Role, str], int]:
    """(role, concept) → pictures of one side, of all that is known before tokens and attacks are learned."""
    asked = Counter[tuple[Role, str]](
        (p.role, p.concept) for name in ("", *settings.targets) for p in written(settings, name)
    )
    asked |= {("word", name): len(settings.concepts[name].words) for name in settings.targets}
    return {which: n * settings.sample.per_prompt.get(which[0], 1) for which, n in asked.items()}


def to_preserve(settings: Settings) -> list[str]:
    """What fine-tuning erasers hold on to: preserved prompts, and the neighbours that must survive. Dev split only.

    Neighbours are the fewer and lie the nearest, so they are repeated until they are about half of the list.
    """
    written = prompts(settings.paths.prompts, "dev", "")
    written += [p for n in settings.targets for p in prompts(settings.concepts[n].prompts, "dev", n)]
    keep, near = ([p.text for p in written if p.role == role] for role in ("keep", "neighbour"))
    if not keep + near:
        raise DataError(
            f"{settings.paths.prompts}: expected prompts of the split 'dev' and the role 'keep', and there is none",
            hint=PROMPTS,
        )
    return keep + near * max(1, round(len(keep) / max(len(near), 1)))


def token(settings: Settings, concept: str) -> SoftToken:
    return tensors.load_token(settings.paths.tokens / concept)


def concept(settings: Settings, model: Model, name: str) -> Concept:
    """The concept as `erase.source` says: by its soft tokens, or by its words."""
    spec = settings.concepts[name]
    if settings.erase.source == "words":
        return encode.concept_from_words(model, name, spec.words, spec.sentences)
    return encode.concept_from_token(model, token(settings, name), spec.sentences)


def head(settings: Settings, concept: str, which: str) -> Head:
    """r_ψ: "train" made the token, "held_out" may judge."""
    found, facts = tensors.load(settings.paths.reward / f"{concept}.safetensors")
    return Head({n.split("/", 1)[1]: t for n, t in found.items() if n.startswith(f"{which}/")}, facts["rank"])


def present(head: Head, features: Tensor) -> Tensor:
    """Whether raters would see the concept: vote share of at least one half, or above the mean of the ranked pool."""
    return head(features) >= (0.0 if head.rank else 0.5)


class Pool:
    """The rated pictures of one concept, in the order of their digests."""

    def __init__(self, settings: Settings, name: str) -> None:
        answers = tables.read_table(settings.paths.feedback / "answers.parquet")
        self.answers = answers[answers["concept"] == name]
        # A ranking screen's pictures share its prompt.
        asked = zip(self.answers["items"], self.answers["prompt"], strict=True)
        prompt = {d: p for items, p in asked for d in items}
        found = {p.sha256: p for p in images.read_shards(settings.paths.feedback) if p.sha256 in prompt}
        digests = sorted(found)
        self.row = {d: i for i, d in enumerate(digests)}
        self.pictures = [images.decode(found[d].image) for d in digests]
        self.prompt = [prompt[d] for d in digests]

    def rated(self) -> Pictures:
        """What most raters marked, and what most of them passed."""
        share = votes.seen(self.answers, votes.raters(self.answers)).reindex(list(self.row))
        both = (share >= 0.5, share < 0.5)
        marked, passed = ([p for p, its in zip(self.pictures, rows, strict=True) if its] for rows in both)
        return Pictures(marked, passed)

    def groups(self) -> NDArray[np.int64]:
        """(n,) the number of each picture's prompt, for cross-validation that keeps a prompt together."""
        return np.unique(self.prompt, return_inverse=True)[1]
