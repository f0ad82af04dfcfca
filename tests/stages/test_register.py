"""A verdict and its evidence become a run; only a pass becomes a version, once, and moves an alias."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import finished
import mlflow
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from deleatur.artifacts.export import export
from deleatur.cli import app
from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.records.report import Report
from deleatur.registry import approval
from deleatur.registry.decisions import open_registry
from deleatur.registry.mlflow_registry import CHALLENGER, CHAMPION, LAST_KNOWN_GOOD, Registry
from deleatur.registry.model_files import local_folder
from deleatur.runtime import models
from deleatur.stages import gate, register, sample
from deleatur.storage import dvc, json_records, samples, tensors

PLAIN = """
import json, sys
sys.modules["deleatur"] = None  # the serving environment does not have this package
import mlflow, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/deleatur@champion")
rows = pd.DataFrame({"prompt": ["a cat", "a gun"], "seed": [7, 8]})
both = model.predict(rows, params={"steps": 3, "guidance": 4.0})
assert model.predict(rows[1:], params={"steps": 3, "guidance": 4.0}) == both[1:]  # independent of the batch
print("ANSWER" + json.dumps(both))
"""


@pytest.fixture
def fresh(done: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Skips the question to DVC, which takes seconds, whether everything is up to date."""
    monkeypatch.setattr(dvc, "status", lambda root: {})
    return done


def judged_under(settings: Settings, policy: dict[str, object]) -> Settings:
    """The same evidence under another policy: another verdict."""
    changed = Settings.model_validate(settings.model_dump(mode="json", by_alias=True) | {"gate": policy})
    gate.run(changed)
    return changed


def requiring_approval(settings: Settings) -> Settings:
    """A policy that requires approval."""
    return settings.model_copy(update={"register_": settings.register_.model_copy(update={"approval": True})})


def aliases(settings: Settings) -> dict[str, str]:
    return open_registry(settings).aliases()


def counts(settings: Settings) -> tuple[int, int]:
    """Runs, versions."""
    registry = open_registry(settings)
    runs = registry.client.search_runs([registry.runs.experiment_id])
    return len(runs), len(registry.client.search_model_versions(f"name = '{registry.model}'"))


@pytest.mark.slow
def test_plain_mlflow_and_plain_diffusers_sample_the_same_images_from_a_version(done: Settings, tmp_path: Path) -> None:
    register.run(done)
    assert aliases(done) == {CHAMPION: "1"}

    command = [sys.executable, "-c", PLAIN, done.register_.tracking_uri]
    process = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path / "models")
    answer = json.loads(process.stdout.partition("ANSWER")[2])
    assert "%|" not in process.stderr, "no progress bars in a server's log"

    from diffusers import StableDiffusionPipeline

    export(done, tmp_path / "exported")
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "exported", safety_checker=None)
    for (prompt, seed), png in zip([("a cat", 7), ("a gun", 8)], answer, strict=True):
        noise = torch.Generator("cpu").manual_seed(seed)
        [image] = plain(prompt, num_inference_steps=3, guidance_scale=4.0, generator=noise).images
        assert np.array_equal(image, Image.open(BytesIO(base64.b64decode(png))))


def test_the_champion_can_be_loaded_and_sampled(fresh: Settings) -> None:
    register.run(fresh)
    mlflow.set_tracking_uri("sqlite:///elsewhere.db")  # as in a process that has not registered anything
    stored = tensors.load_delta(
        Path(models.local_path(fresh, "models:/deleatur@champion", "delta")) / tensors.DELTA_FILE
    )
    assert stored.base == models.base_model(fresh).unet_digest
    assert all(
        torch.equal(stored.tensors[n], t)
        for n, t in tensors.load_delta(Path("out/delta") / tensors.DELTA_FILE).tensors.items()
    )
    place = Path(local_folder("models:/deleatur@champion"))
    assert (place / "model_index.json").is_file()
    assert open_registry(fresh).tags("1")["report"] in (place / "README.md").read_text("utf-8")
    assert json.loads((place / "bom.cdx.json").read_text("utf-8"))["metadata"]["component"]["name"] == "deleatur"

    against = fresh.model_copy(update={"sample": fresh.sample.model_copy(update={"champion": "models:/deleatur/1"})})
    sample.run(against)
    champion, candidate = (samples.read(against.paths.samples, variant) for variant in ("champion", "candidate"))
    assert len(champion) > 0
    assert champion["image"].tolist() == candidate["image"].tolist(), "the same weights, the same noise"


