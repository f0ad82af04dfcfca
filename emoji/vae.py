"""Train the autoencoder: 32 px pictures to 8x8 latents and back.

Half of each batch is what the generator draws, half is everything else. The loss is squared error
(what PSNR measures) with a little absolute error (which keeps edges) and a weak pull to a normal latent.
"""

from __future__ import annotations

import math

import torch
from common import WORK, clock, generator, load, params, pictures, quiet, save, warp
from diffusers import AutoencoderKL


def build() -> AutoencoderKL:
    p = params("vae")
    depth = len(p["channels"])
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=tuple(p["channels"]),
        layers_per_block=1,
        latent_channels=p["latents"],
        norm_num_groups=8,
        sample_size=params("data")["size"],
        mid_block_add_attention=False,
    )


def trained() -> AutoencoderKL:
    """The finished network, in evaluation mode, with its scaling factor set."""
    state = load(WORK / "vae.pt")
    if state is None or "scale" not in state:
        raise SystemExit("work/vae.pt is missing or unfinished: run vae.py")
    vae = build().eval().requires_grad_(False)
    vae.load_state_dict(state["model"])
    vae.register_to_config(scaling_factor=state["scale"])
    return vae


def batches(x: torch.Tensor, ours: torch.Tensor, size: int, batch: int, rng: torch.Generator) -> torch.Tensor:
    rest = torch.randint(len(x), (batch - batch // 2,), generator=rng)
    mine = ours[torch.randint(len(ours), (batch // 2,), generator=rng)]
    return warp(x[torch.cat([mine, rest])].float() / 255, rng, size, (0.8, 1.0), 0.08) * 2 - 1


def psnr(vae: AutoencoderKL, x: torch.Tensor, size: int) -> float:
    """Mean over pictures of 10 log10(1 / mse), values in [0, 1]."""
    y = torch.nn.functional.interpolate(x.float() / 255, size=size, mode="area")
    with torch.no_grad():
        z = torch.cat([vae.decode(vae.encode(part * 2 - 1).latent_dist.mode()).sample for part in y.split(200)])
    return (-10 * ((z.clamp(-1, 1) / 2 + 0.5 - y) ** 2).mean((1, 2, 3)).log10()).mean().item()


def main() -> None:
    quiet()
    p, size = params("vae"), params("data")["size"]
    x, rows = pictures()
    ours = torch.tensor([i for i, r in enumerate(rows) if r["concept"]])
    torch.manual_seed(0)
    vae, rng = build().train(), generator("vae")
    optimiser = torch.optim.AdamW(vae.parameters(), lr=p["lr"], weight_decay=1e-4)
    path, done, step = WORK / "vae.pt", 0.0, 0
    if state := load(path):
        vae.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        done, step = state["minutes"], state["step"]
        rng.manual_seed(rng.initial_seed() + step)
    print(f"{sum(w.numel() for w in vae.parameters()):,} parameters", flush=True)
    for part in clock(p["minutes"], done):
        for group in optimiser.param_groups:
            group["lr"] = p["lr"] * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * part))
        y = batches(x, ours, size, p["batch"], rng)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(y).latent_dist
            out = vae.decode(posterior.sample(generator=rng)).sample.float()
        error = ((out - y) ** 2).mean() + 0.2 * (out - y).abs().mean()
        loss = error + p["kl"] * posterior.kl().mean() / posterior.mean[0].numel()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 500 == 0:
            vae.eval()
            print(f"{part:4.0%} step {step} loss {loss.item():.4f} psnr {psnr(vae, x[ours[::8]], size):.2f} dB", flush=True)
            vae.train()
            save(path, model=vae.state_dict(), optimiser=optimiser.state_dict(), minutes=part * p["minutes"], step=step)
    vae.eval()
    with torch.no_grad():
        y = torch.nn.functional.interpolate(x[ours].float() / 127.5 - 1, size=size, mode="area")
        scale = 1 / vae.encode(y).latent_dist.mode().std().item()
    print(f"psnr of what the generator draws {psnr(vae, x[ours], size):.2f} dB, of all {psnr(vae, x[::4], size):.2f} dB, scaling factor {scale:.4f}")
    save(path, model=vae.state_dict(), scale=scale, minutes=p["minutes"], step=step)


if __name__ == "__main__":
    main()
