"""Channels over real sockets: OPEN and JOIN, refusals and limits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import pytest
from support.channels import (
    JOIN,
    OPEN,
    asked,
    channel,
    dialed,
    is_open,
    is_refused,
    joining,
    listening,
)
from support.keys import key_of
from support.raw_client import (
    ERROR,
    EVENT,
    JSON,
    MESSAGE,
    RECEIPT,
    Frame,
    login,
    packed,
    prefixed,
)
from support.running_daemon import RunningDaemon, configuration, running_daemon
from support.waiting import until

CLIENTS = {
    "alice": {"allow_md5": True},
    "bob": {"allow_md5": True},
    "carol": {"send_to": ["bob"]},
    "dave": {"open_from": ["alice"]},
    "pool": {"connections": 3},
    "ops": {"admin": True},
}


@pytest.fixture(params=["127.0.0.1:0", "unix"])
def broker(request: pytest.FixtureRequest, socket_dir: Path) -> Iterator[RunningDaemon]:
    listen = str(socket_dir / "s") if request.param == "unix" else request.param
    with running_daemon(configuration(listen, CLIENTS)) as running:
        yield running


@pytest.fixture
def unix(socket_dir: Path) -> Iterator[RunningDaemon]:
    with running_daemon(configuration(str(socket_dir / "s"), CLIENTS)) as running:
        yield running


def limited(directory: Path, clients: Any = CLIENTS, **limits: Any) -> Any:
    return running_daemon(configuration(str(directory / "s"), clients, limits=limits))


def number_open(broker: RunningDaemon) -> int:
    return broker.call(lambda: len(broker.daemon.broker.channels.open))


def number_pending(broker: RunningDaemon) -> int:
    return broker.call(lambda: len(broker.daemon.broker.channels.openings()))


# Opening


def test_channel_relays_bytes_both_ways(broker: RunningDaemon) -> None:
    """Both ends get a RECEIPT with the other client's name, then each other's bytes."""
    with channel(broker, "alice", "bob") as (alice, bob):
        alice.write(b"to bob")
        assert bob.read(6) == b"to bob"
        bob.write(b"to alice")
        assert alice.read(8) == b"to alice"
    until(lambda: not number_open(broker))
    event = broker.log.wait("channel.closed")[0].fields
    assert (event["name"], event["to"]) == ("alice", "bob")
    assert (event["bytes_to_recipient"], event["bytes_to_caller"]) == (6, 8)


def test_open_is_shown_to_recipient_with_payload_and_codec(unix: RunningDaemon) -> None:
    """The name is the authenticated caller's, and the id is the token."""
    with listening(unix, "bob") as bob, asked(unix, "alice", "bob", b"{}", codec=JSON):
        request = bob.recv()
        assert request._replace(id=0) == Frame(OPEN, 0, JSON, "alice", 0, b"{}")


def stock(broker: RunningDaemon, name: str) -> Connection:
    return Client(broker.address.sockaddr, authkey=key_of(name))


@pytest.mark.parametrize("connected", [True, False])
def test_open_of_stock_python_works_as_documented(connected: bool, broker: RunningDaemon) -> None:
    """Whether its client has all its connections or none."""
    with ExitStack() as stack:
        if connected:
            alice = stack.enter_context(broker.login("alice"))
        bob = stack.enter_context(listening(broker, "bob"))
        calling = stack.enter_context(stock(broker, "alice"))
        calling.send_bytes(packed(OPEN, "bob", message_id=1)[4:])
        answering = stack.enter_context(stock(broker, "bob"))
        answering.send_bytes(packed(JOIN, "", message_id=bob.recv().id)[4:])
        assert calling.recv_bytes()[0] == RECEIPT
        assert answering.recv_bytes()[0] == RECEIPT
        calling.send({"anything": [1, 2.5, None]})
        assert answering.recv() == {"anything": [1, 2.5, None]}
        answering.send_bytes(bytes(300_000))
        assert calling.recv_bytes() == bytes(300_000)
        if connected:
            alice.ping()
        bob.ping()


