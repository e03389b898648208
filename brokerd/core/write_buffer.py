"""The two objects that the routing loop shares with the rest of the core."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brokerd.core.flight import Flight
    from brokerd.core.rate import Meter
    from brokerd.core.sink import Sink
    from brokerd.core.undelivered import Queued

__all__ = ["RouteEntry", "WriteBuffer"]


class WriteBuffer:
    """The end of an outbox, where the routing loop writes.

    Attributes:
        content: The bytes written last.
        room: Bytes that ``content`` may reach before ``reserve`` must be called.
        frames, size: Frames and bytes appended since the outbox began.
        touched: Whether the owner is in the list of sessions with new bytes to write.
        owner: The session.
        blocked: Whether the system took less than was offered; the network layer sets
            it.
        is_stream: Whether the routing loop may write here.
        is_remote: Whether its frames go to another host.
        base: Where in the outbox's stream ``content`` begins.
        marks: The start and the end in the stream of each waiting frame with a ttl, its
            deadline, and whether it is pinned; of each pinned frame, too, with an
            infinite deadline.
    """

    __slots__ = (
        "_blocked",
        "base",
        "content",
        "frames",
        "is_remote",
        "is_stream",
        "marks",
        "owner",
        "room",
        "size",
        "touched",
    )

    def __init__(self) -> None:
        self.content = bytearray()
        self.room = 0
        self.frames = 0
        self.size = 0
        self.touched = False
        self.owner: Any = None
        self._blocked = False
        self.is_stream = False
        self.is_remote = False
        self.base = 0
        # No deque until it is needed: an empty one takes as much memory as the rest.
        self.marks: deque[tuple[int, int, float, bool]] | tuple[()] = ()

    @property
    def blocked(self) -> bool:
        """Whether the system took less than was offered."""
        return self._blocked

    @blocked.setter
    def blocked(self, blocked: bool) -> None:
        if blocked != self._blocked:
            self._blocked = blocked
            if self.owner is not None:
                self.owner.client.note_blocked(self.owner)

    def reserve(self, size: int, beyond: int = 0) -> bool:
        """Return whether ``size`` more bytes may be appended to ``content`` now."""
        raise NotImplementedError

    def pieces(self) -> list[bytearray | memoryview]:
        """Return the next bytes to write, in order."""
        raise NotImplementedError

    def put(self, queued: Queued) -> None:
        """Append one whole frame with its delivery information."""
        raise NotImplementedError

    def append(self, frame: bytes) -> None:
        """Append one whole frame of the broker's own, even beyond the quota."""
        raise NotImplementedError

    def extend(self, frames: bytearray, size: int) -> None:
        """Append several frames of ``size`` bytes each, even beyond the quota."""
        raise NotImplementedError

    def sent(self, size: int) -> bool:
        """Remove ``size`` bytes that the system took; return whether all are taken."""
        raise NotImplementedError


class RouteEntry:
    """A client in the senders' route caches.

    The caches hold this object instead of an outbox, so that they never go stale.

    Attributes:
        direct: The outbox of the name's one connection; None if it has several.
        ring: The outboxes of the members that read, of a name with several connections.
        turn: How often a member of the ring was picked. The next pick is the member at
            this place, counted around the ring.
        flight: The client's requests in flight; None where these are not limited.
        meter: Its rates; None without any.
        request_limit: Its requests that may have no outcome.
        publish_rules: Its rules of publishing, as a text; the same object for all clients
            with the same rules.
        sink: Where its messages go instead of its connections; None without a mailbox.
        is_pool: Whether the client may have several connections.
        is_pinned: Whether the route is that of one connection's own address.
    """

    __slots__ = (
        "direct",
        "flight",
        "is_pinned",
        "is_pool",
        "meter",
        "publish_rules",
        "request_limit",
        "ring",
        "sink",
        "turn",
    )

    def __init__(self) -> None:
        self.direct: WriteBuffer | None = None
        self.ring: list[WriteBuffer] = []
        self.turn = 0
        self.flight: Flight | None = None
        self.meter: Meter | None = None
        self.request_limit = 0
        self.publish_rules = ""
        self.sink: Sink | None = None
        self.is_pool = self.is_pinned = False
