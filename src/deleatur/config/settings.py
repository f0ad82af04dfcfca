"""params.yaml → one frozen, typed `Settings`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, field_validator, model_validator

from deleatur.config.plugin_config import UNKNOWN_KEY, Errors, Section, validate
from deleatur.config.sections import (
    PROJECT_FILES,
    AttackSection,
    BaseSection,
    CanarySection,
    CompareSection,
    ConceptSpec,
    EmergencySection,
    EraseSection,
    EvaluateSection,
    FeedbackSection,
    GateSection,
    GuideSection,
    IngestSection,
    InvertSection,
    Name,
    Paths,
    RegisterSection,
    RewardSection,
    SampleSection,
    WorkersSection,
    is_inside,
)
from deleatur.errors import SettingsError
from deleatur.storage.files import literal_path
from deleatur.storage.yaml_files import nested_mapping, read_yaml

NON_RESULT_SECTIONS = frozenset({"compare", "canary", "emergency", "feedback", "workers"})
"""Sections that no result of the chain depends on."""


class Settings(Section):
    seed: int
    """Of the whole chain; every purpose derives its own seed from it."""
    base: BaseSection
    paths: Paths
    targets: tuple[str, ...]
    """Concepts that this run erases."""
    concepts: dict[Name, ConceptSpec]
    """Name → what it is, and how it is recognised. Others than the targets may stand here too."""
    ingest: IngestSection
    reward: RewardSection
    invert: InvertSection
    erase: EraseSection
    guide: GuideSection
    attack: AttackSection
    sample: SampleSection
    evaluate: EvaluateSection
    gate: GateSection
    register_: RegisterSection = Field(alias="register")  # `register` is a method of every abstract class
    compare: CompareSection | None = None
    canary: CanarySection = CanarySection()
    emergency: EmergencySection | None = None
    feedback: FeedbackSection = FeedbackSection()
    workers: WorkersSection = WorkersSection()

    @property
    def digest(self) -> str:
        """SHA-256 of the given values that can change a result: neither the policy and the registry, which judge and
        release it, nor when, where and on which machines it is computed, nor what it is compared with.
        """
        values = self.model_dump(
            mode="json", exclude={*NON_RESULT_SECTIONS, "gate", "register_", "paths"}, exclude_unset=True
        )
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @model_validator(mode="wrap")
    @classmethod
    def inversion_of_each_concept_is_valid(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """With the concept's own hyperparameters over those of `invert`. Wraps validation: one message has all."""
        errors = Errors(cls)
        settings = errors.collect((), handler, values)
        shared = nested_mapping(values, "invert")
        valid = {name for name in shared if Errors().collect((), validate, "inversion", name, shared[name])}
        for name, spec in nested_mapping(values, "concepts").items():
            for method, config in nested_mapping(spec, "invert").items():
                if method not in shared or method in valid:  # else its errors are reported once, in `invert`
                    both = merged(shared.get(method, {}), config) if isinstance(config, Mapping) else config
                    errors.collect(("concepts", name, "invert", method), validate, "inversion", method, both)
        errors.raise_any("Settings")
        assert settings is not None
        return settings

    @field_validator("targets")
    @classmethod
    def unique_targets(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if not targets or len(set(targets)) < len(targets):
            raise ValueError("name at least one concept to erase, and each once")
        return targets

    @model_validator(mode="after")
    def concepts_are_defined(self) -> Settings:
        named = {"targets": self.targets} | ({"compare.concepts": self.compare.concepts} if self.compare else {})
        for where, names in named.items():
            if unknown := set(names) - set(self.concepts):
                raise ValueError(
                    f"{where} name concepts that are not defined: {', '.join(sorted(unknown))}; "
                    f"expected some of {', '.join(self.concepts)}"
                )
        return self

    @model_validator(mode="after")
    def no_input_is_overwritten(self) -> Settings:
        sources = {f"the source {s} of ingest": literal_path(s) for s in self.ingest.sources}
        prompts = {f"the prompt file of {name}": spec.prompts for name, spec in self.concepts.items()}
        inputs = PROJECT_FILES | sources | prompts
        self.paths.require_apart_from(inputs | {"the ledger (register.ledger)": self.register_.ledger})
        others = {f"paths.{n}": p for n, p in self.paths} | inputs
        folders = {"canary.folder": self.canary.folder}
        folders |= {"compare.folder": self.compare.folder} if self.compare else {}
        folders |= {"emergency.folder": self.emergency.folder} if self.emergency else {}
        for name, folder in folders.items():
            _require_apart(name, folder, others, below=tuple(sources.values()))
        return self

    @classmethod
    def load(cls, path: Path = Path("params.yaml")) -> Settings:
        """Reads and validates a file, the hyperparameters of every plug-in that it names included.

        Raises SettingsError naming the file and each key that is wrong.
        """
        if path.is_dir():
            raise SettingsError(f"expected a YAML file, and {path} is a folder", hint="name the file in it")
        if not path.exists():
            raise SettingsError(f"no {path} here", hint="cd to the project's root (the folder with dvc.yaml)")
        again = "deleatur check" if path == Path("params.yaml") else f"deleatur check --params {path}"
        return cls.of(read_yaml(path, SettingsError, again), str(path), f"correct {path}, then: {again}")

    @classmethod
    def of(cls, values: Any, where: str, hint: str = "deleatur check") -> Settings:
        """Raises SettingsError naming `where` and each key that is wrong."""
        try:
            return cls.model_validate(values)
        except ValidationError as e:
            raise SettingsError(describe_errors(e, where), hint=hint) from e


def _require_apart(name: str, folder: Path, others: Mapping[str, Path], below: Collection[Path]) -> None:
    """A folder whose contents are deleted must neither hold anything else nor be in it, unless it is one of `below`."""
    if not is_inside(folder, Path()):
        raise ValueError(f"{name}: expected a folder of the project, got {folder}")
    for other, path in others.items():
        if is_inside(path, folder) or (path not in below and is_inside(folder, path)):
            raise ValueError(f"{name} is {folder}, and {other} is {path}: keep them apart")


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, mappings merged key by key."""
    out = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if both else value
    return out


def describe_errors(error: ValidationError, where: str) -> str:
    """A pydantic error in lines: key, what is wrong, what was given."""
    lines = [
        f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg'].removeprefix('Value error, ')}{_input(e)}"
        for e in error.errors()
    ]
    return "\n".join([f"{where} has {len(lines)} problem(s):", *lines])


def _input(problem: Any) -> str:
    """Left out where it is a whole section, or where the message is about what is missing or too many."""
    plain = problem["type"] in ("missing", UNKNOWN_KEY) or isinstance(problem["input"], Mapping)
    return "" if plain else f" (got {problem['input']!r})"
