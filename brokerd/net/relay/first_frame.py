"""The first frame of a connection, before all of it has arrived.

Its kind decides whether the connection is a channel: OPEN or JOIN.
"""

from __future__ import annotations

from typing import Final

from brokerd_client.errors import BadLength
from brokerd_client.wire.first_frames import MAX_PAYLOAD
from brokerd_client.wire.framing import LONG_LENGTH, FrameReader, frame_span
from brokerd_client.wire.layout import HEADER, MAX_NAME_SIZE, Kind

__all__ = ["LONGEST", "begins_channel", "id_of", "is_whole", "kind_of"]

#: Longest first frame of a channel, in bytes, without its length.
LONGEST: Final = HEADER.size + MAX_NAME_SIZE + MAX_PAYLOAD
_KINDS: Final = (Kind.OPEN, Kind.JOIN)
#: Stands for the kind of a frame that can't have one.
_NONE: Final = 0


def kind_of(reader: FrameReader) -> int | None:
    """Return the kind of the first frame, 0 if it can't have one, None if it has not
    arrived.
    """
    if not reader.buffered:
        return None
    head = reader.peek(LONG_LENGTH.size + 1)
    try:
        span = frame_span(head, 0, len(head))
    except BadLength:
        return _NONE
    if span is None:
        return None
    start, size = span
    if not size:
        return _NONE
    return head[start] if len(head) > start else None


def begins_channel(reader: FrameReader) -> bool:
    """Return whether the first frame is known to be OPEN or JOIN."""
    return kind_of(reader) in _KINDS


def is_whole(reader: FrameReader) -> bool:
    """Return whether an OPEN or JOIN has arrived, or as much as shows that it is too long."""
    head = reader.peek(LONG_LENGTH.size)
    span = frame_span(head, 0, len(head))
    assert span is not None, "its kind has arrived"
    start, size = span
    return reader.buffered >= start + (size if size <= LONGEST else HEADER.size)


def id_of(reader: FrameReader) -> int:
    """Return the id in a first frame that has arrived, 0 if it is too short to hold one."""
    head = reader.peek(LONG_LENGTH.size + HEADER.size)
    span = frame_span(head, 0, len(head))
    assert span is not None, "its kind has arrived"
    start, size = span
    if size < HEADER.size:
        return 0
    message_id: int = HEADER.unpack_from(head, start)[-1]
    return message_id
