"""Thousands of connections that end at once: their ends are handled in turns."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import pytest
from support.raw_client import MESSAGE, Raw, packed
from support.running_daemon import RunningDaemon, configuration, running_daemon

from brokerd.net.connection import disconnects
from brokerd.net.connection.reset_recheck import ResetRecheck
from brokerd.net.connection.state import State

MANY, ENDS, CLIENTS = 4, 3, 40
NAMES = [f"c{number}" for number in range(CLIENTS)]


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningDaemon]:
    """A broker for which a few ends in one turn are very many."""
    monkeypatch.setattr(disconnects, "_MANY", MANY)
    monkeypatch.setattr(disconnects, "_ENDS", ENDS)
    clients = " ".join([*NAMES, "bob"])
    with running_daemon(configuration("127.0.0.1:0", clients)) as running:
        yield running


def ends_in_turns(broker: RunningDaemon, clients: list[Raw]) -> Counter[int]:
    """Close all clients while the event loop is busy; return the sessions that ended in
    each of its turns.
    """
    server = broker.daemon.server
    ends: Counter[int] = Counter()
    turn = 0

    def next_turn() -> None:
        nonlocal turn
        turn += 1
        server.loop.call_soon(next_turn)

    def close_all() -> None:
        server.on_left = lambda session: ends.update([turn])
        for each in clients:
            each.close()
        next_turn()

    broker.call(close_all)
    while broker.call(lambda: sum(ends.values())) < len(clients):
        pass
    return ends


def test_disconnects_at_once_are_handled_in_turns(broker: RunningDaemon) -> None:
    """What the clients had sent is routed first, and other clients have their turns."""
    with broker.login("bob") as bob:
        clients = [broker.login(name) for name in NAMES]
        for number, each in enumerate(clients):
            each.ping()
            each.write(packed(MESSAGE, "bob", b"%d" % number) * 2)
        ends = ends_in_turns(broker, clients)
        assert sum(ends.values()) == CLIENTS
        assert max(ends.values()) <= MANY + ENDS
        received = Counter(bob.recv().body for _ in range(2 * CLIENTS))
        assert received == {b"%d" % number: 2 for number in range(CLIENTS)}


def test_disconnects_postponed_do_not_keep_names(broker: RunningDaemon) -> None:
    """A client that connects again at once is accepted, although the end of its former
    connection has not had its turn yet.
    """
    for _ in range(3):
        clients = [broker.login(name) for name in NAMES]
        for each in clients:
            each.ping()
        broker.call(lambda: [each.close() for each in clients])  # noqa: B023 - called at once
        again = [broker.login(name) for name in reversed(NAMES)]
        for each in again:
            each.ping()
            each.close()


def test_disconnects_of_held_senders_wait_for_their_frames(broker: RunningDaemon) -> None:
    """A held sender may not be read, so its end is not looked for."""
    server = broker.daemon.server
    clients = [broker.login(name) for name in NAMES]
    for each in clients:
        each.ping()

    def hold_one() -> None:
        (session,) = broker.daemon.broker.exchange.clients["c0"].sessions.values()
        broker.daemon.broker.held.add(session, session, float("inf"))

    broker.call(hold_one)
    with clients[0]:
        ends = ends_in_turns(broker, clients[1:])
        assert sum(ends.values()) == CLIENTS - 1
        assert broker.call(lambda: len(server.connections)) == 1


class _Polled:
    """A connection over a socket pair that notes what is done with it."""

    state = State.READING

    def __init__(self, done: list[str]) -> None:
        self.sock, self.client = socket.socketpair()
        self.fd = self.sock.fileno()
        self._done = done

    def may_read(self) -> bool:
        return self.state is State.READING

    def postpone(self) -> None:
        self.state = State.WAITING
        self._done.append("postponed")

    def on_readable(self) -> None:
        self._done.append("read")


def test_disconnects_of_thousands_let_other_input_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Input that has arrived is read at once, then between two postponed ends; more than
    a turn may postpone wait for the next one.
    """
    monkeypatch.setattr(disconnects, "_MANY", 1)
    monkeypatch.setattr(disconnects, "_UNWATCHED", 4)
    monkeypatch.setattr(disconnects, "_UNWATCHED_AT_ONCE", 2)
    done: list[str] = []
    polled = [_Polled(done) for _ in range(7)]
    try:
        *ended, other = polled
        for each in ended:
            each.client.close()
        other.client.send(b"x")
        loop = asyncio.new_event_loop()
        disconnects.Disconnects(loop, ResetRecheck(loop)).note(cast("Any", polled))
        loop.close()
    finally:
        for each in polled:
            each.sock.close()
            each.client.close()
    assert done == ["read", *["postponed"] * 2, "read", *["postponed"] * 2, "read"]


def test_disconnects_of_thousands_let_lively_client_be_read_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client that was read lately is read after each slice of every step: when the
    others are polled, when their ends are found, and when these are postponed.
    """
    monkeypatch.setattr(disconnects, "_MANY", 1)
    monkeypatch.setattr(disconnects, "_SLICE", 2)
    done: list[str] = []
    *ended, lively = polled = [_Polled(done) for _ in range(5)]
    try:
        for each in ended:
            each.client.close()
        lively.client.send(b"x")
        loop = asyncio.new_event_loop()
        recheck = ResetRecheck(loop)
        recheck.note(cast("Any", lively))
        disconnects.Disconnects(loop, recheck).note(cast("Any", ended))
        recheck.close()
        loop.close()
    finally:
        for each in polled:
            each.sock.close()
            each.client.close()
    assert done == ["read"] * 4 + ["postponed"] * 2 + ["read"] + ["postponed"] * 2 + ["read"]
