"""Frames left in an outbox when its connection ended, extracted one at a time.

They are returned to their senders. A queue can hold hundreds of thousands of short
messages. Extracting all of them at once would take as long as reporting them, and
would delay every other client.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, TypeAlias

from brokerd_client.wire.envelope import HEADER
from brokerd_client.wire.framing import frame_span

__all__ = ["Chunk", "Queued", "Unsent", "count_after", "cut", "sender_header_of"]

#: Bytes that begin with a whole frame and end with one.
Chunk: TypeAlias = "bytearray | memoryview"


# Not frozen, which would make it take five times as long to create.
@dataclass(slots=True, unsafe_hash=True)
class Queued:
    """One waiting frame, which does not change.

    Attributes:
        frame: Its bytes with the length prefix; they do not change any more.
        receipt: Whether its sender asked for a RECEIPT.
        pinned: Whether it was sent to this connection's own address, not to the
            client's name.
        sender: The session it came from, where that is remembered.
        orphaned: Whether its sender's session is known to have closed.
        kept: Whether it is never dropped for a newer frame. Such a frame answers a
            frame of the recipient's own.
        deadline: When its ttl is over and it is no longer written; None without a ttl.
            It is a time on the clock of ``now``.
    """

    frame: bytes | memoryview
    receipt: bool = False
    pinned: bool = False
    sender: Any = None
    orphaned: bool = False
    kept: bool = False
    deadline: float | None = None


class Unsent:
    """Frames that the system did not take whole; ``len`` counts the remaining ones."""

    __slots__ = ("_frames", "_left")

    def __init__(self, frames: Iterator[Queued], count: int) -> None:
        self._frames = frames
        self._left = count

    def __len__(self) -> int:
        return max(self._left, 0)

    def __iter__(self) -> Iterator[Queued]:
        """Yield the remaining frames without removing them."""
        left = list(self._frames)
        self._frames = iter(left)
        yield from left

    def pop(self) -> Queued | None:
        """Remove and return the oldest frame, or None if none is left."""
        self._left -= 1
        return next(self._frames, None)


def cut(
    chunks: deque[Chunk],
    head: int,
    at: int,
    left: Mapping[bytes, int],
    marks: deque[tuple[int, int, float, bool]] | tuple[()],
) -> Iterator[Queued]:
    """Yield every frame of the chunks that ends after the first ``head`` bytes.

    Each chunk is released once its frames have been yielded.

    Args:
        at: Where in the stream the first chunk begins.
        left: See StreamOutbox.
        marks: See WriteBuffer.
    """
    while chunks:
        chunk = chunks.popleft()
        for start, body, end in _frames(chunk):
            if end > head:
                deadline, pinned = inf, False
                if marks and marks[0][1] == at + end:
                    _, _, deadline, pinned = marks.popleft()
                orphaned = bool(left) and at + end <= left.get(sender_header_of(chunk, body), 0)
                # A large frame stays in its buffer.
                is_alone = end - start == len(chunk)
                frame: bytes | memoryview
                if is_alone and isinstance(chunk, memoryview):
                    frame = chunk
                else:
                    frame = bytes(chunk[start:end])
                yield Queued(
                    frame,
                    pinned=pinned,
                    orphaned=orphaned,
                    deadline=None if deadline == inf else deadline,
                )
        at += len(chunk)
        head = 0


def count_after(chunk: Chunk, head: int) -> int:
    """Return how many frames of a chunk end after its first ``head`` bytes."""
    return sum(end > head for _, _, end in _frames(chunk))


def sender_header_of(chunk: Chunk | bytes, body: int) -> bytes:
    """Return the sender's address in the frame whose body begins at ``body``."""
    name_size = HEADER.unpack_from(chunk, body)[3]
    return bytes(chunk[body + HEADER.size : body + HEADER.size + name_size])


def _frames(chunk: Chunk) -> Iterator[tuple[int, int, int]]:
    """Yield the start of each frame of a chunk, the start of its body, and its end."""
    start = 0
    while start < len(chunk):
        span = frame_span(chunk, start, len(chunk))
        assert span is not None, "a chunk holds whole frames"
        end = sum(span)
        yield start, span[0], end
        start = end
