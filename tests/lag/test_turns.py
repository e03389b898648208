"""No event that a client, an operator or a signal causes blocks the event loop:
connections, reloads, the end.
"""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.keys import key_of
from support.lag.crowded_broker import CONNECTED, OWN, Crowded, crowded, large_config, large_text
from support.raw_client import EVENT, JSON, MESSAGE, REPLY, REQUEST, Raw, login, packed

from brokerd.config.load import load, load_text
from brokerd.core import snapshot
from brokerd.core.replies import Replies
from brokerd.core.session import Session
from brokerd.core.snapshot import capture
from brokerd.monitor import http_server
from brokerd.net import handover
from brokerd.net.connection.connection import Connection
from brokerd_client.address import Address

# Connections


def test_event_loop_with_connect_and_disconnect_stays_responsive(broker: Crowded) -> None:
    """With a name, and without one, so that 1,000 keys are tried."""
    broker.login("sender").close()
    login(broker.address, key_of("one-wait")).close()
    for _ in range(50):
        with Raw(broker.address) as silent:
            silent.read_body()
    broker.idle()
    broker.meter.check()


def test_event_loop_with_10000_subscriptions_removed_stays_responsive(broker: Crowded) -> None:
    """However many subscriptions and groups the client has."""
    session = broker.call(lambda: broker.connect_without_socket("subscriber"))

    def subscribe() -> None:
        for number in range(10_000):
            topic, group = f"t{number % 100}.*.n{number}.x", f"g{number}" if number % 2 else None
            broker.daemon.broker.topics.add(topic, session, group)
            session.subscriptions.add((topic, group))

    broker.call(subscribe)
    broker.meter.reset()
    broker.timed(lambda: session.connection.lost("the test says so"))
    broker.idle()
    broker.meter.check()


def test_event_loop_with_10000_topics_changed_stays_responsive(broker: Crowded) -> None:
    """One subscription, or the end of thousands, concerns all topics in the cache."""
    session = broker.call(lambda: broker.connect_without_socket("subscriber"))
    topics = broker.daemon.broker.topics

    def publish() -> None:
        for number in range(10_000):
            topics.find(f"t{number % 100}.n{number}.x")

    def subscribe() -> None:
        for number in range(5000):
            topics.add(f"t{number % 100}.*.n{number}", session)
            session.subscriptions.add((f"t{number % 100}.*.n{number}", None))

    broker.call(subscribe)
    for change in (
        lambda: topics.add(">", session, "g"),
        lambda: session.connection.lost("the test says so"),
    ):
        broker.call(publish)
        broker.meter.reset()
        broker.timed(change)
        broker.call(broker.daemon.server.settle)
        # The presence of the client may be there by now.
        assert broker.call(lambda: len(topics.cache.topics)) < 9
        broker.idle()
        broker.meter.check()


def test_event_loop_with_1000_held_senders_stays_responsive(broker: Crowded) -> None:
    """All of them are released when the recipient leaves."""
    recipient = broker.call(lambda: broker.connect_without_socket("one-wait", writable=False))
    senders = broker.call(lambda: [broker.connect_without_socket("crowd") for _ in range(1000)])
    frame = memoryview(packed(MESSAGE, "one-wait", bytes(1000), message_id=7))[4:]

    def hold() -> None:
        outbox = recipient.outbox
        outbox.append(memoryview(packed(MESSAGE, "sender", bytes(outbox.limit - 200))))
        broker.daemon.broker.replies.touch(recipient)
        broker.daemon.server.settle()
        for sender in senders:
            broker.daemon.broker.handle(sender, frame, broker.loop.time())
            sender.connection.pending_input = packed(MESSAGE, "one-wait", bytes(1000), message_id=8)

    broker.call(hold)
    assert broker.call(lambda: sum(sender.held_by is recipient for sender in senders)) == 1000
    broker.meter.reset()
    broker.timed(lambda: recipient.connection.lost("the test says so"))
    broker.idle()
    broker.meter.check()
    broker.empty(senders)


def test_event_loop_with_1000_presence_subscribers_stays_responsive(broker: Crowded) -> None:
    """A client connects and disconnects while 1,000 connections subscribe to its
    presence.
    """
    subscribers = broker.call(lambda: [broker.connect_without_socket("crowd") for _ in range(1000)])

    def subscribe_to_presence() -> None:
        for session in subscribers:
            broker.daemon.broker.topics.add("$broker.>", session)
            session.subscriptions.add(("$broker.>", None))

    broker.call(subscribe_to_presence)
    broker.meter.reset()
    for _ in range(3):
        with broker.login("sender") as sender:
            sender.ping()
            session = broker.session("sender")
        broker.until(lambda: not session.open)  # noqa: B023 - called at once
    broker.idle()
    broker.meter.check()
    broker.empty(subscribers)


