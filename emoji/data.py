"""Download the icon sets, rasterize them, and split them into two folds.

Writes `work/images.npy` (n, 3, render, render; uint8, on white) and `work/images.csv` (one row per image). The
designs of an emoji alternate between fold a and b, in the order of a hash, so that each concept has both. Two packages
with the same design (fluent flat and shaded) count as one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import subprocess
from itertools import cycle

import numpy as np
import resvg_py
from common import EMOJI, STYLE_BY_PACKAGE, WORK, concepts, params
from PIL import Image

GROUPS = {"animals & nature", "food & drink", "travel & places", "activities", "objects"}
# Not recognisable: a flat green box with dots.
EXCLUDED = {("fxemoji", "gamedie")}
EXCLUDED_SUBGROUPS = {
    "time",
    "geographic locations",
    "globes & maps",
    "hotel",
}  # clocks differ only by a hand, landscapes fill the frame


def install_packages() -> None:
    """`npm ci` into work/: exact versions and checksums from the lock file, without running scripts."""
    WORK.mkdir(exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(EMOJI / name, WORK / name)
    if not (WORK / "node_modules").exists():
        flags = [
            "--ignore-scripts",
            "--legacy-peer-deps",
            "--no-audit",
            "--no-fund",
            "--omit-lockfile-registry-resolved",
        ]
        subprocess.run(["npm", "ci", *flags], cwd=WORK, check=True)


def svgs_by_package() -> dict[str, dict[str, str]]:
    """package -> {name without hyphens: SVG}; one set writes names without hyphens.

    Aliases are left out: in two sets "pistol" is an alias of a water pistol.
    """
    books = {p: json.loads((WORK / f"node_modules/@iconify-json/{p}/icons.json").read_text()) for p in STYLE_BY_PACKAGE}
    return {
        p: {name.replace("-", ""): svg_document(icon, book) for name, icon in book["icons"].items()}
        for p, book in books.items()
    }


def svg_document(icon: dict, book: dict) -> str:
    """The SVG document of one icon; `currentColor` becomes black."""
    box = [icon.get(k, book.get(k, 0 if k in ("left", "top") else 16)) for k in ("left", "top", "width", "height")]
    body = icon["body"].replace("currentColor", "#000")
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{" ".join(map(str, box))}">{body}</svg>'


def rasterize(svg: str, size: int) -> np.ndarray | None:
    """uint8 (3, size, size) on white; None for a scene that fills its frame, since backgrounds must be white."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    alpha = np.asarray(image)[..., 3]
    if min(alpha[i, j] for i in (8, -9) for j in (8, -9)) > 200 and alpha.mean() > 230:
        return None
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return np.asarray(white.convert("RGB").resize((size, size), Image.Resampling.BOX)).transpose(2, 0, 1)


def emoji_rows() -> list[dict[str, str]]:
    """Our concepts, then every other object in the emoji list, with tags and category."""
    ours = concepts()
    rows = [
        {
            "label": c.name,
            "slugs": " ".join(c.emojis),
            "tags": "; ".join(c.synonyms),
            "category": c.family,
            "concept": c.name,
        }
        for c in ours
    ]
    used = {slug.replace("-", "") for c in ours for slug in c.emojis}
    folder = WORK / "node_modules/emojibase-data/en"
    names = json.loads((folder / "messages.json").read_text())
    groups = {g["order"]: g["message"] for g in names["groups"]}
    kinds = {g["order"]: g["message"] for g in names["subgroups"]}
    for e in json.loads((folder / "data.json").read_text()):
        kind = kinds.get(e.get("subgroup"))
        label = e["label"].lower().replace("’", "")
        slug = "".join(c for c in label if c.isalnum())
        if (
            groups.get(e.get("group")) in GROUPS
            and kind not in EXCLUDED_SUBGROUPS
            and slug not in used | {"waterpistol"}
        ):
            rows.append(
                {"label": label, "slugs": slug, "tags": "; ".join(e.get("tags", [])), "category": kind, "concept": ""}
            )
    return rows


def main() -> None:
    install_packages()
    sets, size = svgs_by_package(), params("data")["render"]
    images, rows = [], []
    for emoji in emoji_rows():
        slugs = [s.replace("-", "") for s in emoji.pop("slugs").split()]
        designs: dict[str, list[tuple[str, np.ndarray]]] = {}
        for package, book in sets.items():
            name = next((s for s in slugs if s in book), None)
            if name and (package, name) not in EXCLUDED and (image := rasterize(book[name], size)) is not None:
                designs.setdefault(package.removesuffix("-flat"), []).append((package, image))
        order = sorted(designs, key=lambda d: hashlib.sha256(f"{emoji['label']}/{d}".encode()).digest())
        for design, fold in zip(order, cycle("ab"), strict=False):
            for package, image in designs[design]:
                images.append(image)
                rows.append(emoji | {"package": package, "style": STYLE_BY_PACKAGE[package], "fold": fold})
    np.save(WORK / "images.npy", np.stack(images))
    with (WORK / "images.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    ours = sum(bool(r["concept"]) for r in rows)
    print(f"{len(rows)} images of {len({r['label'] for r in rows})} objects, {ours} of our concepts")


if __name__ == "__main__":
    main()
