"""Whose turn it is: the locks of connections and listeners, which an exception may leave at any bytecode.

``with turn:`` gives the lock back after every exception inside its block. Between the block's end and the call of
``__exit__`` is one place where it does not; :func:`release_if_held`, called by a handler around it, closes that gap.
Because the lock knows its thread, a call from a signal handler that interrupts another call is refused, and never waits
for the very call that it interrupts.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import NoReturn, Protocol, cast

__all__ = ["Turn", "new_turn", "refuse_nested_call", "release_if_held"]


class Turn(Protocol):
    """What is used of a threading.RLock."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...

    def release(self) -> None: ...

    def _is_owned(self) -> bool: ...

    def __enter__(self) -> bool: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...


def new_turn() -> Turn:
    """Return a lock that no thread holds."""
    return cast("Turn", threading.RLock())


def release_if_held(turn: Turn) -> None:
    """Release the lock if this thread still holds it."""
    if turn._is_owned():
        turn.release()


def refuse_nested_call(act: str) -> NoReturn:
    """Raise RuntimeError: this call interrupts a call of the same kind, from a signal handler for instance."""
    raise RuntimeError(f"nested {act}: this thread is in the middle of another {act} on the same object")
