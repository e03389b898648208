"""A long frame in a buffer of its own, which is passed on with another head and never copied.

Its bytes are received into their place. In front of them is room for the head that the broker writes, so that what
was received becomes what is sent: one buffer, from the sender's socket to the sockets of all who get it. Nothing but
the head is ever changed, and that once.
"""

from __future__ import annotations

from typing import Final

__all__ = ["SLACK", "LargeFrame", "joined"]

#: Room in front of the frame: more than a length, a header and a sender's address together.
SLACK: Final = 128
#: It grows by so much at least.
_STEP: Final = 16 * 1024
#: Added until it has that size: always the same ones, so that the processor need not fetch as many as it writes.
_ZEROS: Final = memoryview(bytes(256 * 1024))


class LargeFrame(bytearray):
    """One frame being collected, and then on its way: the bytes from SLACK to ``end``.

    end: where the frame ends. filled: where the bytes that have arrived end.
    """

    __slots__ = ("end", "filled")

    def __init__(self, begun: bytes | memoryview, size: int) -> None:
        """Begin with the bytes that are there; size: of the whole frame, its length included."""
        super().__init__(SLACK)
        self += begun
        self.filled = len(self)
        self.end = SLACK + size

    @property
    def is_whole(self) -> bool:
        """Whether all of the frame has arrived."""
        return self.filled == self.end

    def space(self, most: int) -> memoryview:
        """Return where the next bytes go, ``most`` at most; to be released before more is asked for.

        It grows with what has arrived and not with what was announced: a peer that sends little costs little. Doubled
        each time, no byte is moved more than once on average, should the memory behind it be taken.
        """
        if self.filled == len(self):
            missing = min(max(len(self), _STEP), self.end - self.filled)
            while missing > 0:
                self += _ZEROS[:missing]
                missing -= len(_ZEROS)
        return memoryview(self)[self.filled : self.filled + most]


def joined(head: bytes, rest: memoryview) -> bytes | memoryview:
    """Return a whole frame: another head before the untouched rest of a frame.

    The rest of one that lies in a Parcel is not copied: the head is written in front of it.
    """
    large_frame = rest.obj
    if not isinstance(large_frame, LargeFrame):
        return b"".join((head, rest))
    start = len(large_frame) - len(rest) - len(head)
    whole = memoryview(large_frame)[start:]
    whole[: len(head)] = head
    return whole
