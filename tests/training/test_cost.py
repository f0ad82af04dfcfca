"""Cost estimates against what runs take."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from deleatur.diffusion import architecture, encode
from deleatur.diffusion.architecture import Architecture, stable_diffusion
from deleatur.diffusion.model import Model
from deleatur.diffusion.sample import sample
from deleatur.erasers.sdd import SDD
from deleatur.erasers.uce import UCE
from deleatur.guides.cfg import CFG
from deleatur.training.cost import (
    MEASURING_SECONDS,
    MIN_REPEATS,
    STABLE_REPEATS,
    Workload,
    estimate_cost,
    measure_speed,
    repeat_until_stable,
    sampling_workload,
)
from deleatur.training.loop import ErasureContext

ROOT = Path(__file__).parents[2]
BUILT_IN = ROOT / "models" / "pipeline"


@pytest.fixture(scope="module")
def tiny_architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return architecture.from_folder(tiny.save_pipeline(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {
            "trajectories": "pool",
            "pool_size": 8,
            "timestep_distribution": "beta33",
            "sampler_steps": 6,
            "train_timesteps": 4,
        },
        {"preservation_weight": 1.0, "trainable": "full"},
    ],
)
def test_flops_are_those_that_torch_counts_in_the_run(
    model: Model, tiny_architecture: Architecture, config: dict[str, object]
) -> None:
    sdd = SDD(order="single", training={"iterations": 6, "batch_size": 2, "sampler_steps": 3, "lr": 1e-3, **config})  # type: ignore[arg-type]
    concept = encode.concept_from_words(model, "weapon", ["gun"])
    keep = encode.encode_text(model, ["a cat"])
    with FlopCounterMode(display=False) as counter:
        sdd.erase(model, [concept], ErasureContext(1, keep))
    estimated = estimate_cost(sdd.workload("words"), tiny_architecture)
    assert counter.get_total_flops() == pytest.approx(estimated.flops, rel=0.1)


def test_an_architecture_has_the_models_sizes(model: Model, tiny_architecture: Architecture) -> None:
    nets = (model.unet, model.vae, model.text_encoder)
    assert tiny_architecture.num_parameters == sum(p.numel() for net in nets for p in net.parameters())
    assert (tiny_architecture.latent_shape, tiny_architecture.text_states_shape) == (
        model.latent_shape,
        (model.max_tokens, tiny.WIDTH),
    )
    assert all(p.is_meta for p in tiny_architecture.unet.parameters()), "it takes no memory"


def test_stable_diffusion_has_the_published_sizes() -> None:
    """859,520,964 of the UNet, 83,653,863 of the VAE, 123,060,480 of the text encoder."""
    sd = stable_diffusion()
    assert sd.num_parameters == 859_520_964 + 83_653_863 + 123_060_480
    assert (sd.latent_shape, sd.text_states_shape) == ((4, 64, 64), (77, 768))
    sdd, uce = estimate_cost(SDD().workload("words"), sd), estimate_cost(UCE().workload("words"), sd)
    assert (sdd.trainable_parameters, uce.trainable_parameters) == (43_962_560, 19_169_280)
    assert sdd.workload.backward == 1500
    assert sdd.workload.forward == 1500 * (49 + 1) + 2 * 60, "trajectories of 24.5 guided steps, a target, drift"
    assert uce.flops == 0
    assert 4 * sd.num_parameters < uce.peak_memory < sdd.peak_memory < 24e9


def test_images_are_sampled_in_full_batches(model: Model) -> None:
    import network_calls

    guide, c = CFG(), encode.encode_text(model, ["a cat"] * 5)
    with network_calls.rows() as counts:
        sample(model, c, range(5), guide=guide, conditions=guide.conditions(model, []), steps=3, batch_size=4)
    workload = sampling_workload(5, 3, 2, 4)
    assert (counts["forward"], counts["max_forward_batch"]) == (workload.forward, workload.max_forward_batch)


def test_a_sum_adds_calls_and_takes_the_maximum_of_memory() -> None:
    both = Workload(forward=10, max_forward_batch=4, bytes_per_parameter=8, evaluations=1) + Workload(
        forward=5, backward=3, max_forward_batch=2, max_backward_batch=2, bytes_per_parameter=4
    )
    assert both == Workload(
        forward=15, backward=3, max_forward_batch=4, max_backward_batch=2, bytes_per_parameter=8, evaluations=1
    )


def test_speed_is_flops_over_time(tmp_path: Path, tiny_architecture: Architecture) -> None:
    folder = tiny.save_pipeline(tmp_path)
    speed = measure_speed(folder, tiny_architecture, "float32", "cpu")
    assert 1e5 < speed.low <= speed.median <= speed.high < 1e13


def test_calls_are_repeated_until_they_agree_and_one_slow_call_changes_little() -> None:
    """A single timed call differs twenty-fold beside other work."""

    def durations(*sequence: float) -> list[float]:
        return repeat_until_stable(iter([*sequence, *[math.nan] * 99]).__next__)

    assert durations(*[0.02] * 50) == [0.02] * STABLE_REPEATS, "agreeing calls end it"
    disturbed = durations(0.4, *[0.02] * 50)
    assert len(disturbed) > STABLE_REPEATS, "until the outlier is beyond the 90th percentile"
    assert np.median(disturbed) == pytest.approx(0.02)
    assert np.quantile(disturbed, 0.9) < 0.03
    noisy = durations(*[0.02, 0.4] * 50)
    assert sum(noisy[:-1]) < MEASURING_SECONDS <= sum(noisy), "calls that never agree end with the time"
    assert durations(*[9.0] * 50) == [9.0] * MIN_REPEATS, "one call of a large network takes longer than that"


MEASURE = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from deleatur.diffusion import encode
from deleatur.diffusion import architecture
from deleatur.training.cost import estimate_cost, sampling_workload
from deleatur.diffusion.model import load
from deleatur.diffusion.sample import sample
from deleatur.erasers.sdd import SDD
from deleatur.guides.cfg import CFG
from deleatur.training.loop import ErasureContext

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

folder = Path(sys.argv[1])
model, network = load(str(folder), device="cpu"), architecture.from_folder(folder)
concept, guide = encode.concept_from_words(model, "weapon", ["gun"]), CFG()

def run(what, rows):
    if what == "sample":
        c = encode.encode_text(model, ["a gun"] * rows)
        sample(model, c, range(rows), guide=guide, conditions=guide.conditions(model, []), steps=1, batch_size=rows)
        return sampling_workload(rows, 1, 2, rows)
    training = {"iterations": 2, "sampler_steps": 2, "batch_size": rows, "lr": 1e-4}
    training |= {"trainable": "full", "min_relative_change": 0}
    sdd = SDD(order="single", training=training)
    sdd.erase(model, [concept], ErasureContext(0))
    return sdd.workload("words")

for what in ("sample", "train"):
    run(what, 2)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS")
    workload = run(what, 96)
    estimated = estimate_cost(workload, network).peak_memory - 4 * network.num_parameters
    print(json.dumps({"case": what, "estimated": estimated, "measured": memory("VmHWM") - before}))
"""


