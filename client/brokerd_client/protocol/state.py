"""The states of a client's connection to the broker, and the table of transitions.

No I/O.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

__all__ = ["NEXT", "Event", "State"]


class State(Enum):
    """The state of the connection."""

    IDLE = "the client has not tried to connect yet"
    CONNECTING = "the client is opening a connection"
    AUTHENTICATING = "the handshake is under way"
    INTRODUCING = "the broker has not introduced the client yet"
    READY = "the client is connected"
    DRAINING = "the broker closes the connection soon; only answers are sent"
    WAITING = "the connection is lost; another attempt follows"
    CLOSING = "close() was called; outcomes of earlier sends are still received"
    GONE = "the connection is lost; no other attempt follows"
    CLOSED = "close() was called, and the connection is closed"


class Event(Enum):
    """An event that changes the state of the connection."""

    DIAL = "the face begins to connect"
    OPEN = "the connection is made"
    AUTHENTICATE = "both sides have proved that they know the key"
    INTRODUCE = "the broker has introduced the client"
    DRAIN = "the broker announces the end of the connection"
    LOSE = "the connection is lost, or could not be made; another attempt follows"
    GIVE_UP = "the connection is lost, or could not be made; no other attempt follows"
    CLOSE = "the program closes the client"


#: NEXT[state][event] is the state that follows; an event that is not in the table can't
#: happen.
NEXT: Final[dict[State, dict[Event, State]]] = {
    State.IDLE: {Event.DIAL: State.CONNECTING, Event.CLOSE: State.CLOSED},
    State.CONNECTING: {
        Event.OPEN: State.AUTHENTICATING,
        Event.LOSE: State.WAITING,
        Event.GIVE_UP: State.GONE,
        Event.CLOSE: State.CLOSED,
    },
    State.AUTHENTICATING: {
        Event.AUTHENTICATE: State.INTRODUCING,
        Event.LOSE: State.WAITING,
        Event.GIVE_UP: State.GONE,
        Event.CLOSE: State.CLOSED,
    },
    State.INTRODUCING: {
        Event.INTRODUCE: State.READY,
        Event.LOSE: State.WAITING,
        Event.GIVE_UP: State.GONE,
        Event.CLOSE: State.CLOSED,
    },
    State.READY: {
        Event.DRAIN: State.DRAINING,
        Event.LOSE: State.WAITING,
        Event.GIVE_UP: State.GONE,
        Event.CLOSE: State.CLOSING,
    },
    State.DRAINING: {
        Event.LOSE: State.WAITING,
        Event.GIVE_UP: State.GONE,
        Event.CLOSE: State.CLOSING,
    },
    State.WAITING: {Event.DIAL: State.CONNECTING, Event.CLOSE: State.CLOSED},
    State.CLOSING: {
        Event.LOSE: State.CLOSED,
        Event.GIVE_UP: State.CLOSED,
        Event.CLOSE: State.CLOSING,
    },
    State.GONE: {Event.CLOSE: State.CLOSED},
    State.CLOSED: {
        Event.LOSE: State.CLOSED,
        Event.GIVE_UP: State.CLOSED,
        Event.CLOSE: State.CLOSED,
    },
}
