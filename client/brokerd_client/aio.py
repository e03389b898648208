"""The broker client for asyncio: coroutines and async iterators, on one event loop.

A face of :mod:`brokerd_client.dialog`: it moves bytes, sleeps until the dialog's next deadline and wakes who waits.
No rule of the protocol is here.

What the tasks send between two turns of the loop leaves with one system call. A task that is cancelled while it waits
leaves nothing behind. Works with any event loop that has transports: asyncio's own and uvloop.
"""

# ruff: noqa: ASYNC109 - both faces take the same arguments, timeouts among them
from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Mapping
from types import TracebackType
from typing import Any, Final, Generic, Literal, Protocol, Self, TypeVar, cast, overload

from brokerd_client import forks, message
from brokerd_client.address import validate_family
from brokerd_client.bridge import BridgedSocket, dial_pipe
from brokerd_client.chance import chance, first_id, nonce
from brokerd_client.codec import encode
from brokerd_client.desk import Desk, Job, log
from brokerd_client.dialog import LINGER_S, Batch, Dialog
from brokerd_client.errors import (
    AddressError,
    BrokerdError,
    Closed,
    Disconnected,
    TimedOut,
    WrongProcess,
)
from brokerd_client.inbox import OVERHEAD, Gauge, Inbox
from brokerd_client.life import State
from brokerd_client.lot import make_lot
from brokerd_client.message import Receipt, with_ttl
from brokerd_client.presence import ClientInfo, Presence, Watch, client_list
from brokerd_client.routes import Route
from brokerd_client.settings import DEFAULT_INBOX, DEFAULT_TIMEOUT_S, AnyAddress, Settings, resolve

__all__ = ["Client", "Message", "Opening", "PresenceWatch", "Subscription", "connect"]

T = TypeVar("T")
RequestHandler = TypeVar("RequestHandler", bound=Callable[["Message"], object])
MessageHandler = TypeVar("MessageHandler", bound=Callable[["Message"], object])
UndeliveredHandler = TypeVar("UndeliveredHandler", bound=Callable[[BrokerdError], object])

#: Requests a client's handler works on at once.
_REQUEST_TASKS: Final = 64
#: While a call waits for its outcome, which may be behind messages nobody takes, so many times ``inbox`` is read.
_STRETCH: Final = 4
#: Bytes put out that are not kept until the loop's next turn.
_FLUSH_ABOVE: Final = 64 * 1024
#: Seconds until a listener whose queue of new connections is full is tried again.
_CROWDED_S: Final = 0.01


class Message(message.Message):
    """A message received by an asyncio client; a REQUEST can be answered."""

    __slots__ = ("_answered",)

    _owner: Client
    #: Set once it has been answered.
    _answered: bool

    async def reply(self, payload: object, *, codec: str | int | None = None) -> None:
        """Answer this request. Raises PayloadError, Disconnected or Closed."""
        await self._owner.reply(self, payload, codec=codec)

    async def fail(self, text: str, code: str = "failed") -> None:
        """Answer this request with an error: the caller gets RequestFailed with this code and text."""
        await self._owner._fail(self, text, code)


