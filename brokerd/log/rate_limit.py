"""Log rate limiter: writes a frequent event line by line while it is rare, and counts
the rest.

An unknown peer can connect thousands of times a second. A client's messages can be
refused a million times a second. So within a second, the first few events about the
same parties have a line each. In all, some dozens of lines are written. One line,
``EVENT_more``, counts the rest. While the events continue, the period doubles from a
second to at most a minute. The rule itself is shared with the library:
``brokerd_client._common.rate_limit``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from brokerd_client._common.rate_limit import FEW, RateLimit

if TYPE_CHECKING:
    import asyncio

    from structlog.typing import FilteringBoundLogger

__all__ = ["LogRateLimiter"]

#: Most lines of one event within a period: about the same parties, and in all.
_FEW: Final = (FEW, 50)
_FEW_OF: Final = {
    "client.refused": (30, 50),
    # An authenticated client may be one of thousands that reconnect at once.
    "client.connected": (50, 100_000),
    "client.disconnected": (50, 100_000),
}


class _Flow:
    """The current period of one event.

    timer: ends the period; None between two periods.
    ends: when the event counts as rare again, on the clock of the event loop.
    """

    __slots__ = ("ends", "level", "limit", "timer")

    def __init__(self, event: str) -> None:
        self.limit = RateLimit(*_FEW_OF.get(event, _FEW))
        self.ends = 0.0
        self.timer: asyncio.TimerHandle | None = None
        self.level = ""


class LogRateLimiter:
    """Logs events that clients can cause at will; keeps a timer only after recent
    events.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, log: FilteringBoundLogger) -> None:
        self.log = log
        self._loop = loop
        self._flows: dict[str, _Flow] = {}

    def note(
        self,
        level: str,
        event: str,
        about: str,
        count: int = 1,
        *,
        log: FilteringBoundLogger | None = None,
        **fields: Any,
    ) -> None:
        """Log an event now, or count it as one of many.

        Args:
            about: The parties and the reason, for counting and for people.
            count: How often it happened since it was last noted.
            log: The logger for a line of its own, with the fields that are bound to it.
                The line for many uses none of them.
        """
        flow = self._flows.get(event)
        if flow is None:
            flow = self._flows[event] = _Flow(event)
        limit = flow.limit
        if flow.timer is None:
            if self._loop.time() >= flow.ends:
                limit.restart()
            flow.timer = self._loop.call_later(limit.period_s, self._end_period, event)
        flow.level = level
        if limit.has_line(about):
            if count != 1:
                fields["count"] = count
            getattr(log or self.log, level)(event, **fields)
        else:
            limit.count(about, count)

    def close(self) -> None:
        """Log the events that were only counted so far."""
        for event, flow in list(self._flows.items()):
            if flow.timer is not None:
                flow.timer.cancel()
                self._end_period(event)

    def _end_period(self, event: str) -> None:
        flow = self._flows[event]
        counted = flow.limit.next_period()
        if counted is None:
            del self._flows[event]
            return
        flow.timer = None
        # After this time without events, the next burst counts as a new one.
        flow.ends = self._loop.time() + counted.seconds
        getattr(self.log, flow.level)(
            f"{event}_more",
            count=counted.total,
            seconds=counted.seconds,
            reasons=counted.reasons,
        )
