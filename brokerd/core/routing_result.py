"""What the routing loop does after it has handed a frame to the broker."""

from __future__ import annotations

from enum import Enum, auto

__all__ = ["RoutingResult"]


class RoutingResult(Enum):
    """What the routing loop does after handing over a frame."""

    CONSUMED = auto()
    """The frame is done with; go on behind it."""
    FLUSH = auto()
    """Not done: write the touched outboxes, then hand it over again."""
    BLOCKED = auto()
    """Not done: the sender is held; hand it over again when it is released."""
    YIELD = auto()
    """Not done: the broker has done much for this sender; hand it over again after the others have had their turn."""
    CLOSE = auto()
    """Done with, and the connection is to be closed: read nothing more."""
