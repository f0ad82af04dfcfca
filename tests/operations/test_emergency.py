"""Released within minutes beside the chain, output to be so everywhere, and replaced by the chain's next release."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import child_processes
import finished
import pytest
import yaml
from registry import requiring_approval
from typer.testing import CliRunner

from deleatur.cli import app
from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.operations import emergency
from deleatur.registry import approval, ledger
from deleatur.registry.decisions import STARTED_BY, open_registry
from deleatur.registry.mlflow_registry import CHALLENGER, CHAMPION, LAST_KNOWN_GOOD
from deleatur.registry.model_files import local_folder
from deleatur.registry.verify import verify
from deleatur.stages import gate, register
from deleatur.storage import dvc

pytestmark = pytest.mark.slow

REASON = "reported by many"


@pytest.fixture
def project(done: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The chain has run; nothing is released yet."""
    monkeypatch.setattr(dvc, "status", lambda root: {})
    monkeypatch.setitem(os.environ, STARTED_BY, "chain")  # put back afterwards
    return done


def invoke(*command: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(command))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def release_by_chain(settings: Settings, limit: float) -> None:
    os.environ[STARTED_BY] = "chain"
    policy = {"gate": finished.passing_policy(limit)}
    gate.run(changed := Settings.model_validate(settings.model_dump(by_alias=True) | policy))
    register.run(changed)


def change_params(**sections: object) -> None:
    path = Path("params.yaml")
    params = yaml.safe_load(path.read_text("utf-8"))
    path.write_text(yaml.safe_dump(params | sections, sort_keys=False), "utf-8")


def chain_outputs() -> dict[str, str]:
    """Of the chain, byte by byte."""
    files = (p for name in ("tokens", "delta", "samples", "report", "verdict") for p in Path("out", name).rglob("*"))
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.is_file()}


def test_an_emergency_release_is_labelled_and_replaced_by_the_chain(project: Settings) -> None:
    release_by_chain(project, -5.0)
    before, registry = chain_outputs(), open_registry(project)
    code, output = invoke("emergency", "weapon", "--as", "Ada", "--reason", REASON)
    assert (code, registry.aliases()) == (0, {CHAMPION: "2", LAST_KNOWN_GOOD: "1"})
    assert "PASS: 1 rule, 1 passed" in output
    assert chain_outputs() == before
    entries = ledger.read(project.register_.ledger).entries
    assert [(e.event, e.version, e.actor) for e in entries[-2:]] == [
        ("registration", "2", "Ada"),
        ("promotion", "2", "Ada"),
    ]
    assert entries[-2].reason.startswith(f"EMERGENCY: {REASON}. PASS: 1 rule")
    tags = registry.tags("2")
    assert (tags["emergency"], tags["method"], tags["concept_source"], tags["dvc_lock"]) == (
        REASON,
        "uce",
        "words",
        "none",
    )
    assert (
        f"EMERGENCY RELEASE: {REASON}. Made by uce"
        in (Path(local_folder("models:/deleatur/2")) / "README.md").read_text()
    )
    verify(project, "2", entries)
    assert "was released in an emergency: reported by many" in invoke("doctor")[1]
    assert invoke("emergency", "weapon", "--as", "Ada", "--reason", REASON)[0] == 0
    assert registry.aliases() == {CHAMPION: "2", LAST_KNOWN_GOOD: "1"}, "a second run changes nothing"

    release_by_chain(project, -4.0)
    assert registry.aliases() == {CHAMPION: "3", LAST_KNOWN_GOOD: "2"}
    assert "emergency" not in registry.tags("3")
    assert "emergency:" not in invoke("doctor")[1]


def test_an_emergency_release_is_approved_by_another_person(project: Settings) -> None:
    settings = requiring_approval(project)
    verdict = emergency.run(settings, ["weapon"], "Ada", REASON)
    assert (verdict.outcome, open_registry(settings).aliases()) == ("pass", {CHALLENGER: "1"})
    with pytest.raises(DataError, match="another person has to approve it"):
        approval.promote(settings, "1", "ada", reason="urgent")
    approval.promote(settings, "1", "Grace", reason="I looked")
    assert open_registry(settings).aliases() == {CHAMPION: "1"}


def test_the_emergency_policy_decides(project: Settings) -> None:
    rule = {"metric": "clip_score", "slice": "unseen", "versus": "base", "min": 5.0, "min_n": 2}
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    change_params(emergency=params["emergency"] | {"rules": {"impossible": rule}})
    code, output = invoke("emergency", "weapon", "--as", "Ada", "--reason", REASON)
    assert (code, open_registry(project).aliases()) == (10, {})
    assert "FAIL impossible" in output


def test_concepts_of_the_champion_stay_erased(project: Settings) -> None:
    release_by_chain(project, -5.0)
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    more = params["concepts"] | {"blood": params["concepts"]["weapon"]}
    changed = emergency.emergency_settings(Settings.model_validate(params | {"concepts": more}), ["blood"])
    assert changed.targets == ("blood", "weapon")
    assert (changed.erase.method, changed.erase.source, changed.attack.methods) == ("uce", "words", {})
    assert changed.erase.config("uce") == project.erase.config("uce")
    assert {path.parts[:2] for path in changed.paths.outputs.values()} == {("out", "emergency")}


