"""The command line: help texts, error messages that name the next command, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import workspace
import yaml
from typer.testing import CliRunner

from deleatur import plugins
from deleatur.cli import app
from deleatur.errors import DataError

run = CliRunner().invoke
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    workspace.create(root)
    return root


@pytest.fixture
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


def write(path: Path, **changes: Any) -> str:
    params = workspace.small_params(path.parent)
    for dotted, value in changes.items():
        *outer, last = dotted.split("__")
        place = params
        for key in outer:
            place = place[key]
        place[last] = value
    path.write_text(yaml.safe_dump(params))
    return str(path)


GROUPS = {
    "Pipeline": ["demo", "check", "stage", "methods", "schema"],
    "Results": ["report", "explain", "compare", "export"],
    "Registry": ["approve", "decline", "rollback", "quarantine", "verify", "history", "settle"],
    "Operations": ["canary", "emergency", "doctor", "backup", "restore", "exporter"],
}


def test_help_lists_the_commands_of_each_group_and_the_exit_codes() -> None:
    output = run(app, ["--help"], env={"COLUMNS": "120"}).output
    panels = re.findall(r"^╭─ (\w+) ─+╮$(.*?)^╰─", output, re.MULTILINE | re.DOTALL)
    listed = {title: re.findall(r"^│ ([a-z]+) ", lines, re.MULTILINE) for title, lines in panels if title != "Options"}
    assert listed == GROUPS
    assert "75 interrupted" in output


@pytest.mark.parametrize("command", [None, *(name for names in GROUPS.values() for name in names)])
def test_help_loads_no_heavy_library(command: str | None) -> None:
    code = (
        "import sys; from deleatur.cli import app; app(standalone_mode=False); "
        "print([m for m in ('torch', 'mlflow', 'diffusers', 'pandas', 'dvc') if m in sys.modules])"
    )
    arguments = [sys.executable, "-c", code, *([command] if command else []), "--help"]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert output.endswith("[]\n")


def test_check_accepts_the_project_and_prints_json(in_project: Path) -> None:
    result = run(app, ["check", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["ok"]


RULE = {"metric": "clip_score", "slice": "unseen", "max": 1, "min_n": 1}


def test_a_rule_about_a_role_is_one_about_each_concept_of_it(in_project: Path) -> None:
    weapon = yaml.safe_load(Path("params.yaml").read_text("utf-8"))["concepts"]["weapon"]
    rule = {**RULE, "metric": "concept_rate", "slice": "word", "min_n": 2 * len(weapon["words"])}
    path = Path("prompts/weapon.csv")
    other = path.with_name("other.csv")
    other.write_text(
        path.read_text("utf-8")
        .replace("w-", "o-")
        .replace("a gun", "one gun")
        .replace("a sword", "one sword")
        .replace("a thing", "one thing"),
        "utf-8",
    )
    both = {
        "targets": ["weapon", "other"],
        "concepts__other": weapon | {"prompts": str(other)},
        "sample__images_per_prompt__word": 1,
        "erase__source": "words",
    }
    result = run(app, ["check", "--params", write(in_project / "two.yaml", **both, gate__rules={"gone": rule})])
    assert f"min_n of at most {len(weapon['words'])}, " in result.output


def test_an_error_of_the_operating_system_is_a_message(in_project: Path) -> None:
    result = run(app, ["export", f"{'x' * 300}/erased"])  # no file system takes such a name
    assert (result.exit_code, type(result.exception)) == (3, SystemExit), result.output
    assert "File name too long" in result.output


@pytest.mark.parametrize(
    ("code", "changes", "message"),
    [
        (2, {"sede": 3}, "sede"),
        (2, {"targets": ["unknown"]}, "unknown"),
        (2, {"targets": []}, "at least one"),
        (2, {"targets": ["weapon", "weapon"]}, "each once"),
        (2, {"base__device": "nonsense"}, "expected auto, cpu, cuda"),
        (2, {"base__device": "cuda:99"}, "got 'cuda:99'"),
        (2, {"erase__method": "nothing"}, "erase.method: expected one of abo, esd, keep"),
        (2, {"erase__loop": {"iterations": 5}}, "(erasers), got 'loop'"),
        (2, {"erase__sdd": 5}, "expected the hyperparameters of sdd"),
        (2, {"erase__sdd__training": {"itertions": 5}}, "training.itertions"),
        (2, {"erase__sdd__training": {"preset": ["a"]}}, "training.preset"),
        (2, {"erase__keep": {"lr": 1}}, "erase.keep.lr: no such key"),
        (2, {"invert__textual_inversion": {"num_tokens": 2}}, "num_tokens"),
        (2, {"concepts__weapon__invert": {"num_tokens": 2}}, "(inversion), got 'num_tokens'"),
        (2, {"concepts__weapon__invert": {"hfi": {"tokns": 2}}}, "tokns"),
        (2, {"concepts__weapon__detection": {"detector": "judge", "labels": ["gum"]}}, "no label 'gum'; closest: gun"),
        (2, {"concepts__weapon__detection": {"detector": "jugde", "labels": ["gun"]}}, "got 'jugde'"),
        (2, {"concepts__weapon__detection": {"detector": "judge", "labels": []}}, "detection.labels"),
        (2, {"concepts__weapon__words": []}, "concepts.weapon.words"),
        (2, {"guide__cfg__scale": "much"}, "scale"),
        (2, {"guide__cfg__scale": float("nan")}, "scale"),
        (2, {"guide": {"method": "sld", "sld": {"warmup_steps": 2}}}, "weapon from step 2 on"),
        (
            2,
            {
                "guide": {
                    "method": "sega",
                    "sega": {"concepts": {"weapon": {"warmup_steps": 9}}, "edit": {"warmup_steps": 0}},
                }
            },
            "step 9",
        ),
        (2, {"guide": {"method": "sld", "sld": {"preset": "most"}}}, "preset"),
        (2, {"paths__delta": "."}, "delta, ., which a stage empties"),
        (2, {"paths__delta": "out/./tokens"}, "which a stage empties"),
        (2, {"paths__scores": "models"}, "models is in scores"),
        (2, {"paths__feedback": "feedback"}, "paths.feedback is feedback, which a stage empties, and the source"),
        (2, {"paths__tokens": "prompts"}, "prompts is in tokens"),
        (2, {"paths__verdict": ".dvc/made"}, "paths.verdict is .dvc/made, which a stage empties, and .dvc is there"),
        (2, {"paths__delta": "/somewhere"}, "paths.delta: expected a folder of the project"),
        (2, {"paths__delta": ".."}, "delta"),
        (2, {"concepts": {"../evil": {}}}, "concepts"),
        (2, {"concepts__weapon__initializer_token": ""}, "concepts.weapon.initializer_token"),
        (2, {"concepts__weapon__words": [""]}, "concepts.weapon.words"),
        (2, {"sample__champion": "nope"}, "models:/NAME/NUMBER"),
        (2, {"register__tracking_uri": "nonsense"}, "expected sqlite:///FILE"),
        (2, {"evaluate__metrics__nude": {"method": "nudity", "cutoff": 5}}, "cutoff"),
        (2, {"erase__sdd__training": {"target_rate": 0.1}}, "target_rate needs evaluations"),
        (
            2,
            {"gate__rules": {"a": {**RULE, "variant": "champion", "versus": "base"}}},
            "paired differences are the candidate's",
        ),
        (2, {"register__model": "a/b"}, "register.model"),
        (2, {"reward__folds": 1}, "reward.folds"),
        (2, {"reward__epochs": 0}, "reward.epochs"),
        (2, {"reward__dropout": 1}, "reward.dropout"),
        (2, {"reward__held_out_raters": 0}, "reward.held_out_raters"),
        (2, {"sample__steps": 0}, "sample.steps"),
        (2, {"sample__batch_size": 0}, "sample.batch_size"),
        (2, {"sample__shard_size": 0}, "sample.shard_size"),
        (2, {"sample__images_per_prompt__keep": -1}, "sample.images_per_prompt.keep"),
        (2, {"evaluate__confidence_level": 1}, "evaluate.confidence_level"),
        (2, {"evaluate__confidence_level": 0}, "evaluate.confidence_level"),
        (2, {"evaluate__detectors": {}}, "expected a detector of evaluate.detectors"),
        (
            2,
            {"evaluate__detectors__judge": {"path": "models/judge"}},
            "evaluate.detectors.judge: expected one of classifier",
        ),
        (2, {"evaluate__detectors__judge__device": "nonsense"}, "expected auto, cpu, cuda"),
        (2, {"evaluate__metrics__nude": {"method": "nudity"}}, "evaluate.metrics.nude: expected a detector"),
        (2, {"evaluate__metrics__nude": {"method": ["nudity"]}}, "evaluate.metrics.nude: expected one of clip_score"),
        (2, {"gate__rules": {}}, "gate.rules"),
        (2, {"gate__rules": {"r": {**RULE, "slice": "unsen"}}}, "expected a slice that is measured"),
        (2, {"gate__rules": {"r": {**RULE, "metric": "clip"}}}, "expected a metric that is measured"),
        (2, {"gate__rules": {"r": {**RULE, "metric": "concept_rate"}}}, "measured on prompts that ask for a concept"),
        (2, {"gate__rules": {"r": {**RULE, "metric": "frechet", "versus": "base"}}}, "which has no baseline"),
        (2, {"gate__rules": {"r": {**RULE, "min_n": 10**6}}}, "expected min_n of at most"),
        (2, {"sample__images_per_prompt__unseen": 0}, "expected a slice that is measured"),
        (3, {"ingest__sources": ["nowhere/*.jsonl"]}, "nowhere/*.jsonl, found no file"),
        (3, {"ingest__sources": ["/nowhere/*.jsonl"]}, "/nowhere/*.jsonl, found no file"),
        (3, {"paths__prompts": "prompts/none.csv"}, "no file prompts/none.csv"),
        (3, {"sample__split": "proof"}, "expected prompts of the split 'proof'"),
        (2, {"register__trusted_keys": ["none.pub.pem"]}, "none.pub.pem is not a public key"),
        (4, {"base__model": "models/nothing"}, "base.model: no folder models/nothing"),
        (4, {"base__model": "models/judge"}, "expected model_index.json"),
        (4, {"base__model": "models/judge/model.safetensors"}, "got a checkpoint in one file"),
        (2, {"sample__steps": 1000}, "sample.steps: 1000 sampler steps with steps_offset 1 would begin at timestep"),
        (2, {"sample__steps": 1001}, "sample.steps: expected 1 to 1000 sampler steps"),
        (2, {"erase__sdd__training__sampler_steps": 1001}, "erase.sdd: expected 1 to 1000 sampler steps"),
        (2, {"erase__sfd": {"start": 1000}}, "erase.sfd: expected start and levels below 1000"),
        (4, {"reward__clip": "somewhere"}, "reward.clip: no folder somewhere"),
        (4, {"evaluate__detectors__judge__path": "models/none"}, "evaluate.detectors.judge: no folder models/none"),
    ],
)
def test_a_wrong_setting_is_named_with_the_next_command(
    in_project: Path, code: int, changes: dict[str, Any], message: str
) -> None:
    result = run(app, ["check", "--params", write(in_project / "wrong.yaml", **changes)])
    assert (result.exit_code, type(result.exception)) == (code, SystemExit), result.output
    assert message in result.output
    assert "Next: " in result.output


@pytest.mark.parametrize(
    "changes",
    [
        {"erase__method": "keep"},
        {"invert__method": "textual_inversion"},
        {"invert__method": "textual_inversion", "concepts__weapon__invert": {"hfi": {"num_tokens": 3}}},
        {"ingest__sources": ["{project}/feedback/*.jsonl"]},
    ],
)
def test_selecting_another_method_needs_its_name_and_nothing_else(in_project: Path, changes: dict[str, Any]) -> None:
    path = Path(write(in_project / "other.yaml", **changes))
    path.write_text(path.read_text().replace("{project}", str(in_project)))
    result = run(app, ["check", "--params", str(path)])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: \xff", "not YAML in UTF-8"),
        (b"seed: [", "not YAML"),
        (b"seed: 2024-13-45", "not YAML"),
        (b"- 1", "valid dictionary"),
        (b"", "valid dictionary"),
    ],
)
def test_a_file_without_settings_is_refused_with_a_message(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    result = run(app, ["check", "--params", str(path)])
    assert (result.exit_code, type(result.exception)) == (2, SystemExit)
    assert message in result.output


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def delete(path: Path) -> None:
    path.unlink()


def misspell(path: Path) -> None:
    path.write_text(path.read_text().replace("judge:cat", "jugde:cat"))


def relabel(path: Path) -> None:
    path.write_text(path.read_text().replace("judge:cat", "judge:cats"))


@pytest.mark.parametrize(
    ("code", "file", "spoil"),
    [
        (4, "models/pipeline/unet/diffusion_pytorch_model.safetensors", truncate),
        (4, "models/pipeline/text_encoder/model.safetensors", truncate),
        (4, "models/pipeline/text_encoder/config.json", truncate),
        (4, "models/pipeline/scheduler/scheduler_config.json", delete),
        (4, "models/pipeline/tokenizer/tokenizer.json", delete),
        (4, "models/clip/model.safetensors", truncate),
        (4, "models/clip/model.safetensors", delete),
        (4, "models/judge/model.safetensors", truncate),
        (4, "models/judge/preprocessor_config.json", delete),
        (2, "prompts/neutral.csv", misspell),
        (2, "prompts/neutral.csv", relabel),
        (3, "prompts/weapon.csv", delete),
    ],
)
def test_check_reads_the_files(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, file: str, spoil: Callable[[Path], None]
) -> None:
    root = shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(root)
    assert run(app, ["check"]).exit_code == 0, "complete before"
    spoil(root / file)
    result = run(app, ["check"])
    assert (result.exit_code, type(result.exception)) == (code, SystemExit), result.output
    assert "Next: " in result.output


@pytest.mark.parametrize(
    "guide",
    [
        {"method": "negative", "negative": {"scale": 4}},
        {"method": "sld", "sld": {"preset": "strong", "warmup_steps": 1}},
        {
            "method": "sega",
            "sega": {
                "edit": {"warmup_steps": 5},
                "concepts": {"weapon": {"warmup_steps": 0, "edit_guidance_scale": 6}},
            },
        },
    ],
)
def test_a_guide_is_selected_by_name(in_project: Path, guide: dict[str, Any]) -> None:
    result = run(app, ["check", "--params", write(in_project / "guided.yaml", guide=guide)])
    assert result.exit_code == 0, result.output
    assert f"guide: {guide['method']}" in result.output


def test_a_missing_params_file_names_the_project_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(app, ["check"])
    assert result.exit_code == 2
    assert "project's root" in result.output


def test_explain_before_the_chain_has_run_names_the_command_to_run(in_project: Path) -> None:
    result = run(app, ["explain"])
    assert result.exit_code == 3
    assert "deleatur demo" in result.output


def test_an_unknown_stage_lists_the_stages(in_project: Path) -> None:
    result = run(app, ["stage", "sweep"])
    assert result.exit_code == 2
    assert "ingest, reward, invert" in result.output


def test_methods_prints_hyperparameters_with_choices_and_meaning() -> None:
    fields = json.loads(run(app, ["methods", "erasers", "--json"]).output)["erasers"]["sdd"]["hyperparameters"]
    assert fields["training.iterations"]["default"] == 1500
    assert fields["order"]["choices"] == ["paper", "code", "single"]
    assert "xattn_kv" in fields["training.trainable"]["choices"]
    output = run(app, ["methods", "erasers"]).output
    assert "paper | code | single" in output
    assert "Learning rate of AdamW" in output
    guides = json.loads(run(app, ["methods", "guides", "--json"]).output)["guides"]
    assert set(guides) == {"cfg", "negative", "sld", "sega"}
    assert all("arXiv" in guides[name]["source"] for name in ("cfg", "sld", "sega"))
    assert all(field["meaning"] for guide in guides.values() for field in guide["hyperparameters"].values())
    assert run(app, ["methods", "nonsense"]).exit_code == 2


def test_check_estimates_what_the_chain_takes(in_project: Path) -> None:
    result = run(app, ["check", "--cost", "--json"])
    assert result.exit_code == 0, result.output
    lines = {line["name"]: line for line in json.loads(result.output)["cost"]}
    assert list(lines) == ["invert", "erase", "attack", "sample"]
    erase = lines["erase"]
    assert erase["method"] == "sdd"
    assert erase["cost"]["workload"]["backward"] == 6 * (2 + 2), "six iterations of two states, and two preserved ones"
    assert erase["cost"]["trainable_parameters"] > 0
    assert all(line["seconds"] > 0 and line["cost"]["peak_memory"] > 0 for line in lines.values())
    output = run(app, ["check", "--cost"]).output
    assert "What the chain takes on this machine" in output


@pytest.mark.slow
def test_methods_estimates_costs_on_stable_diffusion_and_on_this_machine(in_project: Path) -> None:
    costs = json.loads(run(app, ["methods", "erasers", "--cost", "--json"]).output)
    named = ("Stable Diffusion 1.4", "params.yaml")
    sd, local = ({line["method"]: line["cost"] for line in costs[name]} for name in named)
    assert set(sd) == set(local) == set(plugins.names("erasers"))
    assert sd["esd"]["trainable_parameters"] == 43_962_560
    assert sd["uce"]["flops"] == 0
    assert sd["safegen"]["flops"] > sd["esd"]["flops"] / 10
    assert local["sdd"]["workload"]["backward"] == 6 * (2 + 2)
    output = run(app, ["methods", "attacks", "--cost"]).output
    assert "Stable Diffusion 1.4" in output
    assert "concept_inversion" in output


def test_the_schema_in_the_repository_is_up_to_date(tmp_path: Path) -> None:
    assert run(app, ["schema", str(tmp_path / "schema.json")]).exit_code == 0
    text = (tmp_path / "schema.json").read_text("utf-8")
    assert text == (ROOT / "params.schema.json").read_text("utf-8"), "deleatur schema params.schema.json"
    assert json.loads(run(app, ["schema"]).output) == json.loads(text)
    params = (ROOT / "params.yaml").read_text("utf-8")
    assert params.startswith("# yaml-language-server: $schema=params.schema.json\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("arguments", [["--help"], ["methods", "guides"], ["check", "--params", b"\xff.yaml"]])
def test_a_terminal_that_is_not_utf_8_gets_question_marks_instead_of_a_stack_trace(
    arguments: list[str | bytes], encoding: str
) -> None:
    command = [sys.executable, "-m", "deleatur", *arguments]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, encoding=encoding
    )
    assert "Traceback" not in result.stderr
    assert result.returncode == (2 if "check" in arguments else 0)


@pytest.mark.parametrize("columns", ["1", "20"])
def test_help_fits_a_narrow_terminal(columns: str) -> None:
    assert run(app, ["compare", "--help"], env={"COLUMNS": columns}).exit_code == 0


def test_a_closed_pipe_ends_quietly() -> None:
    command = [sys.executable, "-m", "deleatur", "methods", "guides"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_message() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "deleatur", "methods", "guides"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == DataError.exit_code
    assert result.stderr == "DataError: No space left on device\nNext: df -h .\n"


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (2, ["check", "--params", "prompts"], "expected a YAML file, and prompts is a folder"),
        (2, ["methods", "--cost", "nonsense"], "expected a kind of plug-in that uses the UNet"),
        (2, ["methods", "--cost", "metrics"], "expected a kind of plug-in that uses the UNet"),
        (2, ["emergency", " , ", "--as", "A", "--reason", "B"], "expected concepts of params.yaml (weapon), got none"),
        (2, ["emergency", "weapon, vice", "--as", "A", "--reason", "B"], "got vice"),
        (2, ["exporter", "--port", "99999"], "--port"),
        (3, ["restore", "nowhere"], "expected a folder that `deleatur backup` has written"),
        (3, ["restore", "prompts"], "expected a folder that `deleatur backup` has written"),
        (3, ["schema", "prompts"], "Is a directory: prompts"),
    ],
)
def test_a_wrong_argument_is_a_message(in_project: Path, code: int, arguments: list[str], message: str) -> None:
    if arguments[0] == "emergency":
        rule = {"metric": "clip_score", "slice": "unseen", "max": 1, "min_n": 1}
        section = {
            "erase": {"method": "uce", "source": "words"},
            "images_per_prompt": {"unseen": 1},
            "rules": {"a": rule},
        }
        arguments = [*arguments, "--params", write(in_project / "emergency.yaml", emergency=section)]
    result = run(app, arguments, env={"COLUMNS": "300"})
    assert (result.exit_code, type(result.exception)) == (code, SystemExit), result.output
    assert message in result.output
    assert ("Next: " in result.output) == (message != "--port"), "Typer refuses a port out of range"


def test_text_is_printed_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "[bold] :fire: [" / f"x] {'long ' * 30}.json"
    path.parent.mkdir()
    result = run(app, ["schema", str(path)], env={"COLUMNS": "40"})
    assert (result.exit_code, result.output) == (0, f"Written: {path}\n"), "no markup, no emoji, not wrapped"


@pytest.mark.parametrize(
    ("code", "command", "place"),
    [
        (2, ["check"], "params.yaml"),
        (3, ["check"], "prompts/neutral.csv"),
        (3, ["check"], "prompts/weapon.csv"),
        (4, ["check"], "models/pipeline/model_index.json"),
        (4, ["check"], "models/judge/config.json"),
        (3, ["history"], "ledger.jsonl"),
        (3, ["rollback", "--as", "A", "--reason", "B"], "ledger.jsonl"),
        (3, ["backup", "backup"], "ledger.jsonl"),
        (1, ["doctor"], "ledger.jsonl"),
        (3, ["stage", "gate"], "out/report/report.json"),
        (3, ["restore", "saved"], "saved/manifest.json"),
        (3, ["export", "exported"], "out/delta/delta.safetensors"),
        (3, ["schema", "schema.json"], "schema.json"),
        (3, ["history"], "mlflow.db"),
    ],
)
def test_a_folder_in_place_of_a_file_is_a_message_with_the_next_command(
    tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch, code: int, command: list[str], place: str
) -> None:
    monkeypatch.chdir(shutil.copytree(project, tmp_path / "project"))
    Path(place).unlink(missing_ok=True)
    Path(place).mkdir(parents=True)
    result = run(app, command, env={"COLUMNS": "300"})
    print(result.output)
    assert (result.exit_code, type(result.exception)) == (code, SystemExit), result.output
    assert Path(place).name in result.output
    assert "Next: " in result.output
