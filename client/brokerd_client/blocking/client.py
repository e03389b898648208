"""The broker client for ordinary code: threads may share it, calls block.

A face of :mod:`brokerd_client.protocol.dialog`; no rule of the protocol is here.

Here are the calls a user makes. The module ``base`` holds the connection, ``transport`` moves the bytes,
``subscriptions`` has what a user iterates over, and ``waiters`` where calls wait.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar, cast, overload

from brokerd_client import message
from brokerd_client._common.dispatcher import log
from brokerd_client.blocking.base import BaseClient
from brokerd_client.blocking.handlers import HandlerThreads
from brokerd_client.blocking.subscriptions import BaseSubscription, Message, PresenceWatch, Subscription
from brokerd_client.blocking.waiters import NOTHING, Call, by_handler
from brokerd_client.codec import encode
from brokerd_client.errors import AlreadyAnswered, BrokerdError, Closed, Disconnected, InDoubt, TimedOut
from brokerd_client.message import Receipt, with_ttl
from brokerd_client.presence import ClientInfo, client_list
from brokerd_client.protocol.bulk import encode_many
from brokerd_client.protocol.dialog import LINGER_S
from brokerd_client.protocol.state import State
from brokerd_client.protocol.subscription_table import SubscriptionEntry
from brokerd_client.settings import (
    DEFAULT_INBOX,
    DEFAULT_THREADS,
    DEFAULT_TIMEOUT_S,
    AnyAddress,
    Settings,
    check_timeout,
    resolve,
)
from brokerd_client.wire.envelope import check_address, check_topic

if TYPE_CHECKING:
    from ssl import SSLContext

__all__ = ["Client", "Message", "PresenceWatch", "Subscription", "connect"]

RequestHandler = TypeVar("RequestHandler", bound=Callable[[Message], object])
MessageHandler = TypeVar("MessageHandler", bound=Callable[[Message], object])
UndeliveredHandler = TypeVar("UndeliveredHandler", bound=Callable[[BrokerdError], object])
T = TypeVar("T")

#: Seconds that close() waits for a handler that is still running.
_HANDLER_GRACE_S: Final = 1.0
#: Seconds that close() waits for the I/O thread.
_THREAD_GRACE_S: Final = 5.0


class Client(BaseClient):
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
        if timeout is not None:
            timeout = check_timeout(timeout)
        if receipt:
            return cast("Receipt", self._ask(timeout, self._dialog.send_for_receipt, to, number, body, extension))
        if self._forked:
            self._check()
        deadline = None
        dialog, transport = self._dialog, self._transport
        while True:
            # As in Link._put and Link._write, without the calls.
            try:
                with self._lock:
                    if self._clear and not self._chores:
                        self._clear = False
                        message_id = dialog.send(to, number, body, extension)
                        dialog.took(transport.write(dialog.peek()))
                        if transport.backlog or self._chores:
                            transport.wake()
                        else:
                            self._clear = True
                        return message_id
                if self._interrupting():
                    return self._send_late(to, number, body, extension)
                deadline = self._wait_until_clear(timeout, deadline)
            except BaseException:
                self._mend()
                raise

    def _send_late(self, to: str, number: int, body: bytes, extension: Mapping[str, Any] | None) -> int:
        """Have the I/O thread send, for a signal handler that can't wait for the call that it has interrupted."""
        check_address(to)
        message_id = next(self._dialog.late_ids)
        put = partial(self._dialog.send_as, message_id, to, number, body, extension)
        self._leave_chore(lambda: self._put_late([message_id], to, put))
        return message_id

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
        to, codecs, bodies = encode_many(messages, codec)
        timeout = check_timeout(timeout)
        if not receipt:
            if self._interrupting():
                return [self._send_late(*each, None) for each in zip(to, codecs, bodies, strict=True)]
            return self._put(timeout, self._dialog.send_many, to, codecs, bodies)
        self._refuse_to_wait()
        deadline = _deadline(timeout)
        calls = [Call() for _ in to]

        def put() -> list[int]:
            self._calls.update(calls)
            ask = self._dialog.send_for_receipt
            return [
                ask(each, number, body, None, call, deadline)
                for each, number, body, call in zip(to, codecs, bodies, calls, strict=True)
            ]

        outcomes: list[Any] = []
        try:
            for call, message_id in zip(calls, self._put(timeout, put), strict=True):
                try:
                    outcomes.append(self._outcome(call, message_id, deadline))
                except BrokerdError as error:
                    outcomes.append(error)
        except BaseException:
            for call in calls:
                self._forsake(call)
            raise
        return outcomes

    def _ask(self, timeout: float | None, put: Callable[..., int], *args: Any) -> Any:
        """Put out what has an outcome, with ``put(*args, call, deadline)``; wait for the outcome, and return it."""
        self._check()
        self._refuse_to_wait()
        deadline = _deadline(timeout)
        call = Call()

        def put_out() -> int:
            self._calls.add(call)
            return put(*args, call, deadline)

        try:
            return self._outcome(call, self._put(timeout, put_out), deadline)
        except BaseException:
            if call in self._calls:
                self._forsake(call)
            raise

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
        extension = with_ttl(extension, ttl)
        timeout = check_timeout(timeout)
        return cast("Message", self._ask(timeout, self._dialog.request, to, number, body, extension))

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
        self._answer(message, self._dialog.reply, message.sender, message.id, number, body, extension)

    def _fail(self, message: Message, text: str, code: str) -> None:
        self._answer(message, self._dialog.fail, message.sender, message.id, code, text)

    def _answer(self, message: message.Message, put: Callable[..., None], *args: Any) -> None:
        self._check()

        def put_out() -> None:
            message.require_unanswered()
            put(*args)
            message.mark_answered()

        if self._interrupting():
            message.require_unanswered()
            self._leave_chore(lambda: self._put_late([message.id], message.sender, put_out))
        else:
            self._put(None, put_out, answer=True)

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
        timeout = check_timeout(timeout)
        if receipt:
            return cast("Receipt", self._ask(timeout, self._dialog.publish_for_receipt, topic, number, body, extension))
        if self._interrupting():
            check_topic(topic)
            self._check()
            message_id = next(self._dialog.late_ids)
            put = partial(self._dialog.publish_as, message_id, topic, number, body, extension)
            self._leave_chore(lambda: self._put_late([message_id], topic, put))
            return message_id
        return self._put(timeout, self._dialog.publish, topic, number, body, extension)

    # Receiving

    def recv(self, timeout: float | None = None) -> Message:
        """Return the next message, or request where no handler is set.

        Raises TimedOut; Closed; Disconnected where the connection is gone for good.
        """
        if self._forked:
            self._check()
        return self._inbox.take(timeout if timeout is None else check_timeout(timeout))

    def __iter__(self) -> Iterator[Message]:
        """Yield messages, and requests where no handler is set, until the client is closed."""
        self._check()
        queue, meter = self._inbox, self._meter
        inbox = queue.inbox
        items = inbox.items
        with contextlib.suppress(Closed):
            while True:
                # The common case without a call: the next message is here. A loop over popleft for Box.take's reason.
                try:
                    for item in iter(items.popleft, NOTHING):
                        # Only after it is taken: see Gauge.weigh.
                        if meter.full and len(items) <= inbox.mark:
                            try:
                                queue.resume_reading()
                            except BaseException:
                                queue.give_back(item)
                                raise
                        yield item
                except IndexError as error:
                    if by_handler(error):
                        raise
                    yield queue.take(None)

    def on_request(self, handler: RequestHandler) -> RequestHandler:
        """Have requests answered with what ``handler(message)`` returns, on a few threads of the client's own.

        An exception is logged, and answered with an ERROR ``failed`` that holds its type's name only. A handler that
        has called message.reply() or message.fail() itself returns None. Can be used as a decorator.
        """
        self._handle(self._dispatcher.handle_requests, handler, self._for_requests)
        return handler

    def on_message(self, handler: MessageHandler) -> MessageHandler:
        """Have ``handler(message)`` called for each message, in order, on a thread of the client's own."""
        self._handle(self._dispatcher.handle_messages, handler, self._for_messages)
        return handler

    def on_undelivered(self, handler: UndeliveredHandler) -> UndeliveredHandler:
        """Have ``handler(error)`` called for each send without a receipt that failed.

        ``error.id`` is what send returned. Without a handler these errors are logged as warnings.
        """
        self._handle(self._dispatcher.handle_undelivered, handler, self._for_messages)
        return handler

    def _handle(self, handle: Callable[[Any], None], handler: Any, threads: HandlerThreads) -> None:
        def act() -> None:
            handle(handler)
            threads.start()

        self._check()
        self._have_done(act)

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
        subscription = Subscription(self, pattern, group, callback)
        call = Call()

        def put(deadline: float | None) -> int:
            self._calls.add(call)
            if callback is not None:
                self._for_messages.start()
            message_id, subscription._entry = self._dialog.subscribe(pattern, group, subscription, call, deadline)
            self._queues.add(subscription.queue)
            return message_id

        try:
            self._begin_feed(call, put, timeout)
            return subscription
        except BaseException:
            self._forsake_feed(subscription, call)
            raise

    def _begin_feed(self, call: Call, put: Callable[[float | None], int], timeout: float | None) -> None:
        """Have the I/O thread put out what begins a subscription or a watch, and wait until the broker has said yes."""
        self._check()
        self._refuse_to_wait()
        timeout = check_timeout(timeout)
        deadline = _deadline(timeout)
        message_id = self._have_put(timeout, lambda: put(deadline))
        self._outcome(call, message_id, deadline)

    def _forsake_feed(self, subscription: BaseSubscription[Any], call: Call) -> None:
        """After an exception in the call that makes a subscription or watch: leave nothing of it."""
        self._leave_chore(lambda: self._end_feed_here(subscription, "the subscription was not made"))
        self._forsake(call)

    def _have_put(self, timeout: float | None, put: Callable[[], int]) -> int:
        """Have the I/O thread call ``put``, which puts frames out, once these can be written."""
        until = None
        while True:
            try:
                until = self._wait_until_clear(timeout, until)
                return self._have_done(put)
            except Disconnected:
                # The connection went between the two: there may be another in time.
                if self.closed or until is None or time.monotonic() >= until:
                    raise
            except BaseException:
                self._mend()
                raise

    def _end_feed_here(self, subscription: BaseSubscription[Any], why: str) -> None:
        """Give the subscription or watch nothing more, and tell the broker; with the lock, in the I/O thread."""
        self._dialog.forget(subscription)
        self._end_feed(subscription.queue, Closed(why))

    def _unsubscribe(self, subscription: Subscription) -> None:
        self._check()
        if self._interrupting():
            self._leave_chore(lambda: self._end_feed_here(subscription, "the subscription was ended"))
            return
        call = Call()
        deadline = _deadline(self._settings.timeout_s)

        def put() -> int | None:
            self._calls.add(call)
            entry: SubscriptionEntry | None = subscription._entry
            message_id = None if entry is None else self._dialog.unsubscribe(entry, subscription, call, deadline)
            self._end_feed(subscription.queue, Closed("the subscription was ended"))
            return message_id

        try:
            message_id = self._have_done(put)
            if message_id is not None:
                # Whatever the answer is, and if there is none: nothing more comes.
                with contextlib.suppress(Disconnected, Closed, TimedOut):
                    self._outcome(call, message_id, deadline)
            self._calls.discard(call)
        except BaseException:
            self._forsake(call)
            raise

    def watch_presence(self, *, timeout: float | None = 30.0) -> PresenceWatch:
        """Return an iterator of Presence: every client this one may send to as it is now, then every change."""
        subscription = PresenceWatch(self)
        call = Call()

        def put(deadline: float | None) -> int:
            self._calls.add(call)
            message_id, subscription._watch = self._dialog.watch(subscription, call, deadline)
            self._queues.add(subscription.queue)
            return message_id

        try:
            self._begin_feed(call, put, timeout)
            return subscription
        except BaseException:
            self._forsake_feed(subscription, call)
            raise

    def _unwatch(self, subscription: PresenceWatch) -> None:
        self._check()
        if self._interrupting():
            self._leave_chore(lambda: self._end_feed_here(subscription, "the watch was ended"))
        else:
            self._have_done(lambda: self._end_feed_here(subscription, "the watch was ended"))

    def control(self, op: str, /, *, timeout: float | None = 30.0, **arguments: Any) -> dict[str, Any]:
        """Ask the broker for an operation and return its answer. Raises Refused, TimedOut, InDoubt, Disconnected."""
        return cast("dict[str, Any]", self._ask(check_timeout(timeout), self._dialog.control, op, arguments))

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
        if self._interrupting():
            self._leave_chore(self._begin_end)
            return
        # What a signal handler has sent, as a chore, is flushed, too.
        self._until(lambda: not self._dialog.may_answer or not (self._transport.backlog or self._chores), LINGER_S)
        while True:
            # Again, where an exception in the I/O thread has cut it short.
            with contextlib.suppress(InDoubt):
                self._have_done(self._begin_end)
                break
        _open_clients.discard(self)
        here = threading.current_thread()
        self._thread.join(_THREAD_GRACE_S)
        with self._lock:
            # What the thread has said already is not said twice.
            self._dispatcher.warn_of_more(time.monotonic())
        deadline = time.monotonic() + _HANDLER_GRACE_S
        for thread in (*self._for_requests.threads, *self._for_messages.threads):
            if thread is not here:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _begin_end(self) -> None:
        """Begin the end; with the lock, in the I/O thread or after its end."""
        first = self._dialog.state not in (State.CLOSING, State.CLOSED)
        self._clear = False
        self._apply(self._dialog.close(time.monotonic()), time.monotonic())
        if self._dialog.state is State.CLOSING and first:
            self._transport.shut()
        for queue in list(self._queues):
            if queue is not self._ordered:
                queue.inbox.clear()
        self._dispatcher.drop_jobs()
        self._note_state()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_until_ready(self, timeout: float) -> None:
        """Wait for the first introduction. Raises why there is none."""
        # The dialog's own deadline comes first.
        if not self._until(lambda: not self._dialog.beginning, timeout + _HANDLER_GRACE_S):
            raise TimedOut(f"no connection to {self._settings.address} within {timeout:g} s")
        if self._dialog.state is State.GONE and self._dialog.reason is not None:
            raise self._dialog.reason


