"""compose.yaml, as Docker Compose itself reads it: a daemon is not needed for that."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import INFRA, program, ran, run
from test_images import VERSION

from deleatur.storage.dvc import GRACE

FILE = INFRA / "compose.yaml"
GPU = INFRA / "compose.gpu.yaml"
"""Laid over it where the machine has one."""
OURS = re.compile(r"^deleatur(-services)?:")
ONCE = ("databases", "bucket", "checkout", "setup")
"""Services that do something and end."""


def example() -> dict[str, str]:
    lines = (INFRA / "env.example").read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def filled(folder: Path, but: str = "") -> Path:
    """An env file as a person fills it in, one line left out."""
    path = folder / "env"
    path.write_text("".join(f"{name}={'' if name == but else f'given-{name}'}\n" for name in example()), "utf-8")
    return path


def config(env: Path, *over: Path) -> list[str | Path]:
    files = [word for path in (FILE, *over) for word in ("-f", path)]
    return [program("docker-compose"), "--env-file", env, *files, "config"]


@cache
def services(folder: Path, *over: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(ran(*config(filled(folder), *over)))["services"])


@pytest.fixture(scope="module", params=[(), (GPU,)], ids=["cpu", "gpu"])
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return services(tmp_path_factory.mktemp("env"), *request.param)


def test_the_example_holds_nothing_and_starts_nothing() -> None:
    assert set(example().values()) == {""}
    done = run(*config(INFRA / "env.example"))
    assert done.returncode != 0
    assert "set it in infra/.env" in done.stderr


@pytest.mark.parametrize("missing", example())
def test_without_any_one_of_the_secrets_nothing_starts(missing: str, tmp_path: Path) -> None:
    done = run(*config(filled(tmp_path, but=missing)))
    assert done.returncode != 0
    assert f"required variable {missing} is missing a value" in done.stderr


def test_no_secret_stands_in_the_file() -> None:
    text = FILE.read_text("utf-8")
    for name, value in re.findall(r"^\s*(\w*(?:PASSWORD|SECRET|KEY|AUTH)\w*): (.*)$", text, re.MULTILINE):
        assert "${" in value, name


def test_images_are_pinned(stack: dict[str, Any]) -> None:
    for name, service in stack.items():
        assert "build" in service if OURS.match(service["image"]) else VERSION.search(service["image"]), name


def test_everything_that_runs_on_has_a_health_check_and_comes_back(stack: dict[str, Any]) -> None:
    for name, service in stack.items():
        once = name in ONCE
        assert ("healthcheck" in service) != once, name
        assert service["restart"] == ("no" if once else "unless-stopped"), name


def test_nobody_waits_for_a_health_that_nobody_checks(stack: dict[str, Any]) -> None:
    for service in stack.values():
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_started" or (how["condition"] == "service_healthy") != (other in ONCE)


def test_our_containers_can_change_nothing_but_their_volumes(stack: dict[str, Any]) -> None:
    for name, service in stack.items():
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not service.get("privileged"), name
        if OURS.match(service["image"]):
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name


def test_pages_are_published_on_this_machine_alone(stack: dict[str, Any]) -> None:
    published = {name: [port["host_ip"] for port in s["ports"]] for name, s in stack.items() if "ports" in s}
    assert set(published) == {"mlflow", "prefect", "prometheus", "grafana"}
    assert all(addresses == ["127.0.0.1"] for addresses in published.values())


@pytest.mark.parametrize("worker", ["worker-cpu", "worker-gpu"])
def test_a_worker_that_is_stopped_has_time_to_save(worker: str, stack: dict[str, Any]) -> None:
    minutes, seconds = re.fullmatch(r"(\d+)m(\d+)s", stack[worker]["stop_grace_period"]).groups()  # type: ignore[union-attr]
    assert 60 * int(minutes) + int(seconds) >= GRACE + 30


def test_the_gpu_is_asked_for_and_only_where_there_is_one(tmp_path: Path) -> None:
    without, with_one = services(tmp_path), services(tmp_path, GPU)
    changed = {name for name in with_one if with_one[name] != without[name]}
    assert changed == {"worker-gpu"}, "one worker in the place of the other"
    plain, worker = without["worker-gpu"], with_one["worker-gpu"]
    assert {name for name in worker if worker[name] != plain.get(name)} == {"image", "build", "deploy"}
    assert plain["image"] == without["worker-cpu"]["image"]
    assert worker["image"] == plain["image"].removesuffix("-cpu") + "-gpu"
    assert worker["build"]["args"] == {"TORCH": "gpu"}
    devices = worker["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]


def test_nobody_can_stop_prometheus_by_a_request(stack: dict[str, Any]) -> None:
    assert "--web.enable-lifecycle" not in stack["prometheus"]["command"]


def test_files_that_are_mounted_exist(stack: dict[str, Any]) -> None:
    mounted = [v["source"] for s in stack.values() for v in s.get("volumes", []) if v["type"] == "bind"]
    assert len(mounted) >= 5
    assert all(Path(source).exists() for source in mounted)
