"""Results of the broker's handling of a frame, for the routing loop."""

from __future__ import annotations

from enum import Enum, auto

__all__ = ["RoutingResult"]


class RoutingResult(Enum):
    """The routing loop's next step after the broker has handled a frame."""

    CONSUMED = auto()
    """The frame is done with; go on behind it."""
    FLUSH = auto()
    """Not done: write the touched outboxes, then hand it over again."""
    BLOCKED = auto()
    """Not done: the sender is held; hand it over again when it is released."""
    YIELD = auto()
    """Not done: the broker has done much for this sender; hand it over again after
    other senders have had their turn.
    """
    CHANNEL = auto()
    """Not done: the frame is the first of its connection, which becomes a channel."""
    CLOSE = auto()
    """Done with, and the connection is to be closed: read nothing more."""
