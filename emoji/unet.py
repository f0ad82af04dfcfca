"""Train the UNet on latents of our images, with the text encoder frozen.

Noise prediction, min-SNR weighting min(SNR, 5)/SNR, AdamW with a cosine schedule; the EMA weights are exported.
Processes share one set of weights and update it without locks (Hogwild): on a CPU two such processes do about twice the
work of one, two threads do not. An interrupted run resumes from `work/unet.pt`; a finished one starts over, unless its
number of samples was raised.
"""

from __future__ import annotations

import math
import time
from itertools import count
from random import Random

import text
import torch
import torch.multiprocessing as mp
import vae
from captions import caption
from common import (
    FAMILIES,
    WORK,
    Concept,
    concepts,
    generator,
    load,
    load_images,
    params,
    random_affine,
    save,
    seed,
    use_one_thread,
)
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's own settings."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=params("data")["size"] // 4,
        in_channels=params("vae")["latents"],
        out_channels=params("vae")["latents"],
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=tuple(params("unet")["channels"]),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=params("text")["width"],
        norm_num_groups=16,
    )
    unet.set_attn_processor(AttnProcessor())  # the fused one is slow backwards in bf16 on a CPU
    return unet


def encode_latents() -> None:
    """Write scaled latents of `views` augmented copies of each of our images, and the image of each."""
    p, net, rng = params("data"), vae.load_trained(), generator("unet/views")
    x, rows = load_images()
    ours = torch.tensor([i for i, r in enumerate(rows) if r["concept"]]).repeat(p["views"])
    with torch.no_grad():
        parts = [
            net.encode(random_affine(x[i].float() / 255, rng, p["size"], (0.84, 1.0), 0.05) * 2 - 1).latent_dist.mode()
            for i in ours.split(200)
        ]
    save(WORK / "latents.pt", z=torch.cat(parts) * net.config.scaling_factor, image=ours)


def sampling_weights(rows: list[dict[str, str]]) -> torch.Tensor:
    """Sampling weight of each image: shares of families and ink as in the parameters, else balanced by concept."""
    p, table = params("data"), concepts()
    share = {f: p[f"{f}_share"] for f in FAMILIES}
    weight = {c.name: p["gun_weight"] if c.name == "gun" else 1.0 for c in table}
    family = {c.name: c.family if c.family in FAMILIES else "" for c in table}
    total = {f: sum(w for n, w in weight.items() if family[n] == f) for f in (*FAMILIES, "")}
    part = {n: w / total[family[n]] * share.get(family[n], 1 - sum(share.values())) for n, w in weight.items()}
    counts: dict[tuple[str, bool], int] = {}
    for r in rows:
        key = (r["concept"], r["style"] == "ink")
        counts[key] = counts.get(key, 0) + 1
    ink = torch.tensor([r["style"] == "ink" for r in rows])
    even = torch.tensor(
        [part[r["concept"]] / counts[r["concept"], r["style"] == "ink"] if r["concept"] else 0.0 for r in rows]
    )
    return torch.where(ink, even * p["ink_share"] / even[ink].sum(), even * (1 - p["ink_share"]) / even[~ink].sum())


class CaptionEncoder:
    """Samples captions and encodes them; every string is encoded once."""

    def __init__(self, rows: list[dict[str, str]], rng: Random) -> None:
        self.tokenizer, self.model = text.load_trained()
        self.rows, self.rng, self.p = rows, rng, params("unet")
        self.concepts: list[Concept] = concepts()
        self.concept_by_name = {c.name: c for c in self.concepts}
        self.cache: dict[str, torch.Tensor] = {}

    def sample_caption(self, image: int) -> str:
        if self.rng.random() < self.p["drop"]:
            return ""
        row = self.rows[image]
        return caption(self.concept_by_name[row["concept"]], row["style"], self.rng, self.p["lists"], self.concepts)

    def __call__(self, chosen: list[int]) -> torch.Tensor:
        texts = [self.sample_caption(i) for i in chosen]
        new = sorted({t for t in texts if t not in self.cache})
        if new:
            with torch.no_grad():
                states = self.model(text.encode(self.tokenizer, new)).last_hidden_state
            self.cache.update(zip(new, states.bfloat16(), strict=True))
        return torch.stack([self.cache[t] for t in texts]).float()


