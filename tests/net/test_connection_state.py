"""The table of an established connection's states."""

from __future__ import annotations

import ast
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.raw_client import MESSAGE
from support.running_daemon import configuration, running_daemon

import brokerd.net
from brokerd.net.connection.connection import Connection
from brokerd.net.connection.state import NEXT, Event, State


def reached(state: State) -> set[State]:
    """Return the states that can follow, directly or not."""
    found: set[State] = set()
    pending = [state]
    while pending:
        for follows in set(NEXT[pending.pop()].values()) - found:
            found.add(follows)
            pending.append(follows)
    return found


def test_connection_state_table_has_every_state_and_event() -> None:
    """Every state is reached from NEW, and every event is allowed somewhere."""
    assert set(NEXT) == set(State)
    assert reached(State.NEW) == set(State) - {State.NEW}
    assert {event for events in NEXT.values() for event in events} == set(Event)


@pytest.mark.parametrize("state", [state for state in State if state is not State.CLOSED])
def test_connection_state_lose_event_always_closes(state: State) -> None:
    """A connection can be lost in every state, and CLOSED is the last one."""
    assert NEXT[state][Event.LOSE] is State.CLOSED
    assert NEXT[State.CLOSED] == {}


def test_connection_state_closing_is_never_read_again() -> None:
    """A session that is closing is not read from again."""
    assert reached(State.CLOSING) == {State.CLOSING, State.CLOSED}


def test_connection_state_is_assigned_in_one_place() -> None:
    """Only the first state and the transitions of the table are assigned."""
    assigned = [
        (path.name, function.name)
        for path in Path(brokerd.net.__path__[0]).rglob("*.py")
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and node.attr == "state"
        and isinstance(node.ctx, ast.Store)
    ]

    assert assigned == [("connection.py", "__init__"), ("connection.py", "_change")]


def test_connection_state_event_outside_table_is_assertion_error() -> None:
    """The error for an event that can't happen names the event and the state."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        context: Any = SimpleNamespace()
        credential: Any = None
        connection = Connection(context, ours, credential)
        connection._change(Event.CLOSE)

        with pytest.raises(AssertionError, match="HOLD can't happen in CLOSING"):
            connection._change(Event.HOLD)


def test_connection_state_held_sender_follows_table() -> None:
    """A sender is read from, held while the queue is full, and read from again."""
    clients = {"alice": None, "bob": {"queue": "128KiB", "when_full": "wait"}}
    with (
        running_daemon(configuration("127.0.0.1:0", clients)) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        (connection,) = broker.call(
            lambda: [
                each
                for each in broker.daemon.server.connections
                if each.session.client.name == "alice"
            ]
        )
        assert broker.call(lambda: connection.state) is State.READING
        sent = 0
        while broker.call(lambda: connection.state) is not State.HELD:
            alice.send(MESSAGE, "bob", b"x" * 60_000)
            sent += 1
        for _ in range(sent):
            assert len(bob.recv().body) == 60_000
        assert broker.call(lambda: connection.state) is State.READING
        alice.close()
        broker.log.wait("client.disconnected")
        assert broker.call(lambda: connection.state) is State.CLOSED
