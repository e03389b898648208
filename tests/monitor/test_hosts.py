"""The Host header: which requests the monitor answers, so that no web page can read it
under a name of its own (DNS rebinding).
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from support.scraping import TIMEOUT_S, get, watched

from brokerd.monitor.hosts import fits
from brokerd_client.address import Address

NAMES = frozenset({"broker.example"})


@pytest.mark.parametrize(
    "value",
    [
        "127.0.0.1",
        "127.0.0.1:6060",
        "10.1.2.3:6060",
        "[::1]",
        "[::1]:6060",
        "::1",
        "[fe80::1%eth0]:6060",
        "localhost",
        "localhost:6060",
        "LOCALHOST.",
        "broker.example",
        "Broker.Example.:6060",
        " broker.example ",
        "",
    ],
)
def test_monitor_host_of_ip_address_localhost_or_configured_name_fits(value: str) -> None:
    """IP addresses of any kind, localhost and configured names fit, with a port or
    without.
    """
    assert fits([value], NAMES)
    assert fits([], NAMES)


@pytest.mark.parametrize(
    "value",
    [
        "evil.example",
        "evil.example:6060",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil.example:127.0.0.1",
        "broker.example.evil.example",
        "xbroker.example",
        "[evil.example]",
        "[::1].evil.example:80",
        "127.0.0.1@evil.example",
        "evil.example#127.0.0.1",
        "0x7f.1",
    ],
)
def test_monitor_host_of_another_name_does_not_fit(value: str) -> None:
    """It does not fit however similar it is to one that fits, or if a second value
    fits.
    """
    assert not fits([value], NAMES)
    assert not fits(["127.0.0.1", value], NAMES)
    assert not fits([value, "127.0.0.1"], NAMES)


@pytest.mark.parametrize("page", ["/livez", "/readyz", "/metrics", "/nowhere"])
def test_monitor_request_for_another_name_is_misdirected(page: str) -> None:
    """The answer is 421, with a sentence that says what would be right, and nothing of
    the page.
    """
    with watched() as broker:
        answer = get(broker, page, headers={"Host": "evil.example"})
        after = get(broker, page, headers={"Host": "10.0.0.7:6060"})

    assert answer.status == 421
    assert "monitor.hosts" in answer.body
    assert "localhost" in answer.body
    assert after.status == (404 if page == "/nowhere" else 200)


def test_monitor_request_for_configured_name_is_answered() -> None:
    """The names in ``hosts`` are accepted, and the one in the address itself."""
    with watched(monitor={"address": "localhost:0", "hosts": ["Broker.Example"]}) as broker:
        statuses = [
            get(broker, "/livez", headers={"Host": host}).status
            for host in ("broker.example:6060", "localhost", "127.0.0.1", "other.example")
        ]

    assert statuses == [200, 200, 200, 421]


def raw(at: Address, request: bytes) -> bytes:
    """Send a request unchanged; return the first line of its answer."""
    with socket.create_connection(at.sockaddr, timeout=TIMEOUT_S) as sock:
        sock.sendall(request)
        return sock.makefile("rb").readline()


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (b"GET /livez HTTP/1.0\r\n\r\n", b"200"),
        (b"GET http://evil.example/livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"421"),
        (b"GET http://127.0.0.1/livez HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"421"),
        (b"GET http://127.0.0.1:80/livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"200"),
        (b"GET /livez?to=http://evil.example HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"200"),
    ],
    ids=["no header", "URL of another name", "header of another name", "URL", "URL in the query"],
)
def test_monitor_request_is_judged_by_url_and_host_header(
    request_text: bytes, status: bytes
) -> None:
    """A health check without a Host header, as in HTTP/1.0, is answered."""
    with watched() as broker:
        assert raw(broker.daemon.monitor_addresses[0], request_text).split()[1] == status


def test_monitor_request_at_unix_socket_may_have_any_host(socket_dir: Path) -> None:
    """No browser can connect to one, and programs send any value there."""
    with watched(monitor=str(socket_dir / "monitor")) as broker:
        assert get(broker, "/livez", headers={"Host": "docker"}).status == 200
