"""Keeps the event loop awake for a moment where the next message is near.

Between a request and its reply the broker waits for some microseconds. To sleep that long
costs as much again: the system must wake the broker, on a processor that went idle.
Where reads follow each other closely, the event loop therefore does not sleep: it asks
the system for the next one again and again. A poll without a result makes the next one
rarer.

Without a poll, the time between two reads contains that sleep. Messages that a poll would
find close can then look too far from each other. So behind many reads that are near, one
poll is tried.

An idle broker polls nothing. Nor does a broker with a quota, or with one processor, which
its clients need. Where other programs need the processors, the system takes the broker's
away in the middle of a poll. For a hundred times as long, and a second at most, the broker
sleeps as usual.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from brokerd_client._common.processors import has_spare_processor

if TYPE_CHECKING:
    import asyncio

__all__ = ["BusyPoll"]

#: Seconds from the end of a read to the begin of the next one that count as close. Longer
#: polls, which wait for clients in Python, take the processor that these need.
_CLOSE_S: Final = 50e-6
#: The same for reads that count as near: a sleep may be all that parts them.
_NEAR_S: Final = 150e-6
#: Seconds that a poll lasts without a read.
_POLL_S: Final = 60e-6
#: Reads in a row that follow each other closely before a poll begins: at first, and after
#: many polls without a result.
_FEWEST: Final = 8
_MOST: Final = 4096
#: Near reads in a row before a poll is tried, at first.
_FEWEST_NEAR: Final = 64
#: Close reads in one poll after which the next poll begins behind the fewest near reads.
#: In such steady traffic a miss is rare, and sleeps make close reads look near.
_STEADY: Final = 64
#: Seconds by which the end of a poll is late if the processor was taken away. After that,
#: no poll begins for this many times as long as it was late, and for one second at
#: most.
_LATE_S: Final = 0.001
_REST: Final = 100
_LONGEST_REST_S: Final = 1.0


class BusyPoll:
    """The polls of one event loop.

    clock: returns the time in seconds. The event loop's own has whole milliseconds, and
        time.monotonic has 16 ms on Windows.
    may_poll: whether it polls at all; by default, if there is a spare processor.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        clock: Callable[[], float] = time.perf_counter,
        may_poll: bool | None = None,
    ) -> None:
        self._loop = loop
        self._clock = clock
        #: The end of the last read.
        self._read_at = 0.0
        #: Reads in a row that came closely behind the one before, and how many of them
        #: a poll needs.
        self._close_reads = 0
        self._needed = _FEWEST
        #: The same of reads that are at least near.
        self._near_reads = 0
        self._needed_near = _FEWEST_NEAR
        self._polls = False
        #: Close reads since the poll began.
        self._found = 0
        #: When the poll ends, unless a read prolongs it.
        self._end_at = 0.0
        if may_poll is None:
            may_poll = has_spare_processor()
        self._rests_until = 0.0 if may_poll else float("inf")

    def begin_read(self) -> None:
        """Note that input has come."""
        gap = self._clock() - self._read_at
        if gap >= _CLOSE_S:
            self._close_reads = 0
            self._near_reads = self._near_reads + 1 if gap < _NEAR_S else 0
            return
        self._close_reads += 1
        self._near_reads += 1
        if self._polls:
            self._found += 1
            self._needed, self._needed_near = _FEWEST, _FEWEST_NEAR

    def end_read(self) -> None:
        """Begin or prolong a poll, if the next read is probably close."""
        self._read_at = now = self._clock()
        if now < self._rests_until:
            return
        if self._polls:
            if not self._close_reads:
                return
        elif self._close_reads < self._needed and self._near_reads < self._needed_near:
            return
        self._end_at = now + _POLL_S
        if not self._polls:
            self._polls = True
            self._found = 0
            self._loop.call_soon(self._poll)

    def _poll(self) -> None:
        """Keep the event loop from sleeping in its next turn, until the poll ends."""
        now = self._clock()
        if now < self._end_at:
            self._loop.call_soon(self._poll)
            return
        self._polls = False
        self._close_reads = self._near_reads = 0
        if self._found >= _STEADY:
            self._needed = self._needed_near = _FEWEST
        else:
            self._needed = min(2 * self._needed, _MOST)
            self._needed_near = min(2 * self._needed_near, _MOST)
        late_s = now - self._end_at
        if late_s >= _LATE_S:
            self._rests_until = now + min(_REST * late_s, _LONGEST_REST_S)
