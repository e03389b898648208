"""The pages of the monitor, requested over real HTTP from a real broker."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.raw_client import MESSAGE, RECEIPT, WANT_RECEIPT
from support.scraping import get, watched


def test_monitor_running_broker_is_live_and_ready() -> None:
    """Both health pages answer 200 with a readable word."""
    with watched() as broker:
        live, ready = get(broker, "/livez"), get(broker, "/readyz")

    assert (live.status, live.body) == (200, "live\n")
    assert (ready.status, ready.body) == (200, "ready\n")
    assert ready.headers["cache-control"] == "no-store"


def test_monitor_draining_broker_is_live_but_not_ready() -> None:
    """During a drain new clients are sent elsewhere, and no supervisor restarts the
    broker.
    """
    with (
        watched(limits={"drain_timeout": "60s"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob"),
    ):
        for number in range(70):
            alice.send(MESSAGE, "bob", bytes(100_000), message_id=number, flags=WANT_RECEIPT)
            assert alice.recv().kind == RECEIPT
        broker.stop_soon()
        broker.log.wait("daemon.stopping")
        live, ready, metrics = (
            get(broker, "/livez"),
            get(broker, "/readyz"),
            get(broker, "/metrics"),
        )

    assert live.status == 200
    assert (ready.status, ready.body) == (503, "not ready: the broker is draining\n")
    assert "\nbrokerd_ready 0.0\n" in metrics.body


def test_monitor_not_configured_does_not_listen() -> None:
    """Without ``monitor:`` no socket is opened."""
    with watched(monitor=None) as broker:
        assert broker.daemon.monitor_addresses == []
        assert broker.log.named("monitor.listening") == []


@pytest.mark.parametrize(
    "page", ["/index.html", "/metrics/", "/metricsx", "/../etc/passwd", "/livez%2f"]
)
def test_monitor_unknown_page_is_not_found(page: str) -> None:
    """Any other path is answered by 404, with the list of pages."""
    with watched() as broker:
        answer = get(broker, page)

    assert (answer.status, answer.body) == (404, "there are /, /livez, /metrics, /readyz\n")


def test_monitor_query_string_is_ignored() -> None:
    """The part behind a question mark is not read: some health checks add a query."""
    with watched() as broker:
        assert get(broker, "/livez?verbose").status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_monitor_method_other_than_get_is_refused(method: str) -> None:
    """Every other method than GET and HEAD is refused."""
    with watched() as broker:
        answer = get(broker, "/metrics", method=method, body=b"x" * 100)

    assert answer.status == 405
    assert answer.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("page", ["/livez", "/readyz", "/metrics"])
def test_monitor_head_is_get_without_body(page: str) -> None:
    """HEAD returns the length of the page without the page."""
    with watched() as broker:
        answer = get(broker, page, method="HEAD")

    assert (answer.status, answer.body) == (200, "")
    assert int(answer.headers["content-length"]) > 0


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4; charset=utf-8"),
        ("*/*", "text/plain; version=0.0.4; charset=utf-8"),
        ("text/html,application/xhtml+xml", "text/plain; version=0.0.4; charset=utf-8"),
        ("text/plain;version=0.0.4;q=0.5", "text/plain; version=0.0.4; charset=utf-8"),
        # As Prometheus 2 asks.
        (
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        ),
        (
            "application/openmetrics-text",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        ),
        ("application/openmetrics-text; version=9.0.0", "text/plain; version=0.0.4; charset=utf-8"),
        # An invalid version.
        ("application/openmetrics-text;version=x.y", "text/plain; version=0.0.4; charset=utf-8"),
    ],
)
def test_metrics_format_follows_accept_header(accept: str, content_type: str) -> None:
    """A client that accepts OpenMetrics gets it, every other one gets Prometheus's own
    format. No value of the header is an error.
    """
    with watched() as broker:
        answer = get(broker, "/metrics", headers={"Accept": accept})

    assert answer.status == 200
    assert answer.headers["content-type"].startswith(content_type)
    assert answer.body.endswith("# EOF\n") == content_type.startswith("application/openmetrics")
    assert int(answer.headers["content-length"]) == len(answer.body.encode())


def test_monitor_unix_socket_is_only_for_its_owner(socket_dir: Path) -> None:
    """The monitor's socket file can be opened by the broker's user only, and is removed
    at the end.
    """
    path = socket_dir / "monitor"
    with watched(monitor=str(path)) as broker:
        assert path.stat().st_mode & 0o777 == 0o600
        assert get(broker, "/livez").status == 200

    assert not path.exists()


def test_monitor_exposed_address_is_warned_of() -> None:
    """The log warns once of an address that other hosts can reach, and does not warn of
    a local one.
    """
    with watched(monitor={"address": "0.0.0.0:0", "page": False}) as broker:
        warnings = broker.log.named("monitor.exposed")
    with watched() as local:
        none = local.log.named("monitor.exposed")

    assert [(each.level, each.fields["address"]) for each in warnings] == [("warning", "0.0.0.0:0")]
    assert "password" in warnings[0].fields["reason"]
    assert none == []