@pytest.mark.parametrize("groups", [3000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_event_loop_with_many_presence_groups_stays_responsive(groups: int) -> None:
    """A client connects and disconnects while 30 connections have thousands of groups
    each on all of the broker's topics.
    """
    with crowded(large_config(OWN)) as broker:
        subscribers = broker.call(
            lambda: [broker.connect_without_socket("crowd") for _ in range(30)]
        )

        def subscribe_to_presence(session: Session, first: int) -> None:
            for number in range(first, first + 1000):
                broker.daemon.broker.topics.add("$broker.>", session, f"g{number}")
                session.subscriptions.add(("$broker.>", f"g{number}"))

        for session in subscribers:
            for first in range(0, groups, 1000):
                broker.call(lambda: subscribe_to_presence(session, first))  # noqa: B023 - called at once
        broker.idle()
        broker.meter.reset()
        with broker.login("sender") as sender:
            sender.ping()
            session = broker.session("sender")
        broker.until(lambda: not session.open)
        broker.idle()
        broker.meter.check()


def test_event_loop_with_pool_of_2000_stays_responsive(broker: Crowded) -> None:
    """For each message one member is picked."""
    members = broker.call(lambda: [broker.connect_without_socket("crowd") for _ in range(1900)])
    with broker.login("sender") as sender:
        sender.ping()
        broker.meter.reset()
        sender.write(packed(MESSAGE, "crowd", b"x") * 2000)
        sender.ping()
    broker.meter.check()
    broker.empty(members)


# What an operator does


@pytest.fixture
def broker_from_file(tmp_path: Path) -> Iterator[tuple[Crowded, Path]]:
    """A crowded broker of its own, and the file that it is reloaded from."""
    file = tmp_path / "brokerd.yaml"
    file.write_text(large_text(OWN))
    file.chmod(0o600)
    with crowded(load(file)) as broker:
        broker.fill(CONNECTED)
        broker.idle()
        broker.meter.reset()
        yield broker, file


FEW = f'clients:\n  ops: {{key: "{key_of("ops").decode()}", admin: true}}\n'


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(large_text(OWN), id="as it was", marks=pytest.mark.slow),
        pytest.param(large_text(OWN, entry="queue: 4MiB, subscribe: [a.>]"), id="all changed"),
        pytest.param(large_text(OWN).partition("clients:")[0] + FEW, id="all removed"),
    ],
)
def test_event_loop_with_reload_of_10000_clients_stays_responsive(
    broker_from_file: tuple[Crowded, Path], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This leaves out the thread that reads the file: test_wall_clock.py measures what it
    costs the event loop.
    """
    broker, file = broker_from_file
    file.write_text(text)
    closes: Counter[int] = Counter()
    close = Replies.close

    def count(replies: Replies, session: Session, reason: str, **how: Any) -> None:
        closes[broker.meter.turns] += 1
        close(replies, session, reason, **how)

    monkeypatch.setattr(Replies, "close", count)
    with broker.login("ops") as ops:
        assert ops.ask("reload", dry_run=True).json["problems"] == []
        assert ops.ask("reload").json["problems"] == []
        broker.idle()
        broker.meter.check()
        ops.ping()
        removed = "c1:" not in text
        assert broker.call(lambda: len(broker.daemon.server.connections)) == (
            1 if removed else CONNECTED + 1
        )
    assert sum(closes.values()) == (CONNECTED if removed else 0)
    assert all(count <= 256 for count in closes.values())


@pytest.mark.timing
def test_event_loop_with_drain_of_8000_connections_stays_responsive() -> None:
    """Undelivered messages come back to their senders, and a client asks for long lists
    all the time.
    """
    config = load_text(large_text(OWN, limits="drain_timeout: 500ms"))
    with crowded(config) as broker:
        broker.fill(CONNECTED)
        broker.idle()
        with (
            broker.login("ops") as ops,
            broker.login("sender") as sender,
            broker.login("subscriber") as polite,
        ):
            polite.ask("goaway")
            not_reading = broker.call(
                lambda: [broker.connect_without_socket("crowd", writable=False) for _ in range(200)]
            )
            sender.write(
                b"".join(
                    packed(MESSAGE, session.address, b"x", message_id=1)
                    for session in not_reading
                    for _ in range(20)
                )
            )
            sender.ping()
            question = packed(REQUEST, "$broker", b'{"op": "clients"}', codec=JSON)
            sender.write(question * 500)
            broker.meter.reset()
            began = time.monotonic()
            ops.ask("drain")
            assert polite.recv().kind == EVENT
            assert polite.ask("finished").kind == REPLY
            polite.close()
            broker.loop_ends()
            # Half a second, and what a busy machine adds: not as long as all the lists
            # take.
            assert time.monotonic() - began < 10
        broker.meter.check()


def test_event_loop_with_upgrade_capture_stays_responsive() -> None:
    """The last part of the capture, of a broker with few connections, does not depend
    on the number of configured clients.
    """
    with crowded(large_config(OWN)) as broker:
        broker.fill(200)
        broker.idle()
        server = broker.daemon.server
        passing = broker.call(lambda: handover.Passing(server))
        # The clients to which nothing has happened are copied before.
        broker.call(lambda: list(snapshot.capture_clients(server.broker, 0.0, passing.copier)))
        broker.meter.reset()
        captured, _ = broker.timed(lambda: handover.capture(server, passing))
        broker.call(passing.end)
        assert len(captured.facts["links"]) == 200
        broker.meter.check()


def test_upgrade_capture_skips_unchanged_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of thousands of connections that were copied while idle, none is inspected again."""
    with crowded(large_config(OWN)) as broker, broker.login("ops") as ops:
        sessions = broker.fill(CONNECTED)
        broker.idle()
        server, core = broker.daemon.server, broker.daemon.broker
        passing = broker.call(lambda: handover.Passing(server))
        copier = passing.copier

        def copy() -> None:
            for session in sessions:
                assert snapshot.capture_idle(core, session, 0.0, copier) is not None
            list(snapshot.capture_clients(core, 0.0, copier))

        broker.call(copy)
        ops.ping()
        inspected: list[str] = []
        original = handover._is_idle

        def is_idle(connection: Connection) -> bool:
            inspected.append(connection.session.address)
            return original(connection)

        monkeypatch.setattr(handover, "_is_idle", is_idle)
        broker.meter.reset()
        captured, _ = broker.timed(lambda: handover.capture(server, passing))
        broker.call(passing.end)
        assert inspected == ["ops"]
        assert [each["name"] for each in captured.facts["core"]["sessions"]] == ["ops"]
        assert captured.facts["core"]["clients"] == {}
        assert len(json.dumps(captured.facts)) < 5000
        broker.meter.check()


# What time brings


def test_event_loop_with_key_expiry_of_10000_clients_stays_responsive() -> None:
    """All keys expire soon, and all clients are connected: each is counted, fifty are
    named.
    """
    expiry = (datetime.now(UTC) + timedelta(days=3)).isoformat()
    text = large_text(OWN, until=expiry)
    with crowded(load_text(text)) as broker:
        broker.fill(CONNECTED)
        broker.idle()
        broker.meter.reset()
        keywatch = broker.daemon._key_expiry_monitor
        assert keywatch is not None
        broker.timed(lambda: keywatch.watch(broker.daemon.config))
        broker.until(lambda: bool(broker.log.named("key.expiring_more")))
        broker.meter.check()


@pytest.mark.parametrize("per_client", [pytest.param(False, marks=pytest.mark.slow), True])
def test_event_loop_with_monitor_pages_stays_responsive(
    per_client: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pages, with the metrics of each client or without."""
    # A busy machine may need longer than usual for them.
    monkeypatch.setattr(http_server, "_LONGEST", 120.0)
    extra = f"monitor: {{address: '127.0.0.1:0', per_client: {str(per_client).lower()}}}"
    with crowded(load_text(large_text(OWN, extra=extra))) as broker:
        broker.fill(CONNECTED)
        broker.idle()
        broker.meter.reset()
        (address,) = broker.daemon.monitor_addresses
        for page in ("livez", "readyz", "metrics"):
            with socket.create_connection(address.sockaddr) as sock:
                sock.sendall(
                    f"GET /{page} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode()
                )
                answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
            assert b" 200 " in answer.split(b"\r\n", 1)[0], answer[:200]
        broker.meter.check()


def live_event(address: Address, query: str) -> bytes:
    """Return the first event of a page's stream."""
    with socket.create_connection(address.sockaddr, timeout=60) as sock:
        sock.sendall(f"GET /live?{query} HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
        data = b""
        while not data.endswith(b"\n\n\r\n"):
            piece = sock.recv(1 << 16)
            assert piece, data[-1000:]
            data += piece
    return data


def test_event_loop_with_open_page_stays_responsive(tmp_path: Path) -> None:
    """A page with each of its tables, sorted by a number, where each client has a mailbox."""
    store = f"store: {{path: {tmp_path / 'store'}, min_free: 0}}"
    extra = f"monitor: 127.0.0.1:0\n{store}"
    sorted_by = {
        "clients": "stored",
        "topics": "subscriptions",
        "channels": "since",
        "mailboxes": "oldest",
    }
    with crowded(load_text(large_text(OWN, extra=extra, entry="mailbox: true"))) as broker:
        broker.fill(CONNECTED)
        broker.idle()
        broker.meter.reset()
        (address,) = broker.daemon.monitor_addresses
        for view, column in sorted_by.items():
            query = f"view={view}&sort={column}&reverse=1&filter=c&client=crowd&mailbox=c1"
            assert b'"table":{' in live_event(address, query)
        broker.meter.check()


def test_snapshot_of_stand_ins_has_each_connection() -> None:
    """The stand-ins of these tests are captured as connections are."""
    with crowded(large_config(OWN)) as broker:
        sessions = broker.fill(3)
        assert (
            len(broker.call(lambda: capture(broker.daemon.broker, sessions, 0.0)).facts["sessions"])
            == 3
        )
