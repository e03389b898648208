"""What the tests of the library use and Python 3.9 or 3.10 lacks.

The library itself needs nothing of it: tests/interop/test_oldest_client.py runs it
without.
"""

from __future__ import annotations

import asyncio
import builtins
from typing import Any


class _Timeout:
    """``asyncio.timeout`` of Python 3.11, without its care for cancellations."""

    def __init__(self, delay: float | None) -> None:
        self._delay = delay
        self._expired = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._timer = (
            None
            if self._delay is None
            else asyncio.get_running_loop().call_later(self._delay, self._expire, task)
        )

    def _expire(self, task: asyncio.Task[Any]) -> None:
        self._expired = True
        task.cancel()

    async def __aexit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._expired and kind is asyncio.CancelledError:
            raise TimeoutError


def fill_in() -> None:
    """Add what is missing to asyncio and to the built-in names."""
    added: dict[str, Any] = {}
    if not hasattr(asyncio, "timeout"):
        setattr(asyncio, "timeout", _Timeout)  # noqa: B010 - the name is new
        # asyncio raises the class of this name, which is the built-in one since 3.11.
        setattr(asyncio.exceptions, "TimeoutError", TimeoutError)  # noqa: B010
    if not hasattr(builtins, "anext"):
        plain_zip = zip
        added = {
            "aiter": lambda iterable: iterable.__aiter__(),
            "anext": lambda iterator: iterator.__anext__(),
            "zip": lambda *iterables, strict=False: plain_zip(*iterables),
        }
    for name, value in added.items():
        setattr(builtins, name, value)
