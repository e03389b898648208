"""The dashboard, the alert rules and the page of documentation speak of metrics that
exist, and of each that does.
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
def known() -> dict[str, set[str]]:
    """Every series of a broker's /metrics, by the name of the sample, with its labels."""
    clients = {
        "alice": {"keys": [{"key": "k", "not_after": datetime.now(UTC) + timedelta(days=9)}]},
        "bob": {},
    }
    with watched(clients, monitor={"address": "127.0.0.1:0", "per_client": True}) as broker:
        found = families(broker)
    labels: dict[str, set[str]] = {}
    for family in found.values():
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
def test_every_expression_asks_for_what_exists(
    where: str, expression: str, known: dict[str, set[str]]
) -> None:
    """Each metric is one of /metrics, each label one that it has, and the brackets
    match.
    """
    outgoing_requests = _METRIC.findall(expression)
    assert outgoing_requests or where == "alert BrokerdDown"
    assert set(outgoing_requests) <= known.keys()
    for name, selector in _SELECTOR.findall(expression):
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) <= known[name] | {
            "job",
            "instance",
        }
    for grouped in re.findall(r"by \(([^)]*)\)", expression):
        labels = {label for name in outgoing_requests for label in known[name]} | {
            "job",
            "instance",
        }
        assert set(re.split(r",\s*", grouped)) <= labels
    assert [expression.count(each) for each in "([{"] == [expression.count(each) for each in ")]}"]


def test_every_counter_is_asked_for_as_a_rate() -> None:
    """A counter by itself says nothing on a dashboard, and a gauge has no rate."""
    for where, expression in expressions():
        for match in re.finditer(r"(\w+\()?((?:brokerd|process)_\w+)(\{[^}]*\})?(\[)?", expression):
            counts = match[2].endswith(("_total", "_bucket"))
            assert counts == (match[4] is not None), (where, expression)
            assert counts == (match[1] in ("rate(", "increase(")), (where, expression)


def test_the_dashboard_is_well_formed() -> None:
    """Panels have names, numbers of their own and a place that no other has."""
    panels: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]

    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["title"]
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_the_alerts_are_well_formed() -> None:
    """Every rule has a name of its own, a severity and a sentence."""
    (group,) = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    rules = group["rules"]

    assert len({rule["alert"] for rule in rules}) == len(rules) > 10
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"].endswith(".")
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_commands_of_the_page_do_what_it_says() -> None:
    """What an operator is told to type works as it stands, but for the port."""
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


def test_the_page_tells_of_every_metric_and_of_no_other(known: dict[str, set[str]]) -> None:
    """docs/operations.md has a row for each of the broker's metrics."""
    page = PAGE.read_text(encoding="utf-8")
    described = set(re.findall(r"(?m)^\| `(brokerd_\w+)` \|", page))
    bases = {re.sub(r"(?<=_lag_seconds)_(bucket|count|sum)$", "", name) for name in known}

    assert described == {name for name in bases if name.startswith("brokerd_")}
    assert {name for name in bases if name.startswith("process_")} <= set(
        re.findall(r"`(process_\w+)`", page)
    )