@pytest.mark.slow
def test_memory_is_that_of_a_process_on_the_built_in_model() -> None:
    """Within a third: allocators free late, and convolutions have buffers that no shape reveals."""
    env = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT / "src"), "PATH": ""}
    command = [sys.executable, "-c", MEASURE, str(BUILT_IN)]
    lines = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 2
    for result in map(json.loads, lines):
        assert result["measured"] > 5e7, "large enough to measure"
        assert result["estimated"] == pytest.approx(result["measured"], rel=1 / 3), result


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_is_that_of_a_gpu() -> None:
    from deleatur.diffusion.model import load

    model, network = load(str(BUILT_IN), device="cuda"), architecture.from_folder(BUILT_IN)
    training = {
        "iterations": 2,
        "sampler_steps": 2,
        "batch_size": 96,
        "lr": 1e-4,
        "trainable": "full",
        "min_relative_change": 0,
    }
    sdd = SDD(order="single", training=training)  # type: ignore[arg-type]
    concept = encode.concept_from_words(model, "weapon", ["gun"])
    before = torch.cuda.memory_allocated() - 4 * network.num_parameters
    torch.cuda.reset_peak_memory_stats()
    sdd.erase(model, [concept], ErasureContext(0))
    measured = torch.cuda.max_memory_allocated() - before
    assert estimate_cost(sdd.workload("words"), network).peak_memory == pytest.approx(measured, rel=1 / 3)
