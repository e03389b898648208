"""Counts messages that a client has sent and that are not routed any more, for the log."""

from __future__ import annotations

from typing import Final

from brokerd_client.wire.framing import LENGTH
from brokerd_client.wire.layout import HEADER, NAME_SIZE_OFFSET, Kind

__all__ = ["UnreadCounter"]

_KINDS: Final = frozenset({Kind.MESSAGE, Kind.REQUEST, Kind.REPLY, Kind.EVENT})
_LONG: Final = -1
_LONG_SIZE: Final = 12
#: Bytes of a frame that are examined at most: length, header and the first byte of a
#: name.
_HEAD: Final = _LONG_SIZE + HEADER.size + 1


class UnreadCounter:
    """Counts complete messages in a stream of frames; operations of the broker do not
    count.

    bytes_to_skip: bytes that are left of a frame that has been handled already.
    """

    def __init__(self, bytes_to_skip: int = 0) -> None:
        self.count = 0
        self._skip = bytes_to_skip
        #: 1 if the frame that is being skipped counts when it is complete, else 0.
        self._counts = 0
        self._kept = b""

    def feed(self, view: bytes | memoryview) -> None:
        """Count the messages that end in these bytes."""
        position, end = 0, len(view)
        if self._kept:
            view = memoryview(self._kept + bytes(view))
            end = len(view)
            self._kept = b""
        while position < end:
            if self._skip:
                passed = min(self._skip, end - position)
                position += passed
                self._skip -= passed
                if self._skip:
                    return
                self.count += self._counts
                self._counts = 0
                continue
            if end - position < _HEAD and not self._is_whole(view, position, end):
                self._kept = bytes(view[position:end])
                return
            (size,) = LENGTH.unpack_from(view, position)
            first = position + LENGTH.size
            if size == _LONG:
                size = int.from_bytes(view[first : first + 8], "big")
                first += 8
            if size < HEADER.size:
                # Not a valid frame: the frames behind it can't be told apart.
                self._skip = 1 << 62
                return
            own = view[first + NAME_SIZE_OFFSET] and view[first + HEADER.size] == ord("$")
            self._counts = int(view[first] in _KINDS and not own)
            self._skip = size
            position = first

    def _is_whole(self, view: bytes | memoryview, position: int, end: int) -> bool:
        """Return whether these few bytes hold all that has to be examined."""
        if end - position < LENGTH.size:
            return False
        (size,) = LENGTH.unpack_from(view, position)
        if size == _LONG:
            return False
        return bool(
            size < HEADER.size
            or end - position >= min(LENGTH.size + size, LENGTH.size + HEADER.size + 1)
        )
