"""The connection of an asyncio client, the task that reconnects, and the waiting calls.

A part of the asyncio face. It moves bytes, runs at the dialog's next deadline and wakes
waiting tasks. All frames sent in one turn of the event loop leave with one system call;
those of the tasks that one read wakes leave in batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
from asyncio import _get_running_loop as running_loop
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from functools import partial
from itertools import repeat
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, TypeVar

from brokerd_client import message
from brokerd_client._common import forks
from brokerd_client._common.client_properties import ClientProperties
from brokerd_client._common.dispatcher import Dispatcher, Job, log
from brokerd_client._common.random_numbers import first_id, jitter, nonce
from brokerd_client._common.rpc import Service
from brokerd_client.address import Address
from brokerd_client.aio.channels import begin_channel
from brokerd_client.aio.compat import WaitTimeout, cancelling, create_task, timeout_at, uncancel
from brokerd_client.aio.handlers import RequestJob, ends_worker, stored_job
from brokerd_client.aio.streams import Stream
from brokerd_client.aio.subscriptions import BaseSubscription, Message
from brokerd_client.aio.transport import Resolver, Transport, dial
from brokerd_client.aio.waiters import WaitQueue
from brokerd_client.aio.wakeups import Wakeups
from brokerd_client.codec import encode
from brokerd_client.errors import (
    AddressError,
    BrokerdError,
    Closed,
    Disconnected,
    Elsewhere,
    TimedOut,
    TlsError,
    WrongLoop,
    WrongProcess,
)
from brokerd_client.message import VALUE_COST, Receipt
from brokerd_client.protocol.bulk import Bulk
from brokerd_client.protocol.dialog import LINGER_S, Dialog, Effects
from brokerd_client.protocol.inbox import OVERHEAD, STRETCH, InboxMeter
from brokerd_client.protocol.mailbox import ack_body
from brokerd_client.protocol.pending import Deadline, within
from brokerd_client.protocol.state import State
from brokerd_client.settings import (
    ENDLESS_S,
    Settings,
    broken,
    channel_routes,
    check_timeout,
    no_connection,
    same_kind,
)
from brokerd_client.wire.envelope import check_address
from brokerd_client.wire.first_frames import OPEN_ID, join_frame, open_frame
from brokerd_client.wire.layout import REPLY_KIND, REQUEST_KIND

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BaseClient"]

H = TypeVar("H")
R = TypeVar("R")
S = TypeVar("S", bound=BaseSubscription[Any])
WorkerDone = Callable[[asyncio.Task[None]], object]

#: Requests that a client's handler works on at the same time, unless ``handlers`` says
#: otherwise.
_DEFAULT_HANDLERS: Final = 256
#: Kept in a name, because looking up an enum member takes long.
_READY: Final = State.READY
#: States in which the socket is read even if the inbox is full.
_ALWAYS_READ: Final = (State.AUTHENTICATING, State.INTRODUCING, State.CLOSING)
#: Seconds between two checks whether a connection that is not read has ended.
_END_CHECK_S: Final = 0.5
#: Seconds by which the dialog may be late with its own deadlines.
_LATENESS_S: Final = 1.0
#: Seconds between two searches for calls that the dialog has not ended in time.
_OVERDUE_CHECK_S: Final = 0.5
#: States in which the client has no connection and the dialog knows it.
_WITHOUT_CONNECTION: Final = (State.WAITING, State.GONE, State.CLOSED)
#: Most bytes that are kept until the loop's next turn; more are written at once.
_FLUSH_ABOVE: Final = 64 * 1024
#: Frames of the tasks and jobs that a read wakes which are written at once, if more than
#: so many tasks or jobs follow. The broker and the other clients then work on them
#: meanwhile. If all frames were written at the end, one process at a time would work.
_BATCH: Final = 32


class BaseClient(ClientProperties):
    """One client's dialog with the broker, and the task that keeps it connected.

    Args:
        settings: The settings of the client.
    """

    def __init__(self, settings: Settings) -> None:
        self.allow_pickle_from = settings.allow_pickle_from
        self.json_codec = settings.json_codec
        self._service = Service(allow_async=True)
        self._settings = settings
        self._addresses = settings.addresses
        self._handlers = settings.handlers or _DEFAULT_HANDLERS
        self._loop = asyncio.get_running_loop()
        self._thread_id = get_ident()
        #: The thread that now runs tasks which a read has woken; 0 if none does. And
        #: whether that is a single task.
        self._waking_thread = 0
        self._wakes_one = False
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
            window=settings.window,
            window_bytes=settings.window_bytes,
            usable=lambda addresses: same_kind(addresses, settings),
        )
        #: Its counts of bytes, which each send compares.
        self._encoder = self._dialog.encoder
        self._resolver = Resolver()
        self._transport: Transport | None = None
        #: Every transport whose connection is not closed yet.
        self._transports: set[Transport] = set()
        #: Whether a send can be written at once: the connection is ready and not
        #: paused.
        self._clear = False
        self._clear_waiters: list[asyncio.Future[None]] = []
        self._flushing = False
        #: Frames queued since the last read, and whether the next frame is probably
        #: alone between two reads, as the previous frame was.
        self._frames = 0
        self._alone = False
        #: The callbacks of this turn and the next one, of asyncio's own loops.
        self._scheduled: Sequence[object] = getattr(self._loop, "_ready", ())
        #: The calls that have a deadline, by id.
        self._calls: dict[int, tuple[asyncio.Future[Any], float]] = {}
        #: Whether a timer searches for overdue calls.
        self._checks_calls = False
        self._timer: asyncio.TimerHandle | None = None
        #: The time of the timer; uvloop's handles do not keep a time that has passed.
        self._timer_at = 0.0
        self._warning: asyncio.TimerHandle | None = None
        self._forked = False
        self._meter = InboxMeter(settings.inbox)
        self._wakeups = Wakeups(self._loop)
        self._subscriptions: set[BaseSubscription[Any]] = set()
        self._inbox: WaitQueue[Message] = self._new_queue()
        self._ordered: WaitQueue[Job] = self._new_queue()
        self._requests: WaitQueue[Job] = self._new_queue()
        self._dispatcher: Dispatcher[Message] = Dispatcher(
            self._inbox, self._ordered, self._requests, RequestJob, stored_job
        )
        #: Whether the program has begun to receive messages.
        self._receives = False
        #: The tasks that empty each queue, and what is called if one ends before that.
        self._workers: dict[WaitQueue[Job], dict[asyncio.Task[None], WorkerDone]] = {
            self._ordered: {},
            self._requests: {},
        }
        #: A task for each queue that has done all its jobs, and waits at the future for
        #: more. It does them sooner than a new task.
        self._idle_workers: dict[
            WaitQueue[Job], tuple[asyncio.Task[None], WorkerDone, asyncio.Future[None]]
        ] = {}
        #: The tasks of the request handlers that run; None after a cancelled request has
        #: stopped its handler.
        self._running: dict[Message, asyncio.Task[None] | None] = {}
        #: Whether close() has cancelled every task of the client.
        self._ended = False
        #: Whether a timer checks the connection while it is not read.
        self._checks_end = False
        #: Whether the task that reconnects has ended.
        self._connect_task_ended = False
        self._ordered.on_put = partial(self._start_workers, self._ordered, 1)
        self._requests.on_put = partial(self._start_workers, self._requests, self._handlers)
        self._gone: asyncio.Future[None] = self._loop.create_future()
        forks.register(self)
        self._connect_task = create_task(self._loop, self._keep_connected(), "brokerd client")
        self._connect_task.add_done_callback(self._on_connect_task_done)

    def _after_fork(self) -> None:
        """Disable this copy in a forked child; see brokerd_client._common.forks."""
        self._forked = True
        # Never set again, so that a send need not check _forked.
        self._clear = False
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

    def _is_elsewhere(self) -> bool:
        """Return whether the caller runs outside the client's event loop.

        A task that a read has woken needs no look at the running loop. Up to Python 3.12
        that costs a system call.
        """
        return get_ident() != self._waking_thread and running_loop() is not self._loop

    def _deadline(self, timeout: float | None) -> float | None:
        """Return the deadline for a timeout in seconds.

        Raises ValueError if it is not valid.
        """
        if type(timeout) is not float or not 0 <= timeout < ENDLESS_S:
            timeout = check_timeout(timeout)
            if timeout is None:
                return None
        # As in Deadline.after, without the call.
        deadline = Deadline(self._loop.time() + timeout)
        deadline.timeout_s = timeout
        return deadline

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
        encoder = self._encoder
        waiting_bytes = encoder.queued - encoder.taken
        if not waiting_bytes:
            return
        self._frames += 1
        if waiting_bytes > _FLUSH_ABOVE:
            self._flush()
        elif self._frames % _BATCH == 0 and self._many_follow():
            self._write_queued()
        elif not self._flushing:
            # In this order: a signal handler's exception in between costs a needless
            # flush. In the other order it would prevent all later flushes.
            self._loop.call_soon(self._flush)
            self._flushing = True

    def _many_follow(self) -> bool:
        """Return whether many tasks and jobs that the last read woke are still to run."""
        return max(self._wakeups.left, len(self._requests.inbox.items)) > _BATCH

    def _write_last(self) -> None:
        """Write the frame of a task that now waits: at once, if it is alone.

        The next turn of the loop would be too late for a task that does nothing but
        exchange single frames. No other frame follows in this turn if no other callback
        is scheduled. Without knowledge of the callbacks, as with uvloop, the loop itself
        writes only at the end of the turn. The only task that a read wakes writes before
        the read ends: the rest of its work costs the peer no time then.
        """
        if self._alone and not self._scheduled and (self._wakes_one or not self._flushing):
            self._alone = False
            self._frames += 1
            self._write_queued()
        else:
            self._write()

    def _flush(self) -> None:
        # Cleared here, so that a callback that the loop lost to an interrupt is missed
        # only once.
        self._flushing = False
        if self._encoder.queued != self._encoder.taken:
            self._write_queued()

    def _write_queued(self) -> None:
        """Pass the queued frames to the event loop, which writes them at once."""
        transport = self._transport
        if transport is None:
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
        try:
            if self._alone:
                self._write_last()
            else:
                self._write()
            if deadline is not None:
                self._calls[message_id] = call, deadline
                if self._timer is None or deadline < self._timer_at or not self._checks_calls:
                    self._start_timers(deadline)
            if self._meter.full:
                self._update_reading()
            return await call
        except BaseException:
            self._abandon(call, message_id)
            raise
        finally:
            if deadline is not None:
                self._calls.pop(message_id, None)

    def _start_timers(self, deadline: float) -> None:
        """Start the timers that end calls which have no outcome at the deadline."""
        if self._timer is None or deadline < self._timer_at:
            self._schedule()
        if not self._checks_calls:
            self._check_calls()

    def _check_calls(self) -> None:
        """End the calls that the dialog should have ended, from now on at intervals.

        The dialog's own deadlines expire first, unless it has lost a call.
        """
        self._checks_calls = False
        if not self._calls or self._forked:
            return
        self._loop.call_later(_OVERDUE_CHECK_S, self._check_calls)
        self._checks_calls = True
        overdue = self._loop.time() - _OVERDUE_CHECK_S
        for message_id, (call, deadline) in self._calls.items():
            if deadline < overdue and not call.done():
                call.set_exception(TimedOut(f"no answer to {message_id} {within(deadline)}"))

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
        if not self._clear or self._is_elsewhere():
            return None
        message_id = self._dialog.send(to, number, body, extension)
        self._write()
        return message_id

    def _publish_at_once(
        self, topic: str, number: int, body: bytes, extension: Mapping[str, Any] | None
    ) -> int | None:
        """Publish an event if that needs no wait; return its id, or None."""
        if not self._clear or self._is_elsewhere():
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

    async def _put_many(
        self, timeout: float | None, bulk: Bulk, extension: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Queue messages once they can be written; return their ids."""
        check_timeout(timeout)
        return await self._put(timeout, self._dialog.send_many, *bulk, extension)

    def _ask(
        self, timeout: float | None, put: Callable[..., int], *args: Any
    ) -> Coroutine[Any, Any, Any]:
        """Queue a frame with ``put(*args, call, deadline)`` and return its outcome."""
        deadline = None if timeout is None else self._deadline(timeout)
        if not self._clear or self._is_elsewhere():
            return self._ask_later(timeout, deadline, put, *args)
        call = self._loop.create_future()
        return self._outcome(call, put(*args, call, deadline), deadline)

    def _request(
        self,
        timeout: float | None,
        limit_s: float | None,
        to: str,
        number: int,
        body: bytes,
        extension: Mapping[str, Any] | None,
    ) -> Coroutine[Any, Any, Any]:
        """Send a request and return its reply.

        limit_s: The timeout in seconds, if it is the request's ttl.
        """
        request = self._dialog.request
        if limit_s is None or not self._clear or self._is_elsewhere():
            put = partial(request, limit_s=limit_s)
            return self._ask(timeout, put, to, number, body, extension)
        # Not a Deadline: the error of the end of the time takes the limit.
        deadline = self._loop.time() + limit_s
        call = self._loop.create_future()
        message_id = request(to, number, body, extension, call, deadline, limit_s)
        return self._outcome(call, message_id, deadline)

    async def _ask_later(
        self, timeout: float | None, deadline: float | None, put: Callable[..., int], *args: Any
    ) -> Any:
        """Do the same as ``_ask``, once the frame can be written."""
        await self._wait_until_clear(timeout)
        call = self._loop.create_future()
        return await self._outcome(call, put(*args, call, deadline), deadline)

    async def _post(
        self,
        timeout: float | None,
        to: str,
        number: int,
        body: bytes,
        extension: Mapping[str, Any],
    ) -> Any:
        """Send a message until it is stored or refused; return its receipt."""
        limit = check_timeout(timeout)
        self._check()
        call = self._loop.create_future()
        now = self._loop.time()
        message_id = self._dialog.post(to, number, body, extension, call, now)
        if limit is None:
            return await self._outcome(call, message_id, None)
        # Not a deadline of the dialog's, which watches none while it is not connected.
        timer = self._loop.call_at(now + limit, self._expire_post, call, message_id, limit)
        try:
            return await self._outcome(call, message_id, None)
        finally:
            timer.cancel()

    @staticmethod
    def _expire_post(call: asyncio.Future[Any], message_id: int, limit: float) -> None:
        """End a post at the end of its time."""
        if not call.done():
            call.set_exception(TimedOut(f"{message_id} was not stored within {limit:g} s"))

    async def _ask_many(
        self, timeout: float | None, bulk: Bulk, extension: Mapping[str, Any] | None = None
    ) -> list[Receipt | BrokerdError]:
        """Queue messages that ask for receipts; return the outcome of each."""
        to, codecs, bodies = bulk
        deadline = self._deadline(timeout)
        await self._wait_until_clear(timeout)
        calls: list[asyncio.Future[Any]] = [self._loop.create_future() for _ in to]
        ids = self._dialog.send_many_for_receipts(to, codecs, bodies, extension, calls, deadline)
        outcomes: list[Receipt | BrokerdError] = []
        try:
            self._write()
            if deadline is not None:
                self._calls.update(zip(ids, zip(calls, repeat(deadline))))
                self._start_timers(deadline)
            if self._meter.full:
                self._update_reading()
            for call in calls:
                try:
                    outcomes.append(await call)
                except BrokerdError as error:
                    outcomes.append(error)
        finally:
            for call, message_id in zip(calls[len(outcomes) :], ids[len(outcomes) :]):
                self._abandon(call, message_id)
            if deadline is not None:
                for message_id in ids:
                    self._calls.pop(message_id, None)
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

    def _reply_at_once(self, request: Message, payload: object) -> bool:
        """Answer an open request, if that needs no wait; return whether that was so.

        Raises PayloadError.
        """
        if not self._clear:
            return False
        number, body = encode(payload, None, self.json_codec)
        self._dialog.reply(request.sender, request.id, number, body)
        request.mark_answered()
        if self._alone and not self._requests.inbox.items:
            self._write_last()
        else:
            self._write()
        return True

    def _fail_at_once(self, request: Message, text: str, code: str) -> None:
        """Answer a request with an error, if that is possible without waiting."""
        if self._can_answer and not request.answered:
            self._dialog.fail(request.sender, request.id, code, text)
            self._write()
            request.mark_answered()

    def _handle(self, handle: Callable[[H], None], handler: H) -> H:
        """Set a handler of the dispatcher with ``handle``; return the handler."""
        self._check()
        handle(handler)
        if handle == self._dispatcher.handle_messages:
            self._begin_receiving()
        if handle in (self._dispatcher.handle_requests, self._dispatcher.handle_calls):
            self._dialog.limit_in_flight(self._handlers)
            self._write()
        return handler

    # Receiving

    def _begin_receiving(self) -> None:
        """Open the mailbox, if the client has one, when the program first receives."""
        self._receives = True
        self._dialog.open_mailbox()
        self._write()

    async def _settle(self, message: Message, body: bytes) -> None:
        """Acknowledge a message from the mailbox."""
        self._check()
        self._dialog.settle(message.unsettled_delivery(), body)
        self._write()

    def _settle_at_once(self, message: Message, body: bytes) -> None:
        """Acknowledge a message from the mailbox, unless the program has done so."""
        if not message.settled:
            self._dialog.settle(message._delivery, body)
            self._write()

    def __aiter__(self) -> AsyncIterator[Message]:
        """Yield messages, and requests if no request handler is set, until the client
        is closed.

        A message from the mailbox is acknowledged when the loop asks for the next one.
        """
        return _Messages(self)

    async def __anext__(self) -> Message:
        self._check()
        if not self._receives:
            self._begin_receiving()
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

    # Channels

    async def _open_channel(self, to: str, payload: bytes, timeout: float | None) -> Stream:
        """Open a channel to a client, on a connection of its own."""
        first = open_frame(check_address(to), OPEN_ID, payload)
        deadline = self._deadline(timeout)
        await self._wait_until_clear(timeout)
        try:
            return await self._begin_channel(first, OPEN_ID, deadline)
        except Elsewhere as error:
            elsewhere = error
        reason: BrokerdError = elsewhere
        for address, settings in channel_routes(elsewhere, self._settings):
            try:
                return await self._begin_channel(first, OPEN_ID, deadline, address, settings)
            except (Disconnected, TlsError, Elsewhere) as error:
                reason = error
        raise elsewhere from (None if reason is elsewhere else reason)

    async def _join_channel(self, token: int, timeout: float | None) -> Stream:
        """Accept a channel, on a connection of its own."""
        self._check()
        return await self._begin_channel(join_frame(token), token, self._deadline(timeout))

    async def _begin_channel(
        self,
        first: bytes,
        message_id: int,
        deadline: float | None,
        address: Address | None = None,
        settings: Settings | None = None,
    ) -> Stream:
        address = address or self._broker_address
        began = begin_channel(settings or self._settings, address, self.name, first, message_id)
        remaining = None if deadline is None else deadline - self._loop.time()
        try:
            return await asyncio.wait_for(began, remaining)
        except WaitTimeout:
            raise TimedOut(f"the broker at {address} made no channel {within(deadline)}") from None

    # Closing

    async def _drain(self, timeout: float | None) -> bool:
        """Finish the work in progress, then close; return whether all was finished."""
        deadline = self._deadline(timeout)
        self._check()
        finished = False
        try:
            self._dialog.stop_requests()
            self._dialog.narrow_mailbox()
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

    def _give_back_stored(self) -> None:
        """Return the messages of the mailbox that no handler has begun."""
        for stored in self._dispatcher.take_stored() if self._dialog.mailbox.is_open else ():
            self._dialog.return_delivery(stored)
            self._write()

    def _give_back_waiting(self) -> None:
        """Return the requests and the messages of the mailbox that no handler has begun."""
        self._give_back_stored()
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
                *(task for task, _, _ in self._idle_workers.values()),
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
            self._flush()
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
        collects = self._wakeups.collect()
        try:
            self._receive(transport, data)
        finally:
            if collects:
                # The frames of all tasks are written together, or in batches.
                self._flushing = True
                self._wakes_one = self._wakeups.is_one
                try:
                    self._waking_thread = get_ident()
                    self._wakeups.run()
                finally:
                    self._waking_thread = 0
                    self._wakes_one = False
                self._flush()

    def _receive(self, transport: Transport, data: bytes) -> None:
        """Pass received bytes to the dialog, and deliver their effects."""
        if self._frames:
            self._alone = self._frames == 1
            self._frames = 0
        dialog, now = self._dialog, self._loop.time()
        message = dialog.lone_message(data, self) if dialog.state is _READY else None
        if message is None or not self._deliver(message, len(data), now):
            before = dialog.state
            effects = dialog.receive(data, self, now)
            self._apply(effects)
            if effects.broken is not None:
                return
            self._flush()
            if dialog.state is not before:
                self._note_state()
            if dialog.posts.retry_at is not None or dialog.mailbox.retry_at is not None:
                self._schedule()
        if self._meter.full or self._meter.held > self._meter.limit or not transport.reading:
            self._update_reading()

    def _deliver(self, message: Message, size: int, now: float) -> bool:
        """Deliver a message that came alone, of ``size`` bytes; return whether it was
        possible.
        """
        dialog = self._dialog
        if message._kind == REPLY_KIND:
            pending = dialog.answered_request(message)
            if pending is None:
                return False
            del dialog.pending_calls[pending.id]
            self._wakeups.settle(pending.waiter, message)
            return True
        queue, item = self._dispatcher.place_of(message)
        if message._kind == REQUEST_KIND:
            dialog.note_request(message, now)
            size += 0 if message.extension is None else 2 * VALUE_COST
            if queue in self._idle_workers and self._wakeups.collecting and item[0].is_plain:
                # No other job waits, and the function itself needs no task.
                self._flushing = self._wakes_one = True
                rest = item[0](message)
                if rest is None:
                    return True
                item = partial(_returned, rest), message
        queue.put([item], size + OVERHEAD)
        return True

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
            if self._dialog.mailbox.is_open:
                # They come again on the next connection.
                self._dispatcher.take_stored()
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
        dialog = self._dialog
        for pending in (*dialog.pending_calls.take_all(), *dialog.posts.take_all()):
            if pending.waiter is not None and not pending.waiter.done():
                pending.waiter.set_exception(dialog.gone())
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
        self._wakeups.settle_all(effects.outcomes)
        if not self.closed or self._dialog.state is State.GONE:
            if effects.messages:
                self._dispatcher.dispatch_messages(
                    effects.messages, effects.size + OVERHEAD * len(effects.messages)
                )
            if effects.events:
                self._dispatcher.dispatch_events(effects.events)
            if effects.stored:
                self._dispatcher.dispatch_stored(effects.stored)
        if effects.has_reports or self._dialog.state is not State.READY:
            self._report(effects)

    def _report(self, effects: Effects[Message]) -> None:
        """Deliver what the dialog reports seldom: changes and failures."""
        for subscription, reason in effects.ended:
            subscription.queue.end(reason)
            self._subscriptions.discard(subscription)
        for error in effects.undelivered:
            self._dispatcher.tell_undelivered(error, self._loop.time())
        self._dispatcher.tell_changes(effects.changes)
        if self._dialog.state is State.DRAINING:
            self._give_back_stored()
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
            state is State.READY
            and self._transport is not None
            and not self._transport.paused
            and not self._forked
        )
        if self.closed:
            is_gone = state is State.GONE
            for queue in self._queues():
                queue.end(self._dialog.gone() if is_gone else Closed("the client is closed"))
            self._subscriptions.clear()
            for _, _, more in self._idle_workers.values():
                self._wakeups.settle(more, None)
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
        return WaitQueue(self._meter, self._resume_reading, self._wakeups.settle)

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
        """Start tasks that do the queue's jobs, ``max_tasks`` of them at most.

        The first task is enough for handlers that do not wait. If it leaves jobs in its
        first step, others follow.
        """
        workers, jobs = self._workers[queue], queue.inbox.items
        waiting = len(jobs)
        if not waiting or len(workers) >= max_tasks:
            return
        if queue in self._idle_workers:
            task, on_done, more = self._idle_workers.pop(queue)
            workers[task] = on_done
            self._wakeups.settle(more, None)
        else:
            self._start_worker(queue)
        # Fewer jobs wait if create_task itself has run the task
        # (asyncio.eager_task_factory).
        if len(jobs) > (len(jobs) == waiting) and len(workers) < max_tasks:
            self._loop.call_soon(self._start_all_workers, queue, max_tasks)

    def _start_all_workers(self, queue: WaitQueue[Job], max_tasks: int) -> None:
        """Start a task for each of the queue's jobs."""
        workers, jobs = self._workers[queue], queue.inbox.items
        missing = 0 if self._ended else min(max_tasks - len(workers), len(jobs))
        while missing > 0 and jobs:
            missing -= self._start_worker(queue)

    def _start_worker(self, queue: WaitQueue[Job]) -> bool:
        """Start a task that does the queue's jobs; return whether it is not over yet."""
        task = create_task(self._loop, self._work(queue), "brokerd handler")
        if task.done():
            # create_task itself has run the task, and at least one job is done.
            return False

        def on_done(done: asyncio.Task[None]) -> None:
            self._on_worker_done(queue, done)

        self._workers[queue][task] = on_done
        task.add_done_callback(on_done)
        return True

    async def _work(self, queue: WaitQueue[Job]) -> None:
        """Do the queue's jobs. The first worker without a job waits for more, others end."""
        task = asyncio.current_task(self._loop)
        assert task is not None
        inbox, workers = queue.inbox, self._workers[queue]
        jobs = inbox.items
        while True:
            while jobs:
                # As in WaitQueue.take_now, without the call.
                function, item = jobs.popleft()
                if len(jobs) <= inbox.mark:
                    self._resume_reading()
                try:
                    result = function(item)
                    if result is not None and inspect.isawaitable(result):
                        await result
                except BaseException as error:
                    if ends_worker(error, task):
                        raise
                    log().exception("a handler failed")
                del function, item
            # At once, not when the task is done: items added in between must be able to
            # start a new task. A callback would cost another turn of the loop.
            on_done = workers.pop(task, None)
            if on_done is None or queue in self._idle_workers or self.closed:
                if on_done is not None:
                    task.remove_done_callback(on_done)
                return
            more = self._loop.create_future()
            self._idle_workers[queue] = task, on_done, more
            try:
                await more
            finally:
                if queue in self._idle_workers and self._idle_workers[queue][0] is task:
                    del self._idle_workers[queue]

    def _on_worker_done(self, queue: WaitQueue[Job], task: asyncio.Task[None]) -> None:
        """Start another worker for the jobs that a cancelled worker has left.

        None is started when all tasks are being cancelled.
        """
        self._workers[queue].pop(task, None)
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


