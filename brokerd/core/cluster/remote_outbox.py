"""The bytes that wait in one remote session, for the link to its host."""

from __future__ import annotations

import math
from collections import deque
from typing import Final

from brokerd.core.cluster.seam import Run
from brokerd.core.outbox import Queued, StreamOutbox
from brokerd.core.undelivered import sender_header_of
from brokerd_client.wire.framing import frame_prefix
from brokerd_client.wire.layout import HEADER

__all__ = ["RemoteOutbox"]

#: Bytes of a frame's length.
_LENGTH: Final = 4
#: Longest ttl whose rest travels, in seconds: 49 days. A longer one begins again.
_LONGEST_S: Final = (2**32 - 1) / 1000


class RemoteOutbox(StreamOutbox):
    """An outbox whose frames are taken in runs, for a batch to another host.

    Its frames carry their senders' identities.
    """

    __slots__ = ("_addressed",)

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.is_remote = True
        #: Places of the frames with a target of their own: where each begins and ends in
        #: the stream, and its target.
        self._addressed: deque[tuple[int, int, str]] = deque()

    def put(self, queued: Queued) -> None:
        """Append one whole frame with its delivery information."""
        sender = queued.sender
        if sender is not None and sender.sender_header != sender.identity:
            queued.frame = _identified(bytes(queued.frame), sender.identity)
        super().put(queued)

    def address_last(self, size: int, target: str) -> None:
        """Give the last frame, which has ``size`` bytes, a target of its own."""
        end = self.base + len(self.content)
        self._addressed.append((end - size, end, target))

    def take(self, room: int, target: str, now: float) -> list[Run]:
        """Remove and return whole frames in runs, while there is room.

        The frames of one run lie in one chunk, and have the same time left. The last frame
        may exceed the room.
        """
        runs: list[Run] = []
        while room > 0 and self.waiting:
            pieces = self.pieces()
            if not pieces:
                # A frame past its ttl comes first.
                break
            piece = pieces[0]
            position = self.first_place + self.begun
            while self._addressed and self._addressed[0][1] <= position:
                self._addressed.popleft()
            size, own = len(piece), target
            if self._addressed:
                start, end, name = self._addressed[0]
                if start <= position:
                    size, own = end - position, name
                else:
                    size = min(size, start - position)
            size, ttl_ms = self._alike(position, size, now) if self.marks else (size, 0)
            if size > room:
                size = _whole_frames(piece, room)
            taken: bytes | bytearray | memoryview
            # A view of the last chunk would keep it from growing.
            taken = piece if size == len(piece) == self.waiting else bytes(piece[:size])
            pieces.clear()
            self.sent(size)
            room -= size
            runs.append(Run(own, taken, ttl_ms))
        return runs

    def _alike(self, position: int, size: int, now: float) -> tuple[int, int]:
        """Return how many bytes from a position have one ttl, and its milliseconds left.

        The milliseconds are 0 for frames without a ttl. size: the most bytes.
        """
        ttl_ms: int | None = None
        covered, limit = position, position + size
        for start, end, deadline, _ in self.marks:
            if start >= limit:
                break
            if start > covered and ttl_ms:
                # Frames without a ttl follow.
                return covered - position, ttl_ms
            left = _left_ms(deadline - now)
            if start > covered:
                ttl_ms = 0
            if ttl_ms is not None and left != ttl_ms:
                return start - position, ttl_ms
            ttl_ms, covered = left, end
        if ttl_ms and covered < limit:
            return covered - position, ttl_ms
        return size, ttl_ms or 0


def _left_ms(seconds: float) -> int:
    """Return the milliseconds of a ttl that are left; 0 for a ttl that a run can't tell."""
    return max(1, math.ceil(seconds * 1000)) if seconds <= _LONGEST_S else 0


def _whole_frames(piece: bytearray | memoryview, room: int) -> int:
    """Return the bytes of the first whole frames within the room, of at least one."""
    end = 0
    while end < len(piece):
        size = _LENGTH + int.from_bytes(piece[end : end + _LENGTH], "big", signed=True)
        if size < _LENGTH:
            # A length of its own, of 2 GiB and more.
            size = 12 + int.from_bytes(piece[end + _LENGTH : end + 12], "big")
        if end and end + size > room:
            break
        end += size
    return end


def _identified(frame: bytes, identity: bytes) -> bytes:
    """Return a frame with its sender's identity in place of its address."""
    name = sender_header_of(frame, _LENGTH)
    if name == identity:
        return frame
    kind, flags, codec, _, message_id = HEADER.unpack_from(frame, _LENGTH)
    header = HEADER.pack(kind, flags, codec, len(identity), message_id)
    rest = memoryview(frame)[_LENGTH + HEADER.size + len(name) :]
    size = HEADER.size + len(identity) + len(rest)
    return b"".join((frame_prefix(size), header, identity, rest))
