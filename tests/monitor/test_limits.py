"""Limits of the monitor: no request, however bad, affects the broker's clients or the
next request.
"""

from __future__ import annotations

import contextlib
import socket
from time import monotonic

import pytest
from support.raw_client import MESSAGE
from support.running_daemon import RunningDaemon
from support.scraping import connect, ended, get, watched

from brokerd.monitor import http_server


@pytest.mark.timing
def test_monitor_with_silent_connections_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred connections send nothing. The pages are answered at once, messages
    pass, and only a few connections are kept open.
    """
    # No connection is closed because of its age.
    monkeypatch.setattr(http_server, "_LONGEST", 120.0)
    with watched() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        silent = [connect(broker) for _ in range(100)]
        began = monotonic()
        assert get(broker, "/readyz").status == 200
        assert get(broker, "/metrics").status == 200
        alice.send(MESSAGE, "bob", b"hello")
        assert bob.recv().body == b"hello"
        took = monotonic() - began

        assert took < http_server._LONGEST / 2
        # The oldest made room for the newer ones.
        assert all(ended(each) for each in silent[: 100 - http_server._MOST_SILENT])
        for each in silent:
            each.close()


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"GET /metr",
        b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ",
        b"POST /livez HTTP/1.1\r\nContent-Length: 99\r\n\r\n",
    ],
    ids=["nothing", "half a line", "half a header", "no body"],
)
def test_monitor_connection_without_whole_request_is_closed(
    monkeypatch: pytest.MonkeyPatch, beginning: bytes
) -> None:
    """The connection is closed after some seconds, whatever it has sent."""
    monkeypatch.setattr(http_server, "_LONGEST", 0.3)
    with watched() as broker, connect(broker) as slow:
        slow.sendall(beginning)

        assert ended(slow)


def test_monitor_connection_answers_one_request() -> None:
    """A second request on the same connection is not answered, however it was sent."""
    with watched() as broker, connect(broker) as sock:
        sock.sendall(
            b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: keep-alive\r\n\r\n" * 50
        )
        answer = b""
        with contextlib.suppress(ConnectionError):
            while data := sock.recv(65536):
                answer += data

    assert answer.count(b"HTTP/1.1 200") == 1
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize(
    "request_text",
    [
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nX-Long: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n" + b"X-Many: x\r\n" * 100_000 + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"\r\n" * 1000,
        b"NONSENSE\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
        + b"x" * 100_000,
        b"GET /livez HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\nhello",
    ],
    ids=[
        "long line",
        "long header",
        "many headers",
        "TLS",
        "empty lines",
        "nonsense",
        "upgrade",
        "smuggled",
    ],
)
def test_monitor_invalid_request_ends_connection_without_log(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], request_text: bytes
) -> None:
    """The connection ends, nothing is logged or printed, and the next request is
    served.
    """
    monkeypatch.setattr(http_server, "_LONGEST", 1.0)
    with watched() as broker:
        with connect(broker) as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(request_text)
            assert ended(sock)
        assert get(broker, "/livez").status == 200
        bugs = broker.log.named("monitor.bug")

    assert bugs == []
    assert capfd.readouterr() == ("", "")


def test_monitor_slow_reader_of_long_page_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """It requests megabytes and does not read. Other requests are served, and the slow
    connection is closed in the end.
    """
    monkeypatch.setattr(http_server, "_LONGEST", 2.0)
    clients = {f"client-with-a-long-name-{number:040}": {} for number in range(3000)}
    monitor = {"address": "127.0.0.1:0", "per_client": True}
    with watched(clients, monitor=monitor) as broker, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(30)
        slow.connect(broker.daemon.monitor_addresses[0].sockaddr)
        slow.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        answer = slow.recv(1)
        # The others may take longer.
        monkeypatch.setattr(http_server, "_LONGEST", 120.0)
        page = get(broker, "/metrics").body
        assert get(broker, "/livez").status == 200

        deadline = monotonic() + 30
        while connection_count(broker):
            assert monotonic() < deadline
        with contextlib.suppress(ConnectionError):
            while data := slow.recv(65536):
                answer += data

    assert len(answer) < len(page)


def connection_count(broker: RunningDaemon) -> int:
    """Return the number of the monitor's connections."""
    monitor_server = broker.daemon._monitor._server
    assert monitor_server is not None
    return broker.call(lambda: len(monitor_server._http_server._open_connections))


def test_metrics_collection_is_followed_by_nine_times_its_duration() -> None:
    """However often the page is requested, each collection is followed by a pause nine
    times as long.
    """
    with watched() as broker:
        monitor_server = broker.daemon._monitor._server
        assert monitor_server is not None
        began = broker.call(monitor_server._loop.time)
        assert get(broker, "/metrics").status == 200
        rested_at = broker.call(lambda: monitor_server._rested_at)
        ended_at = broker.call(monitor_server._loop.time)
        pause_end = broker.call(monitor_server._loop.time) + 1.0
        broker.call(lambda: setattr(monitor_server, "_rested_at", pause_end))
        assert get(broker, "/metrics").status == 200
        read_at = broker.call(monitor_server._loop.time)

    # The pause is nine times as long as the collection, which took at most the time that
    # the request took.
    assert began < rested_at <= ended_at + http_server._REST * (ended_at - began)
    assert read_at >= pause_end - 0.01


def test_monitor_health_pages_do_not_wait_for_metrics() -> None:
    """While /metrics pauses, health checks are answered at once."""
    with watched() as broker, connect(broker) as metrics:
        monitor_server = broker.daemon._monitor._server
        assert monitor_server is not None
        broker.call(lambda: setattr(monitor_server, "_rested_at", monitor_server._loop.time() + 60))
        metrics.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")

        assert get(broker, "/livez").status == 200
        assert get(broker, "/readyz").status == 200
        metrics.setblocking(False)
        with pytest.raises(BlockingIOError):
            metrics.recv(1)


def test_monitor_connections_per_second_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections beyond a number per second wait for the next second; none is lost."""
    monkeypatch.setattr(http_server, "_A_SECOND", 5)
    with watched() as broker:
        began = monotonic()
        for _ in range(12):
            assert get(broker, "/livez").status == 200
        took = monotonic() - began

    assert took > 1.5


def test_metrics_request_of_closed_connection_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of closed connections are not served, so that no client can build up a
    queue of them.
    """
    with watched() as broker:
        monitor_server = broker.daemon._monitor._server
        assert monitor_server is not None
        read = []
        families_of = monitor_server._families
        monkeypatch.setattr(monitor_server, "_families", lambda: read.append(1) or families_of())
        broker.call(
            lambda: setattr(monitor_server, "_rested_at", monitor_server._loop.time() + 1.0)
        )
        for _ in range(10):
            with connect(broker) as sock:
                sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert get(broker, "/metrics").status == 200

    assert len(read) == 1
