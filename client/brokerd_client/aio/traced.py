"""The calls and handlers of an asyncio client that makes spans.

A part of the asyncio face. A client without a tracer does not use this module.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from brokerd_client._common.tracing import BODY_SIZE, COUNT, Tracer
from brokerd_client.aio.handlers import in_span
from brokerd_client.aio.opening import Opening
from brokerd_client.aio.subscriptions import Message, Subscription
from brokerd_client.codec import Encoded, encode
from brokerd_client.errors import BrokerdError
from brokerd_client.message import Receipt
from brokerd_client.protocol.bulk import encode_many

if TYPE_CHECKING:
    from brokerd_client.aio.client import Client as Calls
else:
    Calls = object

__all__ = ["TracedCalls"]

R = TypeVar("R")
Handler = TypeVar("Handler", bound=Callable[[Message], object])


class TracedCalls(Calls):
    """The calls of a client, each in a span; a base of the class that has a tracer.

    The arguments are those of the client.
    """

    _tracer: Tracer

    async def _in_span(
        self,
        operation: str,
        call: Callable[..., Awaitable[R]],
        to: str,
        payload: object,
        options: dict[str, Any],
    ) -> R:
        """Return the result of a call, which gets the payload encoded."""
        encoded = Encoded(*encode(payload, options.pop("codec", None), self.json_codec))
        size = {BODY_SIZE: len(encoded.body)}
        extension = options.pop("extension", None)
        with self._tracer.sending(self, operation, to, extension, size) as span:
            return span.sent(await call(to, encoded, extension=span.extension, **options))

    async def send(self, to: str, payload: object, **options: Any) -> int:
        """Send a message to a client."""
        return await self._in_span("send", super().send, to, payload, options)

    async def send_confirmed(self, to: str, payload: object, **options: Any) -> Receipt:
        """Send a message to a client, and wait until the broker has accepted it."""
        return await self._in_span("send", super().send_confirmed, to, payload, options)

    async def post(self, to: str, payload: object, **options: Any) -> Receipt:
        """Store a message in the mailbox of a client, exactly once."""
        return await self._in_span("send", super().post, to, payload, options)

    async def send_many(
        self,
        messages: Iterable[tuple[str, object]],
        *,
        codec: str | int | None = None,
        timeout: float | None = None,
    ) -> list[int]:
        """Send messages with one system call."""
        bulk = encode_many(messages, codec, self.json_codec)
        with self._tracer.sending(self, "send", "", None, {COUNT: len(bulk[0])}) as span:
            return await self._put_many(timeout, bulk, span.extension)

    async def send_many_confirmed(
        self,
        messages: Iterable[tuple[str, object]],
        *,
        codec: str | int | None = None,
        timeout: float | None = None,
    ) -> list[Receipt | BrokerdError]:
        """Send messages with one system call, and wait for the outcome of each."""
        bulk = encode_many(messages, codec, self.json_codec)
        with self._tracer.sending(self, "send", "", None, {COUNT: len(bulk[0])}) as span:
            return span.outcomes(await self._ask_many(timeout, bulk, span.extension))

    async def request(self, to: str, payload: object, **options: Any) -> Message:
        """Send a request to another client and return its reply."""
        return await self._in_span("request", super().request, to, payload, options)

    async def publish(self, topic: str, payload: object, **options: Any) -> int:
        """Publish an event."""
        return await self._in_span("publish", super().publish, topic, payload, options)

    async def publish_confirmed(self, topic: str, payload: object, **options: Any) -> Receipt:
        """Publish an event, and wait until the broker has accepted it."""
        return await self._in_span("publish", super().publish_confirmed, topic, payload, options)

    async def _fail(self, message: Message, text: str, code: str) -> None:
        await super()._fail(message, text, code)
        self._tracer.note_failure(message, code, text)

    def on_request(self, handler: Handler) -> Handler:
        """Set the handler of requests; can be used as a decorator."""
        super().on_request(in_span(handler, self._tracer.handling))
        return handler

    def _on_call(self, handler: Callable[[Message], object]) -> None:
        super()._on_call(in_span(handler, self._tracer.handling))

    def on_message(self, handler: Handler) -> Handler:
        """Set the handler of messages; can be used as a decorator."""
        super().on_message(in_span(handler, self._tracer.handling))
        return handler

    def subscribe(
        self,
        pattern: str,
        group: str | None = None,
        callback: Callable[[Message], object] | None = None,
        *,
        timeout: float | None = 30.0,
    ) -> Opening[Subscription]:
        """Subscribe to topics, once the result is awaited, entered or iterated over."""
        if callback is not None:
            callback = in_span(
                callback, partial(self._tracer.handling, pattern=pattern, group=group)
            )
        return super().subscribe(pattern, group, callback, timeout=timeout)
