"""The routing loop: whole frames from a read buffer straight into the outboxes of their recipients.

What it does by itself is the ordinary message: kind MESSAGE, no flag, a recipient this sender has
reached before, room in its queue. Everything else goes to ``Broker.handle``, a frame at a time. It is
the reference for its compiled twin and is written in the same shape: one pass, offsets instead of
slices, one copy of the payload.
"""

from __future__ import annotations

import struct
from typing import Final

from brokerd.core.broker import Broker, Verdict
from brokerd.core.outbox import StreamOutbox
from brokerd.core.session import Session
from brokerd_client.errors import BadLength
from brokerd_client.wire.envelope import HEADER, Kind, is_address
from brokerd_client.wire.framing import frame_span

__all__ = ["NAME", "feed"]

NAME: Final = "python"

#: A short frame's length and its header in one.
_HEAD: Final = struct.Struct("!iBBBBQ")
_HEAD_SIZE: Final = _HEAD.size
_HEADER_SIZE: Final = HEADER.size
_MESSAGE: Final = int(Kind.MESSAGE)
#: An EVENT's topic and its length come out of no payload allowance.
_TOPIC_ALLOWANCE: Final = 256


def feed(broker: Broker, source: Session, buffer: memoryview, start: int, end: int, now: float) -> tuple[int, Verdict]:
    """Route the whole frames in ``buffer[start:end]``.

    Returns (where the first byte not consumed is, why it stopped there): NEXT for a frame that has not
    arrived whole, FLUSH and HOLD for one to be fed again, CLOSE when nothing more may be read.
    now: seconds of a monotonic clock.
    """
    position = start
    if source.skip:
        position += min(source.skip, end - start)
        source.skip -= position - start
    if source.generation != broker.generation:
        source.routes.clear()
        source.generation = broker.generation
    routes = source.routes
    limit = broker.limits.max_message
    stamp = source.stamp
    stamp_size = len(stamp)
    touch = broker.touch
    unpack, pack = _HEAD.unpack_from, _HEAD.pack
    messages = size_in = 0
    verdict = Verdict.NEXT
    while end - position >= _HEAD_SIZE:
        size, kind, flags, codec, name_size, id = unpack(buffer, position)
        body = position + _HEAD_SIZE + name_size
        stop = position + 4 + size
        if kind == _MESSAGE and not flags and body <= stop <= end and stop - body <= limit:
            client = routes.get(bytes(buffer[position + _HEAD_SIZE : body]))
            if client is not None and (target := client.direct) is not None:
                outbox = target.outbox
                assert isinstance(outbox, StreamOutbox)
                tail = outbox.tail
                size_out = _HEAD_SIZE + stamp_size + stop - body
                if len(tail) + size_out > outbox.room and outbox.reserve(size_out):
                    tail = outbox.tail
                if len(tail) + size_out <= outbox.room:
                    tail += pack(size_out - 4, kind, 0, codec, stamp_size, id)
                    tail += stamp
                    tail += buffer[body:stop]
                    target.messages_out += 1
                    target.bytes_out += size_out
                    if not target.touched:
                        touch(target)
                    messages += 1
                    size_in += size
                    position = stop
                    continue
        before = position
        position, verdict = _unusual(broker, source, buffer, position, end, now)
        if verdict is not Verdict.NEXT or position == before:
            break
    else:
        # Fewer bytes than the shortest frame: a length that can't be is refused without waiting for more.
        if position < end:
            position, verdict = _unusual(broker, source, buffer, position, end, now)
    source.messages_in += messages
    source.bytes_in += size_in
    return position, verdict


def _unusual(
    broker: Broker, source: Session, buffer: memoryview, position: int, end: int, now: float
) -> tuple[int, Verdict]:
    """Deal with the one frame at ``position``; return where to go on and how, as feed does."""
    try:
        span = frame_span(buffer, position, end)
    except BadLength as error:
        return end, broker.malformed(source, 0, str(error))
    if span is None:
        return position, Verdict.NEXT
    first, size = span
    stop = first + size
    if size < _HEADER_SIZE:
        return end, broker.malformed(
            source, 0, f"a broker frame has at least {_HEADER_SIZE} bytes; this one has {size}"
        )
    if end - first < _HEADER_SIZE:
        return position, Verdict.NEXT
    kind, _, _, name_size, id = HEADER.unpack_from(buffer, first)
    payload = size - _HEADER_SIZE - name_size
    if payload - (_TOPIC_ALLOWANCE if kind == Kind.EVENT else 0) > broker.limits.max_message:
        named = first + _HEADER_SIZE + name_size
        if end < named:
            return position, Verdict.NEXT
        name = str(buffer[first + _HEADER_SIZE : named], "ascii", "replace")
        broker.too_large(source, id, name if is_address(name) else "", payload)
        position = min(stop, end)
        source.skip = stop - position
        return position, Verdict.NEXT
    if stop > end:
        return position, Verdict.NEXT
    verdict = broker.handle(source, buffer[first:stop], now)
    done = verdict is Verdict.NEXT or verdict is Verdict.CLOSE
    return (stop if done else position), verdict
