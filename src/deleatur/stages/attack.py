"""delta → attacks/: soft prompts that try to bring the concept back. Saves as it goes; killed, it goes on there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deleatur import dependencies
from deleatur.artifacts import rated_images, reward_heads
from deleatur.attacks import AttackContext, AttackTarget
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.diffusion import encode
from deleatur.diffusion.clip import Clip
from deleatur.diffusion.model import Model
from deleatur.diffusion.overlay import edited_weights
from deleatur.diffusion.sample import encode_images
from deleatur.runtime import models, provenance
from deleatur.runtime.checkpoint import Checkpoint, belongs
from deleatur.runtime.progress import Bar, bar
from deleatur.storage import files, tensors
from deleatur.training.textual_inversion import Progress, templates_of


def run(settings: Settings) -> None:
    model, clip = models.base_model(settings), models.clip_model(settings)
    delta = tensors.load_delta(settings.paths.delta / tensors.DELTA_FILE)
    weights, attacks = edited_weights(model, delta), methods.attacks(settings, delta.one_step)
    made: dict[str, tuple[Tensor, dict[str, Any]]] = {}
    checkpoints, record, curves = [], {}, {}
    for name in settings.targets:
        spec, pool = settings.concepts[name], rated_images.RatedPool(settings, name)
        rows = _marked(settings, name, pool, clip)
        pictures, prompts = [pool.images[i] for i in rows], [pool.prompts[i] for i in rows]
        initial = encode.word_embedding(model, spec.initializer_token)
        templates = templates_of(spec.learnable_property, prompts)
        target = AttackTarget(model, weights, name, encode_images(model, pictures), initial, templates)
        for kind, attack in attacks.items():
            own = _belongs(settings, model, clip, name, kind)
            checkpoint = Checkpoint(settings, "attack", f"attack-{name}-{kind}", own)
            checkpoints.append(checkpoint)
            with checkpoint, bar(f"attack {name}: {kind}", 1) as advance:

                def on_step(p: Progress, checkpoint: Checkpoint = checkpoint, advance: Bar = advance) -> None:
                    checkpoint(p.state)
                    advance.at(p.step, p.total, f"loss {p.loss:.4f}")

                found = attack.attack(target, AttackContext(settings.seed, on_step, checkpoint.state))
            facts = {"concept": name, "attack": kind, "access": attack.access, "budget": found.budget}
            made[f"{name}-{kind}"] = (found.vectors, facts)
            curves[f"{name}-{kind}"] = list(found.losses)
            record[f"{name}-{kind}"] = facts | {"pictures": len(pictures), "last_loss": found.losses[-1]}
    folder = files.empty_folder(settings.paths.attacks)
    for stem, (vectors, facts) in made.items():
        tensors.save(folder / f"{stem}.safetensors", {"vectors": vectors}, facts)
    files.write_json(folder / "record.json", record)
    files.write_json(folder / "curves.json", curves)
    for checkpoint in checkpoints:
        checkpoint.remove()


def _belongs(settings: Settings, model: Model, clip: Clip, name: str, kind: str) -> dict[str, Any]:
    """Of one attack on one concept: what the others are changes nothing."""
    content = {
        "feedback": files.read_json(settings.paths.feedback / "summary.json")["feedback"],
        "reward": provenance.files_digest([settings.paths.reward / f"{name}.safetensors"]),
        "delta": provenance.files_digest([settings.paths.delta / tensors.DELTA_FILE]),
    }
    code = dependencies.stage_digests("attack", {"attack": {"methods": {kind: {}}}})
    sections = ["base", "seed", f"concepts.{name}", f"attack.methods.{kind}", "reward.clip"]
    return belongs(settings, sections=sections, code=code, model=model, clip=clip, content=content)


def _marked(settings: Settings, name: str, pool: rated_images.RatedPool, clip: Clip) -> list[int]:
    """The attacker has pictures of the concept: those that raters mark, or at least the one that they mark most."""
    head, features = reward_heads.load_head(settings, name, "train"), clip.embed_images(pool.images)
    count = max(1, int(reward_heads.shows_concept(head, features).sum()))
    return [int(i) for i in head(features).argsort(descending=True)[:count]]
