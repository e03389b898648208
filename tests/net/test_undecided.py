"""Connections of stock Python beyond `connections`: undecided until their first frame."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import pytest
from support.keys import key_of
from support.raw_client import MESSAGE, REPLY, REQUEST, is_reason, login, packed, prefixed
from support.reloadable_daemon import ReloadableDaemon
from support.running_daemon import RunningDaemon, configuration, running_daemon
from support.waiting import until

from brokerd.config.values import WhenConnected
from brokerd.net.handshake import undecided

#: The test may run on a Python whose standard library knows HMAC-MD5 only.
CLIENTS = {
    "refuser": {"allow_md5": True},
    "replacer": {"allow_md5": True, "when_connected": "replace"},
    "bob": {"allow_md5": True},
}
ALICE = "  alice: {key: alices-first-key}\n"
BOB = "  bob: {allow_md5: true, key: bobs-first-key}\n"
#: Longer than a test takes.
LONG_S = 1000.0


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no silence decide."""
    monkeypatch.setattr(undecided, "SILENCE_S", dict.fromkeys(WhenConnected, LONG_S))


@pytest.fixture(params=["127.0.0.1:0", "unix"])
def broker(request: pytest.FixtureRequest, socket_dir: Path) -> Iterator[RunningDaemon]:
    listen = str(socket_dir / "s") if request.param == "unix" else request.param
    with running_daemon(configuration(listen, CLIENTS)) as running:
        yield running


def stock(broker: RunningDaemon | ReloadableDaemon, name: str, key: bytes = b"") -> Connection:
    """Return a connection of the standard library."""
    daemon = broker.daemon
    return Client(daemon.addresses[0].sockaddr, authkey=key or key_of(name))


def number_undecided(broker: RunningDaemon | ReloadableDaemon) -> int:
    number: int = broker.call(lambda: len(broker.daemon.server.undecided))
    return number


def wait_for_undecided(broker: RunningDaemon | ReloadableDaemon, number: int) -> None:
    until(lambda: number_undecided(broker) == number, "there are not so many undecided ones")


def is_closed(connection: Connection, code: str) -> bool:
    """Wait for the end; return whether only the ERROR with ``code`` came before."""
    reason = prefixed(connection.recv_bytes())
    with pytest.raises((EOFError, ConnectionResetError)):
        connection.recv_bytes()
    return is_reason(reason, code)


def message(to: str, payload: bytes) -> bytes:
    return packed(MESSAGE, to, payload)[4:]


def test_undecided_connection_silent_is_refused(broker: RunningDaemon) -> None:
    """After a second of silence; the first connection is not disturbed."""
    with broker.login("refuser") as first, stock(broker, "refuser") as second:
        wait_for_undecided(broker, 1)
        assert not second.poll()
        assert is_closed(second, "name_taken")
        first.ping()
    assert "connected already" in broker.log.wait("client.refused")[0].fields["reason"]


def test_undecided_connection_silent_replaces(broker: RunningDaemon) -> None:
    """After a tenth of a second of silence, under `when_connected: replace`."""
    with broker.login("replacer") as first, stock(broker, "replacer") as second:
        assert first.is_closed("replaced")
        second.send_bytes(message("replacer", b"to itself"))
        assert second.recv_bytes().endswith(b"to itself")


def test_undecided_connection_silence_is_shorter_where_it_replaces() -> None:
    """The durations are the contract's."""
    assert undecided.SILENCE_S == {WhenConnected.REPLACE: 0.1, WhenConnected.REFUSE: 1.0}


@pytest.mark.usefixtures("patient")
def test_undecided_connection_first_frame_is_refused(broker: RunningDaemon) -> None:
    """The frame is not delivered."""
    with broker.login("refuser") as first, stock(broker, "refuser") as second:
        second.send_bytes(message("refuser", b"lost"))
        assert is_closed(second, "name_taken")
        first.ping()


