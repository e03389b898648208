"""Work in a thread while the event loop serves on; a process that ends does not wait
for it.

Python waits for the threads of asyncio's own pool when a program ends. One read from a
disk that does not answer would keep a daemon from ending.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["run_in_thread"]

_Result = TypeVar("_Result")


async def run_in_thread(
    work: Callable[[], _Result], *, discard: Callable[[_Result], None] | None = None
) -> _Result:
    """Return or raise the result of ``work()``, which runs in a thread of its own.

    discard: receives the result if the caller was cancelled in the meantime.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_Result] = loop.create_future()

    def tell(result: _Result | None, error: BaseException | None) -> None:
        if done.cancelled():
            if error is None and discard is not None:
                discard(result)  # type: ignore[arg-type]  # without an error it is a result
        elif error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # without an error it is a result

    def run() -> None:
        result, failed = None, None
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - any error must reach the caller
            failed = error
        try:
            loop.call_soon_threadsafe(tell, result, failed)
        except RuntimeError:
            # The loop is closed: the result has no recipient.
            if failed is None and discard is not None:
                discard(result)  # type: ignore[arg-type]  # without an error it is a result

    threading.Thread(target=run, name="run_in_thread", daemon=True).start()
    return await done
