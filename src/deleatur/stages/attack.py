"""delta → attacks/: soft prompts that try to bring the concept back."""

from __future__ import annotations

from typing import Any

from deleatur.attacks import Attack, Target
from deleatur.diffusion import encode
from deleatur.diffusion.features import Clip
from deleatur.diffusion.invert import templates_of
from deleatur.diffusion.overlay import weights_of
from deleatur.io import tables, tensors
from deleatur.settings import Settings
from deleatur.stages import inputs
from deleatur.stages.progress import bar


def run(settings: Settings) -> None:
    model, clip = inputs.model(settings), inputs.clip(settings)
    weights = weights_of(model, tensors.load_delta(settings.paths.delta / inputs.DELTA))
    folder = tables.emptied(settings.paths.attacks)
    record: dict[str, Any] = {}
    for name in settings.targets:
        spec, pool = settings.concepts[name], inputs.Pool(settings, name)
        rows = _marked(settings, name, pool, clip)
        pictures, prompts = [pool.pictures[i] for i in rows], [pool.prompt[i] for i in rows]
        initial = encode.embedding_of(model, spec.initial)
        templates = templates_of(spec.templates, prompts)
        target = Target(model, weights, name, inputs.latents(model, pictures), initial, templates)
        for kind, numbers in settings.attack.methods.items():
            attack = inputs.method("attacks", Attack, kind, numbers, f"attack.methods.{kind}")
            with bar(f"attack {name}: {kind}", 1) as advance:

                def on_step(step: int, total: int, loss: float, advance: Any = advance) -> None:
                    advance.total(total)
                    advance(note=f"loss {loss:.4f}")

                found = attack.attack(target, seed=settings.seed, on_step=on_step)
            facts = {"concept": name, "attack": kind, "access": attack.access, "budget": found.budget}
            tensors.save(folder / f"{name}-{kind}.safetensors", {"vectors": found.vectors}, facts)
            record[f"{name}-{kind}"] = facts | {"pictures": len(pictures), "last_loss": found.losses[-1]}
    tables.write_json(folder / "record.json", record)


def _marked(settings: Settings, name: str, pool: inputs.Pool, clip: Clip) -> list[int]:
    """The attacker has pictures of the concept: those that raters mark, or at least the one that they mark most."""
    head, features = inputs.head(settings, name, "train"), clip.pictures(pool.pictures)
    count = max(1, int(inputs.present(head, features).sum()))
    return [int(i) for i in head(features).argsort(descending=True)[:count]]
