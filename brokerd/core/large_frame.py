"""A large frame in a buffer of its own, passed on with a new head and without a copy.

The socket's bytes are received straight into the buffer. In front of them is room for
the head that the broker writes. So one buffer serves from the sender's socket to the
sockets of all recipients. Only the head is ever changed, and only once.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Final

__all__ = ["SLACK", "LargeFrame", "MappedFrame", "joined"]

#: Bytes of room in front of a frame: more than a length, a header and a sender's
#: address.
SLACK: Final = 128
#: Fewest and most bytes by which the buffer of a large frame grows, up to the end of
#: the frame. The most is a millisecond's work: the system clears each page.
_STEP: Final = 16 * 1024
_LONGEST_STEP: Final = 4 * 1024 * 1024
#: Zeros appended to grow the buffer. They are always the same ones, so the processor
#: reads them from its cache instead of fetching as many bytes as it writes.
_ZEROS: Final = memoryview(bytes(256 * 1024))
#: Bytes received, and bytes missing, from which on a frame is moved into mapped memory.
#: It is a huge page's size: a peer costs at most twice the memory that it has filled.
_MAPPED: Final = 2 * 1024 * 1024
#: The request for huge pages; 0 where the system has none.
_HUGE_PAGES: Final[int] = getattr(mmap, "MADV_HUGEPAGE", 0)


class LargeFrame(bytearray):
    """One frame while it is received and then sent: the bytes from SLACK to ``end``.

    Attributes:
        end: Where the frame ends.
        filled: Where the received bytes end.
    """

    __slots__ = ("end", "filled")

    def __init__(self, received: bytes | memoryview, size: int) -> None:
        """Begin with the bytes received. size: the frame's bytes, length included."""
        super().__init__(SLACK)
        self += received
        self.filled = len(self)
        self.end = SLACK + size

    @property
    def is_whole(self) -> bool:
        """Whether all of the frame has been received."""
        return self.filled == self.end

    def space(self, limit: int) -> memoryview:
        """Return a view of where the next bytes go, at most ``limit`` of them.

        The view must be released before the next call. The buffer grows with the bytes
        received, not with the length announced. A peer that sends little therefore
        costs little memory. A short buffer doubles each time. So no byte is moved more
        than once on average, should the memory behind the buffer be in use.
        """
        if self.filled == len(self):
            step = min(max(len(self), _STEP), _LONGEST_STEP)
            missing = min(step, self.end - self.filled)
            while missing > 0:
                self += _ZEROS[:missing]
                missing -= len(_ZEROS)
        return memoryview(self)[self.filled : self.filled + limit]

    def moved(self) -> LargeFrame | MappedFrame:
        """Return the frame in mapped memory, if it is long enough for that; else itself."""
        if not _HUGE_PAGES or self.filled < _MAPPED or self.end - self.filled < _MAPPED:
            return self
        try:
            return MappedFrame.of(self)
        except OSError:
            # The system allows no more mappings.
            return self


class MappedFrame(mmap.mmap):
    """A long frame in mapped memory, in huge pages if the system grants them.

    A process gets its memory page by page, as bytes are received. The system clears each
    page, and a fault for each 4 KiB takes three times as long as the bytes.

    Attributes:
        end, filled: As those of a LargeFrame.
    """

    __slots__ = ("end", "filled")

    end: int
    filled: int

    @classmethod
    def of(cls, received: LargeFrame) -> MappedFrame:
        """Return a copy of a frame, with room for the rest. Raises OSError."""
        mapped = cls(-1, received.end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapped.end, mapped.filled = received.end, received.filled
        with contextlib.suppress(OSError):
            mapped.madvise(_HUGE_PAGES)
        mapped[: received.filled] = memoryview(received)[: received.filled]
        return mapped

    @property
    def is_whole(self) -> bool:
        """Whether all of the frame has been received."""
        return self.filled == self.end

    def space(self, limit: int) -> memoryview:
        """Return a view of where the next bytes go, at most ``limit`` of them."""
        return memoryview(self)[self.filled : self.filled + limit]

    def moved(self) -> MappedFrame:
        """Return the frame itself."""
        return self


def joined(head: bytes, remainder: memoryview) -> bytes | memoryview:
    """Return a whole frame: a new head before the untouched rest of a frame.

    The rest of a LargeFrame is not copied: the head is written in front of it.
    """
    large_frame = remainder.obj
    if not isinstance(large_frame, (LargeFrame, MappedFrame)):
        return b"".join((head, remainder))
    start = len(large_frame) - len(remainder) - len(head)
    view = memoryview(large_frame)[start:]
    view[: len(head)] = head
    return view
