"""The wait before the next attempt to connect: exponential backoff with full jitter.

The module draws no random numbers: the jitter is an argument. Full jitter, because all
clients reconnect together after a restart of the broker. Spreading each wait evenly
over the whole interval lets all of them connect soonest.
"""

from __future__ import annotations

from typing import Final

__all__ = ["BASE_S", "CAP_S", "delay"]

#: Longest first wait, in seconds.
BASE_S: Final = 0.1
#: Longest wait of all, in seconds.
CAP_S: Final = 10.0
_MAX_DOUBLINGS: Final = 10


def delay(attempt: int, jitter: float) -> float:
    """Return seconds to wait before try number ``attempt`` (from 0), given ``jitter``
    in [0, 1).
    """
    return jitter * min(CAP_S, BASE_S * (1 << min(attempt, _MAX_DOUBLINGS)))