@pytest.mark.usefixtures("patient")
def test_undecided_connection_first_frame_replaces(broker: RunningDaemon) -> None:
    """The frame is delivered."""
    with (
        broker.login("bob") as bob,
        broker.login("replacer") as first,
        stock(broker, "replacer") as second,
    ):
        second.send_bytes(message("bob", b"hello"))
        assert bob.recv().body == b"hello"
        assert first.is_closed("replaced")


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    "start",
    [
        struct.pack("!iB", 20, MESSAGE),
        struct.pack("!iQB", -1, 20, MESSAGE),
        struct.pack("!i", 0),
        struct.pack("!i", -2),
    ],
)
def test_undecided_connection_partial_frame_is_decided_at_its_kind(
    start: bytes, broker: RunningDaemon
) -> None:
    """So is a frame that can't have a kind."""
    with broker.login("refuser"), login(broker.address, key_of("refuser")) as second:
        second.write_bytewise(start[:-1])
        wait_for_undecided(broker, 1)
        second.write(start[-1:])
        assert second.is_closed("name_taken")


@pytest.mark.usefixtures("patient")
def test_undecided_connection_is_not_present_and_receives_nothing(broker: RunningDaemon) -> None:
    """Messages go to the first connection, and operations show that one only."""
    with broker.login("bob") as bob, broker.login("replacer") as first:
        with stock(broker, "replacer") as second:
            wait_for_undecided(broker, 1)
            for number in range(4):
                bob.send(MESSAGE, "replacer", b"%d" % number)
                assert first.recv().body == b"%d" % number
            clients = broker.daemon.broker.exchange.clients
            assert broker.call(lambda: len(clients["replacer"].sessions)) == 1
            assert not second.poll()
        assert len(broker.log.named("client.connected")) == 2


@pytest.mark.usefixtures("patient")
def test_undecided_connection_that_closes_changes_nothing(broker: RunningDaemon) -> None:
    """The log says that it came and left."""
    with broker.login("replacer") as first:
        stock(broker, "replacer").close()
        refusal = broker.log.wait("client.refused")[0].fields
        assert "before its first frame" in refusal["reason"]
        assert broker.log.wait("client.undecided")[0].level == "debug"
        assert number_undecided(broker) == 0
        first.ping()


@pytest.mark.usefixtures("patient")
def test_undecided_connection_reset_changes_nothing(broker: RunningDaemon) -> None:
    with broker.login("replacer") as first:
        with login(broker.address, key_of("replacer")) as second:
            wait_for_undecided(broker, 1)
            second.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_for_undecided(broker, 0)
        first.ping()


@pytest.mark.usefixtures("patient")
def test_undecided_connection_finds_place_that_became_free(broker: RunningDaemon) -> None:
    """The place is looked for when the connection is decided."""
    with stock(broker, "refuser") as second:
        second.send_bytes(message("refuser", b"first"))
        assert second.recv_bytes().endswith(b"first")
        with stock(broker, "refuser") as third:
            wait_for_undecided(broker, 1)
            second.close()
            third.send_bytes(message("refuser", b"mine"))
            assert third.recv_bytes().endswith(b"mine")


def test_undecided_connections_of_one_client_are_limited(
    broker: RunningDaemon, monkeypatch: pytest.MonkeyPatch, patient: None
) -> None:
    """One more decides the oldest."""
    monkeypatch.setattr(undecided, "MOST_PER_CLIENT", 3)
    with broker.login("refuser") as first, ExitStack() as stack:
        flood = [stack.enter_context(stock(broker, "refuser")) for _ in range(5)]
        assert is_closed(flood[0], "name_taken")
        assert is_closed(flood[1], "name_taken")
        assert number_undecided(broker) == 3
        first.ping()


def test_undecided_connections_of_all_clients_are_limited(patient: None) -> None:
    """By limits.handshakes; the oldest of all gives way."""
    config = configuration("127.0.0.1:0", CLIENTS, limits={"handshakes": 2})
    with running_daemon(config) as broker, ExitStack() as stack:
        for name in CLIENTS:
            stack.enter_context(broker.login(name))
        first = stack.enter_context(stock(broker, "refuser"))
        for name in ("bob", "bob"):
            stack.enter_context(stock(broker, name))
        assert is_closed(first, "name_taken")
        assert number_undecided(broker) == 2


