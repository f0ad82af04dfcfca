"""The Dockerfile: linted, non-root, with the pinned versions of constraints.txt."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from programs import INFRA, ROOT, program, run, run_checked

FILE = INFRA / "Dockerfile"
VERSION = re.compile(r"^[^:@\s]+:v?\d+\.\d+[\w.-]*$|@sha256:[0-9a-f]{64}$")
"""A tag that names one version, or a digest; not `latest` or a bare name."""


def test_the_dockerfile_passes_hadolint(tmp_path: Path) -> None:
    run_checked(program("hadolint"), FILE)
    worse = tmp_path / "Dockerfile"
    worse.write_text(FILE.read_text("utf-8").replace(" --no-install-recommends", ""), "utf-8")
    assert "DL3015" in run(program("hadolint"), worse).stdout


def stages() -> dict[str, str]:
    """Name → text of each build stage."""
    parts = re.split(r"^FROM ", FILE.read_text("utf-8"), flags=re.MULTILINE)[1:]
    return {part.splitlines()[0].split(" AS ")[1]: part for part in parts}


@pytest.mark.parametrize("stage", ["services", "worker"])
def test_final_stages_have_no_root_no_compiler_and_a_health_check(stage: str) -> None:
    text = stages()[stage]
    assert re.search(r"^USER 10001$", text, re.MULTILINE)
    assert "\nHEALTHCHECK " in text
    assert "\nRUN " not in text, "everything is built in other stages"


def test_base_images_are_pinned() -> None:
    images = re.findall(r"^ARG \w+_IMAGE=(.*)$", FILE.read_text("utf-8"), re.MULTILINE)
    assert len(images) == 2
    assert all(VERSION.search(image) for image in images)


def test_libraries_are_installed_with_the_constraints() -> None:
    installed = re.findall(r"uv pip install (.*)$", FILE.read_text("utf-8"), re.MULTILINE)
    assert len(installed) == 5
    assert all("-c constraints.txt" in line or line == "--no-deps ." for line in installed)
    assert "\ntorch==" in (ROOT / "constraints.txt").read_text("utf-8")


def test_workers_have_dask() -> None:
    assert "-r pyproject.toml --extra dask" in stages()["build-worker"]


def test_the_services_image_has_the_extra_server() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    [extra] = re.findall(r"^server = \[(.*)\]$", pyproject, re.MULTILINE)
    wanted = {re.split(r"[>=<]", name.strip(' "'))[0] for name in extra.split('", "')}
    [line] = re.findall(r"uv pip install -c constraints.txt (.*)$", stages()["build-services"], re.MULTILINE)
    assert wanted <= set(line.replace('"', "").split())


def test_the_build_context_has_only_listed_files() -> None:
    first, *allowed = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line[:1] not in "#"]
    assert first == "*", "everything is excluded by default"
    named = {line.removeprefix("!") for line in allowed if line.startswith("!")}
    assert all((ROOT / name).exists() for name in named)
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", FILE.read_text("utf-8"), re.MULTILINE)
    assert {name for line in copied for name in line.split()} == named
