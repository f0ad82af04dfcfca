"""The runbook: a section for every alert, and only existing commands."""

from __future__ import annotations

import re

import yaml
from programs import INFRA, ROOT
from test_monitoring import alerts
from typer.main import get_command

from deleatur.cli import app

TEXT = (INFRA / "RUNBOOK.md").read_text("utf-8")


def sections(level: int) -> list[str]:
    return re.findall(rf"^{'#' * level} (.*)$", TEXT, re.MULTILINE)


def test_every_alert_has_a_section() -> None:
    assert sections(3) == list(alerts()), "in the order of the rules"
    for name, rule in alerts().items():
        assert rule["annotations"]["runbook"] == f"infra/RUNBOOK.md#{name.lower()}"


def test_every_operation_has_a_section() -> None:
    wanted = [
        "Deploy",
        "Upgrade",
        "Rotate credentials",
        "Back up and restore",
        "Evict",
        "Roll back",
        "Emergency",
        "Alerts",
    ]
    assert sections(2) == wanted


def test_commands_exist() -> None:
    known = get_command(app).commands  # type: ignore[attr-defined]
    for page in ("RUNBOOK.md", "README.md"):
        text = (INFRA / page).read_text("utf-8")
        for command in re.findall(r"(?:^\$ |`)deleatur ([a-z]+)", text, re.MULTILINE):
            assert command in known, f"{page}: deleatur {command}"


def test_compose_files_are_complete() -> None:
    [exported, commented] = re.findall(r"COMPOSE_FILE=(\S+) +# with a GPU: (\S+)", TEXT)[0]
    files = {*exported.split(":"), *commented.split(":")}
    assert all((ROOT / name).is_file() for name in files)
    assert files == {f"infra/{path.name}" for path in INFRA.glob("compose*.yaml")}
    assert "docker compose -f" not in TEXT


def test_named_services_exist() -> None:
    services = yaml.safe_load((INFRA / "compose.yaml").read_text("utf-8"))["services"]
    for pattern in (
        r"docker compose (?:exec|stop|ps|logs)(?: -T| -e \S+)* ([a-z][\w-]+)",
        r"/workspace ([a-z-]+) deleatur",
    ):
        names = re.findall(pattern, TEXT)
        assert names
        assert set(names) <= set(services), pattern


def test_links_resolve() -> None:
    for page in ("RUNBOOK.md", "README.md"):
        text = (INFRA / page).read_text("utf-8")
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert (INFRA / link).exists() or (ROOT / link).exists(), f"{page}: {link}"
