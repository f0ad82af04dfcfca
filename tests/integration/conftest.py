from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import finished
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "infra"))

from local import DEFAULT_PORTS, MissingProgram, Stack, free_ports  # noqa: E402


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """PostgreSQL, an S3-compatible store, and MLflow with users on both."""
    with free_ports(len(DEFAULT_PORTS)) as ports:
        stack = Stack(tmp_path_factory.mktemp("servers"), dict(zip(DEFAULT_PORTS, ports, strict=True)))
    try:
        stack.start("postgres", "s3", "mlflow")
        yield stack
    except MissingProgram as e:
        pytest.fail(str(e)) if os.environ.get("PROGRAMS_REQUIRED") else pytest.skip(str(e))
    finally:
        stack.stop()
        stack.remove()


@pytest.fixture
def project(servers: Stack, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished project on these servers, as current directory, with its own experiment and model."""
    servers.start("postgres", "s3", "mlflow")  # restarts what a test has killed
    root = tmp_path / "project"
    finished.copy(shared, root)
    params = root / "params.yaml"
    text = params.read_text("utf-8").replace(
        f"sqlite:///{root}/mlflow.db", servers.client_environment["MLFLOW_TRACKING_URI"]
    )
    for name in ("experiment", "model"):
        text = text.replace(f"{name}: deleatur\n", f"{name}: {tmp_path.name}\n")
    params.write_text(text, "utf-8")
    finished.dvc(root, "remote", "add", "--quiet", "--default", "store", f"s3://deleatur/{tmp_path.name}")
    for name, value in servers.client_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PREFECT_API_URL")  # no scheduler runs here
    monkeypatch.chdir(root)
    return root
