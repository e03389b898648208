"""The delay of the event loop, which every message in the broker waits for."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from typing import Final

__all__ = ["BOUNDS", "Lag"]

#: Upper bounds of the histogram's buckets, in seconds; one further bucket has no bound.
BOUNDS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
#: Seconds between two measurements.
_EVERY: Final = 0.1


class Lag:
    """A histogram of how late a timer was called.

    Attributes:
        counts: For each bucket, the last one without a bound.
        total: The sum of all delays, in seconds.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = loop.call_later(
            _EVERY, self._ring, loop.time() + _EVERY
        )

    def _ring(self, due: float) -> None:
        now = self._loop.time()
        self.note(max(now - due, 0.0))
        self._timer = self._loop.call_at(now + _EVERY, self._ring, now + _EVERY)

    def note(self, late: float) -> None:
        """Count one measurement. late: seconds."""
        self.counts[bisect_left(BOUNDS, late)] += 1
        self.total += late

    def close(self) -> None:
        """Stop measuring."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
