"""The verdict of a soak: whether a series of samples is flat. Nothing here knows a
broker.

The slope is that of Theil and Sen, the median of the slopes between all pairs of
samples: neither a single outlier nor a quarter of them moves it far. The first quarter
of the samples is left out: caches, buffers and the allocator's arenas fill up then.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Bound", "Verdict", "judge", "theil_sen"]

#: More samples than that are thinned out: the pairs grow with the square.
_MOST = 600


@dataclass(frozen=True)
class Bound:
    """The allowed rise of a series from the end of the first quarter to the end.

    The larger of the two values counts.

    Attributes:
        share: Share of the series' median.
        least: Value in the series' own unit.
    """

    share: float
    least: float


@dataclass(frozen=True)
class Verdict:
    """The figures of one series.

    Attributes:
        rise: Rise over the last three quarters, computed from the slope.
        allowed: The bound in the series' own unit.
    """

    median: float
    least: float
    most: float
    rise: float
    allowed: float

    @property
    def flat(self) -> bool:
        return self.rise <= self.allowed


def theil_sen(values: Sequence[float]) -> float:
    """Return the median of the slopes between all pairs, by sample."""
    step = len(values) // _MOST + 1
    kept = values[::step]
    slopes = [
        (later - earlier) / (second - first)
        for first, earlier in enumerate(kept)
        for second, later in enumerate(kept[first + 1 :], first + 1)
    ]
    return statistics.median(slopes) / step if slopes else 0.0


def judge(values: Sequence[float], bound: Bound) -> Verdict:
    """Return whether the last three quarters of the samples rise by more than the
    bound.
    """
    counted = values[len(values) // 4 :]
    median = statistics.median(counted)
    rise = theil_sen(counted) * (len(counted) - 1)
    return Verdict(median, min(counted), max(counted), rise, max(bound.share * median, bound.least))
