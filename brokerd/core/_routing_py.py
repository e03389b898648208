"""The routing loop: from a read buffer straight into the outboxes of the recipients.

It handles only ordinary frames, and only if every recipient's queue has room:

- a MESSAGE without flags to a recipient that this sender has reached before, and that
  has no mailbox; of a pool, to the member that is next (:class:`_Runs`);
- an EVENT without flags on a topic that it may publish on, without groups;
- an ACK without flags and payload, behind another in the same batch.

Every other frame goes to :func:`brokerd.core.slow_path.handle_slow_path`. This module
is the reference for its compiled twin, ``_routing_c.pyx``. Both have the same shape:
one pass, offsets instead of slices, one copy of the payload.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from brokerd.core.routing_result import RoutingResult
from brokerd.core.slow_path import handle_slow_path
from brokerd_client.wire.layout import (
    ACK_FLAG,
    ACK_KIND,
    EVENT_KIND,
    FRAME_HEAD,
    HEADER,
    MESSAGE_KIND,
)

if TYPE_CHECKING:
    from brokerd.core.broker import Broker
    from brokerd.core.session import Session
    from brokerd.core.write_buffer import RouteEntry, WriteBuffer

__all__ = ["NAME", "feed", "sort_frames"]

NAME: Final[str] = "python"

_HEAD_SIZE: Final = FRAME_HEAD.size
#: Bytes that a read must have left for runs to begin, and most messages in a run.
PLENTY: Final = 64 * 1024
LONGEST_RUN: Final = 16


class _Runs:
    """Which member of a pool gets the next plain message of one read.

    The members that read take turns. Where the read has many messages for each of them, a
    member gets a run, some messages in a row. So its outbox comes into the processor's
    cache once for all of them. All runs in a round of the members have the same length.
    After a run that could not be finished, no other begins. So the members have as many
    messages in the end as without runs, or at most LONGEST_RUN more.
    """

    def __init__(self) -> None:
        self._entry: RouteEntry | None = None
        self._target: WriteBuffer | None = None
        #: The messages of each run in this round, those missing in this run, and the
        #: members that have had none yet.
        self._run = 1
        self._missing = self._members = 0
        #: Where the last message ends.
        self._end = -1
        self._over = False

    def target(self, entry: RouteEntry, position: int, size_out: int) -> WriteBuffer | None:
        """Return the outbox for the message at ``position``; None if it is not a stream."""
        target = self._target
        if (
            target is not None
            and self._missing
            and entry is self._entry
            and position == self._end
            and len(target.content) + size_out <= target.room
        ):
            return target
        self._target = None
        target = entry.ring[entry.turn % len(entry.ring)]
        return target if target.is_stream and not target.is_remote else None

    def passed_on(
        self, entry: RouteEntry, target: WriteBuffer, position: int, stop: int, end: int
    ) -> None:
        """Note that the outbox got the message from ``position`` to ``stop``.

        end: where the bytes of the read end.
        """
        if target is self._target:
            self._missing -= 1
            self._end = stop
            return
        entry.turn += 1
        if entry is not self._entry or position != self._end or not self._members:
            self._members = len(entry.ring)
            self._run = 1
            if end - position >= PLENTY:
                share = (end - position) // (self._members * (stop - position))
                self._run = max(1, min(share, LONGEST_RUN))
        self._over = self._over or self._missing > 0
        if self._over:
            self._run = 1
        self._entry, self._target, self._end = entry, target, stop
        self._missing = self._run - 1
        self._members -= 1


def sort_frames(
    frames: bytes | bytearray | memoryview,
    start: int,
    recipient: bytes,
    buffers: dict[bytes, bytearray],
) -> int:
    """Sort the frames that another host has sent for a recipient by their senders.

    Each is appended to the buffer of its sender, as its client has sent it: with the
    recipient's name in place of the sender's. Return the position of the first frame with
    the flag ACK, which is left to the caller, or the end.

    Raises:
        ValueError: The bytes are not whole frames.
    """
    position, end = start, len(frames)
    while position < end:
        if end - position < _HEAD_SIZE:
            raise ValueError("a frame is not whole")
        size, kind, flags, codec, name_size, message_id = FRAME_HEAD.unpack_from(frames, position)
        body = position + _HEAD_SIZE + name_size
        stop = position + 4 + size
        if not body <= stop <= end:
            raise ValueError("a frame is not whole")
        if flags & ACK_FLAG:
            break
        sender = bytes(frames[position + _HEAD_SIZE : body])
        buffer = buffers.get(sender)
        if buffer is None:
            buffer = buffers[sender] = bytearray()
        size_out = size - name_size + len(recipient)
        buffer += FRAME_HEAD.pack(size_out, kind, flags, codec, len(recipient), message_id)
        buffer += recipient
        buffer += frames[body:stop]
        position = stop
    return position


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
    routes = source.known_routes(broker.status.generation)
    limit = broker.status.limits.max_message
    sender_header = source.sender_header
    sender_header_size = len(sender_header)
    touched, meter = broker.touched, source.client.meter
    unpack, pack = FRAME_HEAD.unpack_from, FRAME_HEAD.pack
    messages = size_in = 0
    runs = _Runs()
    result = RoutingResult.CONSUMED
    while end - position >= _HEAD_SIZE:
        size, kind, flags, codec, name_size, message_id = unpack(buffer, position)
        first = position + _HEAD_SIZE
        body = first + name_size
        stop = position + 4 + size
        targets: tuple[WriteBuffer, ...] | None = None
        pool: RouteEntry | None = None
        if kind == MESSAGE_KIND and not flags and body <= stop <= end and stop - body <= limit:
            entry = routes.get(bytes(buffer[first:body]))
            target = None
            if entry is not None and not entry.is_pinned and entry.sink is None:
                target = entry.direct
                if target is None and entry.ring:
                    pool = entry
                    size_out = _HEAD_SIZE + sender_header_size + stop - body
                    target = runs.target(entry, position, size_out)
            if target is not None and target.is_stream and not target.is_remote:
                targets = (target,)
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
                targets = broker.events.fanout(source, bytes(buffer[first + 1 : topic]))
        elif (
            kind == ACK_KIND
            and not flags
            and size == HEADER.size
            and source.consumer is not None
            and not source.needs_slow_path
            and source.consumer.acknowledge(message_id)
        ):
            if len(source.consumer.acknowledged) == 1:
                # What was collected is carried out after this turn, as after a slow-path frame.
                broker.turn.charge(1)
            messages += 1
            size_in += size
            position = stop
            continue
        size_out = _HEAD_SIZE + sender_header_size + stop - body
        if (
            targets is not None
            and all(
                len(target.content) + size_out <= target.room or target.reserve(size_out)
                for target in targets
            )
            and (meter is None or meter.allows(size, now))
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
            if pool is not None and meter is None:
                runs.passed_on(pool, targets[0], position, stop, end)
            elif pool is not None:
                pool.turn += 1
            messages += 1
            size_in += size
            position = stop
            continue
        before = position
        position, result = handle_slow_path(broker, source, buffer, position, end, now)
        if result is not RoutingResult.CONSUMED or position == before:
            break
        # The broker may have changed the routes.
        routes = source.known_routes(broker.status.generation)
    else:
        # Fewer bytes than the shortest frame has: an impossible length is refused
        # without waiting for more bytes.
        if position < end:
            position, result = handle_slow_path(broker, source, buffer, position, end, now)
    source.messages_in += messages
    source.bytes_in += size_in
    return position, result
