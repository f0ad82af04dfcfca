"""delta → attacks/: soft prompts optimized to recover the concept. Checkpointed: a killed run resumes."""

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
from deleatur.records.feedback import FeedbackSummary
from deleatur.runtime import models, provenance
from deleatur.runtime.checkpoint import Checkpoint, run_identity
from deleatur.runtime.progress import Bar, bar
from deleatur.storage import files, tensors
from deleatur.training.textual_inversion import InversionProgress, prompt_templates


def run(settings: Settings) -> None:
    model, clip = models.base_model(settings), models.clip_model(settings)
    delta = tensors.load_delta(settings.paths.delta / tensors.DELTA_FILE)
    weights, attacks = edited_weights(model, delta), methods.attacks(settings, delta.one_step)
    soft_prompts: dict[str, tuple[Tensor, dict[str, Any]]] = {}
    checkpoints, record, curves = [], dict[str, Any](), {}
    for name in settings.targets:
        if not reward_heads.is_trained(settings, name):
            record[name] = {"concept": name, "skipped": "no reward head: no one rated images of the concept"}
            continue
        spec, pool = settings.concepts[name], rated_images.RatedPool(settings, name)
        rows = _concept_rows(settings, name, pool, clip)
        images, prompts = [pool.images[i] for i in rows], [pool.prompts[i] for i in rows]
        initial = encode.word_embedding(model, spec.initializer_token)
        templates = prompt_templates(spec.learnable_property, prompts)
        target = AttackTarget(model, weights, name, encode_images(model, images), initial, templates)
        for kind, attack in attacks.items():
            identity = _run_identity(settings, model, clip, name, kind)
            checkpoint = Checkpoint(settings, "attack", f"attack-{name}-{kind}", identity)
            checkpoints.append(checkpoint)
            with checkpoint, bar(f"attack {name}: {kind}", 1) as advance:

                def on_step(p: InversionProgress, checkpoint: Checkpoint = checkpoint, advance: Bar = advance) -> None:
                    checkpoint(p.state)
                    advance.set(p.step, p.total, f"loss {p.loss:.4f}")

                result = attack.attack(target, AttackContext(settings.seed, on_step, checkpoint.state))
            metadata = {"concept": name, "attack": kind, "access": attack.access, "budget": result.budget}
            soft_prompts[f"{name}-{kind}"] = (result.vectors, metadata)
            curves[f"{name}-{kind}"] = list(result.losses)
            record[f"{name}-{kind}"] = metadata | {"images": len(images), "final_loss": result.losses[-1]}
    with files.replace_folder(settings.paths.attacks) as folder:
        for stem, (vectors, metadata) in soft_prompts.items():
            tensors.save(folder / f"{stem}.safetensors", {"vectors": vectors}, metadata)
        files.write_json(folder / "record.json", record)
        files.write_json(folder / "curves.json", curves)
    for checkpoint in checkpoints:
        checkpoint.remove()


def _run_identity(settings: Settings, model: Model, clip: Clip, name: str, kind: str) -> dict[str, Any]:
    """Everything that can change the result of one attack on one concept; other attacks and concepts cannot."""
    content = {
        "feedback": files.read_json_as(settings.paths.feedback / "summary.json", FeedbackSummary).feedback,
        "reward": provenance.digest_files([settings.paths.reward / f"{name}.safetensors"]),
        "delta": provenance.digest_files([settings.paths.delta / tensors.DELTA_FILE]),
    }
    code = dependencies.stage_digests("attack", {"attack": {"methods": {kind: {}}}})
    sections = ["base", "seed", f"concepts.{name}", f"attack.methods.{kind}", "reward.clip"]
    return run_identity(settings, sections=sections, code=code, model=model, clip=clip, content=content)


def _concept_rows(settings: Settings, name: str, pool: rated_images.RatedPool, clip: Clip) -> list[int]:
    """Rows of the rated images that show the concept by r_ψ, at least one: the attacker is assumed to have these."""
    head, features = reward_heads.load_head(settings, name, "train"), clip.embed_images(pool.images)
    count = max(1, int(reward_heads.shows_concept(head, features).sum()))
    return [int(i) for i in head(features).argsort(descending=True)[:count]]
