"""params.yaml is validated in one pass, hyperparameters of every plug-in included, and one message has all errors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import workspace
import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel, create_model

from deleatur import plugins
from deleatur.config import methods
from deleatur.config.catalogue import hyperparameters
from deleatur.config.descriptions import DescribedJsonSchema, description
from deleatur.config.schema import json_schema
from deleatur.config.sections import RewardSection
from deleatur.config.settings import Settings
from deleatur.errors import SettingsError
from deleatur.feedback.reward import RewardHyperparameters
from deleatur.training.config import PRESETS, TrajectoryTrainingConfig

PARAMS: dict[str, Any] = yaml.safe_load((workspace.ROOT / "params.yaml").read_text("utf-8"))

WRONG: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "a key of the file": (("sed",), 1, "sed: no such key; closest: seed"),
    "a value of a section": (("seed",), "many", "seed: Input should be a valid integer"),
    "of the selected method": (
        ("erase", "sdd", "training", "lr"),
        -1,
        "erase.sdd.training.lr: Input should be",
    ),
    "of a method beside it": (
        ("erase", "uce", "edit", "lam"),
        "x",
        "erase.uce.edit.lam: Input should be a",
    ),
    "an unknown hyperparameter": (
        ("invert", "textual_inversion", "top"),
        1,
        "invert.textual_inversion.top: no such key; expected one of training",
    ),
    "a misspelled key of nested hyperparameters": (
        ("erase", "sdd", "training", "itterations"),
        1,
        "erase.sdd.training.itterations: no such key; closest: iterations",
    ),
    "a misspelled key in a mapping of sections": (
        ("concepts", "weapon", "detection", "label"),
        ["gun"],
        "concepts.weapon.detection.label: no such key; closest: labels",
    ),
    "a misspelled key of an optional section": (("compare", "seed"), [1], "compare.seed: no such key; closest: seeds"),
    "an address with a password": (
        ("workers", "checkpoint_uri"),
        "sftp://me:PW@host/x",
        "workers.checkpoint_uri: expected an address without a password; fsspec and boto3 take it from the "
        "environment (got 'sftp://***@host/x')",
    ),
    "a misspelled key of a rule": (
        ("emergency", "rules", "concept_is_gone", "relativ"),
        "base",
        "emergency.rules.concept_is_gone.relativ: no such key; closest: relative",
    ),
    "a misspelled key of a metric": (
        ("evaluate", "metrics", "clip_score", "prefx"),
        "",
        "evaluate.metrics.clip_score.prefx: no such key; closest: prefix",
    ),
    "a method that does not exist": (("guide", "method"), "shove", "guide.method: expected one of cfg, negative, sega"),
    "hyperparameters of one that does not": (("invert", "hif"), {}, "invert.hif: expected one of hfi"),
    "no mapping": (("erase", "esd"), 3, "erase.esd: expected the hyperparameters of esd"),
    "of an attack": (
        ("attack", "methods", "concept_inversion", "num_attempts"),
        0,
        "concept_inversion.num_attempts: Input",
    ),
    "of a metric": (
        ("evaluate", "metrics", "nudity_s5", "cutoff"),
        7,
        "nudity_s5.cutoff: Input should",
    ),
    "a metric without a method": (
        ("evaluate", "metrics", "mine"),
        {},
        "metrics.mine: expected one of clip",
    ),
    "of one concept": (
        ("concepts", "ink", "invert", "hfi", "num_tokens"),
        -3,
        "ink.invert.hfi.num_tokens: Input",
    ),
    "a rule": (("gate", "rules", "concept_is_gone", "slice"), 3, "gate.rules.concept_is_gone.slice"),
}


CONTRADICTIONS: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "more trained steps than the sampler has": (
        ("erase", "esd", "training", "train_timesteps"),
        9,
        "erase.esd.training: expected train_timesteps, the number of trained steps, up to sampler_steps (8)",
    ),
    "a batch that the pool cannot fill": (
        ("erase", "abo", "training"),
        {"trajectories": "pool", "batch_size": 9, "pool_size": 8},
        "erase.abo.training: expected batch_size up to pool_size (8)",
    ),
}
"""Of two values, which no JSON Schema names."""


def wrong(*names: str) -> dict[str, Any]:
    params = copy.deepcopy(PARAMS)
    for name in names:
        (*parents, key), value, _ = (WRONG | CONTRADICTIONS)[name]
        place = params
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value
    return params


@pytest.mark.parametrize("name", [*WRONG, *CONTRADICTIONS])
def test_each_wrong_value_is_named_with_its_path(name: str) -> None:
    with pytest.raises(SettingsError, match=r"params.yaml has 1 problem\(s\)") as error:
        Settings.of(wrong(name), "params.yaml")
    assert (WRONG | CONTRADICTIONS)[name][2] in str(error.value)


@pytest.mark.parametrize("preset", [*PRESETS, None])
def test_presets_fit_their_own_limits(preset: str | None) -> None:
    config = TrajectoryTrainingConfig(preset=preset)  # type: ignore[arg-type]
    most = config.model_dump(exclude={"preset"}) | {"train_timesteps": config.sampler_steps}
    assert TrajectoryTrainingConfig(**most).trained_steps == config.trained_steps == config.sampler_steps


def test_one_message_has_all_errors() -> None:
    with pytest.raises(SettingsError) as error:
        Settings.of(wrong(*WRONG), "params.yaml")
    assert f"{len(WRONG)} problem(s)" in str(error.value)
    assert not [name for name, (_, _, message) in WRONG.items() if message not in str(error.value)]


def test_a_plug_in_of_another_package_is_validated_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    info = tmp_path / "shaver-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shaver\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[deleatur.erasers]\nshave = deleatur_shave\n")
    source = workspace.ROOT / "docs" / "shave" / "deleatur_shave.py"
    (tmp_path / "deleatur_shave.py").write_text(source.read_text("utf-8"), "utf-8")
    plugins.refresh()
    try:
        params = copy.deepcopy(PARAMS)
        params["erase"] |= {"method": "shave", "shave": {"nothing_of_the_kind": 1}}
        with pytest.raises(SettingsError, match=r"erase.shave.nothing_of_the_kind: no such key"):
            Settings.of(params, "params.yaml")
        params["erase"]["shave"] = {}
        assert type(methods.eraser(Settings.of(params, "params.yaml"))).__module__ == "deleatur_shave"
        assert "shave" in json_schema()["properties"]["erase"]["properties"]
    finally:
        plugins.refresh()


def test_the_schema_accepts_what_settings_accept_and_names_what_they_refuse() -> None:
    validator = Draft202012Validator(json_schema())
    validator.check_schema(validator.schema)
    assert not list(validator.iter_errors(PARAMS))
    for name in WRONG.keys() - {"of one concept", "no mapping", "an address with a password"}:
        assert list(validator.iter_errors(wrong(name))), name


def test_the_schema_explains_every_setting_and_hyperparameter() -> None:
    schema = json_schema()
    sdd = schema["properties"]["erase"]["properties"]["sdd"]["properties"]["training"]["properties"]
    assert set(sdd) == {key.removeprefix("training.") for key in hyperparameters(load("erasers", "sdd")) if "." in key}
    assert sorted(unexplained(schema)) == ["compare", "emergency"], "of these the sections' own values are explained"


def unexplained(schema: Any, place: str = "") -> Iterator[str]:
    """Dotted names of the values without a description."""
    for name, value in schema.get("properties", {}).items():
        if not {"description", "properties", "const"} & value.keys():
            yield f"{place}{name}"
        yield from unexplained(value, f"{place}{name}.")
    nested = [schema.get(key) for key in ("additionalProperties", "items")]
    nested += [option for key in ("oneOf", "anyOf", "allOf") for option in schema.get(key, ())]
    for value in nested:
        if isinstance(value, dict):
            yield from unexplained(value, f"{place}*.")


def test_a_class_without_source_has_no_descriptions() -> None:
    model = create_model("Made", strength=(float, 1.0))
    assert description(model, "strength") == ""
    assert "description" not in model.model_json_schema(schema_generator=DescribedJsonSchema)["properties"]["strength"]


def load(kind: str, name: str) -> type[BaseModel]:
    return plugins.load(kind, name, plugins.base(kind))


def test_hyperparameters_are_declared_once() -> None:
    """A section adds to what the code that uses it declares, and repeats nothing."""
    assert issubclass(RewardSection, RewardHyperparameters)
    assert not RewardHyperparameters.model_fields.keys() & RewardSection.__annotations__.keys()


@pytest.mark.parametrize("change", [lambda p: p["erase"].update(method="esd"), lambda p: p["sample"].update(steps=9)])
def test_what_changes_a_result_changes_the_digest(change: Callable[[dict[str, Any]], None]) -> None:
    params = copy.deepcopy(PARAMS)
    change(params)
    assert Settings.of(params, "a").digest != Settings.of(PARAMS, "b").digest


@pytest.mark.parametrize("section", ["compare", "canary", "workers", "feedback", "emergency", "register", "gate"])
def test_what_changes_no_result_does_not(section: str) -> None:
    params = {
        key: value for key, value in copy.deepcopy(PARAMS).items() if key != section or section in ("register", "gate")
    }
    if section == "register":
        params["register"]["approval"] = True
    if section == "gate":
        params["gate"]["rules"].popitem()
    assert Settings.of(params, "a").digest == Settings.of(PARAMS, "b").digest
