"""Train one of the three small classifiers: `classify.py judge`, `rater` or `style`.

judge and rater classify the object in an image: one of our concepts, "other" (any other object) or "garbage" (none).
They are trained on different folds of the drawings, so that the detector of the report differs from the simulated
raters. style classifies the icon set. Reconstructions by the autoencoder, blur, noise and colour changes are part of
the training data, because the classifiers are applied to generated images.
"""

from __future__ import annotations

import math
import sys

import torch
from common import (
    STYLE_WORDS,
    WORK,
    concepts,
    generator,
    load_checkpoint,
    load_finished,
    load_images,
    params,
    random_affine,
    save,
    seed,
    training_progress,
    use_one_thread,
)
from diffusers import AutoencoderKL
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel
from vae import load_trained as autoencoder

KINDS = ("judge", "rater", "style")
CONCEPT_SHARE, OTHER_SHARE = 0.67, 0.33  # shares of a batch without garbage


def config(labels: list[str], widths: tuple[int, ...] = (32, 64, 112)) -> ResNetConfig:
    return ResNetConfig(
        embedding_size=widths[0],
        hidden_sizes=list(widths),
        depths=[1, 2, 2],
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={n: i for i, n in enumerate(labels)},
    )


def upscale(x: torch.Tensor) -> torch.Tensor:
    """32 px to 64, as the image processor does: the stem divides by four, and 8x8 is too coarse."""
    return interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class ImageEncoder(torch.nn.Module):
    """The same trunk with a linear head: the image encoder in the text encoder's contrastive training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = ResNetModel(config(["any"]))
        self.end = torch.nn.Linear(self.trunk.config.hidden_sizes[-1], width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.trunk(upscale(x)).pooler_output.flatten(1))


def labels(kind: str) -> list[str]:
    return [*STYLE_WORDS, "garbage"] if kind == "style" else [*(c.name for c in concepts()), "other", "garbage"]


def build_classifier(kind: str) -> ResNetForImageClassification:
    return ResNetForImageClassification(config(labels(kind), (24, 32, 64) if kind == "style" else (32, 64, 112)))


def load_trained(kind: str) -> ResNetForImageClassification:
    state = load_finished(WORK / f"{kind}.pt")
    model = build_classifier(kind).eval().requires_grad_(False)
    model.load_state_dict(state["model"])
    return model


def reconstructed(x: torch.Tensor, net: AutoencoderKL, rng: torch.Generator, size: int) -> torch.Tensor:
    """uint8 reconstructions of images at `size` px, with slightly noised latents, as a sampler's are."""
    out = []
    with torch.no_grad():
        for part in x.split(200):
            z = net.encode(random_affine(part.float() / 255, rng, size, (0.84, 1.0), 0.05) * 2 - 1).latent_dist.mode()
            z = z + torch.rand(len(z), 1, 1, 1, generator=rng) * 0.25 * z.std() * torch.randn(z.shape, generator=rng)
            out.append(net.decode(z).sample.clamp(-1, 1))
    return ((torch.cat(out) / 2 + 0.5) * 255).round().byte()


def garbage_images(x: torch.Tensor, net: AutoencoderKL, rng: torch.Generator, size: int, n: int) -> torch.Tensor:
    """uint8 images without an object: decoded noise, images covered by noise, soft blobs, plain white."""
    chosen = x[torch.randint(len(x), (n,), generator=rng)].float() / 255
    with torch.no_grad():
        z = net.encode(random_affine(chosen, rng, size, (0.5, 1.0), 0.2) * 2 - 1).latent_dist.mode()
        coarse = torch.randn(n, z.shape[1], 3, 3, generator=rng) * z.std()
        smooth = interpolate(coarse, size=z.shape[-1], mode="bicubic")
        noise_level = torch.rand(n, 1, 1, 1, generator=rng) * 0.5 + 0.7
        static = torch.randn(z.shape, generator=rng) * z.std()
        half = torch.arange(n).view(n, 1, 1, 1) % 2 == 0
        noisy = (1 - noise_level).clamp(min=0) * z + noise_level * torch.where(half, smooth, static)
        decoded = torch.cat([net.decode(part).sample for part in noisy.split(200)]).clamp(-1, 1) / 2 + 0.5
    mask = interpolate(torch.rand(n, 1, 4, 4, generator=rng), size=size, mode="bicubic").sub(0.55).mul(4).clamp(0, 1)
    colour = torch.rand(n, 3, 1, 1, generator=rng)
    blobs = 1 - mask * torch.rand(n, 1, 1, 1, generator=rng) * (1 - colour)
    paper = (1 - 0.1 * torch.rand(n, 3, 1, 1, generator=rng)).expand_as(blobs)
    kind = torch.rand(n, 1, 1, 1, generator=rng)
    return (torch.where(kind < 0.6, decoded, torch.where(kind < 0.9, blobs, paper)) * 255).round().byte()


