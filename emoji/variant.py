"""Train another base model of the same classes, from another seed and with another width of the UNet:

    python emoji/variant.py --seed 7 --width 48 OUT

writes the pipeline OUT/models/pipeline, in about an hour of one core, and simulated feedback on its images to
OUT/feedback; the judge, the rater and the CLIP model stay those of ../models/, so that results compare. `--quick 0.1`
takes a tenth of all budgets, to try it out. Run again, it resumes. Results show how defaults do on models that they
were not chosen on; they are not shipped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

EMOJI = Path(__file__).parent
GROUPS = 16
"""Groups of the UNet's group normalisation, which divide its widths."""

BUDGETS: dict[str, dict[str, Any]] = {
    "vae": {"minutes": 8},
    "text": {"minutes": 8},
    "unet": {"samples": 130_000, "processes": 1},
}
"""Less than the built-in model's: the decoder is not trained further, and the UNet sees a third of the samples."""

NETWORKS = {"vae": ("vae.py", "vae"), "text": ("text.py",), "unet": ("unet.py",)}
"""Networks of a pipeline, in the order of their training, with script and arguments."""


def variant_params(seed: int, width: int, share: float) -> dict[str, Any]:
    """emoji/params.yaml with the seed, the width and the smaller budgets."""
    params: dict[str, Any] = yaml.safe_load((EMOJI / "params.yaml").read_text("utf-8"))
    params["seed"] = seed
    for section, values in BUDGETS.items():
        params[section] |= values
    params["unet"]["channels"] = [width, 2 * width]
    params["unet"]["samples"] = int(share * params["unet"]["samples"])
    for section in ("vae", "text"):
        params[section]["minutes"] *= share
    return params


def run(*script: str, env: dict[str, str], logs: Path) -> None:
    """Run a script of this folder; exits with the name of its log where it fails."""
    print(*script, flush=True)
    path = logs / f"{'-'.join(Path(part).name for part in script)}.log"
    with path.open("wb") as log:
        command = [sys.executable, str(EMOJI / script[0]), *script[1:]]
        done = subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{' '.join(script)} failed\nNext: less {path}")


def is_trained(name: str, work: Path, samples: int) -> bool:
    """Whether a network is trained, which its script would begin again."""
    path = work / f"{name}.pt"
    if not path.is_file():
        return False
    import torch

    state = torch.load(path, weights_only=True)
    return bool(state["samples"] >= samples if name == "unet" else state["finished"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument(
        "--width", type=int, required=True, help="of the UNet's first level; the built-in model's is 64"
    )
    parser.add_argument("--quick", type=float, default=1.0, metavar="SHARE", help="share of all training budgets")
    parser.add_argument("out", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    if arguments.width <= 0 or arguments.width % GROUPS:
        parser.error(f"--width: expected a multiple of {GROUPS}, got {arguments.width}")
    out: Path = arguments.out.resolve()
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    values = variant_params(arguments.seed, arguments.width, arguments.quick)
    params = yaml.safe_dump(values, sort_keys=False)
    path = out / "params.yaml"
    if path.is_file() and path.read_text("utf-8") != params:
        parser.error(f"{out} holds another variant; name a new folder")
    path.write_text(params, "utf-8")
    folders = {"EMOJI_PARAMS": str(path), "EMOJI_WORK": str(work), "EMOJI_MODELS": str(out / "models")}
    env = os.environ | folders | {"OMP_NUM_THREADS": "1"}
    if not (work / "images.csv").is_file():
        run("data.py", env=env, logs=out)
    for name, script in NETWORKS.items():
        if not is_trained(name, work, values["unet"]["samples"]):
            run(*script, env=env, logs=out)
    run("pack.py", env=env, logs=out)
    pipeline, feedback = out / "models" / "pipeline", out / "feedback"
    run("feedback.py", "--model", str(pipeline), "--out", str(feedback), env=env, logs=out)
    print(f"In params.yaml, base.model: {pipeline}\nand ingest.sources: ['{feedback}/*.jsonl']\nNext: deleatur demo")


if __name__ == "__main__":
    main()
