"""Evaluate the packed model on new seeds and write `metrics.json`, the numbers of the README.

Uses only `../models/`, through the classes that a user loads. Rates have n and Wilson's 95 % interval.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from hashlib import sha256

import torch
from captions import with_article
from classify import labels, upscale
from common import EMOJI, FAMILIES, MODELS, STYLE_WORDS, concepts, load_images, params, seed, use_one_thread
from diffusers import StableDiffusionPipeline
from torch.nn.functional import interpolate
from transformers import AutoModelForImageClassification, CLIPModel, CLIPTokenizer
from vae import psnr


def open_pipeline() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(
        MODELS / "pipeline", dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_images(pipe: StableDiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
    """(n, 3, size, size) in [0, 1], each image from its own seed, independent of the batch."""
    p, out = params("measure"), []
    shape = (pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    for i in range(0, len(prompts), 64):
        z = torch.stack(
            [
                torch.randn(shape, generator=torch.Generator().manual_seed(seed(f"measure/{s}")))
                for s in seeds[i : i + 64]
            ]
        )
        done = pipe(
            list(prompts[i : i + 64]),
            latents=z,
            num_inference_steps=p["steps"],
            guidance_scale=p["guidance"],
            output_type="pt",
        )
        out.append(done.images.float())
    return torch.cat(out)


def classify_images(kind: str, x: torch.Tensor) -> list[str]:
    """The classifier's label for each image in [0, 1]."""
    model = AutoModelForImageClassification.from_pretrained(MODELS / kind, dtype=torch.float32)
    with torch.no_grad():
        best = torch.cat([model(upscale(part * 2 - 1)).logits.argmax(1) for part in x.split(200)])
    return [model.config.id2label[int(i)] for i in best]


def rate_with_interval(hits: Sequence[bool]) -> dict[str, float]:
    """Share, n and Wilson's interval: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    n, z = len(hits), 1.96
    share = sum(hits) / n
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return {
        "rate": round(share, 3),
        "n": n,
        "low": round((middle - half) / (1 + z * z / n), 3),
        "high": round((middle + half) / (1 + z * z / n), 3),
    }


def rates_of_generated(pipe: StableDiffusionPipeline) -> dict[str, dict[str, float]]:
    """Rates over "a <name>", "a <name> in ink style" and the category words."""
    table, num_seeds = concepts(), params("measure")["seeds"]
    of = {c.name: c for c in table}
    family = {n: c.family for n, c in of.items()}
    # Families and neighbours have few concepts, so they get more seeds.
    plain = [c for c in table for _ in range(num_seeds * (3 if c.role in ("target", "neighbour") else 1))]
    inked = [c for c in table if c.name != "gun"]
    words = [f for f in FAMILIES for _ in range(40)]
    prompts = [with_article(c.name) for c in plain] + [f"{with_article(c.name)} in ink style" for c in inked] + words
    x = sample_images(pipe, prompts, range(len(prompts)))
    a, b = len(plain), len(plain) + len(inked)
    out: dict[str, dict[str, float]] = {}
    for kind in ("judge", "rater"):
        predicted = classify_images(kind, x)
        pairs = list(zip(plain, predicted, strict=False))
        for f in FAMILIES:
            out[f"{kind}: {f} family"] = rate_with_interval([family.get(s) == f for c, s in pairs if c.family == f])
            out[f"{kind}: {f} exact name"] = rate_with_interval([s == c.name for c, s in pairs if c.family == f])
            out[f'{kind}: word "{f}" draws the family'] = rate_with_interval(
                [family.get(s) == f for w, s in zip(words, predicted[b:], strict=True) if w == f]
            )
            out[f"{kind}: {f} seen in other prompts"] = rate_with_interval(
                [family.get(s) == f for c, s in pairs if c.family != f]
            )
            out[f"{kind}: neighbours of {f}, exact name"] = rate_with_interval(
                [s == c.name for c, s in pairs if c.neighbour_of == f]
            )
        for role in ("keep", "unseen"):
            out[f"{kind}: {role}, exact name"] = rate_with_interval([s == c.name for c, s in pairs if c.role == role])
        out[f"{kind}: garbage in plain prompts"] = rate_with_interval([s == "garbage" for _, s in pairs])
        out[f"{kind}: ink prompts, exact name"] = rate_with_interval(
            [s == c.name for c, s in zip(inked, predicted[a:b], strict=True)]
        )
    style = classify_images("style", x)
    out["style: ink in ink prompts"] = rate_with_interval([s == "ink" for s in style[a:b]])
    out["style: ink in plain prompts"] = rate_with_interval([s == "ink" for s in style[:a]])
    return out


def clip_accuracy(x: torch.Tensor, facts: list[dict[str, str]]) -> dict[str, dict[str, float]]:
    """Zero-shot accuracy of CLIP over our names, on real images of fold a, which it was not trained on."""
    model = CLIPModel.from_pretrained(MODELS / "clip", dtype=torch.float32)
    words, names = CLIPTokenizer.from_pretrained(MODELS / "clip"), [c.name for c in concepts()]
    with torch.no_grad():
        ids = words(
            [f"a picture of {with_article(n)}" for n in names], padding="max_length", max_length=24, return_tensors="pt"
        ).input_ids
        best = model(input_ids=ids, pixel_values=x * 2 - 1).logits_per_image.argmax(1).tolist()
    return {
        "clip: names unseen real images": rate_with_interval(
            [names[i] == r["concept"] for i, r in zip(best, facts, strict=True)]
        )
    }


def rates_of_real(pipe: StableDiffusionPipeline) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Accuracy of the classifiers on their held-out fold, and the autoencoder's PSNR."""
    x, rows = load_images()
    ours = [i for i, r in enumerate(rows) if r["concept"]]
    size, out = params("data")["size"], {}
    for kind, fold in (("judge", "b"), ("rater", "a"), ("style", "b"), ("clip", "a")):
        test = [i for i in ours if rows[i]["fold"] == fold]
        small = interpolate(x[test].float() / 255, size=size, mode="area")
        facts = [rows[i] for i in test]
        if kind == "clip":
            out |= clip_accuracy(small, facts)
            continue
        key = "style" if kind == "style" else "concept"
        out[f"{kind}: names unseen real images"] = rate_with_interval(
            [s == r[key] for s, r in zip(classify_images(kind, small), facts, strict=True)]
        )
    fixed = {
        "psnr_db": round(psnr(pipe.vae, x[ours], size), 2),
        "chance_judge": round(1 / len(labels("judge")), 4),
        "chance_style": round(1 / (len(STYLE_WORDS) + 1), 3),
    }
    return out, fixed


def main() -> None:
    use_one_thread()
    pipe = open_pipeline()
    rates, fixed = rates_of_real(pipe)
    rates |= rates_of_generated(pipe)
    for name, r in rates.items():
        print(f"{name:48s} {r['rate']:.3f}  [{r['low']:.3f}, {r['high']:.3f}]  n={r['n']}")
    print(fixed)
    bytes_ = {p.name: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in sorted(MODELS.iterdir())}
    bytes_["all"] = sum(bytes_.values())
    files = {str(f.relative_to(MODELS)): sha256(f.read_bytes()) for f in sorted(MODELS.rglob("*.safetensors"))}
    weights = {name: digest.hexdigest() for name, digest in files.items()}
    report = {"rates": rates, **fixed, "sampler": params("measure"), "bytes": bytes_, "sha256": weights}
    (EMOJI / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
