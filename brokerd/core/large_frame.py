"""A large frame in a buffer of its own, passed on with a new head and without a copy.

The socket's bytes are received straight into the buffer. In front of them is room for
the head that the broker writes. So one buffer serves from the sender's socket to the
sockets of all recipients. Only the head is ever changed, and only once.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from typing import Final

__all__ = ["SLACK", "LargeFrame", "MappedFrame", "SpareFrames", "joined"]

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
#: Most frames whose memory is kept for others, and most bytes of them together.
_KEPT: Final = 2
_KEPT_BYTES: Final = 144 * 1024 * 1024
#: Kept memory may exceed the length of its next frame by this part of that length.
_WASTE: Final = 8
#: References to a kept frame that nothing uses: the list's, and sys.getrefcount's own.
_UNUSED: Final = 2
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

    def moved(self, spare: SpareFrames) -> LargeFrame | MappedFrame:
        """Return the frame in mapped memory, if it is long enough for that; else itself."""
        if not _HUGE_PAGES or self.filled < _MAPPED or self.end - self.filled < _MAPPED:
            return self
        try:
            return spare.mapped(self)
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
        with contextlib.suppress(OSError):
            mapped.madvise(_HUGE_PAGES)
        mapped.begin(received)
        return mapped

    def begin(self, received: LargeFrame) -> None:
        """Become a copy of a frame that is no longer than this memory."""
        self.end, self.filled = received.end, received.filled
        self[: received.filled] = memoryview(received)[: received.filled]

    @property
    def is_whole(self) -> bool:
        """Whether all of the frame has been received."""
        return self.filled == self.end

    def space(self, limit: int) -> memoryview:
        """Return a view of where the next bytes go, at most ``limit`` of them."""
        return memoryview(self)[self.filled : min(self.filled + limit, self.end)]

    def moved(self, spare: SpareFrames) -> MappedFrame:
        """Return the frame itself."""
        return self


class SpareFrames:
    """The memory of the last mapped frames, for further frames of about their length.

    The system clears each page of new memory. That takes a fifth of the time that a long
    frame costs. A frame's memory is used again once nothing refers to it: no connection,
    and no outbox that holds a view of it.
    """

    __slots__ = ("_is_used", "_kept")

    def __init__(self) -> None:
        self._kept: list[MappedFrame] = []
        #: Whether a frame was mapped since ``drop_unused`` was last called.
        self._is_used = False

    def __bool__(self) -> bool:
        """Return whether the memory of any frame is kept, spare or not."""
        return bool(self._kept)

    def mapped(self, received: LargeFrame) -> MappedFrame:
        """Return a copy of a frame in mapped memory, with room for the rest.

        Raises OSError.
        """
        self._is_used = True
        kept, size = self._kept, received.end
        for index in range(len(kept)):
            if (
                sys.getrefcount(kept[index]) <= _UNUSED
                and size <= len(kept[index]) <= size + size // _WASTE
            ):
                kept[index].begin(received)
                return kept[index]
        # Spare memory of another length gives way.
        self._kept = kept = [
            kept[index] for index in range(len(kept)) if sys.getrefcount(kept[index]) > _UNUSED
        ]
        frame = MappedFrame.of(received)
        if len(kept) < _KEPT and size + sum(map(len, kept)) <= _KEPT_BYTES:
            kept.append(frame)
        return frame

    def drop_unused(self) -> None:
        """Keep no memory if no frame was mapped since the last call."""
        if not self._is_used:
            self._kept = []
        self._is_used = False


def joined(head: bytes, remainder: memoryview) -> bytes | memoryview:
    """Return a whole frame: a new head before the untouched rest of a frame.

    The rest of a LargeFrame is not copied: the head is written in front of it.
    """
    large_frame = remainder.obj
    if not isinstance(large_frame, (LargeFrame, MappedFrame)):
        return b"".join((head, remainder))
    start = large_frame.end - len(remainder) - len(head)
    view = memoryview(large_frame)[start : large_frame.end]
    view[: len(head)] = head
    return view
