"""dvc.yaml, params.yaml, STAGES and Settings tell one story; nothing of ours hides a library."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import finished
import mlflow
import pytest
import yaml
from pydantic import BaseModel

from deleatur import dependencies
from deleatur.benchmark import plan
from deleatur.config.settings import Settings
from deleatur.stages import STAGES
from deleatur.storage import dvc

ROOT = Path(__file__).parents[1]
CHAIN: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))
CODE: dict[str, Any] = CHAIN["stages"].pop(dvc.CODE)
COMPARE: dict[str, Any] = yaml.safe_load((ROOT / "compare" / "stages.yaml").read_text("utf-8"))
PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))
SECTIONS = {field.alias or name for name, field in Settings.model_fields.items()}


def filled(text: str) -> str:
    """${paths.delta} → out/delta."""
    return re.sub(r"\$\{([\w.]+)\}", lambda m: str(looked_up(m[1])), text)


def looked_up(dotted: str) -> Any:
    value: Any = PARAMS
    for key in dotted.split("."):
        value = value[key]
    return value


def places(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        yield filled(entry if isinstance(entry, str) else next(iter(entry)))


def made() -> dict[str, str]:
    """Path → the stage that writes it."""
    return {path: name for name, stage in CHAIN["stages"].items() for path in places(stage["outs"])}


def test_stages_are_the_same_in_the_same_order() -> None:
    assert tuple(CHAIN["stages"]) == tuple(name for name in STAGES if name != "register"), "register makes no file"
    assert {name: stage["cmd"] for name, stage in CHAIN["stages"].items()} == {
        name: f"deleatur stage {name}" for name in CHAIN["stages"]
    }


def test_every_section_of_params_is_one_of_settings() -> None:
    assert set(PARAMS) == SECTIONS
    assert set(STAGES) & SECTIONS == set(STAGES), "one section per stage"


def test_dvc_knows_the_code_of_each_stage_by_its_computed_digest(tmp_path: Path) -> None:
    assert CODE["cmd"] == "deleatur digests"
    assert list(places(CODE["outs"])) == [dependencies.DIGESTS.as_posix()]
    shutil.copy(ROOT / "params.yaml", tmp_path)
    dependencies.write(tmp_path)
    for name, stage in CHAIN["stages"].items():
        code = [path for path in places(stage["deps"]) if path.startswith(("src", "out/code"))]
        assert code == [f"out/code/{name}.json"], "and no list of files beside it"
        assert (tmp_path / code[0]).is_file()


@pytest.mark.parametrize("name", CHAIN["stages"])
def test_a_stage_depends_on_its_section_and_on_numbers_that_exist(name: str) -> None:
    stage = CHAIN["stages"][name]
    assert name in {key.partition(".")[0] for key in stage["params"]}
    for key in stage["params"]:
        looked_up(key)


def test_every_path_that_a_stage_writes_is_one_of_settings_and_is_read_by_a_later_one_only() -> None:
    settings = Settings.load(ROOT / "params.yaml")
    brought_or_between = {settings.paths.models, settings.paths.prompts, settings.paths.state}
    written = {path.as_posix() for path in set(settings.paths.model_dump().values()) - brought_or_between}
    assert set(made()) == written
    for name, stage in CHAIN["stages"].items():
        for path in places(stage["deps"]):
            if path in made():
                assert STAGES.index(made()[path]) < STAGES.index(name)


def test_what_a_stopped_stage_goes_on_from_lies_in_no_output() -> None:
    """DVC removes outputs before it runs the stage."""
    state = Settings.load(ROOT / "params.yaml").paths.state
    assert not any(state.is_relative_to(out) for out in made())


def test_metrics_and_plots_lie_in_what_stages_write() -> None:
    for path in places(CHAIN["metrics"] + CHAIN["plots"]):
        assert any(path.startswith(f"{out}/") for out in made()), path


@pytest.mark.parametrize("stage", plan.READS)
def test_a_cell_of_a_comparison_reads_the_settings_that_its_stages_read(stage: str) -> None:
    own = CHAIN["stages"][stage]
    if stage != "evaluate":  # its report names all there is, and a cell's folder is named by it
        assert set(plan.READS[stage]) == set(own["params"]) - {"seed", "targets", "concepts"}


@pytest.mark.parametrize("name", ["ratings", "tokens", "none", "row"])
def test_dvc_knows_the_code_of_a_cell_by_its_plan(name: str) -> None:
    family = COMPARE["stages"][name]
    assert not [dep for dep in family["deps"] if dep.startswith("src/")]
    row = "${item.row}" if name == "row" else name
    assert f"${{compare.folder}}/${{item.concept}}/plan/{row}.json" in family["deps"]
    assert family["cmd"].startswith(f"deleatur cell {row} ${{item.concept}}")
    assert family["wdir"] == ".."
    [out] = [next(iter(out)) for out in family["outs"]]
    assert out.startswith(f"${{compare.folder}}/${{item.concept}}/{row}/")


def test_the_plan_of_a_comparison_reads_every_section_that_a_cell_reads() -> None:
    family = COMPARE["stages"]["plan"]
    read = {dotted.partition(".")[0] for stage in plan.READS.values() for dotted in stage}
    assert read | {"seed", "concepts", "compare"} <= set(family["params"])
    assert {"src/deleatur", "out/code/packages.json"} <= set(family["deps"]), (
        "digests of code are a part of what it says"
    )


def test_no_folder_of_ours_hides_a_library() -> None:
    for name in ("mlflow", "prefect", "dvc", "flows"):
        assert not (ROOT / name / "__init__.py").exists(), f"{name}/__init__.py would be imported instead of {name}"
    assert mlflow.__file__ is not None
    assert not Path(mlflow.__file__).is_relative_to(ROOT / "mlflow")


def test_what_serves_a_model_never_imports_us() -> None:
    from deleatur.registry.mlflow_client import SERVED

    text = SERVED.read_text("utf-8")
    assert not re.search(r"^\s*(import|from)\s+deleatur", text, re.MULTILINE)


def test_flows_leave_the_work_to_stages() -> None:
    for path in (ROOT / "flows").glob("*.py"):
        assert not re.search(
            r"^\s*(import|from)\s+(torch|diffusers|transformers)", path.read_text("utf-8"), re.MULTILINE
        )


SPEED = {"sample.batch", "workers.dask", "workers.save_every"}
"""Change how fast pictures are drawn or how much a kill costs, and not the pictures."""


class Noting:
    """Settings that note what is read of them: `section` or `section.key`, as dvc.yaml lists them."""

    def __init__(self, inner: Any, read: set[str], name: str = "") -> None:
        self._inner, self._read, self._name = inner, read, name

    def __getattr__(self, key: str) -> Any:
        if isinstance(found := getattr(type(self._inner), key, None), property) and found.fget:
            return found.fget(self)
        value = getattr(self._inner, key)
        if key not in type(self._inner).model_fields:  # a method, which may read all there is
            self._read.add(self._name)
        elif self._name or not isinstance(value, BaseModel):
            self._read.add(f"{self._name}.{key}" if self._name else key)
        else:
            return Noting(value, self._read, key)
        return value

    def model_dump(self, **how: Any) -> Any:
        fields = type(self._inner).model_fields
        read = {field.alias or name for name, field in fields.items() if name not in how.get("exclude", ())}
        self._read.update(f"{self._name}.{key}" if self._name else key for key in read)
        return self._inner.model_dump(**how)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    root = tmp_path_factory.mktemp("pipeline")
    finished.copy(shared, root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAIN["stages"])
def test_a_stage_reads_what_it_lists_and_writes_where_it_says(
    done: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(done)
    read: set[str] = set()
    before = {p: p.stat().st_mtime_ns for p in done.rglob("*") if p.is_file()}
    import_module(f"deleatur.stages.{name}").run(Noting(Settings.load(), read))
    listed = set(CHAIN["stages"][name]["params"])
    # Where things lie is no part of a result: DVC knows the files themselves.
    assert not {key for key in read - SPEED if not {key, key.partition(".")[0]} & (listed | {"paths"})}
    changed = {p.relative_to(done) for p in done.rglob("*") if p.is_file() and before.get(p) != p.stat().st_mtime_ns}
    outs = [Path(path) for path in places(CHAIN["stages"][name]["outs"])]
    assert not {p for p in changed if not any(p.is_relative_to(out) for out in outs)}
