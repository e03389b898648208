"""Outboxes: the bytes that wait for one connection, within its queue quota.

There are two kinds with one interface. A StreamOutbox is a run of bytes in chunks, each
of which begins with a whole frame. Appending is cheap, and the routing loop writes
straight into its ``content``. A large frame is a chunk by itself and is not copied
(:mod:`brokerd.core.large_frame`).

A FrameOutbox keeps every frame separately, for recipients whose queue is edited: clients
with ``when_full: drop_oldest``.

Both kinds keep track of frames with a ttl: a StreamOutbox by their place in the stream,
counted from its beginning. ``pieces`` ends before a frame whose ttl was over at the last
``take_expired``. That method returns the frame once it comes first.

An outbox never sends. The network layer writes its bytes, and calls ``sent(n)`` with
the number of bytes that the system took. It sets ``blocked`` while the system takes
none.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from math import inf
from typing import Final, TypeAlias

from brokerd.core.undelivered import Chunk, Queued, Unsent, count_after, cut, sender_header_of
from brokerd.core.write_buffer import WriteBuffer

__all__ = ["CHUNK", "FrameOutbox", "Outbox", "Queued", "StreamOutbox"]

#: Most bytes in one chunk of a StreamOutbox, unless a single frame is longer.
CHUNK: Final = 128 * 1024
#: Most pieces per vectored write; IOV_MAX is 1024 on Linux.
_PIECES: Final = 512
#: Most frames with a ttl that are looked at per write.
_MARKS: Final = 512


def _tell_eased(outbox: Outbox) -> None:
    """Report a smaller load to the pool if the rank of its member is too high."""
    owner = outbox.owner
    if owner is not None and owner.rank is not None and owner.rank[0] > outbox.waiting:
        owner.client.eased(owner)


class StreamOutbox(WriteBuffer):
    """A byte stream in chunks; the routing loop writes into the last, ``content``.

    Attributes:
        limit: Bytes that may wait: the queue quota.
        stalled: Whether senders were held for the longest time allowed; cleared when
            half of the queue is free.
    """

    __slots__ = (
        "_as_of",
        "_ends",
        "_head",
        "_left",
        "_older",
        "_older_bytes",
        "limit",
        "stalled",
    )

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.room = min(CHUNK, limit)
        self.is_stream = True
        self.stalled = False
        self._older: deque[Chunk] | tuple[()] = ()
        #: For each closed chunk: the value of ``frames`` when it was closed; None if
        #: unknown.
        self._ends: deque[int | None] | tuple[()] = ()
        self._older_bytes = 0
        self._as_of = 0.0
        #: Bytes that the system has taken of the first chunk.
        self._head = 0
        #: By the sender header of a closed session: up to where in the stream its bytes
        #: may lie.
        self._left: dict[bytes, int] = {}

    @property
    def waiting(self) -> int:
        """Bytes not yet taken by the system."""
        return self._older_bytes + len(self.content) - self._head

    @property
    def timed(self) -> bool:
        """Whether a frame with a ttl may be waiting."""
        return bool(self.marks)

    def reserve(self, size: int, beyond: int = 0) -> bool:
        """Return whether ``size`` more bytes may be appended, within limit + beyond.

        A frame longer than the whole quota is accepted when nothing waits. Otherwise it
        could never be delivered.
        """
        waiting = self.waiting
        if waiting and waiting + size > self.limit + beyond:
            return False
        self._make_room(size)
        return True

    def append(self, frame: bytes | memoryview) -> None:
        """Append one whole frame, even beyond the quota.

        The broker's own answers are never refused. A memoryview is kept without a copy,
        and its bytes must not change afterwards.
        """
        if isinstance(frame, memoryview):
            self._close_buffer()
            self._add_closed(frame, self.frames + 1)
            self._set_room()
        else:
            self._make_room(len(frame))
            self.content += frame
        self.frames += 1
        self.size += len(frame)

    def extend(self, frames: bytearray, size: int) -> None:
        """Append several frames of ``size`` bytes each, even beyond the quota."""
        self._make_room(len(frames))
        self.content += frames
        self.frames += len(frames) // size
        self.size += len(frames)

    def put(self, queued: Queued) -> None:
        """Append one whole frame with its delivery information."""
        self.append(queued.frame)
        self.mark(len(queued.frame), queued.deadline, pinned=queued.pinned)

    def mark(self, size: int, deadline: float | None, *, pinned: bool = False) -> None:
        """Note the ttl of the last frame, which has ``size`` bytes, if it has one, and
        whether it is pinned.
        """
        if deadline is not None or pinned:
            end = self.base + len(self.content)
            self.marks = self.marks or deque()
            self.marks.append((end - size, end, inf if deadline is None else deadline, pinned))

    def sender_left(self, sender_header: bytes) -> None:
        """Mark the waiting frames with this sender header as sent by a closed session.

        The next connection with that address gets no errors for them.
        """
        if self.waiting:
            self._left[sender_header] = self.base + len(self.content)

    def _make_room(self, size: int) -> None:
        if len(self.content) + size > CHUNK:
            self._close_buffer()
        self._set_room()
        self.room = max(self.room, len(self.content) + size)

    def _close_buffer(self) -> None:
        if self.content:
            self._add_closed(self.content, self.frames)
            self.content = bytearray()

    def _add_closed(self, chunk: Chunk, frames: int | None) -> None:
        """Add a chunk that does not change any more; frames: see ``_ends``."""
        older, ends = self._older, self._ends
        if not older or not ends:
            self._older = older = deque()
            self._ends = ends = deque()
        older.append(chunk)
        ends.append(frames)
        self._older_bytes += len(chunk)
        self.base += len(chunk)

    def _set_room(self) -> None:
        self.room = min(CHUNK, self.limit - self._older_bytes + self._head)

    def pieces(self) -> list[bytearray | memoryview]:
        """Return the next bytes to write, in order, as chunks that are never empty."""
        if not self._older and not self.marks:
            if not self._head:
                return [self.content] if self.content else []
            return [memoryview(self.content)[self._head :]]
        pieces: list[bytearray | memoryview] = []
        left = self._before_expired() if self.marks else self.waiting
        skip = self._head
        for chunk in itertools.chain(itertools.islice(self._older, _PIECES), (self.content,)):
            if not left:
                break
            if skip or len(chunk) > left:
                piece = memoryview(chunk)[skip : skip + left]
                pieces.append(piece)
                left -= len(piece)
                skip = 0
            else:
                pieces.append(chunk)
                left -= len(chunk)
        return pieces[:_PIECES]

    def _before_expired(self) -> int:
        """Return how many bytes may be written before the first frame that has expired.

        A frame that is partly written may be written to its end.
        """
        position, marks = self._position, self.marks
        for start, _, deadline, _ in itertools.islice(marks, _MARKS):
            if deadline <= self._as_of and start >= position:
                return start - position
        if marks and len(marks) > _MARKS:
            return marks[_MARKS][0] - position
        return self.waiting

    @property
    def _position(self) -> int:
        """Where in the stream the first byte lies that the system has not taken."""
        return self.first_place + self._head

    def take_expired(self, now: float, limit: int) -> list[Queued]:
        """Remove and return up to ``limit`` expired frames from the front."""
        self._as_of = now
        expired: list[Queued] = []
        while self.marks and len(expired) < limit:
            start, end, deadline, pinned = self.marks[0]
            if start != self._position or deadline > now:
                break
            chunk = self._older[0] if self._older else self.content
            frame = bytes(memoryview(chunk)[self._head : self._head + end - start])
            expired.append(
                Queued(
                    frame,
                    pinned=pinned,
                    orphaned=self._is_orphaned(frame, end),
                    deadline=deadline,
                )
            )
            self._remove(end - start)
        return expired

    def _is_orphaned(self, frame: bytes, end: int) -> bool:
        """Return whether the sender of the frame that ends there is known to have closed."""
        return bool(self._left) and end <= self._left.get(sender_header_of(frame, 4), 0)

    def sent(self, size: int) -> bool:
        """Remove ``size`` bytes that the system took; return whether all are taken."""
        if self._remove(size):
            self.stalled = False
            return True
        return False

    def _remove(self, size: int) -> bool:
        """Remove ``size`` bytes from the front; return whether no more are waiting."""
        head = self._head + size
        older, ends = self._older, self._ends
        while older and ends and head >= len(older[0]):
            first = len(older.popleft())
            ends.popleft()
            self._older_bytes -= first
            head -= first
        if not older and head >= len(self.content):
            self.base += len(self.content)
            # A new object, not clear(): the caller of pieces() may still hold the old
            # one.
            self.content = bytearray()
            self._left.clear()
            self._older = self._ends = self.marks = ()
            self._head = 0
            self.room = min(self.limit, CHUNK)
            return True
        self._head = head
        self._set_room()
        position = self._position
        while self.marks and self.marks[0][1] <= position:
            self.marks.popleft()
        _tell_eased(self)
        return False

    @property
    def begun(self) -> int:
        """Bytes of ``chunks`` that the system has taken already."""
        return self._head

    def chunks(self) -> list[bytearray | memoryview]:
        """Return all waiting chunks, in order; each begins with a whole frame."""
        return [*self._older, self.content]

    @property
    def first_place(self) -> int:
        """Where in the stream the first of ``chunks`` begins."""
        return self.base - self._older_bytes

    @property
    def closed_bytes(self) -> int:
        """Bytes of all ``chunks`` but the last; these bytes do not change any more."""
        return self._older_bytes

    def left(self) -> dict[bytes, int]:
        """Return where in ``chunks`` closed senders' last bytes may end, by header."""
        first = self.first_place
        return {sender_header: end - first for sender_header, end in self._left.items()}

    def marked_frames(self) -> list[tuple[int, int, float, bool]]:
        """Return ``marks`` with the places in ``chunks``."""
        first = self.first_place
        return [
            (start - first, end - first, deadline, pinned)
            for start, end, deadline, pinned in self.marks
        ]

    def refill(
        self,
        chunks: list[bytearray],
        begun: int,
        left: dict[bytes, int],
        marks: Iterable[tuple[int, int, float, bool]] = (),
    ) -> None:
        """Fill this empty outbox with the contents of another.

        The arguments are what its ``chunks``, ``begun``, ``left`` and ``marked_frames``
        returned.
        """
        *older, self.content = chunks
        self.marks = deque(marks) or ()
        self.base = 0
        for chunk in older:
            self._add_closed(chunk, None)
        self._head = begun
        self._left = dict(left)
        self._set_room()

    @property
    def unsent(self) -> int:
        """Frames that the system did not take whole."""
        count, head = 0, self._head
        for chunk, end in zip(self._older, self._ends, strict=True):
            count += count_after(chunk, head)
            if end is not None:
                return count + self.frames - end
            head = 0
        return count + count_after(self.content, head)

    def take_unsent(self) -> Unsent:
        """Remove and return all frames that the system did not take whole, in order."""
        count = self.unsent
        frames = cut(
            deque(self.chunks()),
            self._head,
            self.first_place,
            self._left,
            self.marks,
        )
        self.base += len(self.content)
        self._left = {}
        self._older = self._ends = self.marks = ()
        self._older_bytes = self._head = 0
        self.content = bytearray()
        self._set_room()
        return Unsent(frames, count)


