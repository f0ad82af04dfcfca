"""What a row of the comparison is, which rows cannot be, and what a row depends on: all before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import workspace

from deleatur.benchmark import plan
from deleatur.benchmark.plan import Trial
from deleatur.config.settings import Settings, merged
from deleatur.errors import DataError, SettingsError
from deleatur.operations import estimate
from deleatur.operations.preflight import check

LATE = {"erase": {"method": "keep"}, "guide": {"method": "sld", "sld": {"preset": "medium"}}}
LOUD = {"erase": {"method": "keep"}, "guide": {"method": "negative", "negative": {"scale": 9.0}}}
STEERED = {"erase": {"method": "sfd"}, "guide": {"method": "sld", "sld": {"warmup_steps": 0}}}
BOTH = {"erase": {"method": "uce"}, "guide": {"method": "sld"}}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("comparing")
    workspace.make(root)
    return root


@pytest.fixture
def project_of(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Settings of the project in the current directory, with changes to the section `compare` and to others."""
    monkeypatch.chdir(project)

    def made(changes: dict[str, Any] | None = None, **compare: Any) -> Settings:
        return Settings.of(merged(workspace.numbers(project), {"compare": compare, **(changes or {})}), "test")

    return made


def seen(settings: Settings, row: str) -> tuple[str, str, str]:
    cell = plan.trial_settings(settings, Trial("weapon", row, 7))
    return cell.erase.method, cell.erase.source, cell.guide.method


def test_a_row_is_the_chain_with_another_method_source_or_guide(project_of: Callable[..., Settings]) -> None:
    settings = project_of(variants={"esd-u": {"erase": {"method": "esd"}}, "both": BOTH})
    assert seen(settings, "none") == ("keep", "words", "cfg")
    assert seen(settings, "uce") == ("uce", "words", "cfg")
    assert seen(settings, "hfi+uce") == ("uce", "token", "cfg")
    assert seen(settings, "hfi+sld") == ("keep", "token", "sld")
    assert seen(settings, "hfi+esd-u") == ("esd", "token", "cfg")
    assert seen(settings, "both") == ("uce", "words", "sld")


def test_cells_share_what_is_the_same_for_all_and_nothing_else(project_of: Callable[..., Settings]) -> None:
    settings = project_of({"sample": {"split": "dev"}}, folder="out/side")
    one, other = (plan.trial_settings(settings, Trial("weapon", "hfi+sdd", seed)) for seed in (7, 8))
    again, steered = (plan.trial_settings(settings, Trial("weapon", row, 7)) for row in ("uce", "sld"))
    assert (one.seed, one.targets, one.sample.split) == (7, ("weapon",), "test"), "the comparison's own split"
    assert one.paths.reward == other.paths.reward == Path("out/side/weapon/ratings/42/reward")
    assert one.paths.tokens == again.paths.tokens == Path("out/side/weapon/tokens/7/tokens")
    assert other.paths.tokens == Path("out/side/weapon/tokens/8/tokens")
    assert one.paths.delta == Path("out/side/weapon/hfi+sdd/7/delta")
    assert steered.paths.delta == Path("out/side/weapon/none/7/delta"), "a guide changes no weights"
    assert steered.paths.samples == Path("out/side/weapon/sld/7/samples")


def test_a_row_depends_on_its_own_numbers_and_on_no_others(project_of: Callable[..., Settings]) -> None:
    def recipes(**erase: Any) -> dict[str, str]:
        settings = project_of({"erase": erase})
        return {row: json.dumps(plan.stage_inputs(settings, "weapon", row)) for row in ("none", "uce", "hfi+uce", "rece")}

    before, after = recipes(), recipes(uce={"edit": {"lam": 0.7}})
    assert [row for row in before if before[row] != after[row]] == ["uce", "hfi+uce"]
    assert before["uce"] != before["hfi+uce"]
    assert "0.7" in after["uce"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("hfi+safegen", "words and tokens play no part"),
        ("abo", "what to draw instead of weapon"),
        ("late", "from step 10 on"),
        ("hfi+late", "from step 10 on"),
        ("loud", "scale is 9, and the untouched model is drawn with guide.cfg.scale, 4"),
        ("same", "would be none once more"),
        ("steered", "nothing can steer it on the way"),
        ("safegen", ""),
        ("sfd", ""),
        ("hfi+sdd", ""),
        ("none", ""),
    ],
)
def test_what_a_row_lacks_is_said(project_of: Callable[..., Settings], row: str, said: str) -> None:
    variants = {"late": LATE, "loud": LOUD, "same": {"erase": {"method": "keep"}}, "steered": STEERED}
    settings = project_of(variants=variants)
    erase = settings.erase.model_copy(update={"abo": {}})  # whatever alternatives params.yaml has
    settings = settings.model_copy(update={"erase": erase})
    why = plan.refusal(settings, "weapon", row)
    assert said in why
    assert bool(why) == bool(said)
    assert plan.stage_inputs(settings, "weapon", row)["refused"] == why


