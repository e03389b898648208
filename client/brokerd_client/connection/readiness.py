"""Which of several things can be read from: ``multiprocessing.connection.wait``."""

from __future__ import annotations

import math
import select
import sys
import time
from collections.abc import Iterable
from typing import Any, Final

__all__ = ["deadline_after", "readable", "shortened", "wait"]

#: In seconds; poll() counts milliseconds in a C int. Whoever waits longer looks at the clock and waits again.
_LONGEST_WAIT: Final = 1_000_000


def deadline_after(timeout: float | None, now: float) -> float | None:
    """Return when the timeout, in seconds from ``now``, is over; None for no limit. Raises ValueError for NaN."""
    if timeout is None:
        return None
    if math.isnan(timeout):
        raise ValueError("timeout is not a number")
    return now + timeout


def shortened(timeout: float | None) -> float | None:
    """Return the timeout, made short enough for the system's calls; at its end the caller looks at the clock."""
    return None if timeout is None else min(max(timeout, 0), _LONGEST_WAIT)


if sys.platform != "win32":

    def readable(descriptors: Iterable[int], timeout: float | None) -> set[int]:
        """Return the descriptors (sockets only, on Windows) that can be read from, waiting once for up to ``timeout``.

        timeout: seconds; None waits for ever, and a negative time does not wait.
        """
        seconds = shortened(timeout)
        milliseconds = None if seconds is None else 1000 * seconds
        poller = select.poll()
        for descriptor in descriptors:
            poller.register(descriptor, select.POLLIN)
        return {descriptor for descriptor, _ in poller.poll(milliseconds)}

else:

    def readable(descriptors: Iterable[int], timeout: float | None) -> set[int]:
        """Return the descriptors (sockets only, on Windows) that can be read from, waiting once for up to ``timeout``.

        timeout: seconds; None waits for ever, and a negative time does not wait.
        """
        return set(select.select(list(descriptors), (), (), shortened(timeout))[0])


if sys.platform == "win32":
    from multiprocessing.connection import wait as _wait_for_handles

    def wait(object_list: Iterable[Any], timeout: float | None = None) -> list[Any]:
        """Return those of the objects that are ready: connections, sockets, handles; [] when the time is over."""
        objects = list(object_list)
        deadline = deadline_after(timeout, time.monotonic())
        while True:
            ready: list[Any] = _wait_for_handles(objects, shortened(timeout))
            if ready or deadline is None or (timeout := deadline - time.monotonic()) <= 0:
                return ready

else:

    def wait(object_list: Iterable[Any], timeout: float | None = None) -> list[Any]:
        """Return those of the objects that can be read from, or whose peer is gone, in the order given.

        object_list: connections, sockets, file descriptors, process sentinels. timeout: seconds; None waits for
        ever, as math.inf does, and a negative time does not wait. [] when the time is over.
        """
        objects = [(obj if isinstance(obj, int) else obj.fileno(), obj) for obj in object_list]
        descriptors = [descriptor for descriptor, _ in objects]
        # A connection may have a message that the system knows no more.
        holding = {descriptor for descriptor, obj in objects if getattr(obj, "_holds_message", False) is True}
        if holding:
            timeout = 0
        deadline = deadline_after(timeout, time.monotonic())
        ready = readable(descriptors, timeout) | holding
        while not ready and deadline is not None:
            # Timers are coarser than clocks: never come back early.
            timeout = deadline - time.monotonic()
            if timeout <= 0:
                break
            ready = readable(descriptors, timeout)
        return [obj for descriptor, obj in objects if descriptor in ready]
