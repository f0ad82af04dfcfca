"""Prometheus' and Grafana's files: read by their own tools, and about series that the exporter has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from programs import INFRA, ROOT, program, ran, run

PROMETHEUS, GRAFANA = INFRA / "prometheus", INFRA / "grafana"
PROMTOOL = "apt install prometheus, on Debian"
TESTS = sorted(PROMETHEUS.glob("alerts_*test.yml"))


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text("utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def board() -> dict[str, Any]:
    return dict(json.loads((GRAFANA / "dashboards/deleatur.json").read_text("utf-8")))


def queries() -> Iterator[tuple[str, str]]:
    """Title of the panel and what it asks."""
    for panel in board()["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel.get("targets", []))


def test_prometheus_takes_its_files() -> None:
    promtool = program("promtool", PROMTOOL)
    ran(promtool, "check", "config", "--syntax-only", PROMETHEUS / "prometheus.yml")
    ran(promtool, "check", "rules", PROMETHEUS / "alerts.yml")


def test_every_alert_is_quiet_first_and_fires_then(tmp_path: Path) -> None:
    promtool = program("promtool", PROMTOOL)
    ran(promtool, "test", "rules", *TESTS)
    deaf = tmp_path / "alerts.yml"
    deaf.write_text((PROMETHEUS / "alerts.yml").read_text("utf-8").replace("== 0", "== 2"), "utf-8")
    (tmp_path / "alerts_test.yml").write_text((PROMETHEUS / "alerts_test.yml").read_text("utf-8"), "utf-8")
    assert run(promtool, "test", "rules", tmp_path / "alerts_test.yml").returncode != 0


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    tests = [test for path in TESTS for test in yaml.safe_load(path.read_text("utf-8"))["tests"]]
    asked = [case for test in tests for case in test["alert_rule_test"]]
    for fires in (True, False):
        assert {case["alertname"] for case in asked if bool(case["exp_alerts"]) == fires} == set(alerts())


def test_every_alert_says_how_bad_it_is_and_where_to_read_on() -> None:
    assert len(alerts()) >= 10
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("page", "ticket"), name
        assert {"summary", "description", "runbook"} == set(rule["annotations"]), name


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Names of the exporter's families, as they stand in its sources."""
    text = "".join(p.read_text("utf-8") for p in (ROOT / "src/deleatur/stages/exporter").glob("*.py"))
    gauges = set(re.findall(r'gauge\(\s*"(\w+)"', text))
    counters = {f"{name}_total" for name in re.findall(r'counter\(\s*"(\w+)"', text)}
    histograms = set(re.findall(r'HistogramMetricFamily\(\s*"deleatur_(\w+)"', text))
    return gauges | counters | {f"{name}_{part}" for name in histograms for part in ("bucket", "count", "sum")}


def test_alerts_and_board_ask_for_series_that_there_are(known: set[str]) -> None:
    asked = [*((name, rule["expr"]) for name, rule in alerts().items()), *queries()]
    for where, expr in asked:
        assert set(re.findall(r"deleatur_(\w+)", expr)) <= known, where


def test_every_series_is_on_the_board_or_behind_an_alert(known: set[str]) -> None:
    text = " ".join([*(rule["expr"] for rule in alerts().values()), *(expr for _, expr in queries())])
    seen = set(re.findall(r"deleatur_(\w+)", text))
    explained = {"score_pictures", "verdict_simulated", "stage_seconds_total", "decisions_total", "feedback_rows"}
    assert {n for n in known - seen if not n.endswith(("_sum", "_count"))} <= explained


def test_grafana_knows_every_word_of_the_board() -> None:
    """What its own types do not know does not survive them."""
    register_default_plugins()
    given = board()
    assert lost(given) == []
    given["panels"][1]["options"]["colourMode"] = "background"
    assert lost(given) == [".panels[1].options.colourMode"]


def lost(given: dict[str, Any]) -> list[str]:
    """What of a board its types do not give back; what they add are defaults."""
    return list(_lost(given, json.loads(JSONEncoder().encode(Dashboard.from_json(given))), ""))


def _lost(given: Any, found: Any, path: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(found, dict):
        for key, value in given.items():
            yield from _lost(value, found.get(key), f"{path}.{key}")
    elif isinstance(given, list) and isinstance(found, list):
        for i, value in enumerate(given):
            yield from _lost(value, found[i] if i < len(found) else None, f"{path}[{i}]")
    elif given != found:
        yield path


def test_panels_lie_beside_each_other_and_have_numbers_of_their_own() -> None:
    panels = board()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_grafana_asks_the_prometheus_that_compose_starts() -> None:
    [source] = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text("utf-8"))["datasources"]
    asked = {target["datasource"]["uid"] for panel in board()["panels"] for target in panel.get("targets", [])}
    assert asked == {source["uid"]}
    services = yaml.safe_load((INFRA / "compose.yaml").read_text("utf-8"))["services"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    [provider] = yaml.safe_load((GRAFANA / "provisioning/dashboards/deleatur.yaml").read_text("utf-8"))["providers"]
    assert any(volume.endswith(f":{provider['options']['path']}:ro") for volume in services["grafana"]["volumes"])


def test_prometheus_asks_services_that_there_are() -> None:
    services = yaml.safe_load((INFRA / "compose.yaml").read_text("utf-8"))["services"]
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text("utf-8"))
    targets = [t for job in config["scrape_configs"] for static in job["static_configs"] for t in static["targets"]]
    assert {target.split(":")[0] for target in targets} - {"localhost"} <= set(services)
    for job in config["scrape_configs"]:
        if auth := job.get("basic_auth"):
            assert Path(auth["password_file"]).name in services["prometheus"]["secrets"]