def test_open_within_connections_leaves_the_pool(broker: RunningDaemon) -> None:
    """The connection was a member until its first frame; it is none any more."""
    with (
        broker.login("carol") as carol,
        listening(broker, "bob") as bob,
        login(broker.address, key_of("alice")) as alice,
    ):
        carol.ask("subscribe", topic="$broker.*.alice")
        sessions = broker.daemon.broker.exchange.clients["alice"].sessions
        until(lambda: broker.call(lambda: len(sessions)) == 1)
        alice.write(packed(OPEN, "bob", message_id=1))
        token = bob.recv().id
        assert broker.call(lambda: len(sessions)) == 0
        with joining(broker, "bob", token):
            assert is_open(alice, "bob", 1)


def test_join_within_connections_leaves_the_pool(unix: RunningDaemon) -> None:
    clients = {**CLIENTS, "bob": {"connections": 2}}
    with (
        running_daemon(configuration("127.0.0.1:0", clients)) as broker,
        listening(broker, "bob") as bob,
        asked(broker, "alice", "bob") as alice,
        login(broker.address, key_of("bob")) as answering,
    ):
        until(lambda: broker.call(lambda: len(broker.daemon.server.connections)) == 2)
        answering.write(packed(JOIN, "", message_id=bob.recv().id))
        assert is_open(alice, "bob", 1)
        assert broker.call(lambda: len(broker.daemon.server.connections)) == 1


