"""Whether the broker has room for one more connection of a client."""

from __future__ import annotations

from enum import Enum

from brokerd_client.wire.envelope import ErrorCode

__all__ = ["Room"]


class Room(Enum):
    """The answer to one connection that asks for room. The value is the reason, or ""."""

    FREE = ""
    UNDECIDED = "the connection in its place has ended, and its earlier input is routed first"
    TAKEN = "name is connected already"
    DRAINING = "the broker is draining"
    FULL = "limits.connections reached"

    @property
    def code(self) -> ErrorCode | None:
        """The error code that a client gets after it has proved its key, or None."""
        return _CODES.get(self)


_CODES = {Room.TAKEN: ErrorCode.NAME_TAKEN, Room.DRAINING: ErrorCode.SHUTTING_DOWN}
