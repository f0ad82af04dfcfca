"""Methods of other packages: found, named with where they come from, refused where they contradict or are broken."""

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

Bring = Callable[..., None]


@pytest.fixture
def bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bring]:
    """Puts a package as an installer leaves it where Python looks for packages."""
    monkeypatch.syspath_prepend(tmp_path)

    def put(package: str, method: str, module: str, text: str = FILE, version: str = "1.0") -> None:
        info = tmp_path / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[deleatur.erasers]\n{method} = {module}\n")
        (tmp_path / f"{module}.py").write_text(text, "utf-8")
        plugins._plugins.cache_clear()

    yield put
    plugins._plugins.cache_clear()


def test_a_packages_method_stands_beside_ours_and_says_where_it_comes_from(bring: Bring, model: Model) -> None:
    ours = plugins.names("erasers")
    bring("one", "shave", "shave_one")
    assert plugins.names("erasers") == sorted([*ours, "shave"])
    assert plugins.get("erasers", "shave").origin == "one 1.0"
    assert plugins.load("erasers", "shave", Eraser)().touches(model)
    told = catalogue("erasers")["erasers"]
    assert {name: entry["package"] for name, entry in told.items()} == dict.fromkeys(ours, "deleatur") | {
        "shave": "one 1.0"
    }
    assert list(told["shave"]["numbers"]) == ["strength"]


def test_a_name_that_two_packages_claim_is_refused_naming_both_and_the_others_go_on(bring: Bring) -> None:
    bring("one", "shave", "shave_one")
    bring("two", "shave", "shave_two", version="2.0")
    bring("three", "sdd", "shave_three")
    with pytest.raises(SettingsError, match=r"'shave' among erasers is provided by one 1.0 and two 2.0"):
        plugins.load("erasers", "shave", Eraser)
    with pytest.raises(SettingsError, match=r"'sdd' among erasers is provided by deleatur and three 1.0"):
        plugins.load("erasers", "sdd", Eraser)
    assert plugins.load("erasers", "esd", Eraser)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("", "has to define one class derived from Eraser, and defines 0"),
    ],
)
def test_what_does_not_load_is_refused_naming_the_package(bring: Bring, text: str, why: str) -> None:
    module = f"broken_{abs(hash(text))}"
    bring("one", "broken", module, text)
    with pytest.raises(SettingsError, match=f"'broken' among erasers, of the package one 1.0, does not load: .*{why}"):
        plugins.load("erasers", "broken", Eraser)


def test_a_method_of_a_package_is_known_by_its_version_and_by_its_packages_files(bring: Bring, tmp_path: Path) -> None:
    """And by nothing else: a file that is right is not written again."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))
    params["erase"]["method"] = "shave"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), "utf-8")

    def digest(stage: str = "erase") -> tuple[str, int]:
        dependencies.write_digests(tmp_path)
        path = tmp_path / dependencies.DIGESTS / f"{stage}.json"
        return path.read_text(), path.stat().st_mtime_ns

    without, reward = digest(), digest("reward")
    bring("one", "shave", "shave_four")
    with_one = digest()
    (tmp_path / "shave_four.py").write_text(f"{FILE}\n# longer\n", "utf-8")
    edited = digest()
    (tmp_path / "one-1.0.dist-info").rename(tmp_path / "one-1.1.dist-info")
    metadata = tmp_path / "one-1.1.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))
    newer = digest()
    assert len({found[0] for found in (without, with_one, edited, newer)}) == 4
    shutil.rmtree(tmp_path / "one-1.1.dist-info")
    assert digest()[0] == without[0]
    assert digest("reward") == reward, "a stage that loads no eraser is not touched"


def installed(into: Path, version: str = "1.0") -> Path:
    """The worked example, built and installed as anybody would, without asking an index."""
    source = into / "source"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    project = source / "pyproject.toml"
    project.write_text(project.read_text("utf-8").replace('"1.0"', f'"{version}"'), "utf-8")
    command = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    target = into / "site"
    run(into, "--no-build-isolation", "--target", str(target), str(source), command=command)
    return target


def on_our_shelf(into: Path) -> Path:
    """The same file as one of ours: nothing else is added, and nothing is changed."""
    ours = into / "src"
    shutil.copytree(ROOT / "src", ours, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(EXAMPLE / "deleatur_shave.py", ours / "deleatur" / "erasers" / "shave.py")
    return ours


def run(root: Path, *arguments: str, command: list[str], path: Path | None = None) -> str:
    env = processes.environment() | ({"PYTHONPATH": f"{path}{os.pathsep}{ROOT / 'src'}"} if path else {})
    done = subprocess.run(
        [sys.executable, *command, *arguments], cwd=root, env=env, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("added", "package"), [(installed, "deleatur-shave 1.0"), (on_our_shelf, "deleatur")])
def test_the_worked_example_is_listed_and_keeps_the_shelfs_promises_wherever_it_lies(
    tmp_path: Path, added: Callable[[Path], Path], package: str
) -> None:
    site = added(tmp_path)
    listed = json.loads(run(tmp_path, "methods", "erasers", "--json", command=["-m", "deleatur"], path=site))
    assert listed["erasers"]["shave"]["package"] == package
    told = run(ROOT, "-k", "test_erasers and shave", command=["-m", "pytest", "-q", "tests/contracts"], path=site)
    assert "3 passed" in told


@pytest.mark.slow
def test_a_project_erases_with_it_and_a_new_version_makes_the_result_stale(
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

    for site, by_hand in ((installed(one), False), (installed(two, "1.1"), True)):
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", f"{site}{os.pathsep}{ROOT / 'src'}")
            patch.syspath_prepend(site)
            assert "deleatur-shave" in run(root, "check", command=["-m", "deleatur"])
            assert "erase" in dvc.status(root)
            if by_hand:
                finished.dvc(root, "repro", "erase")
            else:
                assert dvc.reproduce("erase", root)
            assert "erase" not in dvc.status(root)
    delta = tensors.load_delta(root / "out" / "delta" / "delta.safetensors")
    assert (delta.method, delta.settings) == ("shave", {"strength": 0.9})
