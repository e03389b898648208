"""Inboxes: flow control by the memory of received messages that no caller has taken.

One InboxMeter counts for all inboxes of a client. Above its limit the face stops
reading the socket. Further messages then wait in the broker, within the client's quota
there. The module does no I/O and does not wait: the faces do both.

Threads: one thread puts, any thread may take. Taking is a bare ``deque.popleft``, so a
taken message stays counted at first. :meth:`Inbox.settle` later compares the items put
with the items left, and subtracts the difference.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable
from typing import Final, Generic, TypeVar

__all__ = ["OVERHEAD", "STRETCH", "Inbox", "InboxMeter", "largest_message"]

T = TypeVar("T")

#: Memory of a received message in this process beyond its frame, in bytes.
OVERHEAD: Final = 200
#: Factor of the inbox limit while a call waits for its outcome. The outcome may be
#: behind messages that no caller takes, so the socket is read beyond the limit.
STRETCH: Final = 4
#: Size of a message that every client accepts from every broker, in bytes. It is the
#: default of the broker's ``limits.max_message``. A connected client does not hear of a
#: reload that raises ``max_message``. Up to this size, it accepts the longer messages
#: anyway; above it, from its next connection on.
_ACCEPTED: Final = 16 * 2**20


def largest_message(inbox: int, max_message: int | None = None) -> int:
    """Return the bytes of the longest message that a client accepts.

    Args:
        inbox: Limit of the client's inbox, in bytes.
        max_message: The longest message that the broker announced, in bytes; None
            before the broker's answer to ``whoami``.
    """
    largest = max(_ACCEPTED, STRETCH * inbox)
    return largest if max_message is None else min(largest, max(_ACCEPTED, max_message))


class InboxMeter:
    """The bytes held by all inboxes of one client, and their limit.

    full: whether the face must not read the socket.
    weighing_due: whether the face has been asked to weigh again.
    """

    __slots__ = ("full", "held", "limit", "weighing_due")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.full = False
        self.weighing_due = False

    def weigh(self, inboxes: Iterable[Inbox[T]], *, limit: int) -> bool:
        """Settle the inboxes; return whether they hold more than ``limit`` bytes.

        The result is kept in ``full``. It is also set before the settling. So a thread
        that takes a message too late to be settled sees it.
        """
        self.weighing_due = False
        if self.held > limit:
            self.full = True
            for inbox in inboxes:
                inbox.settle()
        self.full = self.held > limit
        return self.full


class Inbox(Generic[T]):
    """A queue whose items are counted in batches."""

    __slots__ = ("_batches", "_counted", "_meter", "_released", "items", "mark")

    def __init__(self, meter: InboxMeter) -> None:
        self.items: deque[T] = deque()
        self._meter = meter
        #: (items, bytes) of each batch that may still have items in the queue.
        self._batches: deque[tuple[int, int]] = deque()
        self._counted = 0
        self._released = False
        #: Settling subtracts at least one batch when at most this many items are left.
        self.mark = -1

    def put(self, items: list[T], size: int) -> None:
        """Add the messages of one read, ``size`` bytes in all."""
        self.count(items, size)
        self.items.extend(items)

    def count(self, items: list[T], size: int) -> None:
        """Count the messages of one read, which the caller then adds."""
        if self._released:
            return
        if not self._batches:
            self.mark = 0
        self._batches.append((len(items), size))
        self._counted += len(items)
        self._meter.held += size

    def settle(self) -> None:
        """Subtract the batches that have been taken completely."""
        remaining = len(self.items)
        while self._batches and self._counted - self._batches[0][0] >= remaining:
            count, size = self._batches.popleft()
            self._counted -= count
            self._meter.held -= size
        self.mark = self._counted - self._batches[0][0] if self._batches else -1

    def release(self) -> None:
        """Stop counting this inbox permanently.

        It gets no more counted messages; the messages left in it can still be taken.
        """
        self._released = True
        self._meter.held -= sum(size for _, size in self._batches)
        self._batches.clear()
        self._counted = 0
        self.mark = -1

    def take_all(self) -> list[T]:
        """Take and return all messages."""
        messages: list[T] = []
        # Other threads may take messages at the same time.
        with contextlib.suppress(IndexError):
            while True:
                messages.append(self.items.popleft())
        self.settle()
        return messages

    def clear(self) -> None:
        """Drop all messages."""
        self.items.clear()
        self.settle()
