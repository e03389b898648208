"""The time that each callback of an event loop takes, in its thread's processor time: a
busy machine matters less.

The interpreter's own work, such as a garbage collection, counts; other threads do not.

The bound is generous, because processor time also depends on who shares the caches and
the cores. At rest the longest callbacks take 5 to 15 ms; on a busy machine the same ones
took more than 20. What the bound finds is work whose duration depends on the number of
clients. ``benchmarks/workloads/stalls.py`` measures the exact figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

__all__ = ["LIMIT_S", "Meter", "metered"]

#: Seconds that no callback may take, at default limits with 10,000 clients.
LIMIT_S = 0.06
#: Processor time in seconds that ``_yardstick`` takes where the limit holds. A machine
#: that is slower, or busy, gets as much more time.
_YARDSTICK_S = 0.001
_SHOWN = 5


class Turn(NamedTuple):
    """One callback.

    Attributes:
        seconds: Processor time of its thread.
    """

    seconds: float
    callback: str


class Meter:
    """The longest callbacks of one loop since the last ``reset``."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.turns = 0
        self.longest: list[Turn] = []

    def reset(self) -> None:
        self.turns, self.longest = 0, []

    def note(self, seconds: float, handle: Any) -> None:
        self.turns += 1
        if len(self.longest) < _SHOWN or seconds > self.longest[-1].seconds:
            self.longest.append(Turn(seconds, repr(handle)[:200]))
            self.longest.sort(reverse=True)
            del self.longest[_SHOWN:]

    def check(self, limit_s: float = LIMIT_S) -> None:
        """Print the longest callbacks. Raises AssertionError if one took longer than
        the limit.
        """
        shown = "\n".join(f"{turn.seconds * 1e3:8.1f} ms  {turn.callback}" for turn in self.longest)
        print(f"\n{self.turns} callbacks, the longest:\n{shown}")
        worst = self.longest[0].seconds if self.longest else 0.0
        if worst >= limit_s:
            limit_s *= max(1.0, *(_yardstick() / _YARDSTICK_S for _ in range(5)))
        assert worst < limit_s, (
            f"a callback took {worst * 1e3:.0f} ms, more than {limit_s * 1e3:.0f} ms:\n{shown}"
        )


def _yardstick() -> float:
    """Return the processor time in seconds that a known piece of work takes now."""
    began = time.thread_time()
    for _ in range(10):
        dict.fromkeys(str(number) for number in range(1000))
    return time.thread_time() - began


@contextlib.contextmanager
def metered(meter: Meter) -> Iterator[None]:
    """Measure every callback of the meter's loop, which is one of asyncio's own."""
    run = asyncio.events.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        if handle._loop is not meter.loop or not getattr(handle._callback, "measured", True):  # type: ignore[attr-defined]
            run(handle)
            return
        began = time.thread_time()
        run(handle)
        meter.note(time.thread_time() - began, handle)

    asyncio.events.Handle._run = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        asyncio.events.Handle._run = run  # type: ignore[method-assign]
