"""What every plug-in has in common, whatever its kind."""

from __future__ import annotations

from pathlib import Path

from deleatur import plugins
from deleatur.config.catalogue import catalogue


def test_every_plugin_names_its_source_and_explains_its_hyperparameters() -> None:
    for kind, methods in catalogue(None).items():
        assert set(methods) == set(plugins.names(kind)), kind
        assert all(m["source"] for m in methods.values())
        unexplained = [
            (method, name)
            for method, entry in methods.items()
            for name, hyperparameter in entry["hyperparameters"].items()
            if not hyperparameter["meaning"]
        ]
        assert not unexplained


def test_plugins_of_one_kind_never_import_each_other() -> None:
    for kind in plugins.KINDS:
        for file in (Path(plugins.__file__).parent / kind).glob("*.py"):
            text = file.read_text("utf-8")
            others = [n for n in plugins.names(kind) if n != file.stem]
            assert not [n for n in others if f"deleatur.{kind}.{n}" in text], file.name
