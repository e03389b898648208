"""One connection for one name: who comes second, who comes back, who stops reading, and
who dies half-way.
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
    FAILURE,
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
    prefixed,
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
    """Send with RECEIPT until one is refused; return the ids that were taken."""
    taken: list[int] = []
    while True:
        sender.send(MESSAGE, to, bytes(size), id=len(taken), flags=WANT_RECEIPT)
        outcome = sender.recv()
        if outcome.kind == ERROR:
            assert outcome.code == "full"
            return taken
        assert outcome.kind == RECEIPT
        taken.append(outcome.id)


# Second connections


def test_a_second_connection_of_a_name_is_refused(listen: str) -> None:
    """It is told behind its handshake, the log says why, and the first connection
    notices nothing.
    """
    with served(listen=listen) as broker, broker.login("alice") as alice:
        with broker.login("alice") as second:
            assert second.is_closed("name_taken")
        refusal = broker.log.wait("client.refused")[0].fields
        assert refusal["name"] == "alice"
        assert "connected already" in refusal["reason"]
        alice.ping()


def test_a_second_connection_may_replace_the_first(listen: str) -> None:
    """With when_connected: replace the first one is closed and messages go to the
    second.
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


def test_a_pool_takes_as_many_as_configured() -> None:
    """connections: 3 lets three in and refuses the fourth."""
    with served({"pool": {"connections": 3}}) as broker:
        members = [broker.login("pool") for _ in range(3)]
        assert len({each.ask("whoami").json["address"] for each in members}) == 3
        with broker.login("pool") as fourth:
            assert fourth.is_closed("name_taken")
        for each in members:
            each.close()


def test_connections_are_bounded() -> None:
    """limits.connections is for all clients together; room is made when one goes."""
    with served("alice bob carol", limits={"connections": 2}) as broker:
        alice, bob = broker.login("alice"), broker.login("bob")
        assert rejection(broker, "carol") == prefixed(FAILURE)
        assert "limits.connections" in broker.log.wait("client.refused")[0].fields["reason"]
        bob.close()
        broker.log.wait("client.disconnected")
        broker.login("carol").close()
        alice.close()


def test_a_client_may_come_back_at_once(listen: str) -> None:
    """Close and connect without a pause, two hundred times: never refused."""
    with served(listen=listen) as broker:
        for _ in range(200):
            broker.login("alice").close()
        assert not broker.log.named("client.refused")


def test_a_client_may_come_back_at_once_after_sending(listen: str) -> None:
    """What it sent before it went arrives, all of it, though it came back before that
    was read.
    """
    with served(listen=listen) as broker, broker.login("bob") as bob:
        got: list[int] = []
        reader = threading.Thread(target=lambda: got.extend(bob.recv().id for _ in range(50 * 20)))
        reader.start()
        for round in range(50):
            with broker.login("alice") as alice:
                alice.write(
                    b"".join(
                        packed(MESSAGE, "bob", bytes(3000), id=round * 20 + n) for n in range(20)
                    )
                )
        reader.join(30)
        assert got == list(range(50 * 20))
        assert not broker.log.named("client.refused")


def test_a_reset_client_may_come_back_at_once() -> None:
    """A connection that ended with a reset leaves its place too."""
    with served() as broker:
        for _ in range(50):
            alice = broker.login("alice")
            alice.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            alice.close()
        assert not broker.log.named("client.refused")


def test_a_held_client_may_come_back_at_once(listen: str) -> None:
    """A sender held because its recipient does not read is not kept out of its own name
    by that.
    """
    clients = {"alice": None, "bob": {"queue": "64KiB", "when_full": "wait"}}
    with served(clients, listen, limits={"wait_timeout": "60s"}) as broker, broker.login("bob"):
        for _ in range(3):
            alice = broker.login("alice")
            alice.sock.settimeout(0.3)
            # No answer for so long means that it is held.
            with contextlib.suppress(TimeoutError):
                while True:
                    alice.send(MESSAGE, "bob", bytes(60_000), flags=WANT_RECEIPT)
                    alice.recv()
            alice.close()
        with broker.login("alice") as alice:
            assert alice.ask("whoami").json["name"] == "alice"
        assert not broker.log.named("client.refused")


