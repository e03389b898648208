"""Which of several things can be read from: ``multiprocessing.connection.wait``."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Iterable
from typing import Any, Final

__all__ = ["readable", "wait"]

#: In seconds; poll() counts milliseconds in a C int. Whoever waits longer looks at the clock and waits again.
_LONGEST_WAIT: Final = 1_000_000

if sys.platform != "win32":

    def readable(descriptors: Iterable[int], timeout: float | None) -> set[int]:
        """Return the descriptors (sockets only, on Windows) that can be read from, waiting once for up to ``timeout``.

        timeout: seconds; None waits for ever, and a negative time does not wait.
        """
        milliseconds = None if timeout is None else 1000 * min(max(timeout, 0), _LONGEST_WAIT)
        poller = select.poll()
        for descriptor in descriptors:
            poller.register(descriptor, select.POLLIN)
        return {descriptor for descriptor, _ in poller.poll(milliseconds)}

else:

    def readable(descriptors: Iterable[int], timeout: float | None) -> set[int]:
        """Return the descriptors (sockets only, on Windows) that can be read from, waiting once for up to ``timeout``.

        timeout: seconds; None waits for ever, and a negative time does not wait.
        """
        seconds = None if timeout is None else min(max(timeout, 0), _LONGEST_WAIT)
        return set(select.select(list(descriptors), (), (), seconds)[0])


if sys.platform == "win32":
    from multiprocessing.connection import wait as _wait_for_handles

    def wait(object_list: Iterable[Any], timeout: float | None = None) -> list[Any]:
        """Return those of the objects that are ready: connections, sockets, handles; [] when the time is over."""
        return _wait_for_handles(list(object_list), timeout)

else:

    def wait(object_list: Iterable[Any], timeout: float | None = None) -> list[Any]:
        """Return those of the objects that can be read from, or whose peer is gone, in the order given.

        object_list: connections, sockets, file descriptors, process sentinels. timeout: seconds; None waits for
        ever, and a negative time does not wait. [] when the time is over.
        """
        objects = [(obj if isinstance(obj, int) else obj.fileno(), obj) for obj in object_list]
        descriptors = [descriptor for descriptor, _ in objects]
        deadline = None if timeout is None else time.monotonic() + timeout
        ready = readable(descriptors, timeout)
        while not ready and deadline is not None:
            # Timers are coarser than clocks: never come back early.
            timeout = deadline - time.monotonic()
            if timeout <= 0:
                break
            ready = readable(descriptors, timeout)
        return [obj for descriptor, obj in objects if descriptor in ready]
