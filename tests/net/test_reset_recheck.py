"""Connections reset while some of their bytes were unread are detected under every
event loop.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from pathlib import Path

import pytest
from support.raw_client import MESSAGE
from support.running_daemon import configuration, running_daemon


@pytest.mark.parametrize("listen", ["unix", "127.0.0.1:0"])
def test_reset_recheck_reset_after_unread_bytes_ends_connection(
    socket_dir: Path, listen: str
) -> None:
    """The bytes are delivered and the name is free, although the loop reports both with
    one event.
    """
    at = str(socket_dir / "sock") if listen == "unix" else listen
    with running_daemon(configuration(at, "alice bob")) as broker, broker.login("bob") as bob:
        alice = broker.login("alice")
        # Unread bytes turn its close into a reset, on a Unix socket too.
        bob.send(MESSAGE, "alice", b"unread")
        bob.ping()
        blocked, go_on = threading.Event(), threading.Event()

        def block() -> None:
            blocked.set()
            assert go_on.wait(30)

        waiting = threading.Thread(target=broker.call, args=(block,))
        waiting.start()
        assert blocked.wait(30)
        alice.send(MESSAGE, "bob", b"the last")
        if listen != "unix":
            alice.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        alice.close()
        go_on.set()
        waiting.join(30)

        if listen == "unix":
            assert bob.recv().body == b"the last"
        broker.log.wait("client.disconnected")
        broker.login("alice").close()


def test_reset_recheck_idle_connections_have_no_timer(socket_dir: Path) -> None:
    """A check without a read before it is the last one until the next read, so that an
    idle broker does not wake up.
    """
    with (
        running_daemon(configuration(str(socket_dir / "sock"), "alice")) as broker,
        broker.login("alice") as alice,
    ):
        # The first ping may still have been read while the connection was pending.
        alice.ping()
        alice.ping()
        recheck = broker.daemon._server.context.reset_recheck  # type: ignore[union-attr]
        assert broker.call(lambda: recheck._timer is not None)
        for _ in range(3):
            broker.call(recheck._look)
        assert broker.call(lambda: (recheck._timer, list(recheck.read_lately()))) == (None, [])
        alice.ping()


def test_reset_recheck_ended_connection_is_forgotten_at_once(socket_dir: Path) -> None:
    """Thousands may end in a second, and their memory is used again."""
    with running_daemon(configuration(str(socket_dir / "sock"), "alice")) as broker:
        recheck = broker.daemon._server.context.reset_recheck  # type: ignore[union-attr]
        with broker.login("alice") as alice:
            alice.ping()
            alice.ping()
            assert broker.call(lambda: len(list(recheck.read_lately()))) == 1
        broker.log.wait("client.disconnected")
        assert broker.call(lambda: list(recheck.read_lately())) == []


@pytest.mark.parametrize("size", [4_000, 300_000])
def test_reset_recheck_held_sender_keeps_its_earlier_frames(socket_dir: Path, size: int) -> None:
    """The second check does not read on from a held sender that has disconnected. All
    frames arrive when there is room.
    """
    clients = {"alice": None, "bob": {"queue": "64KiB", "when_full": "wait"}}
    with (
        running_daemon(configuration(str(socket_dir / "sock"), clients)) as broker,
        broker.login("bob") as bob,
    ):
        alice = broker.login("alice")
        alice.ping()
        (session,) = broker.daemon.broker.exchange.clients["alice"].sessions.values()
        before = broker.call(lambda: session.messages_in)
        sent, deadline = 0, time.monotonic() + 30
        while broker.call(lambda: session.held_by) is None:
            alice.send(MESSAGE, "bob", b"%7d" % sent + bytes(size))
            sent += 1
            while broker.call(lambda: session.messages_in) < before + sent:
                assert time.monotonic() < deadline
        alice.close()
        recheck = broker.daemon._server.context.reset_recheck  # type: ignore[union-attr]
        for _ in range(3):
            broker.call(lambda: (recheck.note(session.connection), recheck._look()))

        assert [int(bob.recv().body[:7]) for _ in range(sent)] == list(range(sent))
        broker.log.wait("client.disconnected")
