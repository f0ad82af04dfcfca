"""Contact sheets: `sheet.png` (generated images) and `rebuilt.png` (images, each with its reconstruction).

A row of the first has six concepts, each with four plain seeds and two in ink style.
"""

from __future__ import annotations

import torch
from captions import with_article
from common import EMOJI, concepts, load_images, params, use_one_thread
from measure import open_pipeline, sample_images
from PIL import Image
from torch.nn.functional import interpolate
from vae import load_trained


def grid(x: torch.Tensor, columns: int, zoom: int = 2) -> Image.Image:
    """Tile (n, 3, h, w) in [0, 1] into one image, row by row."""
    n, _, h, w = x.shape
    x = torch.cat([x, x.new_ones((-n) % columns, 3, h, w)])
    y = x.view(-1, columns, 3, h, w).permute(0, 3, 1, 4, 2).reshape(-1, columns * w, 3)
    image = Image.fromarray((y.clamp(0, 1) * 255).round().byte().numpy()).quantize(256)  # a third of the bytes
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def main() -> None:
    use_one_thread()
    pipe, table = open_pipeline(), concepts()
    prompts = [p for c in table for p in (with_article(c.name),) * 4 + (f"{with_article(c.name)} in ink style",) * 2]
    grid(sample_images(pipe, prompts, range(len(prompts))), 36).save(EMOJI / "sheet.png")
    x, rows = load_images()
    size, net = params("data")["size"], load_trained(polished=True)
    selected = [i for i, r in enumerate(rows) if r["concept"]][::11]
    y = interpolate(x[selected].float() / 255, size=size, mode="area")
    with torch.no_grad():
        reconstruction = net.decode(net.encode(y * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
    grid(torch.stack([y, reconstruction], 1).flatten(0, 1), 20).save(EMOJI / "rebuilt.png")


if __name__ == "__main__":
    main()