class _Answer:
    """A request handler, as a job: its result is the reply."""

    __slots__ = ("_handler",)

    def __init__(self, handler: Callable[[Message], object]) -> None:
        self._handler = handler

    def __call__(self, request: Message) -> None:
        result = self._handler(request)
        try:
            if not request.answered:
                request.reply(result)
            elif result is not None:
                log().warning("a request of %s had been answered when its handler returned more", request.sender)
        except (Disconnected, Closed):
            log().warning("a request of %s could not be answered: the connection is gone", request.sender)

    def failed(self, request: Message, error: BaseException) -> None:
        """Log what the handler raised, and tell the requester that its request has failed."""
        log().error("the handler of a request of %s failed", request.sender, exc_info=error)
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
    timeout: float | None = DEFAULT_TIMEOUT_S,
    reconnect: bool = True,
    allow_pickle_from: Iterable[str] = (),
    inbox: int = DEFAULT_INBOX,
    ssl: SSLContext | bool | None = None,
    threads: int = DEFAULT_THREADS,
) -> Client:
    """Connect to a broker and return the client, authenticated and introduced.

    address: as address.parse takes it; else $BROKERD_ADDRESS, else /run/brokerd/brokerd.sock. name: else $BROKERD_NAME,
        else the broker finds it by the key. key, or key_file (one trailing newline is cut): else $BROKERD_KEY_FILE.
    timeout: seconds for all of this, and for a send to wait for a connection.
    reconnect: False makes the first loss final. allow_pickle_from: names whose pickles may be read.
    inbox: bytes of messages kept in this process before the socket is left unread.
    ssl: a context for TLS, or True for one that trusts what the system trusts, as with an address tls://HOST:PORT.
    threads: threads for request handlers, beside those in which a handler waits for the broker.
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
        threads=threads,
    )
    client = Client(settings)
    try:
        client.wait_until_ready(settings.timeout_s)
    except BaseException:
        client.close()
        raise
    return client
