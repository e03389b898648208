"""The blocking broker client: threads may share it, and its calls block.

A face of :mod:`brokerd_client.protocol.dialog`; no rule of the protocol is here.

This module has the calls that a user makes. The module ``base`` holds the connection,
and ``transport`` moves the bytes. ``subscriptions`` has the objects that a user
iterates over, and ``waiters`` has the objects that calls wait on.
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
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, cast

from brokerd_client import message
from brokerd_client._common.dispatcher import log
from brokerd_client.blocking.base import BaseClient
from brokerd_client.blocking.handlers import HandlerThreads
from brokerd_client.blocking.subscriptions import (
    BaseSubscription,
    Message,
    PresenceWatch,
    Subscription,
)
from brokerd_client.blocking.waiters import NOTHING, Call, by_handler
from brokerd_client.codec import encode
from brokerd_client.errors import (
    AlreadyAnswered,
    BrokerdError,
    Closed,
    Disconnected,
    InDoubt,
    TimedOut,
)
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
    """A named client of a broker, made by :func:`connect`.

    Any thread may use it, but a fork of the process may not.

    Every call raises Closed after close(), and WrongProcess in a fork. Calls that send
    wait while the client reconnects, for ``timeout`` seconds at most. With None they
    wait for the timeout of connect(). After that they raise Disconnected: nothing was
    sent.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, _Answer)
        _open_clients.add(self)

    # Properties

    @property
    def name(self) -> str:
        """The client's name, as the broker reported it."""
        return self._dialog.name

    @property
    def address(self) -> str:
        """The sender's address that other clients see: the name, or NAME/INSTANCE in a
        pool.

        It may change with a reconnect.
        """
        return self._dialog.address

    @property
    def connected(self) -> bool:
        """Whether the client is connected and ready to send at this moment."""
        return self._dialog.state is State.READY

    @property
    def counters(self) -> dict[str, int]:
        """Counts of failures so far, by kind.

        Counted are late answers, undelivered sends, unclaimed events and lost
        connections.
        """
        return self._dialog.counters

    def __repr__(self) -> str:
        return (
            f"<Client {self.address or self.name!r} at {self._settings.address}"
            f" {self._dialog.state.name.lower()}>"
        )

    # Sending

    def send(
        self,
        to: str,
        payload: object,
        *,
        codec: str | int | None = None,
        ttl: float | None = None,
        extension: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> int:
        """Send a message to a client.

        The on_undelivered handler is called if the broker refuses the message, or if
        the connection breaks before it has left.

        Args:
            to: The recipient's address: NAME or NAME/INSTANCE.
            payload: The object to send.
            codec: The codec of the payload, by name or number.
            ttl: Seconds that the message stays deliverable while it waits in a queue.
            extension: A JSON object that travels beside the payload.
            timeout: Seconds for the whole call. With None only the wait for a connection
                is limited, by the timeout of connect().

        Returns:
            The message's id.

        Raises:
            PayloadError: The payload cannot be encoded.
            InvalidName: ``to`` is not a valid address.
            TimedOut: The broker did not read in time.
            Disconnected: The client is not connected; nothing was sent.
        """
        number, body = encode(payload, codec)
        if ttl is not None:
            extension = with_ttl(extension, ttl)
        if timeout is not None:
            timeout = check_timeout(timeout)
        if self._forked:
            self._check()
        deadline = None
        dialog, transport = self._dialog, self._transport
        while True:
            # The same as BaseClient._put and BaseClient._write, inlined to save the
            # calls.
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

    def _send_late(
        self, to: str, number: int, body: bytes, extension: Mapping[str, Any] | None
    ) -> int:
        """Queue a send for the I/O thread: a signal handler can't wait for the lock."""
        check_address(to)
        message_id = next(self._dialog.late_ids)
        put = partial(self._dialog.send_as, message_id, to, number, body, extension)
        self._leave_chore(lambda: self._put_late([message_id], to, put))
        return message_id

    def send_confirmed(
        self,
        to: str,
        payload: object,
        *,
        codec: str | int | None = None,
        ttl: float | None = None,
        extension: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Receipt:
        """Send a message to a client, and wait until the broker has accepted it.

        Args:
            to: The recipient's address: NAME or NAME/INSTANCE.
            payload: The object to send.
            codec: The codec of the payload, by name or number.
            ttl: Seconds that the message stays deliverable while it waits in a queue.
            extension: A JSON object that travels beside the payload.
            timeout: Seconds for the whole call. With None only the wait for a connection
                is limited, by the timeout of connect().

        Returns:
            The broker's confirmation.

        Raises:
            PayloadError: The payload cannot be encoded.
            InvalidName: ``to`` is not a valid address.
            Refused: The broker refused the message.
            TimedOut: The broker did not read, or did not answer, in time.
            InDoubt: The connection broke before the outcome was known.
            Disconnected: The client is not connected; nothing was sent.
        """
        number, body = encode(payload, codec)
        extension = with_ttl(extension, ttl)
        put = self._dialog.send_for_receipt
        return cast("Receipt", self._ask(timeout, put, to, number, body, extension))

    def send_many(
        self,
        messages: Iterable[tuple[str, object]],
        *,
        codec: str | int | None = None,
        timeout: float | None = None,
    ) -> list[int]:
        """Send messages with one system call.

        The on_undelivered handler is called as in :meth:`send`.

        Args:
            messages: Pairs of a recipient's address and a payload.
            codec: The codec of the payloads, by name or number.
            timeout: Seconds for the whole call. With None only the wait for a connection
                is limited, by the timeout of connect().

        Returns:
            The messages' ids, in order.

        Raises:
            PayloadError: A payload cannot be encoded; no message was sent.
            InvalidName: An address is not valid; no message was sent.
            TimedOut: The broker did not read in time.
            Disconnected: The client is not connected; nothing was sent.
        """
        to, codecs, bodies = encode_many(messages, codec)
        timeout = check_timeout(timeout)
        if self._interrupting():
            bulk = zip(to, codecs, bodies, strict=True)
            return [self._send_late(*message, None) for message in bulk]
        return self._put(timeout, self._dialog.send_many, to, codecs, bodies)

    def send_many_confirmed(
        self,
        messages: Iterable[tuple[str, object]],
        *,
        codec: str | int | None = None,
        timeout: float | None = None,
    ) -> list[Receipt | BrokerdError]:
        """Send messages with one system call, and wait for the outcome of each.

        Args:
            messages: Pairs of a recipient's address and a payload.
            codec: The codec of the payloads, by name or number.
            timeout: Seconds for the whole call. With None only the wait for a connection
                is limited, by the timeout of connect().

        Returns:
            The outcome of each message, in order: a Receipt or the error. These errors are
            not raised, so that none hides another.

        Raises:
            PayloadError: A payload cannot be encoded; no message was sent.
            InvalidName: An address is not valid; no message was sent.
            TimedOut: The broker did not read in time.
            Disconnected: The client is not connected; nothing was sent.
        """
        to, codecs, bodies = encode_many(messages, codec)
        timeout = check_timeout(timeout)
        self._refuse_to_wait()
        deadline = _deadline(timeout)
        calls = [Call() for _ in to]

        def put_all() -> list[int]:
            self._calls.update(calls)
            put = self._dialog.send_for_receipt
            return [
                put(recipient, number, body, None, call, deadline)
                for recipient, number, body, call in zip(to, codecs, bodies, calls, strict=True)
            ]

        outcomes: list[Receipt | BrokerdError] = []
        try:
            for call, message_id in zip(calls, self._put(timeout, put_all), strict=True):
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
        """Queue a frame with ``put(*args, call, deadline)`` and return its outcome."""
        timeout = check_timeout(timeout)
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
        """Send a request to another client and return its reply.

        Args:
            to: The address of the client that is to answer.
            payload: The object to send.
            timeout: Seconds to wait for the reply; None for no limit.
            codec: The codec of the payload, by name or number.
            ttl: Seconds that the request stays deliverable while it waits in a queue.
            extension: A JSON object that travels beside the payload.

        Returns:
            The reply.

        Raises:
            RequestFailed: The other client answered with an error.
            Refused: The broker refused the request.
            TimedOut: No reply came in time.
            InDoubt: The connection broke before the outcome was known.
            Disconnected: The client is not connected; nothing was sent.
        """
        number, body = encode(payload, codec)
        extension = with_ttl(extension, ttl)
        put = self._dialog.request
        return cast("Message", self._ask(timeout, put, to, number, body, extension))

    def reply(
        self,
        message: message.Message,
        payload: object,
        *,
        codec: str | int | None = None,
        extension: Mapping[str, Any] | None = None,
    ) -> None:
        """Answer a request that was received.

        If the answer can't be delivered, the on_undelivered handler is called.

        Args:
            message: The request.
            payload: The object to send as the answer.
            codec: The codec of the payload, by name or number.
            extension: A JSON object that travels beside the payload.

        Raises:
            PayloadError: The payload cannot be encoded.
            AlreadyAnswered: The request has been answered before.
            Disconnected: The client is not connected; nothing was sent.
        """
        number, body = encode(payload, codec)
        self._answer(
            message, self._dialog.reply, message.sender, message.id, number, body, extension
        )

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

    def publish(
        self,
        topic: str,
        payload: object,
        *,
        codec: str | int | None = None,
        ttl: float | None = None,
        extension: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> int:
        """Publish an event. An event without subscribers is not an error.

        The on_undelivered handler is called as in :meth:`send`.

        Args:
            topic: The event's topic.
            payload: The object to publish.
            codec: The codec of the payload, by name or number.
            ttl: Seconds that the event stays deliverable while it waits in a queue.
            extension: A JSON object that travels beside the payload.
            timeout: Seconds for the whole call. With None only the wait for a connection
                is limited, by the timeout of connect().

        Returns:
            The event's id.

        Raises:
            PayloadError: The payload cannot be encoded.
            InvalidName: ``topic`` is not a valid topic.
            TimedOut: The broker did not read in time.
            Disconnected: The client is not connected; nothing was sent.
        """
        number, body = encode(payload, codec)
        extension = with_ttl(extension, ttl)
        timeout = check_timeout(timeout)
        if self._interrupting():
            check_topic(topic)
            self._check()
            message_id = next(self._dialog.late_ids)
            put = partial(self._dialog.publish_as, message_id, topic, number, body, extension)
            self._leave_chore(lambda: self._put_late([message_id], topic, put))
            return message_id
        return self._put(timeout, self._dialog.publish, topic, number, body, extension)

    def publish_confirmed(
        self,
        topic: str,
        payload: object,
        *,
        codec: str | int | None = None,
        ttl: float | None = None,
        extension: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Receipt:
        """Publish an event, and wait until the broker has accepted it.

        An event without subscribers is not an error.

        Args:
            topic: The event's topic.
            payload: The object to publish.
            codec: The codec of the payload, by name or number.
            ttl: Seconds that the event stays deliverable while it waits in a queue.
            extension: A JSON object that travels beside the payload.
            timeout: Seconds for the whole call. With None only the wait for a connection
                is limited, by the timeout of connect().

        Returns:
            The broker's confirmation.

        Raises:
            PayloadError: The payload cannot be encoded.
            InvalidName: ``topic`` is not a valid topic.
            Refused: The broker refused the event.
            TimedOut: The broker did not read, or did not answer, in time.
            InDoubt: The connection broke before the outcome was known.
            Disconnected: The client is not connected; nothing was sent.
        """
        number, body = encode(payload, codec)
        extension = with_ttl(extension, ttl)
        put = self._dialog.publish_for_receipt
        return cast("Receipt", self._ask(timeout, put, topic, number, body, extension))

    # Receiving

    def recv(self, timeout: float | None = None) -> Message:
        """Return the next message, or the next request if no request handler is set.

        Args:
            timeout: Seconds to wait for a message; None for no limit.

        Returns:
            The message.

        Raises:
            TimedOut: No message arrived in time.
            Closed: The client is closed.
            Disconnected: The connection is lost, and the client will not reconnect.
        """
        if self._forked:
            self._check()
        return self._inbox.take(timeout if timeout is None else check_timeout(timeout))

    def __iter__(self) -> Iterator[Message]:
        """Yield messages, and requests if no request handler is set, until the client
        is closed.
        """
        self._check()
        queue, meter = self._inbox, self._meter
        inbox = queue.inbox
        items = inbox.items
        with contextlib.suppress(Closed):
            while True:
                # The common case, without a call: the next message is here already.
                # WaitQueue.take says why this is a loop over popleft.
                try:
                    for item in iter(items.popleft, NOTHING):
                        # Only after the item is taken: see InboxMeter.weigh.
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
        """Set the handler of requests; can be used as a decorator.

        The client calls ``handler(message)`` on its own threads and sends the result as
        the reply. An exception is logged, and answered with an ERROR ``failed`` that
        holds only the name of its type. A handler that calls message.reply() or
        message.fail() itself returns None.

        Args:
            handler: The function to call for each request.

        Returns:
            The handler.
        """
        self._handle(self._dispatcher.handle_requests, handler, self._for_requests)
        return handler

    def on_message(self, handler: MessageHandler) -> MessageHandler:
        """Set the handler of messages; can be used as a decorator.

        The client calls ``handler(message)`` for each message, in order, on its own
        thread.

        Args:
            handler: The function to call for each message.

        Returns:
            The handler.
        """
        self._handle(self._dispatcher.handle_messages, handler, self._for_messages)
        return handler

    def on_undelivered(self, handler: UndeliveredHandler) -> UndeliveredHandler:
        """Set the handler of failed sends without a receipt; can be used as a
        decorator.

        The client calls ``handler(error)`` for each of them; ``error.id`` is the id
        that send returned. Without a handler these errors are logged as warnings.

        Args:
            handler: The function to call for each error.

        Returns:
            The handler.
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
        """Subscribe to topics, and return once the broker has confirmed the
        subscription.

        The client renews the subscription after every reconnect.

        Args:
            pattern: The topics to receive; it may contain wildcards. group: A group of
            subscribers; each event goes to one member of the group. callback: The
            function to call for each event, on the client's handler thread. timeout:
            Seconds to wait for the broker's confirmation; None for no limit.

        Returns:
            The subscription: an iterator of events, unless a callback is given.

        Raises:
            Denied: The policy does not allow this client to subscribe to these topics.
            InvalidName: The pattern or the group is not valid.
            Refused: The broker refused the subscription for another reason.
            TimedOut: No answer came in time.
            InDoubt: The connection broke before the outcome was known.
            Disconnected: The client is not connected; nothing was sent.
        """
        subscription = Subscription(self, pattern, group, callback)
        call = Call()

        def put(deadline: float | None) -> int:
            self._calls.add(call)
            if callback is not None:
                self._for_messages.start()
            message_id, subscription._entry = self._dialog.subscribe(
                pattern, group, subscription, call, deadline
            )
            self._queues.add(subscription.queue)
            return message_id

        try:
            self._begin_feed(call, put, timeout)
            return subscription
        except BaseException:
            self._forsake_feed(subscription, call)
            raise

    def _begin_feed(
        self, call: Call, put: Callable[[float | None], int], timeout: float | None
    ) -> None:
        """Begin a subscription or a watch, and wait for the broker's confirmation."""
        self._check()
        self._refuse_to_wait()
        timeout = check_timeout(timeout)
        deadline = _deadline(timeout)
        message_id = self._have_put(timeout, lambda: put(deadline))
        self._outcome(call, message_id, deadline)

    def _forsake_feed(self, subscription: BaseSubscription[Any], call: Call) -> None:
        """Remove a subscription or watch whose creation an exception has cut short."""
        self._leave_chore(
            lambda: self._end_feed_here(subscription, "the subscription was not made")
        )
        self._forsake(call)

    def _have_put(self, timeout: float | None, put: Callable[[], int]) -> int:
        """Call ``put``, which queues frames, in the I/O thread, once these can be
        written.
        """
        until = None
        while True:
            try:
                until = self._wait_until_clear(timeout, until)
                return self._have_done(put)
            except Disconnected:
                # The connection was lost between the two calls: the client may
                # reconnect in time.
                if self.closed or until is None or time.monotonic() >= until:
                    raise
            except BaseException:
                self._mend()
                raise

    def _end_feed_here(self, subscription: BaseSubscription[Any], why: str) -> None:
        """End a subscription or watch and tell the broker; with the lock, in the I/O
        thread.
        """
        self._dialog.forget(subscription)
        self._end_feed(subscription.queue, Closed(why))

    def _unsubscribe(self, subscription: Subscription) -> None:
        self._check()
        if self._interrupting():
            self._leave_chore(
                lambda: self._end_feed_here(subscription, "the subscription was ended")
            )
            return
        call = Call()
        deadline = _deadline(self._settings.timeout_s)

        def put() -> int | None:
            self._calls.add(call)
            entry: SubscriptionEntry | None = subscription._entry
            message_id = (
                None
                if entry is None
                else self._dialog.unsubscribe(entry, subscription, call, deadline)
            )
            self._end_feed(subscription.queue, Closed("the subscription was ended"))
            return message_id

        try:
            message_id = self._have_done(put)
            if message_id is not None:
                # With any answer, and without an answer, no more events come.
                with contextlib.suppress(Disconnected, Closed, TimedOut):
                    self._outcome(call, message_id, deadline)
            self._calls.discard(call)
        except BaseException:
            self._forsake(call)
            raise

    def watch_presence(self, *, timeout: float | None = 30.0) -> PresenceWatch:
        """Watch which clients are online.

        Args:
            timeout: Seconds to wait for the broker's confirmation; None for no limit.

        Returns:
            An iterator of Presence. First comes the present state of every client that
            this client may send to, then every change.

        Raises:
            Refused: The broker refused the watch.
            TimedOut: No answer came in time.
            InDoubt: The connection broke before the outcome was known.
            Disconnected: The client is not connected; nothing was sent.
        """
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

    def control(
        self, op: str, /, *, timeout: float | None = 30.0, **arguments: Any
    ) -> dict[str, Any]:
        """Ask the broker for an operation and return its answer.

        Args:
            op: The name of the operation.
            timeout: Seconds to wait for the answer; None for no limit.
            **arguments: The arguments of the operation.

        Returns:
            The broker's answer.

        Raises:
            Refused: The broker refused the operation.
            TimedOut: No answer came in time.
            InDoubt: The connection broke before the outcome was known.
            Disconnected: The client is not connected; nothing was sent.
        """
        answer = self._ask(timeout, self._dialog.control, op, arguments)
        return cast("dict[str, Any]", answer)

    def clients(self) -> list[ClientInfo]:
        """Return the clients that this client may send to, and whether each is online.

        Raises:
            Refused, TimedOut, InDoubt, Disconnected: As :meth:`control` does.
        """
        return client_list(self.control("clients"))

    def whoami(self) -> dict[str, Any]:
        """Return the broker's description of this client and of itself.

        It has the name, the address, the version, the protocol and the limits.

        Raises:
            Refused, TimedOut, InDoubt, Disconnected: As :meth:`control` does.
        """
        return self.control("whoami")

    def ping(self) -> float:
        """Return the seconds that the broker takes to answer.

        Raises:
            Refused, TimedOut, InDoubt, Disconnected: As :meth:`control` does.
        """
        started = time.perf_counter()
        self.control("ping")
        return time.perf_counter() - started

    # The end

    def close(self) -> None:
        """Close the connection and end every thread of the client.

        A second call does nothing.

        Waiting calls raise Closed. Sent messages are flushed for half a second at most.
        Refusals that follow at once are received for another half a second at most.
        Messages that were not taken are dropped. In a fork of the client's process this
        does nothing.
        """
        if self._forked:
            return
        if self._interrupting():
            self._leave_chore(self._begin_end)
            return
        # Messages that a signal handler has queued as chores are flushed, too.
        self._until(
            lambda: not self._dialog.may_answer or not (self._transport.backlog or self._chores),
            LINGER_S,
        )
        while True:
            # Repeated if an exception in the I/O thread has cut it short.
            with contextlib.suppress(InDoubt):
                self._have_done(self._begin_end)
                break
        _open_clients.discard(self)
        here = threading.current_thread()
        self._thread.join(_THREAD_GRACE_S)
        with self._lock:
            # A warning that the thread has logged already is not logged twice.
            self._dispatcher.warn_of_more(time.monotonic())
        deadline = time.monotonic() + _HANDLER_GRACE_S
        for thread in (*self._for_requests.threads, *self._for_messages.threads):
            if thread is not here:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _begin_end(self) -> None:
        """Begin to close the client; with the lock, in the I/O thread or after its end."""
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
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def wait_until_ready(self, timeout: float) -> None:
        """Wait for the first introduction.

        Args:
            timeout: Seconds to wait at most.

        Raises:
            TimedOut: The connection was not made in time.
            BrokerdError: The reason why the connection was not made.
        """
        # The dialog's own deadline expires first.
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
                log().warning(
                    "a request of %s had been answered when its handler returned more",
                    request.sender,
                )
        except (Disconnected, Closed):
            log().warning(
                "a request of %s could not be answered: the connection is gone", request.sender
            )

    def failed(self, request: Message, error: BaseException) -> None:
        """Log the handler's exception, and tell the requester that its request has
        failed.
        """
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

    Once connecting has begun, only the first five errors of the list below are raised.

    Args:
        address: As address.parse takes it. The default is $BROKERD_ADDRESS, and after
        that
            /run/brokerd/brokerd.sock.
        name: The client's name. The default is $BROKERD_NAME; without it the broker
        finds
            the name by the key.
        key: The client's key. The default is the content of ``key_file``. key_file: The
        file that holds the key; one trailing newline is removed. The default
            is $BROKERD_KEY_FILE.
        timeout: Seconds for connecting, and seconds that a send waits for a connection.
        reconnect: Whether to connect again after a loss; with False the first loss is
        final. allow_pickle_from: Names of the clients whose pickles may be read. inbox:
        Bytes of received messages kept in this process before the client stops
            reading the socket.
        ssl: A context for TLS, or True for a context that trusts the system's
            certificates. An address tls://HOST:PORT does the same as True.
        threads: Threads for request handlers, beside those in which a handler waits for
            the broker.

    Returns:
        The client.

    Raises:
        AuthenticationError: The broker or the client was not authenticated.
        TlsError: The TLS connection could not be made.
        Disconnected: The broker cannot be reached.
        TimedOut: The connection was not made in time.
        ProtocolError: The peer does not speak the broker's protocol.
        AddressError: The address is not valid.
        InvalidName: The name is not valid.
        InvalidKey: The key is not valid.
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
