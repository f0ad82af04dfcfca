"""`sample` and `evaluate` compute what is missing and nothing else, with the files of a fresh run as result.

Network calls are counted with a hook of torch.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import finished
import pandas as pd
import pytest
import tiny
import torch
import workspace
import yaml
from child_processes import die, killed
from network_calls import JUDGE, TEXT, UNET, VISION, calls
from safetensors.torch import load_file, save_file

from deleatur import dependencies, stages
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.evaluation import cache
from deleatur.guides import Guide
from deleatur.guides.cfg import CFG
from deleatur.records.report import Report
from deleatur.records.sampling import Recipe
from deleatur.runtime import models, provenance
from deleatur.stages import sample
from deleatur.storage import json_records, samples, tensors

VARIANTS, STEPS, BATCH, SHARD, EVALUATION_SHARD = 2, 2, 4, 8, 8
FOLDERS = ("samples", "scores", "report")


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Several shards even for few images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SHARD_SIZE", EVALUATION_SHARD)
        yield


@pytest.fixture(scope="module")
def template(shared: Path, tmp_path_factory: pytest.TempPathFactory, small: None) -> Path:
    """A workspace in which the pipeline has run, in such shards."""
    root = tmp_path_factory.mktemp("resume") / "w"
    shutil.copytree(finished.template(shared), root, ignore=shutil.ignore_patterns(".git", ".dvc", "src"))
    with chdir(root):
        sample_and_evaluate(Settings.load())
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current directory."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sample_and_evaluate(settings: Settings) -> Counter[str]:
    """Runs both stages; returns the number of network calls."""
    with calls() as counts:
        stages.run("sample", settings)
        stages.run("evaluate", settings)
    return counts


def change(root: Path, **sections: Any) -> Settings:
    params = yaml.safe_load((root / "params.yaml").read_text())
    for name, values in sections.items():
        params[name] |= values
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return Settings.load()


def files(*folders: str) -> dict[str, bytes]:
    paths = (p for folder in folders for p in sorted(Path("out", folder).rglob("*")))
    return {str(p): p.read_bytes() for p in paths if p.is_file()}


def delete(*folders: str) -> None:
    for folder in folders:
        shutil.rmtree(Path("out", folder))


def listing() -> pd.DataFrame:
    return samples.read_listing(Path("out/samples"))


def report() -> Report:
    return json_records.read(Path("out/report/report.json"), Report)


def calls_for(images: int, size: int) -> int:
    return -(-images // size)


def test_a_second_run_calls_no_network(root: Path) -> None:
    before, times = files(*FOLDERS), {p: p.stat().st_mtime_ns for p in Path("out/samples/images").iterdir()}
    counts = sample_and_evaluate(Settings.load())
    assert (counts[UNET], counts[JUDGE], counts[VISION]) == (0, 0, 0)
    assert files(*FOLDERS) == before
    assert {p: p.stat().st_mtime_ns for p in Path("out/samples/images").iterdir()} == times


def test_only_a_new_prompt_is_sampled_and_evaluated(root: Path) -> None:
    with Path("prompts/neutral.csv").open("a", newline="", encoding="utf-8") as f:
        csv.writer(f).writerow(("a-first", "a dog in ink", "judge:dog", "unseen", "test"))  # sorts before the others
    old = set(listing()["key"])
    per_prompt = Settings.load().sample.images_per_prompt["unseen"]
    counts = sample_and_evaluate(Settings.load())
    assert len(set(listing()["key"]) - old) == VARIANTS * per_prompt
    assert old < set(listing()["key"])
    assert counts[UNET] == VARIANTS * STEPS * calls_for(per_prompt, BATCH)
    assert counts[JUDGE] == 1
    assert counts[VISION] == 1 + VARIANTS * 2, "its features, and both pictures of a pair for the perceptual distance"
    grown = files(*FOLDERS)
    delete(*FOLDERS)
    sample_and_evaluate(Settings.load())
    assert files(*FOLDERS) == grown, "the result of a fresh run"


def test_the_images_of_a_removed_prompt_are_removed(root: Path) -> None:
    path = Path("prompts/neutral.csv")
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "a cat of ink" not in line))
    counts = sample_and_evaluate(Settings.load())
    assert (counts[UNET], counts[JUDGE], counts[VISION]) == (0, 0, 0)
    left = files(*FOLDERS)
    delete(*FOLDERS)
    sample_and_evaluate(Settings.load())
    assert files(*FOLDERS) == left


def test_another_label_samples_nothing_and_changes_the_value(root: Path) -> None:
    keys, path, values = listing()["key"].tolist(), Path("prompts/neutral.csv"), []
    for label in workspace.LABELS:
        path.write_text(re.sub(r"judge:\w+", f"judge:{label}", path.read_text()))
        counts = sample_and_evaluate(Settings.load())
        assert (counts[UNET], counts[JUDGE], counts[VISION]) == (0, 0, 0)
        assert counts[TEXT] == listing()["id"].nunique() + 5, (
            "each prompt; the concept, its words, its tokens, and none"
        )
        assert listing()["key"].tolist() == keys
        values.append(
            pd.read_parquet("out/scores/values.parquet").query("metric == 'recognition' and role == 'unseen'")
        )
    assert sum(v["value"].to_numpy() for v in values).tolist() == [1.0] * len(values[0]), (
        "the detector finds one of them"
    )


def test_a_new_candidate_keeps_the_images_of_the_base_model(root: Path) -> None:
    times = {p: p.stat().st_mtime_ns for p in Path("out/samples/images").iterdir()}
    base, candidate = (set(listing().query(f"variant == '{variant}'")["key"]) for variant in ("base", "candidate"))
    settings = change(root, erase={"source": "words"})
    stages.run("erase", settings)
    counts = sample_and_evaluate(settings)
    assert counts[UNET] == STEPS * sum(calls_for(n, BATCH) for n in [SHARD] * (len(candidate) // SHARD)) + (
        STEPS * calls_for(len(candidate) % SHARD, BATCH)
    )
    assert set(listing().query("variant == 'base'")["key"]) == base
    assert not set(listing().query("variant == 'candidate'")["key"]) & candidate
    same = [p for p, t in times.items() if p.is_file() and p.stat().st_mtime_ns == t]
    assert len(same) == calls_for(len(base), SHARD), "their files are not rewritten"


def test_a_new_metric_computes_its_own_values_only(root: Path) -> None:
    before, old = files("samples", "scores"), report()
    metrics = yaml.safe_load((root / "params.yaml").read_text())["evaluate"]["metrics"]
    new = {"prefixed": {"method": "clip_score", "prefix": "a "}}
    counts = sample_and_evaluate(change(root, evaluate={"metrics": {**metrics, **new}}))
    assert (counts[UNET], counts[JUDGE], counts[VISION]) == (0, 0, 0)
    assert counts[TEXT] > 0
    after = files("samples", "scores")
    assert {p for p in before if before[p] != after.get(p)} == {"out/scores/values.parquet"}
    assert [s for s in report().scores if s.metric != "prefixed"] == list(old.scores)
    assert "prefixed" in {s.metric for s in report().scores}


def test_another_detector_in_the_same_folder_is_run_again_and_no_other_network(root: Path) -> None:
    total, old = listing()["key"].nunique(), report()
    tiny.save_classifier(root / "models" / "judge", workspace.LABELS, seed=3)
    counts = sample_and_evaluate(Settings.load())
    assert counts[JUDGE] == calls_for(total, EVALUATION_SHARD)
    assert (counts[UNET], counts[VISION]) == (0, 0)

    def judges(report: Report) -> set[str]:
        return {s.detector.weights for s in report.scores if s.metric == "concept_rate" and s.detector}

    def other(report: Report) -> list[Any]:
        return [s for s in report.scores if s.metric not in ("concept_rate", "recognition")]

    assert not judges(report()) & judges(old)
    assert other(report()) == other(old)
    replaced = files(*FOLDERS)
    delete("scores", "report")
    stages.run("evaluate", Settings.load())
    assert files(*FOLDERS) == replaced


def test_a_moved_detector_is_not_run_again(root: Path) -> None:
    shutil.move(root / "models" / "judge", root / "models" / "moved")
    settings = change(root, evaluate={"detectors": {"judge": {"method": "classifier", "path": "models/moved"}}})
    assert sample_and_evaluate(settings)[JUDGE] == 0


def test_another_batch_size_computes_nothing(root: Path) -> None:
    before = files("samples", "scores")
    judge = {"method": "classifier", "path": "models/judge", "batch_size": 5}
    counts = sample_and_evaluate(change(root, sample={"batch_size": 3}, evaluate={"detectors": {"judge": judge}}))
    assert (counts[UNET], counts[JUDGE], counts[VISION]) == (0, 0, 0)
    assert files("samples", "scores") == before


def test_other_batch_and_shard_sizes_sample_the_same_images(root: Path) -> None:
    before = [samples.read(Path("out/samples"), variant) for variant in ("base", "candidate")]
    delete("samples")
    stages.run("sample", change(root, sample={"batch_size": 3, "shard_size": 5}))
    for variant, old in zip(("base", "candidate"), before, strict=True):
        pd.testing.assert_frame_equal(samples.read(Path("out/samples"), variant), old)  # type: ignore[arg-type]


def test_a_candidate_that_became_the_champion_is_not_sampled_again(root: Path) -> None:
    settings = Settings.load()
    champion = settings.sample.model_copy(update={"champion": str(root / "out/delta")})
    with calls() as counts:
        sample.run(settings.model_copy(update={"sample": champion}))
    assert counts[UNET] == 0
    assert set(listing()["variant"]) == {"base", "champion", "candidate"}


MOMENTS = [("sample", UNET, 6), ("evaluate", JUDGE, 3), ("evaluate", VISION, 2), ("evaluate", VISION, 9)]
"""The first calls of VISION are for the features, the later ones for the perceptual distance."""


@pytest.mark.parametrize(("stage", "network", "moment"), MOMENTS)
def test_killed_inside_a_network_it_resumes_at_the_current_shard(
    stage: str, network: str, moment: int, root: Path
) -> None:
    settings, folder = Settings.load(), "samples" if stage == "sample" else "scores"
    before = files(*FOLDERS)

    def killer(counts: Counter[str]) -> None:
        if counts[network] == moment:
            die()

    def interrupted() -> None:
        with calls(killer):
            stages.run(stage, settings)

    delete(folder)
    with calls() as complete:
        stages.run(stage, settings)
    delete(folder)
    assert killed(interrupted)
    with calls() as rest:
        stages.run(stage, settings)
    per_shard = {UNET: STEPS * SHARD // BATCH, JUDGE: 1, VISION: 2, TEXT: 1}[network]
    assert complete[network] - moment <= rest[network] < complete[network] - moment + 1 + per_shard
    assert files(*FOLDERS) == before


def nudge(folder: Path) -> None:
    [file] = folder.glob("*.safetensors")
    weights = load_file(file)
    save_file({n: 1.1 * t if t.is_floating_point() else t for n, t in weights.items()}, file, {"format": "pt"})


def another_schedule(folder: Path) -> None:
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.02}))


@pytest.mark.parametrize(("part", "alter"), [("vae", nudge), ("scheduler", another_schedule)])
def test_a_change_to_any_part_of_the_model_samples_everything_anew(
    part: str, alter: Callable[[Path], None], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deleatur.storage.dvc.status", lambda folder: {})
    old, keys = report().provenance, set(listing()["key"])
    alter(root / "models" / "pipeline" / part)
    with pytest.raises(DataError, match="another pipeline than"):
        stages.run("register", Settings.load())
    counts = sample_and_evaluate(Settings.load())
    assert counts[UNET] > 0
    assert not keys & set(listing()["key"])
    new = report().provenance
    assert (new.base, new.delta) == (old.base, old.delta), "the delta still fits"
    assert new.pipeline != old.pipeline
    assert new.images != old.images


def test_the_key_of_an_image_is_the_digest_of_its_listed_recipe(root: Path) -> None:
    names = Recipe.__dataclass_fields__
    for row in listing().to_dict("records"):
        assert Recipe(**{name: row[name] for name in names}).key == row["key"]
    assert listing().groupby("variant")["key"].nunique().to_dict() == listing().groupby("variant").size().to_dict()


def test_the_concept_of_a_guide_is_part_of_the_key(root: Path) -> None:
    names, scale = set(), methods.guide(Settings.load()).scale
    for guide, source in itertools.product(("cfg", "negative"), ("words", "token")):
        settings = change(root, guide={"method": guide, guide: {"scale": scale}}, erase={"source": source})
        configs = sample.sampling_configs(settings, models.base_model(settings))
        names |= {(variant, config.recipe.key) for variant, config in configs.items()}
    assert len(names) == 1 + 3, "plain guidance has no concept"


def test_changed_code_has_another_digest(tmp_path: Path) -> None:
    source = tmp_path / "deleatur"
    digests = set()
    for text in ("X = 1\n", "X = 1\n", "X = 22\n"):
        shutil.copytree(dependencies.PACKAGE, source, dirs_exist_ok=True)
        with (source / "guides" / "cfg.py").open("a") as file:
            file.write(f"\n\nclass CFG:\n    {text}")
        digests.add(json.dumps(dependencies.code_digests(CFG, source=source)))
    assert len(digests) == 2
    assert len({provenance.digest_code(of, libraries=names) for of in (CFG, Guide) for names in ((), ("torch",))}) == 4


def test_the_pipeline_runs_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusionPipeline

    from deleatur.artifacts.export import export

    monkeypatch.chdir(tmp_path)
    base = {"model": "models/pipeline", "dtype": "bfloat16", "device": "cpu"}
    erase = workspace.small_params(tmp_path)["erase"]
    erase["sdd"]["training"]["lr"] = 3e-2  # smaller steps than this are lost to bfloat16's rounding
    settings = workspace.create(tmp_path, base=base, erase=erase)
    for name in stages.STAGES[:-1]:
        stages.run(name, settings)
    export(settings, Path("model"))
    assert "bfloat16" in report().provenance.sampler
    delta = tensors.load_delta(settings.paths.delta / tensors.DELTA_FILE)
    assert delta.base == models.base_model(settings).unet_digest
    plain = StableDiffusionPipeline.from_pretrained("models/pipeline").unet.state_dict()
    erased = StableDiffusionPipeline.from_pretrained("model").unet.state_dict()
    moved = {n for n in plain if not torch.equal(plain[n], erased[n])}
    assert moved
    assert moved <= set(delta.tensors)
    assert set(listing()["precision"]) == {"bfloat16"}
