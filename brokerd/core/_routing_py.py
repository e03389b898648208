"""The routing loop: from a read buffer straight into the outboxes of the recipients.

It handles only ordinary frames, and only if every recipient's queue has room:

- a MESSAGE without flags to a recipient that this sender has reached before;
- an EVENT without flags on a topic that this sender has published on before.

Every other frame goes to :func:`brokerd.core.slow_path.handle_slow_path`. This module
is the reference for its compiled twin, ``_routing_c.pyx``. Both have the same shape:
one pass, offsets instead of slices, one copy of the payload.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from brokerd.core.routing_result import RoutingResult
from brokerd.core.slow_path import handle_slow_path
from brokerd_client.wire.layout import EVENT_KIND, FRAME_HEAD, MESSAGE_KIND

if TYPE_CHECKING:
    from brokerd.core.broker import Broker
    from brokerd.core.session import Session

__all__ = ["NAME", "RouteEntry", "WriteBuffer", "feed"]

NAME: Final[str] = "python"

_HEAD_SIZE: Final = FRAME_HEAD.size


class WriteBuffer:
    """The end of an outbox, where the routing loop writes.

    content: the bytes written last.
    room: bytes that ``content`` may reach before ``reserve`` must be called.
    frames, size: frames and bytes appended since the outbox began.
    touched: whether the owner is in the list of sessions with new bytes to write.
    owner: the session.
    """

    __slots__ = ("content", "frames", "owner", "room", "size", "touched")

    def __init__(self) -> None:
        self.content = bytearray()
        self.room = 0
        self.frames = 0
        self.size = 0
        self.touched = False
        self.owner: Any = None

    def reserve(self, size: int, beyond: int = 0) -> bool:
        """Return whether ``size`` more bytes may be appended to ``content`` now."""
        raise NotImplementedError


class RouteEntry:
    """A recipient in the senders' route caches.

    The caches hold this object instead of an outbox, so that they never go stale.

    direct: the outbox of the name's one connection, if messages may be written straight
        into it. None: the loop hands the message to the broker.
    """

    __slots__ = ("direct",)

    def __init__(self) -> None:
        self.direct: WriteBuffer | None = None


def feed(
    broker: Broker, source: Session, buffer: memoryview, start: int, end: int, now: float
) -> tuple[int, RoutingResult]:
    """Route the whole frames in ``buffer[start:end]``.

    Return (the position of the first byte not consumed, why the loop stopped there).
    CONSUMED: the next frame has not arrived whole. FLUSH, BLOCKED and YIELD: the frame
    there must be fed again. CLOSE: nothing more may be read.
    now: seconds of a monotonic clock.
    """
    position = start
    if source.bytes_to_skip:
        position += min(source.bytes_to_skip, end - start)
        source.bytes_to_skip -= position - start
    routes, fanouts = source.caches(broker.status.generation, broker.topics.version)
    limit = broker.status.limits.max_message
    sender_header = source.sender_header
    sender_header_size = len(sender_header)
    touched = broker.touched
    unpack, pack = FRAME_HEAD.unpack_from, FRAME_HEAD.pack
    messages = size_in = 0
    result = RoutingResult.CONSUMED
    while end - position >= _HEAD_SIZE:
        size, kind, flags, codec, name_size, message_id = unpack(buffer, position)
        first = position + _HEAD_SIZE
        body = first + name_size
        stop = position + 4 + size
        targets: tuple[WriteBuffer, ...] = ()
        if kind == MESSAGE_KIND and not flags and body <= stop <= end and stop - body <= limit:
            entry = routes.get(bytes(buffer[first:body]))
            if entry is not None and (direct := entry.direct) is not None:
                targets = (direct,)
        elif (
            kind == EVENT_KIND
            and not flags
            and not name_size
            and first < stop <= end
            and stop - first <= limit
        ):
            topic = first + 1 + buffer[first]
            body = first
            if topic <= stop:
                targets = fanouts.get(bytes(buffer[first + 1 : topic]), ())
        size_out = _HEAD_SIZE + sender_header_size + stop - body
        if targets and all(
            len(target.content) + size_out <= target.room or target.reserve(size_out)
            for target in targets
        ):
            head = (
                pack(size_out - 4, kind, 0, codec, sender_header_size, message_id) + sender_header
            )
            for target in targets:
                target.content += head
                target.content += buffer[body:stop]
                target.frames += 1
                target.size += size_out
                if not target.touched:
                    target.touched = True
                    touched.append(target.owner)
            messages += 1
            size_in += size
            position = stop
            continue
        before = position
        position, result = handle_slow_path(broker, source, buffer, position, end, now)
        if result is not RoutingResult.CONSUMED or position == before:
            break
        # The broker may have changed the routes.
        routes, fanouts = source.caches(broker.status.generation, broker.topics.version)
    else:
        # Fewer bytes than the shortest frame has: an impossible length is refused
        # without waiting for more bytes.
        if position < end:
            position, result = handle_slow_path(broker, source, buffer, position, end, now)
    source.messages_in += messages
    source.bytes_in += size_in
    return position, result
