"""Cells run, stop, go on and are told: on the tiny model, without DVC."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import counting
import finished
import numpy as np
import pandas as pd
import pytest
import workspace
import yaml
from typer.testing import CliRunner

from deleatur import stages
from deleatur.benchmark import aggregate, log, plan, resources, schedule
from deleatur.benchmark import trial as cells
from deleatur.benchmark.plan import Cell
from deleatur.benchmark.table import Table
from deleatur.benchmark.trial import Stamps
from deleatur.cli import app
from deleatur.config.settings import Settings
from deleatur.errors import ErasureRefused
from deleatur.maths import intervals
from deleatur.registry.mlflow_client import Registry
from deleatur.stages import erase
from deleatur.storage import dvc, files

pytestmark = pytest.mark.slow
ROWS = ["uce", "negative", "hfi+sdd", "abo"]
SEEDS = [1, 2]


def project(root: Path) -> Settings:
    numbers = workspace.numbers(root)
    compare = numbers["compare"] | {"methods": ROWS, "seeds": SEEDS}
    register = numbers["register"] | {"tracking_uri": f"sqlite:///{root}/mlflow.db"}  # one connection per address
    return workspace.make(root, compare=compare, register=register, erase=numbers["erase"] | {"abo": {}})


def ran(settings: Settings) -> None:
    stamps = Stamps(settings)
    schedule.run(
        settings, stamps, schedule.missing(settings, stamps, schedule.cells_of(["weapon"], plan.rows(settings), SEEDS))
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


def told(settings: Settings) -> Table:
    return aggregate.table(settings, Stamps(settings), "weapon", plan.rows(settings), SEEDS)


def test_numbers_are_those_of_the_pictures_pooled_over_seeds(settings: Settings) -> None:
    row = {row.name: row for row in told(settings).rows}["uce"]
    assert row.seeds == (1, 2)
    values = [
        files.read_table(Path(f"out/compare/weapon/uce/{seed}/scores/values.parquet")).assign(seed=seed)
        for seed in SEEDS
    ]
    for role in ("concept", "token"):
        parts = [v[(v.side == "candidate") & (v.role == role) & (v.metric == "concept_rate")] for v in values]
        all_of = np.concatenate([p["value"] for p in parts])
        of = [list(p["id"] if role == "concept" else p["id"] + f"/{s}") for p, s in zip(parts, SEEDS, strict=True)]
        names = np.unique(np.concatenate(of), return_inverse=True)[1]
        wanted, found = intervals.rate(all_of, names, 0.95), row.numbers[role]
        assert (found.value, found.low, found.high) == pytest.approx((wanted.value, wanted.low, wanted.high))
        assert found.n == len(all_of)
        own = [len(set(p["id"])) for p in parts]
        assert found.prompts == (own[0] if role == "concept" else sum(own)), "each seed has learned tokens of its own"
        assert found.seeds == pytest.approx({s: float(p["value"].mean()) for p, s in zip(parts, SEEDS, strict=True)})


def test_changes_are_paired_with_the_untouched_model(settings: Settings) -> None:
    table = told(settings)
    none, uce = (next(row for row in table.rows if row.name == name) for name in ("none", "uce"))
    assert set(none.numbers) == {"concept", "word", "token", "attack"}, "it is what others are compared with"
    assert none.numbers["concept"].value == table.base["concept"].value
    values = pd.concat([files.read_table(Path(f"out/compare/weapon/uce/{s}/scores/values.parquet")) for s in SEEDS])
    for key, metric in (("unseen", "recognition"), ("clip", "clip_score")):
        own = values[(values.metric == metric) & (values.role == "unseen")]
        candidate, base = (own[own.side == side]["value"].mean() for side in ("candidate", "base"))
        assert uce.numbers[key].value == pytest.approx((candidate - base) / (base if key == "clip" else 1))
        assert table.base[key].value == pytest.approx(base)
    assert uce.numbers["clip"].value != 0, "something has changed"


def test_all_rows_start_from_the_same_noise_and_the_base_is_drawn_once(settings: Settings) -> None:
    def recipes(row: str) -> Any:
        shots = files.read_table(Path(f"out/compare/weapon/{row}/1/shots/shots.parquet"))
        return shots[shots["role"] != "attack"].set_index(["side", "id", "index"]).sort_index()

    none = recipes("none")
    for row in ("uce", "negative", "hfi+sdd"):
        found = recipes(row)
        assert (found["noise_seed"] == none["noise_seed"]).all()
        assert (found.loc["base"]["key"] == none.loc["base"]["key"]).all()
        assert (found.loc["candidate"]["key"] != none.loc["candidate"]["key"]).all()


def test_a_cell_that_is_there_runs_no_network(settings: Settings) -> None:
    with counting.calls() as counts:
        ran(settings)
    assert not counts


def test_rows_that_cannot_be_stand_in_the_table_with_the_reason(settings: Settings) -> None:
    row = told(settings).rows[-1]
    assert row.name == "abo"
    assert "what to draw instead of weapon" in row.refused
    assert not Path("out/compare/weapon/abo").exists()


def test_what_erasing_costs_is_beside_the_cell_and_not_in_it(settings: Settings) -> None:
    rows = {row.name: row.cost for row in told(settings).rows}
    for name in ("uce", "hfi+sdd"):
        cost = rows[name]
        assert cost is not None
        assert cost.seconds is not None
        assert cost.complete
        assert cost.trained > 0
        assert cost.bytes == Path(f"out/compare/weapon/{name}/1/delta/delta.safetensors").stat().st_size
        assert not list(Path(f"out/compare/weapon/{name}/1").rglob("*measured*"))
    for name, predictions in (("none", 2), ("negative", 2), ("uce", 2)):
        found = rows[name]
        assert found is not None
        assert found.predictions == predictions
    assert rows["negative"] == rows["none"], "a guide erases nothing"


def test_another_number_makes_its_own_rows_anew_and_no_others(settings: Settings) -> None:
    erase = settings.erase.model_copy(update={"uce": {"edit": {"lam": 0.7, "preserve": 1.0}}})
    changed, stamps = settings.model_copy(update={"erase": erase}), Stamps(settings)
    now = Stamps(changed)
    stale = [row for row in plan.rows(settings)[:-1] if not cells.done(changed, now, Cell("weapon", row, 1))]
    assert stale == ["uce"]
    assert cells.done(settings, stamps, Cell("weapon", "uce", 1))
    assert [row.name for row in aggregate.table(changed, now, "weapon", ["none", "uce"], SEEDS).rows if row.seeds] == [
        "none"
    ]


def test_another_metric_erases_nothing_and_draws_nothing(settings: Settings) -> None:
    more = settings.evaluate.model_copy(
        update={"metrics": {**settings.evaluate.metrics, "again": {"method": "clip_score", "prefix": "a "}}}
    )
    changed = settings.model_copy(update={"evaluate": more})
    with counting.calls() as counts:
        cells.run(changed, Stamps(changed), Cell("weapon", "uce", 1))
    assert not counts[counting.UNET]
    values = files.read_table(Path("out/compare/weapon/uce/1/scores/values.parquet"))
    assert "again" in set(values["metric"])
    cells.run(settings, Stamps(settings), Cell("weapon", "uce", 1))


def test_killed_while_it_draws_a_cell_goes_on_and_is_the_same(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is erased and attacked by then is not done again, and the outputs are the same files."""
    cell = Cell("weapon", "uce", 2)
    folder = plan.place(settings, cell)
    before = {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    monkeypatch.chdir(tmp_path)
    fresh = project(tmp_path)
    ready = [Cell("weapon", plan.RATINGS, fresh.seed), Cell("weapon", plan.TOKENS, 2), Cell("weapon", "none", 2)]
    for part in ready:
        cells.run(fresh, Stamps(fresh), part)

    def die_while_drawing() -> None:
        plain = stages.run

        def run(name: str, settings: Settings) -> None:
            if name == "sample":
                os.kill(os.getpid(), 9)
            plain(name, settings)

        stages.run = run

    assert counting.killed(lambda: cells.run(fresh, Stamps(fresh), cell), die_while_drawing)
    assert list(files.read_json(plan.place(fresh, cell) / cells.MADE)) == ["erase", "attack", cells.DOING]
    again: list[str] = []
    plain = stages.run
    monkeypatch.setattr(stages, "run", lambda name, of: (again.append(name), plain(name, of)))
    cells.run(fresh, Stamps(fresh), cell)
    assert again == ["sample", "evaluate"]
    folder = plan.place(fresh, cell)
    assert {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} == before


def test_an_erasure_that_refuses_its_result_is_told_with_its_reason(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell("weapon", "hfi+sdd", 2)

    def spoilt(of: Settings) -> None:
        raise ErasureRefused("preserved prompts fell before the concept went")

    monkeypatch.setattr(erase, "run", spoilt)
    folder = plan.place(settings, cell)
    (folder / cells.MADE).unlink()
    cells.run(settings, Stamps(settings), cell)
    assert cells.done(settings, Stamps(settings), cell), "again it would be refused again"
    assert sorted(path.name for path in folder.iterdir()) == ["cell.json", "made.json"]
    row = next(row for row in told(settings).rows if row.name == "hfi+sdd")
    assert row.seeds == (1,)
    assert "With seed 2 it was refused: preserved prompts fell before the concept went" in row.notes


def test_seconds_of_a_run_in_parts_are_added_and_lost_ones_are_owned_up_to(tmp_path: Path) -> None:
    path = tmp_path / "m.json"

    def part(*, resumed: bool, stops: bool = False) -> None:
        with resources.measured(path, "stamp", "cpu", resumed=resumed):
            if stops:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        part(resumed=False, stops=True)
    first = resources.read(path, "stamp")
    assert first is not None
    assert first.complete
    part(resumed=True)
    whole = resources.read(path, "stamp")
    assert whole is not None
    assert whole.complete
    assert whole.seconds > first.seconds
    assert resources.read(path, "another") is None
    assert counting.killed(lambda: killed_inside(path))
    part(resumed=True)
    after = resources.read(path, "stamp")
    assert after is not None
    assert not after.complete, "nobody knows how long the killed part took"


def killed_inside(path: Path) -> None:
    with resources.measured(path, "stamp", "cpu", resumed=True):
        counting.die()


def test_memory_is_what_is_held_at_the_most(tmp_path: Path) -> None:
    size = 64 * 2**20
    for wanted in (0, size):
        with resources.measured(tmp_path / "m.json", "stamp", "cpu", resumed=False):
            held = bytearray(wanted)
            held[:: 2**12] = b"x" * (wanted // 2**12)
            del held
        found = resources.read(tmp_path / "m.json", "stamp")
        assert found is not None
        if found.memory is None:
            pytest.skip("this system does not tell")
        assert wanted - 2**20 <= found.memory < wanted + size / 2


def test_the_command_runs_tells_and_writes(settings: Settings) -> None:
    result = CliRunner().invoke(app, ["compare", "--methods", "uce,abo", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    [table] = found["tables"]
    assert [row["name"] for row in table["rows"]] == ["none", "uce", "abo"]
    assert table["rows"][2]["refused"]
    csv = files.read_csv(Path("out/compare/table.csv"))
    assert list(csv["row"]) == ["none", "uce", "abo"]
    assert set(csv["concept"]) == {"weapon"}
    assert float(csv["concept_value"][1]) == table["rows"][1]["numbers"]["concept"]["value"]
    client = Registry(settings.register_.tracking_uri, log.experiment(settings), "deleatur").client
    [experiment] = client.search_experiments(filter_string="name = 'deleatur-compare'")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["weapon/uce/concept.high"] == table["rows"][1]["numbers"]["concept"]["high"]
    assert run.data.tags["deleatur.refused"] == "abo"
    assert {a.path for a in client.list_artifacts(run.info.run_id)} == {"page", "params", "plot", "table"}
    again = CliRunner().invoke(app, ["compare", "--methods", "uce,abo", "--json"])
    assert again.exit_code == 0
    assert len(client.search_runs([experiment.experiment_id])) == 1, "one table is one run"
    shown = CliRunner().invoke(app, ["compare", "--show"])
    assert "Refused" not in shown.output
    assert "attacked" in shown.output
    assert shown.exit_code == 0
    assert CliRunner().invoke(app, ["compare", "--methods", "esd"]).exit_code == 2


def test_dvc_runs_what_is_stale_and_nothing_else(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, params = tmp_path / "project", Path("params.yaml")
    shutil.copytree(done, root)
    monkeypatch.chdir(root)
    for name in (".dvcignore", ".gitignore", "compare/stages.yaml"):
        Path(name).parent.mkdir(exist_ok=True)
        shutil.copy(finished.ROOT / name, name)
    shutil.copy("compare/stages.yaml", "compare/dvc.yaml")
    shutil.copytree(finished.ROOT / "src", "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    numbers = yaml.safe_load(params.read_text("utf-8"))
    numbers["compare"]["methods"].remove("abo")  # which has no cell
    params.write_text(yaml.safe_dump(numbers), "utf-8")
    ran(settings := Settings.load())  # whatever other tests did to it
    plan.write(settings, "weapon")
    finished.git(root, "init", "--quiet")
    finished.dvc(root, "init", "--quiet")
    finished.dvc(root, "commit", "--force", "--quiet", "compare/dvc.yaml")
    assert "Running stage" not in finished.dvc(root, "repro", "compare/dvc.yaml"), "cells are what DVC would make"

    numbers["erase"]["uce"] = {"edit": {"lam": 0.9, "preserve": 1.0}}
    numbers["compare"]["seeds"] = [1]
    params.write_text(yaml.safe_dump(numbers), "utf-8")
    lines: list[str] = []
    follow = dvc.follow

    def listening(command: Any, root: Path, on_line: Any, on_progress: Any) -> Any:
        return follow(command, root, lambda line: (lines.append(line), on_line(line)), on_progress)

    monkeypatch.setattr(dvc, "follow", listening)
    before = Path("out/compare/weapon/uce/1/delta/delta.safetensors").read_bytes()
    result = CliRunner().invoke(app, ["compare", "--json"])
    assert result.exit_code == 0, result.output
    ours = ["compare/dvc.yaml:plan@weapon", "compare/dvc.yaml:row@weapon-uce-1"]
    assert [line for line in lines if line.startswith("Running")] == [f"Running stage '{name}':" for name in ours]
    assert Path("out/compare/weapon/uce/1/delta/delta.safetensors").read_bytes() != before
    [table] = json.loads(result.stdout)["tables"]
    assert all(row["seeds"] == [1] for row in table["rows"])
    assert json.loads(finished.dvc(root, "status", "--json", "compare/dvc.yaml")) == {}
