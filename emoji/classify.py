"""Train one of the three small classifiers: `classify.py judge`, `rater` or `style`.

judge and rater name the thing in a picture: our concepts, "other" (any other thing) or "garbage" (no thing at all).
They learn from different folds of the drawings, so that whoever rates is not who reports. style names the
set a picture was drawn for. Pictures that went through the autoencoder, blur, noise and colour changes are
mixed in, because generated pictures are what will be asked about.
"""

from __future__ import annotations

import math
import sys

import torch
from common import WORDS, WORK, clock, concepts, finished, generator, params, pictures, resume, save, seed, single, warp
from diffusers import AutoencoderKL
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel
from vae import trained as autoencoder

KINDS = ("judge", "rater", "style")
OURS, OTHER = 0.67, 0.33  # shares of a batch, garbage aside


def config(labels: list[str], widths: tuple[int, ...] = (32, 64, 112)) -> ResNetConfig:
    return ResNetConfig(
        embedding_size=widths[0],
        hidden_sizes=list(widths),
        depths=[1, 2, 2],
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={n: i for i, n in enumerate(labels)},
    )


def enlarge(x: torch.Tensor) -> torch.Tensor:
    """32 px to 64, as the image processor does: the stem divides by four, and 8x8 would see little."""
    return interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class Eye(torch.nn.Module):
    """The same trunk with a linear end: the image side of the text encoder's training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = ResNetModel(config(["any"]))
        self.end = torch.nn.Linear(self.trunk.config.hidden_sizes[-1], width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.trunk(enlarge(x)).pooler_output.flatten(1))


def labels(kind: str) -> list[str]:
    return [*WORDS, "garbage"] if kind == "style" else [*(c.name for c in concepts()), "other", "garbage"]


def build(kind: str) -> ResNetForImageClassification:
    return ResNetForImageClassification(config(labels(kind), (24, 32, 64) if kind == "style" else (32, 64, 112)))


def trained(kind: str) -> ResNetForImageClassification:
    state = finished(WORK / f"{kind}.pt")
    model = build(kind).eval().requires_grad_(False)
    model.load_state_dict(state["model"])
    return model


def rebuilt(x: torch.Tensor, net: AutoencoderKL, rng: torch.Generator, size: int) -> torch.Tensor:
    """uint8 pictures at `size` px as the autoencoder gives them back, slightly noised in between as a sampler would."""
    out = []
    with torch.no_grad():
        for part in x.split(200):
            z = net.encode(warp(part.float() / 255, rng, size, (0.84, 1.0), 0.05) * 2 - 1).latent_dist.mode()
            z = z + torch.rand(len(z), 1, 1, 1, generator=rng) * 0.25 * z.std() * torch.randn(z.shape, generator=rng)
            out.append(net.decode(z).sample.clamp(-1, 1))
    return ((torch.cat(out) / 2 + 0.5) * 255).round().byte()


def garbage(x: torch.Tensor, net: AutoencoderKL, rng: torch.Generator, size: int, n: int) -> torch.Tensor:
    """uint8 pictures of nothing: decoded noise, pictures drowned in noise, soft blobs, plain paper."""
    chosen = x[torch.randint(len(x), (n,), generator=rng)].float() / 255
    with torch.no_grad():
        z = net.encode(warp(chosen, rng, size, (0.5, 1.0), 0.2) * 2 - 1).latent_dist.mode()
        coarse = torch.randn(n, z.shape[1], 3, 3, generator=rng) * z.std()
        smooth = interpolate(coarse, size=z.shape[-1], mode="bicubic")
        drown = torch.rand(n, 1, 1, 1, generator=rng) * 0.5 + 0.7
        static = torch.randn(z.shape, generator=rng) * z.std()
        half = torch.arange(n).view(n, 1, 1, 1) % 2 == 0
        noisy = (1 - drown).clamp(min=0) * z + drown * torch.where(half, smooth, static)
        decoded = torch.cat([net.decode(part).sample for part in noisy.split(200)]).clamp(-1, 1) / 2 + 0.5
    blot = interpolate(torch.rand(n, 1, 4, 4, generator=rng), size=size, mode="bicubic").sub(0.55).mul(4).clamp(0, 1)
    colour = torch.rand(n, 3, 1, 1, generator=rng)
    blobs = 1 - blot * torch.rand(n, 1, 1, 1, generator=rng) * (1 - colour)
    paper = (1 - 0.1 * torch.rand(n, 3, 1, 1, generator=rng)).expand_as(blobs)
    kind = torch.rand(n, 1, 1, 1, generator=rng)
    return (torch.where(kind < 0.6, decoded, torch.where(kind < 0.9, blobs, paper)) * 255).round().byte()


def disturb(y: torch.Tensor, rng: torch.Generator, colours: float) -> torch.Tensor:
    """Gain, tint, swapped colours, greying, blur and noise, each in part of the batch; in [0, 1]."""

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


class Table:
    """Pictures of one fold with their classes: drawn plain (render px) or rebuilt (size px), and a heap of garbage."""

    def __init__(self, kind: str, net: AutoencoderKL, rng: torch.Generator) -> None:
        x, rows = pictures()
        self.size, self.rng, fold = params("data")["size"], rng, params("classify")[kind]["fold"]
        mine = [i for i, r in enumerate(rows) if r["fold"] == fold]
        names = {n: k for k, n in enumerate(labels(kind))}
        things = {n: k for k, n in enumerate(sorted({r["label"] for r in rows}))}
        self.x = x[mine]
        facts = [rows[i] for i in mine]
        self.label = torch.tensor([names[r["style"] if kind == "style" else r["concept"] or "other"] for r in facts])
        self.thing = torch.tensor([things[r["label"]] for r in facts])
        self.things = len(things)
        self.rebuilt = torch.stack([rebuilt(self.x, net, rng, self.size) for _ in range(3)])
        self.garbage = garbage(self.x, net, rng, self.size, 1500)
        self.nothing = names["garbage"]
        # Even over our concepts, which get two thirds; even over styles for the style classifier.
        ours = torch.tensor([bool(r["concept"]) for r in facts])
        even = 1.0 / torch.bincount(self.label)[self.label]
        self.odds = (
            even if kind == "style" else torch.where(ours, even / even[ours].sum() * OURS, OTHER / (~ours).sum())
        )

    def draw(self, batch: int, turn: float, colours: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures in [-1, 1], their classes, and which of all things they show (-100: none)."""
        n, rng = batch // 10, self.rng
        chosen = torch.multinomial(self.odds, batch - n, replacement=True, generator=rng)
        plain, again = chosen.chunk(2)
        version = torch.randint(len(self.rebuilt), again.shape, generator=rng)
        junk = torch.randint(len(self.garbage), (n,), generator=rng)
        small = torch.cat([self.rebuilt[version, again], self.garbage[junk]])
        y = torch.cat(
            [
                warp(self.x[plain].float() / 255, rng, self.size, (0.72, 1.05), 0.12, turn),
                warp(small.float() / 255, rng, self.size, (0.85, 1.08), 0.1, turn),
            ]
        )
        y = torch.where(torch.rand(batch, 1, 1, 1, generator=rng) < 0.5, y, y.flip(3))
        label = torch.cat([self.label[chosen], torch.full((n,), self.nothing)])
        thing = torch.cat([self.thing[chosen], torch.full((n,), -100)])
        return disturb(y, rng, colours) * 2 - 1, label, thing


