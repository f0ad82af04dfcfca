"""What a person at a terminal meets: help that teaches, errors that name the next command, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import workspace
import yaml
from typer.testing import CliRunner

from deleatur.cli import app

run = CliRunner().invoke


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    workspace.make(root)
    return root


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


def write(path: Path, **changes: Any) -> str:
    params = workspace.numbers(path.parent)
    for dotted, value in changes.items():
        *outer, last = dotted.split("__")
        place = params
        for key in outer:
            place = place[key]
        place[last] = value
    path.write_text(yaml.safe_dump(params))
    return str(path)


def test_help_lists_commands_and_exit_codes() -> None:
    out = run(app, ["--help"]).output
    for word in ("demo", "check", "stage", "methods", "report", "explain", "export", "75"):
        assert word in out


def test_help_answers_without_heavy_imports() -> None:
    code = (
        "import sys, deleatur.cli; print([m for m in ('torch', 'mlflow', 'diffusers', 'pandas') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_check_accepts_the_project_and_speaks_json(here: Path) -> None:
    result = run(app, ["check", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["ok"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"erase__method": "nothing"}, "no 'nothing' among erasers"),
        ({"erase__loop": {"itertions": 5}}, "loop.itertions"),
        ({"guide__scale": "much"}, "scale"),
        ({"guide": {"method": "sld", "warm_up": 2}}, "weapon from step 2 on"),
        ({"guide": {"method": "sega", "concepts": {"weapon": {"warm_up": 9}}, "edit": {"warm_up": 0}}}, "step 9"),
        ({"guide": {"method": "sld", "preset": "most"}}, "preset"),
        ({"targets": ["unknown"]}, "unknown"),
        ({"targets": []}, "at least one"),
        ({"sede": 3}, "sede"),
        ({"ingest__sources": ["nowhere/*.jsonl"]}, "matches no file"),
        ({"evaluate__detectors": {}}, "not among evaluate.detectors"),
    ],
)
def test_a_wrong_setting_is_named_and_the_next_command_given(here: Path, changes: dict[str, Any], said: str) -> None:
    result = run(app, ["check", "--params", write(here / "wrong.yaml", **changes)])
    assert result.exit_code in (2, 3)
    assert said in result.output.replace("\n", " ")
    assert "Next:" in result.output or "not among" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "guide",
    [
        {"method": "negative", "scale": 4},
        {"method": "sld", "preset": "strong", "warm_up": 1},
        {"method": "sega", "edit": {"warm_up": 5}, "concepts": {"weapon": {"warm_up": 0, "strength": 6}}},
    ],
)
def test_a_guide_is_chosen_by_name(here: Path, guide: dict[str, Any]) -> None:
    result = run(app, ["check", "--params", write(here / "guided.yaml", guide=guide)])
    assert result.exit_code == 0, result.output
    assert f"guide: {guide['method']}" in result.output


def test_no_params_file_says_where_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(app, ["check"])
    assert result.exit_code == 2
    assert "project's root" in result.output


def test_explain_before_the_chain_ran_says_what_to_type(here: Path) -> None:
    result = run(app, ["explain"])
    assert result.exit_code == 3
    assert "deleatur demo" in result.output


def test_an_unknown_stage_lists_the_stages(here: Path) -> None:
    result = run(app, ["stage", "sweep"])
    assert result.exit_code == 2
    assert "ingest, reward, invert" in result.output


def test_methods_prints_numbers_with_their_meaning() -> None:
    found = json.loads(run(app, ["methods", "erasers", "--json"]).output)
    assert found["erasers"]["sdd"]["numbers"]["loop.iterations"]["default"] == 1500
    assert "EMA" in json.dumps(found) or "m." in json.dumps(found)
    guides = json.loads(run(app, ["methods", "guides", "--json"]).output)["guides"]
    assert set(guides) == {"cfg", "negative", "sld", "sega"}
    assert all("arXiv" in guides[name]["source"] for name in ("cfg", "sld", "sega"))
    assert all(number["meaning"] for guide in guides.values() for number in guide["numbers"].values())
    assert run(app, ["methods", "nonsense"]).exit_code == 2
