"""The tasks in which an asyncio client's handlers run.

A part of the asyncio face. An exception of a handler is logged; a cancellation from
outside and an exit end its task.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, Final

from brokerd_client._common.dispatcher import FailureAnswer, failure_body, log
from brokerd_client._common.tracing import Handling
from brokerd_client.aio.compat import cancelling
from brokerd_client.aio.subscriptions import Message
from brokerd_client.errors import AlreadyAnswered, BrokerdError, Closed, Disconnected
from brokerd_client.protocol.mailbox import ack_body

__all__ = ["RequestJob", "ends_worker", "in_span", "runs", "stored_job"]

#: The usual types of a reply. None of them can be awaited.
_ENCODED: Final = frozenset({bytes, str, dict, list, int, float, bool, type(None)})


def in_span(
    handler: Callable[[Message], object], span: Callable[[Message], Handling]
) -> Callable[[Message], object]:
    """Return a handler that runs in a span of its own for each message."""

    async def handle(message: Message) -> object:
        with span(message):
            result = handler(message)
            return await result if inspect.isawaitable(result) else result

    return handle


class RequestJob:
    """A request handler, as a job: its result is the reply.

    Attributes:
        is_plain: Whether the handler is not a coroutine function. Its job may run outside
            of a task. The coroutine that it may return needs one.
    """

    __slots__ = ("_failure", "_handler", "is_plain")

    def __init__(self, handler: Callable[[Message], object], failure: FailureAnswer) -> None:
        self._handler = handler
        self._failure = failure
        self.is_plain = not inspect.iscoroutinefunction(handler)

    def __call__(self, request: Message) -> Coroutine[Any, Any, None] | None:
        client = request._owner
        if client._is_over(request):
            return None
        try:
            result = self._handler(request)
        except BaseException as error:  # noqa: BLE001 - the coroutine raises it again
            return self._finish(request, None, error)
        if type(result) in _ENCODED and not request._answered:
            # The usual answer of a handler that does not wait needs no coroutine, unless
            # it can't be sent.
            try:
                if client._reply_at_once(request, result):
                    return None
            except BrokerdError:
                pass
        return self._finish(request, result)

    async def _finish(
        self, request: Message, result: object, error: BaseException | None = None
    ) -> None:
        client = request._owner
        returned = False
        task = asyncio.current_task(client._loop)
        assert task is not None
        client._running[request] = task
        try:
            if error is not None:
                raise error
            if inspect.isawaitable(result):
                result = await result
            returned = True
            if client._was_stopped(request, task) or request.cancelled:
                return
            if not request.answered:
                if not client._reply_at_once(request, result):
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
            text, code = self._failure(error)
            if ends_worker(error, task):
                # Its task must not wait any more.
                client._fail_at_once(request, text, code)
                raise
            log().exception("the handler of a request of %s failed", request.sender)
            with contextlib.suppress(AlreadyAnswered, Disconnected, Closed):
                await request.fail(text, code)


def stored_job(handler: Callable[[Message], object]) -> Callable[[Message], object]:
    """Return a job that acknowledges a message from the mailbox: as done when the handler
    returns, as failed when it raises.
    """

    async def settle(message: Message) -> None:
        client = message._owner
        try:
            result = handler(message)
            if inspect.isawaitable(result):
                await result
        except BaseException as error:
            task = asyncio.current_task()
            assert task is not None
            if ends_worker(error, task):
                # The broker delivers it again when the connection ends.
                raise
            if isinstance(error, Closed) and client.closed:
                log().info("a message of %s was not processed: client closed", message.sender)
                return
            log().exception("the handler of message %s of the mailbox failed", message.seq)
            client._settle_at_once(message, failure_body(error))
        else:
            client._settle_at_once(message, ack_body("done"))

    return settle


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
