"""Emergency release within minutes: a closed-form edit instead of inversion and training, fewer images, and only the
metrics that the emergency policy needs.

It runs the same stages with the settings and the policy of the section `emergency`, in a folder of its own, so that the
chain's outputs stay as they are. Ledger, registry and model card name it as an emergency release, with the reason. It
is registered, approved and rolled back like any release, and the chain's next release replaces it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from deleatur import stages
from deleatur.artifacts import prompts
from deleatur.config.methods import PLAIN_GUIDE
from deleatur.config.sections import EmergencySection
from deleatur.config.settings import Settings, merged
from deleatur.errors import DataError, SettingsError
from deleatur.operations import preflight
from deleatur.records.report import Verdict
from deleatur.registry.decisions import STARTED_BY, checked_ledger, open_registry
from deleatur.registry.mlflow_registry import CHAMPION
from deleatur.stages import evaluate, gate, register
from deleatur.storage import files, json_records
from deleatur.storage.yaml_files import read_yaml

DETECTOR = "zero_shot"
"""Name of the detector of concepts that are defined on the command line."""

CHAIN_STAGES = ("ingest", "reward", "erase", "attack", "sample")
"""Stages that run as in the chain; `invert`, which takes most of the time, is left out."""


@dataclass(frozen=True)
class Definition:
    """A concept that is defined on the command line.

    Its definition is saved once its erasure has a verdict: a command that is refused or killed leaves the one before.
    """

    settings: Settings
    """With the concept."""
    path: Path
    """File of the definition, to be added to params.yaml."""
    text: str
    prompts: Path
    """File of the prompts. Its name has a digest of its content, so it never replaces another definition's."""
    rows: pd.DataFrame

    @contextmanager
    def pending(self) -> Iterator[None]:
        """Writes the prompts, and removes them again where the block raises before `save`."""
        new = not self.prompts.exists()
        files.write_csv(self.prompts, self.rows)
        try:
            yield
        except BaseException:
            if new and not self._is_saved:
                self.prompts.unlink()
                with suppress(OSError):  # it has other definitions
                    self.prompts.parent.rmdir()
            raise

    def save(self) -> None:
        with files.atomic_write(self.path) as partial:
            partial.write_text(self.text, "utf-8")

    @property
    def _is_saved(self) -> bool:
        return self.path.is_file() and self.path.read_text("utf-8") == self.text


def run(
    settings: Settings, concepts: Sequence[str], actor: str, reason: str, definition: Definition | None = None
) -> Verdict:
    """Erases the concepts, along with those that the champion has erased, judges the result and registers the verdict.

    definition: of a concept that the settings, which are the definition's, have from the command line.

    Raises SettingsError if params.yaml has no section `emergency`, DataError if the name or the reason is blank.
    """
    if not (actor.strip() and reason.strip()):
        raise DataError(
            "an emergency release needs a name and a reason", hint="the same command with --as NAME --reason WHY"
        )
    with definition.pending() if definition else nullcontext():
        changed = emergency_settings(settings, concepts)
        preflight.check(changed)
        os.environ[STARTED_BY] = actor
        for name in CHAIN_STAGES:
            stages.run(name, changed)
        evaluate.run(changed, [note(changed, reason)])
        gate.run(changed)
        if definition:  # before it can be released: later emergencies erase it along
            definition.save()
        register.run(changed, reason)
    return json_records.read(changed.paths.verdict / "verdict.json", Verdict)


