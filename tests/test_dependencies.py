"""A stage's digest covers the code that it executes, as traced on real runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import loaded_once
import pytest
import workspace
import yaml

from deleatur import dependencies, stages
from deleatur.config.settings import Settings
from deleatur.dependencies import PACKAGE, STAGES, Definition


@contextmanager
def executed() -> Iterator[set[CodeType]]:
    """Collects the code of the package that runs inside."""
    codes: set[CodeType] = set()

    def record(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            codes.add(frame.f_code)

    sys.setprofile(record)
    try:
        yield codes
    finally:
        sys.setprofile(None)


def definition(code: CodeType) -> Definition:
    parts = Path(code.co_filename).relative_to(PACKAGE.parent).with_suffix("").parts
    module = ".".join(parts).removesuffix(".__init__")
    outermost = code.co_qualname.partition(".")[0]
    return module, "" if outermost.startswith("<") else outermost


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_digest_covers_every_function_that_it_executes(done: Settings, stage: str) -> None:
    for cached in {"sample": ["out/samples", "out/scores"], "evaluate": ["out/scores"]}.get(stage, []):
        shutil.rmtree(cached, ignore_errors=True)  # so that nothing is read from a cache
    loaded_once.LOADED.clear()
    with executed() as codes:
        stages.run(stage, done)
    run = {definition(code) for code in codes}
    params = done.model_dump(by_alias=True)
    reached, _ = dependencies.reachable(stage, params)
    # Templates, and modules that MLflow loads by path, are digested as files.
    files = {
        Path(name).with_suffix("").as_posix().replace("/", ".") for name in dependencies.stage_digests(stage, params)
    }
    assert len(run) > 10
    assert sorted(d for d in run - reached if d[0] not in files) == []


def project(tmp_path: Path) -> Path:
    """A project with its own copy of the sources, for a test to change."""
    shutil.copytree(PACKAGE, tmp_path / "src" / "deleatur", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(workspace.ROOT / "params.yaml", tmp_path)
    dependencies.write_digests(tmp_path)
    return tmp_path


def digests(root: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (root / dependencies.DIGESTS).glob("*.json")}


def changed(root: Path, file: str, old: str, new: str) -> set[str]:
    """Stages whose digest differs after a change of the code."""
    before, path = digests(root), root / "src" / "deleatur" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    dependencies.write_digests(root)
    after = digests(root)
    return {stage for stage in before if before[stage] != after[stage]}


def test_comments_and_docstrings_change_no_digest(tmp_path: Path) -> None:
    root = project(tmp_path)
    assert changed(root, "erasers/sdd.py", '"""SDD', '"""# SDD') == set()
    assert changed(root, "erasers/sdd.py", "\n\n\n", "\n\n\n# A comment.\n\n\n") == set()


def test_only_selected_plugins_change_a_digest(tmp_path: Path) -> None:
    root = project(tmp_path)
    assert changed(root, "erasers/esd.py", "class ESD", "_NEW = 1\n\n\nclass ESD") == set()
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["erase"]["method"] = "esd"
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    before = digests(root)["erase"]
    assert dependencies.write_digests(root)
    assert "deleatur.erasers.esd" in digests(root)["erase"].keys() - before.keys()


def test_a_change_affects_exactly_the_stages_that_can_run_the_code(tmp_path: Path) -> None:
    root = project(tmp_path)
    training = {"reward", "invert", "erase", "attack"}
    assert changed(root, "maths/agreement.py", "4.0, 1.0", "5.0, 1.0") == {"ingest", *training}
    sampling = {"invert", "erase", "sample"}
    assert changed(root, "diffusion/sample.py", "torch.no_grad()", "torch.inference_mode()") == sampling
    assert changed(root, "report/page.css", "{", "{ ") == {"gate"}
    assert changed(root, "operations/canary.py", "import", "import os\nimport") == set()


RUNNING = """
from deleatur import dependencies
from deleatur.redaction import redact

before = [dependencies.code_digests(redact, source=source) for source in (None, dependencies.PACKAGE)]
file = dependencies.PACKAGE / "redaction.py"
file.write_text(file.read_text().replace("    return ", "    _ = 1\\n    return "))
after = [dependencies.code_digests(redact, source=source) for source in (None, dependencies.PACKAGE)]
assert before[0] == before[1] == after[0] != after[1]
"""


def test_an_edit_while_a_process_runs_changes_no_digest_of_its_results(tmp_path: Path) -> None:
    sources = project(tmp_path) / "src"
    subprocess.run([sys.executable, "-c", RUNNING], env={"PYTHONPATH": str(sources)}, check=True)


def test_files_that_are_up_to_date_are_not_written(tmp_path: Path) -> None:
    root = project(tmp_path)
    assert not dependencies.write_digests(root)
    (root / dependencies.DIGESTS / "gone.json").write_text("{}")
    assert dependencies.write_digests(root)
    assert not (root / dependencies.DIGESTS / "gone.json").exists()
