"""Wake-ups of tasks, in the turn of the event loop that brings what they wait for.

A part of the asyncio face. A future wakes its task in the loop's next turn: that costs a
turn, and with it a system call, for each answer. The tasks that wait for received bytes
are run at the end of the call that handles these bytes instead. What they send leaves
with one system call, or in a few batches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from operator import length_hint
from typing import Any

__all__ = ["Wakeups"]


class Wakeups:
    """The results of futures, collected while received bytes are handled.

    Args:
        loop: The event loop of the futures.
    """

    __slots__ = ("_collected", "_loop", "_running")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        #: Futures and their results; None while results are set at once.
        self._collected: list[tuple[asyncio.Future[Any], Any]] | None = None
        #: Futures and their results, of which :meth:`run` has done some.
        self._running: Iterator[tuple[asyncio.Future[Any], Any]] = iter(())

    def collect(self) -> bool:
        """Collect results from now on; return whether :meth:`run` has to be called.

        That is not possible in a task, as no other task can run inside it.
        """
        if self._collected is not None or asyncio.current_task(self._loop) is not None:
            return False
        self._collected = []
        return True

    def settle_all(self, outcomes: list[tuple[asyncio.Future[Any], Any]]) -> None:
        """Do the same as :meth:`settle` for each future and its result."""
        if self._collected is not None:
            self._collected += outcomes
        else:
            for future, result in outcomes:
                self.settle(future, result)

    def settle(self, future: asyncio.Future[Any], result: Any) -> None:
        """Give a future its result, or raise the result in its task if it is an error."""
        if self._collected is not None:
            self._collected.append((future, result))
        elif not future.done():
            _set(future, result)

    @property
    def collecting(self) -> bool:
        """Whether results are collected for :meth:`run`."""
        return self._collected is not None

    @property
    def is_one(self) -> bool:
        """Whether :meth:`run` will come to a single future."""
        return self._collected is not None and len(self._collected) == 1

    @property
    def left(self) -> int:
        """The number of futures that :meth:`run` has not come to yet."""
        return length_hint(self._running)

    def run(self) -> None:
        """Give the futures the results that were collected, and run their tasks."""
        self._running = iter(self._collected or ())
        self._collected = None
        for future, result in self._running:
            if future.done():
                continue
            # The callback of a task that awaits a future makes the task's next step.
            callbacks: Any = getattr(future, "_callbacks", None) or ()
            if len(callbacks) != 1:
                _set(future, result)
                continue
            ((callback, context),) = callbacks
            future.remove_done_callback(callback)
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)
            try:
                context.run(callback, future)
            except (KeyboardInterrupt, SystemExit) as error:
                # The task has left with it: an exit of the event loop.
                self._loop.call_soon(_raise, error)
            except RuntimeError:
                # The read runs in the context of the task itself.
                self._loop.call_soon(callback, future, context=context)


def _set(future: asyncio.Future[Any], result: Any) -> None:
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)


def _raise(error: BaseException) -> None:
    raise error
