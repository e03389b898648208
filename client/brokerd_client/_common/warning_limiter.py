"""The warnings of one client about messages, limited in rate.

The broker can refuse a million messages a second of a program in a loop. The first few
warnings get a line each, and one line per period counts the rest. The module reads no
clock and does no I/O.
"""

from __future__ import annotations

from brokerd_client._common.rate_limit import RateLimit

__all__ = ["WarningLimiter"]


class WarningLimiter:
    """The limiter for one kind of warning of one client.

    Args:
        words: The words for the counted warnings.

    Attributes:
        due: When to log them, on the clock of ``now``; None while none is counted.
    """

    def __init__(self, words: str = "more messages were not delivered") -> None:
        self._words = words
        self._limit = RateLimit()
        self._ends = 0.0
        self.due: float | None = None

    def note(self, reason: str, now: float) -> bool:
        """Count a warning; return whether it gets a line of its own.

        reason: groups the counted warnings, and appears in the line.
        """
        limit = self._limit
        if self.due is None and now >= self._ends:
            # The last period is over without counted warnings.
            limit.restart()
            self._ends = now + limit.period_s
        if limit.has_line():
            return True
        limit.count(reason)
        self.due = self._ends
        return False

    def more(self, now: float) -> str:
        """Return the line for the counted warnings, "" if none; begin the next period."""
        self.due = None
        counted = self._limit.next_period()
        if counted is None:
            return ""
        self._ends = now + self._limit.period_s
        reasons = ", ".join(f"{reason} ({count})" for reason, count in counted.reasons.items())
        return f"{counted.total} {self._words}: {reasons}"
