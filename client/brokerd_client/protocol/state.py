"""The states of a client's connection to the broker, and the table of transitions.

No I/O.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

__all__ = ["NEXT", "Event", "State"]


class State(Enum):
    """The state of the connection."""

    IDLE = "nothing has been tried yet"
    CONNECTING = "the face is opening a connection"
    AUTHENTICATING = "the handshake is under way"
    INTRODUCING = "authenticated; the broker has been asked who we are"
    READY = "messages flow"
    DRAINING = "the broker closes the connection soon; only answers are sent"
    WAITING = "the connection is gone; the next try has its time"
    CLOSING = "close() was called; what the broker still says about earlier sends is taken in"
    GONE = "the connection is gone and no other will be made"
    CLOSED = "close() was called, and the connection is gone"


class Event(Enum):
    """An event that changes the state of the connection."""

    DIAL = "the face begins to connect"
    OPEN = "there is a connection"
    AUTHENTICATE = "both sides have proved that they know the key"
    INTRODUCE = "the broker has said who we are"
    DRAIN = "the broker has said that it closes the connection soon"
    LOSE = "the connection is gone, or could not be made; another try follows"
    GIVE_UP = "the connection is gone, or could not be made; no other try follows"
    CLOSE = "the caller closes"


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
