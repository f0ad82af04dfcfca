"""Train another model of the same classes, from another seed and with another width of the UNet:

    python emoji/variant.py --seed 7 --width 48 OUT

writes OUT/models (pipeline, clip, judge, rater, style) as the built-in model's, on two cores: autoencoder and
text encoder, one on each, then the UNet on one while CLIP and the classifiers train on the other, which takes 23 CPU
minutes. `--quick 0.1` takes a tenth of all budgets, to try it out. Run again, it resumes. Results are for
comparisons of methods across models; they are not shipped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

EMOJI = Path(__file__).parent
GROUPS = 16
"""Groups of the UNet's group normalisation, which divide its widths."""

BUDGETS: dict[str, dict[str, Any]] = {
    "vae": {"minutes": 6},
    "text": {"minutes": 6},
    "clip": {"minutes": 6},
    "classify": {"judge": {"fold": "a", "minutes": 8}, "rater": {"fold": "b", "minutes": 5}},
    "unet": {"samples": 130_000, "processes": 1},
}
"""Less than the built-in model's: the decoder is not trained further, and the UNet sees a third of the samples."""

Script = tuple[str, ...]
"""A script of this folder with its arguments."""
PHASES: tuple[tuple[tuple[Script, ...], ...], ...] = (
    ((("data.py",),),),
    ((("vae.py", "vae"),), (("text.py",),)),
    ((("unet.py",),), (("classify.py", "judge"), ("clip.py",), ("classify.py", "rater"), ("classify.py", "style"))),
    ((("pack.py",),),),
)
"""Phases one after the other; within a phase, sequences of scripts side by side, one on each core."""


def variant_params(seed: int, width: int, share: float) -> dict[str, Any]:
    """emoji/params.yaml with the seed, the width and the smaller budgets."""
    params: dict[str, Any] = yaml.safe_load((EMOJI / "params.yaml").read_text("utf-8"))
    params["seed"] = seed
    for section, values in BUDGETS.items():
        params[section] |= values
    params["unet"]["channels"] = [width, 2 * width]
    params["unet"]["samples"] = int(share * params["unet"]["samples"])
    timed = [params[name] for name in ("vae", "text", "clip")]
    timed += [params["classify"][kind] for kind in ("judge", "rater", "style")]
    for section in timed:
        section["minutes"] *= share
    return params


def run_phase(sequences: Sequence[Sequence[Script]], env: dict[str, str], logs: Path) -> None:
    """Run sequences of scripts side by side; exits with the name of the log of the first that fails."""
    waiting = [list(sequence) for sequence in sequences]
    running: list[tuple[int, Script, subprocess.Popen[bytes]]] = []

    def start(index: int) -> None:
        if waiting[index]:
            script = waiting[index].pop(0)
            print(*script, flush=True)
            command = [sys.executable, str(EMOJI / script[0]), *script[1:]]
            with (logs / f"{'-'.join(script)}.log").open("wb") as log:
                process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
            running.append((index, script, process))

    for index in range(len(waiting)):
        start(index)
    try:
        while running:
            index, script, process = running.pop(0)
            try:
                code = process.wait(1)
            except subprocess.TimeoutExpired:
                running.append((index, script, process))
                continue
            if code:
                sys.exit(f"{' '.join(script)} failed\nNext: less {logs / '-'.join(script)}.log")
            start(index)
    finally:
        for _, _, process in running:
            process.terminate()
            process.wait()


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
    params, samples = yaml.safe_dump(values, sort_keys=False), values["unet"]["samples"]
    path = out / "params.yaml"
    if path.is_file() and path.read_text("utf-8") != params:
        parser.error(f"{out} holds another variant; name a new folder")
    path.write_text(params, "utf-8")
    folders = {"EMOJI_PARAMS": str(path), "EMOJI_WORK": str(work), "EMOJI_MODELS": str(out / "models")}
    env = os.environ | folders | {"OMP_NUM_THREADS": "1"}
    for sequences in PHASES:
        if sequences == PHASES[0] and (work / "images.csv").is_file():
            continue
        run_phase(
            [[script for script in sequence if not is_done(script, work, samples)] for sequence in sequences], env, out
        )
    print(f"{out / 'models'}: set base.model, reward.clip and the detectors' paths in params.yaml to its folders")


def is_done(script: Script, work: Path, samples: int) -> bool:
    """Whether a network is trained, which its script would begin again."""
    name = script[-1].removesuffix(".py")
    path = work / f"{name}.pt"
    if not path.is_file():
        return False
    import torch

    state = torch.load(path, weights_only=True)
    return bool(state["samples"] >= samples if name == "unet" else state["finished"])


if __name__ == "__main__":
    main()
