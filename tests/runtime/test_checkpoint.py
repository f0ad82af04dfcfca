"""A stage killed at any step and run again writes the same bytes; it resumes only from checkpoints of the same run."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import workspace
import yaml
from child_processes import StageProcess
from torch import Tensor
from typer.testing import CliRunner

from deleatur import dependencies, stages
from deleatur.cli import app
from deleatur.config.sections import WorkersSection
from deleatur.config.settings import Settings
from deleatur.errors import ErasureRefused, Interrupted
from deleatur.evaluation.probe import contrast
from deleatur.runtime import checkpoint, event_log, models
from deleatur.runtime.checkpoint import Checkpoint
from deleatur.storage import tensors

STEPS = {"invert": 4, "erase": 6, "attack": 6}
"""Steps of the tiny project's long stages, see tests/workspace.py: of the attack three for each of two attempts."""
OUTPUT = {"invert": "tokens", "erase": "delta", "attack": "attacks"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose long stages have run without interruption."""
    root = tmp_path_factory.mktemp("finished")
    with chdir(root):
        settings = workspace.create(root)
        for name in ("ingest", "reward"):
            stages.run(name, settings)
        _detect_the_concept_everywhere(settings.paths.reward / "weapon.safetensors")
        for name in STEPS:
            stages.run(name, settings)
    return root


def _detect_the_concept_everywhere(path: Path) -> None:
    """Erasing would stop at its first evaluation: this head sees the concept in no image of a random model."""
    head, metadata = tensors.load(path)
    head["train/out.bias"] += 1
    tensors.save(path, head, metadata)


@pytest.fixture
def root(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished project, as the current directory."""
    shutil.copytree(finished, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


@pytest.fixture(autouse=True)
def in_the_foreground() -> Iterator[None]:
    """Ctrl-C is ignored where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def reset_outputs(root: Path, name: str) -> dict[str, bytes]:
    """Deletes a stage's output, as DVC does before it runs the stage; returns the deleted files."""
    folder = root / "out" / OUTPUT[name]
    complete = files(folder)
    shutil.rmtree(folder)
    return complete


def saved(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "out/checkpoints").glob("*safetensors*"))


def stage_events(root: Path, name: str) -> list[event_log.Event]:
    return [line for line in event_log.read(root / "out/checkpoints") if line.stage == name]


@pytest.mark.parametrize(("name", "steps"), [("invert", (1, 3)), ("erase", (1, 3, 5)), ("attack", (2, 4))])
def test_a_stage_killed_several_times_ends_with_the_same_bytes(root: Path, name: str, steps: tuple[int, ...]) -> None:
    complete, before = reset_outputs(root, name), 0
    for step in steps:
        stage = StageProcess(root, name)
        assert stage.signal_at(step, signal.SIGKILL) == -signal.SIGKILL
        assert len(saved(root)) == 1
        assert stage.progress[0]["done"] >= max(before, 1), "it has resumed where the previous one was killed"
        before = step
    stage = StageProcess(root, name)
    assert stage.wait() == 0
    assert stage.progress[0]["done"] >= before
    assert stage.progress[-1]["done"] == stage.progress[-1]["total"] == STEPS[name], "the bar ends full"
    assert files(root / "out" / OUTPUT[name]) == complete
    assert saved(root) == [], "no checkpoint is left"


@pytest.mark.parametrize(
    ("name", "signum"), [("invert", signal.SIGTERM), ("erase", signal.SIGINT), ("attack", signal.SIGTERM)]
)
def test_an_interrupted_stage_saves_and_exits_with_the_code_of_interruption(
    root: Path, name: str, signum: signal.Signals
) -> None:
    complete = reset_outputs(root, name)
    assert StageProcess(root, name, saves=False).signal_at(1, signum) == Interrupted.exit_code
    assert len(saved(root)) == 1
    stage = StageProcess(root, name, saves=False)
    assert stage.wait() == 0
    assert stage.progress[0]["done"] >= 1
    assert files(root / "out" / OUTPUT[name]) == complete
    assert saved(root) == []


def test_the_event_log_has_the_steps_lost_to_a_kill(root: Path) -> None:
    reset_outputs(root, "erase")
    before = len(stage_events(root, "erase"))
    assert StageProcess(root, "erase", saves=False).signal_at(4, signal.SIGKILL) == -signal.SIGKILL
    assert StageProcess(root, "erase").signal_at(2, signal.SIGTERM) == Interrupted.exit_code
    assert StageProcess(root, "erase").wait() == 0
    lines = stage_events(root, "erase")[before:]
    assert [line.kind for line in lines] == [
        "started",
        "started",
        "resumed",
        "interrupted",
        "started",
        "resumed",
        "done",
    ]
    lost = [line.lost for line in lines if line.kind == "resumed"]
    assert lost[0] >= 4, "nothing had been saved"
    assert lost[1] == 0, "an interrupted stage saves its last step"
    assert lines[-1].seconds > 0
    assert not list((root / "out/checkpoints").glob("*.steps"))


def test_a_stage_killed_while_saving_resumes_from_the_previous_checkpoint(root: Path) -> None:
    complete = reset_outputs(root, "erase")
    assert StageProcess(root, "erase", fatal_save=3).wait() == -signal.SIGKILL
    assert len(saved(root)) == 2, "the complete one, and half of the next"
    stage = StageProcess(root, "erase")
    assert stage.wait() == 0
    assert stage.progress[0]["done"] == 2
    assert files(root / "out/delta") == complete
    assert saved(root) == []


def test_a_stage_killed_after_its_last_step_has_only_to_write(root: Path) -> None:
    complete = reset_outputs(root, "erase")
    saves = STEPS["erase"] + 1  # the seventh file is the delta
    assert StageProcess(root, "erase", fatal_save=saves).wait() == -signal.SIGKILL
    stage = StageProcess(root, "erase")
    assert stage.wait() == 0
    assert [(line["done"], line["total"]) for line in stage.progress] == [(6, 6)]
    assert files(root / "out/delta") == complete


@pytest.fixture(scope="module")
def interrupted_project(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose long stages were interrupted."""
    root = tmp_path_factory.mktemp("interrupted") / "w"
    shutil.copytree(finished, root)
    for name in STEPS:
        assert StageProcess(root, name).signal_at(1, signal.SIGTERM) == Interrupted.exit_code
    return root


def set_param(*path: str, value: Any) -> Callable[[], None]:
    def change() -> None:
        params = yaml.safe_load(Path("params.yaml").read_text())
        section = params
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value
        Path("params.yaml").write_text(yaml.safe_dump(params))

    return change


def set_hyperparameter(name: str, value: float) -> Callable[[], None]:
    return set_param("erase", "sdd", "training", name, value=value)


def another_token() -> None:
    token = tensors.load_token(Path("out/tokens/weapon"))
    token.vectors.add_(1)
    tensors.save_token(Path("out/tokens/weapon"), token)


def another_feedback() -> None:
    path = Path("out/feedback/summary.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"feedback": "0" * 64}))


CHANGES = {
    "setting": (
        "erase",
        set_hyperparameter("lr", 0.5),
        "erase.sdd.training.lr: it was 0.001, now it is 0.5",
    ),
    "new setting": (
        "erase",
        set_hyperparameter("max_grad_norm", 2.0),
        "training.max_grad_norm: it was null, now it is 2.0",
    ),
    "seed": ("erase", set_param("seed", value=7), "seed: it was 42, now it is 7"),
    "model": ("erase", lambda: tiny.save_pipeline(Path("models/pipeline"), seed=1), "UNet of base.model: its content"),
    "token": ("erase", another_token, "tokens: its content"),
    "feedback": ("invert", another_feedback, "feedback: its content"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_checkpoint_of_another_run_is_refused_and_the_difference_is_named(
    interrupted_project: Path, field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(interrupted_project, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    name, change, message = CHANGES[field]
    change()
    before = files(Path("out"))
    result = CliRunner().invoke(app, ["stage", name])
    assert result.exit_code == 2, result.output
    before |= {
        f"checkpoints/{event_log.FILE}": Path("out/checkpoints", event_log.FILE).read_bytes()
    }  # the event log has the failure
    output = " ".join(result.output.split())
    assert message in output
    assert f"{name} was interrupted after step" in output
    assert files(Path("out")) == before, "neither checkpoints nor outputs are changed"
    checkpoint_file = f"out/checkpoints/{'invert-weapon' if name == 'invert' else name}.safetensors"
    assert f"Next: rm {checkpoint_file}" in output
    Path(checkpoint_file).unlink()
    assert CliRunner().invoke(app, ["stage", name]).exit_code == 0


def test_code_and_libraries_count_too(interrupted_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(interrupted_project)
    stage_digests = dependencies.stage_digests
    corrected = {"deleatur.erasers.sdd": "its new digest"}
    monkeypatch.setattr(dependencies, "stage_digests", lambda *args: stage_digests(*args) | corrected)
    monkeypatch.setattr(checkpoint, "version", lambda name: "99")
    output = CliRunner().invoke(app, ["stage", "erase"]).output
    assert "deleatur.erasers.sdd: its code" in output
    assert "torch: its version" in output


def test_a_file_that_is_no_checkpoint_is_named_with_the_next_command(root: Path) -> None:
    (root / "out/checkpoints").mkdir(exist_ok=True)
    (root / "out/checkpoints/erase.safetensors").write_bytes(b"half of it")
    result = CliRunner().invoke(app, ["stage", "erase"])
    assert result.exit_code == 3
    assert "rm out/checkpoints/erase.safetensors" in " ".join(result.output.split())


def test_a_refused_run_leaves_no_checkpoint(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "interval", lambda settings: 0.0)
    monkeypatch.setattr(checkpoint, "MAX_OVERHEAD", 1e9)
    set_param("erase", "sdd", "training", "min_relative_change", value=1e9)()
    with pytest.raises(ErasureRefused):
        stages.run("erase", Settings.load())
    assert saved(root) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_without_checkpoints_ends_at_once_on_a_signal(
    root: Path, signum: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signum)
    monkeypatch.setattr(models, "base_model", lambda settings: signal.raise_signal(signum))
    with pytest.raises(Interrupted, match="sample"):
        stages.run("sample", Settings.load())
    assert signal.getsignal(signum) is before


class StepCounter:
    """A state of a few bytes."""

    step = 0

    def tensors(self) -> dict[str, Tensor]:
        return {"a/": torch.zeros(1)}

    def metadata(self) -> dict[str, Any]:
        return {"step": self.step}


@pytest.fixture
def checkpoint_(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.chdir(tmp_path)
    identity: dict[str, Any] = {kind: {} for kind in ("settings", "content", "code", "versions")}
    return Checkpoint(Settings.load(finished / "params.yaml"), "erase", "erase", identity)


def interrupted(checkpoint_: Checkpoint, *signals: signal.Signals) -> None:
    with checkpoint_:
        checkpoint_(StepCounter())
        for number in signals:
            signal.raise_signal(number)


def test_a_second_signal_interrupts_at_once(checkpoint_: Checkpoint) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(checkpoint_, signal.SIGTERM, signal.SIGINT)
    assert not checkpoint_.path.exists()


def test_a_run_in_the_background_ignores_ctrl_c(checkpoint_: Checkpoint) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupted(checkpoint_, signal.SIGINT)


def test_a_signal_after_the_last_step_is_not_lost(checkpoint_: Checkpoint) -> None:
    with pytest.raises(Interrupted):
        interrupted(checkpoint_, signal.SIGTERM)
    assert checkpoint_.path.is_file()


def test_saving_takes_a_limited_share_of_the_time(checkpoint_: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    now, saves = time.monotonic(), []
    cost = 0.0

    def save(*_: Any) -> None:
        nonlocal now
        saves.append(now - began)
        now += cost

    began = now
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(tensors, "save", save)
    with checkpoint_:
        for cost in (0.0, 10.0):
            saves.clear()
            began = now
            for _ in range(3000):
                now += 1.0
                checkpoint_(StepCounter())
            assert len(saves) == pytest.approx(
                3000 / max(WorkersSection().checkpoint_interval, cost / checkpoint.MAX_OVERHEAD), abs=1
            )


@pytest.mark.parametrize("name", STEPS)
def test_a_checkpoints_identity_covers_everything_that_dvc_depends_on(interrupted_project: Path, name: str) -> None:
    [path] = (interrupted_project / "out/checkpoints").glob(f"{name}*.safetensors")
    identity = tensors.load(path)[1]["identity"]
    chain = yaml.safe_load((workspace.ROOT / "dvc.yaml").read_text())["stages"][name]
    assert identity["code"] == dependencies.stage_digests(
        name, yaml.safe_load((interrupted_project / "params.yaml").read_text())
    )
    one_by_one = {"targets"} if name != "erase" else set()  # each concept has a checkpoint of its own
    for section in set(chain["params"]) - one_by_one:
        assert any(f"{dotted}.".startswith(f"{section}.") for dotted in identity["settings"]), section


def test_contrast_separates_images_from_blank_ones_and_from_noise() -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    half = np.zeros((64, 64, 3), np.uint8)
    half[:, 32:] = 255
    noise = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert contrast(Image.fromarray(half)) == pytest.approx(127.5)
    assert contrast(Image.fromarray(half // 255 + 100)) < 1
    assert contrast(Image.fromarray(noise)) < 15, "its pixels alone have 74"
