"""The broker client for ordinary code: threads may share it, calls block.

A face of :mod:`brokerd_client.dialog`: it moves bytes, sleeps until the dialog's next deadline and wakes who waits.
No rule of the protocol is here.

One I/O thread per client reads, connects again, and writes what a sender could not finish; senders write from their
own thread, so that a send costs one system call. One lock guards the dialog. The I/O thread and the handlers' threads
hold the client weakly: one that is dropped unclosed ends, with a ResourceWarning.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Final, Generic, Literal, Self, TypeVar, cast, overload

from brokerd_client import forks, message
from brokerd_client.chance import chance, first_id, nonce
from brokerd_client.channel import Channel
from brokerd_client.codec import encode
from brokerd_client.desk import Desk, Job, log
from brokerd_client.dialog import LINGER_S, Batch, Dialog
from brokerd_client.errors import BrokerdError, Closed, Disconnected, TimedOut, WrongProcess
from brokerd_client.inbox import OVERHEAD, Gauge, Inbox
from brokerd_client.life import State
from brokerd_client.lot import make_lot
from brokerd_client.message import Receipt, with_ttl
from brokerd_client.presence import ClientInfo, Presence, Watch, client_list
from brokerd_client.routes import Route
from brokerd_client.settings import DEFAULT_INBOX, DEFAULT_TIMEOUT_S, AnyAddress, Settings, resolve

__all__ = ["Client", "Message", "PresenceWatch", "Subscription", "connect"]

T = TypeVar("T")
RequestHandler = TypeVar("RequestHandler", bound=Callable[["Message"], object])
MessageHandler = TypeVar("MessageHandler", bound=Callable[["Message"], object])
UndeliveredHandler = TypeVar("UndeliveredHandler", bound=Callable[[BrokerdError], object])

#: Threads that run a client's request handler.
_REQUEST_THREADS: Final = 4
#: While a call waits for its outcome, which may be behind messages nobody takes, so many times ``inbox`` is read.
_STRETCH: Final = 4
#: Seconds until a listener whose queue of new connections is full is tried again.
_CROWDED_S: Final = 0.01
#: Seconds that close() waits for a handler that is still running.
_HANDLER_GRACE_S: Final = 1.0
#: Seconds that close() waits for the I/O thread: only the look-up of a host's name can hold it.
_THREAD_GRACE_S: Final = 5.0


class Message(message.Message):
    """A message received by a blocking client; a REQUEST can be answered."""

    __slots__ = ("_answered",)

    _owner: Client
    #: Set once it has been answered.
    _answered: bool

    def reply(self, payload: object, *, codec: str | int | None = None) -> None:
        """Answer this request. Raises PayloadError, Disconnected or Closed."""
        self._owner.reply(self, payload, codec=codec)

    def fail(self, text: str, code: str = "failed") -> None:
        """Answer this request with an error: the caller gets RequestFailed with this code and text."""
        self._owner._fail(self, text, code)


class _Call:
    """One thread's wait for one outcome."""

    __slots__ = ("_gate", "done", "value")

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._gate.acquire()
        self.done = False
        self.value: Any = None

    def settle(self, value: Any) -> None:
        """Let the thread go on with this outcome."""
        self.value = value
        self.done = True
        self._gate.release()

    def wait(self, deadline: float | None) -> bool:
        """Return whether there is an outcome before the deadline."""
        if deadline is None:
            return self._gate.acquire()
        return self._gate.acquire(timeout=max(0.0, min(deadline - time.monotonic(), threading.TIMEOUT_MAX)))


