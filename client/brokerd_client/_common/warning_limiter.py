"""Warnings of what went wrong with messages: each by itself while they are few, counted while they are many.

A program in a loop can be refused a million messages a second, and a line for each would bury everything else that it
logs. So the first few within a second have a line each, and one line counts the rest. While that goes on, the second
becomes two, four, at last a minute. No clock in here, no I/O.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

__all__ = ["WarningLimiter"]

#: Messages with a line of their own in the first period, and in a later one of the same flood.
_FEW: Final = 5
_FEW_LATER: Final = 1
#: Seconds of the first period, and of the longest.
_PERIOD_S: Final = 1.0
_LONGEST_S: Final = 60.0
#: Reasons counted apart, and how many of them the line names.
_APART: Final = 1000
_NAMED: Final = 5


class WarningLimiter:
    """What of one client's messages was not delivered, or could not be read, and how much of that has been said.

    what: the words for it. due: when what was only counted is to be said, on the clock of ``now``; None while there
        is nothing.
    """

    def __init__(self, what: str = "more messages were not delivered") -> None:
        self._what = what
        self.due: float | None = None
        self._period_s = _PERIOD_S
        self._ends = 0.0
        self._lines = 0
        self._counted: Counter[str] = Counter()

    def note(self, reason: str, now: float) -> bool:
        """Note one more; return whether it is to have a line of its own. reason: for counting, and for people."""
        if self.due is None and now >= self._ends:
            # The last period is over, and nothing was counted in it: this is not that flood any more.
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
        """Return in words what was only counted until now, "" for nothing; the next period begins."""
        counted, self._counted = self._counted, Counter()
        self.due = None
        if not counted:
            return ""
        self._period_s = min(self._period_s * 2, _LONGEST_S)
        self._ends, self._lines = now + self._period_s, 0
        reasons = ", ".join(f"{reason} ({count})" for reason, count in counted.most_common(_NAMED))
        return f"{counted.total()} {self._what}: {reasons}"
