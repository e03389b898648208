"""The broker client for asyncio: coroutines and async iterators, on one event loop.

A face of :mod:`brokerd_client.protocol.dialog`; no rule of the protocol is here. A task that is cancelled while it
waits leaves nothing behind. Works with any event loop that has transports: asyncio's own and uvloop.

Here are the calls a user makes. The module ``base`` holds the connection, ``transport`` moves the bytes,
``subscriptions`` has what a user iterates over, and ``waiters`` where calls wait.
"""

# ruff: noqa: ASYNC109 - both faces take the same arguments, timeouts among them
from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import time
from collections.abc import Callable, Iterable, Mapping
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar, cast, overload

from brokerd_client import message
from brokerd_client._common.dispatcher import log
from brokerd_client.aio.base import BaseClient, ends_worker, runs
from brokerd_client.aio.subscriptions import Message, Opening, PresenceWatch, Subscription
from brokerd_client.codec import encode
from brokerd_client.errors import (
    AlreadyAnswered,
    BrokerdError,
    Closed,
    Disconnected,
    TimedOut,
)
from brokerd_client.message import Receipt, with_ttl
from brokerd_client.presence import ClientInfo, client_list
from brokerd_client.protocol.bulk import encode_many
from brokerd_client.protocol.dialog import LINGER_S
from brokerd_client.protocol.state import State
from brokerd_client.settings import DEFAULT_INBOX, DEFAULT_TIMEOUT_S, AnyAddress, Settings, resolve

if TYPE_CHECKING:
    from ssl import SSLContext

__all__ = ["Client", "Message", "Opening", "PresenceWatch", "Subscription", "connect"]

#: Seconds by which the dialog may be late with its own deadlines.
_GRACE_S: Final = 1.0

RequestHandler = TypeVar("RequestHandler", bound=Callable[[Message], object])
MessageHandler = TypeVar("MessageHandler", bound=Callable[[Message], object])
UndeliveredHandler = TypeVar("UndeliveredHandler", bound=Callable[[BrokerdError], object])


