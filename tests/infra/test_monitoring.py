"""Prometheus' and Grafana's files: validated by their own tools, and against the exporter's series."""

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
from programs import INFRA, ROOT, program, run, run_checked

PROMETHEUS, GRAFANA = INFRA / "prometheus", INFRA / "grafana"
PROMTOOL = "apt install prometheus, on Debian"
TESTS = sorted(PROMETHEUS.glob("alerts_*test.yml"))


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text("utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def dashboard() -> dict[str, Any]:
    return dict(json.loads((GRAFANA / "dashboards/deleatur.json").read_text("utf-8")))


def queries() -> Iterator[tuple[str, str]]:
    """Panel titles and their queries."""
    for panel in dashboard()["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel.get("targets", []))


def test_prometheus_accepts_its_files() -> None:
    promtool = program("promtool", PROMTOOL)
    run_checked(promtool, "check", "config", "--syntax-only", PROMETHEUS / "prometheus.yml")
    run_checked(promtool, "check", "rules", PROMETHEUS / "alerts.yml")


def test_alert_unit_tests_pass_and_can_fail(tmp_path: Path) -> None:
    promtool = program("promtool", PROMTOOL)
    run_checked(promtool, "test", "rules", *TESTS)
    deaf = tmp_path / "alerts.yml"
    deaf.write_text((PROMETHEUS / "alerts.yml").read_text("utf-8").replace("== 0", "== 2"), "utf-8")
    (tmp_path / "alerts_test.yml").write_text((PROMETHEUS / "alerts_test.yml").read_text("utf-8"), "utf-8")
    assert run(promtool, "test", "rules", tmp_path / "alerts_test.yml").returncode != 0


def test_every_alert_is_tested_firing_and_quiet() -> None:
    tests = [test for path in TESTS for test in yaml.safe_load(path.read_text("utf-8"))["tests"]]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for fires in (True, False):
        assert {case["alertname"] for case in cases if bool(case["exp_alerts"]) == fires} == set(alerts())


def test_every_alert_has_severity_and_runbook() -> None:
    assert len(alerts()) >= 10
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("page", "ticket"), name
        assert {"summary", "description", "runbook"} == set(rule["annotations"]), name


@pytest.fixture(scope="module")
def exported_series() -> set[str]:
    """Names of the exporter's metric families, from its source code."""
    text = "".join(p.read_text("utf-8") for p in (ROOT / "src/deleatur/operations/exporter").glob("*.py"))
    gauges = set(re.findall(r'gauge\(\s*"(\w+)"', text))
    counters = {f"{name}_total" for name in re.findall(r'counter\(\s*"(\w+)"', text)}
    histograms = set(re.findall(r'HistogramMetricFamily\(\s*"deleatur_(\w+)"', text))
    return gauges | counters | {f"{name}_{part}" for name in histograms for part in ("bucket", "count", "sum")}


def test_alerts_and_dashboard_query_existing_series(exported_series: set[str]) -> None:
    expressions = [*((name, rule["expr"]) for name, rule in alerts().items()), *queries()]
    for name, expr in expressions:
        assert set(re.findall(r"deleatur_(\w+)", expr)) <= exported_series, name


def test_every_series_is_on_the_dashboard_or_in_an_alert(exported_series: set[str]) -> None:
    text = " ".join([*(rule["expr"] for rule in alerts().values()), *(expr for _, expr in queries())])
    seen = set(re.findall(r"deleatur_(\w+)", text))
    explained = {"score_images", "verdict_simulated", "stage_seconds_total", "decisions_total", "feedback_rows"}
    assert {n for n in exported_series - seen if not n.endswith(("_sum", "_count"))} <= explained


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    """Fields that Grafana's own types do not know are lost in a round trip."""
    register_default_plugins()
    document = dashboard()
    assert unknown_fields(document) == []
    document["panels"][1]["options"]["colourMode"] = "background"
    assert unknown_fields(document) == [".panels[1].options.colourMode"]


def unknown_fields(document: dict[str, Any]) -> list[str]:
    """Paths of fields that do not survive a round trip through Grafana's types, which only adds defaults."""
    return list(_unknown_fields(document, json.loads(JSONEncoder().encode(Dashboard.from_json(document))), ""))


def _unknown_fields(document: Any, parsed: Any, path: str) -> Iterator[str]:
    if isinstance(document, dict) and isinstance(parsed, dict):
        for key, value in document.items():
            yield from _unknown_fields(value, parsed.get(key), f"{path}.{key}")
    elif isinstance(document, list) and isinstance(parsed, list):
        for i, value in enumerate(document):
            yield from _unknown_fields(value, parsed[i] if i < len(parsed) else None, f"{path}[{i}]")
    elif document != parsed:
        yield path


def test_panels_do_not_overlap_and_have_unique_ids() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    occupied: set[tuple[int, int]] = set()
    for panel in panels:
        position = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(position["x"], position["x"] + position["w"])
            for y in range(position["y"], position["y"] + position["h"])
        }
        assert not cells & occupied, panel["title"]
        assert position["x"] + position["w"] <= 24
        occupied |= cells


def test_grafana_uses_the_prometheus_of_compose() -> None:
    [source] = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text("utf-8"))["datasources"]
    sources = {target["datasource"]["uid"] for panel in dashboard()["panels"] for target in panel.get("targets", [])}
    assert sources == {source["uid"]}
    services = yaml.safe_load((INFRA / "compose.yaml").read_text("utf-8"))["services"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    [provider] = yaml.safe_load((GRAFANA / "provisioning/dashboards/deleatur.yaml").read_text("utf-8"))["providers"]
    assert any(volume.endswith(f":{provider['options']['path']}:ro") for volume in services["grafana"]["volumes"])


def test_prometheus_scrapes_existing_services() -> None:
    services = yaml.safe_load((INFRA / "compose.yaml").read_text("utf-8"))["services"]
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text("utf-8"))
    targets = [t for job in config["scrape_configs"] for static in job["static_configs"] for t in static["targets"]]
    assert {target.split(":")[0] for target in targets} - {"localhost"} <= set(services)
    for job in config["scrape_configs"]:
        if auth := job.get("basic_auth"):
            assert Path(auth["password_file"]).name in services["prometheus"]["secrets"]
