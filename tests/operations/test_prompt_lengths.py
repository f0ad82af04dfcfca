"""`deleatur check` refuses every text that the text encoder could not take, by its place, before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import tiny
import workspace

from deleatur.config.settings import Settings, merged
from deleatur.diffusion.clip import load_clip
from deleatur.diffusion.pipelines import TextLimits
from deleatur.errors import DataError
from deleatur.operations.preflight import check

BUILT_IN = Path(__file__).parents[2] / "models" / "pipeline"
LONG = " ".join(["gun"] * 90)


@pytest.mark.parametrize("texts", [["a gun", "A  GUN, in ink style!", "", "kühl 猫 zzzz"]])
def test_lengths_are_those_of_the_pipelines_own_tokenizer(tmp_path: Path, texts: list[str]) -> None:
    from transformers import CLIPTokenizer

    for folder in (BUILT_IN, tiny.save_pipeline(tmp_path)):
        tokenizer, limits = CLIPTokenizer.from_pretrained(folder / "tokenizer"), TextLimits.from_folder(folder)
        for text in [*texts, LONG]:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert limits.tokenizer(text, add_special_tokens=False).input_ids == ids
    assert TextLimits.from_folder(BUILT_IN).max_tokens == 24


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"words": ["gun", LONG]}, r"concepts\.weapon\.words"),
        ({"prompt_templates": ["{}", f"{LONG} {{}}"]}, r"concepts\.weapon\.words, prompt_templates"),
    ],
)
def test_a_concept_that_is_too_long_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    values = workspace.small_params(tmp_path)
    check(workspace.create(tmp_path, **values))
    values["concepts"]["weapon"] |= changes
    with pytest.raises(DataError, match=place):
        check(workspace.create(tmp_path, **values))


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_prompt_that_is_too_long_is_refused_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = workspace.create(tmp_path, **workspace.small_params(tmp_path))
    with settings.concepts["weapon"].prompts.open("a") as file:
        file.write(f"too-long,{LONG},judge:gun,concept,{split}\n")
    with pytest.raises(DataError, match=r"weapon\.csv, prompt too-long: .* tokens; the text encoder takes"):
        check(settings)


def test_all_words_in_one_prompt_have_to_fit_where_the_eraser_joins_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = workspace.small_params(tmp_path)
    words = [f"gun sword {'cat ' * i}dog" for i in range(9)]
    values["concepts"]["weapon"] |= {"words": words, "prompt_templates": ["a {}"]}
    values["erase"] |= {"method": "sdd", "source": "words"}
    values["erase"]["sdd"]["order"] = "single"
    check(workspace.create(tmp_path, **values))
    values["erase"]["sdd"]["order"] = "paper"
    with pytest.raises(DataError, match=r"erase\.sdd\.order paper, all words or tokens in one prompt: "):
        check(workspace.create(tmp_path, **values))


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"erase": {"uce": {"alternatives": {"weapon": LONG}}}}, r"^emergency: erase\.uce\.alternatives\.weapon: "),
        (
            {"erase": {"uce": {"alternatives": {"weapon": LONG}}}, "emergency": None},
            r"^compare, uce: erase\.uce\.alternatives\.weapon: ",
        ),
        (
            {"attack": {"methods": {"concept_inversion": {"training": {"num_vectors": 20}}}}},
            r"^attack\.methods\.concept_inversion with concepts\.weapon\.learnable_property: ",
        ),
        (
            {"concepts": {"weapon": {"learnable_property": "style"}}},
            r"^invert with concepts\.weapon\.learnable_property, for an image rated with the prompt 'gun gun",
        ),
    ],
)
def test_a_text_that_only_another_command_or_stage_encodes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = workspace.create(tmp_path)
    source = Path("feedback/weapon.jsonl")
    source.write_text(source.read_text("utf-8").replace('"prompt":"a gun"', f'"prompt":"{LONG}"'), "utf-8")
    check(settings)  # of an object, the prompts of rated images are not encoded
    with pytest.raises(DataError, match=place):
        check(Settings.of(merged(settings.model_dump(by_alias=True, exclude_unset=True), changes), "test"))


def test_a_check_imports_no_library_that_only_stages_need() -> None:
    """Each takes about as long to import as the checks themselves."""
    code = (
        "import sys; from deleatur.config.settings import Settings; from deleatur.operations import preflight; "
        "preflight.check(Settings.load()); print(*sys.modules)"
    )
    root = BUILT_IN.parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    slow = {"sklearn", "scipy.stats", "mlflow", "great_expectations", "transformers.models", "diffusers.models.unets"}
    assert loaded & slow == set()


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({}, ""),
        (
            {"zero_shot": {"labels": ["gun", LONG]}},
            r"^evaluate\.detectors\.zero_shot\.labels: .* has 90 tokens; .* takes 6$",
        ),
        (
            {"clip_score": {"prefix": "a picture of a thing of "}},
            r"^evaluate\.metrics\.clip_score, .*, prompt w-dev-2: ",
        ),
        ({"words": ["gun", "a gun of a thing of ink"]}, r"^reward\.clip, concepts\.weapon\.words: "),
    ],
)
def test_a_text_that_clip_would_truncate_is_refused(project: Settings, changes: dict[str, Any], place: str) -> None:
    values = project.model_dump(by_alias=True, exclude_unset=True)
    detector = {"method": "zero_shot", "path": "models/clip", "labels": ["gun", "cat"]} | changes.get("zero_shot", {})
    values["evaluate"]["detectors"]["zero_shot"] = detector
    values["evaluate"]["metrics"]["clip_score"] |= changes.get("clip_score", {})
    values["concepts"]["weapon"] |= {"words": changes.get("words", ["gun"]), "prompt_templates": ["a {}"]}
    settings = Settings.of(values, "test")
    if not place:
        check(settings)
        return
    with pytest.raises(DataError, match=place):
        check(settings)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """With a CLIP whose text encoder takes 6 tokens, where the pipeline's takes 14; as the current directory."""
    root = tmp_path_factory.mktemp("short")
    with chdir(root):
        settings = workspace.create(root)
        config = Path("models/clip/config.json")
        values = json.loads(config.read_text("utf-8"))
        values["text_config"]["max_position_embeddings"] = 8
        config.write_text(json.dumps(values), "utf-8")
        yield settings


def test_clip_truncates_no_text(tmp_path: Path) -> None:
    clip = load_clip(str(tiny.save_clip(tmp_path)), "cpu")
    fits = " ".join(["gun"] * (tiny.LENGTH - 2))
    assert clip.embed_texts([fits]).shape == (1, 8)
    with pytest.raises(DataError, match=f"has {tiny.LENGTH - 1} tokens; the text encoder takes {tiny.LENGTH - 2}"):
        clip.embed_texts(["gun", f"{fits} gun"])