class Client(BaseClient):
    """A named client of a broker; made by :func:`connect`. Any task of its event loop may use it.

    Every call raises Closed after close(), WrongProcess in a fork, WrongLoop in another event loop or thread. Those
    that send wait while the connection is being made again, for ``timeout`` seconds (where None is given, that of
    connect()), and then raise Disconnected: nothing was sent.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, _answering)

    # What it is

    @property
    def name(self) -> str:
        """The name, as the broker says."""
        return self._dialog.name

    @property
    def address(self) -> str:
        """What others see as the sender: the name, or NAME/INSTANCE in a pool; it may change with a reconnect."""
        return self._dialog.address

    @property
    def connected(self) -> bool:
        """Whether there is a connection at this moment."""
        return self._dialog.state is State.READY

    @property
    def counters(self) -> dict[str, int]:
        """What has gone wrong so far: late answers, undelivered sends, events without a taker, lost connections."""
        return self._dialog.counters

    def __repr__(self) -> str:
        return f"<Client {self.address or self.name!r} at {self._settings.address} {self._dialog.state.name.lower()}>"

    # Sending

    @overload
    async def send(
        self,
        to: str,
        payload: object,
        *,
        receipt: Literal[False] = False,
        codec: str | int | None = None,
        ttl: float | None = None,
        extension: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> int: ...

    @overload
    async def send(
        self,
        to: str,
        payload: object,
        *,
        receipt: Literal[True],
        codec: str | int | None = None,
        ttl: float | None = None,
        extension: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Receipt: ...

    async def send(
        self,
        to: str,
        payload: object,
        *,
        receipt: bool = False,
        codec: str | int | None = None,
        ttl: float | None = None,
        extension: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> int | Receipt:
        """Send a message to a client: its id at once, or with ``receipt`` a Receipt once the broker has taken it on.

        ttl: seconds it stays deliverable where it has to wait. timeout: seconds for all of this.
        Raises, with receipt, the broker's Refused, TimedOut and InDoubt; without, on_undelivered hears of a refusal,
        and of a connection that breaks before this has left.
        """
        number, body = encode(payload, codec)
        if ttl is not None:
            extension = with_ttl(extension, ttl)
        deadline = None if timeout is None else self._deadline(timeout)
        if not self._clear or get_ident() != self._thread_id or not self._loop.is_running():
            await self._wait_until_clear(timeout)
        if not receipt:
            message_id = self._dialog.send(to, number, body, extension)
            self._write()
            return message_id
        call = self._loop.create_future()
        message_id = self._dialog.send_for_receipt(to, number, body, extension, call, deadline)
        return cast("Receipt", await self._outcome(call, message_id, deadline))

    async def send_many(
        self,
        messages: Iterable[tuple[str, object]],
        *,
        receipt: bool = False,
        codec: str | int | None = None,
        timeout: float | None = None,
    ) -> list[Any]:
        """Send (to, payload) pairs with one system call; return their ids, in order.

        With ``receipt``, return one outcome each: a Receipt or the error; none is raised, so that none hides another.
        Raises PayloadError or InvalidName for any of them before any is sent.
        """
        to, codecs, bodies = encode_many(messages, codec)
        deadline = self._deadline(timeout)
        await self._wait_until_clear(timeout)
        if not receipt:
            ids = self._dialog.send_many(to, codecs, bodies)
            self._write()
            return ids
        calls: list[asyncio.Future[Any]] = [self._loop.create_future() for _ in to]
        ask = self._dialog.send_for_receipt
        ids = [
            ask(each, number, body, None, call, deadline)
            for each, number, body, call in zip(to, codecs, bodies, calls, strict=True)
        ]
        outcomes: list[Any] = []
        try:
            for call, message_id in zip(calls, ids, strict=True):
                try:
                    outcomes.append(await self._outcome(call, message_id, deadline))
                except BrokerdError as error:
                    outcomes.append(error)
        finally:
            for call, message_id in zip(calls[len(outcomes) :], ids[len(outcomes) :], strict=True):
                self._abandon(call, message_id)
        return outcomes

    async def request(
        self,
        to: str,
        payload: object,
        *,
        timeout: float | None = 30.0,
        codec: str | int | None = None,
        ttl: float | None = None,
        extension: Mapping[str, Any] | None = None,
    ) -> Message:
        """Ask another client and return its reply.

        Raises RequestFailed (it answered with an error), the broker's Refused, TimedOut, InDoubt, Disconnected.
        """
        number, body = encode(payload, codec)
        extension = with_ttl(extension, ttl)
        deadline = self._deadline(timeout)
        if not self._clear or get_ident() != self._thread_id or not self._loop.is_running():
            await self._wait_until_clear(timeout)
        call = self._loop.create_future()
        message_id = self._dialog.request(to, number, body, extension, call, deadline)
        return cast("Message", await self._outcome(call, message_id, deadline))

    async def reply(
        self,
        message: message.Message,
        payload: object,
        *,
        codec: str | int | None = None,
        extension: Mapping[str, Any] | None = None,
    ) -> None:
        """Answer a request that was received; if it can't be delivered, on_undelivered hears of it."""
        number, body = encode(payload, codec)
        await self._wait_until_clear(None, answer=True)
        message.require_unanswered()
        self._dialog.reply(message.sender, message.id, number, body, extension)
        self._write()
        message.mark_answered()

    async def _fail(self, message: Message, text: str, code: str) -> None:
        await self._wait_until_clear(None, answer=True)
        message.require_unanswered()
        self._dialog.fail(message.sender, message.id, code, text)
        self._write()
        message.mark_answered()

    def _fail_at_once(self, message: Message, text: str) -> None:
        """Answer a request with an error where that needs no waiting."""
        if self._can_answer and not message.answered:
            self._dialog.fail(message.sender, message.id, "failed", text)
            self._write()
            message.mark_answered()

    @overload
    async def publish(
        self,
        topic: str,
        payload: object,
        *,
        receipt: Literal[False] = False,
        codec: str | int | None = None,
        ttl: float | None = None,
        extension: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> int: ...

    @overload
    async def publish(
        self,
        topic: str,
        payload: object,
        *,
        receipt: Literal[True],
        codec: str | int | None = None,
        ttl: float | None = None,
        extension: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Receipt: ...

    async def publish(
        self,
        topic: str,
        payload: object,
        *,
        receipt: bool = False,
        codec: str | int | None = None,
        ttl: float | None = None,
        extension: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> int | Receipt:
        """Publish an event: its id at once, or with ``receipt`` a Receipt. That nobody subscribes is no error."""
        number, body = encode(payload, codec)
        extension = with_ttl(extension, ttl)
        deadline = None if timeout is None else self._deadline(timeout)
        if not self._clear or get_ident() != self._thread_id or not self._loop.is_running():
            await self._wait_until_clear(timeout)
        if not receipt:
            message_id = self._dialog.publish(topic, number, body, extension)
            self._write()
            return message_id
        call = self._loop.create_future()
        message_id = self._dialog.publish_for_receipt(topic, number, body, extension, call, deadline)
        return cast("Receipt", await self._outcome(call, message_id, deadline))

    # Receiving

    async def recv(self, timeout: float | None = None) -> Message:
        """Return the next message, or request where no handler is set.

        Raises TimedOut; Closed; Disconnected where the connection is gone for good.
        """
        self._check()
        return await self._inbox.take(self._limit(timeout))

    def __aiter__(self) -> Self:
        """Yield messages, and requests where no handler is set, until the client is closed."""
        return self

    async def __anext__(self) -> Message:
        self._check()
        try:
            return self._inbox.take_now()
        except IndexError:
            pass
        try:
            return await self.recv()
        except Closed:
            raise StopAsyncIteration from None

    def on_request(self, handler: RequestHandler) -> RequestHandler:
        """Have requests answered with what ``handler(message)`` returns; a function or a coroutine function.

        What it raises, of whatever type, is logged, and answered with an ERROR ``failed`` that holds the type's name
        only. KeyboardInterrupt and SystemExit then end the event loop, as in every task. A handler that has called
        message.reply() or message.fail() itself returns None. Can be used as a decorator.
        """
        self._check()
        self._dispatcher.handle_requests(handler)
        return handler

    def on_message(self, handler: MessageHandler) -> MessageHandler:
        """Have ``handler(message)``, a function or a coroutine function, called for each message, in order."""
        self._check()
        self._dispatcher.handle_messages(handler)
        return handler

    def on_undelivered(self, handler: UndeliveredHandler) -> UndeliveredHandler:
        """Have ``handler(error)`` called for each send without a receipt that failed.

        ``error.id`` is what send returned. Without a handler these errors are logged as warnings.
        """
        self._check()
        self._dispatcher.handle_undelivered(handler)
        return handler

    # Topics, presence and the broker itself

    def subscribe(
        self,
        pattern: str,
        group: str | None = None,
        callback: Callable[[Message], object] | None = None,
        *,
        timeout: float | None = 30.0,
    ) -> Opening[Subscription]:
        """Subscribe to topics, once this is awaited, entered or iterated over. Made again after every reconnect.

        group: each event goes to one member of the group. Raises Denied, InvalidName and what request() raises.
        """

        async def open() -> Subscription:
            deadline = self._deadline(timeout)
            await self._wait_until_clear(timeout)
            subscription = Subscription(self, pattern, group, callback)
            call = self._loop.create_future()
            message_id, subscription._entry = self._dialog.subscribe(pattern, group, subscription, call, deadline)
            self._feeds.add(subscription)
            try:
                await self._outcome(call, message_id, deadline)
            except BaseException:
                # A cancelled task may have its answer already: the subscription exists, at the broker too.
                self._drop_subscription(subscription, None, None)
                raise
            return subscription

        return Opening(open)

    async def _unsubscribe(self, subscription: Subscription) -> None:
        self._check()
        call = self._loop.create_future()
        deadline = self._deadline(self._settings.timeout_s)
        message_id = self._drop_subscription(subscription, call, deadline)
        if message_id is not None:
            # Whatever the answer is, and if there is none: nothing more comes.
            with contextlib.suppress(Disconnected, Closed, TimedOut):
                await self._outcome(call, message_id, deadline)

    def _drop_subscription(
        self, subscription: Subscription, call: asyncio.Future[Any] | None, deadline: float | None
    ) -> int | None:
        """End the subscription here, and send unsubscribe; return that operation's id, None where none was needed."""
        assert subscription._entry is not None
        message_id = self._dialog.unsubscribe(subscription._entry, subscription, call, deadline)
        subscription.queue.end(Closed("the subscription was ended"))
        self._feeds.discard(subscription)
        self._write()
        return message_id

    def watch_presence(self, *, timeout: float | None = 30.0) -> Opening[PresenceWatch]:
        """Iterate over Presence: every client this one may send to as it is now, then every change."""

        async def open() -> PresenceWatch:
            deadline = self._deadline(timeout)
            await self._wait_until_clear(timeout)
            subscription = PresenceWatch(self)
            call = self._loop.create_future()
            message_id, subscription._watch = self._dialog.watch(subscription, call, deadline)
            self._feeds.add(subscription)
            try:
                await self._outcome(call, message_id, deadline)
            except BaseException:
                # A cancelled task may have its answer already: the watch exists, its subscriptions too.
                self._drop_watch(subscription)
                raise
            return subscription

        return Opening(open)

    def _unwatch(self, subscription: PresenceWatch) -> None:
        self._check()
        self._drop_watch(subscription)

    def _drop_watch(self, subscription: PresenceWatch) -> None:
        assert subscription._watch is not None
        self._dialog.unwatch(subscription._watch)
        self._write()
        self._feeds.discard(subscription)
        subscription.queue.end(Closed("the watch was ended"))

    async def control(self, op: str, /, *, timeout: float | None = 30.0, **arguments: Any) -> dict[str, Any]:
        """Ask the broker for an operation and return its answer. Raises Refused, TimedOut, InDoubt, Disconnected."""
        deadline = self._deadline(timeout)
        await self._wait_until_clear(timeout)
        call = self._loop.create_future()
        message_id = self._dialog.control(op, arguments, call, deadline)
        return cast("dict[str, Any]", await self._outcome(call, message_id, deadline))

    async def clients(self) -> list[ClientInfo]:
        """Return the clients this one may send to, and which of them are online."""
        return client_list(await self.control("clients"))

    async def whoami(self) -> dict[str, Any]:
        """Return what the broker says of this client and of itself: name, address, version, protocol, limits."""
        return await self.control("whoami")

    async def ping(self) -> float:
        """Return how long the broker takes to answer, in seconds."""
        # An event loop's own clock may stand still within one turn.
        started = time.perf_counter()
        await self.control("ping")
        return time.perf_counter() - started

    # The end

    async def close(self) -> None:
        """End the connection and every task of the client; who waits gets Closed. Does nothing the second time.

        What has been sent is flushed, and refusals that follow at once are still heard, for half a second each at most.
        Messages that nobody has taken are dropped. In a fork of the client's process it does nothing.
        """
        if self._forked:
            return
        self._check()
        try:
            await self._close_connection()
        finally:
            self._ended = True
            self._stop_timer()
            for link in self._links:
                link.abort()
            here = asyncio.current_task()
            tasks = {self._keeper, *(task for workers in self._crews.values() for task in workers)} - {here}
            for task in tasks:
                task.cancel()
            self._dispatcher.log_failures(self._loop.time())
            self._warn_of_more()
        await asyncio.wait([*tasks, *(link.closed for link in self._links)], timeout=LINGER_S)

    async def _close_connection(self) -> None:
        try:
            if self._dialog.may_answer:
                self._flush()
                await self._until(lambda: not self._dialog.may_answer or self._can_answer, LINGER_S)
        finally:
            # Cancelled or not: from here on the client is closed, and every task that waits gets Closed.
            first = self._dialog.may_answer
            self._apply(self._dialog.close(self._loop.time()))
            self._note_state()
            for queue in (self._inbox, self._requests):
                queue.inbox.clear()
            self._dispatcher.drop_jobs()
        if self._dialog.state is State.CLOSING and self._link is not None:
            self._update_reading()
            self._schedule()
            if first and self._link.transport.can_write_eof():
                with contextlib.suppress(OSError):
                    self._link.transport.write_eof()
            await asyncio.wait([self._link.closed], timeout=LINGER_S)

    async def __aenter__(self) -> Self:
        self._check()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def wait_until_ready(self) -> None:
        """Wait for the first introduction. Raises why there is none."""
        self._check()
        limit = self._settings.timeout_s
        # The dialog's own deadline comes first.
        if not await self._until(lambda: not self._dialog.beginning, limit + _GRACE_S):
            raise TimedOut(f"no connection to {self._settings.address} within {limit:g} s")
        if self._dialog.state is State.GONE and self._dialog.reason is not None:
            raise self._dialog.reason


def _answering(handler: Callable[[Message], object]) -> Callable[[Message], object]:
    """Return a job that answers a request with what the handler returns."""

    async def answer(request: Message) -> None:
        result: object = None
        returned = False
        task = asyncio.current_task()
        assert task is not None
        try:
            result = handler(request)
            if inspect.isawaitable(result):
                result = await result
            returned = True
            if not request.answered:
                await request.reply(result)
            elif result is not None:
                log().warning("a request of %s had been answered when its handler returned more", request.sender)
        except BaseException as error:
            if isinstance(error, GeneratorExit) and not runs(task):
                raise
            if returned and isinstance(error, (Disconnected, Closed)):
                log().warning("a request of %s could not be answered: the connection is gone", request.sender)
                return
            text = f"the handler failed: {type(error).__name__}"
            if ends_worker(error, task):
                # Its task must not wait any more.
                request._owner._fail_at_once(request, text)
                raise
            log().exception("the handler of a request of %s failed", request.sender)
            with contextlib.suppress(AlreadyAnswered, Disconnected, Closed):
                await request.fail(text)

    return answer


def connect(
    address: AnyAddress | None = None,
    name: str | None = None,
    key: bytes | str | None = None,
    *,
    key_file: str | os.PathLike[str] | None = None,
    timeout: float | None = DEFAULT_TIMEOUT_S,
    reconnect: bool = True,
    allow_pickle_from: Iterable[str] = (),
    inbox: int = DEFAULT_INBOX,
    ssl: SSLContext | bool | None = None,
) -> Opening[Client]:
    """Connect to a broker, once this is awaited or entered: ``async with connect(...) as client``.

    address: as address.parse takes it; else $BROKERD_ADDRESS, else /run/brokerd/brokerd.sock. name: else $BROKERD_NAME,
        else the broker finds it by the key. key, or key_file (one trailing newline is cut): else $BROKERD_KEY_FILE.
    timeout: seconds for all of this, and for a send to wait for a connection; infinity, or None, for no end.
    reconnect: False makes the first loss final. allow_pickle_from: names whose pickles may be read.
    inbox: bytes of messages kept in this process before the socket is left unread.
    ssl: a context for TLS, or True for one that trusts what the system trusts, as with an address tls://HOST:PORT.
    Raises AuthenticationError (TlsError over TLS), Disconnected, TimedOut, ProtocolError, and nothing else once it
    connects; AddressError, InvalidName, InvalidKey for what it is given.
    """
    settings = resolve(
        address,
        name,
        key,
        key_file,
        timeout,
        reconnect=reconnect,
        allow_pickle_from=allow_pickle_from,
        inbox=inbox,
        ssl=ssl,
    )

    async def open() -> Client:
        client = Client(settings)
        try:
            await client.wait_until_ready()
        except BaseException:
            await client.close()
            raise
        return client

    return Opening(open)