class _Opened(Protocol):
    """What an Opening gives: it can be entered and iterated over."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __aiter__(self) -> AsyncIterator[Any]: ...


O = TypeVar("O", bound=_Opened)  # noqa: E741 - for Opened


class Opening(Generic[O]):
    """Something about to be opened: await it, enter it with ``async with``, or iterate over it with ``async for``."""

    def __init__(self, open: Callable[[], Awaitable[O]]) -> None:
        self._open = open
        self._opened: O | None = None

    def __await__(self) -> Generator[Any, None, O]:
        return self._open().__await__()

    async def __aenter__(self) -> O:
        self._opened = await self._open()
        return await self._opened.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._opened is not None
        await self._opened.__aexit__(kind, error, trace)

    async def __aiter__(self) -> AsyncIterator[Any]:
        async with self as opened:
            async for item in opened:
                yield item


class _Box(Generic[T]):
    """An inbox that tasks can wait at, or that tasks empty."""

    __slots__ = ("__weakref__", "_relieve", "_waiters", "ended", "inbox", "on_put")

    def __init__(self, gauge: Gauge, relieve: Callable[[], None]) -> None:
        self.inbox: Inbox[T] = Inbox(gauge)
        #: Why nothing more will come.
        self.ended: BrokerdError | None = None
        #: Called after items were added, where tasks empty the box.
        self.on_put: Callable[[], None] | None = None
        self._relieve = relieve
        self._waiters: deque[asyncio.Future[None]] = deque()

    def put(self, items: list[T], size: int) -> None:
        """Add items and wake who waits."""
        self.inbox.put(items, size)
        if self.on_put is not None:
            self.on_put()
        self._wake(len(items))

    def end(self, why: BrokerdError) -> None:
        """Nothing more will come."""
        if self.ended is None:
            self.ended = why
        self._wake(len(self._waiters))

    def _wake(self, count: int) -> None:
        while count and self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1

    def take_now(self) -> T:
        """Return the next item. Raises IndexError where there is none."""
        item = self.inbox.items.popleft()
        if len(self.inbox.items) <= self.inbox.mark:
            self._relieve()
        return item

    async def take(self, timeout: float | None) -> T:
        """Return the next item. Raises TimedOut, or why nothing more will come."""
        with contextlib.suppress(IndexError):
            return self.take_now()
        if timeout is None:
            return await self._wait()
        try:
            async with asyncio.timeout(timeout):
                return await self._wait()
        except TimeoutError as error:
            if isinstance(error, BrokerdError):
                raise
            raise TimedOut(f"nothing arrived within {timeout:g} s") from None

    async def _wait(self) -> T:
        while True:
            with contextlib.suppress(IndexError):
                return self.take_now()
            if self.ended is not None:
                raise self.ended.with_traceback(None)
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if not waiter.cancelled():
                    # Woken and cancelled at once: the item is somebody else's.
                    self._wake(1)
                else:
                    with contextlib.suppress(ValueError):
                        self._waiters.remove(waiter)
                raise


class _Feed(Generic[T]):
    """What a subscription or a watch gives: an async iterator that ends when the feed or its client is closed."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.box: _Box[T] = client._box()

    async def recv(self, timeout: float | None = None) -> T:
        """Return the next one. Raises TimedOut; Closed after the end; the broker's refusal if it ended this."""
        self._client._check()
        return await self.box.take(timeout)

    async def __aiter__(self) -> AsyncIterator[T]:
        with contextlib.suppress(Closed):
            while True:
                yield await self.recv()

    async def close(self) -> None:
        """Ask for nothing more."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Subscription(_Feed[Message]):
    """Events whose topic fits ``pattern``; those of a ``group`` are shared among its members.

    With a callback, a function or a coroutine function, the events go to it, one after the other.
    """

    def __init__(
        self, client: Client, pattern: str, group: str | None, callback: Callable[[Message], object] | None
    ) -> None:
        super().__init__(client)
        self.pattern = pattern
        self.group = group
        self.callback = callback
        self._route: Route | None = None

    async def unsubscribe(self) -> None:
        """Ask for no more events; iterating ends with those that are here already."""
        await self._client._unsubscribe(self)

    close = unsubscribe

    def __repr__(self) -> str:
        return f"<Subscription {self.pattern!r}{f' in group {self.group!r}' if self.group else ''}>"


class PresenceWatch(_Feed[Presence]):
    """One Presence for each client this one may send to, as it is now; then every change."""

    callback = None
    _watch: Watch | None = None

    async def close(self) -> None:
        """Ask for no more changes."""
        self._client._unwatch(self)


class _Link(asyncio.Protocol):
    """One connection: tells its client what happens to it."""

    transport: asyncio.Transport

    def __init__(self, client: Client) -> None:
        self._client = client
        #: Done when the connection is closed, and everything of it freed.
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.paused = False
        self.reading = True
        #: Bytes given to the transport that it may not have written yet.
        self.unwritten = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio.Protocol: there is a connection."""
        self.transport = cast("asyncio.Transport", transport)
        # Paused then means just this: not everything has been written.
        self.transport.set_write_buffer_limits(high=0)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            # A peer whose machine is gone says nothing for ever.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._client._on_open(self)

    def data_received(self, data: bytes) -> None:
        """asyncio.Protocol: bytes have arrived."""
        # Windows' own loop hands over a bytearray, whatever asyncio.Protocol promises.
        self._client._on_data(self, bytes(data))

    def pause_writing(self) -> None:
        """asyncio.Protocol: not everything has been written."""
        self.paused = True
        self._client._on_writable(self)

    def resume_writing(self) -> None:
        """asyncio.Protocol: everything has been written."""
        self.paused = False
        self._client._on_writable(self)

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio.Protocol: the connection is gone."""
        if not self.closed.done():
            self.closed.set_result(None)
        self._client._on_lost(self, error)


class Client:
    """A named client of a broker; made by :func:`connect`. Any task of its event loop may use it.

    Every call raises Closed after close(), WrongProcess in a fork. Those that send wait while the connection is being
    made again, for ``timeout`` seconds (where None is given, that of connect()), and then raise Disconnected: nothing
    was sent.
    """

    def __init__(self, settings: Settings) -> None:
        self.allow_pickle_from = settings.allow_pickle_from
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._dialog: Dialog[Message] = Dialog(
            settings.key,
            settings.name,
            first_id(),
            Message,
            reconnect=settings.reconnect,
            timeout_s=settings.timeout_s,
        )
        self._link: _Link | None = None
        #: Every link whose connection is not closed yet.
        self._links: set[_Link] = set()
        #: Whether a send can be put out at once: the link is ready and takes more.
        self._clear = False
        self._clear_waiters: list[asyncio.Future[None]] = []
        self._flushing = False
        self._timer: asyncio.TimerHandle | None = None
        self._forked = False
        self._gauge = Gauge(settings.inbox)
        self._feeds: set[_Feed[Any]] = set()
        self._inbox: _Box[Message] = self._box()
        self._ordered: _Box[Job] = self._box()
        self._requests: _Box[Job] = self._box()
        self._desk: Desk[Message] = Desk(self._inbox, self._ordered, self._requests, _answering)
        self._crews: dict[_Box[Job], set[asyncio.Task[None]]] = {self._ordered: set(), self._requests: set()}
        self._ordered.on_put = lambda: self._hire(self._ordered, 1)
        self._requests.on_put = lambda: self._hire(self._requests, _REQUEST_TASKS)
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._keeper = self._loop.create_task(self._keep_connected(), name="brokerd client")
        forks.register(self)

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
    def closed(self) -> bool:
        """Whether close() was called, or the connection is lost and no other will be made."""
        return self._dialog.state in (State.CLOSING, State.CLOSED, State.GONE)

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
        Raises, with receipt, the broker's Refused, TimedOut and InDoubt; without, on_undelivered hears of a refusal.
        """
        number, body = encode(payload, codec)
        if ttl is not None:
            extension = with_ttl(extension, ttl)
        deadline = self._deadline(timeout)
        if self._forked or not self._clear:
            await self._wait_until_clear(timeout)
        if not receipt:
            id = self._dialog.send(to, number, body, extension)
            self._write()
            return id
        call = self._loop.create_future()
        id = self._dialog.send_for_receipt(to, number, body, extension, call, deadline)
        return cast("Receipt", await self._outcome(call, id))

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
        to, codecs, bodies = make_lot(messages, codec)
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
            for call, id in zip(calls, ids, strict=True):
                try:
                    outcomes.append(await self._outcome(call, id))
                except BrokerdError as error:
                    outcomes.append(error)
        finally:
            for call, id in zip(calls[len(outcomes) :], ids[len(outcomes) :], strict=True):
                self._abandon(call, id)
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
        if self._forked or not self._clear:
            await self._wait_until_clear(timeout)
        call = self._loop.create_future()
        id = self._dialog.request(to, number, body, extension, call, deadline)
        return cast("Message", await self._outcome(call, id))

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
        await self._wait_until_clear(None)
        self._dialog.reply(message.sender, message.id, number, body, extension)
        self._write()
        if isinstance(message, Message):
            message._answered = True

    async def _fail(self, message: Message, text: str, code: str) -> None:
        await self._wait_until_clear(None)
        self._dialog.fail(message.sender, message.id, code, text)
        self._write()
        message._answered = True

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
        deadline = self._deadline(timeout)
        if self._forked or not self._clear:
            await self._wait_until_clear(timeout)
        if not receipt:
            id = self._dialog.publish(topic, number, body, extension)
            self._write()
            return id
        call = self._loop.create_future()
        id = self._dialog.publish_for_receipt(topic, number, body, extension, call, deadline)
        return cast("Receipt", await self._outcome(call, id))

    # Receiving

    async def recv(self, timeout: float | None = None) -> Message:
        """Return the next message, or request where no handler is set.

        Raises TimedOut; Closed; Disconnected where the connection is gone for good.
        """
        if self._forked:
            self._check()
        return await self._inbox.take(timeout)

    def __aiter__(self) -> Self:
        """Yield messages, and requests where no handler is set, until the client is closed."""
        return self

    async def __anext__(self) -> Message:
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

        An exception is logged, and answered with an ERROR ``failed`` that holds its type's name only. A handler that
        has called message.reply() or message.fail() itself returns None. Can be used as a decorator.
        """
        self._check()
        self._desk.handle_requests(handler)
        return handler

    def on_message(self, handler: MessageHandler) -> MessageHandler:
        """Have ``handler(message)``, a function or a coroutine function, called for each message, in order."""
        self._check()
        self._desk.handle_messages(handler)
        return handler

    def on_undelivered(self, handler: UndeliveredHandler) -> UndeliveredHandler:
        """Have ``handler(error)`` called for each send without a receipt that failed.

        ``error.id`` is what send returned. Without a handler these errors are logged as warnings.
        """
        self._check()
        self._desk.handle_undelivered(handler)
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
            id, subscription._route = self._dialog.subscribe(pattern, group, subscription, call, deadline)
            self._feeds.add(subscription)
            try:
                await self._outcome(call, id)
            except BaseException:
                self._feeds.discard(subscription)
                raise
            return subscription

        return Opening(open)

    async def _unsubscribe(self, subscription: Subscription) -> None:
        self._check()
        assert subscription._route is not None
        call = self._loop.create_future()
        deadline = self._deadline(self._settings.timeout_s)
        id = self._dialog.unsubscribe(subscription._route, subscription, call, deadline)
        subscription.box.end(Closed("the subscription was ended"))
        self._feeds.discard(subscription)
        if id is not None:
            # Whatever the answer is, and if there is none: nothing more comes.
            with contextlib.suppress(Disconnected, Closed, TimedOut):
                await self._outcome(call, id)

    def watch_presence(self, *, timeout: float | None = 30.0) -> Opening[PresenceWatch]:
        """Iterate over Presence: every client this one may send to as it is now, then every change."""

        async def open() -> PresenceWatch:
            deadline = self._deadline(timeout)
            await self._wait_until_clear(timeout)
            feed = PresenceWatch(self)
            call = self._loop.create_future()
            id, feed._watch = self._dialog.watch(feed, call, deadline)
            self._feeds.add(feed)
            try:
                await self._outcome(call, id)
            except BaseException:
                self._feeds.discard(feed)
                raise
            return feed

        return Opening(open)

    def _unwatch(self, feed: PresenceWatch) -> None:
        self._check()
        assert feed._watch is not None
        self._dialog.unwatch(feed._watch)
        self._write()
        self._feeds.discard(feed)
        feed.box.end(Closed("the watch was ended"))

    async def control(self, op: str, /, *, timeout: float | None = 30.0, **arguments: Any) -> dict[str, Any]:
        """Ask the broker for an operation and return its answer. Raises Refused, TimedOut, InDoubt, Disconnected."""
        deadline = self._deadline(timeout)
        await self._wait_until_clear(timeout)
        call = self._loop.create_future()
        id = self._dialog.control(op, arguments, call, deadline)
        return cast("dict[str, Any]", await self._outcome(call, id))

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
        try:
            await self._close_link()
        finally:
            self._stop_timer()
            for link in self._links:
                link.transport.abort()
            here = asyncio.current_task()
            tasks = {self._keeper, *(task for crew in self._crews.values() for task in crew)} - {here}
            for task in tasks:
                task.cancel()
        await asyncio.wait([*tasks, *(link.closed for link in self._links)], timeout=LINGER_S)

    async def _close_link(self) -> None:
        if self._dialog.state is State.READY:
            self._flush()
            await self._until(lambda: self._dialog.state is not State.READY or self._clear, LINGER_S)
        first = self._dialog.state is State.READY
        self._absorb(self._dialog.close(self._loop.time()))
        self._note_state()
        for box in (self._inbox, self._ordered, self._requests):
            box.inbox.clear()
        if self._dialog.state is State.CLOSING and self._link is not None:
            self._regulate()
            self._arm()
            if first and self._link.transport.can_write_eof():
                with contextlib.suppress(OSError):
                    self._link.transport.write_eof()
            await asyncio.wait([self._link.closed], timeout=LINGER_S)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def forked(self) -> None:
        """This is a copy, in a child of the process that made the client. See brokerd_client.forks."""
        self._forked = True
        for link in self._links:
            sock = link.transport.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    os.close(sock.fileno())

    # Below: sending

    def _check(self) -> None:
        if self._forked:
            raise WrongProcess("this client belongs to the process that made it: connect again in the child")

    def _deadline(self, timeout: float | None) -> float | None:
        return None if timeout is None else self._loop.time() + timeout

    async def _wait_until_clear(self, timeout: float | None) -> None:
        """Wait for the connection, and until it takes more.

        Raises TimedOut: earlier bytes are still waiting. Raises Disconnected: there is no connection.
        """
        self._check()
        if self._clear:
            return
        limit = self._settings.timeout_s if timeout is None else timeout
        deadline = self._loop.time() + limit
        while not self._clear:
            ready = self._dialog.state is State.READY
            if self.closed or self._loop.time() >= deadline:
                if not ready:
                    self._dialog.require_ready()
                if timeout is not None:
                    raise TimedOut(f"the broker took nothing more for {limit:g} s; this was not sent")
            # The broker takes nothing now: only the caller's own timeout counts.
            await self._wait_for_change(None if ready and timeout is None else deadline - self._loop.time())

    async def _until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Return whether the condition, which _note_state may make true, comes about in time."""
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
        """Have what the dialog has put out leave: all that comes up in this turn of the loop at once."""
        if self._dialog.untaken > _FLUSH_ABOVE:
            self._flush()
        elif not self._flushing and self._dialog.untaken:
            self._flushing = True
            self._loop.call_soon(self._flush_soon)

    def _flush_soon(self) -> None:
        self._flushing = False
        self._flush()

    def _flush(self) -> None:
        link = self._link
        if link is None or not self._dialog.untaken:
            return
        data = self._dialog.data_to_send()
        link.unwritten += len(data)
        link.transport.write(data)
        if not link.paused:
            self._on_writable(link)

    async def _outcome(self, call: asyncio.Future[Any], id: int) -> Any:
        """Send what was put out, and return or raise what becomes of it."""
        self._write()
        self._arm()
        if self._gauge.full:
            self._regulate()
        try:
            return await call
        finally:
            self._abandon(call, id)

    def _abandon(self, call: asyncio.Future[Any], id: int) -> None:
        """Nobody waits for this any more."""
        if not call.done():
            call.cancel()
        elif not call.cancelled():
            # Marks the exception as seen.
            call.exception()
        self._dialog.abandon(id)
        self._write()

    # Below: what happens

    def _on_open(self, link: _Link) -> None:
        self._links.add(link)
        if self._dialog.state is not State.CONNECTING:
            link.transport.abort()
            return
        self._link = link
        self._dialog.opened(nonce())
        self._arm()

    def _on_data(self, link: _Link, data: bytes) -> None:
        if link is not self._link or self._forked:
            return
        before = self._dialog.state
        batch = self._dialog.receive(data, self, self._loop.time())
        self._absorb(batch)
        if batch.broken is None:
            self._flush()
            if self._dialog.state is not before:
                self._note_state()
            self._regulate()

    def _on_writable(self, link: _Link) -> None:
        if link is self._link:
            if not link.paused:
                self._dialog.wrote(link.unwritten)
                link.unwritten = 0
            if self._clear is link.paused:
                self._note_state()

    def _on_lost(self, link: _Link, error: Exception | None) -> None:
        self._links.discard(link)
        if link is self._link and not self._forked:
            state = self._dialog.state.value
            why = f"the connection broke: {error}" if error else f"the broker closed the connection ({state})"
            self._lose(Disconnected(why))

    def _lose(self, reason: BrokerdError) -> None:
        """The connection is gone, or to be given up."""
        link, self._link = self._link, None
        doubtful = 0
        if link is not None:
            doubtful = link.unwritten
            link.transport.abort()
        now = self._loop.time()
        batch = self._dialog.lost(reason, now, chance(), doubtful=doubtful)
        self._stop_timer()
        self._absorb(batch)
        self._note_state()
        if not self._gone.done():
            self._gone.set_result(None)

    def _absorb(self, batch: Batch[Message]) -> None:
        """Pass on what the dialog says has happened."""
        for call, value in batch.outcomes:
            if not call.done():
                if isinstance(value, BaseException):
                    call.set_exception(value)
                else:
                    call.set_result(value)
        if not self.closed or self._dialog.state is State.GONE:
            if batch.messages:
                self._desk.sort(batch.messages, batch.size + OVERHEAD * len(batch.messages))
            if batch.events:
                self._desk.spread(batch.events)
        for feed, why in batch.ended:
            feed.box.end(why)
            self._feeds.discard(feed)
        for error in batch.undelivered:
            self._desk.tell_undelivered(error)
        if batch.broken is not None:
            # The peer may be owed the word that it was rejected.
            self._flush()
            self._lose(batch.broken)

    def _note_state(self) -> None:
        """Tell who waits for the link what has become of it."""
        state = self._dialog.state
        self._clear = state is State.READY and self._link is not None and not self._link.paused
        if self.closed:
            gone = state is State.GONE
            for box in self._boxes():
                why = f"the connection to the broker is gone: {self._dialog.reason}"
                box.end(Disconnected(why) if gone else Closed("the client is closed"))
            self._feeds.clear()
        for waiter in self._clear_waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _boxes(self) -> list[_Box[Any]]:
        return [self._inbox, self._ordered, self._requests, *(feed.box for feed in self._feeds)]

    def _box(self) -> _Box[Any]:
        return _Box(self._gauge, self._relieve)

    def _relieve(self) -> None:
        if self._gauge.full:
            self._regulate()

    def _regulate(self) -> None:
        """Read, or leave the bytes in the broker, as there is room in this process."""
        link = self._link
        if link is None:
            return
        limit = self._gauge.limit
        over = self._gauge.held > limit and self._gauge.weigh((box.inbox for box in self._boxes()), limit=limit)
        self._gauge.full = over
        stretched = len(self._dialog.awaiting) > 0 and self._gauge.held <= _STRETCH * limit
        reading = not over or stretched or self._dialog.state is State.CLOSING
        if reading is not link.reading:
            link.reading = reading
            if reading:
                link.transport.resume_reading()
            else:
                link.transport.pause_reading()

    def _arm(self) -> None:
        """Be called at the dialog's next deadline; connecting and waiting are timed by the keeper."""
        if self._dialog.state in (State.CONNECTING, State.WAITING, State.GONE, State.CLOSED):
            return
        deadline = self._dialog.next_deadline()
        if self._timer is not None:
            if deadline is not None and self._timer.when() <= deadline:
                return
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            self._timer = self._loop.call_at(deadline, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if not self._forked:
            self._absorb(self._dialog.tick(self._loop.time()))
            self._write()
            self._arm()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _hire(self, box: _Box[Job], most: int) -> None:
        """Have tasks, ``most`` of them, do the jobs in the box."""
        crew = self._crews[box]
        for _ in range(min(most - len(crew), len(box.inbox.items))):
            task = self._loop.create_task(self._work(box), name="brokerd handler")
            crew.add(task)
            # One that is cancelled before it begins leaves the crew here.
            task.add_done_callback(crew.discard)

    async def _work(self, box: _Box[Job]) -> None:
        try:
            while True:
                function, item = box.take_now()
                try:
                    result = function(item)
                    if inspect.isawaitable(result):
                        await result
                except Exception:  # noqa: BLE001 - the handler's own, whatever it is
                    log().exception("a handler failed")
                del function, item
        except IndexError:
            # At once, not when the task is done: what is put in between is to find a place for a new one.
            task = asyncio.current_task()
            assert task is not None
            self._crews[box].discard(task)

    async def _keep_connected(self) -> None:
        """Connect, and connect again, for as long as the dialog wants it."""
        while True:
            self._dialog.dialing(self._loop.time())
            self._gone = self._loop.create_future()
            try:
                async with asyncio.timeout(self._settings.timeout_s):
                    await self._dial()
            except TimeoutError:
                if self._dialog.state is State.CONNECTING:
                    self._lose(TimedOut(f"no connection to {self._settings.address} in time"))
            except (OSError, AddressError) as error:
                reason = f"can't connect to {self._settings.address}: {getattr(error, 'strerror', None) or error}"
                self._lose(error if isinstance(error, AddressError) else Disconnected(reason))
            await self._gone
            if self._dialog.state is not State.WAITING:
                return
            await asyncio.sleep(max(0.0, self._dialog.retry_at - self._loop.time()))

    async def _dial(self) -> None:
        address = self._settings.address

        def link() -> _Link:
            return _Link(self)

        validate_family(address.family)
        if address.family == "AF_PIPE":
            while (pipe := _dialed(address.path)) is None:  # noqa: ASYNC110 - a pipe tells nobody that it is free
                await asyncio.sleep(_CROWDED_S)
            try:
                await self._loop.create_connection(link, sock=pipe)
            except BaseException:
                pipe.close()
                raise
        elif address.family == "AF_UNIX":
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.setblocking(False)
                # The loops take "the queue of new connections is full" for "under way".
                while not _connected(sock, address.path):  # noqa: ASYNC110 - a listener tells nobody that it has room
                    await asyncio.sleep(_CROWDED_S)
                await self._loop.create_unix_connection(link, sock=sock)
            except BaseException:
                sock.close()
                raise
        else:
            await self._loop.create_connection(link, address.host, address.port)

    async def wait_until_ready(self) -> None:
        """Wait for the first introduction. Raises why there is none."""
        beginning = (State.IDLE, State.CONNECTING, State.AUTHENTICATING, State.INTRODUCING)
        while self._dialog.state in beginning:
            await self._wait_for_change(None)
        if self._dialog.state is State.GONE and self._dialog.reason is not None:
            raise self._dialog.reason


def _dialed(name: str) -> BridgedSocket | None:
    try:
        return dial_pipe(name)
    except BlockingIOError:
        return None


def _connected(sock: socket.socket, path: str) -> bool:
    try:
        sock.connect(path)
    except BlockingIOError:
        return False
    return True


def _answering(handler: Callable[[Message], object]) -> Callable[[Message], object]:
    """Return a job that answers a request with what the handler returns."""

    async def answer(request: Message) -> None:
        try:
            result = handler(request)
            if inspect.isawaitable(result):
                result = await result
            if result is not None or not hasattr(request, "_answered"):
                await request.reply(result)
        except (Disconnected, Closed):
            log().warning("a request of %s could not be answered: the connection is gone", request.sender)
        except Exception as error:  # noqa: BLE001 - the handler's own, whatever it is
            log().exception("the handler of a request of %s failed", request.sender)
            with contextlib.suppress(Disconnected, Closed):
                await request.fail(f"the handler failed: {type(error).__name__}")

    return answer


def connect(
    address: AnyAddress | None = None,
    name: str | None = None,
    key: bytes | str | None = None,
    *,
    key_file: str | os.PathLike[str] | None = None,
    timeout: float = DEFAULT_TIMEOUT_S,
    reconnect: bool = True,
    allow_pickle_from: Iterable[str] = (),
    inbox: int = DEFAULT_INBOX,
) -> Opening[Client]:
    """Connect to a broker, once this is awaited or entered: ``async with connect(...) as client``.

    address: as address.parse takes it; else $BROKERD_ADDRESS, else /run/brokerd/brokerd.sock. name: else $BROKERD_NAME,
        else the broker finds it by the key. key, or key_file (one trailing newline is cut): else $BROKERD_KEY_FILE.
    timeout: seconds for all of this, and for a send to wait for a connection.
    reconnect: False makes the first loss final. allow_pickle_from: names whose pickles may be read.
    inbox: bytes of messages kept in this process before the socket is left unread.
    Raises AuthenticationError, Disconnected, TimedOut; AddressError, InvalidName, InvalidKey.
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
