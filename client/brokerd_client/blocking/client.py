"""The blocking broker client: threads may share it, and its calls block.

A face of :mod:`brokerd_client.protocol.dialog`; no rule of the protocol is here.

This module has the calls that a user makes. The module ``base`` holds the connection,
and ``transport`` moves the bytes. ``subscriptions`` has the objects that a user
iterates over, and ``waiters`` has the objects that calls wait on.
"""

# Written by .ci/blocking_face.py from aio/client.py: change that file, and run `make faces`.
from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from brokerd_client import message
from brokerd_client._common.random_numbers import dedup_key as new_dedup_key
from brokerd_client._common.rpc import Interface
from brokerd_client._common.tracing import Tracer, TracerProvider, tracer_for
from brokerd_client.blocking.base import BaseClient
from brokerd_client.blocking.listener import Listener
from brokerd_client.blocking.rpc import Proxy, serve
from brokerd_client.blocking.subscriptions import Message, PresenceWatch, Subscription
from brokerd_client.blocking.traced import TracedCalls
from brokerd_client.codec import encode
from brokerd_client.connection_event import ConnectionEvent
from brokerd_client.errors import BrokerdError
from brokerd_client.message import Receipt, with_options, with_time_limit
from brokerd_client.presence import ClientInfo, client_list
from brokerd_client.protocol.bulk import encode_many
from brokerd_client.settings import (
    DEFAULT_INBOX,
    DEFAULT_TIMEOUT_S,
    AnyAddress,
    Settings,
    check_timeout,
    resolve,
)

if TYPE_CHECKING:
    from ssl import SSLContext

    from typing_extensions import Self

    from brokerd_client.connection.stream import Connection
    from brokerd_client.json_codec import JsonCodec

__all__ = [
    "Client",
    "Listener",
    "Message",
    "PresenceWatch",
    "Proxy",
    "Subscription",
    "connect",
]

RequestHandler = TypeVar("RequestHandler", bound=Callable[[Message], object])
MessageHandler = TypeVar("MessageHandler", bound=Callable[[Message], object])
ConnectionHandler = TypeVar("ConnectionHandler", bound=Callable[[ConnectionEvent], object])
UndeliveredHandler = TypeVar("UndeliveredHandler", bound=Callable[[BrokerdError], object])
T = TypeVar("T")


