"""A queue that tasks wait on, or that worker tasks empty.

A part of the asyncio face; it knows nothing of connections.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from brokerd_client.errors import BrokerdError, TimedOut
from brokerd_client.protocol.inbox import Inbox, InboxMeter

__all__ = ["WaitQueue"]

T = TypeVar("T")


class WaitQueue(Generic[T]):
    """An inbox that tasks can wait at, or that worker tasks empty."""

    __slots__ = (
        "__weakref__",
        "_resume_reading",
        "_settle",
        "_waiters",
        "ended",
        "inbox",
        "on_put",
    )

    def __init__(
        self,
        meter: InboxMeter,
        resume_reading: Callable[[], None],
        settle: Callable[[asyncio.Future[bool], bool], None],
    ) -> None:
        self.inbox: Inbox[T] = Inbox(meter)
        #: The reason why no more items will arrive; None while they may.
        self.ended: BrokerdError | None = None
        #: Called after items were added, if worker tasks empty the queue.
        self.on_put: Callable[[], None] | None = None
        self._resume_reading = resume_reading
        #: Gives a future its result: see Wakeups.
        self._settle = settle
        #: The result is whether the task was woken, and not at the end of its time.
        self._waiters: deque[asyncio.Future[bool]] = deque()

    def put(self, items: list[T], size: int) -> None:
        """Add items, and wake one waiting task per item."""
        self.inbox.put(items, size)
        if self.on_put is not None:
            self.on_put()
        if self._waiters:
            self._wake(len(items))

    def take_all(self) -> list[T]:
        """Take and return all items."""
        return self.inbox.take_all()

    def end(self, reason: BrokerdError) -> None:
        """Store the reason why no more items will arrive, and wake every waiting task.

        Remaining items can still be taken, but no longer count against the client's
        inbox.
        """
        if self.ended is None:
            self.ended = reason
            self.inbox.release()
            self._resume_reading()
        self._wake(len(self._waiters))

    def _wake(self, count: int) -> None:
        while count and self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._settle(waiter, True)
                count -= 1

    def take_now(self) -> T:
        """Return the next item. Raises IndexError if there is none."""
        item = self.inbox.items.popleft()
        if len(self.inbox.items) <= self.inbox.mark:
            self._resume_reading()
        return item

    async def take(self, timeout: float | None) -> T:
        """Return the next item.

        Args:
            timeout: Seconds to wait; None for no limit.

        Raises:
            TimedOut: No item arrived in time.
            BrokerdError: The reason why no more items will arrive.
        """
        with contextlib.suppress(IndexError):
            return self.take_now()
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        while True:
            if self.ended is not None:
                raise self.ended.with_traceback(None)
            waiter: asyncio.Future[bool] = loop.create_future()
            timer = None if deadline is None else loop.call_at(deadline, self._expire, waiter)
            self._waiters.append(waiter)
            try:
                in_time = await waiter
            except BaseException:
                # The task was cancelled, or the coroutine is being closed.
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                else:
                    # Woken at the same time: the item is for the next waiter.
                    self._wake(1)
                raise
            finally:
                if timer is not None:
                    timer.cancel()
            with contextlib.suppress(IndexError):
                return self.take_now()
            if not in_time:
                raise TimedOut(f"nothing arrived within {timeout:g} s")

    def _expire(self, waiter: asyncio.Future[bool]) -> None:
        """Wake a task at the end of its time."""
        if not waiter.done():
            waiter.set_result(False)
            self._waiters.remove(waiter)
