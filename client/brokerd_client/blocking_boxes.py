"""Where threads wait: for the outcome of a call, and for what arrives.

A part of the blocking face; knows nothing of connections, but rings the I/O thread's bell when there is room again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any, Generic, TypeVar

from brokerd_client.channel import Channel
from brokerd_client.errors import BrokerdError, TimedOut
from brokerd_client.inbox import Gauge, Inbox

__all__ = ["Box", "Call"]

T = TypeVar("T")


class Call:
    """One thread's wait for one outcome."""

    __slots__ = ("_gate", "done", "value")

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._gate.acquire()
        self.done = False
        self.value: Any = None

    def settle(self, value: Any) -> None:
        """Let the thread go on with this outcome."""
        self.value = value
        self.done = True
        self._gate.release()

    def wait(self, deadline: float | None) -> bool:
        """Return whether there is an outcome before the deadline."""
        if deadline is None:
            return self._gate.acquire()
        return self._gate.acquire(timeout=max(0.0, min(deadline - time.monotonic(), threading.TIMEOUT_MAX)))


class Box(Generic[T]):
    """An inbox that threads can wait at."""

    __slots__ = ("__weakref__", "_channel", "_gauge", "ended", "filled", "inbox")

    def __init__(self, lock: threading.Lock, gauge: Gauge, channel: Channel) -> None:
        self.inbox: Inbox[T] = Inbox(gauge)
        self.filled = threading.Condition(lock)
        #: Why nothing more will come.
        self.ended: BrokerdError | None = None
        self._gauge = gauge
        self._channel = channel

    def put(self, items: list[T], size: int) -> None:
        """Add items and wake who waits; with the lock held."""
        self.inbox.put(items, size)
        self.filled.notify(len(items))

    def end(self, why: BrokerdError) -> None:
        """Nothing more will come; with the lock held."""
        if self.ended is None:
            self.ended = why
        self.filled.notify_all()

    def take(self, timeout: float | None) -> T:
        """Return the next item. Raises TimedOut, or why nothing more will come."""
        try:
            item = self.inbox.items.popleft()
        except IndexError:
            item = self._wait(timeout)
        if self._gauge.full and len(self.inbox.items) <= self.inbox.mark:
            self.relieve()
        return item

    def _wait(self, timeout: float | None) -> T:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self.filled:
            while True:
                # A taker that needs no lock may be faster than one that has just been woken.
                with contextlib.suppress(IndexError):
                    return self.inbox.items.popleft()
                if self.ended is not None:
                    raise self.ended.with_traceback(None)
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    raise TimedOut(f"nothing arrived within {timeout:g} s")
                self.filled.wait(remaining)

    def relieve(self) -> None:
        """Have the socket read again, if that was the message too many."""
        with self.filled:
            self.inbox.settle()
            if self._gauge.held <= self._gauge.limit:
                self._gauge.full = False
                self._channel.ring()
