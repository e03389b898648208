"""The broker client for ordinary code: threads may share it, calls block.

A face of :mod:`brokerd_client.dialog`; no rule of the protocol is here.

Here are the calls a user makes. What moves the bytes is in blocking_link, what a client gives to its user in
blocking_feeds, and where threads wait in blocking_boxes.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar, cast, overload

from brokerd_client import message
from brokerd_client.blocking_boxes import Call
from brokerd_client.blocking_feeds import Message, PresenceWatch, Subscription
from brokerd_client.blocking_link import Link
from brokerd_client.codec import encode
from brokerd_client.desk import log
from brokerd_client.dialog import LINGER_S
from brokerd_client.errors import AlreadyAnswered, BrokerdError, Closed, Disconnected, TimedOut
from brokerd_client.life import State
from brokerd_client.lot import make_lot
from brokerd_client.message import Receipt, with_ttl
from brokerd_client.presence import ClientInfo, client_list
from brokerd_client.settings import DEFAULT_INBOX, DEFAULT_TIMEOUT_S, AnyAddress, Settings, resolve

if TYPE_CHECKING:
    from ssl import SSLContext

__all__ = ["Client", "Message", "PresenceWatch", "Subscription", "connect"]

RequestHandler = TypeVar("RequestHandler", bound=Callable[[Message], object])
MessageHandler = TypeVar("MessageHandler", bound=Callable[[Message], object])
UndeliveredHandler = TypeVar("UndeliveredHandler", bound=Callable[[BrokerdError], object])

#: Threads that run a client's request handler.
_REQUEST_THREADS: Final = 4
#: Seconds that close() waits for a handler that is still running.
_HANDLER_GRACE_S: Final = 1.0
#: Seconds that close() waits for the I/O thread: only the look-up of a host's name can hold it.
_THREAD_GRACE_S: Final = 5.0


class Client(Link):
    """A named client of a broker; made by :func:`connect`. Any thread may use it, a fork may not.

    Every call raises Closed after close(), WrongProcess in a fork. Those that send wait while the connection is being
    made again, for ``timeout`` seconds (where None is given, that of connect()), and then raise Disconnected: nothing
    was sent.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, _Answer)
        _open_clients.add(self)

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
        Raises, with receipt, the broker's Refused, TimedOut and InDoubt; without, on_undelivered hears of a refusal,
        and of a connection that breaks before this has left.
        """
        number, body = encode(payload, codec)
        if ttl is not None:
            extension = with_ttl(extension, ttl)
        if receipt:
            deadline = _deadline(timeout)
            call = Call()
            with self._sending(timeout):
                id = self._dialog.send_for_receipt(to, number, body, extension, call, deadline)
                self._write(awaited=True)
            return cast("Receipt", self._outcome(call, id, deadline))
        if self._forked:
            self._check()
        with self._lock:
            if not self._clear:
                self._wait_until_clear(timeout)
            id = self._dialog.send(to, number, body, extension)
            self._write()
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
                self._write()
            return ids
        deadline = _deadline(timeout)
        calls = [Call() for _ in to]
        with self._sending(timeout):
            ask = self._dialog.send_for_receipt
            ids = [
                ask(each, number, body, None, call, deadline)
                for each, number, body, call in zip(to, codecs, bodies, calls, strict=True)
            ]
            self._write(awaited=True)
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
        call = Call()
        with self._sending(timeout):
            id = self._dialog.request(to, number, body, with_ttl(extension, ttl), call, deadline)
            self._write(awaited=True)
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
        with self._sending(None, answer=True):
            message.require_unanswered()
            self._dialog.reply(message.sender, message.id, number, body, extension)
            self._write()
            message.mark_answered()

    def _fail(self, message: Message, text: str, code: str) -> None:
        with self._sending(None, answer=True):
            message.require_unanswered()
            self._dialog.fail(message.sender, message.id, code, text)
            self._write()
            message.mark_answered()

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
                self._write()
            return id
        deadline = _deadline(timeout)
        call = Call()
        with self._sending(timeout):
            id = self._dialog.publish_for_receipt(topic, number, body, extension, call, deadline)
            self._write(awaited=True)
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
        call = Call()
        with self._sending(timeout):
            if callback is not None:
                self._hire(self._ordered, 1)
            id, subscription._route = self._dialog.subscribe(pattern, group, subscription, call, deadline)
            self._write(awaited=True)
        self._outcome(call, id, deadline)
        return subscription

    def _unsubscribe(self, subscription: Subscription) -> None:
        self._check()
        call = Call()
        deadline = _deadline(self._settings.timeout_s)
        with self._lock:
            assert subscription._route is not None
            id = self._dialog.unsubscribe(subscription._route, subscription, call, deadline)
            self._write(awaited=True)
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
        call = Call()
        with self._sending(timeout):
            id, feed._watch = self._dialog.watch(feed, call, deadline)
            self._write(awaited=True)
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
        call = Call()
        with self._sending(timeout):
            id = self._dialog.control(op, arguments, call, deadline)
            self._write(awaited=True)
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
            if self._dialog.may_answer and self._channel.backlog:
                self._changed.wait_for(lambda: not self._dialog.may_answer or not self._channel.backlog, LINGER_S)
            first = self._dialog.state not in (State.CLOSING, State.CLOSED)
            self._absorb(self._dialog.close(time.monotonic()), time.monotonic())
            if self._dialog.state is State.CLOSING and first:
                self._channel.shut()
            for box in list(self._boxes):
                if box is not self._ordered:
                    box.inbox.clear()
            self._desk.drop_jobs()
            self._note_state()
        self._channel.ring()
        _open_clients.discard(self)
        here = threading.current_thread()
        if self._thread is not here:
            self._thread.join(_THREAD_GRACE_S)
        with self._lock:
            # What the thread has said already is not said twice.
            self._desk.warn_of_more(time.monotonic())
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

    def wait_until_ready(self, timeout: float) -> None:
        """Wait for the first introduction. Raises why there is none."""
        with self._lock:
            # The dialog's own deadline comes first; a look-up of the host's name may outlast it.
            if not self._changed.wait_for(lambda: not self._dialog.beginning, timeout + _HANDLER_GRACE_S):
                raise TimedOut(f"no connection to {self._settings.address} within {timeout:g} s")
            if self._dialog.state is State.GONE and self._dialog.reason is not None:
                raise self._dialog.reason


class _Answer:
    """A request handler, as a job: its result is the reply."""

    __slots__ = ("_handler",)

    def __init__(self, handler: Callable[[Message], object]) -> None:
        self._handler = handler

    def __call__(self, request: Message) -> None:
        try:
            result = self._handler(request)
            if not request.answered:
                request.reply(result)
            elif result is not None:
                log().warning("a request of %s had been answered when its handler returned more", request.sender)
        except (Disconnected, Closed):
            log().warning("a request of %s could not be answered: the connection is gone", request.sender)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the handler's own, whatever it is
            log().exception("the handler of a request of %s failed", request.sender)
            with contextlib.suppress(AlreadyAnswered, Disconnected, Closed):
                request.fail(f"the handler failed: {type(error).__name__}")


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
    ssl: SSLContext | bool | None = None,
) -> Client:
    """Connect to a broker and return the client, authenticated and introduced.

    address: as address.parse takes it; else $BROKERD_ADDRESS, else /run/brokerd/brokerd.sock. name: else $BROKERD_NAME,
        else the broker finds it by the key. key, or key_file (one trailing newline is cut): else $BROKERD_KEY_FILE.
    timeout: seconds for all of this, and for a send to wait for a connection.
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
    client = Client(settings)
    try:
        client.wait_until_ready(timeout)
    except BaseException:
        client.close()
        raise
    return client
