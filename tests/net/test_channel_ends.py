"""Channels that the broker ends: by an administrator, a reload, a drain, or a dead peer."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from support.channels import OPEN, asked, channel, is_refused, joining, listening
from support.keys import key_of
from support.raw_client import Raw
from support.reloadable_daemon import ReloadableDaemon
from support.running_daemon import RunningDaemon, configuration, running_daemon
from support.waiting import until

CLIENTS = {"alice": {}, "bob": {}, "carol": {}, "ops": {"admin": True}}


@pytest.fixture(params=["127.0.0.1:0", "unix"])
def broker(request: pytest.FixtureRequest, socket_dir: Path) -> Iterator[RunningDaemon]:
    listen = str(socket_dir / "s") if request.param == "unix" else request.param
    with running_daemon(configuration(listen, CLIENTS)) as running:
        yield running


def has_ended(*ends: Raw) -> bool:
    """Wait for the end of these connections; return whether no byte came before."""
    data = b""
    for end in ends:
        with suppress(ConnectionResetError):
            data += end.read_to_end()
    return not data


# Disconnect


def test_disconnect_closes_channels_of_client(broker: RunningDaemon) -> None:
    """At either end; channels of other clients stay."""
    with ExitStack() as stack:
        ops = stack.enter_context(broker.login("ops"))
        bob = stack.enter_context(listening(broker, "bob"))
        carol = stack.enter_context(listening(broker, "carol"))
        closed = stack.enter_context(channel(broker, "alice", "bob", bob))
        kept = stack.enter_context(channel(broker, "bob", "carol", carol))
        answer = ops.ask("disconnect", address="alice").json
        assert answer == {"disconnected": [], "channels": 1}
        assert has_ended(*closed)
        kept[0].write(b"x")
        assert kept[1].read(1) == b"x"
        assert ops.ask("disconnect", address="alice").code == "offline"
        assert ops.ask("disconnect", address="bob").json == {
            "disconnected": ["bob"],
            "channels": 1,
        }
        assert has_ended(*kept)
        closings = broker.log.wait("channel.closed", 2)
        assert {each.fields["reason"] for each in closings} == {"disconnected by ops"}


def test_can_open_names_the_rule_that_decides() -> None:
    """Of the caller's send_to, or the recipient's open_from."""
    clients = {
        "alice": {"send_to": ["bob"]},
        "bob": {"open_from": ["ali*"]},
        "carol": {},
        "ops": {"admin": True},
    }
    with (
        running_daemon(configuration("127.0.0.1:0", clients)) as broker,
        broker.login("ops") as ops,
    ):

        def can(sender: str, target: str) -> tuple[bool, str | None]:
            answer = ops.ask("can", sender=sender, verb="open", target=target).json
            return answer["allowed"], answer["rule"]

        assert can("alice", "bob") == (True, "ali*")
        assert can("alice", "bob/1") == (True, "ali*")
        assert can("alice", "carol") == (False, None)
        assert can("carol", "bob") == (False, None)
        assert can("carol", "nobody") == (False, None)
        assert can("carol", "alice") == (True, "*")


# Reload


def entry(name: str, rest: str = "", key: str = "") -> str:
    key = key or key_of(name).decode()
    return f'  {name}: {{key: "{key}"{rest}}}\n'


ALICE, BOB, CAROL = map(entry, ("alice", "bob", "carol"))


@pytest.fixture
def served(socket_dir: Path) -> Iterator[ReloadableDaemon]:
    reloadable = ReloadableDaemon(socket_dir)
    reloadable.write(ALICE + BOB + CAROL)
    reloadable.start()
    try:
        yield reloadable
    finally:
        reloadable.close()


@pytest.mark.parametrize(
    "clients",
    [
        entry("alice", ", send_to: [carol]") + BOB + CAROL,
        ALICE + entry("bob", ", open_from: [carol]") + CAROL,
        BOB + CAROL,
        ALICE + CAROL,
        entry("alice", key="another key") + BOB + CAROL,
        ALICE + entry("bob", key="another key") + CAROL,
    ],
    ids=["send_to", "open_from", "caller", "recipient", "caller's key", "recipient's key"],
)
def test_reload_that_withdraws_the_right_closes_channel(
    clients: str, served: ReloadableDaemon
) -> None:
    """An OPEN that waits is refused."""
    with (
        listening(served, "bob") as bob,
        channel(served, "alice", "bob", bob) as ends,
        asked(served, "alice", "bob") as pending,
    ):
        assert bob.recv().kind == OPEN
        served.write(clients)
        assert served.reload() == []
        assert has_ended(*ends)
        assert pending.recv().code in ("denied", "key_removed", "offline")


def test_reload_that_allows_channel_keeps_it(served: ReloadableDaemon) -> None:
    with listening(served, "bob") as bob, channel(served, "alice", "bob", bob) as (alice, other):
        served.write(entry("alice", ", send_to: [bob]") + entry("bob", ", channels: 0"))
        assert served.reload() == []
        alice.write(b"x")
        assert other.read(1) == b"x"
        with asked(served, "alice", "bob") as second:
            assert is_refused(second, "full")


# Drain


def test_drain_passes_on_what_is_buffered_and_ends_channels(broker: RunningDaemon) -> None:
    """The recipient that did not read gets every byte that the broker had taken."""
    data = os.urandom(100_000)
    with channel(broker, "alice", "bob") as (alice, bob):
        alice.write(data)
        bob.write(b"both ways")
        broker.stop_soon()
        assert bob.read_to_end() == data
        assert alice.read_to_end() == b"both ways"
        stopped = broker.log.wait("daemon.stopped")[0].fields
        assert stopped["cut_off"] == 0


def test_drain_refuses_opens_that_wait(broker: RunningDaemon) -> None:
    with listening(broker, "bob"), asked(broker, "alice", "bob") as alice:
        until(lambda: broker.call(lambda: len(broker.daemon.broker.channels.openings())) == 1)
        broker.stop_soon()
        assert is_refused(alice, "shutting_down")


def test_drain_waits_for_end_that_does_not_read_until_its_timeout(socket_dir: Path) -> None:
    config = configuration(str(socket_dir / "s"), CLIENTS, limits={"drain_timeout": "300ms"})
    with running_daemon(config) as broker, channel(broker, "alice", "bob") as (alice, _):
        alice.sock.settimeout(0.5)
        with suppress(TimeoutError):
            while True:
                alice.sock.send(bytes(65536))
        broker.stop_soon()
        stopped = broker.log.wait("daemon.stopped")[0].fields
        assert stopped["cut_off"] == 1


def test_drain_refuses_channels(broker: RunningDaemon) -> None:
    """An OPEN and a JOIN that come while the broker drains."""
    with listening(broker, "bob") as bob, asked(broker, "alice", "bob"):
        token = bob.recv().id

        def drain() -> None:
            broker.daemon.broker.status.draining = True

        broker.call(drain)
        for late in (asked(broker, "carol", "bob"), joining(broker, "bob", token)):
            with late:
                assert late.recv().code == "shutting_down"
        broker.call(lambda: setattr(broker.daemon.broker.status, "draining", False))


# A dead peer


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="options as on Linux")
def test_channel_over_tcp_has_keepalive() -> None:
    """Both of its ends, as `limits.keepalive` says: a machine may vanish without a word."""
    config = configuration("127.0.0.1:0", CLIENTS, limits={"keepalive": "10s"})
    with running_daemon(config) as broker, channel(broker, "alice", "bob"):
        liveness = broker.daemon.server.context.liveness

        def watched() -> list[int]:
            liveness._begin()
            return [
                each.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                for each in liveness._watched
            ]

        assert broker.call(watched) == [1, 1, 1]


def test_channel_whose_end_answers_nothing_is_closed() -> None:
    """The check of connections with bytes under way concerns channels too."""
    config = configuration("127.0.0.1:0", CLIENTS)
    with running_daemon(config) as broker, channel(broker, "alice", "bob") as ends:
        (relay,) = broker.call(lambda: list(broker.daemon.server.context.connections.relays))
        broker.call(lambda: relay.to_caller.lost("no answer for 30 s (limits.keepalive)"))
        assert has_ended(*ends)
        assert "no answer" in broker.log.wait("channel.closed")[0].fields["reason"]
