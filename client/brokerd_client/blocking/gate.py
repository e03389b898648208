"""A gate, where one thread waits until another thread opens it.

A part of the blocking face, and the smallest one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Gate", "raised_by_handler"]


class Gate:
    """A gate at which one thread waits, once for each time that it is opened."""

    #: Wakes the thread while it does not wait here but for input.
    interrupt: Callable[[], None] | None = None

    def __init__(self) -> None:
        #: Locked until the gate is open.
        self.lock = threading.Lock()
        self.lock.acquire()

    def open(self) -> None:
        """Open the gate; a second time changes nothing until the thread has passed."""
        try:
            self.lock.release()
        except RuntimeError as error:
            if raised_by_handler(error):
                raise
        if self.interrupt is not None:
            self.interrupt()

    def wait(self, deadline: float | None) -> bool:
        """Wait until the gate is open; return whether it was before the deadline."""
        if self.lock.acquire(False):
            return True
        if deadline is None:
            return self.lock.acquire()
        remaining = deadline - time.monotonic()
        return remaining > 0 and self.lock.acquire(timeout=min(remaining, threading.TIMEOUT_MAX))

    @property
    def is_open(self) -> bool:
        """Whether the thread may pass."""
        return not self.lock.locked()


def raised_by_handler(error: BaseException) -> bool:
    """Return whether a signal handler raised the error, not a call in the catching
    function.
    """
    return error.__traceback__ is not None and error.__traceback__.tb_next is not None