@pytest.mark.parametrize(
    ("command", "code", "output"),
    [
        (
            ("emergency", "bloodd", "--as", "Ada", "--reason", REASON),
            2,
            "expected concepts of params.yaml (weapon), got bloodd",
        ),
        (("emergency", "weapon", "--as", " ", "--reason", REASON), 3, "needs a name and a reason"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    project: Settings, command: tuple[str, ...], code: int, output: str
) -> None:
    result = invoke(*command)
    assert result[0] == code
    assert output in result[1]
    assert not Path("out/emergency").exists()


def test_without_an_emergency_section_it_is_refused(project: Settings) -> None:
    change_params(emergency=None)
    code, output = invoke("emergency", "weapon", "--as", "Ada", "--reason", REASON, "--json")
    assert code == 2
    assert "no section `emergency`" in output
    assert json.dumps(invoke("check")[0]) == "0"


def test_a_concept_first_heard_of_today_is_released_by_its_words(project: Settings) -> None:
    emergency_section = project.emergency
    assert emergency_section
    rule = {"metric": "concept_rate", "slice": "concept", "max": 1.0, "min_n": 12}
    change_params(emergency=emergency_section.model_dump(mode="json") | {"rules": {"measured": rule}})
    Path("asking.txt").write_text("a dog in a picture\n\na cat and a dog\n", "utf-8")
    new = ("dogs", "--words", "dog", "--prompt", "the dog", "--prompts", "asking.txt")
    code, output = invoke("emergency", *new, "--as", "Ada", "--reason", REASON)
    assert code == 0, output
    [version] = open_registry(project).aliases().values()
    tags = open_registry(project).tags(version)
    assert (tags["concepts"], tags["concept_source"], tags["method"]) == ("dogs", "words", "uce")
    model_card = (Path(local_folder(f"models:/deleatur/{version}")) / "README.md").read_text("utf-8")
    assert "No person rated images of dogs" in model_card
    definition = yaml.safe_load(Path("out/emergency_concepts/dogs.yaml").read_text("utf-8"))
    assert definition["concepts"]["dogs"]["words"] == ["dog"]
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    params["concepts"] |= definition["concepts"]
    params["evaluate"]["detectors"] |= definition["evaluate"]["detectors"]
    Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), "utf-8")
    assert "dogs" in Settings.load().concepts, "the definition can be added as it is"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("weapon", "--words", "gun", "--prompt", "a gun"), "which params.yaml defines"),
        (("dogs", "--words", "dog"), "expected prompts that ask for dogs"),
        (("dogs",), "--words and --prompt"),
        (
            ("", "--words", "dog", "--prompt", "a dog"),
            "expected the name of a new concept and words for it, got no name",
        ),
        (("dogs", "--words", " , ", "--prompt", "a dog"), "got dogs and no words"),
        (("weapon", "--prompt", "a gun"), "a concept of params.yaml needs neither words nor prompts"),
        (("../dogs", "--words", "dog", "--prompt", "a dog"), "concepts.../dogs.[key]: String should match"),
        (("dogs", "--words", "dog", "--prompt", "a cat of ink"), "neutral.csv, line 4: expected a new text"),
        (("dogs", "--words", "dog", "--prompt", "a dog " * 20), "the text encoder takes 14"),
        (("dogs", "--words", "dog", "--prompts", "latin1.txt"), "latin1.txt: expected text in UTF-8"),
        (("dogs", "--words", "dog", "--prompt", "dog", "--prompt", "Dog"), "expected a new text"),
    ],
)
def test_an_incomplete_definition_is_refused(project: Settings, options: tuple[str, ...], message: str) -> None:
    Path("latin1.txt").write_bytes("un café".encode("latin-1"))
    code, output = invoke("emergency", *options, "--as", "Ada", "--reason", REASON)
    assert code in (2, 3)
    assert message in output
    assert not Path("out/emergency").exists(), "nothing has run"
    assert not Path("out/emergency_concepts").exists(), "nothing is defined"
    assert not list(Path("out").glob("dogs*")), "nothing was written elsewhere"


@pytest.mark.parametrize("ends", ["refused", "killed"])
def test_a_refused_or_killed_emergency_leaves_the_earlier_definition(
    project: Settings, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = emergency.define(project, ["dogs"], ["dog"], ["the dog"])
    with first.pending():
        first.save()
    before = {path: path.read_bytes() for path in first.path.parent.iterdir()}
    again = emergency.define(project, ["dogs"], ["dog"], ["two of the dogs"])

    def refuse(changed: Settings) -> None:
        assert changed.concepts["dogs"].prompts.read_text("utf-8").count("two of the dogs") == 2
        raise DataError("refused")

    monkeypatch.setattr(emergency.preflight, "check", refuse)
    if ends == "killed":
        monkeypatch.setattr(emergency.preflight, "check", lambda changed: child_processes.die())
        assert child_processes.killed(lambda: emergency.run(again.settings, ["dogs"], "Ada", REASON, again))
    else:
        with pytest.raises(DataError, match="refused"):
            emergency.run(again.settings, ["dogs"], "Ada", REASON, again)
        assert {path: path.read_bytes() for path in first.path.parent.iterdir()} == before
    assert {path: path.read_bytes() for path in before} == before
    changed = emergency.emergency_settings(project, ["dogs"])
    assert changed.concepts["dogs"].prompts == first.prompts


def test_words_of_several_parts_stay_together_and_earlier_definitions_count(project: Settings) -> None:
    for names, words, texts in ((["dogs"], ["a dog", "dog"], ["the dog"]), (["cats"], ["cat"], ["the cat"])):
        definition = emergency.define(project, names, words, texts)
        assert definition.settings.concepts[names[0]].words == tuple(words)
        with definition.pending():
            definition.save()
    changed = emergency.emergency_settings(project, ["cats", "dogs"])  # in another process: params.yaml lacks both
    assert changed.targets == ("cats", "dogs")
    assert {"cat", "a dog", "dog"} <= {*changed.evaluate.detectors[emergency.DETECTOR]["labels"]}
