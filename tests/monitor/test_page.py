"""The monitor's page for browsers: its files, its stream, and what protects it."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.channels import channel
from support.fake_network import FakeNet, client
from support.raw_client import ACK, JSON, MESSAGE, RECEIPT, WANT_RECEIPT
from support.running_daemon import RunningDaemon
from support.scraping import connect, get, watched

import brokerd.monitor
from brokerd.config.load import ConfigError, load, load_text
from brokerd.monitor.history import SECONDS, History
from brokerd.monitor.live import MOST_STREAMS
from brokerd.monitor.loop_lag import Lag
from brokerd.monitor.password import is_right

WEB = Path(brokerd.monitor.__file__).parent / "web"
TIMEOUT_S = 30.0


class Stream:
    """A page's stream of events."""

    def __init__(self, broker: RunningDaemon, query: str = "", **headers: str) -> None:
        self._sock = connect(broker)
        extra = "".join(f"{name.replace('_', '-')}: {text}\r\n" for name, text in headers.items())
        request = f"GET /live?{query} HTTP/1.1\r\nHost: localhost\r\n{extra}\r\n"
        self._sock.sendall(request.encode())
        self._data = b""

    def next_event(self) -> dict[str, Any]:
        """Wait for the next event."""
        while (found := re.search(rb"data: (.*)\n\n", self._data)) is None:
            data = self._sock.recv(65536)
            assert data, self._data
            self._data += data
        self._data = self._data[found.end() :]
        event = json.loads(found[1])
        assert isinstance(event, dict)
        return event

    def until(self, wanted: Any) -> dict[str, Any]:
        """Wait for an event that fits."""
        while not wanted(event := self.next_event()):
            pass
        return event

    def close(self) -> None:
        """Leave the page."""
        self._sock.close()


@contextmanager
def stream(broker: RunningDaemon, query: str = "") -> Iterator[Stream]:
    """Open a page's stream for a while."""
    opened = Stream(broker, query)
    try:
        yield opened
    finally:
        opened.close()


@pytest.mark.parametrize(
    ("page", "kind"),
    [("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")],
)
def test_page_files_are_served_under_a_strict_policy(page: str, kind: str) -> None:
    """The browser runs and loads only what comes from this origin, and frames nothing."""
    with watched() as broker:
        answer = get(broker, page)

    assert (answer.status, answer.headers["content-type"]) == (200, f"{kind}; charset=utf-8")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy


