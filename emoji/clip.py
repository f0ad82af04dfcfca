"""Train the small CLIP: features for the reward heads and the CLIP score.

It sees fold b of what the generator draws and everything the generator does not draw, so that the judge
(fold a) shares no picture of our concepts with it. Its text side is its own and narrower than the generator's.
"""

from __future__ import annotations

import math

import torch
from classify import disturb, rebuilt
from common import WORK, clock, finished, generator, load, params, pictures, resume, save, seed, single, warp
from text import Captions, Deck, contrast, encode, seat
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from vae import trained as autoencoder


def build(words: CLIPTokenizer) -> CLIPModel:
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


def trained() -> tuple[CLIPTokenizer, CLIPModel]:
    state, words = finished(WORK / "clip.pt"), CLIPTokenizer.from_pretrained(WORK / "tokenizer")
    model = build(words).eval().requires_grad_(False)
    model.load_state_dict(state["model"])
    return words, model


def main() -> None:
    single()
    p, size = params("clip"), params("data")["size"]
    x, rows = pictures()
    captions, views = Captions(rows), load(WORK / "meanings.pt")
    words = CLIPTokenizer.from_pretrained(WORK / "tokenizer")
    torch.manual_seed(seed("clip/init") % 2**31)
    model = build(words).train()
    seat(model.text_model, views, p["text_width"])
    optimiser = torch.optim.AdamW(model.parameters(), lr=p["lr"], weight_decay=0.05)
    path, done, step = WORK / "clip.pt", 0.0, 0
    if state := resume(path, p):
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        done, step = state["minutes"], state["step"]
    again = rebuilt(x, autoencoder(), generator("clip/rebuilt"), size)
    rng = torch.Generator().manual_seed(seed("clip") + step)
    deck = Deck(rows, {i for i, r in enumerate(rows) if r["fold"] == "b" or not r["concept"]}, rng)
    print(f"{sum(w.numel() for w in model.parameters()):,} parameters", flush=True)
    for part in clock(p["minutes"], done):
        for group in optimiser.param_groups:
            group["lr"] = p["lr"] * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * part))
        chosen = deck.draw(p["batch"])
        texts = [captions(i)[0] for i in chosen]
        plain, back = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
        y = torch.cat(
            [
                warp(x[plain].float() / 255, rng, size, (0.75, 1.02), 0.1, 0.2),
                warp(again[back].float() / 255, rng, size, (0.88, 1.05), 0.08, 0.2),
            ]
        )
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=encode(words, texts), pixel_values=disturb(y, rng, 0.3) * 2 - 1)
        loss = contrast(out.text_embeds.float(), out.image_embeds.float(), model.logit_scale, texts)
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
