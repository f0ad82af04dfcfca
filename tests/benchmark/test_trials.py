"""Trials on the tiny model: run, interrupted, resumed and aggregated."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import child_processes
import finished
import network_calls
import numpy as np
import pandas as pd
import pytest
import workspace
import yaml
from typer.testing import CliRunner

from deleatur import dependencies, stages
from deleatur.benchmark import aggregate, log, plan, resources, schedule
from deleatur.benchmark import trial as trials
from deleatur.benchmark.digests import TrialDigests
from deleatur.benchmark.plan import Trial
from deleatur.benchmark.table import BenchmarkTable
from deleatur.cli import app
from deleatur.config.settings import Settings
from deleatur.errors import ErasureRefused
from deleatur.maths import intervals
from deleatur.registry.mlflow_registry import Registry
from deleatur.stages import erase
from deleatur.storage import dvc, files

pytestmark = pytest.mark.slow
ROWS = ["uce", "negative", "hfi+sdd", "abo"]
SEEDS = [1, 2]


def project(root: Path) -> Settings:
    params = workspace.small_params(root)
    compare = params["compare"] | {"methods": ROWS, "seeds": SEEDS}
    register = params["register"] | {"tracking_uri": f"sqlite:///{root}/mlflow.db"}  # one connection per address
    return workspace.create(root, compare=compare, register=register, erase=params["erase"] | {"abo": {}})


def ran(settings: Settings) -> None:
    digests = TrialDigests(settings)
    schedule.run(
        settings,
        digests,
        schedule.missing(settings, digests, schedule.trials_of(["weapon"], plan.row_names(settings), SEEDS)),
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compared")
    with chdir(root):
        ran(project(root))
    return root


@pytest.fixture
def settings(done: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(done)
    return Settings.load()


def table_of(settings: Settings) -> BenchmarkTable:
    return aggregate.aggregate_trials(settings, TrialDigests(settings), "weapon", plan.row_names(settings), SEEDS)


def test_scores_are_pooled_over_the_images_of_all_seeds(settings: Settings) -> None:
    row = {row.name: row for row in table_of(settings).rows}["uce"]
    assert row.seeds == (1, 2)
    values = [
        files.read_table(Path(f"out/compare/weapon/uce/{seed}/scores/values.parquet")).assign(seed=seed)
        for seed in SEEDS
    ]
    for role in ("concept", "token"):
        parts = [v[(v.variant == "candidate") & (v.role == role) & (v.metric == "concept_rate")] for v in values]
        pooled = np.concatenate([p["value"] for p in parts])
        prompts = [list(p["id"] if role == "concept" else p["id"] + f"/{s}") for p, s in zip(parts, SEEDS, strict=True)]
        clusters = np.unique(np.concatenate(prompts), return_inverse=True)[1]
        expected, score = intervals.rate(pooled, clusters, 0.95), row.scores[role]
        assert (score.value, score.low, score.high) == pytest.approx((expected.value, expected.low, expected.high))
        assert score.n == len(pooled)
        counts = [len(set(p["id"])) for p in parts]
        assert score.prompts == (counts[0] if role == "concept" else sum(counts)), "tokens are learned for each seed"
        assert score.seeds == pytest.approx({s: float(p["value"].mean()) for p, s in zip(parts, SEEDS, strict=True)})


def test_changes_are_paired_with_the_base_model(settings: Settings) -> None:
    table = table_of(settings)
    base_row, uce = (next(row for row in table.rows if row.name == name) for name in ("none", "uce"))
    assert set(base_row.scores) == {"concept", "word", "token", "attack"}, "what others are compared with"
    assert base_row.scores["concept"].value == table.base_scores["concept"].value
    values = pd.concat([files.read_table(Path(f"out/compare/weapon/uce/{s}/scores/values.parquet")) for s in SEEDS])
    for key, metric in (("unseen", "recognition"), ("clip", "clip_score")):
        unseen = values[(values.metric == metric) & (values.role == "unseen")]
        candidate, base = (unseen[unseen.variant == variant]["value"].mean() for variant in ("candidate", "base"))
        assert uce.scores[key].value == pytest.approx((candidate - base) / (base if key == "clip" else 1))
        assert table.base_scores[key].value == pytest.approx(base)
    assert uce.scores["clip"].value != 0, "something has changed"


def test_all_rows_have_the_same_noise_and_the_base_model_is_sampled_once(settings: Settings) -> None:
    def recipes(row: str) -> Any:
        listing = files.read_table(Path(f"out/compare/weapon/{row}/1/samples/samples.parquet"))
        return listing[listing["role"] != "attack"].set_index(["variant", "id", "index"]).sort_index()

    base_recipes = recipes("none")
    for row in ("uce", "negative", "hfi+sdd"):
        row_recipes = recipes(row)
        assert (row_recipes["noise_seed"] == base_recipes["noise_seed"]).all()
        assert (row_recipes.loc["base"]["key"] == base_recipes.loc["base"]["key"]).all()
        assert (row_recipes.loc["candidate"]["key"] != base_recipes.loc["candidate"]["key"]).all()


def test_a_trial_that_is_up_to_date_evaluates_no_network(settings: Settings) -> None:
    with network_calls.calls() as counts:
        ran(settings)
    assert not counts


def test_refused_rows_are_in_the_table_with_the_reason(settings: Settings) -> None:
    row = table_of(settings).rows[-1]
    assert row.name == "abo"
    assert "expected an alternative to weapon" in row.refused
    assert not Path("out/compare/weapon/abo").exists()


def test_resource_usage_is_recorded_outside_of_the_trials_folder(settings: Settings) -> None:
    rows = {row.name: row.cost for row in table_of(settings).rows}
    for name in ("uce", "hfi+sdd"):
        cost = rows[name]
        assert cost is not None
        assert cost.seconds is not None
        assert cost.complete
        assert cost.trained > 0
        assert cost.bytes == Path(f"out/compare/weapon/{name}/1/delta/delta.safetensors").stat().st_size
        assert not list(Path(f"out/compare/weapon/{name}/1").rglob("*resources*"))
    for name, predictions in (("none", 2), ("negative", 2), ("uce", 2)):
        cost = rows[name]
        assert cost is not None
        assert cost.predictions == predictions
    assert rows["negative"] == rows["none"], "a guide erases nothing"


def test_another_hyperparameter_makes_only_its_own_rows_stale(settings: Settings) -> None:
    erase = settings.erase.model_copy(update={"uce": {"edit": {"lam": 0.7, "preserve": 1.0}}})
    changed, digests = settings.model_copy(update={"erase": erase}), TrialDigests(settings)
    new_digests = TrialDigests(changed)
    stale = [
        row
        for row in plan.row_names(settings)[:-1]
        if not trials.is_done(changed, new_digests, Trial("weapon", row, 1))
    ]
    assert stale == ["uce"]
    assert trials.is_done(settings, digests, Trial("weapon", "uce", 1))
    assert [
        row.name
        for row in aggregate.aggregate_trials(changed, new_digests, "weapon", ["none", "uce"], SEEDS).rows
        if row.seeds
    ] == ["none"]


def test_another_metric_trains_nothing_and_samples_nothing(settings: Settings) -> None:
    more = settings.evaluate.model_copy(
        update={"metrics": {**settings.evaluate.metrics, "again": {"method": "clip_score", "prefix": "a "}}}
    )
    changed = settings.model_copy(update={"evaluate": more})
    with network_calls.calls() as counts:
        trials.run_trial(changed, TrialDigests(changed), Trial("weapon", "uce", 1))
    assert not counts[network_calls.UNET]
    values = files.read_table(Path("out/compare/weapon/uce/1/scores/values.parquet"))
    assert "again" in set(values["metric"])
    trials.run_trial(settings, TrialDigests(settings), Trial("weapon", "uce", 1))


def test_a_trial_killed_while_sampling_resumes_with_the_same_result(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completed stages are not run again, and the outputs are the same files."""
    trial = Trial("weapon", "uce", 2)
    folder = plan.trial_folder(settings, trial)
    before = {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    monkeypatch.chdir(tmp_path)
    fresh = project(tmp_path)
    ready = [Trial("weapon", plan.RATINGS, fresh.seed), Trial("weapon", plan.TOKENS, 2), Trial("weapon", "none", 2)]
    for upstream in ready:
        trials.run_trial(fresh, TrialDigests(fresh), upstream)

    def die_while_sampling() -> None:
        plain = stages.run

        def run(name: str, settings: Settings) -> None:
            if name == "sample":
                os.kill(os.getpid(), 9)
            plain(name, settings)

        stages.run = run

    assert child_processes.killed(lambda: trials.run_trial(fresh, TrialDigests(fresh), trial), die_while_sampling)
    assert list(files.read_json(plan.trial_folder(fresh, trial) / trials.DIGESTS_FILE)) == [
        "erase",
        "attack",
        trials.RUNNING,
    ]
    again: list[str] = []
    plain = stages.run
    monkeypatch.setattr(stages, "run", lambda name, of: (again.append(name), plain(name, of)))
    trials.run_trial(fresh, TrialDigests(fresh), trial)
    assert again == ["sample", "evaluate"]
    folder = plan.trial_folder(fresh, trial)
    assert {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} == before


def test_an_erasure_that_rejects_its_result_is_in_the_table_with_the_reason(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial("weapon", "hfi+sdd", 2)

    def reject(settings: Settings) -> None:
        raise ErasureRefused("preserved prompts fell before the concept went")

    monkeypatch.setattr(erase, "run", reject)
    folder = plan.trial_folder(settings, trial)
    (folder / trials.DIGESTS_FILE).unlink()
    trials.run_trial(settings, TrialDigests(settings), trial)
    assert trials.is_done(settings, TrialDigests(settings), trial), "it would be refused again"
    assert sorted(path.name for path in folder.iterdir()) == ["digests.json", "summary.json"]
    row = next(row for row in table_of(settings).rows if row.name == "hfi+sdd")
    assert row.seeds == (1,)
    assert "With seed 2 it was refused: preserved prompts fell before the concept went" in row.notes


def test_seconds_of_an_interrupted_run_are_added_and_missing_parts_are_recorded(tmp_path: Path) -> None:
    path = tmp_path / "m.json"

    def part(*, resumed: bool, stops: bool = False) -> None:
        with resources.measure(path, "digest", "cpu", resumed=resumed):
            if stops:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        part(resumed=False, stops=True)
    first = resources.read(path, "digest")
    assert first is not None
    assert first.complete
    part(resumed=True)
    usage = resources.read(path, "digest")
    assert usage is not None
    assert usage.complete
    assert usage.seconds > first.seconds
    assert resources.read(path, "another") is None
    assert child_processes.killed(lambda: killed_inside(path))
    part(resumed=True)
    after = resources.read(path, "digest")
    assert after is not None
    assert not after.complete, "the seconds of the killed part are unknown"


def killed_inside(path: Path) -> None:
    with resources.measure(path, "digest", "cpu", resumed=True):
        child_processes.die()


def test_memory_is_the_peak(tmp_path: Path) -> None:
    size = 64 * 2**20
    for wanted in (0, size):
        with resources.measure(tmp_path / "m.json", "digest", "cpu", resumed=False):
            buffer = bytearray(wanted)
            buffer[:: 2**12] = b"x" * (wanted // 2**12)
            del buffer
        usage = resources.read(tmp_path / "m.json", "digest")
        assert usage is not None
        if usage.memory is None:
            pytest.skip("this system reports no peak memory")
        assert wanted - 2**20 <= usage.memory < wanted + size / 2


def test_the_command_runs_trials_and_writes_the_table(settings: Settings) -> None:
    result = CliRunner().invoke(app, ["compare", "--methods", "uce,abo", "--json"])
    assert result.exit_code == 0, result.output
    output = json.loads(result.stdout)
    [table] = output["tables"]
    assert [row["name"] for row in table["rows"]] == ["none", "uce", "abo"]
    assert table["rows"][2]["refused"]
    csv = files.read_csv(Path("out/compare/table.csv"))
    assert list(csv["row"]) == ["none", "uce", "abo"]
    assert set(csv["concept"]) == {"weapon"}
    assert float(csv["concept_value"][1]) == table["rows"][1]["scores"]["concept"]["value"]
    client = Registry(settings.register_.tracking_uri, log.experiment(settings), "deleatur").client
    [experiment] = client.search_experiments(filter_string="name = 'deleatur-compare'")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["weapon/uce/concept.high"] == table["rows"][1]["scores"]["concept"]["high"]
    assert run.data.tags["deleatur.refused"] == "abo"
    assert {a.path for a in client.list_artifacts(run.info.run_id)} == {"page", "params", "plot", "table"}
    again = CliRunner().invoke(app, ["compare", "--methods", "uce,abo", "--json"])
    assert again.exit_code == 0
    assert len(client.search_runs([experiment.experiment_id])) == 1, "one run for the same table"
    shown = CliRunner().invoke(app, ["compare", "--show"])
    assert "Refused" not in shown.output
    assert "attacked" in shown.output
    assert shown.exit_code == 0
    assert CliRunner().invoke(app, ["compare", "--methods", "esd"]).exit_code == 2


def test_dvc_runs_only_stale_trials(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, params = tmp_path / "project", Path("params.yaml")
    shutil.copytree(done, root)
    monkeypatch.chdir(root)
    for name in (".dvcignore", ".gitignore", "compare/stages.yaml"):
        Path(name).parent.mkdir(exist_ok=True)
        shutil.copy(finished.ROOT / name, name)
    shutil.copy("compare/stages.yaml", "compare/dvc.yaml")
    shutil.copytree(finished.ROOT / "src", "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    config = yaml.safe_load(params.read_text("utf-8"))
    config["compare"]["methods"].remove("abo")  # which is refused
    params.write_text(yaml.safe_dump(config), "utf-8")
    ran(settings := Settings.load())  # whatever other tests did to it
    plan.write_plan(settings, "weapon")
    dependencies.write_digests(root)  # the stage `code` of dvc.yaml
    finished.git(root, "init", "--quiet")
    finished.dvc(root, "init", "--quiet")
    finished.dvc(root, "commit", "--force", "--quiet", "compare/dvc.yaml")
    assert "Running stage" not in finished.dvc(root, "repro", "compare/dvc.yaml"), "the outputs are those of DVC"

    config["erase"]["uce"] = {"edit": {"lam": 0.9, "preserve": 1.0}}
    config["compare"]["seeds"] = [1]
    params.write_text(yaml.safe_dump(config), "utf-8")
    lines: list[str] = []
    follow = dvc.run_command

    def listening(command: Any, root: Path, on_line: Any, on_progress: Any) -> Any:
        return follow(command, root, lambda line: (lines.append(line), on_line(line)), on_progress)

    monkeypatch.setattr(dvc, "run_command", listening)
    before = Path("out/compare/weapon/uce/1/delta/delta.safetensors").read_bytes()
    result = CliRunner().invoke(app, ["compare", "--json"])
    assert result.exit_code == 0, result.output
    ours = ["compare/dvc.yaml:plan@weapon", "compare/dvc.yaml:row@weapon-uce-1"]
    assert [line for line in lines if line.startswith("Running")] == [f"Running stage '{name}':" for name in ours]
    assert Path("out/compare/weapon/uce/1/delta/delta.safetensors").read_bytes() != before
    [table] = json.loads(result.stdout)["tables"]
    assert all(row["seeds"] == [1] for row in table["rows"])
    assert json.loads(finished.dvc(root, "status", "--json", "compare/dvc.yaml")) == {}
