"""A prompt is one piece of evidence, however often it is listed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import workspace
import yaml

from deleatur import stages
from deleatur.artifacts import prompts
from deleatur.config.settings import Settings
from deleatur.errors import DataError, SettingsError
from deleatur.evaluation.probe import EVAL_PROMPTS
from deleatur.operations.preflight import check


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    return workspace.create(tmp_path)


def append(path: str, line: str) -> int:
    """Returns the line number."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    return len(Path(path).read_text("utf-8").splitlines())


REPEATED = [
    ("prompts/weapon.csv", "w-test-0,a gun,judge:gun,concept,test", "id"),
    ("prompts/weapon.csv", "another,a gun,judge:gun,concept,test", "text"),
    ("prompts/weapon.csv", "another, A  Gun ,judge:gun,neighbour,test", "text"),
    ("prompts/neutral.csv", "another,a gun,judge:gun,unseen,test", "text"),
    ("prompts/neutral.csv", "w-test-0,a style,judge:gun,unseen,test", "id"),
]


@pytest.mark.parametrize(("path", "line", "field"), REPEATED)
def test_a_repeated_prompt_is_refused_with_both_lines(settings: Settings, path: str, line: str, field: str) -> None:
    number = append(path, line)
    for refused in (lambda: check(settings), lambda: prompts.read_all(settings, "test")):
        with pytest.raises(DataError, match=f"expected a new {field}") as raised:
            refused()
        assert f"{path}, line {number}: " in str(raised.value)
        assert "prompts/weapon.csv, line 5" in str(raised.value)


@pytest.mark.parametrize(
    ("path", "line", "message"),
    [
        ("prompts/weapon.csv", "x,a sword of ink,judge:gun,concept,tset", "split 'tset' is none of dev, test, proof"),
        ("prompts/weapon.csv", "x,a sword of ink,judge:gun,token,test", "role 'token' is none of concept, neighbour"),
        ("prompts/weapon.csv", "x,a sword of ink,judge:gun,attack,test", "role 'attack' is none of"),
        ("prompts/neutral.csv", "x,a sword of ink,judge:gun,concept,test", "role 'concept' is none of neighbour, keep"),
        ("prompts/neutral.csv", "x, ,judge:cat,unseen,test", "expected its text, got ' '"),
        ("prompts/weapon.csv", ",a sword of ink,judge:gun,concept,test", "expected its id, got ''"),
    ],
)
def test_a_row_that_would_count_elsewhere_or_nowhere_is_refused(
    settings: Settings, path: str, line: str, message: str
) -> None:
    number = append(path, line)
    with pytest.raises(DataError, match=rf"{path}, line {number}: {re.escape(message)}"):
        check(settings)


def test_an_unseen_prompt_that_training_preserves_is_refused_with_both_lines(settings: Settings) -> None:
    kept = append("prompts/neutral.csv", "k,A  cat of dog,judge:cat,keep,dev")
    unseen = append("prompts/neutral.csv", "u,a cat of dog,judge:cat,unseen,test")
    with pytest.raises(DataError, match=rf"neutral.csv, line {unseen}: expected an unseen .*neutral.csv, line {kept}:"):
        check(settings)


def test_sampling_refuses_a_prompt_that_two_files_share(settings: Settings) -> None:
    append("prompts/neutral.csv", "another,a gun,judge:gun,unseen,test")
    with pytest.raises(DataError, match="expected a new text"):
        stages.run("evaluate", settings)


def test_the_same_prompt_in_another_split_is_accepted(settings: Settings) -> None:
    before = prompts.read_all(settings, "test")
    append("prompts/weapon.csv", "w-proof-0,a gun,judge:gun,concept,proof")
    assert prompts.read_all(settings, "test") == before


@pytest.mark.parametrize("changes", [{"words": ["gun", "sword", " Gun"]}, {"prompt_templates": ["a {}", "a {}"]}])
def test_words_and_templates_are_listed_once(settings: Settings, changes: dict[str, Any]) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    params["concepts"]["weapon"] |= changes
    Path("params.yaml").write_text(yaml.safe_dump(params), "utf-8")
    with pytest.raises(SettingsError, match="more than once"):
        Settings.load()


def test_the_prompts_of_this_repository_are_distinct() -> None:
    settings = Settings.load(workspace.ROOT / "params.yaml")
    for split in ("dev", "test", "proof"):
        sources = {"": settings.paths.prompts} | {name: spec.prompts for name, spec in settings.concepts.items()}
        read = (prompts.read(workspace.ROOT / path, split, concept) for concept, path in sources.items())
        texts = [prompt.text for of_file in read for prompt in of_file]
        assert len(texts) == len(set(texts))


@pytest.mark.parametrize("concept", ["weapon", "vice", "ink"])
def test_prompts_of_an_evaluation_are_distinct_and_of_all_kinds(concept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace.ROOT)
    settings = Settings.load().model_copy(update={"targets": (concept,)})
    dev = {p.text: p for p in prompts.read_all(settings, "dev")}
    preserved = [dev[text] for text in prompts.preserved_validation_prompts(settings, EVAL_PROMPTS)]
    requested = [dev[text] for text in prompts.validation_prompts(settings, concept, EVAL_PROMPTS)]
    assert len({p.text for p in preserved}) == EVAL_PROMPTS
    neighbours = [p for p in preserved if p.role == "neighbour"]
    available = [p for p in dev.values() if p.role == "neighbour"]
    assert len(neighbours) == min(EVAL_PROMPTS // 2, len(available))
    assert len({p.label for p in neighbours}) == min(len(neighbours), len({p.label for p in available}))
    concept_labels = {p.label for p in dev.values() if p.role == "concept"}
    assert len({p.label for p in requested}) == min(len(requested), len(concept_labels))