def test_who_comes_back_waits_while_what_it_left_behind_is_routed_in_turns(
    socket_dir: Path,
) -> None:
    """Nobody else is held up by that, nothing of it is lost, and what it says now comes
    behind it.
    """
    with served(listen=str(socket_dir / "s")) as broker, broker.login("bob") as bob:
        bob.ask("subscribe", topic="t.*")
        alice, server = broker.login("alice"), broker.daemon.server
        alice.ping()
        events = [
            packed(EVENT, "", between=b"\x05t.%03d" % number, id=number) for number in range(101)
        ]

        def leave() -> Room:
            # In the broker's own thread, so that it does not look before everything is
            # there. Each of them leaves the routing loop.
            server.context.turn_budget = 4
            alice.write(b"".join(events[:100]))
            alice.close()
            return server.room_for("alice")

        assert broker.call(leave) is Room.UNDECIDED
        with broker.login("alice") as again:
            again.write(events[100])
            assert [bob.recv().id for _ in range(101)] == list(range(101))
        assert not broker.log.named("client.refused")


def sessions_of(broker: RunningDaemon, name: str) -> list[Session]:
    return broker.call(lambda: list(broker.daemon.broker.exchange.clients[name].sessions.values()))


def test_a_member_may_come_back_while_another_writes_to_the_one_that_is_gone(
    socket_dir: Path,
) -> None:
    """What is read of one, to find out whether it is there, is written to another,
    which ends by that.
    """
    config = configuration(str(socket_dir / "s"), {"pool": {"connections": 2}})
    with running_daemon(config) as broker, broker.login("pool") as first:
        second = broker.login("pool")
        server, gone = broker.daemon.server, sessions_of(broker, "pool")[1]

        def look() -> tuple[Room, bool]:
            # In the broker's own thread, so that it knows nothing of this yet.
            first.send(MESSAGE, gone.address, b"to the other")
            second.close()
            return server.room_for("pool"), gone.open

        assert broker.call(look) == (Room.FREE, False)
        with broker.login("pool") as third:
            third.ping()
            assert first.recv().code == "offline"


def test_all_connections_are_cut_though_one_ends_by_the_end_of_another(socket_dir: Path) -> None:
    """Whoever is told of the first end may find that it is gone itself."""
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


def test_a_client_half_closed_is_closed() -> None:
    """A client that will send no more is let go; its name is free."""
    with served() as broker, broker.login("alice") as alice:
        alice.sock.shutdown(socket.SHUT_WR)
        assert alice.is_closed()
        assert (
            broker.log.wait("client.disconnected")[0].fields["reason"]
            == "connection closed by the client"
        )


def test_a_client_killed_in_the_middle_of_a_frame(listen: str) -> None:
    """Half a message is delivered to nobody; the name is free at once; others go on."""
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


