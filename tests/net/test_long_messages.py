"""Messages longer than the read buffer, through real sockets: received, held, shared,
and freed.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import pytest
from support.raw_client import ERROR, EVENT, MESSAGE, RECEIPT, REPLY, WANT_RECEIPT, Frame, packed
from support.running_daemon import configuration, running_daemon

from brokerd.net.connection import connection as connection_module
from brokerd.net.connection.connection import Connection

BIG = os.urandom(1 << 20)


def served(clients: Any = "alice bob carol") -> Any:
    return running_daemon(configuration("127.0.0.1:0", clients))


def test_large_frame_among_small_ones_keeps_order() -> None:
    """Frames behind a large one in the same segment are delivered after it, even if
    their sender is held meanwhile.
    """
    with (
        served({"alice": None, "bob": {"queue": "2MiB"}}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        stream = b"".join(
            packed(
                MESSAGE,
                "bob",
                BIG if number % 2 else b"short",
                message_id=number,
                flags=WANT_RECEIPT,
            )
            for number in range(80)
        )
        alice.sock.setblocking(False)
        rest = memoryview(stream)
        # Send until the broker reads no more: bob has read no byte, and the queue is
        # full.
        while rest:
            try:
                rest = rest[alice.sock.send(rest) :]
            except BlockingIOError:
                if broker.call(lambda: bool(broker.daemon.broker.held.deadlines)):
                    break
        assert rest, "the sender was never held"
        alice.sock.settimeout(30)
        received: list[Frame] = []
        while rest:
            received.append(bob.recv())
            alice.sock.setblocking(False)
            with suppress(BlockingIOError):
                rest = rest[alice.sock.send(rest) :]
        alice.sock.settimeout(30)
        received += [bob.recv() for _ in range(80 - len(received))]
        assert [(frame.id, frame.body) for frame in received] == [
            (number, BIG if number % 2 else b"short") for number in range(80)
        ]
        assert [alice.recv().kind for _ in range(80)] == [RECEIPT] * 80


def test_large_frame_is_written_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipient that reads as fast as the broker writes does not keep the broker for the
    whole of a long message.
    """
    turns = 0

    def count(connection: Connection) -> None:
        nonlocal turns
        turns += 1
        on_writable(connection)

    on_writable = Connection.on_writable
    monkeypatch.setattr(Connection, "on_writable", count)
    monkeypatch.setattr(connection_module, "BYTES_PER_TURN", 10_000)
    # As much as the system takes at once, and more than the read buffer.
    body = BIG[:200_000]
    with (
        served() as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        for number in range(3):
            alice.write(packed(MESSAGE, "bob", body, message_id=number))
        assert [bob.recv()[4:] for _ in range(3)] == [(number, body) for number in range(3)]
        assert turns >= 3 * len(body) // 10_000 - 3


def test_large_frame_of_event_reaches_every_subscriber() -> None:
    """Subscribers that read at different times get the same bytes."""
    with (
        served("alice bob carol") as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
        broker.login("carol") as carol,
    ):
        for each in (bob, carol):
            assert each.ask("subscribe", topic="news.>").kind == REPLY
        for number in range(3):
            alice.send(EVENT, "", b"\x06news.x" + BIG, message_id=number)
        for each in (bob, carol):
            assert [each.recv().body for _ in range(3)] == [b"\x06news.x" + BIG] * 3


@pytest.mark.parametrize("options", [{}, {"connections": 2}])
def test_large_frame_of_disconnected_recipient_is_returned_offline(options: dict[str, Any]) -> None:
    """Each large message that the system did not take whole is answered with
    ``offline``.
    """
    with (
        served({"alice": None, "bob": {"queue": "64MiB", **options}}) as broker,
        broker.login("alice") as alice,
    ):
        with broker.login("bob"):
            for number in range(12):
                alice.send(MESSAGE, "bob", BIG, message_id=number, flags=WANT_RECEIPT)
                assert alice.recv().kind == RECEIPT
        refused = alice.recv()
        assert (refused.kind, refused.code) == (ERROR, "offline")
        while refused.id < 11:
            following = alice.recv()
            assert (following.kind, following.code, following.id) == (
                ERROR,
                "offline",
                refused.id + 1,
            )
            refused = following


def test_large_frame_incomplete_is_not_delivered() -> None:
    """The recipient never sees half a message, and still gets the messages of other
    clients.
    """
    with served() as broker, broker.login("bob") as bob, broker.login("carol") as carol:
        with broker.login("alice") as alice:
            alice.write(packed(MESSAGE, "bob", BIG)[: len(BIG) // 2])
        broker.log.wait("client.disconnected")
        carol.send(MESSAGE, "bob", b"whole", message_id=1)
        assert bob.recv() == Frame(MESSAGE, 0, 0, "carol", 1, b"whole")
