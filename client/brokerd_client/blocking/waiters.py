"""Objects that threads wait on: for a call's outcome, for a change, and for messages.

A part of the blocking face. It knows nothing of connections, but wakes the I/O thread
when the inbox has room again.

An exception can be raised in a thread at any moment, by a signal handler for example.
Nothing here needs a lock that such a thread could keep. An interrupted wait loses
neither an item nor another thread's wake-up.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from brokerd_client.blocking.transport import Transport
from brokerd_client.errors import BrokerdError, TimedOut, WouldDeadlock
from brokerd_client.protocol.inbox import Inbox, InboxMeter

__all__ = ["NOTHING", "Call", "WaitQueue", "Waiters", "gate", "raised_by_handler", "wait_at"]

T = TypeVar("T")

#: A value that is never an item: see WaitQueue.take.
NOTHING: Final = object()


def gate() -> threading.Lock:
    """Return a held lock; a thread waits at it until another thread releases it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def wait_at(lock: threading.Lock, remaining: float | None) -> bool:
    """Wait at the gate; return whether it was opened within ``remaining`` seconds."""
    if remaining is None:
        return lock.acquire()
    return lock.acquire(timeout=max(0.0, min(remaining, threading.TIMEOUT_MAX)))


def raised_by_handler(error: BaseException) -> bool:
    """Return whether a signal handler raised the error, not a call in the catching
    function.
    """
    return error.__traceback__ is not None and error.__traceback__.tb_next is not None


class Call:
    """One thread's wait for one outcome."""

    __slots__ = ("_gate", "done", "value")

    def __init__(self) -> None:
        self._gate = gate()
        self.done = False
        self.value: Any = None

    def settle(self, value: Any) -> None:
        """Set the outcome and wake the thread; a second outcome changes nothing."""
        if not self.done:
            self.value = value
            self.done = True
        with contextlib.suppress(RuntimeError):
            self._gate.release()

    def wait(self, deadline: float | None) -> bool:
        """Wait for the outcome; return whether it came before the deadline."""
        return wait_at(self._gate, None if deadline is None else deadline - time.monotonic())


class Waiters:
    """Threads that wait for a change.

    A thread first enters its gate, then checks whether it has to wait. Only then does
    it wait at the gate, so that no change is missed.
    """

    __slots__ = ("_gates",)

    def __init__(self) -> None:
        #: In order of arrival. Only ``_first`` expects an exception of an operation on
        #: it, so that a signal handler's exception can't be mistaken for one.
        self._gates: dict[threading.Lock, None] = {}

    def __bool__(self) -> bool:
        return bool(self._gates)

    def enter(self, lock: threading.Lock) -> None:
        """Add a gate, which the next change opens."""
        self._gates[lock] = None

    def leave(self, lock: threading.Lock) -> bool:
        """Remove the gate; return whether it was still there, so that no wake-up is
        lost.
        """
        return self._gates.pop(lock, 0) is None

    def wake(self, count: int | None = None) -> None:
        """Open ``count`` gates; with None, open all of them."""
        remaining = len(self._gates) if count is None else count
        while remaining > 0 and (first := self._first()) is not None:
            if self.leave(first):
                first.release()
                remaining -= 1

    def _first(self) -> threading.Lock | None:
        """Return the gate that was entered first, or None."""
        while True:
            try:
                return next(iter(self._gates), None)
            except RuntimeError as error:
                # Another thread has entered or left between ``iter`` and ``next``.
                if raised_by_handler(error):
                    raise


class WaitQueue(Generic[T]):
    """An inbox that threads can wait at.

    Args:
        meter: Counts the bytes of all inboxes of the client.
        transport: The client's transport, whose ``wake`` wakes the I/O thread.
        interrupting: Returns whether the calling thread is in a signal handler that has
            interrupted a call of the client. Nothing can then arrive until it returns.
    """

    __slots__ = (
        "__weakref__",
        "_interrupting",
        "_meter",
        "_transport",
        "added",
        "ended",
        "inbox",
        "waiters",
    )

    def __init__(
        self, meter: InboxMeter, transport: Transport, interrupting: Callable[[], bool]
    ) -> None:
        self.inbox: Inbox[T] = Inbox(meter)
        self.waiters = Waiters()
        #: Number of items added so far, without those that take_all returned.
        self.added = 0
        #: The reason why no more items will arrive; None while they may.
        self.ended: BrokerdError | None = None
        self._meter = meter
        self._transport = transport
        self._interrupting = interrupting

    def put(self, items: list[T], size: int) -> None:
        """Add items, and wake one waiting thread per item."""
        self.added += len(items)
        self.inbox.put(items, size)
        self.waiters.wake(len(items))

    def take_all(self) -> list[T]:
        """Take and return all items."""
        items = self.inbox.take_all()
        self.added -= len(items)
        return items

    def end(self, reason: BrokerdError) -> None:
        """Store the reason why no more items will arrive, and wake every waiting
        thread.
        """
        if self.ended is None:
            self.ended = reason
        self.waiters.wake()

    def take(self, timeout: float | None) -> T:
        """Return the next item.

        Args:
            timeout: Seconds to wait; None for no limit.

        Raises:
            TimedOut: No item arrived in time.
            BrokerdError: The reason why no more items will arrive.
        """
        inbox = self.inbox
        try:
            # A loop, because CPython raises a signal handler's exception after a call
            # of popleft, which would lose the item. It does not raise between a loop's
            # step and the assignment of its variable.
            for item in iter(inbox.items.popleft, NOTHING):  # noqa: B007
                break
        except IndexError as error:
            if raised_by_handler(error):
                raise
            item = self._wait(timeout)
        try:
            if self._meter.full and len(inbox.items) <= inbox.mark:
                self.resume_reading()
        except BaseException:
            self.give_back(item)
            raise
        return item

    def give_back(self, item: Any) -> None:
        """Put back an item whose taking was interrupted."""
        self.inbox.items.appendleft(item)
        self.waiters.wake(1)

    def _wait(self, timeout: float | None) -> Any:
        if timeout != 0 and self.ended is None and self._interrupting():
            raise WouldDeadlock(
                "no message can arrive while this signal handler interrupts a call of the same"
                " client"
            )
        item: Any = NOTHING
        own_gate = gate()
        try:
            try:
                deadline = None if timeout is None else time.monotonic() + timeout
                while True:
                    self.waiters.enter(own_gate)
                    try:
                        for item in iter(self.inbox.items.popleft, NOTHING):
                            return item
                    except IndexError as error:
                        if raised_by_handler(error):
                            raise
                    if self.ended is not None:
                        raise self.ended.with_traceback(None)
                    remaining = None if deadline is None else deadline - time.monotonic()
                    if (remaining is not None and remaining <= 0) or not wait_at(
                        own_gate, remaining
                    ):
                        raise TimedOut(f"nothing arrived within {timeout:g} s")
            finally:
                # A wake-up that this thread does not need is passed on to another
                # thread.
                if not self.waiters.leave(own_gate) and self.inbox.items:
                    self.waiters.wake(1)
        except BaseException:
            if item is not NOTHING:
                self.give_back(item)
            raise

    def resume_reading(self) -> None:
        """Wake the I/O thread to check whether the inbox has room; wake it once per
        check.
        """
        meter = self._meter
        if not meter.weighing_due:
            meter.weighing_due = True
            try:
                self._transport.wake()
            except BaseException:
                meter.weighing_due = False
                raise
