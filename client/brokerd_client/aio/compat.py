"""Features of asyncio in Python 3.11, for Python 3.9 and 3.10.

A part of the asyncio face.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from types import TracebackType
from typing import Any

__all__ = ["WaitTimeout", "cancelling", "create_task", "timeout_at", "uncancel"]

if sys.version_info >= (3, 11):
    from asyncio import timeout_at

    #: The error of asyncio.wait_for.
    WaitTimeout = TimeoutError

    def create_task(
        loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, None], name: str
    ) -> asyncio.Task[None]:
        """Start a task whose cancellations can be counted."""
        return loop.create_task(coroutine, name=name)

    def cancelling(task: asyncio.Task[Any]) -> int:
        """Return how many cancellations a task of ``create_task`` was asked for."""
        return task.cancelling()

    def uncancel(task: asyncio.Task[Any]) -> None:
        """Take back one request to cancel a task of ``create_task``."""
        task.uncancel()

else:
    from asyncio.exceptions import TimeoutError as WaitTimeout

    class _Task(asyncio.Task[None]):
        """A task that counts how often its cancellation was requested."""

        requested = 0

        def cancel(self, msg: Any = None) -> bool:
            if self.done():
                return False
            self.requested += 1
            return super().cancel(msg)

    def create_task(
        loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, None], name: str
    ) -> asyncio.Task[None]:
        """Start a task whose cancellations can be counted."""
        return _Task(coroutine, loop=loop, name=name)

    def cancelling(task: asyncio.Task[Any]) -> int:
        """Return how many cancellations a task of ``create_task`` was asked for."""
        return task.requested if isinstance(task, _Task) else 0

    def uncancel(task: asyncio.Task[Any]) -> None:
        """Take back one request to cancel a task of ``create_task``."""
        if isinstance(task, _Task) and task.requested:
            task.requested -= 1

    class timeout_at:  # noqa: N801 - named as in asyncio
        """A time limit for the body of an ``async with``, in a task of ``create_task``."""

        def __init__(self, when: float | None) -> None:
            self._when = when
            self._timer: asyncio.TimerHandle | None = None
            self._expired = False

        async def __aenter__(self) -> None:
            task = asyncio.current_task()
            assert isinstance(task, _Task)
            self._task = task
            self._requested = task.requested
            if self._when is not None:
                self._timer = asyncio.get_running_loop().call_at(self._when, self._expire)

        async def __aexit__(
            self,
            kind: type[BaseException] | None,
            error: BaseException | None,
            trace: TracebackType | None,
        ) -> None:
            if self._timer is not None:
                self._timer.cancel()
            if self._expired:
                self._task.requested -= 1
                # A cancellation from outside counts more than the end of the time.
                if self._task.requested <= self._requested and kind is asyncio.CancelledError:
                    raise TimeoutError from error

        def _expire(self) -> None:
            self._expired = True
            self._task.cancel()