def test_a_client_that_does_not_read_costs_its_queue_only(listen: str) -> None:
    """The broker keeps what the queue allows; meanwhile two others talk as if nothing
    were.
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
            bob.send(MESSAGE, "carol", b"x", id=number)
            assert carol.recv().id == number
        # It reads at last: all that was taken arrives, in order.
        assert [slow.recv().id for _ in taken] == taken
        slow.ping()


def test_a_held_sender_goes_on_when_there_is_room() -> None:
    """when_full: wait loses nothing and reorders nothing, though thousands of messages
    exceed the queue.
    """
    count = 2000
    with (
        served({"alice": None, "bob": {"queue": "64KiB", "when_full": "wait"}}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        data = b"".join(packed(MESSAGE, "bob", bytes(5000), id=number) for number in range(count))
        sender = threading.Thread(target=alice.write, args=(data,))
        sender.start()
        assert [bob.recv().id for _ in range(count)] == list(range(count))
        sender.join(30)
        alice.ping()


def test_a_held_sender_holds_up_nobody_else() -> None:
    """While one waits for a recipient that does not read, others are served."""
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


def test_a_client_may_be_disconnected_for_not_reading() -> None:
    """when_full: disconnect ends its connection; the sender hears what became of each
    message.
    """
    with (
        served({"alice": None, "bob": {"queue": "64KiB", "when_full": "disconnect"}}) as broker,
        broker.login("alice") as alice,
        broker.login("bob"),
    ):
        outcomes: dict[int, list[str]] = {}
        number = 0
        while not broker.log.named("client.disconnected"):
            alice.send(MESSAGE, "bob", bytes(50_000), id=number, flags=WANT_RECEIPT)
            outcome = alice.recv()
            outcomes.setdefault(outcome.id, []).append(
                "taken" if outcome.kind == RECEIPT else outcome.code
            )
            number += 1
            assert number < 2000
        assert "queue is full" in broker.log.named("client.disconnected")[0].fields["reason"]
        alice.send(MESSAGE, "bob", b"x", id=99_999)
        while (outcome := alice.recv()).id != 99_999:
            outcomes.setdefault(outcome.id, []).append(outcome.code)
        assert outcome.code == "offline"
        assert set(outcomes) == set(range(number))
        assert {each[-1] for each in outcomes.values()} <= {"taken", "full", "offline"}


def test_what_a_gone_recipient_did_not_take_comes_back() -> None:
    """Messages that waited for a connection that ends come back as ``offline``."""
    with (
        served({"alice": None, "bob": {"queue": "1MiB", "when_full": "refuse"}}) as broker,
        broker.login("alice") as alice,
    ):
        bob = broker.login("bob")
        taken = fill(alice, "bob")
        bob.close()
        # Which of them the system took is unknown; what the broker still had comes back
        # in order.
        back = []
        while True:
            alice.send(MESSAGE, "alice", b"end", id=77_777)
            frame = alice.recv()
            if frame.kind == ERROR:
                assert frame.code == "offline"
                back.append(frame.id)
            if frame.kind == MESSAGE and back:
                break
        assert back == taken[-len(back) :]


def test_who_does_not_read_outcomes_is_not_read_from() -> None:
    """A client that sends and never reads its errors costs the broker a bounded amount."""
    with (
        served({"alice": {"queue": "64KiB"}, "carol": None}) as broker,
        broker.login("alice") as alice,
        broker.login("carol") as carol,
    ):
        alice.sock.setblocking(False)
        data = packed(MESSAGE, "nobody", b"x", id=1) * 1000
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


def test_a_crowd_of_connections_comes_and_goes() -> None:
    """A hundred clients at once, twice: nobody is refused, nothing is left over."""
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


def test_what_a_full_queue_held_is_given_back_without_holding_up_others(socket_dir: Path) -> None:
    """Others' messages pass in between, and in the end the sender has every error."""
    clients = {"alice": {}, "bob": {"queue": "4MiB", "when_full": "refuse"}, "carol": {}}
    with running_daemon(configuration(str(socket_dir / "sock"), clients)) as here:
        alice, bob, carol = (here.login(name) for name in ("alice", "bob", "carol"))
        count = 60_000
        alice.write(
            b"".join(packed(MESSAGE, "bob", b"x" * 40, id=number) for number in range(count))
        )
        alice.ping()
        waiting = here.call(lambda: len(here.daemon.broker.exchange.find("bob").outbox.pieces()))  # type: ignore[union-attr]
        assert waiting
        bob.close()
        here.log.wait("client.disconnected")
        carol.ping()
        alice.send(MESSAGE, "carol", b"the end")
        assert carol.recv().body == b"the end"
        while here.call(lambda: here.daemon.broker.has_deferred_work):
            carol.ping()
        errors = here.call(here.daemon.stats)["refused"]["offline"]
        assert errors > 1000
        assert {alice.recv().code for _ in range(errors)} == {"offline"}
        for each in (alice, carol):
            each.close()


def test_what_a_leaving_client_still_sends_spoils_no_other_frames(socket_dir: Path) -> None:
    """The rest of it is thrown away in the middle of routing somebody else's, who must
    not notice.
    """
    clients = {
        "alice": {"admin": True},
        "bob": {"queue": "1KiB"},
        "mallory": None,
        "deaf": {"queue": "1KiB"},
    }
    with (
        running_daemon(configuration(str(socket_dir / "sock"), clients)) as here,
        here.login("alice") as alice,
        here.login("bob") as bob,
        here.login("mallory") as mallory,
        here.login("deaf"),
    ):
        # Held, and with more in the system's buffer than the broker wants to read.
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
