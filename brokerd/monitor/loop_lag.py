"""How late the event loop is: what every message in the broker waits for, whatever holds the loop up."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from typing import Final

__all__ = ["BOUNDS", "Lag"]

#: Upper bounds of the histogram's buckets, in seconds; one more has no bound.
BOUNDS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
#: Seconds between two looks.
_EVERY: Final = 0.1


class Lag:
    """A histogram of how much later than asked for a timer rang.

    counts: for each bucket, the last one without a bound. total: seconds, of all together.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = loop.call_later(_EVERY, self._ring, loop.time() + _EVERY)

    def _ring(self, due: float) -> None:
        now = self._loop.time()
        self.note(max(now - due, 0.0))
        self._timer = self._loop.call_at(now + _EVERY, self._ring, now + _EVERY)

    def note(self, late: float) -> None:
        """Count one look. late: seconds."""
        self.counts[bisect_left(BOUNDS, late)] += 1
        self.total += late

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
