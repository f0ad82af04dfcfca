"""The pipeline on the tiny model, from feedback to an exported folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import workspace
import yaml
from typer.testing import CliRunner

from deleatur import gate, stages
from deleatur.cli import app
from deleatur.config.settings import Settings
from deleatur.diffusion import sample as sampler
from deleatur.records.report import Report, Verdict
from deleatur.storage import json_records, samples, tensors

CHAIN = [s for s in stages.STAGES if s != "register"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which the pipeline has run."""
    root = tmp_path_factory.mktemp("chain")
    cwd = Path.cwd()
    os.chdir(root)
    try:
        settings = workspace.create(root)
        for name in CHAIN:
            stages.run(name, settings)
    finally:
        os.chdir(cwd)
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, as the current directory."""
    shutil.copytree(finished, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def change(root: Path, **sections: Any) -> Settings:
    params = yaml.safe_load((root / "params.yaml").read_text())
    for name, values in sections.items():
        params[name] |= values
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return Settings.load()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_report_validates_and_says_it_is_simulated(root: Path) -> None:
    report = json_records.read(root / "out/report/report.json", Report)
    verdict = json_records.read(root / "out/verdict/verdict.json", Verdict)
    assert report.provenance.simulated
    assert verdict.simulated
    assert verdict.report == json_records.digest(report)
    assert {s.variant for s in report.scores} == {"base", "candidate"}
    for phrase in (
        "each for one cluster",
        "norm of the tokens is limited",
        "A preservation loss was added",
        "staggered",
        "by itself",
        "sampled uniformly, as in SDD",
        "xattn_kv tensors were trained",
    ):
        assert sum(phrase in note for note in report.notes) == 1, f"every deviation from the papers is noted: {phrase}"
    assert any(Settings.load().concepts["weapon"].guideline in note for note in report.notes)
    assert gate.SIMULATED_NOTICE in (root / "out/verdict/report.html").read_text("utf-8")


def test_base_and_candidate_start_from_the_same_noise(root: Path) -> None:
    base, candidate = (samples.read(root / "out/samples", variant) for variant in ("base", "candidate"))
    pd.testing.assert_frame_equal(base[["id", "index", "noise_seed"]], candidate[["id", "index", "noise_seed"]])
    assert base["weights"].nunique() == candidate["weights"].nunique() == 1
    assert base["weights"][0] != candidate["weights"][0]
    assert base["noise_seed"].is_unique


@pytest.mark.parametrize("name", ["reward", "invert", "erase", "attack", "sample", "evaluate"])
def test_a_stage_run_again_writes_the_same_bytes(root: Path, name: str) -> None:
    settings = Settings.load()
    folder = {"invert": "tokens", "erase": "delta", "attack": "attacks", "sample": "samples", "evaluate": "report"}
    place = root / "out" / folder.get(name, name)
    before = files(place)
    shutil.rmtree(place)
    stages.run(name, settings)
    assert files(place) == before


def test_a_guide_steers_the_candidate_alone(root: Path) -> None:
    before = samples.read(root / "out/samples", "base")
    guide = {"method": "sld", "sld": {"preset": "max", "scale": json.loads(before["guidance"][0])["scale"]}}
    settings = change(root, guide=guide)
    for name in ("sample", "evaluate"):
        stages.run(name, settings)
    base, candidate = (samples.read(root / "out/samples", variant) for variant in ("base", "candidate"))
    pd.testing.assert_frame_equal(base, before)
    assert {json.loads(g)["method"] for g in candidate["guidance"]} == {"sld"}
    assert not set(base["image"]) & set(candidate["image"])
    notes = json_records.read(root / "out/report/report.json", Report).notes
    assert any("sampled with the guide sld" in note for note in notes)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("prompts/neutral.csv", "judge:dog", "jugde:dog", "got 'jugde'"),
        ("params.yaml", "perceptual:\n      method: perceptual", "nude:\n      method: nudity", "got 'nudenet'"),
    ],
)
def test_a_missing_detector_is_reported_before_any_image_is_evaluated(
    root: Path, file: str, old: str, new: str, message: str
) -> None:
    path = root / file
    assert old in path.read_text("utf-8")
    path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")
    result = CliRunner().invoke(app, ["stage", "evaluate"])
    assert (result.exit_code, type(result.exception)) == (2, SystemExit), result.output
    assert message in result.output


def test_another_method_is_selected_by_its_name_alone(root: Path) -> None:
    """Textual inversion, which ignores ratings, and the eraser that keeps the model: no image changes."""
    for name in ("invert", "erase", "attack", "sample", "evaluate", "gate"):
        stages.run(name, change(root, invert={"method": "textual_inversion"}, erase={"method": "keep"}))
    report = json_records.read(root / "out/report/report.json", Report)
    assert report.provenance.method == "keep"
    moved = [s for s in report.scores if s.metric == "perceptual" and s.variant == "candidate" and s.versus is None]
    assert moved
    assert all(s.value == 0 for s in moved)


def test_plain_diffusers_samples_the_same_images_from_an_exported_folder(root: Path) -> None:
    import numpy as np
    from diffusers import StableDiffusionPipeline

    from deleatur.storage import images

    result = CliRunner().invoke(app, ["export", "model"])
    assert result.exit_code == 0, result.output
    pipe = StableDiffusionPipeline.from_pretrained("model")
    pipe.set_progress_bar_config(disable=True)
    sample = samples.read(root / "out/samples", "candidate").query("role == 'unseen'").iloc[0]
    from deleatur.diffusion.model import load

    z = sampler.initial_noise(load("model"), [int(sample["noise_seed"])])
    scale = json.loads(sample["guidance"])["scale"]
    theirs = pipe(sample["text"], num_inference_steps=2, guidance_scale=scale, latents=z).images[0]
    ours = images.decode(sample["image"])
    assert np.abs(np.asarray(theirs, int) - np.asarray(ours, int)).max() <= 1
    learned = tensors.load_token(root / "out/tokens/weapon")
    assert set(learned.placeholders) & pipe.tokenizer.get_vocab().keys() == set()
    assert "<weapon" not in "".join(p.read_text("utf-8") for p in Path("model").rglob("*.json"))
    table = pipe.text_encoder.get_input_embeddings().weight
    plain = StableDiffusionPipeline.from_pretrained("models/pipeline").text_encoder.get_input_embeddings().weight
    assert torch.equal(table, plain), "no embedding is the token's"
    again = CliRunner().invoke(app, ["export", "model"])
    assert again.exit_code == 3
    assert "exists already" in again.output


def test_plain_diffusers_loads_the_token_of_the_chain(root: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained("models/pipeline")
    pipe.load_textual_inversion(sorted(map(str, Path("out/tokens/weapon").iterdir())))
    assert "<weapon-1>" in pipe.tokenizer.get_vocab()