def _returned(rest: Coroutine[Any, Any, None], request: Message) -> Coroutine[Any, Any, None]:
    """Return the rest of a job, as a job for a worker."""
    return rest


class _Messages:
    """A loop over the messages of a client, which acknowledges those from the mailbox."""

    # Bound here, because each lookup takes some hundredths of a step.
    __slots__ = ("_check", "_client", "_last", "_mailbox", "_queue")

    def __init__(self, client: BaseClient) -> None:
        self._client = client
        self._check = client._check
        self._queue = client._inbox
        self._mailbox = client._dialog.mailbox
        #: The last message, if it comes from the mailbox; the client before the first step.
        self._last: Message | BaseClient | None = client

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        self._check()
        if self._last is not None:
            self._go_on(self._last)
        message: Message | None
        try:
            message = self._queue.take_now()
        except IndexError:
            message = None
        # Not in the except clause: what ends the waiting would name the IndexError as its
        # context.
        if message is None:
            try:
                message = await self._queue.take(None)
            except Closed:
                raise StopAsyncIteration from None
        if self._mailbox.is_open and message.seq:
            self._last = message
        return message

    def _go_on(self, last: Message | BaseClient) -> None:
        """Begin to receive, or acknowledge the last message."""
        self._last = None
        if isinstance(last, BaseClient):
            last._begin_receiving()
        else:
            self._client._settle_at_once(last, ack_body("done"))