class _Box(Generic[T]):
    """An inbox that threads can wait at."""

    __slots__ = ("__weakref__", "_channel", "_gauge", "ended", "filled", "inbox")

    def __init__(self, lock: threading.Lock, gauge: Gauge, channel: Channel) -> None:
        self.inbox: Inbox[T] = Inbox(gauge)
        self.filled = threading.Condition(lock)
        #: Why nothing more will come.
        self.ended: BrokerdError | None = None
        self._gauge = gauge
        self._channel = channel

    def put(self, items: list[T], size: int) -> None:
        """Add items and wake who waits; with the lock held."""
        self.inbox.put(items, size)
        self.filled.notify(len(items))

    def end(self, why: BrokerdError) -> None:
        """Nothing more will come; with the lock held."""
        if self.ended is None:
            self.ended = why
        self.filled.notify_all()

    def take(self, timeout: float | None) -> T:
        """Return the next item. Raises TimedOut, or why nothing more will come."""
        try:
            item = self.inbox.items.popleft()
        except IndexError:
            item = self._wait(timeout)
        if self._gauge.full and len(self.inbox.items) <= self.inbox.mark:
            self.relieve()
        return item

    def _wait(self, timeout: float | None) -> T:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self.filled:
            while True:
                # A taker that needs no lock may be faster than one that has just been woken.
                with contextlib.suppress(IndexError):
                    return self.inbox.items.popleft()
                if self.ended is not None:
                    raise self.ended.with_traceback(None)
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    raise TimedOut(f"nothing arrived within {timeout:g} s")
                self.filled.wait(remaining)

    def relieve(self) -> None:
        """Have the socket read again, if that was the message too many."""
        with self.filled:
            self.inbox.settle()
            if self._gauge.held <= self._gauge.limit:
                self._gauge.full = False
                self._channel.ring()


