"""The connections of one name: a second one, a reconnect, a slow consumer, and a client
that dies half-way.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support.keys import key_of
from support.raw_client import (
    ERROR,
    EVENT,
    JSON,
    MESSAGE,
    RECEIPT,
    REPLY,
    REQUEST,
    WANT_RECEIPT,
    Raw,
    Rejected,
    login,
    packed,
)
from support.running_daemon import RunningDaemon, configuration, running_daemon

from brokerd.core.session import Session
from brokerd.net.handshake.room import Room

LISTENS = ["127.0.0.1:0", "unix"]


def served(clients: Any = "alice bob carol", listen: Any = "127.0.0.1:0", **more: Any) -> Any:
    return running_daemon(configuration(listen, clients, **more))


@pytest.fixture(params=LISTENS)
def listen(request: pytest.FixtureRequest, socket_dir: Path) -> str:
    return str(socket_dir / "s") if request.param == "unix" else request.param


def rejection(broker: RunningDaemon, name: str) -> bytes:
    with pytest.raises(Rejected) as caught:
        broker.login(name)
    return bytes(caught.value.args[0])


def fill(sender: Raw, to: str, size: int = 50_000) -> list[int]:
    """Send messages with RECEIPT until the queue is full, and return the accepted ids."""
    taken: list[int] = []
    while True:
        sender.send(MESSAGE, to, bytes(size), message_id=len(taken), flags=WANT_RECEIPT)
        outcome = sender.recv()
        if outcome.kind == ERROR:
            assert outcome.code == "full"
            return taken
        assert outcome.kind == RECEIPT
        taken.append(outcome.id)


# Second connections


def test_connection_second_of_same_name_is_refused(listen: str) -> None:
    """The second connection gets the error after its handshake and the log gives the
    reason. The first connection is not disturbed.
    """
    with served(listen=listen) as broker, broker.login("alice") as alice:
        with broker.login("alice") as second:
            assert second.is_closed("name_taken")
        refusal = broker.log.wait("client.refused")[0].fields
        assert refusal["name"] == "alice"
        assert "connected already" in refusal["reason"]
        assert "raise 'connections'" in refusal["reason"]
        alice.ping()


def test_connection_second_with_when_connected_replace_closes_first(listen: str) -> None:
    """With `when_connected: replace` the first connection is closed, and messages go to
    the second.
    """
    clients = {"alice": {"when_connected": "replace"}, "bob": None}
    with (
        served(clients, listen) as broker,
        broker.login("bob") as bob,
        broker.login("alice") as first,
    ):
        for number in range(10):
            second = broker.login("alice")
            assert first.is_closed("replaced")
            first.close()
            bob.send(MESSAGE, "alice", b"%d" % number)
            assert second.recv().body == b"%d" % number
            first = second
        first.close()


def test_pool_connections_beyond_configured_number_are_refused() -> None:
    """With `connections: 3` three connections are accepted and the fourth is refused."""
    with served({"pool": {"connections": 3}}) as broker:
        members = [broker.login("pool") for _ in range(3)]
        assert len({each.ask("whoami").json["address"] for each in members}) == 3
        with broker.login("pool") as fourth:
            assert fourth.is_closed("name_taken")
        for each in members:
            each.close()


def test_limits_connections_bounds_all_clients_together() -> None:
    """limits.connections counts the connections of all clients. One that ends makes
    room for another.
    """
    with served("alice bob carol", limits={"connections": 2}) as broker:
        alice, bob = broker.login("alice"), broker.login("bob")
        with pytest.raises(Rejected):
            broker.login("carol")
        assert "limits.connections" in broker.log.wait("client.refused")[0].fields["reason"]
        bob.close()
        broker.log.wait("client.disconnected")
        broker.login("carol").close()
        alice.close()


def test_reconnect_immediate_is_accepted(listen: str) -> None:
    """A client closes and connects two hundred times without a pause, and is never
    refused.
    """
    with served(listen=listen) as broker:
        for _ in range(200):
            broker.login("alice").close()
        assert not broker.log.named("client.refused")


def test_reconnect_immediate_after_sending_loses_no_message(listen: str) -> None:
    """All messages sent before the disconnect arrive, although the client reconnected
    before the broker read them.
    """
    with served(listen=listen) as broker, broker.login("bob") as bob:
        got: list[int] = []
        reader = threading.Thread(target=lambda: got.extend(bob.recv().id for _ in range(50 * 20)))
        reader.start()
        for batch in range(50):
            with broker.login("alice") as alice:
                alice.write(
                    b"".join(
                        packed(MESSAGE, "bob", bytes(3000), message_id=batch * 20 + n)
                        for n in range(20)
                    )
                )
        reader.join(30)
        assert got == list(range(50 * 20))
        assert not broker.log.named("client.refused")


def test_reconnect_immediate_after_reset_is_accepted() -> None:
    """A connection that ended with a reset frees its place too."""
    with served() as broker:
        for _ in range(50):
            alice = broker.login("alice")
            alice.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            alice.close()
        assert not broker.log.named("client.refused")


def test_reconnect_of_held_sender_is_accepted(listen: str) -> None:
    """A sender held because its recipient does not read can disconnect and use its name
    again.
    """
    clients = {"alice": None, "bob": {"queue": "64KiB", "when_full": "wait"}}
    with served(clients, listen, limits={"wait_timeout": "60s"}) as broker, broker.login("bob"):
        for _ in range(3):
            alice = broker.login("alice")
            alice.sock.settimeout(0.3)
            # A timeout means that the sender is held.
            with contextlib.suppress(TimeoutError):
                while True:
                    alice.send(MESSAGE, "bob", bytes(60_000), flags=WANT_RECEIPT)
                    alice.recv()
            alice.close()
        with broker.login("alice") as alice:
            assert alice.ask("whoami").json["name"] == "alice"
        assert not broker.log.named("client.refused")


def test_reconnect_waits_while_earlier_frames_are_routed_in_turns(
    socket_dir: Path,
) -> None:
    """Meanwhile other clients are served. No earlier frame is lost, and the new
    connection's frames follow them.
    """
    with served(listen=str(socket_dir / "s")) as broker, broker.login("bob") as bob:
        bob.ask("subscribe", topic="t.*")
        alice, server = broker.login("alice"), broker.daemon.server
        alice.ping()
        events = [
            packed(EVENT, "", between=b"\x05t.%03d" % number, message_id=number)
            for number in range(101)
        ]

        def leave() -> Room:
            # This runs in the broker's thread, so that the broker does not read before
            # all is sent. Each event leaves the routing loop.
            server.context.turn_budget = 4
            alice.write(b"".join(events[:100]))
            alice.close()
            return server.room_for("alice")

        assert broker.call(leave) is Room.ENDING
        with broker.login("alice") as again:
            again.write(events[100])
            assert [bob.recv().id for _ in range(101)] == list(range(101))
        assert not broker.log.named("client.refused")


def sessions_of(broker: RunningDaemon, name: str) -> list[Session]:
    return broker.call(lambda: list(broker.daemon.broker.exchange.clients[name].sessions.values()))


def test_pool_member_reconnects_while_another_sends_to_closed_member(
    socket_dir: Path,
) -> None:
    """The broker reads from a member to find out whether it is still connected. The
    frames read go to another member, whose connection ends at that write.
    """
    config = configuration(str(socket_dir / "s"), {"pool": {"connections": 2}})
    with running_daemon(config) as broker, broker.login("pool") as first:
        second = broker.login("pool")
        server, second_session = broker.daemon.server, sessions_of(broker, "pool")[1]

        def look() -> tuple[Room, bool]:
            # This runs in the broker's thread, so that the broker has not noticed it
            # yet.
            first.send(MESSAGE, second_session.address, b"to the other")
            second.close()
            return server.room_for("pool"), second_session.open

        assert broker.call(look) == (Room.FREE, False)
        with broker.login("pool") as third:
            third.ping()
            assert first.recv().code == "offline"


def test_pool_cut_off_closes_all_members_when_one_end_causes_another(socket_dir: Path) -> None:
    """A callback for the end of the first connection may end another connection of the
    list.
    """
    with running_daemon(
        configuration(str(socket_dir / "s"), {"pool": {"connections": 3}})
    ) as broker:
        members = [broker.login("pool") for _ in range(3)]
        connections = [session.connection for session in sessions_of(broker, "pool")]

        def cut() -> bool:
            broker.daemon.server.on_left = lambda _: connections[1].lost("with the first")
            broker.daemon.cut_off("pool")
            return bool(broker.daemon.server.connections)

        assert not broker.call(cut)
        for member in members:
            assert member.is_closed()
            member.close()


def test_connection_half_closed_by_client_is_closed() -> None:
    """A client that will send no more is disconnected, and its name is free."""
    with served() as broker, broker.login("alice") as alice:
        alice.sock.shutdown(socket.SHUT_WR)
        assert alice.is_closed()
        assert (
            broker.log.wait("client.disconnected")[0].fields["reason"]
            == "connection closed by the client"
        )


def test_connection_of_client_killed_within_frame_frees_name(listen: str) -> None:
    """The incomplete message is not delivered. The name is free at once, and other
    clients are served.
    """
    script = (
        "import sys, os, pickle\n"
        "sys.path[:0] = pickle.loads(sys.stdin.buffer.read())\n"
        "from brokerd_client.address import parse\n"
        "from support.raw_client import login, packed\n"
        'c = login(parse(sys.argv[1]), b"alice\'s key is a canary")\n'
        "c.write(packed(1, 'bob', b'whole') + packed(1, 'bob', bytes(400_000))[:-1])\n"
        "print('sent', flush=True)\n"
        "import threading; threading.Event().wait()\n"
    )
    with served(listen=listen) as broker, broker.login("bob") as bob:
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(broker.address)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(pickle.dumps([path for path in sys.path if path]))
        child.stdin.close()
        assert child.stdout.readline().strip() == b"sent"
        os.kill(child.pid, signal.SIGKILL)
        child.wait(30)
        child.stdout.close()
        with broker.login("alice") as alice:
            alice.send(MESSAGE, "bob", b"after")
            assert [bob.recv().body, bob.recv().body] == [b"whole", b"after"]


# Slow readers


def test_slow_consumer_uses_no_more_than_its_queue(listen: str) -> None:
    """The broker keeps as much as the queue allows. Meanwhile two other clients
    exchange messages undisturbed.
    """
    clients = {
        "slow": {"queue": "1MiB", "when_full": "refuse"},
        "alice": None,
        "bob": None,
        "carol": None,
    }
    with (
        served(clients, listen) as broker,
        broker.login("slow") as slow,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
        broker.login("carol") as carol,
    ):
        taken = fill(alice, "slow")
        waiting = broker.call(
            lambda: broker.daemon.broker.exchange.clients["slow"].sessions["slow"].outbox.waiting
        )
        assert 0.9 * 2**20 < waiting <= 2**20
        for number in range(100):
            bob.send(MESSAGE, "carol", b"x", message_id=number)
            assert carol.recv().id == number
        # Now the recipient reads: all accepted messages arrive, in order.
        assert [slow.recv().id for _ in taken] == taken
        slow.ping()


def test_sender_held_is_resumed_when_queue_has_room() -> None:
    """`when_full: wait` keeps every message and their order, although thousands of
    messages exceed the queue.
    """
    count = 2000
    with (
        served({"alice": None, "bob": {"queue": "64KiB", "when_full": "wait"}}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        data = b"".join(
            packed(MESSAGE, "bob", bytes(5000), message_id=number) for number in range(count)
        )
        sender = threading.Thread(target=alice.write, args=(data,))
        sender.start()
        assert [bob.recv().id for _ in range(count)] == list(range(count))
        sender.join(30)
        alice.ping()


def test_sender_held_does_not_delay_other_clients() -> None:
    """While a sender waits for a recipient that does not read, other clients are
    served.
    """
    with (
        served({"alice": None, "bob": {"queue": "64KiB"}, "carol": None}) as broker,
        broker.login("alice") as alice,
        broker.login("bob"),
        broker.login("carol") as carol,
    ):
        alice.sock.setblocking(False)
        try:
            while True:
                alice.sock.send(packed(MESSAGE, "bob", bytes(60_000)))
        except BlockingIOError:
            pass
        for _ in range(100):
            carol.ping()


def test_queue_full_with_when_full_disconnect_closes_recipient() -> None:
    """`when_full: disconnect` ends the recipient's connection. The sender learns the
    outcome of each message.
    """
    with (
        served({"alice": None, "bob": {"queue": "64KiB", "when_full": "disconnect"}}) as broker,
        broker.login("alice") as alice,
        broker.login("bob"),
    ):
        outcomes: dict[int, list[str]] = {}
        number = 0
        while not broker.log.named("client.disconnected"):
            alice.send(MESSAGE, "bob", bytes(50_000), message_id=number, flags=WANT_RECEIPT)
            outcome = alice.recv()
            outcomes.setdefault(outcome.id, []).append(
                "taken" if outcome.kind == RECEIPT else outcome.code
            )
            number += 1
            assert number < 2000
        assert "queue is full" in broker.log.named("client.disconnected")[0].fields["reason"]
        alice.send(MESSAGE, "bob", b"x", message_id=99_999)
        while (outcome := alice.recv()).id != 99_999:
            outcomes.setdefault(outcome.id, []).append(outcome.code)
        assert outcome.code == "offline"
        assert set(outcomes) == set(range(number))
        assert {each[-1] for each in outcomes.values()} <= {"taken", "full", "offline"}


def test_disconnected_client_that_does_not_read_gets_nothing_new() -> None:
    """The broker closes a connection whose output waits. Its name is free at once, and
    the reason is the last frame that its client receives.
    """
    clients = {
        "alice": None,
        "bob": {"queue": "64KiB", "when_full": "refuse"},
        "ops": {"admin": True},
        "watcher": None,
    }
    with (
        served(clients) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
        broker.login("ops") as ops,
        broker.login("watcher") as watcher,
    ):
        bob.ask("subscribe", topic="news")
        watcher.ask("subscribe", topic="$broker.*.bob")
        taken = fill(alice, "bob")
        assert ops.ask("disconnect", address="bob").json["disconnected"] == ["bob"]
        assert b"$broker.offline.bob" in watcher.recv().body
        alice.send(MESSAGE, "bob", b"late", message_id=1000)
        assert alice.recv().code == "offline"
        with broker.login("bob") as again:
            again.ping()
            assert b"$broker.online.bob" in watcher.recv().body
            alice.send(MESSAGE, "bob", b"new")
            assert again.recv().body == b"new"
            alice.send(EVENT, "", b"x", between=b"\x04news")
            frames = [bob.recv() for _ in taken]
            assert [each.id for each in frames] == taken
            assert bob.is_closed("disconnected")
            again.ping()
            watcher.ping()


def test_recipient_disconnected_queued_messages_are_returned_offline() -> None:
    """The sender gets the error ``offline`` for each message that waited for the closed
    connection.
    """
    with (
        served({"alice": None, "bob": {"queue": "1MiB", "when_full": "refuse"}}) as broker,
        broker.login("alice") as alice,
    ):
        bob = broker.login("bob")
        taken = fill(alice, "bob")
        bob.close()
        # How many of them the system took is unknown. The messages still in the broker
        # are returned in order.
        back = []
        while True:
            alice.send(MESSAGE, "alice", b"end", message_id=77_777)
            frame = alice.recv()
            if frame.kind == ERROR:
                assert frame.code == "offline"
                back.append(frame.id)
            if frame.kind == MESSAGE and back:
                break
        assert back == taken[-len(back) :]


def test_sender_that_does_not_read_errors_is_held() -> None:
    """A client that sends and never reads its errors costs the broker a bounded amount
    of memory.
    """
    with (
        served({"alice": {"queue": "64KiB"}, "carol": None}) as broker,
        broker.login("alice") as alice,
        broker.login("carol") as carol,
    ):
        alice.sock.setblocking(False)
        data = packed(MESSAGE, "nobody", b"x", message_id=1) * 1000
        sent = stuck = 0
        while stuck < 3:
            try:
                sent += alice.sock.send(data)
                stuck = 0
            except BlockingIOError:
                carol.ping()
                stuck += 1
            assert sent < 200_000_000
        waiting = broker.call(
            lambda: broker.daemon.broker.exchange.clients["alice"].sessions["alice"].outbox.waiting
        )
        assert waiting < 1_000_000
        alice.close()
        broker.log.wait("client.disconnected")


def test_connections_hundred_at_once_leave_nothing_behind() -> None:
    """A hundred clients connect at once, twice. None is refused, and no connection is
    left over.
    """
    names = [f"c{number}" for number in range(100)]
    with served(dict.fromkeys(names)) as broker:
        for _ in range(2):
            crowd = [login(broker.address, key_of(name)) for name in names]
            for number, member in enumerate(crowd):
                member.send(MESSAGE, names[number - 1], b"hello")
            for member in crowd:
                assert member.recv().body == b"hello"
                member.close()
        broker.log.wait("client.disconnected", 200)
        assert not broker.log.named("client.refused")
        server = broker.daemon._server
        assert server is not None
        assert broker.call(
            lambda: (len(server.connections), len(server.context.connections.lingering))
        ) == (0, 0)


def test_recipient_disconnected_full_queue_is_returned_in_turns(socket_dir: Path) -> None:
    """Messages of other clients pass in between. In the end the sender has every error."""
    clients = {"alice": {}, "bob": {"queue": "4MiB", "when_full": "refuse"}, "carol": {}}
    with running_daemon(configuration(str(socket_dir / "sock"), clients)) as broker:
        alice, bob, carol = (broker.login(name) for name in ("alice", "bob", "carol"))
        count = 60_000
        alice.write(
            b"".join(
                packed(MESSAGE, "bob", b"x" * 40, message_id=number) for number in range(count)
            )
        )
        alice.ping()
        waiting = broker.call(
            lambda: len(broker.daemon.broker.exchange.find("bob").outbox.pieces())
        )  # type: ignore[union-attr]
        assert waiting
        bob.close()
        broker.log.wait("client.disconnected")
        carol.ping()
        alice.send(MESSAGE, "carol", b"the end")
        assert carol.recv().body == b"the end"
        while broker.call(lambda: broker.daemon.broker.has_deferred_work):
            carol.ping()
        errors = broker.call(broker.daemon.stats)["refused"]["offline"]
        assert errors > 1000
        assert {alice.recv().code for _ in range(errors)} == {"offline"}
        for each in (alice, carol):
            each.close()


def test_input_of_disconnected_client_does_not_corrupt_other_frames(socket_dir: Path) -> None:
    """The broker discards the rest of its input while it routes another sender's
    frames. Those frames must stay intact.
    """
    clients = {
        "alice": {"admin": True},
        "bob": {"queue": "1KiB"},
        "mallory": None,
        "deaf": {"queue": "1KiB"},
    }
    with (
        running_daemon(configuration(str(socket_dir / "sock"), clients)) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
        broker.login("mallory") as mallory,
        broker.login("deaf"),
    ):
        # The sender is held, with more in the system's buffer than the broker reads.
        mallory.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            mallory.write(packed(MESSAGE, "deaf", b"\xff" * 50_000) * 200)
        messages = [number.to_bytes(2, "big") * 450 for number in range(100)]
        leave = json.dumps({"op": "disconnect", "address": "mallory"}).encode()

        alice.write(
            packed(REQUEST, "$broker", leave, codec=JSON)
            + b"".join(packed(MESSAGE, "bob", body) for body in messages)
        )

        assert [bob.recv().body for _ in messages] == messages
        assert alice.recv().kind == REPLY
        alice.ping()
