"""Dashboard, alerts and scrape configuration: every expression is PromQL over metrics that exist.

promtool, which comes with Debian's package `prometheus`, tries the alerts on made-up series;
without it those tests are skipped. tests/serve/test_monitoring.py asks a real Prometheus.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import ray
import yaml

from deployments import metrics
from deployments.statistics import Reason
from tests.unit.cluster.manifests import CLUSTER, build, container, groups, rayservice

FOLDER = CLUSTER / "monitoring"
HERE = Path(__file__).parent
# What Grafana puts in.
VARIABLES = {"$__rate_interval": "1m", "$model": ".*"}
RAY_FILES = (
    "serve/_private/deployment_state.py",
    "dashboard/modules/reporter/reporter_agent.py",
)
PROMETHEUS_ITSELF = {"up"}


def dashboard() -> dict[str, Any]:
    return dict(json.loads((FOLDER / "dashboard.json").read_text()))


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load((FOLDER / "prometheusrule.yaml").read_text())
    return [rule for group in document["spec"]["groups"] for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Who asks, and for what."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            text = target["expr"]
            for name, value in VARIABLES.items():
                text = text.replace(name, value)
            assert "$" not in text
            yield f"{panel['title']} {target['refId']}", text


def selectors(expression: str) -> list[Any]:
    """All vector selectors in the syntax tree."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(expression), pre_visit=visit)
    return found


def ours() -> set[str]:
    """All series of Manta's page."""
    names: set[str] = set()
    for family in metrics.FAMILIES:
        histogram = family.kind == "histogram"
        suffixes = ("_bucket", "_sum", "_count") if histogram else ("",)
        names |= {family.name + suffix for suffix in suffixes}
    return names


def rays() -> set[str]:
    """What Ray exports under its prefix, by the names in its source."""
    root = Path(ray.__file__).parent
    text = "".join((root / name).read_text() for name in RAY_FILES)
    return {f"ray_{name}" for name in re.findall(r'"((?:node|serve)_[a-z_]+)"', text)}


@pytest.mark.parametrize(("who", "text"), list(expressions()), ids=lambda value: str(value)[:40])
def test_every_metric_of_every_expression_exists(who: str, text: str) -> None:
    found = selectors(text)
    assert found
    assert {one.name for one in found} <= ours() | rays() | PROMETHEUS_ITSELF


def test_control_an_unknown_metric_and_a_broken_expression() -> None:
    [wrong] = selectors("sum(rate(nv_inference_requests_success[5m]))")
    assert wrong.name not in ours() | rays() | PROMETHEUS_ITSELF
    with pytest.raises(ValueError):
        promql_parser.parse("sum(rate(nv_inference_request_success[5m])")


def test_reasons_are_those_that_are_counted() -> None:
    text = " ".join(expression for _, expression in expressions())
    asked = re.findall(r'reason(?:=~|=|!=)"([A-Z|]+)"', text)
    assert {reason for one in asked for reason in one.split("|")} <= {one.value for one in Reason}


def test_sums_of_all_routers_are_not_added_up() -> None:
    """Each Router tells the same: what is summed over instances would be counted twice."""
    for who, text in expressions():
        if ours() & {one.name for one in selectors(text)}:
            bare = re.sub(r"sum by \(model, version, instance\)", "", text)
            assert re.search(r"max by \((?:model|le)", bare), who
            assert "sum by (model" not in bare, who


# --- scraping ------------------------------------------------------------------------------------


def test_ports_are_those_of_the_pods() -> None:
    monitor = yaml.safe_load((FOLDER / "podmonitor.yaml").read_text())
    chosen = monitor["spec"]["selector"]["matchLabels"]
    endpoints = {one["port"] for one in monitor["spec"]["podMetricsEndpoints"]}
    for _, group in groups(rayservice(CLUSTER / "base")):
        assert chosen.items() <= group["template"]["metadata"]["labels"].items()
        assert endpoints <= {port["name"] for port in container(group)["ports"]}


def test_jobs_are_called_the_same_both_ways() -> None:
    monitor = yaml.safe_load((FOLDER / "podmonitor.yaml").read_text())
    by_operator = [
        relabeling["replacement"]
        for endpoint in monitor["spec"]["podMetricsEndpoints"]
        for relabeling in endpoint["relabelings"]
        if relabeling.get("targetLabel") == "job"
    ]
    plain = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    assert by_operator == [one["job_name"] for one in plain["scrape_configs"]]
    text = " ".join(expression for _, expression in expressions())
    assert set(re.findall(r'job="([^"]+)"', text)) == set(by_operator)


def test_the_kustomization_builds() -> None:
    assert [one["kind"] for one in build(FOLDER)] == ["PodMonitor", "PrometheusRule"]


# --- the dashboard -------------------------------------------------------------------------------


def test_panels_lie_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_panels_are_complete() -> None:
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))
    for panel in panels():
        assert panel["fieldConfig"]["defaults"]["unit"] and panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        references = [target["refId"] for target in panel["targets"]]
        assert references and len(references) == len(set(references))


def test_what_is_to_be_seen() -> None:
    text = " ".join(expression for _, expression in expressions())
    for stage in ("request", "queue", "compute"):
        for quantile in ("0.5", "0.95", "0.99"):
            assert re.search(rf"histogram_quantile\({quantile}, .*?manta_{stage}_duration", text)
    assert {"manta_batch_size_bucket", "nv_inference_pending_request_count"} <= {
        one.name for _, expression in expressions() for one in selectors(expression)
    }


# --- promtool ------------------------------------------------------------------------------------


@pytest.fixture
def promtool(tmp_path: Path):
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    document = yaml.safe_load((FOLDER / "prometheusrule.yaml").read_text())
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(document["spec"]))
    scrape = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    for job in scrape["scrape_configs"]:
        # Debian builds Prometheus without Kubernetes, and knows its own form of discovery only.
        assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
        job["static_configs"] = [{"targets": ["127.0.0.1:8002"]}]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(scrape))
    shutil.copy(HERE / "alerts.test.yaml", tmp_path)

    def run(*words: str) -> None:
        done = subprocess.run([tool, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def test_promtool_accepts_rules_and_configuration(promtool) -> None:
    promtool("check", "rules", "alerts.yaml")
    promtool("check", "config", "--syntax-only", "prometheus.yaml")


def test_alerts_fire_when_they_should(promtool) -> None:
    promtool("test", "rules", "alerts.test.yaml")


def test_each_alert_is_tried() -> None:
    tried = yaml.safe_load((HERE / "alerts.test.yaml").read_text())["tests"]
    fired = {c["alertname"] for one in tried for c in one["alert_rule_test"] if c.get("exp_alerts")}
    quiet = {
        c["alertname"] for one in tried for c in one["alert_rule_test"] if not c.get("exp_alerts")
    }
    assert fired == quiet == {rule["alert"] for rule in rules()}