def augment(y: torch.Tensor, rng: torch.Generator, colours: float) -> torch.Tensor:
    """Augment images in [0, 1]: gain, tint, swapped channels, grey, blur and noise, each on part of the batch."""

    def dice(*shape: int) -> torch.Tensor:
        return torch.rand(len(y), *(shape or (1, 1, 1)), generator=rng)

    ink = 1 - y
    mixed = ink * (1 + colours * (dice(3, 1, 1) - 0.5)) * (1 + 0.4 * (dice() - 0.5))
    turned = torch.where(dice() < 0.15 * colours, mixed.roll(1, 1), mixed)
    grey = torch.where(dice() < 0.15 * colours, turned.mean(1, keepdim=True).expand_as(y), turned)
    blurred = avg_pool2d(torch.nn.functional.pad(grey, (1, 1, 1, 1)), 3, 1)
    soft = torch.where(dice() < 0.4, grey + dice() * (blurred - grey), grey)
    noisy = soft + torch.where(dice() < 0.3, 0.08 * dice(), 0.0) * torch.randn(y.shape, generator=rng)
    return (1 - noisy).clamp(0, 1)


class TrainingImages:
    """Labelled images of one fold: originals (render px), reconstructions and garbage (size px)."""

    def __init__(self, kind: str, net: AutoencoderKL, rng: torch.Generator) -> None:
        x, rows = load_images()
        self.size, self.rng, fold = params("data")["size"], rng, params("classify")[kind]["fold"]
        fold_rows = [i for i, r in enumerate(rows) if r["fold"] == fold]
        names = {n: k for k, n in enumerate(labels(kind))}
        num_objects = {n: k for k, n in enumerate(sorted({r["label"] for r in rows}))}
        self.x = x[fold_rows]
        facts = [rows[i] for i in fold_rows]
        self.labels = torch.tensor([names[r["style"] if kind == "style" else r["concept"] or "other"] for r in facts])
        self.objects = torch.tensor([num_objects[r["label"]] for r in facts])
        self.things = len(num_objects)
        self.rebuilt = torch.stack([reconstructed(self.x, net, rng, self.size) for _ in range(3)])
        self.garbage = garbage_images(self.x, net, rng, self.size, 1500)
        self.nothing = names["garbage"]
        # Balanced over our concepts, which get two thirds; balanced over styles for the style classifier.
        ours = torch.tensor([bool(r["concept"]) for r in facts])
        even = 1.0 / torch.bincount(self.labels)[self.labels]
        self.weights = (
            even
            if kind == "style"
            else torch.where(ours, even / even[ours].sum() * CONCEPT_SHARE, OTHER_SHARE / (~ours).sum())
        )

    def sample_batch(
        self, batch: int, rotation: float, colours: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images in [-1, 1], their classes, and their object among all objects (-100: none)."""
        n, rng = batch // 10, self.rng
        chosen = torch.multinomial(self.weights, batch - n, replacement=True, generator=rng)
        plain, reconstructed_rows = chosen.chunk(2)
        version = torch.randint(len(self.rebuilt), reconstructed_rows.shape, generator=rng)
        junk = torch.randint(len(self.garbage), (n,), generator=rng)
        small = torch.cat([self.rebuilt[version, reconstructed_rows], self.garbage[junk]])
        y = torch.cat(
            [
                random_affine(self.x[plain].float() / 255, rng, self.size, (0.72, 1.05), 0.12, rotation),
                random_affine(small.float() / 255, rng, self.size, (0.85, 1.08), 0.1, rotation),
            ]
        )
        y = torch.where(torch.rand(batch, 1, 1, 1, generator=rng) < 0.5, y, y.flip(3))
        label = torch.cat([self.labels[chosen], torch.full((n,), self.nothing)])
        object_label = torch.cat([self.objects[chosen], torch.full((n,), -100)])
        return augment(y, rng, colours) * 2 - 1, label, object_label


def validate(model: ResNetForImageClassification, kind: str) -> str:
    """Accuracy on the held-out fold."""
    x, rows = load_images()
    names = labels(kind)
    fold = params("classify")[kind]["fold"]
    test = [i for i, r in enumerate(rows) if r["fold"] != fold and (r["concept"] or kind == "style")]
    truth = torch.tensor([names.index(rows[i]["style" if kind == "style" else "concept"]) for i in test])
    with torch.no_grad():
        small = interpolate(x[test].float() / 127.5 - 1, size=params("data")["size"], mode="area")
        right = torch.cat([model(upscale(part)).logits.argmax(1) for part in small.split(200)]) == truth
    return f"{right.float().mean():.3f} of {len(test)} images of the other fold"


def balance_other(model: ResNetForImageClassification, kind: str) -> None:
    """Subtract the log prior of "other", a third of all training labels, so that all classes are equally likely.

    Without this, drawings of an unseen icon set are classified as "other" whenever confidence is low.
    """
    if kind != "style":
        log_prior = math.log(OTHER_SHARE / (CONCEPT_SHARE / len(concepts())))
        model.classifier[-1].bias.data[labels(kind).index("other")] -= log_prior


def main(kind: str) -> None:
    use_one_thread()
    p = params("classify")
    rng = generator(kind)
    table = TrainingImages(kind, autoencoder(), rng)
    torch.manual_seed(seed(f"{kind}/init") % 2**31)
    model = build_classifier(kind).train()
    auxiliary = torch.nn.Linear(
        model.config.hidden_sizes[-1], table.things
    )  # an auxiliary loss over all objects improves the features
    both = [*model.parameters(), *auxiliary.parameters()]
    optimiser = torch.optim.AdamW(both, lr=p["lr"], weight_decay=0.05)
    path, done, step = WORK / f"{kind}.pt", 0.0, 0
    if state := load_checkpoint(path, p[kind]):
        model.load_state_dict(state["model"])
        auxiliary.load_state_dict(state["auxiliary"])
        optimiser.load_state_dict(state["optimiser"])
        done, step = state["minutes"], state["step"]
        rng.manual_seed(seed(kind) + step)
    print(f"{kind}: {sum(w.numel() for w in model.parameters()):,} parameters, {len(table.x)} images", flush=True)
    rotation, colours = (0.1, 0.2) if kind == "style" else (0.3, 0.7)
    for part in training_progress(p[kind]["minutes"], done):
        for group in optimiser.param_groups:
            group["lr"] = p["lr"] * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * part))
        y, label, object_label = table.sample_batch(p["batch"], rotation, colours)
        with torch.autocast("cpu", torch.bfloat16):
            seen = model.resnet(upscale(y)).pooler_output
            loss = cross_entropy(model.classifier(seen).float(), label, label_smoothing=0.05)
            if kind != "style":
                loss = loss + 0.5 * cross_entropy(auxiliary(seen.flatten(1)).float(), object_label)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both, 1.0)
        optimiser.step()
        step += 1
        if step % 200 == 0:
            model.eval()
            print(f"{part:4.0%} step {step} loss {loss.item():.3f} right {validate(model, kind)}", flush=True)
            model.train()
            state = {
                "model": model.state_dict(),
                "auxiliary": auxiliary.state_dict(),
                "optimiser": optimiser.state_dict(),
            }
            save(path, **state, minutes=part * p[kind]["minutes"], step=step, settings=p[kind], finished=False)
    balance_other(model.eval(), kind)
    print(f"{kind}: right {validate(model, kind)}, chance {1 / len(labels(kind)):.3f}")
    save(path, model=model.state_dict(), finished=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in KINDS:
        raise SystemExit(f"usage: classify.py {'|'.join(KINDS)}")
    main(sys.argv[1])