def test_page_names_no_other_origin_and_has_no_inline_script() -> None:
    """The policy forbids both; a page that needs them would be broken."""
    for path in WEB.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]|@import|url\(", text), path.name
    html = (WEB / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?! src)|<style| style=| on[a-z]+=", html)


def test_page_under_foreign_host_is_misdirected() -> None:
    """A page of another origin whose name leads here gets nothing (DNS rebinding)."""
    with watched() as broker:
        for page in ("/", "/page.js", "/live"):
            assert get(broker, page, headers={"Host": "evil.example"}).status == 421


@pytest.mark.parametrize(("site", "status"), [("cross-site", 403), ("same-site", 403)])
def test_page_stream_asked_by_other_site_is_forbidden(site: str, status: int) -> None:
    """Another page must not use up the streams."""
    with watched() as broker:
        assert get(broker, "/live", headers={"Sec-Fetch-Site": site}).status == status


def test_page_switched_off_is_not_found() -> None:
    """The other pages stay."""
    with watched(monitor={"address": "127.0.0.1:0", "page": False}) as broker:
        answer = get(broker, "/")
        assert (answer.status, answer.body) == (404, "there are /livez, /metrics, /readyz\n")
        assert get(broker, "/live").status == 404
        assert get(broker, "/metrics").status == 200


def test_page_stream_begins_with_history_and_goes_on_with_samples() -> None:
    """A sample comes each second, with the refusals by their code."""
    with (
        watched({"alice": {}, "bob": {"expected": True}}) as broker,
        broker.login("alice") as alice,
        stream(broker) as page,
    ):
        first = page.next_event()
        assert isinstance(first["history"], list)
        assert first["facts"]["clients"] == 2
        names = [(row["name"], row["state"]) for row in first["table"]["rows"]]
        assert names == [("alice", "online"), ("bob", "expected, offline")]

        alice.send(1, "bob", b"hello")
        assert alice.recv().code == "offline"

        sample = page.until(lambda event: event["sample"] and event["sample"]["refused"])["sample"]
        assert sample["refused"] == {"offline": 1}
        assert (sample["connections"], sample["online"]) == (1, 1)
        assert sample["memory"] > 0


def test_page_stream_shows_client_and_topics() -> None:
    """The details have the rules, the subscriptions and the last refusals."""
    with (
        watched({"alice": {"send_to": ["bob"]}, "bob": {}}) as broker,
        broker.login("alice") as alice,
    ):
        alice.ask("subscribe", topic="jobs.>")
        alice.send(1, "bob", b"x")
        alice.recv()
        with stream(broker, "client=alice&view=topics") as page:
            event = page.next_event()
        with stream(broker, "client=nobody") as page:
            assert page.next_event()["client"] is None

    shown = event["client"]
    assert shown["rules"]["send_to"]["patterns"] == ["bob"]
    assert shown["subscriptions"] == ["jobs.>"]
    assert [each["code"] for each in shown["incidents"]] == ["offline"]
    assert [each["address"] for each in shown["connections"]] == ["alice"]
    assert event["table"]["rows"] == [{"pattern": "jobs.>", "subscriptions": 1}]


def test_page_stream_shows_channels_with_the_rate_of_their_bytes() -> None:
    """A view that there is not has no table, and harms nothing."""
    with (
        watched("alice bob") as broker,
        channel(broker, "alice", "bob") as (alice, bob),
        stream(broker, "view=channels&client=bob") as page,
    ):
        first = page.next_event()
        (row,) = first["table"]["rows"]
        assert (row["caller"], row["recipient"], row["state"]) == ("alice", "bob", "open")
        assert [each["caller"] for each in first["client"]["channels"]] == ["alice"]
        assert first["facts"]["channels"] == 1

        alice.write(bytes(1000))
        bob.read(1000)

        page.until(lambda event: event["table"]["rows"][0]["to_recipient"] > 0)
        with stream(broker, "view=secrets") as other:
            assert other.next_event()["table"] is None


@pytest.mark.skipif(sys.platform == "win32", reason="mailboxes need POSIX locks")
def test_page_stream_shows_mailboxes_with_their_dead_letters(tmp_path: Path) -> None:
    """The counts are in the tables, the dead letters in the details, without payloads."""
    clients = {"alice": {}, "bob": {"mailbox": True}}
    store = {"path": str(tmp_path / "store"), "min_free": 0}
    with watched(clients, store=store) as broker, broker.login("alice") as alice:
        for number in (1, 2):
            alice.send(MESSAGE, "bob", b"secret", message_id=number, flags=WANT_RECEIPT)
            assert alice.recv().kind == RECEIPT
        with broker.login("bob") as bob:
            bob.ask("open_mailbox", window=1)
            assert bob.recv().kind == MESSAGE
            verb = json.dumps({"verb": "dead", "reason": "no such order"}).encode()
            bob.send(ACK, "", verb, message_id=1, codec=JSON, flags=WANT_RECEIPT)
            while bob.recv().kind != RECEIPT:
                pass
        with stream(broker, "view=mailboxes&mailbox=bob") as page:
            event = page.next_event()
            by_name = {row["name"]: row for row in event["table"]["rows"]}
            assert by_name["bob"]["dead"] == event["mailbox"]["dead"] == 1
            (letter,) = event["mailbox"]["letters"]
            assert (letter["sender"], letter["error"]) == ("alice", "no such order")
            assert "payload" not in letter
        with stream(broker, "client=bob&mailbox=nobody") as page:
            event = page.next_event()
            rows = {row["name"]: (row["stored"], row["dead"]) for row in event["table"]["rows"]}
            assert rows == {"alice": (None, None), "bob": (1, 1)}
            assert event["client"]["mailbox"]["dead"] == 1
            assert event["mailbox"] is None


def test_page_streams_are_bounded_and_leave_room_for_probes() -> None:
    """One more page is refused; the streams displace no request, and none displaces them."""
    with watched() as broker:
        pages = [Stream(broker) for _ in range(MOST_STREAMS)]
        for page in pages:
            page.next_event()
        assert get(broker, "/live").status == 503
        for _ in range(20):
            assert get(broker, "/livez").status == 200
        for page in pages:
            page.next_event()
            page.close()
        # The places become free.
        while get(broker, "/live", method="HEAD").status == 503:
            pass


def test_page_password_is_demanded_for_all_but_probes(tmp_path: Path) -> None:
    """Any user name will do; the probes have no password."""
    file = tmp_path / "password"
    file.touch(mode=0o600)
    file.write_text("correct horse\n")
    monitor = {"address": "127.0.0.1:0", "password_file": str(file)}
    with watched(monitor=monitor) as broker:
        for page in ("/", "/page.js", "/live", "/metrics", "/nothing"):
            answer = get(broker, page)
            assert answer.status == 401
            assert answer.headers["www-authenticate"].startswith("Basic ")
        right = {"Authorization": "Basic " + base64.b64encode(b"me:correct horse").decode()}
        assert get(broker, "/", headers=right).status == 200
        assert get(broker, "/metrics", headers=right).status == 200
        assert get(broker, "/livez").status == get(broker, "/readyz").status == 200


@pytest.mark.parametrize(
    ("header", "right"),
    [
        ("Basic " + base64.b64encode(b"u:secret").decode(), True),
        ("basic " + base64.b64encode(b":secret").decode(), True),
        ("Basic " + base64.b64encode(b"u:se:cret").decode(), False),
        ("Basic " + base64.b64encode(b"secret").decode(), False),
        ("Basic " + base64.b64encode(b"u:").decode(), False),
        ("Basic %%%", False),
        ("Basic é", False),
        ("Bearer secret", False),
        ("", False),
    ],
)
def test_page_password_of_header_is_compared(header: str, right: bool) -> None:
    """Only Basic authentication with the very password is right."""
    assert is_right(header, b"secret") is right


LISTEN = "listen: [/run/b.sock]\nclients: {a: {key: k}}\n"


@pytest.mark.parametrize("address", ["0.0.0.0:6060", "'[::]:6060'", "192.0.2.1:6060"])
def test_page_beyond_loopback_without_password_is_refused(address: str) -> None:
    """The error names the three remedies; each of them works."""
    with pytest.raises(ConfigError, match=r"give it monitor\.password_file, a local address"):
        load_text(f"{LISTEN}monitor: {address}\n")
    load_text(f"{LISTEN}monitor: {{address: {address}, page: false}}\n")


def test_page_password_file_is_checked(tmp_path: Path) -> None:
    """It must be private, and long enough; no error shows it."""
    config, file = tmp_path / "b.yaml", tmp_path / "password"
    config.write_text("listen: [./s]\nmonitor: {address: 0.0.0.0:6060, password_file: password}\n")
    with pytest.raises(ConfigError, match=r"monitor\.password_file: .*brokerd key >"):
        load(config)
    file.touch(mode=0o600)
    file.write_text("short")
    with pytest.raises(ConfigError, match="fewer than 8 bytes") as caught:
        load(config)
    assert "short" not in str(caught.value)
    file.write_text("long enough\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod"):
        load(config)
    file.chmod(0o600)
    monitor = load(config).monitor
    assert monitor is not None
    assert monitor.password == b"long enough"
    assert "long enough" not in repr(monitor)


def test_history_keeps_a_bounded_number_of_samples() -> None:
    """Fifteen minutes of seconds are kept, whatever the time that the broker runs."""

    async def fill() -> History:
        net = FakeNet(client("alice"))
        sources: Any = SimpleNamespace(
            broker=net.broker, server=lambda: SimpleNamespace(connections=())
        )
        lag = Lag(asyncio.get_running_loop())
        history = History(sources, lag)
        for _ in range(SECONDS + 20):
            await history.sample()
        history.close()
        lag.close()
        return history

    history = asyncio.run(fill())

    assert len(history.samples) == SECONDS
    assert history.samples[0]["in"] == 0


def test_page_stream_of_browser_that_left_frees_its_place() -> None:
    """More pages than there are places can be opened one after the other."""
    with watched() as broker:
        for _ in range(2 * MOST_STREAMS):
            while get(broker, "/live", method="HEAD").status == 503:
                pass
            with stream(broker) as page:
                page.next_event()
