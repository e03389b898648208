"""The connection of an asyncio client, the task that reconnects, and the waiting calls.

A part of the asyncio face. It moves bytes, runs at the dialog's next deadline and wakes
waiting tasks. All frames sent in one turn of the event loop leave with one system call.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
from asyncio import _get_running_loop as running_loop
from collections.abc import Callable, Mapping
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, TypeVar

from brokerd_client import message
from brokerd_client._common import forks
from brokerd_client._common.client_properties import ClientProperties
from brokerd_client._common.dispatcher import Dispatcher, Job, log
from brokerd_client._common.random_numbers import first_id, jitter, nonce
from brokerd_client.aio.compat import cancelling, create_task, timeout_at, uncancel
from brokerd_client.aio.handlers import ends_worker, request_job
from brokerd_client.aio.subscriptions import BaseSubscription, Message
from brokerd_client.aio.transport import Resolver, Transport, dial
from brokerd_client.aio.waiters import WaitQueue
from brokerd_client.errors import (
    AddressError,
    BrokerdError,
    Closed,
    Disconnected,
    TimedOut,
    WrongLoop,
    WrongProcess,
)
from brokerd_client.message import Receipt
from brokerd_client.protocol.bulk import Bulk
from brokerd_client.protocol.dialog import LINGER_S, Dialog, Effects
from brokerd_client.protocol.inbox import OVERHEAD, STRETCH, InboxMeter
from brokerd_client.protocol.pending import Deadline, within
from brokerd_client.protocol.state import State
from brokerd_client.settings import ENDLESS_S, Settings, broken, check_timeout, no_connection

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BaseClient"]

H = TypeVar("H")
R = TypeVar("R")
S = TypeVar("S", bound=BaseSubscription[Any])

#: Most requests that a client's handler works on at the same time.
_REQUEST_TASKS: Final = 64
#: States in which the socket is read even if the inbox is full.
_ALWAYS_READ: Final = (State.AUTHENTICATING, State.INTRODUCING, State.CLOSING)
#: Seconds between two checks whether a connection that is not read has ended.
_END_CHECK_S: Final = 0.5
#: Seconds by which the dialog may be late with its own deadlines.
_LATENESS_S: Final = 1.0
#: Seconds after its deadline when a call ends, if the dialog has not ended it.
_GRACE_S: Final = 0.05
#: States in which the client has no connection and the dialog knows it.
_WITHOUT_CONNECTION: Final = (State.WAITING, State.GONE, State.CLOSED)
#: Most bytes that are kept until the loop's next turn; more are written at once.
_FLUSH_ABOVE: Final = 64 * 1024


class BaseClient(ClientProperties):
    """One client's dialog with the broker, and the task that keeps it connected.

    Args:
        settings: The settings of the client.
    """

    def __init__(self, settings: Settings) -> None:
        self.allow_pickle_from = settings.allow_pickle_from
        self._settings = settings
        self._addresses = settings.addresses
        self._loop = asyncio.get_running_loop()
        self._thread_id = get_ident()
        self._dialog: Dialog[Message] = Dialog(
            settings.key,
            settings.name,
            first_id(),
            Message,
            without_key=settings.without_key,
            reconnect=settings.reconnect,
            timeout_s=settings.timeout_s,
            wait_s=settings.wait_s,
            addresses=len(settings.addresses),
            give_up_s=settings.give_up_s,
            inbox=settings.inbox,
        )
        self._resolver = Resolver()
        self._transport: Transport | None = None
        #: Every transport whose connection is not closed yet.
        self._transports: set[Transport] = set()
        #: Whether a send can be written at once: the connection is ready and not
        #: paused.
        self._clear = False
        self._clear_waiters: list[asyncio.Future[None]] = []
        self._flushing = False
        self._timer: asyncio.TimerHandle | None = None
        #: The time of the timer; uvloop's handles do not keep a time that has passed.
        self._timer_at = 0.0
        self._warning: asyncio.TimerHandle | None = None
        self._forked = False
        self._meter = InboxMeter(settings.inbox)
        self._subscriptions: set[BaseSubscription[Any]] = set()
        self._inbox: WaitQueue[Message] = self._new_queue()
        self._ordered: WaitQueue[Job] = self._new_queue()
        self._requests: WaitQueue[Job] = self._new_queue()
        self._dispatcher: Dispatcher[Message] = Dispatcher(
            self._inbox, self._ordered, self._requests, request_job
        )
        self._workers: dict[WaitQueue[Job], set[asyncio.Task[None]]] = {
            self._ordered: set(),
            self._requests: set(),
        }
        #: The tasks of the request handlers that run; None after a cancelled request has
        #: stopped its handler.
        self._running: dict[Message, asyncio.Task[None] | None] = {}
        #: Whether close() has cancelled every task of the client.
        self._ended = False
        #: Whether a timer checks the connection while it is not read.
        self._checks_end = False
        #: Whether the task that reconnects has ended.
        self._connect_task_ended = False
        self._ordered.on_put = lambda: self._start_workers(self._ordered, 1)
        self._requests.on_put = lambda: self._start_workers(self._requests, _REQUEST_TASKS)
        self._gone: asyncio.Future[None] = self._loop.create_future()
        forks.register(self)
        self._connect_task = create_task(self._loop, self._keep_connected(), "brokerd client")
        self._connect_task.add_done_callback(self._on_connect_task_done)

    def _after_fork(self) -> None:
        """Disable this copy in a forked child; see brokerd_client._common.forks."""
        self._forked = True
        # Not the id of any thread, so that a send need not check _forked.
        self._thread_id = 0
        for transport in self._transports:
            sock = transport.asyncio_transport.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    os.close(sock.fileno())

    # Sending

    def _check(self) -> None:
        """Raise WrongProcess in a fork, and WrongLoop outside the client's event loop."""
        if self._forked:
            raise WrongProcess(
                "this client belongs to the process that made it: connect again in the child"
            )
        current_loop = running_loop()
        if current_loop is self._loop:
            return
        if current_loop is not None:
            raise WrongLoop(
                "this client belongs to another event loop: connect again in this loop; "
                "if its own loop runs in another thread, use asyncio.run_coroutine_threadsafe"
            )
        # Between two runs of the loop, the loop's own thread may set handlers.
        if get_ident() != self._thread_id or self._loop.is_running():
            raise WrongLoop(
                "this client belongs to the thread of its event loop: elsewhere use"
                " asyncio.run_coroutine_threadsafe, or connect a blocking client"
            )

    def _deadline(self, timeout: float | None) -> float | None:
        """Return the deadline for a timeout in seconds.

        Raises ValueError if it is not valid.
        """
        if timeout is None:
            return None
        limit = check_timeout(timeout)
        return None if limit is None else Deadline(self._loop.time() + limit, limit)

    @property
    def _can_answer(self) -> bool:
        """Whether an answer can be written at once."""
        return (
            self._dialog.may_answer and self._transport is not None and not self._transport.paused
        )

    async def _wait_until_clear(self, timeout: float | None, *, answer: bool = False) -> None:
        """Wait until the client is connected and can write.

        Args:
            timeout: Seconds to wait; None for the timeout of connect().
            answer: Whether it is enough that the connection accepts answers.

        Raises:
            TimedOut: Earlier bytes are still not written.
            Disconnected: The client is not connected.
        """
        self._check()
        if self._clear:
            return
        limit = self._settings.timeout_s if timeout is None else check_timeout(timeout)
        if limit is None:
            limit = ENDLESS_S
        deadline = self._loop.time() + limit
        while not self._clear and not (answer and self._can_answer):
            ready = self._dialog.may_answer if answer else self._dialog.state is State.READY
            if self.closed or self._loop.time() >= deadline:
                if not ready:
                    self._dialog.require_ready()
                if timeout is not None:
                    raise TimedOut(
                        f"send timed out after {limit:g} s: the broker is not reading;"
                        " message not sent"
                    )
            # The broker is not reading now: only the caller's own timeout counts.
            await self._wait_for_change(
                None if ready and timeout is None else deadline - self._loop.time()
            )

    async def _until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until the condition holds; return whether it does in time (seconds)."""
        deadline = self._loop.time() + timeout
        while not condition():
            remaining = deadline - self._loop.time()
            if remaining <= 0:
                return False
            await self._wait_for_change(remaining)
        return True

    async def _wait_for_change(self, timeout: float | None) -> None:
        waiter = self._loop.create_future()
        self._clear_waiters.append(waiter)
        try:
            await asyncio.wait([waiter], timeout=timeout)
        finally:
            with contextlib.suppress(ValueError):
                self._clear_waiters.remove(waiter)

    def _write(self) -> None:
        """Schedule the writing of the dialog's frames: all frames of this turn at once."""
        if self._dialog.untaken > _FLUSH_ABOVE:
            self._flush()
        elif not self._flushing and self._dialog.untaken:
            # In this order: a signal handler's exception in between costs a needless
            # flush. In the other order it would prevent all later flushes.
            self._loop.call_soon(self._flush)
            self._flushing = True

    def _flush(self) -> None:
        # Cleared here, so that a callback that the loop lost to an interrupt is missed
        # only once.
        self._flushing = False
        transport = self._transport
        if transport is None or not self._dialog.untaken:
            return
        try:
            data = self._dialog.data_to_send()
            transport.unwritten += len(data)
            transport.asyncio_transport.write(data)
            # A closing transport did not take the bytes: the connection was lost, and
            # connection_lost will report it.
            if not transport.paused and not transport.asyncio_transport.is_closing():
                self._on_writable(transport)
        except BaseException as error:  # noqa: BLE001 - a bug, or an exit, which _on_bug raises again
            # A part of the frame may have been sent: the broker would take the next
            # frame for the rest of it.
            self._on_bug(transport, error)

    async def _outcome(
        self, call: asyncio.Future[Any], message_id: int, deadline: float | None
    ) -> Any:
        """Write the queued frames; return the call's outcome, or raise it if it is an
        error.
        """
        timer: asyncio.TimerHandle | None = None
        try:
            self._write()
            self._schedule()
            if self._meter.full:
                self._update_reading()
            if deadline is not None and not call.done():
                # The dialog's own deadline expires first, unless it has lost the call.
                timer = self._loop.call_at(deadline + _GRACE_S, _expire, call, message_id, deadline)
            return await call
        finally:
            if timer is not None:
                timer.cancel()
            self._abandon(call, message_id)

    def _abandon(self, call: asyncio.Future[Any], message_id: int) -> None:
        """Drop a call whose outcome is not awaited any more."""
        if not call.done():
            call.cancel()
        elif not call.cancelled():
            # Mark the exception as retrieved.
            call.exception()
        self._dialog.abandon(message_id)
        self._write()

    def _send_at_once(
        self, to: str, number: int, body: bytes, extension: Mapping[str, Any] | None
    ) -> int | None:
        """Send a message if that needs no wait; return its id, or None."""
        if not self._clear or get_ident() != self._thread_id or not self._loop.is_running():
            return None
        message_id = self._dialog.send(to, number, body, extension)
        self._write()
        return message_id

    def _publish_at_once(
        self, topic: str, number: int, body: bytes, extension: Mapping[str, Any] | None
    ) -> int | None:
        """Publish an event if that needs no wait; return its id, or None."""
        if not self._clear or get_ident() != self._thread_id or not self._loop.is_running():
            return None
        message_id = self._dialog.publish(topic, number, body, extension)
        self._write()
        return message_id

    async def _put(self, timeout: float | None, put: Callable[..., R], *args: Any) -> R:
        """Queue frames with ``put`` once they can be written; return its result."""
        await self._wait_until_clear(timeout)
        result = put(*args)
        self._write()
        return result

    async def _put_many(self, timeout: float | None, bulk: Bulk) -> list[int]:
        """Queue messages once they can be written; return their ids."""
        check_timeout(timeout)
        return await self._put(timeout, self._dialog.send_many, *bulk)

    async def _ask(self, timeout: float | None, put: Callable[..., int], *args: Any) -> Any:
        """Queue a frame with ``put(*args, call, deadline)`` and return its outcome."""
        deadline = self._deadline(timeout)
        if not self._clear or get_ident() != self._thread_id or not self._loop.is_running():
            await self._wait_until_clear(timeout)
        call = self._loop.create_future()
        return await self._outcome(call, put(*args, call, deadline), deadline)

    async def _ask_many(self, timeout: float | None, bulk: Bulk) -> list[Receipt | BrokerdError]:
        """Queue messages that ask for receipts; return the outcome of each."""
        to, codecs, bodies = bulk
        deadline = self._deadline(timeout)
        await self._wait_until_clear(timeout)
        calls: list[asyncio.Future[Any]] = [self._loop.create_future() for _ in to]
        put = self._dialog.send_for_receipt
        ids = [
            put(recipient, number, body, None, call, deadline)
            for recipient, number, body, call in zip(to, codecs, bodies, calls)
        ]
        outcomes: list[Receipt | BrokerdError] = []
        try:
            for call, message_id in zip(calls, ids):
                try:
                    outcomes.append(await self._outcome(call, message_id, deadline))
                except BrokerdError as error:
                    outcomes.append(error)
        finally:
            for call, message_id in zip(calls[len(outcomes) :], ids[len(outcomes) :]):
                self._abandon(call, message_id)
        return outcomes

    async def _answer(self, request: message.Message, put: Callable[..., None], *args: Any) -> None:
        """Queue the answer to a request with ``put``, once it can be written."""
        request.require_unanswered()
        if self._dialog.needs_no_answer(request):
            return
        await self._wait_until_clear(None, answer=True)
        request.require_unanswered()
        put(*args)
        self._write()
        request.mark_answered()

    def _fail_at_once(self, request: Message, text: str) -> None:
        """Answer a request with an error, if that is possible without waiting."""
        if self._can_answer and not request.answered:
            self._dialog.fail(request.sender, request.id, "failed", text)
            self._write()
            request.mark_answered()

    def _handle(self, handle: Callable[[H], None], handler: H) -> H:
        """Set a handler of the dispatcher with ``handle``; return the handler."""
        self._check()
        handle(handler)
        if handle == self._dispatcher.handle_requests:
            self._dialog.limit_in_flight(_REQUEST_TASKS)
            self._write()
        return handler

    # Receiving

    def __aiter__(self) -> Self:
        """Yield messages, and requests if no request handler is set, until the client
        is closed.
        """
        return self

    async def __anext__(self) -> Message:
        self._check()
        try:
            return self._inbox.take_now()
        except IndexError:
            pass
        try:
            return await self._inbox.take(None)
        except Closed:
            raise StopAsyncIteration from None

    async def _open(self, subscription: S, timeout: float | None) -> S:
        """Begin a subscription or a watch, and wait for the broker's confirmation."""
        deadline = self._deadline(timeout)
        await self._wait_until_clear(timeout)
        call = self._loop.create_future()
        message_id = subscription._begin(call, deadline)
        self._subscriptions.add(subscription)
        try:
            await self._outcome(call, message_id, deadline)
        except BaseException:
            # A cancelled task may have its answer already: the subscription exists, at
            # the broker too.
            self._drop(subscription, None, None)
            raise
        return subscription

    async def _unsubscribe(self, subscription: BaseSubscription[Any]) -> None:
        """End a subscription or a watch, and wait for the broker's confirmation."""
        self._check()
        call = self._loop.create_future()
        deadline = self._deadline(self._settings.timeout_s)
        message_id = self._drop(subscription, call, deadline)
        if message_id is not None:
            # With any answer, and without an answer, no more events come.
            with contextlib.suppress(Disconnected, Closed, TimedOut):
                await self._outcome(call, message_id, deadline)

    def _drop(
        self,
        subscription: BaseSubscription[Any],
        call: asyncio.Future[Any] | None,
        deadline: float | None,
    ) -> int | None:
        """End a subscription or a watch; return the id of the request to the broker."""
        message_id = subscription._end(call, deadline)
        subscription.queue.end(Closed(subscription._end_reason))
        self._subscriptions.discard(subscription)
        self._write()
        return message_id

    def _is_over(self, request: Message) -> bool:
        """Return whether no requester waits for a request that no handler has begun."""
        return self._dialog.is_over(request, self._loop.time())

    def _was_stopped(self, request: Message, task: asyncio.Task[None]) -> bool:
        """Return whether the request's cancellation has stopped its handler; take that
        cancellation of the task back.
        """
        stopped = self._running.pop(request, task) is None
        if stopped:
            uncancel(task)
        return stopped

    # Closing

    async def _drain(self, timeout: float | None) -> bool:
        """Finish the work in progress, then close; return whether all was finished."""
        deadline = self._deadline(timeout)
        self._check()
        finished = False
        try:
            self._dialog.stop_requests()
            self._write()
            if self._dialog.state is State.READY:
                with contextlib.suppress(BrokerdError):
                    # Behind the answer to this, no further request comes.
                    await self._ask(timeout, self._dialog.control, "ping", {})
            current_task = asyncio.current_task()
            while not self.closed:
                self._give_back_waiting()
                busy = {
                    task
                    for workers in self._workers.values()
                    for task in workers
                    if task is not current_task
                }
                remaining = None if deadline is None else deadline - self._loop.time()
                finished = not busy and not self._ordered.inbox.items
                if finished or (remaining is not None and remaining <= 0):
                    break
                pause = _END_CHECK_S if remaining is None else min(remaining, _END_CHECK_S)
                if busy:
                    await asyncio.wait(busy, timeout=pause)
                else:
                    await asyncio.sleep(0)
        finally:
            await self._close()
        return finished

    def _give_back_waiting(self) -> None:
        """Return the requests that no handler has begun."""
        if self._dialog.may_answer and self._dialog.returns_requests:
            for request in self._dispatcher.take_requests():
                if not self._dialog.needs_no_answer(request):
                    self._dialog.give_back(request.sender, request.id)
                    request.mark_answered()
            self._write()

    async def wait_until_ready(self) -> None:
        """Wait for the first introduction.

        Raises:
            TimedOut: The connection was not made in time.
            BrokerdError: The reason why the connection was not made.
        """
        self._check()
        limit = max(self._settings.timeout_s, self._settings.wait_s)
        # The dialog's own deadline expires first.
        if not await self._until(lambda: not self._dialog.beginning, limit + _LATENESS_S):
            raise TimedOut(f"no connection to {self._broker_address} within {limit:g} s")
        if self._dialog.state is State.GONE and self._dialog.reason is not None:
            raise self._dialog.reason

    async def _close(self) -> None:
        """Close the connection and end every task of the client."""
        if self._forked:
            return
        self._check()
        try:
            await self._close_connection()
        finally:
            self._ended = True
            self._stop_timer()
            for transport in self._transports:
                transport.abort()
            current_task = asyncio.current_task()
            tasks = {
                self._connect_task,
                *(task for workers in self._workers.values() for task in workers),
            } - {current_task}
            for task in tasks:
                task.cancel()
            self._dispatcher.log_failures(self._loop.time())
            self._warn_of_more()
        await asyncio.wait(
            [*tasks, *(transport.closed for transport in self._transports)], timeout=LINGER_S
        )

    async def _close_connection(self) -> None:
        try:
            if self._dialog.may_answer:
                self._flush()
                await self._until(lambda: not self._dialog.may_answer or self._can_answer, LINGER_S)
        finally:
            # Cancelled or not: from here on the client is closed, and every task that
            # waits gets Closed.
            was_open = self._dialog.may_answer
            self._apply(self._dialog.close(self._loop.time()))
            self._note_state()
            for queue in (self._inbox, self._requests):
                queue.inbox.clear()
            self._dispatcher.drop_jobs()
        if self._dialog.state is State.CLOSING and self._transport is not None:
            self._update_reading()
            self._schedule()
            if was_open and self._transport.asyncio_transport.can_write_eof():
                with contextlib.suppress(OSError):
                    self._transport.asyncio_transport.write_eof()
            await asyncio.wait([self._transport.closed], timeout=LINGER_S)

    # Events of the connection

    def _on_open(self, transport: Transport) -> None:
        self._transports.add(transport)
        if self._dialog.state is not State.CONNECTING:
            transport.abort()
            return
        self._transport = transport
        self._dialog.opened(nonce(), transport.bindings)
        self._schedule()

    def _on_data(self, transport: Transport, data: bytes) -> None:
        if transport is not self._transport or self._forked:
            return
        before = self._dialog.state
        effects = self._dialog.receive(data, self, self._loop.time())
        self._apply(effects)
        if effects.broken is None:
            self._flush()
            if self._dialog.state is not before:
                self._note_state()
            self._update_reading()

    def _on_writable(self, transport: Transport) -> None:
        if transport is self._transport:
            if not transport.paused:
                self._dialog.wrote(transport.unwritten)
                transport.unwritten = 0
            if self._clear is transport.paused:
                self._note_state()

    def _on_lost(self, transport: Transport, error: Exception | None) -> None:
        self._transports.discard(transport)
        if transport is self._transport and not self._forked:
            if isinstance(error, OSError):
                self._lose(broken(error))
            elif error is not None:
                self._lose(Disconnected(f"the connection broke: {error}"))
            else:
                self._lose(self._dialog.closed_by_broker())

    def _on_bug(self, transport: Transport | None, error: BaseException) -> None:
        """Log an unexpected exception and drop the connection; the next one may work.

        KeyboardInterrupt and SystemExit are raised again, for the event loop.
        """
        exits = isinstance(error, (KeyboardInterrupt, SystemExit))
        if not exits:
            log().error("connection lost: unexpected error", exc_info=error)
        if transport is not None:
            transport.abort()
        if not self._forked and (transport is self._transport or self._transport is None):
            reason = Disconnected(f"the connection broke: {type(error).__name__}: {error}")
            reason.__cause__ = error
            self._lose(reason)
        if exits:
            raise error

    def _lose(self, reason: BrokerdError) -> None:
        """Drop the connection, which may be lost already; do nothing if there is none."""
        before = self._dialog.state
        if before in (State.IDLE, State.WAITING, State.GONE):
            return
        transport, self._transport = self._transport, None
        doubtful = 0
        try:
            if transport is not None:
                doubtful = transport.unwritten
                transport.abort()
            effects = self._dialog.lost(reason, self._loop.time(), jitter(), doubtful=doubtful)
            self._stop_timer()
            self._apply(effects)
        except Exception as error:  # noqa: BLE001 - a bug; the client must not look alive after it
            log().exception("unexpected error while a lost connection was dropped")
            if self._dialog.state not in _WITHOUT_CONNECTION:
                self._give_up(error)
        self._note_state()
        if self._dialog.state is State.WAITING and self._connect_task_ended:
            self._give_up(reason)
        if not self._gone.done():
            self._gone.set_result(None)

    def _on_connect_task_done(self, task: asyncio.Task[None]) -> None:
        """End the client when its reconnecting task was cancelled from outside, or had
        a bug.
        """
        self._connect_task_ended = True
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit)):
            log().error("client ended: unexpected error in its reconnecting task", exc_info=error)
        if self._transport is None and not self._forked and not self.closed:
            self._give_up(error)

    def _give_up(self, error: BaseException | None) -> None:
        """End the client permanently; every waiting call raises Disconnected."""
        reason = Disconnected(
            f"the client no longer reconnects: {error or 'its task was cancelled'}"
        )
        reason.__cause__ = error
        self._dialog.state, self._dialog.reason = State.GONE, reason
        for pending in self._dialog.pending_calls.clear():
            if pending.waiter is not None and not pending.waiter.done():
                pending.waiter.set_exception(reason)
        self._note_state()

    def _apply(self, effects: Effects[Message]) -> None:
        """Deliver the dialog's effects: outcomes, messages, events, ended
        subscriptions, errors.
        """
        for request in effects.cancelled:
            task = self._running.get(request)
            if task is not None:
                self._running[request] = None
                task.cancel()
        for call, value in effects.outcomes:
            if not call.done():
                if isinstance(value, BaseException):
                    call.set_exception(value)
                else:
                    call.set_result(value)
        if not self.closed or self._dialog.state is State.GONE:
            if effects.messages:
                self._dispatcher.dispatch_messages(
                    effects.messages, effects.size + OVERHEAD * len(effects.messages)
                )
            if effects.events:
                self._dispatcher.dispatch_events(effects.events)
        for subscription, reason in effects.ended:
            subscription.queue.end(reason)
            self._subscriptions.discard(subscription)
        for error in effects.undelivered:
            self._dispatcher.tell_undelivered(error, self._loop.time())
        self._dispatcher.tell_changes(effects.changes)
        self._dispatcher.report(effects, self._loop.time())
        deadline = self._dispatcher.warning_due
        if deadline is not None:
            if self._dialog.state in (State.CLOSED, State.GONE):
                # No more warnings will follow, and the loop may end before this one is
                # due.
                self._warn_of_more()
            elif self._warning is None:
                self._warning = self._loop.call_at(deadline, self._warn_of_more)
        if effects.broken is not None:
            # The peer may have to be told that it was rejected.
            self._flush()
            self._lose(effects.broken)

    def _warn_of_more(self) -> None:
        """Log the undelivered messages that have only been counted until now."""
        if self._warning is not None:
            self._warning.cancel()
            self._warning = None
        if not self._forked:
            self._dispatcher.warn_of_more(self._loop.time())

    def _note_state(self) -> None:
        """Wake the tasks that wait for the connection, and end the wait queues if it is
        gone.
        """
        state = self._dialog.state
        self._clear = (
            state is State.READY and self._transport is not None and not self._transport.paused
        )
        if self.closed:
            is_gone = state is State.GONE
            for queue in self._queues():
                queue.end(self._dialog.gone() if is_gone else Closed("the client is closed"))
            self._subscriptions.clear()
        for waiter in self._clear_waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _queues(self) -> list[WaitQueue[Any]]:
        return [
            self._inbox,
            self._ordered,
            self._requests,
            *(subscription.queue for subscription in self._subscriptions),
        ]

    def _new_queue(self) -> WaitQueue[Any]:
        return WaitQueue(self._meter, self._resume_reading)

    def _resume_reading(self) -> None:
        if self._meter.full:
            self._update_reading()

    def _update_reading(self) -> None:
        """Start or stop reading, according to the room in the inbox (backpressure)."""
        transport = self._transport
        if transport is None:
            return
        limit = self._meter.limit
        over = self._meter.held > limit and self._meter.weigh(
            (queue.inbox for queue in self._queues()), limit=limit
        )
        self._meter.full = over
        stretched = len(self._dialog.pending_calls) > 0 and self._meter.held <= STRETCH * limit
        # The handshake and the introduction are read even if the inbox is full: the
        # connection is not usable without them.
        reading = not over or stretched or transport.ended or self._dialog.state in _ALWAYS_READ
        if reading is not transport.reading:
            transport.reading = reading
            if reading:
                transport.asyncio_transport.resume_reading()
            else:
                transport.asyncio_transport.pause_reading()
                if not self._checks_end:
                    self._checks_end = True
                    self._loop.call_later(_END_CHECK_S, self._check_for_end)

    def _check_for_end(self) -> None:
        """Read the rest of a connection that ended while it was not read.

        The client can reconnect only after that.
        """
        transport = self._transport
        if transport is None or transport.reading:
            self._checks_end = False
            return
        try:
            if transport.has_ended():
                self._update_reading()
            self._loop.call_later(_END_CHECK_S, self._check_for_end)
        except BaseException as error:  # noqa: BLE001 - a bug, or an exit, which _on_bug raises again
            self._checks_end = False
            self._on_bug(transport, error)

    def _schedule(self) -> None:
        """Set the timer to the dialog's next deadline.

        The reconnecting task times connecting and waiting itself.
        """
        if self._dialog.state in (State.CONNECTING, State.WAITING, State.GONE, State.CLOSED):
            return
        deadline = self._dialog.next_deadline()
        if self._timer is not None:
            if deadline is not None and self._timer_at <= deadline:
                return
            self._stop_timer()
        if deadline is not None:
            self._timer_at = deadline
            self._timer = self._loop.call_at(deadline, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if self._forked:
            return
        try:
            self._apply(self._dialog.tick(self._loop.time()))
            self._flush()
            self._schedule()
        except BaseException as error:  # noqa: BLE001 - a bug, or an exit, which _on_bug raises again
            self._on_bug(self._transport, error)

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _start_workers(self, queue: WaitQueue[Job], max_tasks: int) -> None:
        """Start tasks that do the queue's jobs, ``max_tasks`` of them at most."""
        workers = self._workers[queue]
        missing = min(max_tasks - len(workers), len(queue.inbox.items))
        while missing > 0 and queue.inbox.items:
            task = create_task(self._loop, self._work(queue), "brokerd handler")
            if task.done():
                # create_task itself has run the task (asyncio.eager_task_factory), and
                # it is over: at least one job is done.
                continue
            workers.add(task)
            task.add_done_callback(lambda done: self._on_worker_done(queue, done))
            missing -= 1

    async def _work(self, queue: WaitQueue[Job]) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            while True:
                function, item = queue.take_now()
                try:
                    result = function(item)
                    if inspect.isawaitable(result):
                        await result
                except BaseException as error:
                    if ends_worker(error, task):
                        raise
                    log().exception("a handler failed")
                del function, item
        except IndexError:
            # At once, not when the task is done: items added in between must be able to
            # start a new task.
            self._workers[queue].discard(task)

    def _on_worker_done(self, queue: WaitQueue[Job], task: asyncio.Task[None]) -> None:
        """Start another worker for the jobs that a cancelled worker has left.

        None is started when all tasks are being cancelled.
        """
        self._workers[queue].discard(task)
        if not task.cancelled():
            # An exit, which has left the loop already; this marks it as retrieved.
            task.exception()
        ending = self._ended or (
            task.cancelled() and (self._connect_task.done() or cancelling(self._connect_task) > 0)
        )
        if queue.inbox.items and queue.on_put is not None and not ending:
            queue.on_put()

    async def _keep_connected(self) -> None:
        """Connect, and reconnect for as long as the dialog requires it."""
        task = asyncio.current_task()
        assert task is not None
        while True:
            self._dialog.dialing(self._loop.time())
            self._gone = self._loop.create_future()
            try:
                async with timeout_at(self._dialog.next_deadline()):
                    await self._dial()
            except TimeoutError:
                if self._dialog.state is State.CONNECTING:
                    limit = f"{self._dialog.limit_s:.6g} s"
                    self._lose(TimedOut(f"no connection to {self._broker_address} within {limit}"))
            except (OSError, AddressError) as error:
                self._lose(
                    error
                    if isinstance(error, AddressError)
                    else no_connection(self._broker_address, error)
                )
            except BaseException as error:
                # A bug; the tasks that wait for the connection must get the error.
                if ends_worker(error, task):
                    raise
                log().exception("connecting failed: unexpected error")
                cause = (
                    error
                    if isinstance(error, Exception)
                    else RuntimeError(f"{type(error).__name__}: {error}")
                )
                reason = no_connection(self._broker_address, cause)
                reason.__cause__ = error
                self._lose(reason)
            await self._gone
            if self._dialog.state is not State.WAITING:
                return
            await asyncio.sleep(max(0.0, self._dialog.retry_at - self._loop.time()))

    async def _dial(self) -> None:
        """Connect, TLS included. Raises OSError, AddressError."""
        address, context = self._broker_address, self._settings.tls
        if context is None:
            await dial(address, lambda: Transport(self), self._resolver)
        else:
            # Imported here because loading it is slow.
            from brokerd_client.aio.tls_transport import dial_tls

            await dial_tls(address, context, self, self._resolver)


def _expire(call: asyncio.Future[Any], message_id: int, deadline: float) -> None:
    if not call.done():
        call.set_exception(TimedOut(f"no answer to {message_id} {within(deadline)}"))
