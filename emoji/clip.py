"""Train the small CLIP: features for the reward heads and the CLIP score.

Its training images of our concepts are those of fold b, so that it shares none with the judge (fold a), and all images
of other objects. Its text encoder is its own, and narrower than the generator's.
"""

from __future__ import annotations

import math

import torch
from classify import augment, reconstructed
from common import (
    WORK,
    generator,
    load,
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
from text import BatchSampler, Captions, contrastive_loss, encode, initialize_embeddings
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from vae import load_trained as autoencoder


def build_clip(words: CLIPTokenizer) -> CLIPModel:
    p = params("clip")
    shape = {"num_attention_heads": 4, "projection_dim": p["projection"]}
    text = shape | {
        "vocab_size": len(words),
        "hidden_size": p["text_width"],
        "intermediate_size": 2 * p["text_width"],
        "num_hidden_layers": 1,
        "max_position_embeddings": params("text")["positions"],
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    vision = shape | {
        "hidden_size": p["width"],
        "intermediate_size": 3 * p["width"],
        "num_hidden_layers": p["layers"],
        "image_size": params("data")["size"],
        "patch_size": p["patch"],
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=p["projection"])
    config._attn_implementation = "eager"
    return CLIPModel(config)


def load_trained() -> tuple[CLIPTokenizer, CLIPModel]:
    state, words = load_finished(WORK / "clip.pt"), CLIPTokenizer.from_pretrained(WORK / "tokenizer")
    model = build_clip(words).eval().requires_grad_(False)
    model.load_state_dict(state["model"])
    return words, model


def main() -> None:
    use_one_thread()
    p, size = params("clip"), params("data")["size"]
    x, rows = load_images()
    captions, views = Captions(rows), load(WORK / "meanings.pt")
    words = CLIPTokenizer.from_pretrained(WORK / "tokenizer")
    torch.manual_seed(seed("clip/init") % 2**31)
    model = build_clip(words).train()
    initialize_embeddings(model.text_model, views, p["text_width"])
    optimiser = torch.optim.AdamW(model.parameters(), lr=p["lr"], weight_decay=0.05)
    path, done, step = WORK / "clip.pt", 0.0, 0
    if state := load_checkpoint(path, p):
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        done, step = state["minutes"], state["step"]
    again = reconstructed(x, autoencoder(), generator("clip/rebuilt"), size)
    rng = torch.Generator().manual_seed(seed("clip") + step)
    deck = BatchSampler(rows, {i for i, r in enumerate(rows) if r["fold"] == "b" or not r["concept"]}, rng)
    print(f"{sum(w.numel() for w in model.parameters()):,} parameters", flush=True)
    for part in training_progress(p["minutes"], done):
        for group in optimiser.param_groups:
            group["lr"] = p["lr"] * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * part))
        chosen = deck.sample_batch(p["batch"])
        texts = [captions(i)[0] for i in chosen]
        plain, back = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
        y = torch.cat(
            [
                random_affine(x[plain].float() / 255, rng, size, (0.75, 1.02), 0.1, 0.2),
                random_affine(again[back].float() / 255, rng, size, (0.88, 1.05), 0.08, 0.2),
            ]
        )
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=encode(words, texts), pixel_values=augment(y, rng, 0.3) * 2 - 1)
        loss = contrastive_loss(out.text_embeds.float(), out.image_embeds.float(), model.logit_scale, texts)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 100 == 0:
            print(f"{part:4.0%} step {step} contrast {loss.item():.3f}", flush=True)
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
            save(path, **state, minutes=part * p["minutes"], step=step, settings=p, finished=False)
    save(path, model=model.state_dict(), finished=True)


if __name__ == "__main__":
    main()
