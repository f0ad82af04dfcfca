"""sample and evaluate do what is missing and nothing else, and leave what a fresh run would have left.

Network calls are counted by a hook of torch's own.
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
from counting import JUDGE, TEXT, UNET, VISION, calls, die, killed
from safetensors.torch import load_file, save_file

from deleatur import dependencies, stages
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.guides import Guide
from deleatur.guides.cfg import CFG
from deleatur.records.report import Report
from deleatur.records.sampling import Recipe
from deleatur.runtime import models, provenance
from deleatur.evaluation import cache
from deleatur.stages import sample
from deleatur.storage import json_records, samples, tensors

SIDES, STEPS, BATCH, SHARD, PART = 2, 2, 4, 8, 8
PLACES = ("samples", "scores", "report")


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Several parts even of so few pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SHARD_SIZE", PART)
        yield


@pytest.fixture(scope="module")
def template(shared: Path, tmp_path_factory: pytest.TempPathFactory, small: None) -> Path:
    """A workspace in which the chain has run, in such parts."""
    root = tmp_path_factory.mktemp("resume") / "w"
    shutil.copytree(finished.template(shared), root, ignore=shutil.ignore_patterns(".git", ".dvc", "src"))
    with chdir(root):
        look(Settings.load())
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current directory."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def look(settings: Settings) -> Counter[str]:
    """Both stages; the calls they made."""
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


def files(*places: str) -> dict[str, bytes]:
    found = (p for place in places for p in sorted(Path("out", place).rglob("*")))
    return {str(p): p.read_bytes() for p in found if p.is_file()}


def forget(*places: str) -> None:
    for place in places:
        shutil.rmtree(Path("out", place))


def listed() -> pd.DataFrame:
    return samples.read_listing(Path("out/samples"))


def report() -> Report:
    return json_records.read(Path("out/report/report.json"), Report)


def calls_for(pictures: int, size: int) -> int:
    return -(-pictures // size)


def test_nothing_new_asks_no_network(root: Path) -> None:
    before, times = files(*PLACES), {p: p.stat().st_mtime_ns for p in Path("out/samples/images").iterdir()}
    counts = look(Settings.load())
    assert (counts[UNET], counts[JUDGE], counts[VISION]) == (0, 0, 0)
    assert files(*PLACES) == before
    assert {p: p.stat().st_mtime_ns for p in Path("out/samples/images").iterdir()} == times


def test_a_new_prompt_is_drawn_and_looked_at_alone(root: Path) -> None:
    with Path("prompts/neutral.csv").open("a", newline="", encoding="utf-8") as f:
        csv.writer(f).writerow(("a-first", "a dog in ink", "judge:dog", "unseen", "test"))  # sorts before the others
    old = set(listed()["key"])
    per_prompt = Settings.load().sample.images_per_prompt["unseen"]
    counts = look(Settings.load())
    assert len(set(listed()["key"]) - old) == SIDES * per_prompt
    assert old < set(listed()["key"])
    assert counts[UNET] == SIDES * STEPS * calls_for(per_prompt, BATCH)
    assert counts[JUDGE] == 1
    assert counts[VISION] == 1 + SIDES * 2, "its features, and both pictures of a pair for the perceptual distance"
    grown = files(*PLACES)
    forget(*PLACES)
    look(Settings.load())
    assert files(*PLACES) == grown, "as if it had always been there"


def test_a_prompt_that_goes_takes_its_pictures_along(root: Path) -> None:
    path = Path("prompts/neutral.csv")
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "a cat of ink" not in line))
    counts = look(Settings.load())
    assert (counts[UNET], counts[JUDGE], counts[VISION]) == (0, 0, 0)
    left = files(*PLACES)
    forget(*PLACES)
    look(Settings.load())
    assert files(*PLACES) == left


def test_another_label_draws_nothing_and_is_another_number(root: Path) -> None:
    keys, path, values = listed()["key"].tolist(), Path("prompts/neutral.csv"), []
    for label in workspace.LABELS:
        path.write_text(re.sub(r"judge:\w+", f"judge:{label}", path.read_text()))
        counts = look(Settings.load())
        assert (counts[UNET], counts[JUDGE], counts[VISION]) == (0, 0, 0)
        assert counts[TEXT] == listed()["id"].nunique() + 5, "each prompt; the concept, its words, its tokens, and none"
        assert listed()["key"].tolist() == keys
        values.append(
            pd.read_parquet("out/scores/values.parquet").query("metric == 'recognition' and role == 'unseen'")
        )
    assert sum(v["value"].to_numpy() for v in values).tolist() == [1.0] * len(values[0]), "it sees one of them"


def test_a_new_candidate_leaves_the_base_models_pictures(root: Path) -> None:
    times = {p: p.stat().st_mtime_ns for p in Path("out/samples/images").iterdir()}
    base, candidate = (set(listed().query(f"side == '{side}'")["key"]) for side in ("base", "candidate"))
    settings = change(root, erase={"source": "words"})
    stages.run("erase", settings)
    counts = look(settings)
    assert counts[UNET] == STEPS * sum(calls_for(n, BATCH) for n in [SHARD] * (len(candidate) // SHARD)) + (
        STEPS * calls_for(len(candidate) % SHARD, BATCH)
    )
    assert set(listed().query("side == 'base'")["key"]) == base
    assert not set(listed().query("side == 'candidate'")["key"]) & candidate
    same = [p for p, t in times.items() if p.is_file() and p.stat().st_mtime_ns == t]
    assert len(same) == calls_for(len(base), SHARD), "their files were not even written again"


def test_a_new_metric_asks_for_itself_alone(root: Path) -> None:
    before, old = files("samples", "scores"), report()
    metrics = yaml.safe_load((root / "params.yaml").read_text())["evaluate"]["metrics"]
    new = {"prefixed": {"method": "clip_score", "prefix": "a "}}
    counts = look(change(root, evaluate={"metrics": {**metrics, **new}}))
    assert (counts[UNET], counts[JUDGE], counts[VISION]) == (0, 0, 0)
    assert counts[TEXT] > 0
    after = files("samples", "scores")
    assert {p for p in before if before[p] != after.get(p)} == {"out/scores/values.parquet"}
    assert [s for s in report().scores if s.metric != "prefixed"] == list(old.scores)
    assert "prefixed" in {s.metric for s in report().scores}


def test_another_judge_in_the_same_folder_is_asked_anew_and_nobody_else_is(root: Path) -> None:
    total, old = listed()["key"].nunique(), report()
    tiny.save_classifier(root / "models" / "judge", workspace.LABELS, seed=3)
    counts = look(Settings.load())
    assert counts[JUDGE] == calls_for(total, PART)
    assert (counts[UNET], counts[VISION]) == (0, 0)

    def judges(found: Report) -> set[str]:
        return {s.detector.weights for s in found.scores if s.metric == "concept_rate" and s.detector}

    def other(found: Report) -> list[Any]:
        return [s for s in found.scores if s.metric not in ("concept_rate", "recognition")]

    assert not judges(report()) & judges(old)
    assert other(report()) == other(old)
    replaced = files(*PLACES)
    forget("scores", "report")
    stages.run("evaluate", Settings.load())
    assert files(*PLACES) == replaced


def test_the_same_judge_elsewhere_is_not_asked_again(root: Path) -> None:
    shutil.move(root / "models" / "judge", root / "models" / "moved")
    settings = change(root, evaluate={"detectors": {"judge": {"method": "classifier", "path": "models/moved"}}})
    assert look(settings)[JUDGE] == 0


def test_other_batches_draw_and_look_at_nothing(root: Path) -> None:
    before = files("samples", "scores")
    judge = {"method": "classifier", "path": "models/judge", "batch": 5}
    counts = look(change(root, sample={"batch_size": 3}, evaluate={"detectors": {"judge": judge}}))
    assert (counts[UNET], counts[JUDGE], counts[VISION]) == (0, 0, 0)
    assert files("samples", "scores") == before


def test_other_batches_and_shards_draw_the_same_pictures(root: Path) -> None:
    before = [samples.read(Path("out/samples"), side) for side in ("base", "candidate")]
    forget("samples")
    stages.run("sample", change(root, sample={"batch_size": 3, "shard_size": 5}))
    for side, old in zip(("base", "candidate"), before, strict=True):
        pd.testing.assert_frame_equal(samples.read(Path("out/samples"), side), old)  # type: ignore[arg-type]


def test_a_candidate_that_became_the_champion_is_not_drawn_again(root: Path) -> None:
    settings = Settings.load()
    champion = settings.sample.model_copy(update={"champion": str(root / "out/delta")})
    with calls() as counts:
        sample.run(settings.model_copy(update={"sample": champion}))
    assert counts[UNET] == 0
    assert set(listed()["side"]) == {"base", "champion", "candidate"}


MOMENTS = [("sample", UNET, 6), ("evaluate", JUDGE, 3), ("evaluate", VISION, 2), ("evaluate", VISION, 9)]
"""The first calls of VISION are for the features, the later ones for the perceptual distance."""


@pytest.mark.parametrize(("stage", "network", "moment"), MOMENTS)
def test_killed_in_a_network_it_goes_on_with_the_part_it_was_in(
    stage: str, network: str, moment: int, root: Path
) -> None:
    settings, place = Settings.load(), "samples" if stage == "sample" else "scores"
    before = files(*PLACES)

    def killer(counts: Counter[str]) -> None:
        if counts[network] == moment:
            die()

    def interrupted() -> None:
        with calls(killer):
            stages.run(stage, settings)

    forget(place)
    with calls() as whole:
        stages.run(stage, settings)
    forget(place)
    assert killed(interrupted)
    with calls() as rest:
        stages.run(stage, settings)
    a_part = {UNET: STEPS * SHARD // BATCH, JUDGE: 1, VISION: 2, TEXT: 1}[network]
    assert whole[network] - moment <= rest[network] < whole[network] - moment + 1 + a_part
    assert files(*PLACES) == before


def nudge(folder: Path) -> None:
    [file] = folder.glob("*.safetensors")
    weights = load_file(file)
    save_file({n: 1.1 * t if t.is_floating_point() else t for n, t in weights.items()}, file, {"format": "pt"})


def another_schedule(folder: Path) -> None:
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.02}))


@pytest.mark.parametrize(("part", "alter"), [("vae", nudge), ("scheduler", another_schedule)])
def test_another_part_of_the_model_is_drawn_with_and_judged_anew(
    part: str, alter: Callable[[Path], None], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deleatur.storage.dvc.status", lambda folder: {})
    old, keys = report().provenance, set(listed()["key"])
    alter(root / "models" / "pipeline" / part)
    with pytest.raises(DataError, match="another pipeline than"):
        stages.run("register", Settings.load())
    counts = look(Settings.load())
    assert counts[UNET] > 0
    assert not keys & set(listed()["key"])
    new = report().provenance
    assert (new.base, new.delta) == (old.base, old.delta), "the delta still fits"
    assert new.pipeline != old.pipeline
    assert new.images != old.images


def test_a_picture_is_named_by_all_that_its_row_says_of_it(root: Path) -> None:
    names = Recipe.__dataclass_fields__
    for row in listed().to_dict("records"):
        assert Recipe(**{name: row[name] for name in names}).key == row["key"]
    assert listed().groupby("side")["key"].nunique().to_dict() == listed().groupby("side").size().to_dict()


def test_the_concept_that_a_guide_steers_away_from_is_part_of_the_name(root: Path) -> None:
    names, scale = set(), methods.guide(Settings.load()).scale
    for guide, source in itertools.product(("cfg", "negative"), ("words", "token")):
        settings = change(root, guide={"method": guide, guide: {"scale": scale}}, erase={"source": source})
        ways = sample.sampling_configs(settings, models.base_model(settings))
        names |= {(side, way.recipe.key) for side, way in ways.items()}
    assert len(names) == 1 + 3, "plain guidance has no concept"


def test_a_corrected_method_is_another_one(tmp_path: Path) -> None:
    source = tmp_path / "deleatur"
    digests = set()
    for text in ("X = 1\n", "X = 1\n", "X = 22\n"):
        shutil.copytree(dependencies.PACKAGE, source, dirs_exist_ok=True)
        with (source / "guides" / "cfg.py").open("a") as file:
            file.write(f"\n\nclass CFG:\n    {text}")
        digests.add(json.dumps(dependencies.code_digests(CFG, source=source)))
    assert len(digests) == 2
    assert len({provenance.digest_code(of, libraries=names) for of in (CFG, Guide) for names in ((), ("torch",))}) == 4


def test_the_whole_chain_in_bfloat16_ends_in_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusionPipeline

    from deleatur.artifacts.export import export

    monkeypatch.chdir(tmp_path)
    base = {"model": "models/pipeline", "dtype": "bfloat16", "device": "cpu"}
    settings = workspace.make(tmp_path, base=base)
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
    assert set(listed()["precision"]) == {"bfloat16"}
