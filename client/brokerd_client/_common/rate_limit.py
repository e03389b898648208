"""A rate limit for log lines: a rare event gets a line, and a frequent one is counted.

A broken or hostile peer can cause an event a million times a second. A line for each
would cost more than the event, fill the disk, and bury the other lines. So within a
period the first few events get a line each, and one line counts the rest. While events
are counted, each period is twice as long as the last. The module reads no clock and
does no I/O.
"""

from __future__ import annotations

from collections import Counter
from typing import Final, NamedTuple

__all__ = ["Counted", "RateLimit"]

#: Most lines about the same parties in the first period, and in each later period.
FEW: Final = 5
_FEW_LATER: Final = 1
#: Length of the first period, and of the longest, in seconds.
_PERIOD_S: Final = 1.0
_LONGEST_S: Final = 60.0
#: Most reasons that are counted separately in a period, and most that a line names.
_APART: Final = 1000
_NAMED: Final = 5


class Counted(NamedTuple):
    """The events of one period that got no line.

    seconds: the length of the period.
    reasons: the number of events for each of the most frequent reasons.
    """

    total: int
    seconds: float
    reasons: dict[str, int]


class RateLimit:
    """The lines and counts of one event. The caller knows when a period begins and ends.

    few: most lines about the same parties in the first period.
    in_all: most lines in each period.
    period_s: the length of the current period, in seconds.
    counted: the number of events without a line in this period, for each reason.
    """

    __slots__ = ("_few", "_in_all", "_lines", "_lines_about", "counted", "period_s")

    def __init__(self, few: int = FEW, in_all: int = FEW) -> None:
        self._few = few
        self._in_all = in_all
        self.period_s = _PERIOD_S
        self._lines = 0
        self._lines_about: dict[str, int] = {}
        self.counted: Counter[str] = Counter()

    def has_line(self, about: str = "") -> bool:
        """Return whether an event gets a line of its own, and note that line.

        about: the parties; they are known already in later periods.
        """
        few = self._few if self.period_s == _PERIOD_S else _FEW_LATER
        lines_about = self._lines_about.get(about, 0)
        if self._lines >= self._in_all or lines_about >= few:
            return False
        self._lines += 1
        self._lines_about[about] = lines_about + 1
        return True

    def count(self, reason: str, times: int = 1) -> None:
        """Count an event that gets no line; ``reason`` groups the counts."""
        if len(self.counted) >= _APART and reason not in self.counted:
            reason = "others"
        self.counted[reason] += times

    def next_period(self) -> Counted | None:
        """Return the events counted in this period, and begin a longer one.

        None: no event was counted, and the period stays as it is.
        """
        counted = self.counted
        if not counted:
            return None
        period = Counted(sum(counted.values()), self.period_s, dict(counted.most_common(_NAMED)))
        self._begin(min(self.period_s * 2, _LONGEST_S))
        return period

    def restart(self) -> None:
        """Begin again with a first period, because the last one was quiet."""
        self._begin(_PERIOD_S)

    def _begin(self, period_s: float) -> None:
        self.period_s = period_s
        self._lines = 0
        self._lines_about = {}
        self.counted = Counter()