class Client(BaseClient):
    """A named client of a broker, made by :func:`connect`.

    Any thread may use it, but a fork of the process may not. Every call raises Closed
    after close(), and WrongProcess in a fork.

    Calls that send wait while the client reconnects, for ``timeout`` seconds at most.
    With None they wait for the timeout of connect(). After that they raise
    Disconnected: nothing was sent.
    """

    # Sending

    def send(
        self,
        to: str,
        payload: object,
        *,
        codec: str | int | None = None,
        ttl: float | None = None,
        dedup_key: str | None = None,
        delay: float | None = None,
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
            dedup_key: A key of 1 to 64 bytes. A mailbox stores messages of one sender
                with the same key once.
            delay: Seconds until a mailbox delivers the message, at most 30 days.
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
        number, body = encode(payload, codec, self.json_codec)
        if ttl is not None or dedup_key is not None or delay is not None:
            extension = with_options(extension, ttl, dedup_key, delay)
        if timeout is not None:
            check_timeout(timeout)
        message_id = self._send_at_once(to, number, body, extension)
        if message_id is None:
            put = self._dialog.send
            message_id = self._put(timeout, put, to, number, body, extension)
        return message_id

    def send_confirmed(
        self,
        to: str,
        payload: object,
        *,
        codec: str | int | None = None,
        ttl: float | None = None,
        dedup_key: str | None = None,
        delay: float | None = None,
        extension: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Receipt:
        """Send a message to a client, and wait until the broker has accepted it.

        Args:
            to: The recipient's address: NAME or NAME/INSTANCE.
            payload: The object to send.
            codec: The codec of the payload, by name or number.
            ttl: Seconds that the message stays deliverable while it waits in a queue.
            dedup_key: A key of 1 to 64 bytes. A mailbox stores messages of one sender
                with the same key once.
            delay: Seconds until a mailbox delivers the message, at most 30 days.
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
        number, body = encode(payload, codec, self.json_codec)
        if ttl is not None or dedup_key is not None or delay is not None:
            extension = with_options(extension, ttl, dedup_key, delay)
        put = self._dialog.send_for_receipt
        receipt: Receipt = self._ask(timeout, put, to, number, body, extension)
        return receipt

    def post(
        self,
        to: str,
        payload: object,
        *,
        codec: str | int | None = None,
        ttl: float | None = None,
        dedup_key: str | None = None,
        delay: float | None = None,
        extension: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Receipt:
        """Store a message in the mailbox of a client, exactly once.

        The message is sent again, with the same key, after every reconnect and when the
        broker could not store it. So the call may take as long as the broker is down.
        Messages of several calls are stored in the order in which the calls began.

        Args:
            to: The name of the client that has the mailbox.
            payload: The object to send.
            codec: The codec of the payload, by name or number.
            ttl: Seconds after which the mailbox no longer delivers the message.
            dedup_key: The key of an earlier call that this one continues: the
                ``dedup_key`` of its error. Without it the message gets a new key.
            delay: Seconds until the mailbox delivers the message, at most 30 days.
            extension: A JSON object that travels beside the payload.
            timeout: Seconds for the whole call; None for no limit.

        Returns:
            The broker's confirmation that the message is on disk.

        Raises:
            PayloadError: The payload cannot be encoded.
            InvalidName: ``to`` is not a valid address.
            Refused: The broker refused the message; it is not stored.
            TimedOut: The message was not stored in time, as far as is known.
            Closed: The client was closed before that.
            InDoubt: The outcome is not known, and the broker no longer knows the key.
            Disconnected: The client no longer reconnects; nothing was stored.
        """
        number, body = encode(payload, codec, self.json_codec)
        if dedup_key is None:
            dedup_key = new_dedup_key()
        options = with_options(extension, ttl, dedup_key, delay) or {}
        try:
            return cast("Receipt", self._post(timeout, to, number, body, options))
        except BrokerdError as error:
            error.dedup_key = dedup_key
            raise

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
        return self._put_many(timeout, encode_many(messages, codec, self.json_codec))

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
        return self._ask_many(timeout, encode_many(messages, codec, self.json_codec))

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
            timeout: Seconds to wait for the reply; None for no limit. It travels as the
                request's ttl, and a call that ends early cancels the request.
            codec: The codec of the payload, by name or number.
            ttl: Seconds after which the broker ends the request, answered or not. The
                default is the timeout.
            extension: A JSON object that travels beside the payload.

        Returns:
            The reply.

        Raises:
            RequestFailed: The other client answered with an error.
            Refused: The broker refused the request.
            Expired: Its own ttl was over.
            TimedOut: No reply came in time.
            InDoubt: The connection broke before the outcome was known.
            Disconnected: The client is not connected; nothing was sent.
        """
        number, body = encode(payload, codec, self.json_codec)
        extension, limit_s = with_time_limit(extension, ttl, timeout)
        answer: Message = self._request(timeout, limit_s, to, number, body, extension)
        return answer

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
            WrongUse: The message is not a request.
            Disconnected: The client is not connected; nothing was sent.
        """
        number, body = encode(payload, codec, self.json_codec)
        put = self._dialog.reply
        self._answer(message, put, message.sender, message.id, number, body, extension)

    def _fail(self, message: Message, text: str, code: str) -> None:
        put = self._dialog.fail
        self._answer(message, put, message.sender, message.id, code, text)

    def publish(
        self,
        topic: str,
        payload: object,
        *,
        codec: str | int | None = None,
        ttl: float | None = None,
        dedup_key: str | None = None,
        delay: float | None = None,
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
            dedup_key: A key of 1 to 64 bytes. A mailbox stores messages of one sender
                with the same key once.
            delay: Seconds until a mailbox delivers the event, at most 30 days.
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
        number, body = encode(payload, codec, self.json_codec)
        if ttl is not None or dedup_key is not None or delay is not None:
            extension = with_options(extension, ttl, dedup_key, delay)
        if timeout is not None:
            check_timeout(timeout)
        message_id = self._publish_at_once(topic, number, body, extension)
        if message_id is None:
            put = self._dialog.publish
            message_id = self._put(timeout, put, topic, number, body, extension)
        return message_id

    def publish_confirmed(
        self,
        topic: str,
        payload: object,
        *,
        codec: str | int | None = None,
        ttl: float | None = None,
        dedup_key: str | None = None,
        delay: float | None = None,
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
            dedup_key: A key of 1 to 64 bytes. A mailbox stores messages of one sender
                with the same key once.
            delay: Seconds until a mailbox delivers the event, at most 30 days.
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
        number, body = encode(payload, codec, self.json_codec)
        if ttl is not None or dedup_key is not None or delay is not None:
            extension = with_options(extension, ttl, dedup_key, delay)
        put = self._dialog.publish_for_receipt
        receipt: Receipt = self._ask(timeout, put, topic, number, body, extension)
        return receipt

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
        self._check()
        if not self._receives:
            self._begin_receiving()
        return self._inbox.take(None if timeout is None else check_timeout(timeout))

    def on_request(self, handler: RequestHandler) -> RequestHandler:
        """Set the handler of requests; can be used as a decorator.

        The client sends the result of ``handler(message)`` as the reply. A handler that
        calls message.reply() or message.fail() itself returns None.

        An exception of any type is logged. The answer is then an ERROR ``failed`` that
        holds only the name of its type. The handler runs on a thread
        of the client.

        Args:
            handler: The function to call for each request.

        Returns:
            The handler.
        """
        return self._handle(self._dispatcher.handle_requests, handler)

    def on_message(self, handler: MessageHandler) -> MessageHandler:
        """Set the handler of messages; can be used as a decorator.

        The client calls ``handler(message)`` for each message, in order, on a thread.

        Args:
            handler: The function to call for each message.

        Returns:
            The handler.
        """
        return self._handle(self._dispatcher.handle_messages, handler)

    def on_undelivered(self, handler: UndeliveredHandler) -> UndeliveredHandler:
        """Set the handler of failed sends without a receipt; can be used as a
        decorator.

        The client calls ``handler(error)`` for each of them; ``error.message_id`` is the id
        that send returned. Without a handler these errors are logged as warnings.

        Args:
            handler: The function to call for each error.

        Returns:
            The handler.
        """
        return self._handle(self._dispatcher.handle_undelivered, handler)

    def on_connection(self, handler: ConnectionHandler) -> ConnectionHandler:
        """Set the handler of changes of the connection; can be used as a decorator.

        The client calls ``handler(event)`` with a ConnectionEvent: at once with the
        present state, then for each change, in order with messages. A refusal with the
        same reason as the one before is not reported again. Losses and refusals are
        logged as warnings too, and the return of the connection as information.

        Args:
            handler: The function to call for each change.

        Returns:
            The handler.
        """
        return self._handle(self._dispatcher.handle_connection, handler)

    # Calls of methods

    @overload
    def service(
        self,
        target: T,
        /,
        *,
        methods: Iterable[str] | None = None,
        raises: Iterable[type[Exception]] = (),
    ) -> T: ...

    @overload
    def service(
        self, /, *, methods: Iterable[str] | None = None, raises: Iterable[type[Exception]] = ()
    ) -> Callable[[T], T]: ...

    def service(
        self,
        target: object = None,
        /,
        *,
        methods: Iterable[str] | None = None,
        raises: Iterable[type[Exception]] = (),
    ) -> object:
        """Serve methods to the proxies of other clients; can be used as a decorator.

        The result of a method is the reply, and its exception the error. Other requests
        go to the on_request handler, as before. Several services of one client add up.

        Args:
            target: An object, a class, which is instantiated, or a function.
            methods: The names of the methods to serve. The default is those that the body
                of the class defines, without names that begin with an underscore.
            raises: Exceptions that are answers and not failures: they are not logged.

        Returns:
            The target.

        Raises:
            TypeError: There is nothing to serve.
            ValueError: A name is not public, or is served already.
        """
        if target is None:
            return partial(self.service, methods=methods, raises=raises)
        self._check()
        service = self._service.extended(target, methods, raises)
        self._on_call(partial(serve, service))
        self._service = service
        return target

    def _on_call(self, handler: Callable[[Message], object]) -> None:
        self._handle(self._dispatcher.handle_calls, handler)

    @overload
    def proxy(
        self,
        to: str,
        interface: Callable[..., T],
        *,
        timeout: float | None = 30.0,
        raises: Iterable[type[Exception]] = (),
    ) -> T: ...

    @overload
    def proxy(
        self,
        to: str,
        interface: None = None,
        *,
        timeout: float | None = 30.0,
        raises: Iterable[type[Exception]] = (),
    ) -> Proxy: ...

    def proxy(
        self,
        to: str,
        interface: Callable[..., T] | None = None,
        *,
        timeout: float | None = 30.0,
        raises: Iterable[type[Exception]] = (),
    ) -> T | Proxy:
        """Return a stand-in for the service of another client; nothing is sent.

        A method called on it is called at the other client, as a request. It returns the
        result, and raises the method's exception, or what :meth:`request` raises.

        Args:
            to: The address of the client that serves.
            interface: A class or Protocol with the service's methods, for type checkers
                and against misspelled names.
            timeout: Seconds to wait for the result of a call; None for no limit.
            raises: Exceptions of the service that are raised as what they are, beside
                the built-in exceptions. Any other is raised as CallFailed.

        Returns:
            The proxy; for type checkers it is an object of the interface.

        Raises:
            InvalidName: ``to`` is not a valid address.
        """
        return cast("T", Proxy(self, to, Interface(interface, raises), timeout))

    # Topics, presence and the broker itself

    def subscribe(
        self,
        pattern: str,
        group: str | None = None,
        callback: Callable[[Message], object] | None = None,
        *,
        timeout: float | None = 30.0,
    ) -> Subscription:
        """Subscribe to topics.

        The client renews the subscription after every reconnect.

        Args:
            pattern: The topics to receive; it may contain wildcards.
            group: A group of subscribers; each event goes to one member of the group.
            callback: The function to call for each event, on a thread of the client.
            timeout: Seconds to wait for the broker's confirmation; None for no limit.

        Returns:
            The subscription: an iterator of events, unless a
            callback is given.

        Raises:
            Denied: The policy does not allow this client to subscribe to these topics.
            InvalidName: The pattern or the group is not valid.
            Refused: The broker refused the subscription for another reason.
            TimedOut: No answer came in time.
            InDoubt: The connection broke before the outcome was known.
            Disconnected: The client is not connected; nothing was sent.
        """
        subscription = Subscription(self, pattern, group, callback)
        try:
            self._open(subscription, timeout)
            return subscription
        except BaseException:
            self._take_back(subscription)
            raise

    def watch_presence(self, *, timeout: float | None = 30.0) -> PresenceWatch:
        """Watch which clients are online.

        Args:
            timeout: Seconds to wait for the broker's confirmation; None for no limit.

        Returns:
            An iterator of Presence. First comes the present state
            of every client that this client may send to, then every change.

        Raises:
            Refused: The broker refused the watch.
            TimedOut: No answer came in time.
            InDoubt: The connection broke before the outcome was known.
            Disconnected: The client is not connected; nothing was sent.
        """
        subscription = PresenceWatch(self)
        try:
            self._open(subscription, timeout)
            return subscription
        except BaseException:
            self._take_back(subscription)
            raise

    # Channels

    def open(self, to: str, payload: bytes = b"", *, timeout: float | None = 30.0) -> Connection:
        """Open a channel to a client that listens; it lasts longer than this client.

        Args:
            to: The address of the other client: NAME, or NAME/INSTANCE of a pool.
            payload: Bytes that the other client sees before it accepts, at most 1 KiB.
            timeout: Seconds to wait until the other client has accepted; None for no
                limit.

        Returns:
            The channel: a connection, as of the direct API.

        Raises:
            Offline: The other client is not connected, or does not listen.
            Denied: The rules allow no channel between the clients.
            Expired: The other client did not accept in time.
            Refused: The broker refused the channel for another reason.
            RequestFailed: The other client refused the channel.
            TimedOut: The channel was not made in time.
            Disconnected: The broker can't be reached.
            PayloadError: The payload is too long.
            InvalidName: ``to`` is not a valid address.
        """
        return self._open_channel(to, payload, timeout)

    def listen(self, *, timeout: float | None = 30.0) -> Listener:
        """Listen for channels.

        A client has one listener at a time. The client listens again after every
        reconnect.

        Args:
            timeout: Seconds to wait for the broker's confirmation; None for no limit.

        Returns:
            The listener: an iterator of channels.

        Raises:
            WrongUse: The client listens already.
            Refused: The broker refused.
            TimedOut: No answer came in time.
            InDoubt: The connection broke before the outcome was known.
            Disconnected: The client is not connected; nothing was sent.
        """
        subscription = Listener(self)
        try:
            self._open(subscription, timeout)
            return subscription
        except BaseException:
            self._take_back(subscription)
            raise

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

    def drain(self, timeout: float | None = 30.0) -> bool:
        """Finish the work in progress, then close: for a graceful stop.

        The broker delivers no further request. Requests that no handler has begun go
        back to the broker, which gives them to another member of the pool; a client
        that is not a pool lets its requesters know that they were not begun (Offline).
        Handlers that run may finish and answer, and handlers of messages and
        callbacks finish what has been received. A second call, or a close() meanwhile,
        ends the wait.

        Args:
            timeout: Seconds for the handlers to finish; None for no limit.

        Returns:
            Whether all of them finished in time. The client is closed in both cases.
        """
        return self._drain(timeout)

    def close(self) -> None:
        """Close the connection and end every thread of the client.

        A second call does nothing.

        Waiting calls raise Closed. Sent messages are flushed for half a second at most.
        Refusals that follow at once are received for another half a second at most.
        Messages that were not taken are dropped. In a fork of the client's process this
        does nothing.
        """
        self._close()

    def __enter__(self) -> Self:
        self._check()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class TracedClient(TracedCalls, Client):
    """A client that makes spans.

    Args:
        settings: The settings of the client.
        tracer: Makes the spans.
    """

    def __init__(self, settings: Settings, tracer: Tracer) -> None:
        self._tracer = tracer
        super().__init__(settings)


def connect(
    address: AnyAddress | None = None,
    name: str | None = None,
    key: bytes | str | None = None,
    *,
    key_file: str | os.PathLike[str] | None = None,
    timeout: float | None = DEFAULT_TIMEOUT_S,
    wait: float | None = 0.0,
    reconnect: bool = True,
    give_up_after: float | None = None,
    allow_pickle_from: Iterable[str] = (),
    codec: JsonCodec | None = None,
    inbox: int = DEFAULT_INBOX,
    window: int | None = None,
    window_bytes: int | None = None,
    ssl: SSLContext | bool | None = None,
    handlers: int | None = None,
    tracing: bool | TracerProvider = True,
) -> Client:
    """Connect to a broker and return the client.

    Once connecting has begun, only the first five errors of the list below are raised.

    Args:
        address: As address.parse takes it, or a list of such addresses. They are tried in
            turn, beginning with the one that worked last. The default is
            $BROKERD_ADDRESS, where commas separate addresses, and after that
            /run/brokerd/brokerd.sock.
        name: The client's name. The default is $BROKERD_NAME; without it the broker
            finds the name by the key.
        key: The client's key. The default is the content of ``key_file``.
        key_file: The file that holds the key; one trailing newline is removed. The
            default is $BROKERD_KEY_FILE.
        timeout: Seconds for connecting, and seconds that a send waits for a connection.
            Infinity or None means no limit.
        wait: Seconds to wait for a broker that is not up yet. With 0 each address is
            tried once. Infinity or None means no limit.
        reconnect: Whether to connect again after a loss; with False the first loss is
            final.
        give_up_after: Seconds without a connection after which a loss is final. With
            None the client reconnects without end, but gives up when the broker has
            rejected its key six times. With infinity it never gives up.
        allow_pickle_from: Names of the clients whose pickles may be read.
        codec: The JSON of this client, for payloads of more types: see JsonCodec.
        inbox: Bytes of received messages kept in this process before the client stops
            reading the socket.
        window: Messages of the mailbox that this client has received and not
            acknowledged, at most 10,000. The default is the mailbox's own.
        window_bytes: The same in bytes. The default is 1 MiB.
        ssl: A context for TLS, or True for a context that trusts the system's
            certificates. An address tls://HOST:PORT does the same as True.
        handlers: Requests that the request handler works on at the same time; the broker
            delivers no more of them, beside those whose handler waits for the broker.
            The default is 4.
        tracing: A tracer provider of OpenTelemetry, which gets spans of calls and
            handlers. True takes the provider that the program has set, if any; False
            takes none.

    Returns:
        The client, authenticated and introduced.

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
        wait=wait,
        reconnect=reconnect,
        give_up_after=give_up_after,
        allow_pickle_from=allow_pickle_from,
        codec=codec,
        inbox=inbox,
        window=window,
        window_bytes=window_bytes,
        ssl=ssl,
        handlers=handlers,
        tracing=tracing,
    )
    return _connected(settings)


def _connected(settings: Settings) -> Client:
    """Return a new client when it is introduced; close it if that fails."""
    tracer = tracer_for(settings.tracing)
    client = Client(settings) if tracer is None else TracedClient(settings, tracer)
    try:
        client.wait_until_ready()
    except BaseException:
        client.close()
        raise
    return client
