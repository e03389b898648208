"""A rate limit for warnings about messages: few get a line each, many are counted.

The broker can refuse a million messages a second of a program in a loop. A line for
each would bury everything else in the log. So the first few within a second get a line
each, and one line counts the rest. While the warnings go on, the period doubles, up to
a minute. The module reads no clock and does no I/O.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

__all__ = ["WarningLimiter"]

#: Most warnings with a line of their own in the first period, and in each later period.
_FEW: Final = 5
_FEW_LATER: Final = 1
#: Length of the first period, and of the longest, in seconds.
_PERIOD_S: Final = 1.0
_LONGEST_S: Final = 60.0
#: Most reasons that are counted separately, and most reasons named in the line.
_APART: Final = 1000
_NAMED: Final = 5


class WarningLimiter:
    """The limiter for one kind of warning of one client.

    what: the words for the counted warnings. due: when to log them, on the clock of
    ``now``; None while none is counted.
    """

    def __init__(self, what: str = "more messages were not delivered") -> None:
        self._what = what
        self.due: float | None = None
        self._period_s = _PERIOD_S
        self._ends = 0.0
        self._lines = 0
        self._counted: Counter[str] = Counter()

    def note(self, reason: str, now: float) -> bool:
        """Count a warning; return whether it gets a line of its own.

        reason: groups the counted warnings, and appears in the line.
        """
        if self.due is None and now >= self._ends:
            # The last period is over without counted warnings: begin again with the
            # first period.
            self._period_s, self._ends, self._lines = _PERIOD_S, now + _PERIOD_S, 0
        if self._lines < (_FEW if self._period_s == _PERIOD_S else _FEW_LATER):
            self._lines += 1
            return True
        if len(self._counted) >= _APART and reason not in self._counted:
            reason = "others"
        self._counted[reason] += 1
        self.due = self._ends
        return False

    def more(self, now: float) -> str:
        """Return the line for the counted warnings, "" if none; begin the next period."""
        counted, self._counted = self._counted, Counter()
        self.due = None
        if not counted:
            return ""
        self._period_s = min(self._period_s * 2, _LONGEST_S)
        self._ends, self._lines = now + self._period_s, 0
        reasons = ", ".join(f"{reason} ({count})" for reason, count in counted.most_common(_NAMED))
        return f"{counted.total()} {self._what}: {reasons}"
