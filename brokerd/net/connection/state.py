"""The states of an established connection, and the table of their transitions.

The state says whether the connection's input is read and routed. Whether output waits
for the system is independent of it: see ``Connection.writing``. No I/O.
"""

from __future__ import annotations

import select
from enum import Enum
from typing import Final

__all__ = ["HUNG_UP", "NEXT", "Event", "State"]

#: Events of ``poll`` that report that the other end has closed.
HUNG_UP: Final = (
    getattr(select, "POLLRDHUP", 0) | getattr(select, "POLLHUP", 0) | getattr(select, "POLLERR", 0)
)


class _Quick(Enum):
    """An enumeration whose members are quick keys; Enum's hash is a method in Python."""

    __hash__ = object.__hash__


class State(_Quick):
    """The state of a connection's input."""

    NEW = "the session is made or restored; the socket is not read yet"
    READING = "the socket is read whenever it has input"
    WAITING = "other connections have their turn before the pending input is routed"
    HELD = "the sender is held, because a queue that it sends to is full"
    CLOSING = "the session is closing: no input is read, and its output is written"
    CLOSED = "the socket is closed or in its lingering close, and the session is detached"


class Event(_Quick):
    """An event that changes the state of a connection."""

    READ = "reading begins, or continues after a wait"
    YIELD = "the sender's turn is over, and input is left"
    HOLD = "the queue that a frame goes to is full"
    CLOSE = "the broker closes the session"
    LOSE = "the connection is gone, or all its output is written"


#: NEXT[state][event] is the state that follows; an event that is not in the table can't
#: happen.
NEXT: Final[dict[State, dict[Event, State]]] = {
    State.NEW: {
        Event.READ: State.READING,
        Event.YIELD: State.WAITING,
        Event.HOLD: State.HELD,
        Event.CLOSE: State.CLOSING,
        Event.LOSE: State.CLOSED,
    },
    State.READING: {
        Event.READ: State.READING,
        Event.YIELD: State.WAITING,
        Event.HOLD: State.HELD,
        Event.CLOSE: State.CLOSING,
        Event.LOSE: State.CLOSED,
    },
    State.WAITING: {
        Event.READ: State.READING,
        Event.CLOSE: State.CLOSING,
        Event.LOSE: State.CLOSED,
    },
    # A sender that is not held any more may be read before it is resumed.
    State.HELD: {
        Event.READ: State.READING,
        Event.YIELD: State.WAITING,
        Event.HOLD: State.HELD,
        Event.CLOSE: State.CLOSING,
        Event.LOSE: State.CLOSED,
    },
    State.CLOSING: {Event.CLOSE: State.CLOSING, Event.LOSE: State.CLOSED},
    State.CLOSED: {},
}
