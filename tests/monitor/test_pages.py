"""The pages of the monitor, asked for over real HTTP from a real broker."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.raw_client import MESSAGE, RECEIPT, WANT_RECEIPT
from support.scraping import get, watched


def test_a_running_broker_is_live_and_ready() -> None:
    """Both health pages answer 200 with a word for people."""
    with watched() as broker:
        live, ready = get(broker, "/livez"), get(broker, "/readyz")

    assert (live.status, live.body) == (200, "live\n")
    assert (ready.status, ready.body) == (200, "ready\n")
    assert ready.headers["cache-control"] == "no-store"


def test_a_draining_broker_is_live_but_not_ready() -> None:
    """While it drains, new clients are sent elsewhere; nobody restarts it for that."""
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


def test_there_is_no_monitor_unless_it_is_asked_for() -> None:
    """Without ``monitor:`` nothing listens."""
    with watched(monitor=None) as broker:
        assert broker.daemon.monitor_addresses == []
        assert broker.log.named("monitor.listening") == []


@pytest.mark.parametrize(
    "page", ["/", "/metrics/", "/metricsx", "/../etc/passwd", "/livez%2f", "/?/livez"]
)
def test_an_unknown_page_is_not_found(page: str) -> None:
    """Whatever else is asked for is 404, and the answer says what there is."""
    with watched() as broker:
        answer = get(broker, page)

    assert (answer.status, answer.body) == (404, "there are /livez, /readyz, /metrics\n")


def test_a_query_changes_nothing() -> None:
    """What stands behind a question mark is not looked at: some health checks add
    something there.
    """
    with watched() as broker:
        assert get(broker, "/livez?verbose").status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_a_page_can_only_be_read(method: str) -> None:
    """Every other method is refused."""
    with watched() as broker:
        answer = get(broker, "/metrics", method=method, body=b"x" * 100)

    assert answer.status == 405
    assert answer.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("page", ["/livez", "/readyz", "/metrics"])
def test_head_is_get_without_the_body(page: str) -> None:
    """HEAD says how long the page is, and does not send it."""
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
        # A version that is none.
        ("application/openmetrics-text;version=x.y", "text/plain; version=0.0.4; charset=utf-8"),
    ],
)
def test_the_format_is_the_one_asked_for(accept: str, content_type: str) -> None:
    """OpenMetrics for who asks for it, else Prometheus's own format; nothing that is
    asked for is an error.
    """
    with watched() as broker:
        answer = get(broker, "/metrics", headers={"Accept": accept})

    assert answer.status == 200
    assert answer.headers["content-type"].startswith(content_type)
    assert answer.body.endswith("# EOF\n") == content_type.startswith("application/openmetrics")
    assert int(answer.headers["content-length"]) == len(answer.body.encode())


def test_a_unix_socket_is_its_owners_alone(socket_dir: Path) -> None:
    """The monitor's socket file can be opened by the broker's user only, and is removed
    at the end.
    """
    path = socket_dir / "monitor"
    with watched(monitor=str(path)) as broker:
        assert path.stat().st_mode & 0o777 == 0o600
        assert get(broker, "/livez").status == 200

    assert not path.exists()


def test_an_address_that_others_reach_is_warned_of() -> None:
    """The log says once what it means to be reachable, and of a local address says
    nothing.
    """
    with watched(monitor="0.0.0.0:0") as broker:
        warnings = broker.log.named("monitor.exposed")
    with watched() as local:
        none = local.log.named("monitor.exposed")

    assert [(each.level, each.fields["address"]) for each in warnings] == [("warning", "0.0.0.0:0")]
    assert "password" in warnings[0].fields["reason"]
    assert none == []
