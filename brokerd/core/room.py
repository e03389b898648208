"""Room for one more frame in a recipient's outbox."""

from __future__ import annotations

from enum import Enum, auto

from brokerd.core.routing_result import RoutingResult

__all__ = ["Room"]


class Room(Enum):
    """Whether a recipient's outbox has room for one more frame."""

    OK = auto()
    """There is room: the frame may be queued."""
    NONE = auto()
    """There is no room: the frame cannot be queued."""
    UNWRITTEN = auto()
    """There may be room once the bytes that wait have been offered to the system."""
    HELD = auto()
    """There may be room later, and the sender is held until then."""
    LATER = auto()
    """There will be room after further turns, in which older frames are dropped."""

    @property
    def result(self) -> RoutingResult:
        """The routing loop's next step while the frame waits for room."""
        return _RESULTS[self]


_RESULTS = {
    Room.UNWRITTEN: RoutingResult.FLUSH,
    Room.HELD: RoutingResult.BLOCKED,
    Room.LATER: RoutingResult.YIELD,
}
