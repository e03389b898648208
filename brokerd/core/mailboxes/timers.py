"""Timers: when a mailbox has something to do although nothing arrives."""

from __future__ import annotations

import itertools
from heapq import heappop, heappush
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from brokerd.core.mailboxes.clock import Clock
    from brokerd.core.mailboxes.mailbox import Mailbox

__all__ = ["Timers"]


class Timers:
    """The next time of each mailbox at which messages are due, or held for too long.

    A timer may be too early, and never too late: its mailbox is looked at, and gets
    another timer.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._order = itertools.count()
        #: Wall clock times. An entry counts only if its mailbox is scheduled for it.
        self._heap: list[tuple[float, int, Mailbox]] = []

    def __bool__(self) -> bool:
        return bool(self._heap)

    def schedule(self, mailbox: Mailbox) -> None:
        """Set the timer of a mailbox, if it is due before that."""
        due = [] if mailbox.next_due is None else [mailbox.next_due]
        timeout = mailbox.next_timeout(self._clock.now)
        if timeout is not None:
            due.append(self._clock.wall + timeout)
        if due and min(due) < mailbox.scheduled_at:
            mailbox.scheduled_at = min(due)
            heappush(self._heap, (mailbox.scheduled_at, next(self._order), mailbox))

    @property
    def next(self) -> float | None:
        """When ``due`` returns a mailbox, on the clock of ``now``; None without any."""
        while self._heap and self._heap[0][0] != self._heap[0][2].scheduled_at:
            heappop(self._heap)
        return self._clock.monotonic(self._heap[0][0]) if self._heap else None

    def due(self) -> list[Mailbox]:
        """Remove and return the mailboxes whose time has come."""
        mailboxes = []
        while self._heap and self._heap[0][0] <= self._clock.wall:
            at, _, mailbox = heappop(self._heap)
            if at == mailbox.scheduled_at:
                mailbox.scheduled_at = inf
                mailboxes.append(mailbox)
        return mailboxes