def emergency_settings(settings: Settings, concepts: Sequence[str]) -> Settings:
    """The settings with those of the section `emergency` merged in.

    Raises SettingsError if there is no such section, no concept is named, or one is not defined.
    """
    section = settings.emergency
    if section is None:
        raise SettingsError(
            "params.yaml has no section `emergency`, which names the method and the policy of emergency releases",
            hint="add it, see docs/release.md; then: deleatur check",
        )
    if not concepts:
        raise SettingsError(
            f"expected concepts of params.yaml ({', '.join(settings.concepts)}), got none",
            hint="deleatur emergency CONCEPT --as NAME --reason WHY",
        )
    targets = list(dict.fromkeys([*concepts, *_champion_concepts(settings)]))
    settings = _with_earlier_definitions(settings, targets)
    if undefined := [name for name in targets if name not in settings.concepts]:
        raise SettingsError(
            f"expected concepts of params.yaml ({', '.join(settings.concepts)}), got {', '.join(undefined)}",
            hint="the same command with --words and --prompt, or define it in the section `concepts`",
        )
    # As many images of each prompt as the policy needs at least: a new concept has few prompts.
    split = settings.sample.split
    fewest = min(len(prompts.read(settings.concepts[n].prompts, split, n, "concept")) for n in targets)
    least = max((rule.min_n for rule in section.rules.values() if rule.slice.split("/")[0] == "concept"), default=0)
    per_prompt = max(section.images_per_prompt.get("concept", 1), -(-least // fewest))
    changes = {
        "targets": targets,
        "erase": section.erase,
        "guide": {"method": PLAIN_GUIDE},
        "compare": None,
        "sample": {
            "images_per_prompt": {"token": 0, **section.images_per_prompt, "concept": per_prompt},
            "champion": None,
        },
        "paths": {name: section.folder / name for name in settings.paths.outputs},
    }
    values = merged(settings.model_dump(by_alias=True), changes)
    metrics = {rule.metric for rule in section.rules.values()}
    values["evaluate"]["metrics"] = {n: m for n, m in values["evaluate"]["metrics"].items() if n in metrics}
    values |= {"gate": {"rules": section.rules}, "attack": {"methods": {}}, "emergency": None}
    return Settings.of(values, "params.yaml with its section emergency")


def define(settings: Settings, names: Sequence[str], words: Sequence[str], texts: Sequence[str]) -> Definition:
    """Defines a concept, the first of the names, that params.yaml does not define: by words and by prompts that ask
    for it.

    Nobody has rated it and no classifier knows it: CLIP, zero-shot, detects it among the neutral prompts. Raises
    SettingsError for a concept that is defined, and DataError without name, words or prompts.
    """
    if not (names and words):
        raise DataError(
            f"expected the name of a new concept and words for it, got {' '.join(names) or 'no name'} and "
            f"{', '.join(words) or 'no words'}",
            hint="the same command with NAME --words WORD,…; a concept of params.yaml needs neither words nor prompts",
        )
    name = names[0]
    if name in settings.concepts:
        raise SettingsError(
            f"expected the name of a new concept, got {name}, which params.yaml defines",
            hint=f"deleatur emergency {name}, without words and prompts",
        )
    if not texts or settings.emergency is None:
        raise DataError(
            f"expected prompts that ask for {name}, got none",
            hint="the same command with --prompt TEXT or --prompts FILE",
        )
    folder = definitions(settings.emergency)
    rows = [(split, f"{name}-{split}-{i:03d}", text) for split in ("dev", "test") for i, text in enumerate(texts)]
    frame = pd.DataFrame(
        [(row, text, f"{DETECTOR}:{words[0]}", "concept", split) for split, row, text in rows],
        columns=["id", "text", "label", "role", "split"],
    )
    digest = hashlib.sha256(frame.to_csv(index=False).encode("utf-8", "replace")).hexdigest()[:12]
    prompts_file = folder / f"{name}-{digest}.csv"
    concept = {
        "kind": "binary",
        "initializer_token": words[0],
        "words": list(words),
        "guideline": f"Does the image show {' or '.join(words)}?",
        "prompts": str(prompts_file),
        "prompt_templates": ["{}", "a {}"],
        "detection": {"detector": DETECTOR, "labels": list(words)},
    }
    known = settings.evaluate.model_dump(by_alias=True)["detectors"].get(DETECTOR, {"labels": []})
    others = [p.text for p in prompts.evaluation_prompts(settings) if p.text not in words]
    labels = list(dict.fromkeys([*words, *known["labels"], *others]))
    detector = {"method": "zero_shot", "path": settings.reward.clip, "labels": labels}
    definition = {"concepts": {name: concept}, "evaluate": {"detectors": {DETECTOR: detector}}}
    values = _with_definition(settings.model_dump(by_alias=True), definition)
    defined = Settings.of(values, f"the new concept {name}", hint="correct its name, --words and --prompt")
    text = yaml.safe_dump(definition, sort_keys=False, allow_unicode=True)
    # The name is valid: files of the folder may have it.
    return Definition(defined, folder / f"{name}.yaml", text, prompts_file, frame)


def read_prompts(path: Path) -> list[str]:
    """One prompt per line. Raises DataError unless the file is text in UTF-8."""
    try:
        lines = [line.decode("utf-8-sig").strip() for line in files.read_lines(path)]
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: expected text in UTF-8, one prompt per line: {e}", hint="save it as UTF-8") from e
    return [line for line in lines if line]


def _with_earlier_definitions(settings: Settings, names: Sequence[str]) -> Settings:
    """The settings with the concepts that an earlier emergency defined and params.yaml still lacks."""
    assert settings.emergency
    files_ = [definitions(settings.emergency) / f"{name}.yaml" for name in names if name not in settings.concepts]
    values = settings.model_dump(by_alias=True)
    for path in filter(Path.is_file, files_):
        values = _with_definition(values, read_yaml(path))
    return Settings.of(values, "params.yaml with the concepts of earlier emergencies")


def _with_definition(values: Mapping[str, Any], definition: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, unvalidated, with a concept's definition; its zero-shot detector has all labels of both."""
    known = values["evaluate"]["detectors"].get(DETECTOR, {}).get("labels", ())
    labels = [*known, *definition["evaluate"]["detectors"][DETECTOR]["labels"]]
    return merged(
        merged(values, definition),
        {"evaluate": {"detectors": {DETECTOR: {"labels": list(dict.fromkeys(labels))}}}},
    )


def definitions(section: EmergencySection) -> Path:
    """Folder of the concepts defined on the command line; beside the emergency's own, which stages empty."""
    return section.folder.with_name(f"{section.folder.name}_concepts")


def note(settings: Settings, reason: str) -> str:
    """The note that report and model card carry."""
    method, rules = settings.erase.method, ", ".join(settings.gate.rules)
    return (
        f"EMERGENCY RELEASE: {reason}. Made by {method} within minutes, not attacked, judged by the emergency policy "
        f"({rules}). The chain's next release is to replace it."
    )


def _champion_concepts(settings: Settings) -> list[str]:
    """Concepts that the champion has erased, which would be back in a release without them."""
    champion = checked_ledger(settings).aliases.get(CHAMPION)
    return [n for n in open_registry(settings).tags(champion).get("concepts", "").split("+") if n] if champion else []