class FrameOutbox(WriteBuffer):
    """Frames kept separately; see StreamOutbox for the attributes that both share.

    Its ``content`` stays empty and its ``room`` 0: the routing loop never writes here.
    Frames that are never dropped have a queue of their own. So the oldest droppable
    frame is found without a search.
    """

    __slots__ = (
        "_as_of",
        "_begun",
        "_head",
        "_kept",
        "_plain",
        "_plain_bytes",
        "_plain_gone",
        "_waiting",
        "limit",
        "stalled",
        "timed",
    )

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.stalled = False
        #: The frame of which the system has taken the first ``_head`` bytes.
        self._begun: Queued | None = None
        self._head = 0
        #: Frames that may be dropped, their bytes, and the number of them that have
        #: left.
        self._plain: deque[Queued] = deque()
        self._plain_bytes = 0
        self._plain_gone = 0
        #: Frames that are never dropped, each with the number of droppable frames that
        #: were queued before it, counted since the outbox began.
        self._kept: deque[tuple[int, Queued]] = deque()
        self._waiting = 0
        self.timed = 0
        self._as_of = 0.0

    @property
    def waiting(self) -> int:
        """Bytes not yet taken by the system."""
        return self._waiting

    def reserve(self, size: int, beyond: int = 0) -> bool:
        """Return whether ``size`` more bytes may be queued, within limit + beyond."""
        return not self._waiting or self._waiting + size <= self.limit + beyond

    def append(self, frame: bytes) -> None:
        """Append one whole frame of the broker's own, even beyond the quota."""
        self.put(Queued(frame, kept=True))

    def extend(self, frames: bytearray, size: int) -> None:
        """Append several frames of ``size`` bytes each, even beyond the quota."""
        for start in range(0, len(frames), size):
            self.append(bytes(frames[start : start + size]))

    def put(self, queued: Queued) -> None:
        """Append one whole frame with its delivery information."""
        self._insert(queued)
        self.frames += 1
        self.size += len(queued.frame)

    def _insert(self, queued: Queued) -> None:
        size = len(queued.frame)
        if queued.kept:
            self._kept.append((self._plain_gone + len(self._plain), queued))
        else:
            self._plain.append(queued)
            self._plain_bytes += size
        self._waiting += size
        self.timed += queued.deadline is not None

    def _first(self) -> Queued | None:
        """Return the frame that is to be written next, or None."""
        if self._kept and self._kept[0][0] <= self._plain_gone:
            return self._kept[0][1]
        return self._plain[0] if self._plain else None

    def _next(self) -> Queued:
        """Remove and return the frame that is to be written next."""
        if self._kept and self._kept[0][0] <= self._plain_gone:
            queued = self._kept.popleft()[1]
            self.timed -= queued.deadline is not None
            return queued
        return self._next_plain()

    def _next_plain(self) -> Queued:
        queued = self._plain.popleft()
        self.timed -= queued.deadline is not None
        self._plain_bytes -= len(queued.frame)
        self._plain_gone += 1
        return queued

    def _in_order(self) -> Iterator[Queued]:
        """Yield every waiting frame, in order; the outbox must not change meanwhile."""
        if self._begun is not None:
            yield self._begun
        place = self._plain_gone
        plain = iter(self._plain)
        for precede, queued in self._kept:
            yield from itertools.islice(plain, max(0, precede - place))
            place = max(place, precede)
            yield queued
        yield from plain

    def pieces(self) -> list[bytearray | memoryview]:
        """Return the next frames to write, in order."""
        frames: Iterator[Queued] = itertools.islice(self._in_order(), _PIECES)
        if self.timed:
            frames = itertools.takewhile(self._may_be_written, frames)
        pieces: list[bytearray | memoryview] = [memoryview(queued.frame) for queued in frames]
        if self._head:
            pieces[0] = memoryview(pieces[0])[self._head :]
        return pieces

    def sent(self, size: int) -> bool:
        """Remove ``size`` bytes that the system took; return whether all are taken."""
        self._waiting -= size
        if not self._waiting:
            self.stalled = False
        head = self._head + size
        begun = self._begun
        while head:
            if begun is None:
                begun = self._next()
            if head < len(begun.frame):
                break
            head -= len(begun.frame)
            begun = None
        self._begun = begun
        self._head = head
        _tell_eased(self)
        return not self._waiting

    def _may_be_written(self, queued: Queued) -> bool:
        return queued.deadline is None or queued.deadline > self._as_of or queued is self._begun

    def take_expired(self, now: float, limit: int) -> list[Queued]:
        """Remove and return up to ``limit`` expired frames from the front."""
        self._as_of = now
        expired: list[Queued] = []
        while self._begun is None and len(expired) < limit:
            first = self._first()
            if first is None or self._may_be_written(first):
                break
            expired.append(self._next())
            self._waiting -= len(first.frame)
        if expired:
            _tell_eased(self)
        return expired

    def drop_oldest(self, size: int, limit: int = sys.maxsize) -> list[Queued] | None:
        """Drop the oldest frames until ``size`` more bytes fit the quota; return them.

        At most ``limit`` frames are dropped per call. A partly written frame stays,
        since its end must follow. If nothing else is left, any frame may be appended.
        None: the droppable frames are not enough, and none has been dropped.
        """
        excess = self._waiting + size - self.limit
        if excess > self._plain_bytes and self._kept:
            return None
        dropped: list[Queued] = []
        while self._plain and excess > 0 and len(dropped) < limit:
            oldest = self._next_plain()
            excess -= len(oldest.frame)
            self._waiting -= len(oldest.frame)
            dropped.append(oldest)
        _tell_eased(self)
        return dropped

    def has_made_room(self, size: int) -> bool:
        """Return whether ``drop_oldest`` need not go on for ``size`` more bytes."""
        return self._waiting + size <= self.limit or not self._plain

    @property
    def begun(self) -> int:
        """Bytes that the system has taken of the first frame."""
        return self._head

    def queue(self) -> list[Queued]:
        """Return all waiting frames, in order."""
        return list(self._in_order())

    @property
    def plain(self) -> deque[Queued]:
        """The droppable frames, in order; they are removed from the front only."""
        return self._plain

    @property
    def plain_gone(self) -> int:
        """Number of frames that have left ``plain``: the number of its first frame."""
        return self._plain_gone

    def kept(self) -> list[tuple[int, Queued]]:
        """Return the undroppable frames, each with how many of ``plain`` precede it."""
        return [(max(0, precede - self._plain_gone), queued) for precede, queued in self._kept]

    @property
    def begun_frame(self) -> Queued | None:
        """The frame that is partly written, or None."""
        return self._begun

    def refill(self, queue: Iterable[Queued], begun: int) -> None:
        """Fill this empty outbox with the ``queue`` and ``begun`` of another."""
        for queued in queue:
            if begun and self._begun is None:
                self._begun, self._head = queued, begun
                self._waiting = len(queued.frame) - begun
            else:
                self._insert(queued)

    def refill_plain(self, plain: deque[Queued], size: int, timed: int) -> None:
        """Add the droppable frames of another outbox; this one must have none.

        Args:
            size: Their bytes.
            timed: The number of them with a ttl.
        """
        self._plain = plain
        self._plain_bytes += size
        self._waiting += size
        self.timed += timed

    def refill_kept(self, kept: Iterable[tuple[int, Queued]]) -> None:
        """Add the undroppable frames that ``kept`` of another outbox returned."""
        for precede, queued in kept:
            self._kept.append((precede, queued))
            self._waiting += len(queued.frame)
            self.timed += queued.deadline is not None

    @property
    def unsent(self) -> int:
        """Frames that the system did not take whole."""
        return len(self._plain) + len(self._kept) + (self._begun is not None)

    def take_unsent(self) -> Unsent:
        """Remove and return all frames that the system did not take whole, in order."""
        count, removed = self.unsent, FrameOutbox(self.limit)
        removed._begun, removed._plain, removed._kept = self._begun, self._plain, self._kept
        removed._plain_gone = self._plain_gone
        self._begun, self._plain, self._kept = None, deque(), deque()
        self._waiting = self._head = self._plain_bytes = self.timed = 0
        return Unsent(removed._in_order(), count)


Outbox: TypeAlias = StreamOutbox | FrameOutbox
