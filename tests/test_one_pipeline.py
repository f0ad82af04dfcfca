"""dvc.yaml, params.yaml, STAGES and Settings tell one story; nothing of ours hides a library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

from deleatur.settings import Settings
from deleatur.stages import STAGES

ROOT = Path(__file__).parents[1]
CHAIN: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))
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


@pytest.mark.parametrize("name", CHAIN["stages"])
def test_a_stage_depends_on_its_section_and_on_code_and_numbers_that_exist(name: str) -> None:
    stage = CHAIN["stages"][name]
    assert name in {key.partition(".")[0] for key in stage["params"]}
    for key in stage["params"]:
        looked_up(key)
    assert f"src/deleatur/stages/{name}.py" in stage["deps"]
    for path in places(stage["deps"]):
        if path.startswith("src/"):
            assert (ROOT / path).exists(), path


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


def test_no_folder_of_ours_hides_a_library() -> None:
    for name in ("mlflow", "prefect", "dvc", "flows"):
        assert not (ROOT / name / "__init__.py").exists(), f"{name}/__init__.py would be imported instead of {name}"
    assert mlflow.__file__ is not None
    assert not Path(mlflow.__file__).is_relative_to(ROOT / "mlflow")


def test_what_serves_a_model_never_imports_us() -> None:
    from deleatur.io.tracking import SERVED

    text = SERVED.read_text("utf-8")
    assert not re.search(r"^\s*(import|from)\s+deleatur", text, re.MULTILINE)


def test_flows_leave_the_work_to_stages() -> None:
    for path in (ROOT / "flows").glob("*.py"):
        assert not re.search(
            r"^\s*(import|from)\s+(torch|diffusers|transformers)", path.read_text("utf-8"), re.MULTILINE
        )