class _Feed(Generic[T]):
    """What a subscription or a watch gives: an iterator that ends when the feed or its client is closed."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.box: _Box[T] = client._box()

    def recv(self, timeout: float | None = None) -> T:
        """Return the next one. Raises TimedOut; Closed after the end; the broker's refusal if it ended this."""
        self._client._check()
        return self.box.take(timeout)

    def __iter__(self) -> Iterator[T]:
        with contextlib.suppress(Closed):
            while True:
                yield self.recv()

    def close(self) -> None:
        """Ask for nothing more."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Subscription(_Feed[Message]):
    """Events whose topic fits ``pattern``; those of a ``group`` are shared among its members.

    With a callback the events go to it, on the client's handler thread, one after the other.
    """

    def __init__(
        self, client: Client, pattern: str, group: str | None, callback: Callable[[Message], object] | None
    ) -> None:
        super().__init__(client)
        self.pattern = pattern
        self.group = group
        self.callback = callback
        self._route: Route | None = None

    def unsubscribe(self) -> None:
        """Ask for no more events; iterating ends with those that are here already."""
        self._client._unsubscribe(self)

    close = unsubscribe

    def __repr__(self) -> str:
        return f"<Subscription {self.pattern!r}{f' in group {self.group!r}' if self.group else ''}>"


class PresenceWatch(_Feed[Presence]):
    """One Presence for each client this one may send to, as it is now; then every change."""

    callback = None
    _watch: Watch | None = None

    def close(self) -> None:
        """Ask for no more changes."""
        self._client._unwatch(self)


class Client:
    """A named client of a broker; made by :func:`connect`. Any thread may use it, a fork may not.

    Every call raises Closed after close(), WrongProcess in a fork. Those that send wait while the connection is being
    made again, for ``timeout`` seconds (where None is given, that of connect()), and then raise Disconnected: nothing
    was sent.
    """

    def __init__(self, settings: Settings) -> None:
        self.allow_pickle_from = settings.allow_pickle_from
        self._settings = settings
        self._dialog: Dialog[Message] = Dialog(
            settings.key,
            settings.name,
            first_id(),
            Message,
            reconnect=settings.reconnect,
            timeout_s=settings.timeout_s,
        )
        self._channel = Channel(settings.address)
        self._lock = threading.Lock()
        #: The link has become ready, or will not any more, or everything is written.
        self._changed = threading.Condition(self._lock)
        #: Whether a send can be written at once: the link is ready and nothing is waiting to be written.
        self._clear = False
        #: Whether the connection is gone for the dialog, and only the I/O thread has not closed it yet.
        self._dropping = False
        self._dial_at = 0.0
        self._forked = False
        #: Whether nobody but the I/O thread has the client any more.
        self._dropped = False
        self._gauge = Gauge(settings.inbox)
        #: Kept weakly: a subscription that is dropped is not kept alive by being counted.
        self._boxes: weakref.WeakSet[_Box[Any]] = weakref.WeakSet()
        self._inbox: _Box[Message] = self._box()
        self._ordered: _Box[Job] = self._box()
        self._requests: _Box[Job] = self._box()
        self._desk: Desk[Message] = Desk(self._inbox, self._ordered, self._requests, _Answer)
        self._threads: list[threading.Thread] = []
        self._thread = threading.Thread(
            target=_move_bytes,
            args=(weakref.ref(self), self._channel, (self._inbox, self._ordered, self._requests)),
            name="brokerd client",
            daemon=True,
        )
        self._thread.start()
        _open_clients.add(self)
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
    def send(
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
    def send(
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

    def send(
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
        if receipt:
            deadline = _deadline(timeout)
            call = _Call()
            with self._sending(timeout):
                id = self._dialog.send_for_receipt(to, number, body, extension, call, deadline)
                self._write(call)
            return cast("Receipt", self._outcome(call, id, deadline))
        if self._forked:
            self._check()
        with self._lock:
            if not self._clear:
                self._wait_until_clear(timeout)
            id = self._dialog.send(to, number, body, extension)
            self._write(id)
        return id

    def send_many(
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
        if not receipt:
            with self._sending(timeout):
                ids = self._dialog.send_many(to, codecs, bodies)
                self._write(*ids[-1:])
            return ids
        deadline = _deadline(timeout)
        calls = [_Call() for _ in to]
        with self._sending(timeout):
            ask = self._dialog.send_for_receipt
            ids = [
                ask(each, number, body, None, call, deadline)
                for each, number, body, call in zip(to, codecs, bodies, calls, strict=True)
            ]
            self._write(*calls)
        outcomes: list[Any] = []
        try:
            for call, id in zip(calls, ids, strict=True):
                try:
                    outcomes.append(self._outcome(call, id, deadline))
                except BrokerdError as error:
                    outcomes.append(error)
        finally:
            self._abandon(ids[len(outcomes) :])
        return outcomes

    def request(
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
        deadline = _deadline(timeout)
        call = _Call()
        with self._sending(timeout):
            id = self._dialog.request(to, number, body, with_ttl(extension, ttl), call, deadline)
            self._write(call)
        return cast("Message", self._outcome(call, id, deadline))

    def reply(
        self,
        message: message.Message,
        payload: object,
        *,
        codec: str | int | None = None,
        extension: Mapping[str, Any] | None = None,
    ) -> None:
        """Answer a request that was received; if it can't be delivered, on_undelivered hears of it."""
        number, body = encode(payload, codec)
        with self._sending(None):
            self._dialog.reply(message.sender, message.id, number, body, extension)
            self._write(message.id)
        _mark_answered(message)

    def _fail(self, message: Message, text: str, code: str) -> None:
        with self._sending(None):
            self._dialog.fail(message.sender, message.id, code, text)
            self._write(message.id)
        _mark_answered(message)

    @overload
    def publish(
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
    def publish(
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

    def publish(
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
        if not receipt:
            with self._sending(timeout):
                id = self._dialog.publish(topic, number, body, extension)
                self._write(id)
            return id
        deadline = _deadline(timeout)
        call = _Call()
        with self._sending(timeout):
            id = self._dialog.publish_for_receipt(topic, number, body, extension, call, deadline)
            self._write(call)
        return cast("Receipt", self._outcome(call, id, deadline))

    # Receiving

    def recv(self, timeout: float | None = None) -> Message:
        """Return the next message, or request where no handler is set.

        Raises TimedOut; Closed; Disconnected where the connection is gone for good.
        """
        if self._forked:
            self._check()
        return self._inbox.take(timeout)

    def __iter__(self) -> Iterator[Message]:
        """Yield messages, and requests where no handler is set, until the client is closed."""
        self._check()
        box, gauge = self._inbox, self._gauge
        inbox = box.inbox
        items, next_here = inbox.items, inbox.items.popleft
        with contextlib.suppress(Closed):
            while True:
                # The common case without a call: the next message is here.
                try:
                    while True:
                        item = next_here()
                        # Only after it is taken: see Gauge.weigh.
                        if gauge.full and len(items) <= inbox.mark:
                            box.relieve()
                        yield item
                except IndexError:
                    yield box.take(None)

    def on_request(self, handler: RequestHandler) -> RequestHandler:
        """Have requests answered with what ``handler(message)`` returns, on a few threads of the client's own.

        An exception is logged, and answered with an ERROR ``failed`` that holds its type's name only. A handler that
        has called message.reply() or message.fail() itself returns None. Can be used as a decorator.
        """
        with self._locked():
            self._desk.handle_requests(handler)
            self._hire(self._requests, _REQUEST_THREADS)
        return handler

    def on_message(self, handler: MessageHandler) -> MessageHandler:
        """Have ``handler(message)`` called for each message, in order, on a thread of the client's own."""
        with self._locked():
            self._desk.handle_messages(handler)
            self._hire(self._ordered, 1)
        return handler

    def on_undelivered(self, handler: UndeliveredHandler) -> UndeliveredHandler:
        """Have ``handler(error)`` called for each send without a receipt that failed.

        ``error.id`` is what send returned. Without a handler these errors are logged as warnings.
        """
        with self._locked():
            self._desk.handle_undelivered(handler)
            self._hire(self._ordered, 1)
        return handler

    # Topics, presence and the broker itself

    def subscribe(
        self,
        pattern: str,
        group: str | None = None,
        callback: Callable[[Message], object] | None = None,
        *,
        timeout: float | None = 30.0,
    ) -> Subscription:
        """Subscribe to topics; return once the broker has said yes. Made again after every reconnect.

        group: each event goes to one member of the group. Raises Denied, InvalidName and what request() raises.
        """
        self._check()
        subscription = Subscription(self, pattern, group, callback)
        deadline = _deadline(timeout)
        call = _Call()
        with self._sending(timeout):
            if callback is not None:
                self._hire(self._ordered, 1)
            id, subscription._route = self._dialog.subscribe(pattern, group, subscription, call, deadline)
            self._write(call)
        self._outcome(call, id, deadline)
        return subscription

    def _unsubscribe(self, subscription: Subscription) -> None:
        self._check()
        call = _Call()
        deadline = _deadline(self._settings.timeout_s)
        with self._lock:
            assert subscription._route is not None
            id = self._dialog.unsubscribe(subscription._route, subscription, call, deadline)
            self._write(call)
            subscription.box.end(Closed("the subscription was ended"))
        if id is not None:
            # Whatever the answer is, and if there is none: nothing more comes.
            with contextlib.suppress(Disconnected, Closed, TimedOut):
                self._outcome(call, id, deadline)

    def watch_presence(self, *, timeout: float | None = 30.0) -> PresenceWatch:
        """Return an iterator of Presence: every client this one may send to as it is now, then every change."""
        self._check()
        feed = PresenceWatch(self)
        deadline = _deadline(timeout)
        call = _Call()
        with self._sending(timeout):
            id, feed._watch = self._dialog.watch(feed, call, deadline)
            self._write(call)
        self._outcome(call, id, deadline)
        return feed

    def _unwatch(self, feed: PresenceWatch) -> None:
        self._check()
        with self._lock:
            assert feed._watch is not None
            self._dialog.unwatch(feed._watch)
            self._write()
            feed.box.end(Closed("the watch was ended"))

    def control(self, op: str, /, *, timeout: float | None = 30.0, **arguments: Any) -> dict[str, Any]:
        """Ask the broker for an operation and return its answer. Raises Refused, TimedOut, InDoubt, Disconnected."""
        deadline = _deadline(timeout)
        call = _Call()
        with self._sending(timeout):
            id = self._dialog.control(op, arguments, call, deadline)
            self._write(call)
        return cast("dict[str, Any]", self._outcome(call, id, deadline))

    def clients(self) -> list[ClientInfo]:
        """Return the clients this one may send to, and which of them are online."""
        return client_list(self.control("clients"))

    def whoami(self) -> dict[str, Any]:
        """Return what the broker says of this client and of itself: name, address, version, protocol, limits."""
        return self.control("whoami")

    def ping(self) -> float:
        """Return how long the broker takes to answer, in seconds."""
        started = time.perf_counter()
        self.control("ping")
        return time.perf_counter() - started

    # The end

    def close(self) -> None:
        """End the connection and every thread of the client; who waits gets Closed. Does nothing the second time.

        What has been sent is flushed, and refusals that follow at once are still heard, for half a second each at most.
        Messages that nobody has taken are dropped. In a fork of the client's process it does nothing.
        """
        if self._forked:
            return
        with self._lock:
            if self._dialog.state is State.READY and self._channel.backlog:
                self._changed.wait_for(
                    lambda: self._dialog.state is not State.READY or not self._channel.backlog, LINGER_S
                )
            first = self._dialog.state not in (State.CLOSING, State.CLOSED)
            self._absorb(self._dialog.close(time.monotonic()), time.monotonic())
            if self._dialog.state is State.CLOSING and first:
                self._channel.shut()
            for box in list(self._boxes):
                box.inbox.clear()
            self._note_state()
        self._channel.ring()
        _open_clients.discard(self)
        here = threading.current_thread()
        if self._thread is not here:
            self._thread.join(_THREAD_GRACE_S)
        deadline = time.monotonic() + _HANDLER_GRACE_S
        for thread in self._threads:
            if thread is not here:
                thread.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A client whose constructor raised has no thread.
        if getattr(self, "_thread", None) is None or self._forked or not self._thread.is_alive():
            return
        if self._dialog.state is not State.CLOSED:
            # No source=self: who keeps the warning would keep the client.
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2)
        # Until this returns the I/O thread's weak reference still works, and using it brings the client back to life.
        self._dropped = True
        self._channel.ring()

    def forked(self) -> None:
        """This is a copy, in a child of the process that made the client. See brokerd_client.forks."""
        self._forked = True
        self._channel.disown()

    def wait_until_ready(self, timeout: float) -> None:
        """Wait for the first introduction. Raises why there is none."""
        beginning = (State.IDLE, State.CONNECTING, State.AUTHENTICATING, State.INTRODUCING)
        with self._lock:
            # The dialog's own deadline comes first; a look-up of the host's name may outlast it.
            if not self._changed.wait_for(lambda: self._dialog.state not in beginning, timeout + _HANDLER_GRACE_S):
                raise TimedOut(f"no connection to {self._settings.address} within {timeout:g} s")
            if self._dialog.state is State.GONE and self._dialog.reason is not None:
                raise self._dialog.reason

    # Below: with the lock held, unless something else is said

    def _check(self) -> None:
        """Raise WrongProcess in a fork. Needs no lock: in a fork it may be held for ever."""
        if self._forked:
            raise WrongProcess("this client belongs to the process that made it: connect again in the child")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._check()
        with self._lock:
            yield

    @contextlib.contextmanager
    def _sending(self, timeout: float | None) -> Iterator[None]:
        """Hold the lock, once a send can be written at once."""
        self._check()
        with self._lock:
            if not self._clear:
                self._wait_until_clear(timeout)
            yield

    def _wait_until_clear(self, timeout: float | None) -> None:
        """Wait for the connection, and until what others have sent is written.

        Raises TimedOut: others' bytes are still waiting. Raises Disconnected: there is no connection.
        """
        limit = self._settings.timeout_s if timeout is None else timeout
        deadline = time.monotonic() + limit
        while not self._clear:
            if self._dialog.state is State.READY:
                # The broker takes nothing now: only the caller's own timeout counts.
                remaining = None if timeout is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    raise TimedOut(f"the broker took nothing more for {limit:g} s; this was not sent")
            else:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or self.closed:
                    self._dialog.require_ready()
            self._changed.wait(remaining)

    def _write(self, *own: Any) -> None:
        """Write what the dialog has put out.

        own: the calls, or the last of the ids, of this thread. Raises Disconnected if their connection turns out to be
        gone: an id's failure is raised here, a call's is its outcome.
        """
        data = self._dialog.data_to_send()
        if not data:
            return
        try:
            self._dialog.wrote(self._channel.write(data))
        except OSError as error:
            reason = Disconnected(f"writing failed: {error}")
            batch = self._end_link(reason, time.monotonic())
            ids = [each for each in own if isinstance(each, int)]
            mine = [error for error in batch.undelivered if ids and getattr(error, "id", 0) == ids[-1]]
            self._absorb(batch, time.monotonic(), heard=mine)
            if mine:
                raise mine[-1] from error
            return
        if self._channel.backlog:
            self._clear = False
            self._channel.ring()
        elif self._gauge.full and own:
            # An outcome is awaited: it may be behind what is not being read.
            self._channel.ring()

    def _outcome(self, call: _Call, id: int, deadline: float | None) -> Any:
        """Wait, without the lock, and return or raise what became of a call."""
        try:
            done = call.wait(deadline)
        except BaseException:
            self._abandon([id])
            raise
        if not done:
            self._abandon([id])
            if not call.done:
                raise TimedOut(f"no answer to {id} in time")
        if isinstance(call.value, BaseException):
            raise call.value
        return call.value

    def _abandon(self, ids: list[int]) -> None:
        """Nobody waits for these any more; without the lock."""
        if ids:
            with self._lock:
                for id in ids:
                    self._dialog.abandon(id)
                self._write()

    def _box(self) -> _Box[Any]:
        """Return a new box of this client; without the lock."""
        box: _Box[Any] = _Box(self._lock, self._gauge, self._channel)
        with self._lock:
            self._boxes.add(box)
        return box

    def _hire(self, box: _Box[Job], count: int) -> None:
        """Have so many threads do the jobs in the box, if none does yet."""
        name = "brokerd requests" if box is self._requests else "brokerd messages"
        if box.ended is not None or any(thread.name == name for thread in self._threads):
            return
        for _ in range(count):
            thread = threading.Thread(target=_work, args=(box,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _absorb(self, batch: Batch[Message], now: float, heard: Iterable[BrokerdError] = ()) -> None:
        """Pass on what the dialog says has happened. heard: failures that somebody has been told of already."""
        for call, value in batch.outcomes:
            call.settle(value)
        if self._dialog.state is not State.CLOSING:
            if batch.messages:
                self._desk.sort(batch.messages, batch.size + OVERHEAD * len(batch.messages))
            if batch.events:
                self._desk.spread(batch.events)
        for sink, why in batch.ended:
            sink.box.end(why)
        for error in batch.undelivered:
            if error not in heard:
                self._desk.tell_undelivered(error)
        if batch.broken is not None:
            # The peer may be owed the word that it was rejected.
            with contextlib.suppress(OSError):
                if self._channel.open and not self._channel.connecting:
                    self._dialog.wrote(self._channel.write(self._dialog.data_to_send()))
            self._absorb(self._end_link(batch.broken, now), now)

    def _end_link(self, reason: BrokerdError, now: float) -> Batch[Message]:
        """Tell the dialog that the connection is gone; the I/O thread closes it."""
        batch = self._dialog.lost(reason, now, chance())
        self._dial_at = self._dialog.retry_at
        self._dropping = True
        self._note_state()
        self._channel.ring()
        return batch

    def _note_state(self) -> None:
        """Tell who waits for the link what has become of it."""
        state = self._dialog.state
        self._clear = state is State.READY and not self._channel.backlog
        if state is State.GONE:
            why = Disconnected(f"the connection to the broker is gone: {self._dialog.reason}")
            for box in list(self._boxes):
                box.end(why)
        elif state in (State.CLOSING, State.CLOSED):
            for box in list(self._boxes):
                box.end(Closed("the client is closed"))
        self._changed.notify_all()

    # The I/O thread; without the lock

    def prepare(self) -> tuple[float | None, bool] | None:
        """Do what is due; return (seconds to wait, whether to read), or None when there is nothing more to do."""
        if self._dropped:
            return None
        now = time.monotonic()
        with self._lock:
            if self._dropping:
                self._channel.drop()
                self._dropping = False
            self._absorb(self._dialog.tick(now), now)
            if self._dropping:
                self._channel.drop()
                self._dropping = False
            state = self._dialog.state
            if state in (State.CLOSED, State.GONE):
                return None
            dialing = state in (State.IDLE, State.WAITING) and now >= self._dial_at
            if dialing:
                self._dialog.dialing(now)
        if dialing or (state is State.CONNECTING and not self._channel.open and now >= self._dial_at):
            self._dial(now)
        with self._lock:
            deadline = self._dialog.next_deadline()
            if self._dialog.state is State.CONNECTING and not self._channel.open:
                deadline = self._dial_at if deadline is None else min(deadline, self._dial_at)
            limit = self._gauge.limit
            over = self._gauge.weigh((box.inbox for box in self._boxes), limit=limit)
            reading = not over or (len(self._dialog.awaiting) > 0 and self._gauge.held <= _STRETCH * limit)
            closing = self._dialog.state is State.CLOSING
        return (None if deadline is None else max(0.0, deadline - time.monotonic())), reading or closing

    def _dial(self, now: float) -> None:
        try:
            done = self._channel.dial()
        except BlockingIOError:
            self._dial_at = now + _CROWDED_S
            return
        except OSError as error:
            self._lose(Disconnected(f"can't connect to {self._settings.address}: {error.strerror or error}"))
            return
        if done:
            self._open()

    def _open(self) -> None:
        with self._lock:
            if self._dialog.state is State.CONNECTING:
                self._dialog.opened(nonce())

    def _lose(self, reason: BrokerdError) -> None:
        now = time.monotonic()
        with self._lock:
            if not self._dropping and self._dialog.state not in (State.WAITING, State.GONE):
                self._absorb(self._end_link(reason, now), now)

    def act(self, *, readable: bool, writable: bool) -> None:
        """Do what the socket is ready for."""
        channel = self._channel
        if channel.connecting:
            if writable:
                try:
                    done = channel.connected()
                except OSError as error:
                    self._lose(Disconnected(f"can't connect to {self._settings.address}: {error.strerror or error}"))
                    return
                if done:
                    self._open()
            return
        data: bytes | None = None
        try:
            if readable:
                data = channel.read()
            if writable:
                self._flush()
        except OSError as error:
            self._lose(Disconnected(f"the connection broke: {error.strerror or error}"))
            return
        if data is None:
            return
        if not data:
            self._lose(Disconnected(f"the broker closed the connection ({self._dialog.state.value})"))
            return
        now = time.monotonic()
        with self._lock:
            if self._dropping:
                return
            before = self._dialog.state
            batch = self._dialog.receive(data, self, now)
            self._absorb(batch, now)
            if batch.broken is None:
                self._write()
            if self._dialog.state is not before and self._dialog.state is State.READY:
                self._note_state()

    def _flush(self) -> None:
        with self._lock:
            if self._channel.backlog and not self._dropping:
                self._dialog.wrote(self._channel.flush())
                if not self._channel.backlog:
                    self._note_state()


class _Answer:
    """A request handler, as a job: its result is the reply."""

    __slots__ = ("_handler",)

    def __init__(self, handler: Callable[[Message], object]) -> None:
        self._handler = handler

    def __call__(self, request: Message) -> None:
        try:
            result = self._handler(request)
            if result is not None or not hasattr(request, "_answered"):
                request.reply(result)
        except (Disconnected, Closed):
            log().warning("a request of %s could not be answered: the connection is gone", request.sender)
        except Exception as error:  # noqa: BLE001 - the handler's own, whatever it is
            log().exception("the handler of a request of %s failed", request.sender)
            with contextlib.suppress(Disconnected, Closed):
                request.fail(f"the handler failed: {type(error).__name__}")


def _mark_answered(request: message.Message) -> None:
    if isinstance(request, Message):
        request._answered = True


def _work(box: _Box[Job]) -> None:
    """Do the jobs of a box until it ends. Holds the client only while a job is being done."""
    while True:
        try:
            function, item = box.take(None)
        except BrokerdError:
            return
        try:
            function(item)
        except Exception:  # noqa: BLE001 - the handler's own, whatever it is
            log().exception("a handler failed")
        del function, item


def _move_bytes(ref: weakref.ref[Client], channel: Channel, boxes: Iterable[_Box[Any]]) -> None:
    """Run a client's I/O thread. Holds the client only between two waits.

    boxes: ended when the thread ends, for a client that was dropped unclosed can't do it.
    """
    try:
        while (client := ref()) is not None:
            try:
                plan = client.prepare()
            finally:
                del client
            if plan is None:
                return
            readable, writable = channel.wait(plan[0], reading=plan[1])
            if (client := ref()) is None:
                return
            try:
                client.act(readable=readable, writable=writable)
            finally:
                del client
    finally:
        channel.close()
        for box in boxes:
            with box.filled:
                box.end(Closed("the client is closed"))


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


_open_clients: weakref.WeakSet[Client] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for client in list(_open_clients):
        client.close()


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
) -> Client:
    """Connect to a broker and return the client, authenticated and introduced.

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
    client = Client(settings)
    try:
        client.wait_until_ready(timeout)
    except BaseException:
        client.close()
        raise
    return client
