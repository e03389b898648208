"""What an outbox held when its connection ended: frames that go back to their senders, cut out one at a time.

A queue can hold hundreds of thousands of short messages. Cutting them all out at once would take as long as answering
for them, and hold up everybody else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from brokerd_client.wire.envelope import HEADER
from brokerd_client.wire.framing import frame_span

__all__ = ["Chunk", "Queued", "Unsent", "count_after", "cut"]

#: Bytes that begin with a whole frame and end with one.
Chunk: TypeAlias = "bytearray | memoryview"


@dataclass(frozen=True, slots=True)
class Queued:
    """One frame that waits.

    frame: length prefix included; it does not change any more. receipt: its sender asked for a RECEIPT.
    pinned: it was sent to this very connection, not to its name.
    sender: the session it came from, where that is remembered. orphaned: that one is known to be gone.
    kept: it is never dropped for a newer one: an answer to what the recipient sent itself.
    deadline: it is not written from then on, on the clock of ``now``; None where it has no ttl.
    """

    frame: bytes | memoryview
    receipt: bool = False
    pinned: bool = False
    sender: Any = None
    orphaned: bool = False
    kept: bool = False
    deadline: float | None = None


class Unsent:
    """Frames that the system did not take whole, oldest first; its length is how many are left."""

    __slots__ = ("_frames", "_left")

    def __init__(self, frames: Iterator[Queued], count: int) -> None:
        self._frames = frames
        self._left = count

    def __len__(self) -> int:
        return max(self._left, 0)

    def __iter__(self) -> Iterator[Queued]:
        """Yield those that are left, which stay."""
        left = list(self._frames)
        self._frames = iter(left)
        yield from left

    def pop(self) -> Queued | None:
        """Return the oldest one and forget it; None when there is none left."""
        self._left -= 1
        return next(self._frames, None)


def cut(chunks: deque[tuple[Chunk, Queued | None]], head: int, at: int, left: Mapping[bytes, int]) -> Iterator[Queued]:
    """Yield every frame of the chunks that ends behind the first ``head`` bytes; a chunk is let go of when it is done.

    chunks: each with what is remembered of it, where it is one frame of which anything is.
    at: where in the stream the first chunk begins. left: see StreamOutbox.
    """
    while chunks:
        chunk, known = chunks.popleft()
        if known is not None:
            yield known
            at += len(chunk)
            head = 0
            continue
        for start, body, end in _frames(chunk):
            if end > head:
                orphaned = bool(left) and at + end <= left.get(_sender_header(chunk, body), 0)
                yield Queued(bytes(chunk[start:end]), orphaned=orphaned)
        at += len(chunk)
        head = 0


def count_after(chunk: Chunk, head: int) -> int:
    """Return how many frames of a chunk end behind its first ``head`` bytes."""
    return sum(end > head for _, _, end in _frames(chunk))


def _sender_header(chunk: Chunk, body: int) -> bytes:
    """Return the sender's name in the frame whose body begins there."""
    name_size = HEADER.unpack_from(chunk, body)[3]
    return bytes(chunk[body + HEADER.size : body + HEADER.size + name_size])


def _frames(chunk: Chunk) -> Iterator[tuple[int, int, int]]:
    """Yield where each frame of a chunk begins, where its body does, and where it ends."""
    start = 0
    while start < len(chunk):
        span = frame_span(chunk, start, len(chunk))
        assert span is not None, "a chunk holds whole frames"
        end = sum(span)
        yield start, span[0], end
        start = end
