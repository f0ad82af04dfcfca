"""What a stage executes is what its digest covers: traced on real runs, not read off a list."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import workspace
import yaml

from deleatur import dependencies, stages
from deleatur.config.settings import Settings
from deleatur.dependencies import PACKAGE, STAGES, Definition


@contextmanager
def executed() -> Iterator[set[CodeType]]:
    """Code of the package that runs inside."""
    found: set[CodeType] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            found.add(frame.f_code)

    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)


def definition(code: CodeType) -> Definition:
    parts = Path(code.co_filename).relative_to(PACKAGE.parent).with_suffix("").parts
    module = ".".join(parts).removesuffix(".__init__")
    outermost = code.co_qualname.partition(".")[0]
    return module, "" if outermost.startswith("<") else outermost


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_no_function_that_a_stage_executes_is_outside_its_digest(done: Settings, stage: str) -> None:
    for cached in {"sample": ["out/shots", "out/scores"], "evaluate": ["out/scores"]}.get(stage, []):
        shutil.rmtree(cached, ignore_errors=True)  # so that it has everything to do
    with executed() as ran:
        stages.run(stage, done)
    found = {definition(code) for code in ran}
    params = done.model_dump(by_alias=True)
    reached, _ = dependencies.reach(stage, params)
    # Templates, and what MLflow loads from its path, are digested as files.
    files = {Path(name).with_suffix("").as_posix().replace("/", ".") for name in dependencies.of_stage(stage, params)}
    assert len(found) > 10
    assert sorted(d for d in found - reached if d[0] not in files) == []


def project(tmp_path: Path) -> Path:
    """A project with sources of its own, which a test may change."""
    shutil.copytree(PACKAGE, tmp_path / "src" / "deleatur", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(workspace.ROOT / "params.yaml", tmp_path)
    dependencies.write(tmp_path)
    return tmp_path


def digests(root: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (root / dependencies.DIGESTS).glob("*.json")}


def changed(root: Path, file: str, old: str, new: str) -> set[str]:
    """Stages whose digest is another one after a change of the code."""
    before, path = digests(root), root / "src" / "deleatur" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    dependencies.write(root)
    after = digests(root)
    return {stage for stage in before if before[stage] != after[stage]}


def test_comments_and_docstrings_change_no_digest(tmp_path: Path) -> None:
    root = project(tmp_path)
    assert changed(root, "erasers/sdd.py", '"""SDD', '"""# SDD') == set()
    assert changed(root, "erasers/sdd.py", "\n\n\n", "\n\n\n# A comment.\n\n\n") == set()


def test_a_method_that_is_not_selected_changes_nothing_until_it_is(tmp_path: Path) -> None:
    root = project(tmp_path)
    assert changed(root, "erasers/esd.py", "class ESD", "_NEW = 1\n\n\nclass ESD") == set()
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["erase"]["method"] = "esd"
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    before = digests(root)["erase"]
    assert dependencies.write(root)
    assert "deleatur.erasers.esd" in digests(root)["erase"].keys() - before.keys()


def test_changed_code_reaches_exactly_the_stages_that_can_run_it(tmp_path: Path) -> None:
    root = project(tmp_path)
    learned = {"reward", "invert", "erase", "attack"}
    assert changed(root, "maths/agreement.py", "4.0, 1.0", "5.0, 1.0") == {"ingest", *learned}
    drawing = {"invert", "erase", "sample"}
    assert changed(root, "diffusion/sample.py", "torch.no_grad()", "torch.inference_mode()") == drawing
    assert changed(root, "report/page.css", "{", "{ ") == {"gate"}
    assert changed(root, "operations/canary.py", "import", "import os\nimport") == set()


def test_what_is_right_is_not_touched(tmp_path: Path) -> None:
    root = project(tmp_path)
    assert not dependencies.write(root)
    (root / dependencies.DIGESTS / "gone.json").write_text("{}")
    assert dependencies.write(root)
    assert not (root / dependencies.DIGESTS / "gone.json").exists()
