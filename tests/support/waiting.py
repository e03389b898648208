"""Waiting for a condition, for a limited time."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Seconds until a condition that does not come true fails its test.
WAIT_S = 90.0


def until(
    condition: Callable[[], bool], complaint: str = "timed out", wait_s: float = WAIT_S
) -> float:
    """Wait until the condition is true; return the seconds that it took.

    Raises AssertionError with the complaint after ``wait_s`` seconds.
    """
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < wait_s, complaint
        time.sleep(0.005)
    return time.monotonic() - began
