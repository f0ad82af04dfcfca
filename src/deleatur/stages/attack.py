"""delta → attacks/: soft prompts that try to bring the concept back. Saves as it goes; killed, it goes on there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deleatur.attacks import Target
from deleatur.diffusion import encode
from deleatur.diffusion.features import Clip
from deleatur.diffusion.invert import Progress, templates_of
from deleatur.diffusion.load import Model
from deleatur.diffusion.overlay import weights_of
from deleatur.diffusion.sample import encode_pictures
from deleatur.io import tables, tensors
from deleatur.settings import Settings
from deleatur.stages import identity, inputs
from deleatur.stages.checkpoint import Checkpoint, belongs
from deleatur.stages.progress import Bar, bar


def run(settings: Settings) -> None:
    model, clip = inputs.model(settings), inputs.clip(settings)
    delta = tensors.load_delta(settings.paths.delta / inputs.DELTA)
    weights, attacks = weights_of(model, delta), inputs.attacks(settings, delta.one_step)
    made: dict[str, tuple[Tensor, dict[str, Any]]] = {}
    checkpoints, record, curves = [], {}, {}
    for name in settings.targets:
        spec, pool = settings.concepts[name], inputs.Pool(settings, name)
        rows = _marked(settings, name, pool, clip)
        pictures, prompts = [pool.pictures[i] for i in rows], [pool.prompt[i] for i in rows]
        initial = encode.embedding_of(model, spec.initial)
        templates = templates_of(spec.templates, prompts)
        target = Target(model, weights, name, encode_pictures(model, pictures), initial, templates)
        for kind, attack in attacks.items():
            own = _belongs(settings, model, clip, name, kind)
            checkpoint = Checkpoint(settings, "attack", f"attack-{name}-{kind}", own)
            checkpoints.append(checkpoint)
            with checkpoint, bar(f"attack {name}: {kind}", 1) as advance:

                def on_step(p: Progress, checkpoint: Checkpoint = checkpoint, advance: Bar = advance) -> None:
                    checkpoint(p.state)
                    advance.at(p.step, p.total, f"loss {p.loss:.4f}")

                found = attack.attack(target, seed=settings.seed, on_step=on_step, state=checkpoint.state)
            facts = {"concept": name, "attack": kind, "access": attack.access, "budget": found.budget}
            made[f"{name}-{kind}"] = (found.vectors, facts)
            curves[f"{name}-{kind}"] = list(found.losses)
            record[f"{name}-{kind}"] = facts | {"pictures": len(pictures), "last_loss": found.losses[-1]}
    folder = tables.emptied(settings.paths.attacks)
    for stem, (vectors, facts) in made.items():
        tensors.save(folder / f"{stem}.safetensors", {"vectors": vectors}, facts)
    tables.write_json(folder / "record.json", record)
    tables.write_json(folder / "curves.json", curves)
    for checkpoint in checkpoints:
        checkpoint.remove()


def _belongs(settings: Settings, model: Model, clip: Clip, name: str, kind: str) -> dict[str, Any]:
    """Of one attack on one concept: what the others are changes nothing."""
    content = {
        "feedback": tables.read_json(settings.paths.feedback / "summary.json")["feedback"],
        "reward": identity.files([settings.paths.reward / f"{name}.safetensors"]),
        "delta": identity.files([settings.paths.delta / inputs.DELTA]),
    }
    code = ["attacks/__init__.py", "feedback/reward.py", "diffusion", "maths", "stages/inputs.py", "stages/attack.py"]
    sections = ["base", "seed", f"concepts.{name}", f"attack.methods.{kind}", "reward.clip"]
    return belongs(
        settings, sections=sections, code=code, methods=[("attacks", kind)], model=model, clip=clip, content=content
    )


def _marked(settings: Settings, name: str, pool: inputs.Pool, clip: Clip) -> list[int]:
    """The attacker has pictures of the concept: those that raters mark, or at least the one that they mark most."""
    head, features = inputs.head(settings, name, "train"), clip.pictures(pool.pictures)
    count = max(1, int(inputs.present(head, features).sum()))
    return [int(i) for i in head(features).argsort(descending=True)[:count]]
