"""dvc.yaml, params.yaml, STAGES and Settings are consistent; no folder shadows a library."""

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
CODE: dict[str, Any] = CHAIN["stages"].pop(dvc.CODE_STAGE)
COMPARE: dict[str, Any] = yaml.safe_load((ROOT / "compare" / "stages.yaml").read_text("utf-8"))
PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))
SECTIONS = {field.alias or name for name, field in Settings.model_fields.items()}


def interpolate(text: str) -> str:
    """${paths.delta} → out/delta."""
    return re.sub(r"\$\{([\w.]+)\}", lambda m: str(param_value(m[1])), text)


def param_value(dotted: str) -> Any:
    value: Any = PARAMS
    for key in dotted.split("."):
        value = value[key]
    return value


def paths_of(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        yield interpolate(entry if isinstance(entry, str) else next(iter(entry)))


def producers() -> dict[str, str]:
    """Path → the stage that writes it."""
    return {path: name for name, stage in CHAIN["stages"].items() for path in paths_of(stage["outs"])}


def test_dvc_has_the_stages_in_the_same_order() -> None:
    assert tuple(CHAIN["stages"]) == tuple(name for name in STAGES if name != "register"), "register makes no file"
    assert {name: stage["cmd"] for name, stage in CHAIN["stages"].items()} == {
        name: f"deleatur stage {name}" for name in CHAIN["stages"]
    }


def test_every_section_of_params_is_a_settings_field() -> None:
    assert set(PARAMS) == SECTIONS
    assert set(STAGES) & SECTIONS == set(STAGES), "one section per stage"


def test_dvc_knows_the_code_of_each_stage_by_its_computed_digest(tmp_path: Path) -> None:
    assert CODE["cmd"] == "deleatur digests"
    assert list(paths_of(CODE["outs"])) == [dependencies.DIGESTS.as_posix()]
    shutil.copy(ROOT / "params.yaml", tmp_path)
    dependencies.write_digests(tmp_path)
    for name, stage in CHAIN["stages"].items():
        code = [path for path in paths_of(stage["deps"]) if path.startswith(("src", "out/code"))]
        assert code == [f"out/code/{name}.json"], "and no list of files beside it"
        assert (tmp_path / code[0]).is_file()


@pytest.mark.parametrize("name", CHAIN["stages"])
def test_a_stage_depends_on_its_section_and_on_parameters_that_exist(name: str) -> None:
    stage = CHAIN["stages"][name]
    assert name in {key.partition(".")[0] for key in stage["params"]}
    for key in stage["params"]:
        param_value(key)


def test_every_output_is_a_path_of_the_settings_and_is_read_by_later_stages_only() -> None:
    settings = Settings.load(ROOT / "params.yaml")
    brought_or_between = {settings.paths.models, settings.paths.prompts, settings.paths.checkpoints}
    written = {path.as_posix() for path in set(settings.paths.model_dump().values()) - brought_or_between}
    assert set(producers()) == written
    for name, stage in CHAIN["stages"].items():
        for path in paths_of(stage["deps"]):
            if path in producers():
                assert STAGES.index(producers()[path]) < STAGES.index(name)


def test_checkpoints_are_in_no_output() -> None:
    """DVC removes outputs before it runs the stage."""
    state = Settings.load(ROOT / "params.yaml").paths.checkpoints
    assert not any(state.is_relative_to(out) for out in producers())


def test_metrics_and_plots_are_in_outputs() -> None:
    for path in paths_of(CHAIN["metrics"] + CHAIN["plots"]):
        assert any(path.startswith(f"{out}/") for out in producers()), path


@pytest.mark.parametrize("stage", plan.STAGE_SETTINGS)
def test_a_trial_of_a_benchmark_reads_the_settings_that_its_stages_read(stage: str) -> None:
    stage_definition = CHAIN["stages"][stage]
    if stage != "evaluate":  # its report names all there is, and a cell's folder is named by it
        assert set(plan.STAGE_SETTINGS[stage]) == set(stage_definition["params"]) - {"seed", "targets", "concepts"}


@pytest.mark.parametrize("name", ["ratings", "tokens", "none", "row"])
def test_dvc_knows_the_code_of_a_trial_by_its_plan(name: str) -> None:
    family = COMPARE["stages"][name]
    assert not [dep for dep in family["deps"] if dep.startswith("src/")]
    row = "${item.row}" if name == "row" else name
    assert f"${{compare.folder}}/${{item.concept}}/plan/{row}.json" in family["deps"]
    assert family["cmd"].startswith(f"deleatur trial {row} ${{item.concept}}")
    assert family["wdir"] == ".."
    [out] = [next(iter(out)) for out in family["outs"]]
    assert out.startswith(f"${{compare.folder}}/${{item.concept}}/{row}/")


def test_the_plan_of_a_benchmark_reads_every_section_that_a_trial_reads() -> None:
    family = COMPARE["stages"]["plan"]
    read = {dotted.partition(".")[0] for stage in plan.STAGE_SETTINGS.values() for dotted in stage}
    assert read | {"seed", "concepts", "compare"} <= set(family["params"])
    assert {"src/deleatur", "out/code/packages.json"} <= set(family["deps"]), (
        "digests of code are a part of what it says"
    )


def test_no_folder_of_ours_hides_a_library() -> None:
    for name in ("mlflow", "prefect", "dvc", "flows"):
        assert not (ROOT / name / "__init__.py").exists(), f"{name}/__init__.py would be imported instead of {name}"
    assert mlflow.__file__ is not None
    assert not Path(mlflow.__file__).is_relative_to(ROOT / "mlflow")


def test_the_served_model_never_imports_this_package() -> None:
    from deleatur.registry.mlflow_registry import MODEL_CODE

    text = MODEL_CODE.read_text("utf-8")
    assert not re.search(r"^\s*(import|from)\s+deleatur", text, re.MULTILINE)


def test_flows_import_no_networks() -> None:
    for path in (ROOT / "flows").glob("*.py"):
        assert not re.search(
            r"^\s*(import|from)\s+(torch|diffusers|transformers)", path.read_text("utf-8"), re.MULTILINE
        )


PERFORMANCE_PARAMS = {"sample.batch_size", "workers.dask", "workers.checkpoint_interval"}
"""Parameters that change the speed or the cost of a crash, and no result."""


class RecordingSettings:
    """Settings that record which parameters are read: `section` or `section.key`, as in dvc.yaml."""

    def __init__(self, inner: Any, read: set[str], name: str = "") -> None:
        self._inner, self._read, self._name = inner, read, name

    def __getattr__(self, key: str) -> Any:
        if isinstance(member := getattr(type(self._inner), key, None), property) and member.fget:
            return member.fget(self)
        value = getattr(self._inner, key)
        if key not in type(self._inner).model_fields:  # a method, which may read all there is
            self._read.add(self._name)
        elif self._name or not isinstance(value, BaseModel):
            self._read.add(f"{self._name}.{key}" if self._name else key)
        else:
            return RecordingSettings(value, self._read, key)
        return value

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self._inner)

    def model_dump(self, **options: Any) -> Any:
        fields = type(self._inner).model_fields
        read = {field.alias or name for name, field in fields.items() if name not in options.get("exclude", ())}
        self._read.update(f"{self._name}.{key}" if self._name else key for key in read)
        return self._inner.model_dump(**options)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    root = tmp_path_factory.mktemp("pipeline")
    finished.copy(shared, root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAIN["stages"])
def test_a_stage_reads_its_listed_parameters_and_writes_its_outputs_only(
    done: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(done)
    read: set[str] = set()
    before = {p: p.stat().st_mtime_ns for p in done.rglob("*") if p.is_file()}
    import_module(f"deleatur.stages.{name}").run(RecordingSettings(Settings.load(), read))
    listed = set(CHAIN["stages"][name]["params"])
    # Where things lie is no part of a result: DVC knows the files themselves.
    assert not {key for key in read - PERFORMANCE_PARAMS if not {key, key.partition(".")[0]} & (listed | {"paths"})}
    changed = {p.relative_to(done) for p in done.rglob("*") if p.is_file() and before.get(p) != p.stat().st_mtime_ns}
    outs = [Path(path) for path in paths_of(CHAIN["stages"][name]["outs"])]
    assert not {p for p in changed if not any(p.is_relative_to(out) for out in outs)}
