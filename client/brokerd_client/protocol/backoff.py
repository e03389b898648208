"""How long to wait before the next try to reach the broker: exponential, with full jitter.

Draws no random number: the chance is an argument. Full jitter, because after a restart every client tries
at once: spreading each wait evenly over the whole interval finishes the herd soonest.
"""

from __future__ import annotations

from typing import Final

__all__ = ["BASE_S", "CAP_S", "delay"]

#: The first wait is at most this long, in seconds.
BASE_S: Final = 0.1
#: No wait is longer than this.
CAP_S: Final = 10.0
_MAX_DOUBLINGS: Final = 10


def delay(attempt: int, jitter: float) -> float:
    """Return seconds to wait before try number ``attempt`` (from 0), given ``jitter`` in [0, 1)."""
    return jitter * min(CAP_S, BASE_S * (1 << min(attempt, _MAX_DOUBLINGS)))