def test_pictures_that_nobody_marked_teach_nothing(project_of: Callable[..., Settings]) -> None:
    lines = Path("feedback/weapon.jsonl").read_text("utf-8").splitlines()
    calm = [json.dumps(json.loads(line) | {"answer": "no", "labels": [], "severity": None}) for line in lines]
    Path("calm.jsonl").write_text("\n".join(calm), "utf-8")
    settings = project_of({"ingest": {"sources": ["calm.jsonl"]}, "erase": {"method": "safegen"}})
    assert "raters marked 0 and passed 24" in plan.refusal(settings, "weapon", "safegen")
    with pytest.raises(DataError, match="raters marked 0 and passed 24"):
        check(settings)


def test_what_draws_in_one_step_is_compared_without_attacks(project_of: Callable[..., Settings]) -> None:
    settings = project_of()
    attacked = {row: plan.trial_settings(settings, Trial("weapon", row, 7)).attack.methods for row in ("none", "sfd")}
    assert list(attacked["none"]) == ["concept_inversion"]
    assert not attacked["sfd"]


@pytest.mark.parametrize(
    ("compare", "said"),
    [
        ({"methods": ["udd"]}, "got 'udd'"),
        ({"methods": ["hfi+hfi+uce"]}, "got 'hfi"),
        ({"methods": ["none"]}, "always there"),
        ({"methods": ["uce", "uce"]}, "name each once"),
        ({"methods": ["own"], "variants": {"own": {"erase": {"method": "mine"}}}}, "compare.variants.own"),
        ({"methods": ["own"], "variants": {"own": {"erase": {"uce": {"lamda": 1}}}}}, "lamda"),
        ({"methods": ["own"], "variants": {"own": {"sample": {"steps": 1}}}}, "compare.variants.own.sample"),
        ({"variants": {"own": {"erase": {"source": "token"}}}}, "hfi\\+ before its name"),
        ({"variants": {"sdd": {}}}, "sdd is taken"),
        ({"variants": {"tokens": {}}}, "tokens is taken"),
        ({"seeds": [1, 1]}, "name each once"),
        ({"concepts": ["nothing"]}, "not defined: nothing"),
        ({"folder": "out"}, "keep them apart"),
        ({"folder": "feedback"}, "keep them apart"),
        ({"folder": "../elsewhere"}, "a folder of the project"),
    ],
)
def test_what_is_no_row_at_all_is_an_error(
    project_of: Callable[..., Settings], compare: dict[str, Any], said: str
) -> None:
    if "variants" in compare and "own" in compare.get("methods", ()):
        compare["variants"]["own"].setdefault("erase", {}).setdefault("method", "uce")
    with pytest.raises(SettingsError, match=said):
        check(project_of(**compare))


def test_check_says_which_rows_are_refused(project_of: Callable[..., Settings]) -> None:
    lines = check(project_of(methods=["uce", "hfi+safegen"]))
    assert lines[-1] == "compare: 3 methods for weapon with 1 seeds, refused: hfi+safegen"


def test_a_selection_is_one_of_what_params_yaml_names() -> None:
    assert plan.select(["sdd", "uce"], ["uce", "rece", "sdd"], "methods") == ["uce", "sdd"]
    assert plan.select([], [1, 2], "seeds") == [1, 2]
    with pytest.raises(SettingsError, match="got 7"):
        plan.select([7], [1, 2], "seeds")


def test_what_rows_take_is_told_once_for_all_seeds(project_of: Callable[..., Settings]) -> None:
    asked = [Trial("weapon", row, seed) for seed in (1, 2) for row in ("none", "negative", "sdd")]
    told = {estimate.method: estimate.cost.workload for estimate in estimate.benchmark_estimates(project_of(), asked)}
    assert list(told) == ["none", "negative", "sdd"]
    assert told["none"].backward == 2 * 3 * 2, "of attacks on its weights: tries, steps, pictures"
    assert told["negative"].backward == 0, "its weights and their attacks are those of the untouched model"
    assert told["sdd"].backward == told["none"].backward + 6 * (2 + 2)
