"""Whether the broker has room for one more connection of a client."""

from __future__ import annotations

from enum import Enum

from brokerd_client.wire.envelope import ErrorCode

__all__ = ["Room"]


class Room(Enum):
    """The answer to one connection that asks for room. The value says why, "" if it is free."""

    FREE = ""
    REPLACES = "the oldest connection of the client gives up its place"
    ENDING = "the connection in its place has ended, and its earlier input is routed first"
    ASKING = "another host checks whether its connection of this name is still there"
    ELSEWHERE = (
        "this name is connected at another host of the cluster (give each program a name of its"
        " own)"
    )
    TAKEN = (
        "this name is connected already, as often as its 'connections' allows (give each program"
        " a name of its own, or raise 'connections')"
    )
    DRAINING = "the broker is draining"
    FULL = "limits.connections reached"
    UNFINISHED = "no OPEN or JOIN within limits.handshake_timeout"
    OTHER_FRAME = "a connection that announced a channel begins with OPEN or JOIN"
    FORBIDDEN = "the configuration does not admit the client any more"

    @property
    def code(self) -> ErrorCode | None:
        """The error code that a client gets after it has proved its key, or None."""
        return _CODES.get(self)


_CODES = {
    Room.TAKEN: ErrorCode.NAME_TAKEN,
    Room.ELSEWHERE: ErrorCode.NAME_TAKEN,
    Room.DRAINING: ErrorCode.SHUTTING_DOWN,
    Room.UNFINISHED: ErrorCode.EXPIRED,
    Room.OTHER_FRAME: ErrorCode.UNSUPPORTED,
    Room.FORBIDDEN: ErrorCode.KEY_REMOVED,
}
