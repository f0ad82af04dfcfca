"""Rows of the benchmark: their settings and what they depend on, and which are refused, before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import workspace

from deleatur.benchmark import plan
from deleatur.benchmark.digests import TrialDigests
from deleatur.benchmark.plan import Trial
from deleatur.benchmark.trial import is_done, read_summary, run_trial
from deleatur.config.settings import Settings, merged
from deleatur.errors import DataError, SettingsError
from deleatur.operations import estimate
from deleatur.operations.preflight import check
from deleatur.storage import files

LATE = {"erase": {"method": "keep"}, "guide": {"method": "sld", "sld": {"preset": "medium"}}}
LOUD = {"erase": {"method": "keep"}, "guide": {"method": "negative", "negative": {"scale": 9.0}}}
STEERED = {"erase": {"method": "sfd"}, "guide": {"method": "sld", "sld": {"warmup_steps": 0}}}
BOTH = {"erase": {"method": "uce"}, "guide": {"method": "sld"}}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("comparing")
    workspace.create(root)
    return root


@pytest.fixture
def project_of(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Settings of the project in the current directory, with changes to the section `compare` and to others."""
    monkeypatch.chdir(project)

    def build(changes: dict[str, Any] | None = None, **compare: Any) -> Settings:
        return Settings.of(merged(workspace.small_params(project), {"compare": compare, **(changes or {})}), "test")

    return build


def methods_of(settings: Settings, row: str) -> tuple[str, str, str]:
    trial = plan.trial_settings(settings, Trial("weapon", row, 7))
    return trial.erase.method, trial.erase.source, trial.guide.method


def test_a_row_is_the_pipeline_with_another_method_source_or_guide(project_of: Callable[..., Settings]) -> None:
    settings = project_of(overrides={"esd-u": {"erase": {"method": "esd"}}, "both": BOTH})
    assert methods_of(settings, "none") == ("keep", "words", "cfg")
    assert methods_of(settings, "uce") == ("uce", "words", "cfg")
    assert methods_of(settings, "hfi+uce") == ("uce", "token", "cfg")
    assert methods_of(settings, "hfi+sld") == ("keep", "token", "sld")
    assert methods_of(settings, "hfi+esd-u") == ("esd", "token", "cfg")
    assert methods_of(settings, "both") == ("uce", "words", "sld")


def test_trials_share_ratings_and_tokens_and_nothing_else(project_of: Callable[..., Settings]) -> None:
    settings = project_of({"sample": {"split": "dev"}}, folder="out/side")
    one, other = (plan.trial_settings(settings, Trial("weapon", "hfi+sdd", seed)) for seed in (7, 8))
    again, steered = (plan.trial_settings(settings, Trial("weapon", row, 7)) for row in ("uce", "sld"))
    assert (one.seed, one.targets, one.sample.split) == (7, ("weapon",), "test"), "the benchmark's own split"
    assert one.paths.reward == other.paths.reward == Path("out/side/weapon/ratings/42/reward")
    assert one.paths.tokens == again.paths.tokens == Path("out/side/weapon/tokens/7/tokens")
    assert other.paths.tokens == Path("out/side/weapon/tokens/8/tokens")
    assert one.paths.delta == Path("out/side/weapon/hfi+sdd/7/delta")
    assert steered.paths.delta == Path("out/side/weapon/none/7/delta"), "a guide changes no weights"
    assert steered.paths.samples == Path("out/side/weapon/sld/7/samples")


def test_a_row_depends_on_its_own_hyperparameters_and_on_no_others(project_of: Callable[..., Settings]) -> None:
    def inputs(**erase: Any) -> dict[str, str]:
        settings = project_of({"erase": erase})
        return {
            row: json.dumps(plan.stage_inputs(settings, "weapon", row)) for row in ("none", "uce", "hfi+uce", "rece")
        }

    before, after = inputs(), inputs(uce={"edit": {"lam": 0.7}})
    assert [row for row in before if before[row] != after[row]] == ["uce", "hfi+uce"]
    assert before["uce"] != before["hfi+uce"]
    assert "0.7" in after["uce"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("hfi+safegen", "uses neither words nor tokens"),
        ("abo", "expected an alternative to weapon"),
        ("late", "from step 10 on"),
        ("hfi+late", "from step 10 on"),
        ("loud", "scale is 9, but the base model is sampled with guide.cfg.scale 4"),
        ("same", "it changes nothing: it is none"),
        ("steered", "which no guide can steer"),
        ("safegen", ""),
        ("sfd", ""),
        ("hfi+sdd", ""),
        ("none", ""),
    ],
)
def test_a_refusal_has_a_reason(project_of: Callable[..., Settings], row: str, reason: str) -> None:
    overrides = {"late": LATE, "loud": LOUD, "same": {"erase": {"method": "keep"}}, "steered": STEERED}
    settings = project_of(overrides=overrides)
    erase = settings.erase.model_copy(update={"abo": {}})  # whatever alternatives params.yaml has
    settings = settings.model_copy(update={"erase": erase})
    refusal = plan.refusal(settings, "weapon", row)
    assert reason in refusal
    assert bool(refusal) == bool(reason)
    assert plan.stage_inputs(settings, "weapon", row)["refused"] == refusal


