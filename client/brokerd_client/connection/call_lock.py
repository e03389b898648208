"""The locks of connections and listeners, which survive an exception at any bytecode.

``with lock:`` releases the lock after every exception inside its block. An exception
between the block's end and the call of ``__exit__`` would leave it held. An exception
handler around the block closes that gap with :func:`release_if_held`. The lock knows
its thread. A signal handler's call that interrupts another call is therefore refused,
and never waits for the call that it interrupts.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import NoReturn, Protocol, cast

__all__ = ["CallLock", "new_call_lock", "refuse_nested_call", "release_if_held"]


class CallLock(Protocol):
    """The methods of threading.RLock that are used here.

    Its declared type does not have ``_is_owned``.
    """

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...

    def release(self) -> None: ...

    def _is_owned(self) -> bool: ...

    def __enter__(self) -> bool: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...


def new_call_lock() -> CallLock:
    """Return a lock that no thread holds."""
    return cast("CallLock", threading.RLock())


def release_if_held(lock: CallLock) -> None:
    """Release the lock if this thread still holds it."""
    if lock._is_owned():
        lock.release()


def refuse_nested_call(act: str) -> NoReturn:
    """Raise RuntimeError, because this call interrupts a call of the same kind.

    A signal handler can do that, for example.
    """
    raise RuntimeError(
        f"nested {act}: this thread is in the middle of another {act} on the same object"
    )