@pytest.mark.parametrize("word", [b"alice channel", b""])
def test_bytes_behind_open_are_relayed_first(word: bytes, broker: RunningDaemon) -> None:
    """The caller is not read further until it is joined: a part of them waits with it."""
    size = 100_000
    with listening(broker, "bob") as bob, broker.raw() as alice, ExitStack() as stack:
        if not word:
            stack.enter_context(broker.login("alice"))
        early = bytes(range(250)) * (size // 250)
        whole = packed(OPEN, "bob", message_id=1) + early
        alice.log_in(key_of("alice"), word, behind=whole)
        token = bob.recv().id
        with joining(broker, "bob", token) as answering:
            assert is_open(answering, "alice", token)
            assert answering.read(size) == early
            assert is_open(alice, "bob", 1)


def test_bytes_behind_join_are_relayed_first(broker: RunningDaemon) -> None:
    with listening(broker, "bob") as bob, asked(broker, "alice", "bob") as alice:
        first = packed(JOIN, "", message_id=bob.recv().id)
        with dialed(broker, "bob", first + b"early"):
            assert is_open(alice, "bob", 1)
            assert alice.read(5) == b"early"


def test_first_frame_bytewise_opens_channel(broker: RunningDaemon) -> None:
    """On a connection that announced it, on one beyond `connections`, and within them."""
    with ExitStack() as stack:
        bob = stack.enter_context(listening(broker, "bob"))
        stack.enter_context(broker.login("alice"))
        for name in (b"alice channel", b"", b"dave"):
            raw = stack.enter_context(broker.raw())
            raw.log_in(key_of("dave" if name == b"dave" else "alice"), name)
            raw.write_bytewise(packed(OPEN, "bob", b"payload", message_id=5))
            assert bob.recv().body == b"payload"


def test_channel_outlives_its_listening_connection(broker: RunningDaemon) -> None:
    with ExitStack() as stack:
        bob = stack.enter_context(listening(broker, "bob"))
        ends = stack.enter_context(channel(broker, "alice", "bob", bob))
        bob.close()
        broker.log.wait("client.disconnected")
        for writer, reader in (ends, ends[::-1]):
            writer.write(b"still")
            assert reader.read(5) == b"still"


def test_channel_of_client_to_itself_relays(unix: RunningDaemon) -> None:
    with channel(unix, "alice", "alice") as (one, other):
        one.write(b"me")
        assert other.read(2) == b"me"


def test_open_to_address_reaches_that_connection(unix: RunningDaemon) -> None:
    """Of a pool; the RECEIPT has the name of the client."""
    with ExitStack() as stack:
        members = [stack.enter_context(listening(unix, "pool")) for _ in range(3)]
        addresses = [member.ask("whoami").json["address"] for member in members]
        calling = stack.enter_context(asked(unix, "alice", addresses[1]))
        token = members[1].recv().id
        stack.enter_context(joining(unix, "pool", token))
        assert is_open(calling, "pool", 1)
        members[2].ask("unlisten")
        for to in (addresses[2], "pool/nobody"):
            with asked(unix, "alice", to) as refused:
                assert is_refused(refused, "offline")


def test_open_to_pool_goes_to_least_loaded_listening_member(unix: RunningDaemon) -> None:
    """Channels that came through a member, and OPENs that it has not answered, are its
    load. A member that does not listen gets none.
    """
    with ExitStack() as stack:
        members = [stack.enter_context(listening(unix, "pool")) for _ in range(2)]
        stack.enter_context(unix.login("pool"))
        calling = [stack.enter_context(asked(unix, "alice", "pool")) for _ in range(2)]
        tokens = [member.recv().id for member in members]
        joined = [stack.enter_context(joining(unix, "pool", token)) for token in tokens]
        assert all(is_open(each, "pool", 1) for each in calling)
        joined[1].close()
        until(lambda: number_open(unix) == 1)
        stack.enter_context(asked(unix, "alice", "pool", b"third"))
        assert members[1].recv().body == b"third"


def test_unlisten_ends_requests_and_keeps_channels(unix: RunningDaemon) -> None:
    with listening(unix, "bob") as bob, channel(unix, "alice", "bob", bob) as (alice, answering):
        assert bob.ask("unlisten").json == {}
        with asked(unix, "carol", "bob") as carol:
            assert is_refused(carol, "offline")
        alice.write(b"x")
        assert answering.read(1) == b"x"


# Refusals


@pytest.mark.parametrize(
    ("caller", "to", "code"),
    [
        ("alice", "nobody", "no_such_client"),
        ("alice", "$broker", "no_such_client"),
        ("carol", "alice", "denied"),
        ("carol", "nobody", "denied"),
        ("bob", "dave", "denied"),
        ("alice", "bob", "offline"),
        ("alice", "pool/1", "offline"),
        ("alice", "not a name", "malformed"),
        ("alice", "", "malformed"),
    ],
)
def test_open_refused_gets_error_and_end(
    caller: str, to: str, code: str, unix: RunningDaemon
) -> None:
    with unix.login("pool"), asked(unix, caller, to, message_id=77) as calling:
        assert is_refused(calling, code, 77)
    event = unix.log.wait("channel.refused")[0]
    incident = unix.call(lambda: unix.daemon.broker.incidents.newest(event.fields["name"])[0])
    assert (incident.event, incident.code) == ("channel.refused", event.fields["code"])
    assert incident.ids == (77,)
    assert event.fields["code"] == code
    assert event.level == ("warning" if code == "denied" else "debug")


def test_open_to_client_that_does_not_listen_is_offline(unix: RunningDaemon) -> None:
    with unix.login("bob"), asked(unix, "alice", "bob") as calling:
        frame = calling.recv()
        assert (frame.code, "does not listen" in frame.json["message"]) == ("offline", True)


@pytest.mark.parametrize(
    ("frame", "code", "message_id"),
    [
        (packed(OPEN, "bob", bytes(1025), message_id=9), "too_large", 9),
        (packed(OPEN, "bob", bytes(9000), message_id=9)[:900], "too_large", 9),
        (packed(OPEN, "bob", message_id=9, flags=1), "unsupported", 9),
        (
            packed(OPEN, "bob", message_id=9, flags=2, between=b"\0\x42" + b"[" * 33 + b"]" * 33),
            "unsupported",
            9,
        ),
        (packed(OPEN, "bob", message_id=9, flags=64), "malformed", 9),
        (prefixed(b"\x08short"), "malformed", 0),
        (packed(JOIN, "bob", message_id=9), "malformed", 9),
        (packed(JOIN, "", b"payload", message_id=9), "malformed", 9),
        (packed(JOIN, "", message_id=9), "expired", 9),
        (packed(MESSAGE, "bob", message_id=9), "unsupported", 0),
        (prefixed(b""), "unsupported", 0),
    ],
)
def test_first_frame_invalid_is_refused(
    frame: bytes, code: str, message_id: int, unix: RunningDaemon
) -> None:
    """On a connection that announced a channel; the connection is closed."""
    with listening(unix, "bob"), dialed(unix, "alice", frame) as calling:
        assert is_refused(calling, code, message_id)


@pytest.mark.parametrize("kind", [OPEN, JOIN])
def test_first_frame_later_is_unsupported(kind: int, unix: RunningDaemon) -> None:
    """The connection goes on, even if the frames before did not reach the broker's core."""
    with unix.login("alice") as alice, unix.login("dave") as other:
        other.send(EVENT, "", b"x", between=b"\x01t")
        other.ping()
        # The topic is known now, so the routing loop passes the event on by itself.
        alice.write(packed(EVENT, "", b"x", between=b"\x01t") + packed(kind, "bob", message_id=3))
        assert (alice.recv().code, alice.ask("ping").body) == ("unsupported", b"{}")


def test_open_payload_of_longest_size_is_accepted(unix: RunningDaemon) -> None:
    with listening(unix, "bob") as bob, asked(unix, "alice", "bob", bytes(1024)):
        assert bob.recv().body == bytes(1024)


def test_refusal_of_recipient_reaches_caller_unchanged(broker: RunningDaemon) -> None:
    """Its payload and codec, from the recipient, with the caller's id."""
    for payload in (b'{"code": "busy"}', b"\xff" * 60_000):
        with listening(broker, "bob") as bob, asked(broker, "alice", "bob") as alice:
            token = bob.recv().id
            bob.send(ERROR, "", payload, message_id=token, codec=130)
            assert alice.recv() == Frame(ERROR, 0, 130, "bob", 1, payload)
            assert alice.read_to_end() == b""
            with joining(broker, "bob", token) as late:
                assert is_refused(late, "expired", token)
            bob.ping()


def test_refusal_invalid_is_answered(unix: RunningDaemon) -> None:
    """An unknown token is expired, and a payload may be too long; the OPEN waits on."""
    with listening(unix, "bob") as bob, asked(unix, "alice", "bob"), unix.login("carol") as carol:
        token = bob.recv().id
        carol.send(ERROR, "", b"{}", message_id=token)
        assert carol.recv().code == "expired"
        bob.send(ERROR, "", bytes(70_000), message_id=token)
        assert bob.recv().code == "too_large"
        assert number_pending(unix) == 1


def test_join_with_another_clients_token_is_expired(unix: RunningDaemon) -> None:
    """It does not use up the token, which is good for one JOIN."""
    with listening(unix, "bob") as bob, asked(unix, "alice", "bob") as alice:
        token = bob.recv().id
        for intruder in ("carol", "alice"):
            with joining(unix, intruder, token) as raw:
                assert is_refused(raw, "expired", token)
        with joining(unix, "bob", token):
            assert is_open(alice, "bob", 1)
            with joining(unix, "bob", token) as second:
                assert is_refused(second, "expired", token)


def test_tokens_are_random(unix: RunningDaemon) -> None:
    """64 bits: no two are alike, and both halves differ."""
    with listening(unix, "bob") as bob, ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(asked(unix, "alice", "bob"))
        tokens = [bob.recv().id for _ in range(8)]
    assert len({token >> 32 for token in tokens}) == 8
    assert len({token & 0xFFFF_FFFF for token in tokens}) == 8


def test_open_not_answered_in_time_is_expired(socket_dir: Path) -> None:
    with (
        limited(socket_dir, open_timeout="50ms") as broker,
        listening(broker, "bob") as bob,
        asked(broker, "alice", "bob") as alice,
    ):
        token = bob.recv().id
        assert is_refused(alice, "expired")
        with joining(broker, "bob", token) as late:
            assert is_refused(late, "expired", token)


def test_open_whose_listener_disconnects_is_offline(unix: RunningDaemon) -> None:
    """Whether the recipient had read the OPEN or not."""
    with listening(unix, "bob") as bob, asked(unix, "alice", "bob") as alice:
        bob.recv()
        bob.close()
        assert is_refused(alice, "offline")


def test_open_whose_caller_closes_is_forgotten(unix: RunningDaemon) -> None:
    with listening(unix, "bob") as bob:
        with asked(unix, "alice", "bob"):
            token = bob.recv().id
        until(lambda: not number_pending(unix))
        with joining(unix, "bob", token) as late:
            assert is_refused(late, "expired", token)
        assert unix.log.wait("channel.withdrawn")[0].fields["to"] == "bob"


def test_connection_that_announced_channel_and_is_silent_ends(socket_dir: Path) -> None:
    """So does one whose OPEN is never whole."""
    with limited(socket_dir, handshake_timeout="2s") as broker:
        for first in (b"", packed(OPEN, "bob")[:10], packed(OPEN, "bob", b"xyz")[:-1]):
            with dialed(broker, "alice", first) as raw:
                assert is_refused(raw, "expired", 0)


def test_connection_that_announced_channel_may_come_beyond_limits_connections(
    socket_dir: Path,
) -> None:
    """Channels have a limit of their own."""
    with (
        limited(socket_dir, connections=1) as broker,
        listening(broker, "bob") as bob,
        asked(broker, "alice", "bob"),
    ):
        assert bob.recv().kind == OPEN


# Limits


def test_channels_of_client_are_limited_at_both_ends(socket_dir: Path) -> None:
    """A caller's OPENs count before they are answered, a recipient's when they are."""
    clients = {"alice": {"channels": 2}, "bob": {}, "carol": {"channels": 1}, "dave": {}}
    with limited(socket_dir, clients) as broker, ExitStack() as stack:
        bob = stack.enter_context(listening(broker, "bob"))
        carol = stack.enter_context(listening(broker, "carol"))
        stack.enter_context(channel(broker, "alice", "bob", bob))
        pending = stack.enter_context(asked(broker, "alice", "bob"))
        with asked(broker, "alice", "bob") as third:
            assert is_refused(third, "full")
        pending.close()
        until(lambda: not number_pending(broker))
        one = stack.enter_context(asked(broker, "bob", "carol"))
        two = stack.enter_context(asked(broker, "dave", "carol"))
        tokens = [carol.recv().id for _ in range(2)]
        stack.enter_context(joining(broker, "carol", tokens[0]))
        assert is_open(one, "carol", 1)
        with joining(broker, "carol", tokens[1]) as second:
            assert is_refused(second, "full", tokens[1])
        assert is_refused(two, "full")
        with asked(broker, "dave", "carol") as again:
            assert is_refused(again, "full")


def test_channels_zero_allows_none(socket_dir: Path) -> None:
    clients = {"alice": {"channels": 0}, "bob": {}}
    with (
        limited(socket_dir, clients) as broker,
        listening(broker, "bob"),
        asked(broker, "alice", "bob") as alice,
    ):
        assert is_refused(alice, "full")


def test_limits_channels_bounds_all_clients(socket_dir: Path) -> None:
    """An OPEN that waits has a place already."""
    with (
        limited(socket_dir, channels=2) as broker,
        listening(broker, "bob") as bob,
        channel(broker, "alice", "bob", bob),
        asked(broker, "carol", "bob"),
        asked(broker, "carol", "bob") as third,
    ):
        assert is_refused(third, "full")


def test_open_pending_of_one_caller_are_limited(unix: RunningDaemon) -> None:
    """To eight at one recipient; other callers are not concerned."""
    with listening(unix, "bob"), ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(asked(unix, "alice", "bob"))
        until(lambda: number_pending(unix) == 8)
        with asked(unix, "alice", "bob") as ninth:
            assert is_refused(ninth, "full")
        stack.enter_context(asked(unix, "carol", "bob"))
        until(lambda: number_pending(unix) == 9)


def test_open_pending_of_all_callers_are_limited(socket_dir: Path) -> None:
    """To 64 at one recipient."""
    clients = {"bob": {}, **{f"c{number}": {} for number in range(9)}}
    with limited(socket_dir, clients) as broker, listening(broker, "bob"), ExitStack() as stack:
        for number in range(64):
            stack.enter_context(asked(broker, f"c{number // 8}", "bob"))
        until(lambda: number_pending(broker) == 64)
        with asked(broker, "c8", "bob") as last:
            assert is_refused(last, "full")


def test_open_counts_as_one_message_of_rate(socket_dir: Path) -> None:
    """Beyond the rate it is full."""
    clients = {"alice": {"rate": {"messages": "1/h"}}, "bob": {}}
    with limited(socket_dir, clients) as broker, listening(broker, "bob") as bob:
        with channel(broker, "alice", "bob", bob), asked(broker, "alice", "bob") as second:
            assert is_refused(second, "full")
        with broker.login("alice") as alice:
            alice.send(MESSAGE, "bob", message_id=4)
            assert alice.recv().code == "rate_limited"


def test_open_flood_delays_nobody(socket_dir: Path) -> None:
    """Two hundred OPENs at once are answered or wait, and all of them are freed again."""
    with (
        limited(socket_dir, open_timeout="120s") as broker,
        listening(broker, "bob"),
        broker.login("carol") as carol,
        ExitStack() as stack,
    ):
        flood = [stack.enter_context(asked(broker, "alice", "bob")) for _ in range(200)]
        carol.ping()
        assert sum(is_refused(raw, "full") for raw in flood[8:]) == 192
        stack.close()
        until(lambda: not number_pending(broker))
        assert not broker.daemon.broker.channels._held
