"""Length-prefixed frames, as ``multiprocessing.connection`` writes them.

A frame is a signed 32-bit big-endian length and that many bytes. A length of -1 is
followed by an unsigned 64-bit big-endian length. Source: CPython,
Lib/multiprocessing/connection.py, ``Connection._send_bytes`` and ``_recv_bytes``. Any
other negative length is refused here. The standard library takes it for an empty
message.

Frames are *pulled*, one at a time and under the current limit. The last message of a
handshake and the first large frame can share a segment. A decoder that ran ahead would
check the second against the limit of the first.
"""

from __future__ import annotations

import struct
from typing import Final

from brokerd_client.errors import BadLength, FrameTooBig

__all__ = [
    "LENGTH",
    "LONG_LENGTH",
    "MAX_SHORT",
    "FrameReader",
    "frame",
    "frame_prefix",
    "frame_span",
]

LENGTH: Final = struct.Struct("!i")
LONG_LENGTH: Final = struct.Struct("!iQ")
MAX_SHORT: Final = 0x7FFFFFFF

_HEADER_SIZE: Final = LENGTH.size
_LONG_HEADER_SIZE: Final = LONG_LENGTH.size
#: Bytes of a body up to which a second copy takes less time than a view.
_SHORT: Final = 512


def frame_prefix(size: int) -> bytes:
    """Return the length prefix of a body of ``size`` bytes.

    It has 4 bytes, and 12 for bodies above 2 GiB - 1.
    """
    return LENGTH.pack(size) if size <= MAX_SHORT else LONG_LENGTH.pack(-1, size)


def frame(*parts: bytes | bytearray | memoryview) -> bytes:
    """Return a complete frame whose body is the joined parts."""
    # len() of a memoryview counts its items, which need not be bytes.
    size = sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in parts)
    return b"".join((frame_prefix(size), *parts))


def frame_span(
    buffer: bytes | bytearray | memoryview, start: int, end: int
) -> tuple[int, int] | None:
    """Return (where the body starts, its size in bytes) of the frame at ``start``.

    The body is not read. Return None if ``buffer[start:end]`` ends inside the length.
    Raises BadLength: the length is negative and not -1.
    """
    if end - start < _HEADER_SIZE:
        return None
    (size,) = LENGTH.unpack_from(buffer, start)
    if size >= 0:
        return start + _HEADER_SIZE, size
    if size != -1:
        raise BadLength(f"a frame can't have the length {size}")
    if end - start < _LONG_HEADER_SIZE:
        return None
    return start + _LONG_HEADER_SIZE, LONG_LENGTH.unpack_from(buffer, start)[1]


class FrameReader:
    """A decoder that takes bytes and returns complete frames, one at a time.

    The bytes are kept in one bytearray. Its consumed part is removed only occasionally,
    not at every frame. Joining the rest to new bytes at every read would take time
    quadratic in the frame's size.
    """

    __slots__ = ("_buffer", "_start")

    #: Most consumed bytes kept at the front of the buffer before they are removed.
    COMPACT_ABOVE: Final = 64 * 1024

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._start = 0

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Add bytes in the order they arrived."""
        self._buffer += data

    @property
    def buffered(self) -> int:
        """Buffered bytes that were not returned in a frame yet."""
        return len(self._buffer) - self._start

    def next_frame(self, limit: int) -> bytes | None:
        """Return the next complete frame's body, or None if more bytes are needed.

        Args:
            limit: Largest accepted body, in bytes; 256 while authenticating, as
                CPython's ``recv_bytes(256)`` (Lib/multiprocessing/connection.py).

        Raises:
            FrameTooBig: The length is above the limit; this is raised before the body
                arrives.
            BadLength: The length is not valid.
        """
        buffer = self._buffer
        # A caller asks once more after each frame.
        span = self._span(limit) if buffer else None
        if span is None:
            return None
        body_start, size = span
        end = body_start + size
        if len(buffer) < end:
            return None
        if size <= _SHORT:
            body = bytes(buffer[body_start:end])
        else:
            with memoryview(buffer) as view:
                body = bytes(view[body_start:end])
        self._consume(end)
        return body

    def missing(self, limit: int) -> int:
        """Return the least number of bytes that ``next_frame`` still needs for a frame.

        The number is 0 if a complete frame is there. Raises the same errors as
        next_frame.
        """
        span = self._span(limit)
        if span is None:
            return max(1, _HEADER_SIZE - self.buffered)
        body_start, size = span
        return max(0, body_start + size - len(self._buffer))

    def peek(self, size: int) -> bytes:
        """Return the first ``size`` buffered bytes without consuming them."""
        return bytes(self._buffer[self._start : self._start + size])

    def take_rest(self) -> bytes:
        """Return and forget all buffered bytes, for the next decoder."""
        remainder = bytes(memoryview(self._buffer)[self._start :])
        self._buffer = bytearray()
        self._start = 0
        return remainder

    def _span(self, limit: int) -> tuple[int, int] | None:
        span = frame_span(self._buffer, self._start, len(self._buffer))
        if span is not None and span[1] > limit:
            raise FrameTooBig(span[1], limit)
        return span

    def _consume(self, position: int) -> None:
        if position == len(self._buffer):
            self._buffer.clear()
            self._start = 0
        elif position > self.COMPACT_ABOVE:
            del self._buffer[:position]
            self._start = 0
        else:
            self._start = position