def test_undecided_connections_count_for_limits_connections(patient: None) -> None:
    config = configuration("127.0.0.1:0", CLIENTS, limits={"connections": 2})
    with running_daemon(config) as broker, broker.login("refuser"):
        with stock(broker, "refuser"):
            wait_for_undecided(broker, 1)
            with pytest.raises(AuthenticationError):
                stock(broker, "bob")
        wait_for_undecided(broker, 0)
        stock(broker, "bob").close()


def test_undecided_connections_get_shutting_down_in_drain(patient: None) -> None:
    """At once."""
    with (
        running_daemon(configuration("127.0.0.1:0", CLIENTS)) as broker,
        broker.login("refuser"),
        stock(broker, "refuser") as second,
    ):
        wait_for_undecided(broker, 1)
        broker.stop_soon()
        assert is_closed(second, "shutting_down")


def reloaded(broker: ReloadableDaemon, clients: str, frame: bytes) -> Connection:
    """Return an undecided connection of bob that has sent a frame after a reload."""
    with broker.connect("bob", "bobs-first-key") as first:
        first.ping()
        second = stock(broker, "bob", b"bobs-first-key")
        wait_for_undecided(broker, 1)
        broker.write(clients)
        assert broker.reload() == []
        second.send_bytes(frame)
        until(lambda: number_undecided(broker) == 0)
    return second


@pytest.mark.usefixtures("patient")
def test_undecided_connection_with_withdrawn_key_gets_key_removed(socket_dir: Path) -> None:
    """Its name, or only its key, was removed."""
    broker = ReloadableDaemon(socket_dir)
    broker.write(ALICE + BOB)
    broker.start()
    try:
        for clients in (ALICE, ALICE + "  bob: {allow_md5: true, key: bobs-second-key}\n"):
            with reloaded(broker, clients, message("alice", b"no")) as second:
                assert is_closed(second, "key_removed")
            broker.write(ALICE + BOB)
            assert broker.reload() == []
    finally:
        broker.close()


@pytest.mark.usefixtures("patient")
def test_undecided_connection_follows_reloaded_when_connected(socket_dir: Path) -> None:
    """The rule in force when it is decided counts."""
    broker = ReloadableDaemon(socket_dir)
    broker.write(ALICE + BOB)
    broker.start()
    try:
        replacing = (
            ALICE + "  bob: {allow_md5: true, key: bobs-first-key, when_connected: replace}\n"
        )
        with reloaded(broker, replacing, message("bob", b"mine")) as second:
            assert second.recv_bytes().endswith(b"mine")
    finally:
        broker.close()


def test_connection_with_name_beyond_connections_is_decided_at_once(
    broker: RunningDaemon, patient: None
) -> None:
    """A client of the library gives its name."""
    with broker.login("refuser"), broker.login("refuser") as second:
        assert second.is_closed("name_taken")
    with broker.login("replacer") as first, broker.login("replacer") as second:
        assert first.is_closed("replaced")
        second.ping()


def test_undecided_connection_pool_is_decided_beyond_all_members(patient: None) -> None:
    """Stock members within `connections` are present at once."""
    config = configuration("127.0.0.1:0", {"pool": {"connections": 2, "allow_md5": True}})
    ping = packed(REQUEST, "$broker", b'{"op": "ping"}', codec=2)[4:]
    with (
        running_daemon(config) as broker,
        stock(broker, "pool") as first,
        stock(broker, "pool") as second,
    ):
        sessions: Any = broker.daemon.broker.exchange.clients["pool"].sessions
        until(lambda: broker.call(lambda: len(sessions)) == 2)
        with stock(broker, "pool") as third:
            third.send_bytes(ping)
            assert is_closed(third, "name_taken")
        for member in (first, second):
            member.send_bytes(ping)
            assert member.recv_bytes()[0] == REPLY
