"""The dashboard, the alert rules and the documentation name existing metrics, and the
documentation names all of them.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.scraping import families, watched

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "config" / "grafana-dashboard.json"
ALERTS = ROOT / "config" / "prometheus-alerts.yaml"
PAGE = ROOT / "docs" / "operations.md"

_METRIC = re.compile(r"\b(?:brokerd|process)_[a-z0-9_]+")
_SELECTOR = re.compile(r"\b((?:brokerd|process)_[a-z0-9_]+)\{([^}]*)\}")


@pytest.fixture(scope="module")
def labels_by_name() -> dict[str, set[str]]:
    """Return the labels of every sample of a broker's /metrics, by the sample's name."""
    clients = {
        "alice": {"keys": [{"key": "k", "not_after": datetime.now(UTC) + timedelta(days=9)}]},
        "bob": {"expected": True},
    }
    with watched(clients, monitor={"address": "127.0.0.1:0", "per_client": True}) as broker:
        by_name = families(broker)
    labels: dict[str, set[str]] = {}
    for family in by_name.values():
        if not family.samples:
            # Of hosts, which a broker without a cluster does not have.
            labels[family.name + "_total" * (family.type == "counter")] = {"host"}
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def expressions() -> Iterator[tuple[str, str]]:
    """Yield (where, PromQL) of every panel, variable and alert."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield f"panel {panel['title']}", target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']}", variable["query"]["query"]
    for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']}", rule["expr"]


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_dashboard_and_alerts_use_existing_metrics_and_labels(
    where: str, expression: str, labels_by_name: dict[str, set[str]]
) -> None:
    """Each metric is one of /metrics, each label is one that it has, and the brackets
    match.
    """
    metrics = _METRIC.findall(expression)
    assert metrics or where == "alert BrokerdDown"
    assert set(metrics) <= labels_by_name.keys()
    for name, selector in _SELECTOR.findall(expression):
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) <= labels_by_name[name] | {
            "job",
            "instance",
        }
    for grouped in re.findall(r"by \(([^)]*)\)", expression):
        labels = {label for name in metrics for label in labels_by_name[name]} | {
            "job",
            "instance",
        }
        assert set(re.split(r",\s*", grouped)) <= labels
    assert [expression.count(each) for each in "([{"] == [expression.count(each) for each in ")]}"]


def test_dashboard_and_alerts_use_counters_as_rates() -> None:
    """A counter alone says nothing on a dashboard, and a gauge has no rate."""
    for where, expression in expressions():
        for match in re.finditer(r"(\w+\()?((?:brokerd|process)_\w+)(\{[^}]*\})?(\[)?", expression):
            if match[1] == "changes(":
                continue
            counts = match[2].endswith(("_total", "_bucket"))
            assert counts == (match[4] is not None), (where, expression)
            assert counts == (match[1] in ("rate(", "increase(")), (where, expression)


def test_dashboard_panels_have_title_id_and_own_place() -> None:
    """Panels have titles, unique ids, and places that do not overlap."""
    panels: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]

    assert len({panel["id"] for panel in panels}) == len(panels)
    occupied: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["title"]
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & occupied, panel["title"]
        assert at["x"] + at["w"] <= 24
        occupied |= cells


def test_alerts_have_unique_name_severity_and_summary() -> None:
    """Every rule has a unique name, a severity and a sentence."""
    (group,) = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    rules = group["rules"]

    assert len({rule["alert"] for rule in rules}) == len(rules) > 10
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"].endswith(".")
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_docs_monitoring_commands_work_as_printed() -> None:
    """The commands in the documentation work as they are printed, except for the port."""
    section = (
        PAGE.read_text(encoding="utf-8").partition("\n## Monitoring\n")[2].partition("\n## ")[0]
    )
    (commands,) = re.findall(r"(?s)```sh\n(.*?)```", section)
    with watched() as broker:
        text = commands.replace("127.0.0.1:6060", str(broker.daemon.monitor_addresses[0]))
        done = subprocess.run(
            ["sh", "-e", "-c", text], capture_output=True, text=True, timeout=60, check=True
        )

    assert done.stdout.startswith("ready\n")
    assert "\nbrokerd_connections 0.0\n" in done.stdout


def test_docs_list_every_metric_and_no_other(labels_by_name: dict[str, set[str]]) -> None:
    """docs/operations.md has a row for each of the broker's metrics."""
    page = PAGE.read_text(encoding="utf-8")
    described = set(re.findall(r"(?m)^\| `(brokerd_\w+)` \|", page))
    bases = {re.sub(r"(?<=_lag_seconds)_(bucket|count|sum)$", "", name) for name in labels_by_name}

    assert described == {name for name in bases if name.startswith("brokerd_")}
    assert {name for name in bases if name.startswith("process_")} <= set(
        re.findall(r"`(process_\w+)`", page)
    )
