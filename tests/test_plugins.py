"""Plug-ins of other packages: discovery, their origin, and errors for conflicting or broken ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import finished
import pytest
import yaml

from deleatur import dependencies, plugins
from deleatur.config.catalogue import catalogue
from deleatur.diffusion.model import Model
from deleatur.erasers import Eraser
from deleatur.errors import SettingsError
from deleatur.storage import dvc, processes, tensors

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "shave"
FILE = (EXAMPLE / "deleatur_shave.py").read_text("utf-8")

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a package with an eraser in a temporary folder of the search path."""
    monkeypatch.syspath_prepend(tmp_path)

    def install_package(package: str, method: str, module: str, text: str = FILE, version: str = "1.0") -> None:
        info = tmp_path / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[deleatur.erasers]\n{method} = {module}\n")
        (tmp_path / f"{module}.py").write_text(text, "utf-8")
        plugins.refresh()

    yield install_package
    plugins.refresh()


def test_a_packages_plugin_is_listed_with_its_origin(install: Install, model: Model) -> None:
    built_in = plugins.names("erasers")
    install("one", "shave", "shave_one")
    assert plugins.names("erasers") == sorted([*built_in, "shave"])
    assert plugins.get("erasers", "shave").origin == "one 1.0"
    assert plugins.load("erasers", "shave", Eraser)().touched_parameters(model)
    listed = catalogue("erasers")["erasers"]
    assert {name: entry["package"] for name, entry in listed.items()} == dict.fromkeys(built_in, "deleatur") | {
        "shave": "one 1.0"
    }
    assert list(listed["shave"]["hyperparameters"]) == ["strength"]


def test_a_name_that_two_packages_provide_is_refused_and_others_still_load(install: Install) -> None:
    install("one", "shave", "shave_one")
    install("two", "shave", "shave_two", version="2.0")
    install("three", "sdd", "shave_three")
    with pytest.raises(SettingsError, match=r"'shave' among erasers is provided by one 1.0 and two 2.0"):
        plugins.load("erasers", "shave", Eraser)
    with pytest.raises(SettingsError, match=r"'sdd' among erasers is provided by deleatur and three 1.0"):
        plugins.load("erasers", "sdd", Eraser)
    assert plugins.load("erasers", "esd", Eraser)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("", "has to define one class derived from Eraser, and defines 0"),
    ],
)
def test_a_plugin_that_does_not_load_is_refused_naming_the_package(install: Install, text: str, cause: str) -> None:
    module = f"broken_{abs(hash(text))}"
    install("one", "broken", module, text)
    with pytest.raises(
        SettingsError, match=f"'broken' among erasers, of the package one 1.0, does not load: .*{cause}"
    ):
        plugins.load("erasers", "broken", Eraser)


def test_a_plugins_digest_covers_its_version_and_its_packages_files(install: Install, tmp_path: Path) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))
    params["erase"]["method"] = "shave"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), "utf-8")

    def digest(stage: str = "erase") -> tuple[str, int]:
        dependencies.write_digests(tmp_path)
        path = tmp_path / dependencies.DIGESTS / f"{stage}.json"
        return path.read_text(), path.stat().st_mtime_ns

    without, reward = digest(), digest("reward")
    install("one", "shave", "shave_four")
    with_one = digest()
    (tmp_path / "shave_four.py").write_text(f"{FILE}\n# longer\n", "utf-8")
    edited = digest()
    (tmp_path / "one-1.0.dist-info").rename(tmp_path / "one-1.1.dist-info")
    metadata = tmp_path / "one-1.1.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))
    newer = digest()
    assert len({digest[0] for digest in (without, with_one, edited, newer)}) == 4
    shutil.rmtree(tmp_path / "one-1.1.dist-info")
    assert digest()[0] == without[0]
    assert digest("reward") == reward, "a stage that loads no eraser is unchanged"


def installed(into: Path, version: str = "1.0") -> Path:
    """The example plug-in of docs/, built and installed with pip, offline."""
    source = into / "source"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    project = source / "pyproject.toml"
    project.write_text(project.read_text("utf-8").replace('"1.0"', f'"{version}"'), "utf-8")
    command = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    target = into / "site"
    run(into, "--no-build-isolation", "--target", str(target), str(source), command=command)
    return target


def as_built_in(into: Path) -> Path:
    """The same file as a built-in plug-in: nothing else is added or changed."""
    source = into / "src"
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(EXAMPLE / "deleatur_shave.py", source / "deleatur" / "erasers" / "shave.py")
    return source


def run(root: Path, *arguments: str, command: list[str], path: Path | None = None) -> str:
    env = processes.environment()
    if path:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), str(ROOT / "src"), env.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *command, *arguments], cwd=root, env=env, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("added", "package"), [(installed, "deleatur-shave 1.0"), (as_built_in, "deleatur")])
def test_the_example_plugin_is_listed_and_passes_the_contract_tests(
    tmp_path: Path, added: Callable[[Path], Path], package: str
) -> None:
    site = added(tmp_path)
    listed = json.loads(run(tmp_path, "methods", "erasers", "--json", command=["-m", "deleatur"], path=site))
    assert listed["erasers"]["shave"]["package"] == package
    output = run(ROOT, "-k", "eraser and shave", command=["-m", "pytest", "-q", "tests/contracts"], path=site)
    assert "3 passed" in output


@pytest.mark.slow
def test_a_project_erases_with_the_example_plugin_and_a_new_version_makes_the_result_stale(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "project"
    root.mkdir()
    finished.copy(shared, root)
    params = yaml.safe_load((root / "params.yaml").read_text("utf-8"))
    params["erase"] |= {"method": "shave", "shave": {"strength": 0.9}}
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), "utf-8")
    (one := tmp_path / "one").mkdir()
    (two := tmp_path / "two").mkdir()

    for site, with_dvc in ((installed(one), False), (installed(two, "1.1"), True)):
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", f"{site}{os.pathsep}{ROOT / 'src'}", prepend=os.pathsep)
            patch.syspath_prepend(site)
            assert "deleatur-shave" in run(root, "check", command=["-m", "deleatur"])
            assert "erase" in dvc.status(root)
            if with_dvc:
                finished.dvc(root, "repro", "erase")
            else:
                assert dvc.reproduce("erase", root)
            assert "erase" not in dvc.status(root)
    delta = tensors.load_delta(root / "out" / "delta" / "delta.safetensors")
    assert (delta.method, delta.settings) == ("shave", {"strength": 0.9})