def test_images_without_positive_ratings_cannot_be_learned_from(project_of: Callable[..., Settings]) -> None:
    lines = Path("feedback/weapon.jsonl").read_text("utf-8").splitlines()
    calm = [json.dumps(json.loads(line) | {"answer": "no", "labels": [], "severity": None}) for line in lines]
    Path("calm.jsonl").write_text("\n".join(calm), "utf-8")
    settings = project_of({"ingest": {"sources": ["calm.jsonl"]}, "erase": {"method": "safegen"}})
    assert "got 0 positive and 24 negative" in plan.refusal(settings, "weapon", "safegen")
    with pytest.raises(DataError, match="got 0 positive and 24 negative"):
        check(settings)


UNRATED = {"ingest": {"sources": ["none/*.jsonl"]}, "erase": {"source": "words"}}


def test_words_alone_are_compared_where_nobody_rated(project_of: Callable[..., Settings]) -> None:
    settings = project_of(UNRATED, methods=["uce", "negative", "hfi+uce", "hfi+negative"])
    digests = TrialDigests(settings)
    for row, refused in {"none": False, "uce": False, "negative": False, "hfi+uce": True, "hfi+negative": True}.items():
        assert bool(digests.refusal(Trial("weapon", row, 7))) == refused
    assert "got none" in digests.refusal(Trial("weapon", "hfi+uce", 7))
    assert list(digests.of_trial(Trial("weapon", "uce", 7))) == ["erase", "attack", "sample", "evaluate"]
    assert check(settings)[-1].endswith("refused: hfi+uce, hfi+negative")


def test_a_trial_without_a_token_is_refused_with_the_reason_of_the_reward_model(
    project_of: Callable[..., Settings],
) -> None:
    settings, trial = project_of(), Trial("weapon", "hfi+uce", 7)
    digests, paths = TrialDigests(settings), plan.trial_settings(settings, trial).paths
    assert not digests.refusal(trial)
    files.write_json(paths.reward / "metrics.json", {"weapon": "skipped: answers of one rater"})
    run_trial(settings, digests, trial)
    assert read_summary(settings, trial).refused == "no token was learned: skipped: answers of one rater"
    assert is_done(settings, digests, trial)


def test_a_one_step_sampler_is_compared_without_attacks(project_of: Callable[..., Settings]) -> None:
    settings = project_of()
    attacked = {row: plan.trial_settings(settings, Trial("weapon", row, 7)).attack.methods for row in ("none", "sfd")}
    assert list(attacked["none"]) == ["concept_inversion"]
    assert not attacked["sfd"]


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"methods": ["udd"]}, "got 'udd'"),
        ({"methods": ["hfi+hfi+uce"]}, "got 'hfi"),
        ({"methods": ["none"]}, "always included"),
        ({"methods": ["uce", "uce"]}, "name each once"),
        ({"methods": ["own"], "overrides": {"own": {"erase": {"method": "mine"}}}}, "compare.overrides.own"),
        ({"methods": ["own"], "overrides": {"own": {"erase": {"uce": {"lamda": 1}}}}}, "lamda"),
        ({"methods": ["own"], "overrides": {"own": {"sample": {"steps": 1}}}}, "compare.overrides.own.sample"),
        ({"overrides": {"own": {"erase": {"source": "token"}}}}, "where its name begins with hfi"),
        ({"overrides": {"sdd": {}}}, "the name sdd is taken"),
        ({"overrides": {"tokens": {}}}, "the name tokens is taken"),
        ({"seeds": [1, 1]}, "name each once"),
        ({"concepts": ["nothing"]}, "not defined: nothing"),
        ({"folder": "out"}, "keep them apart"),
        ({"folder": "feedback"}, "keep them apart"),
        ({"folder": "../elsewhere"}, "a folder of the project"),
    ],
)
def test_an_invalid_section_is_an_error(
    project_of: Callable[..., Settings], compare: dict[str, Any], message: str
) -> None:
    if "overrides" in compare and "own" in compare.get("methods", ()):
        compare["overrides"]["own"].setdefault("erase", {}).setdefault("method", "uce")
    with pytest.raises(SettingsError, match=message):
        check(project_of(**compare))


def test_check_names_refused_rows(project_of: Callable[..., Settings]) -> None:
    lines = check(project_of(methods=["uce", "hfi+safegen"]))
    assert lines[-1] == "compare: 3 methods for weapon with 1 seeds, refused: hfi+safegen"


def test_only_what_params_yaml_names_can_be_selected() -> None:
    assert plan.select(["sdd", "uce"], ["uce", "rece", "sdd"], "methods") == ["uce", "sdd"]
    assert plan.select([], [1, 2], "seeds") == [1, 2]
    with pytest.raises(SettingsError, match="got 7"):
        plan.select([7], [1, 2], "seeds")


def test_estimates_of_rows_are_given_once_for_all_seeds(project_of: Callable[..., Settings]) -> None:
    trials = [Trial("weapon", row, seed) for seed in (1, 2) for row in ("none", "negative", "sdd")]
    workloads = {e.method: e.cost.workload for e in estimate.benchmark_estimates(project_of(), trials)}
    assert list(workloads) == ["none", "negative", "sdd"]
    assert workloads["none"].backward == 2 * 3 * 2, "of the attacks on its weights: attempts × steps × images"
    assert workloads["negative"].backward == 0, "it has the base model's weights, and the attacks on them"
    assert workloads["sdd"].backward == workloads["none"].backward + 6 * (2 + 2)
