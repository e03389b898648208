"""Log rate limiter: writes a frequent event line by line while it is rare, and counts
the rest.

An unknown peer can connect thousands of times a second. A client's messages can be
refused a million times a second. A line for each would cost more than the refusal, fill
the disk, and bury the other lines. So within a second, the first few events about the
same parties have a line each. In all, some dozens of lines are written. One line,
``EVENT_more``, counts the rest. While the events continue, the period doubles from a
second to at most a minute.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import asyncio

    from brokerd.log.api import Log

__all__ = ["LogRateLimiter"]

#: Lines of one event within a period: about the same parties, and in all.
_FEW: Final = (5, 50)
_FEW_OF: Final = {
    "client.refused": (30, 50),
    # An authenticated client may be one of thousands that reconnect at once.
    "client.connected": (50, 100_000),
    "client.disconnected": (50, 100_000),
}
#: Length of the first period and of the longest, in seconds.
_PERIOD: Final = 1.0
_LONGEST: Final = 60.0
#: Parties counted separately per event and period, and how many of them the line names.
_APART: Final = 1000
_NAMED: Final = 5


class _Flow:
    """The lines and counts of one event within the current period."""

    __slots__ = ("counted", "each", "ends", "level", "lines", "period", "timer")

    def __init__(self) -> None:
        self.period = _PERIOD
        self.ends = 0.0
        self.timer: asyncio.TimerHandle | None = None
        self.level = ""
        self.lines = 0
        self.each: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()


class LogRateLimiter:
    """Logs events that clients can cause at will; keeps a timer only after recent
    events.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, log: Log) -> None:
        self.log = log
        self._loop = loop
        self._flows: dict[str, _Flow] = {}

    def note(self, level: str, event: str, about: str, count: int = 1, **fields: Any) -> None:
        """Log an event now, or count it as one of many.

        about: the parties and the reason, for counting and for people. count: how often
        it happened since it was last noted.
        """
        flow = self._flows.setdefault(event, _Flow())
        if flow.timer is None:
            now = self._loop.time()
            if now >= flow.ends:
                flow.period = _PERIOD
            flow.timer = self._loop.call_later(flow.period, self._end_period, event)
        flow.level = level
        # In later periods the parties are known already, so each gets one line.
        each, in_all = _FEW_OF.get(event, _FEW)
        if flow.lines < in_all and flow.each[about] < (each if flow.period == _PERIOD else 1):
            flow.lines += 1
            flow.each[about] += 1
            many = {} if count == 1 else {"count": count}
            getattr(self.log, level)(event, **fields, **many)
            return
        if len(flow.counted) >= _APART and about not in flow.counted:
            about = "others"
        flow.counted[about] += count

    def close(self) -> None:
        """Log the events that were only counted so far."""
        for event, flow in list(self._flows.items()):
            if flow.timer is not None:
                flow.timer.cancel()
                self._end_period(event)

    def _end_period(self, event: str) -> None:
        flow = self._flows[event]
        counted, seconds = flow.counted, flow.period
        if not counted:
            del self._flows[event]
            return
        flow.timer = None
        flow.lines = 0
        flow.each, flow.counted = Counter(), Counter()
        # After this time without events, the next burst counts as a new one.
        flow.ends = self._loop.time() + flow.period
        flow.period = min(flow.period * 2, _LONGEST)
        getattr(self.log, flow.level)(
            f"{event}_more",
            count=counted.total(),
            seconds=seconds,
            reasons=dict(counted.most_common(_NAMED)),
        )