def test_evidence_names_everything_that_went_in(fresh: Settings) -> None:
    register.run(fresh)
    registry = open_registry(fresh)
    [run] = registry.client.search_runs([registry.runs.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["erase.sdd.training.lr"] == "0.001"
    assert not any(name.startswith("register") for name in run.data.params)
    assert len(registry.client.get_metric_history(run.info.run_id, "erase/loss")) > 1
    assert {"clip_score/unseen/candidate-base", "clip_score/unseen/candidate-base.low"} <= set(run.data.metrics)
    [dataset_input] = run.inputs.dataset_inputs
    tags = registry.tags("1")
    assert tags["feedback"].startswith(dataset_input.dataset.digest)
    assert tags["base"] == models.base_model(fresh).unet_digest, "which model was changed"
    assert run.data.tags["deleatur.base"] == tags["base"]
    assert run.data.params["base.model"] == "models/pipeline"
    assert (tags["outcome"], tags["simulated"], tags["git_dirty"]) == ("pass", "true", "true")  # params.yaml was edited
    assert len(tags["git_commit"]) == 40
    assert tags["dvc_lock"] == dvc.lock_digest(Path())
    files = {
        f.path for place in ("verdict", "report", "params", "lock") for f in _files(registry, run.info.run_id, place)
    }
    wanted = {"verdict/contact_sheet.png", "verdict/report.html", "verdict/verdict.json", "report/report.json"}
    assert files >= wanted | {"params/params.yaml", "lock/dvc.lock"}


def test_mlflow_shows_a_summary_with_links_and_the_tags_that_people_filter_by(fresh: Settings) -> None:
    register.run(fresh)
    registry = open_registry(fresh)
    version = registry.client.get_model_version("deleatur", "1")
    assert version.tags == {"outcome": "pass", "concepts": "weapon", "method": "sdd", "simulated": "true"}
    report = json_records.read(fresh.paths.report / "report.json", Report)
    rates = {s.variant: s for s in report.scores if (s.metric, s.slice, s.versus) == ("concept_rate", "concept", None)}
    before, after = rates["base"], rates["candidate"]
    first, *rest = version.description.splitlines()
    assert first == f"PASS: weapon {before.value:.2f} → {after.value:.2f}", "MLflow's list shows this line as it is"
    assert f"of this model {after.value:.2f} \\[{after.low:.2f}, {after.high:.2f}\\]" in version.description
    assert any(line.startswith("* SIMULATED RATERS: ") for line in rest)
    assert [line.split(", ")[1].split(" by ")[0] for line in rest[-2:]] == ["registration", "promotion"]
    run = registry.client.get_run(version.run_id)
    assert version.description.startswith(run.data.tags["mlflow.note.content"]), "a run that fails has it, too"
    links = re.findall(r"\]\(#/experiments/(\w+)/runs/(\w+)/artifacts/([^)]+)\)", version.description)
    assert [path for *_, path in links] == ["verdict/report.html", "model_card.md"]
    for experiment_id, run_id, path in links:
        assert (experiment_id, run_id) == (run.info.experiment_id, run.info.run_id)
        assert Path(registry.client.download_artifacts(run_id, path)).is_file()
    card = Path(registry.client.download_artifacts(version.run_id, "model_card.md")).read_text("utf-8")
    assert card.lstrip().startswith("# "), "without metadata"


def _files(registry: Registry, run_id: str, place: str) -> list[Any]:
    return registry.client.list_artifacts(run_id, place)


def test_the_same_verdict_is_registered_once_even_after_a_rollback(fresh: Settings) -> None:
    register.run(fresh)
    register.run(fresh)
    assert counts(fresh) == (1, 1)
    registry = open_registry(fresh)
    registry.client.delete_registered_model_alias("deleatur", CHAMPION)
    register.run(fresh)
    assert aliases(fresh) == {}
    assert counts(fresh) == (1, 1)


def test_only_a_pass_moves_aliases_and_the_old_champion_is_remembered(fresh: Settings) -> None:
    register.run(fresh)
    failing = judged_under(fresh, finished.passing_policy(limit=5.0))
    register.run(failing)
    assert counts(fresh) == (2, 1)
    assert aliases(fresh) == {CHAMPION: "1"}
    register.run(judged_under(fresh, finished.passing_policy(limit=-6.0)))
    assert counts(fresh) == (3, 2)
    assert aliases(fresh) == {CHAMPION: "2", LAST_KNOWN_GOOD: "1"}


def test_a_pass_that_depends_on_a_guide_is_logged_and_releases_nothing(fresh: Settings) -> None:
    guided = fresh.model_copy(update={"guide": fresh.guide.model_copy(update={"method": "negative"})})
    register.run(guided)
    assert counts(fresh) == (1, 0)
    assert aliases(fresh) == {}


def test_a_person_decides_where_the_policy_requires_approval(fresh: Settings) -> None:
    register.run(requiring_approval(fresh))
    assert aliases(fresh) == {CHALLENGER: "1"}
    pending = approval.pending_approval(fresh)
    assert pending is not None
    version, evidence = pending
    with pytest.raises(DataError, match="rests on evidence other than"):
        approval.promote(fresh, version, "Ada", evidence="0" * 64)
    with pytest.raises(DataError, match="a name"):
        approval.promote(fresh, version, " ")
    approval.promote(fresh, version, "Ada", reason="seen the sheet", evidence=evidence)
    approval.promote(fresh, version, "Ada", evidence=evidence)  # changes nothing
    assert aliases(fresh) == {CHAMPION: "1"}
    assert ", approval by Ada: seen the sheet (line 2 of the ledger)" in open_registry(fresh).description("1")
    assert approval.pending_approval(fresh) is None
    with pytest.raises(DataError, match="no version 9"):
        approval.promote(fresh, "9", "Ada")

    second = judged_under(fresh, finished.passing_policy(limit=-6.0))
    register.run(requiring_approval(second))
    approval.decline(second, "2", "Ada", reason="too blurred")
    assert aliases(fresh) == {CHAMPION: "1"}
    with pytest.raises(DataError, match="version 2 of deleatur does not wait"):
        approval.promote(second, "2", "Ada")


def test_a_person_decides_on_the_command_line(fresh: Settings) -> None:
    params = Path("params.yaml")
    params.write_text(params.read_text("utf-8").replace("approval: false", "approval: true"), "utf-8")
    register.run(Settings.load())
    assert aliases(fresh) == {CHALLENGER: "1"}
    for version, name, message in (("9", "Ada", "no version 9"), ("x", "Ada", "no version x"), ("1", " ", "a name")):
        refused = CliRunner().invoke(app, ["approve", version, "--as", name])
        assert (refused.exit_code, type(refused.exception)) == (3, SystemExit)
        assert message in refused.output
        assert "Next: " in refused.output
    assert CliRunner().invoke(app, ["approve", "1"]).exit_code == 2, "no decision without a name"
    done = CliRunner().invoke(app, ["approve", "1", "--as", "Ada", "--reason", "seen the sheet"])
    assert done.exit_code == 0, done.output
    assert ", approval by Ada: seen the sheet" in open_registry(fresh).description("1")
    assert open_registry(fresh).tags("1")["evidence"] in done.output
    assert aliases(fresh) == {CHAMPION: "1"}

    register.run(requiring_approval(judged_under(fresh, finished.passing_policy(limit=-6.0))))
    wrong_version = CliRunner().invoke(app, ["decline", "1", "--as", "Ada"])
    assert "version 2 does" in wrong_version.output
    assert "deleatur approve 2 --as NAME" in wrong_version.output
    assert CliRunner().invoke(app, ["decline", "2", "--as", "Ada", "--reason", "too blurred"]).exit_code == 0
    assert aliases(fresh) == {CHAMPION: "1"}
    assert ", decline by Ada: too blurred" in open_registry(fresh).description("2")


def _forged(name: str, key: str, value: Any) -> Callable[[], None]:
    def forge() -> None:
        path = Path(name)
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {key: value}), "utf-8")

    return forge


