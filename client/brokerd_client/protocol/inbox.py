"""Messages that have arrived and nobody has taken yet, and how many bytes of them the process holds.

One Gauge counts for all inboxes of a client; above its limit the face stops reading the socket, so that the
messages wait in the broker, within the client's quota there. No I/O, no waiting: that is the faces'.

Threads: one thread puts, any may take. Taking is a bare ``deque.popleft``, so a taken message is uncounted
only later, when :meth:`Inbox.settle` compares what was put with what is left.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable
from typing import Final, Generic, TypeVar

__all__ = ["OVERHEAD", "STRETCH", "Inbox", "InboxMeter", "largest_message"]

T = TypeVar("T")

#: Bytes a received message costs in this process beyond its frame.
OVERHEAD: Final = 200
#: While a call waits for its outcome, which may be behind messages nobody takes, so many times the limit is read.
STRETCH: Final = 4
#: Bytes of a message that every client accepts: the broker's ``limits.max_message`` unless set.
_ACCEPTED: Final = 16 * 2**20


def largest_message(inbox: int) -> int:
    """Return the bytes of the longest message that a client with this ``inbox`` accepts."""
    return max(_ACCEPTED, STRETCH * inbox)


class InboxMeter:
    """Bytes held by all inboxes of one client, against the limit. ``full``: the socket is to be left unread.

    asked: whether the face has been asked to weigh again.
    """

    __slots__ = ("asked", "full", "held", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.full = False
        self.asked = False

    def weigh(self, inboxes: Iterable[Inbox[T]], *, limit: int) -> bool:
        """Return, and keep, whether the inboxes hold more than ``limit`` bytes, after settling each.

        ``full`` is raised before the settling: a taker that comes too late to be settled sees it.
        """
        self.asked = False
        if self.held > limit:
            self.full = True
            for inbox in inboxes:
                inbox.settle()
        self.full = self.held > limit
        return self.full


class Inbox(Generic[T]):
    """A queue whose items are counted a batch at a time."""

    __slots__ = ("_batches", "_counted", "_meter", "_released", "items", "mark")

    def __init__(self, meter: InboxMeter) -> None:
        self.items: deque[T] = deque()
        self._meter = meter
        #: (items, bytes) of each batch that may still have items in the queue.
        self._batches: deque[tuple[int, int]] = deque()
        self._counted = 0
        self._released = False
        #: When no more items than this are left, settling uncounts something.
        self.mark = -1

    def put(self, items: list[T], size: int) -> None:
        """Add what one read brought, ``size`` bytes in all."""
        if self._released:
            self.items.extend(items)
            return
        if not self._batches:
            self.mark = 0
        self._batches.append((len(items), size))
        self._counted += len(items)
        self._meter.held += size
        self.items.extend(items)

    def settle(self) -> None:
        """Uncount the batches that have been taken whole."""
        left = len(self.items)
        while self._batches and self._counted - self._batches[0][0] >= left:
            count, size = self._batches.popleft()
            self._counted -= count
            self._meter.held -= size
        self.mark = self._counted - self._batches[0][0] if self._batches else -1

    def release(self) -> None:
        """Stop counting what is in it, for good: it gets nothing more, and what is left can still be taken."""
        self._released = True
        self._meter.held -= sum(size for _, size in self._batches)
        self._batches.clear()
        self._counted = 0
        self.mark = -1

    def take_all(self) -> list[T]:
        """Take everything in it."""
        taken: list[T] = []
        # Others may be taking from it at this moment.
        with contextlib.suppress(IndexError):
            while True:
                taken.append(self.items.popleft())
        self.settle()
        return taken

    def clear(self) -> None:
        """Forget everything in it."""
        self.items.clear()
        self.settle()
