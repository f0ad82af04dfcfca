"""Train the autoencoder: 32 px images to 8x8 latents and back.

Half of each batch shows our concepts, half all objects. The loss is the squared error (as in PSNR) with a small
absolute error (which keeps edges) and a weak KL term. `vae.py decoder` then trains the decoder alone: latents do not
change, so it may run in parallel with the UNet's training.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from common import (
    WORK,
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
from diffusers import AutoencoderKL


def build_vae() -> AutoencoderKL:
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


def load_trained(polished: bool = False) -> AutoencoderKL:
    """The network in evaluation mode with its scaling factor; `polished`: with the final decoder, if trained."""
    state = load_finished(WORK / "vae.pt")
    if polished and (final := load(WORK / "decoder.pt")) and final["finished"]:
        state = final
    vae = build_vae().eval().requires_grad_(False)
    vae.load_state_dict(state["model"])
    vae.register_to_config(scaling_factor=state["scale"])
    return vae


def sample_batch(x: torch.Tensor, ours: torch.Tensor, size: int, batch: int, rng: torch.Generator) -> torch.Tensor:
    rest = torch.randint(len(x), (batch - batch // 2,), generator=rng)
    concept_rows = ours[torch.randint(len(ours), (batch // 2,), generator=rng)]
    return random_affine(x[torch.cat([concept_rows, rest])].float() / 255, rng, size, (0.8, 1.0), 0.08) * 2 - 1


def psnr(vae: AutoencoderKL, x: torch.Tensor, size: int) -> float:
    """Mean over images of 10 log10(1 / mse), values in [0, 1]."""
    y = torch.nn.functional.interpolate(x.float() / 255, size=size, mode="area")
    with torch.no_grad():
        z = torch.cat([vae.decode(vae.encode(part * 2 - 1).latent_dist.mode()).sample for part in y.split(200)])
    return (-10 * ((z.clamp(-1, 1) / 2 + 0.5 - y) ** 2).mean((1, 2, 3)).log10()).mean().item()


def start(stage: str) -> tuple[AutoencoderKL, dict[str, Any]]:
    """Network and progress: from a checkpoint, or initialised (the decoder's stage: from the trained autoencoder)."""
    torch.manual_seed(seed("vae/init") % 2**31)
    vae = build_vae()
    state = load_checkpoint(WORK / f"{stage}.pt", params(stage)) or {"minutes": 0.0, "step": 0}
    if "model" in state:
        vae.load_state_dict(state["model"])
    elif stage == "decoder":
        vae.load_state_dict(load_trained().state_dict())
    if stage == "decoder":
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    return vae.train(), state


def main(stage: str) -> None:
    use_one_thread()
    p, size = params(stage), params("data")["size"]
    x, rows = load_images()
    ours = torch.tensor([i for i, r in enumerate(rows) if r["concept"]])
    vae, state = start(stage)
    learning = [w for w in vae.parameters() if w.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=p["lr"], weight_decay=1e-4)
    if "optimiser" in state:
        optimiser.load_state_dict(state["optimiser"])
    path, step = WORK / f"{stage}.pt", state["step"]
    rng = torch.Generator().manual_seed(seed(stage) + step)
    print(f"{sum(w.numel() for w in vae.parameters()):,} parameters", flush=True)
    for part in training_progress(p["minutes"], state["minutes"]):
        for group in optimiser.param_groups:
            group["lr"] = p["lr"] * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * part))
        y = sample_batch(x, ours, size, p["batch"], rng)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(y).latent_dist
            out = vae.decode(posterior.sample(generator=rng) if stage == "vae" else posterior.mode()).sample.float()
        loss = ((out - y) ** 2).mean() + 0.2 * (out - y).abs().mean()
        if stage == "vae":
            loss = loss + p["kl"] * posterior.kl().mean() / posterior.mean[0].numel()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        step += 1
        if step % 500 == 0:
            vae.eval()
            print(f"{part:4.0%} step {step} psnr {psnr(vae, x[ours[::8]], size):.2f} dB", flush=True)
            vae.train()
            checkpoint = {"model": vae.state_dict(), "optimiser": optimiser.state_dict()}
            save(path, **checkpoint, minutes=part * p["minutes"], step=step, settings=p, finished=False)
    vae.eval()
    print(f"psnr of our images {psnr(vae, x[ours], size):.2f} dB, of all {psnr(vae, x[::4], size):.2f} dB")
    y = torch.nn.functional.interpolate(x[ours].float() / 127.5 - 1, size=size, mode="area")
    with torch.no_grad():
        scale = 1 / vae.encode(y).latent_dist.mode().std().item()
    save(path, model=vae.state_dict(), scale=scale, finished=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("vae", "decoder"):
        raise SystemExit("usage: vae.py vae|decoder")
    main(sys.argv[1])