def _other_delta() -> None:
    delta = tensors.load_delta(Path("out/delta") / tensors.DELTA_FILE)
    scaled = {n: 2 * t for n, t in delta.tensors.items()}
    tensors.save_delta(
        Path("out/delta") / tensors.DELTA_FILE,
        type(delta)(scaled, delta.base, delta.method, delta.settings, delta.concepts),
    )


@pytest.mark.parametrize(
    ("named", "forge"),
    [
        ("delta", _other_delta),
        ("feedback", _forged("out/feedback/summary.json", "feedback", "0" * 64)),
        ("report", _forged("out/verdict/verdict.json", "report", "0" * 64)),
    ],
)
def test_files_that_the_verdict_is_not_about_are_not_registered(
    fresh: Settings, named: str, forge: Callable[[], None]
) -> None:
    forge()
    with pytest.raises(DataError, match=f"another {named}"):
        register.run(fresh)
    assert counts(fresh) == (0, 0)


def test_stale_results_are_not_registered(done: Settings) -> None:
    params = Path("params.yaml")
    params.write_text(
        params.read_text("utf-8").replace("max_preserved_drop: 10.0", "max_preserved_drop: 11.0"), "utf-8"
    )
    with pytest.raises(DataError, match="erase") as refused:
        register.run(Settings.load())
    assert refused.value.hint == "dvc repro"
