"""compose.yaml, as rendered by Docker Compose, which needs no daemon for that."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import INFRA, program, run, run_checked
from test_images import VERSION

from deleatur.storage.processes import GRACE_PERIOD

FILE = INFRA / "compose.yaml"
GPU = INFRA / "compose.gpu.yaml"
"""Overlay for machines with a GPU."""
BUILT_IMAGE = re.compile(r"^deleatur(-services)?:")
ONE_SHOT_SERVICES = ("databases", "bucket", "checkout", "setup")
"""Services that run once and exit."""


def example_variables() -> dict[str, str]:
    lines = (INFRA / "env.example").read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def write_env_file(folder: Path, empty: str = "") -> Path:
    """Write an env file with values, except for one variable."""
    path = folder / "env"
    path.write_text(
        "".join(f"{name}={'' if name == empty else f'given-{name}'}\n" for name in example_variables()), "utf-8"
    )
    return path


def config_command(env: Path, *over: Path) -> list[str | Path]:
    files = [word for path in (FILE, *over) for word in ("-f", path)]
    return [program("docker-compose"), "--env-file", env, *files, "config"]


@cache
def services(folder: Path, *over: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(run_checked(*config_command(write_env_file(folder), *over)))["services"])


@pytest.fixture(scope="module", params=[(), (GPU,)], ids=["cpu", "gpu"])
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return services(tmp_path_factory.mktemp("env"), *request.param)


def test_the_example_has_no_values_and_starts_nothing() -> None:
    assert set(example_variables().values()) == {""}
    done = run(*config_command(INFRA / "env.example"))
    assert done.returncode != 0
    assert "set it in infra/.env" in done.stderr


@pytest.mark.parametrize("missing", example_variables())
def test_a_missing_secret_prevents_the_start(missing: str, tmp_path: Path) -> None:
    done = run(*config_command(write_env_file(tmp_path, empty=missing)))
    assert done.returncode != 0
    assert f"required variable {missing} is missing a value" in done.stderr


def test_the_file_contains_no_secret() -> None:
    text = FILE.read_text("utf-8")
    for name, value in re.findall(r"^\s*(\w*(?:PASSWORD|SECRET|KEY|AUTH)\w*): (.*)$", text, re.MULTILINE):
        assert "${" in value, name


def test_images_are_pinned(stack: dict[str, Any]) -> None:
    for name, service in stack.items():
        assert "build" in service if BUILT_IMAGE.match(service["image"]) else VERSION.search(service["image"]), name


def test_long_running_services_have_health_checks_and_restart(stack: dict[str, Any]) -> None:
    for name, service in stack.items():
        once = name in ONE_SHOT_SERVICES
        assert ("healthcheck" in service) != once, name
        assert service["restart"] == ("no" if once else "unless-stopped"), name


def test_dependencies_wait_for_health_only_where_it_is_checked(stack: dict[str, Any]) -> None:
    for service in stack.values():
        for other, dependency in service.get("depends_on", {}).items():
            assert dependency["condition"] == "service_started" or (dependency["condition"] == "service_healthy") != (
                other in ONE_SHOT_SERVICES
            )


def test_containers_are_read_only_and_unprivileged(stack: dict[str, Any]) -> None:
    for name, service in stack.items():
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not service.get("privileged"), name
        if BUILT_IMAGE.match(service["image"]):
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name


def test_ports_are_published_on_localhost_only(stack: dict[str, Any]) -> None:
    published = {name: [port["host_ip"] for port in s["ports"]] for name, s in stack.items() if "ports" in s}
    assert set(published) == {"mlflow", "prefect", "prometheus", "grafana"}
    assert all(addresses == ["127.0.0.1"] for addresses in published.values())


@pytest.mark.parametrize("worker", ["worker-cpu", "worker-gpu"])
def test_a_worker_that_is_stopped_has_time_to_save(worker: str, stack: dict[str, Any]) -> None:
    minutes, seconds = re.fullmatch(r"(\d+)m(\d+)s", stack[worker]["stop_grace_period"]).groups()  # type: ignore[union-attr]
    assert 60 * int(minutes) + int(seconds) >= GRACE_PERIOD + 30


def test_the_gpu_overlay_changes_only_the_gpu_worker(tmp_path: Path) -> None:
    without, with_one = services(tmp_path), services(tmp_path, GPU)
    changed = {name for name in with_one if with_one[name] != without[name]}
    assert changed == {"worker-gpu"}, "only the GPU worker differs"
    plain, worker = without["worker-gpu"], with_one["worker-gpu"]
    assert {name for name in worker if worker[name] != plain.get(name)} == {"image", "build", "deploy"}
    assert plain["image"] == without["worker-cpu"]["image"]
    assert worker["image"] == plain["image"].removesuffix("-cpu") + "-gpu"
    assert worker["build"]["args"] == {"TORCH": "gpu"}
    devices = worker["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]


def test_prometheus_has_no_lifecycle_api(stack: dict[str, Any]) -> None:
    assert "--web.enable-lifecycle" not in stack["prometheus"]["command"]


def test_files_that_are_mounted_exist(stack: dict[str, Any]) -> None:
    mounted = [v["source"] for s in stack.values() for v in s.get("volumes", []) if v["type"] == "bind"]
    assert len(mounted) >= 5
    assert all(Path(source).exists() for source in mounted)
