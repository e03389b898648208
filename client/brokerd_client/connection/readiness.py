"""``multiprocessing.connection.wait``: wait until one of several objects can be read."""

from __future__ import annotations

import math
import select
import sys
import time
from collections.abc import Iterable
from typing import Any, Final

__all__ = ["clamp_timeout", "deadline_after", "readable", "wait"]

#: Most seconds of one system call: poll() counts milliseconds in a C int. A longer wait
#: is made of several calls, with a check of the clock between them.
_LONGEST_WAIT: Final = 1_000_000


def deadline_after(timeout: float | None, now: float) -> float | None:
    """Return the deadline of a timeout in seconds from ``now``; None for no limit.

    Raises ValueError for NaN.
    """
    if timeout is None:
        return None
    if math.isnan(timeout):
        raise ValueError("timeout is not a number")
    return now + timeout


def clamp_timeout(timeout: float | None) -> float | None:
    """Return the timeout in seconds, short enough for the system's calls.

    When it has passed, the caller checks the clock.
    """
    return None if timeout is None else min(max(timeout, 0), _LONGEST_WAIT)


if sys.platform != "win32":

    def readable(descriptors: Iterable[int], timeout: float | None) -> set[int]:
        """Wait once; return the descriptors (on Windows, sockets only) that can be
        read.

        Args:
            descriptors: The descriptors to wait for.
            timeout: Seconds to wait; None for no limit; a negative time does not wait.
        """
        seconds = clamp_timeout(timeout)
        milliseconds = None if seconds is None else 1000 * seconds
        poller = select.poll()
        for descriptor in descriptors:
            poller.register(descriptor, select.POLLIN)
        return {descriptor for descriptor, _ in poller.poll(milliseconds)}

else:

    def readable(descriptors: Iterable[int], timeout: float | None) -> set[int]:
        """Wait once; return the descriptors (on Windows, sockets only) that can be
        read.

        Args:
            descriptors: The descriptors to wait for.
            timeout: Seconds to wait; None for no limit; a negative time does not wait.
        """
        return set(select.select(list(descriptors), (), (), clamp_timeout(timeout))[0])


if sys.platform == "win32":
    from multiprocessing.connection import wait as _wait_for_handles

    def wait(object_list: Iterable[Any], timeout: float | None = None) -> list[Any]:
        """Wait until at least one object can be read, or has lost its peer.

        Args:
            object_list: Connections, sockets or handles.
            timeout: Seconds to wait. None and math.inf mean no limit; a negative time
                does not wait.

        Returns:
            The objects that are ready; [] after the timeout.
        """
        objects = list(object_list)
        deadline = deadline_after(timeout, time.monotonic())
        while True:
            ready: list[Any] = _wait_for_handles(objects, clamp_timeout(timeout))
            if ready or deadline is None or (timeout := deadline - time.monotonic()) <= 0:
                return ready

else:

    def wait(object_list: Iterable[Any], timeout: float | None = None) -> list[Any]:
        """Wait until at least one object can be read, or has lost its peer.

        Args:
            object_list: Connections, sockets, file descriptors or process sentinels.
            timeout: Seconds to wait. None and math.inf mean no limit; a negative time
                does not wait.

        Returns:
            The objects that are ready, in the order given; [] after the timeout.

        Raises:
            ValueError: The timeout is NaN.
            Closed: One of the connections is closed.
        """
        objects = [(obj if isinstance(obj, int) else obj.fileno(), obj) for obj in object_list]
        descriptors = [descriptor for descriptor, _ in objects]
        # A connection may hold a message that was already read from the system.
        holding = {
            descriptor
            for descriptor, obj in objects
            if getattr(obj, "_holds_message", False) is True
        }
        if holding:
            timeout = 0
        deadline = deadline_after(timeout, time.monotonic())
        ready = readable(descriptors, timeout) | holding
        while not ready and deadline is not None:
            # Timers are coarser than clocks: never return early.
            timeout = deadline - time.monotonic()
            if timeout <= 0:
                break
            ready = readable(descriptors, timeout)
        return [obj for descriptor, obj in objects if descriptor in ready]