def train_process(rank: int, unet: UNet2DConditionModel, average: dict[str, torch.Tensor], seen: torch.Tensor) -> None:
    """One Hogwild process; the first also updates the EMA weights, prints and saves."""
    use_one_thread()
    p, (_, rows) = params("unet"), load_images()
    latents = load(WORK / "latents.pt")
    rng = torch.Generator().manual_seed(seed(f"unet/{rank}") + int(seen))
    speak = CaptionEncoder(rows, Random(seed(f"unet/captions/{rank}") + int(seen)))
    weight = sampling_weights(rows)[latents["image"]]
    signal = scheduler().alphas_cumprod
    snr = signal / (1 - signal)
    optimiser = torch.optim.AdamW(unet.parameters(), lr=p["lr"], weight_decay=1e-3)
    moments = WORK / f"unet.moments{rank}.pt"
    if state := load(moments):
        optimiser.load_state_dict(state["optimiser"])
    since, before, losses = time.time(), int(seen), []
    for step in count():
        if int(seen) >= p["samples"]:
            break
        warmth = min(1, (step + 1) / 100)
        for group in optimiser.param_groups:
            group["lr"] = p["lr"] * warmth * (0.5 + 0.5 * math.cos(math.pi * int(seen) / p["samples"]))
        chosen = torch.multinomial(weight, p["batch"], generator=rng)
        z = latents["z"][chosen]
        t = torch.randint(1000, (p["batch"],), generator=rng)
        noise = torch.randn(z.shape, generator=rng)
        a = signal[t].view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            guess = unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, speak(latents["image"][chosen].tolist())).sample
        error = ((guess.float() - noise) ** 2).mean((1, 2, 3))
        loss = (error * (p["snr_cap"] / snr[t]).clamp(max=1)).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        seen += p["batch"]
        losses.append(loss.item())
        if rank == 0:
            keep = min(p["ema"], (1 + int(seen) / 48) / (10 + int(seen) / 48))
            with torch.no_grad():
                for name, w in unet.named_parameters():
                    average[name].lerp_(w, 1 - keep)
        if step % 200 == 199:
            if rank == 0:
                rate = (int(seen) - before) / (time.time() - since)
                print(f"{int(seen):7d} samples, loss {sum(losses) / len(losses):.4f}, {rate:.0f}/s", flush=True)
                save(WORK / "unet.pt", model=unet.state_dict(), average=average, samples=int(seen))
                since, before, losses = time.time(), int(seen), []
            save(moments, optimiser=optimiser.state_dict())
    if rank == 0:
        save(WORK / "unet.pt", model=unet.state_dict(), average=average, samples=int(seen))


def main() -> None:
    use_one_thread()
    torch.manual_seed(seed("unet/init") % 2**31)
    unet = build_unet()
    seen = torch.zeros((), dtype=torch.long)
    state = load(WORK / "unet.pt")
    if state and state["samples"] < params("unet")["samples"]:
        unet.load_state_dict(state["model"])
        seen += state["samples"]
        average = state["average"]
    else:
        for moments in WORK.glob("unet.moments*.pt"):
            moments.unlink()
        average = {n: w.detach().clone() for n, w in unet.named_parameters()}
        encode_latents()
    print(f"{sum(w.numel() for w in unet.parameters()):,} parameters, {int(seen)} samples so far", flush=True)
    unet.share_memory()
    seen.share_memory_()
    mp.spawn(train_process, (unet, average, seen), nprocs=params("unet")["processes"])


if __name__ == "__main__":
    main()
