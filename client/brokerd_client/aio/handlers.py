"""The tasks in which an asyncio client's handlers run.

A part of the asyncio face. An exception of a handler is logged; a cancellation from
outside and an exit end its task.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable
from typing import Any

from brokerd_client._common.dispatcher import log
from brokerd_client.aio.compat import cancelling
from brokerd_client.aio.subscriptions import Message
from brokerd_client.errors import AlreadyAnswered, Closed, Disconnected

__all__ = ["ends_worker", "request_job", "runs"]


def request_job(handler: Callable[[Message], object]) -> Callable[[Message], object]:
    """Return a job that answers a request with the handler's result."""

    async def answer(request: Message) -> None:
        client = request._owner
        if client._is_over(request):
            return
        result: object = None
        returned = False
        task = asyncio.current_task()
        assert task is not None
        client._running[request] = task
        try:
            result = handler(request)
            if inspect.isawaitable(result):
                result = await result
            returned = True
            if client._was_stopped(request, task) or request.cancelled:
                return
            if not request.answered:
                await request.reply(result)
            elif result is not None:
                log().warning(
                    "the handler of a request of %s returned a value after it had answered",
                    request.sender,
                )
        except BaseException as error:
            stopped = client._was_stopped(request, task)
            if isinstance(error, GeneratorExit) and not runs(task):
                raise
            if stopped and isinstance(error, asyncio.CancelledError) and not cancelling(task):
                # Its requester does not wait for the answer any more.
                return
            if returned and isinstance(error, (Disconnected, Closed)):
                log().warning(
                    "a request of %s could not be answered: the connection is gone", request.sender
                )
                return
            if isinstance(error, Closed) and client.closed:
                log().info("a request of %s was not finished: client closed", request.sender)
                return
            text = f"the handler failed: {type(error).__name__}"
            if ends_worker(error, task):
                # Its task must not wait any more.
                client._fail_at_once(request, text)
                raise
            log().exception("the handler of a request of %s failed", request.sender)
            with contextlib.suppress(AlreadyAnswered, Disconnected, Closed):
                await request.fail(text)

    return answer


def ends_worker(error: BaseException, task: asyncio.Task[Any]) -> bool:
    """Return whether an exception must end the task instead of being logged.

    That is so for exits meant for the event loop, and for a cancellation from outside.
    A task that is dropped gets GeneratorExit from outside, and is not running then.
    """
    if isinstance(error, asyncio.CancelledError):
        return cancelling(task) > 0
    if isinstance(error, GeneratorExit):
        return not runs(task)
    return isinstance(error, (KeyboardInterrupt, SystemExit))


def runs(task: asyncio.Task[Any]) -> bool:
    """Return whether the calling code runs in this task."""
    try:
        return asyncio.current_task() is task
    except RuntimeError:
        return False