def exam(model: ResNetForImageClassification, kind: str) -> str:
    """Accuracy on the pictures of the fold that was not learnt from."""
    x, rows = pictures()
    names = labels(kind)
    fold = params("classify")[kind]["fold"]
    test = [i for i, r in enumerate(rows) if r["fold"] != fold and (r["concept"] or kind == "style")]
    truth = torch.tensor([names.index(rows[i]["style" if kind == "style" else "concept"]) for i in test])
    with torch.no_grad():
        small = interpolate(x[test].float() / 127.5 - 1, size=params("data")["size"], mode="area")
        right = torch.cat([model(enlarge(part)).logits.argmax(1) for part in small.split(200)]) == truth
    return f"{right.float().mean():.3f} of {len(test)} pictures of the other fold"


def level(model: ResNetForImageClassification, kind: str) -> None:
    """Take from "other" the advantage of having been a third of all answers: afterwards all classes are equally likely.

    Without this, drawings by an unseen hand are called "other" whenever they are not quite sure.
    """
    if kind != "style":
        ahead = math.log(OTHER / (OURS / len(concepts())))
        model.classifier[-1].bias.data[labels(kind).index("other")] -= ahead


def main(kind: str) -> None:
    single()
    p = params("classify")
    rng = generator(kind)
    table = Table(kind, autoencoder(), rng)
    torch.manual_seed(seed(f"{kind}/init") % 2**31)
    model = build(kind).train()
    aside = torch.nn.Linear(model.config.hidden_sizes[-1], table.things)  # naming all things makes better eyes
    both = [*model.parameters(), *aside.parameters()]
    optimiser = torch.optim.AdamW(both, lr=p["lr"], weight_decay=0.05)
    path, done, step = WORK / f"{kind}.pt", 0.0, 0
    if state := resume(path, p[kind]):
        model.load_state_dict(state["model"])
        aside.load_state_dict(state["aside"])
        optimiser.load_state_dict(state["optimiser"])
        done, step = state["minutes"], state["step"]
        rng.manual_seed(seed(kind) + step)
    print(f"{kind}: {sum(w.numel() for w in model.parameters()):,} parameters, {len(table.x)} pictures", flush=True)
    turn, colours = (0.1, 0.2) if kind == "style" else (0.3, 0.7)
    for part in clock(p[kind]["minutes"], done):
        for group in optimiser.param_groups:
            group["lr"] = p["lr"] * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * part))
        y, label, thing = table.draw(p["batch"], turn, colours)
        with torch.autocast("cpu", torch.bfloat16):
            seen = model.resnet(enlarge(y)).pooler_output
            loss = cross_entropy(model.classifier(seen).float(), label, label_smoothing=0.05)
            if kind != "style":
                loss = loss + 0.5 * cross_entropy(aside(seen.flatten(1)).float(), thing)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both, 1.0)
        optimiser.step()
        step += 1
        if step % 200 == 0:
            model.eval()
            print(f"{part:4.0%} step {step} loss {loss.item():.3f} right {exam(model, kind)}", flush=True)
            model.train()
            state = {"model": model.state_dict(), "aside": aside.state_dict(), "optimiser": optimiser.state_dict()}
            save(path, **state, minutes=part * p[kind]["minutes"], step=step, settings=p[kind], finished=False)
    level(model.eval(), kind)
    print(f"{kind}: right {exam(model, kind)}, chance {1 / len(labels(kind)):.3f}")
    save(path, model=model.state_dict(), finished=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in KINDS:
        raise SystemExit(f"usage: classify.py {'|'.join(KINDS)}")
    main(sys.argv[1])
