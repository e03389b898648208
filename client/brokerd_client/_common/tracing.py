"""Spans of OpenTelemetry for the calls that send, and for handlers.

This is the only module that imports OpenTelemetry: its API, and only if the program has
set a tracer provider or has given one to ``connect``. Names and attributes follow the
semantic conventions of messaging.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from brokerd_client._common.client_properties import ClientProperties
from brokerd_client.errors import BrokerdError
from brokerd_client.message import Message
from brokerd_client.wire.layout import REQUEST_KIND

if TYPE_CHECKING:
    from opentelemetry.trace import Span
    from typing_extensions import Self

__all__ = ["BODY_SIZE", "COUNT", "Handling", "Sending", "Tracer", "TracerProvider", "tracer_for"]

R = TypeVar("R")

#: Attributes of the semantic conventions.
BODY_SIZE: Final = "messaging.message.body.size"
COUNT: Final = "messaging.batch.message_count"

#: The key of an extension that says which trace a message belongs to (W3C Trace Context).
_TRACEPARENT: Final = "traceparent"
#: The variable by which OpenTelemetry's API loads a provider at its first use.
_PROVIDER_VARIABLE: Final = "OTEL_PYTHON_TRACER_PROVIDER"


class TracerProvider(Protocol):
    """A tracer provider of OpenTelemetry."""

    def get_tracer(self, name: str, /) -> Any:
        """Return the tracer of a library."""
        ...


def tracer_for(tracing: bool | TracerProvider) -> Tracer | None:
    """Return the tracer for a client; None if its spans would not be recorded.

    Args:
        tracing: A tracer provider, True for the one that the program has set, or False.
    """
    if not isinstance(tracing, bool):
        return Tracer(tracing)
    if not tracing or (
        "opentelemetry.trace" not in sys.modules and _PROVIDER_VARIABLE not in os.environ
    ):
        # A program that has not imported OpenTelemetry has set no provider.
        return None
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    provider = trace.get_tracer_provider()
    if isinstance(provider, (trace.ProxyTracerProvider, trace.NoOpTracerProvider)):
        return None
    return Tracer(provider)


class Tracer:
    """Makes the spans of one client.

    Args:
        provider: The tracer provider, which gets the spans.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import context, propagate, trace

        self.context, self.trace = context, trace
        self._propagate = propagate
        self._tracer = provider.get_tracer("brokerd_client")
        #: The spans of the handlers that run.
        self.handled: dict[Message, Span] = {}

    def sending(
        self,
        client: ClientProperties,
        operation: str,
        to: str,
        extension: Mapping[str, Any] | None,
        attributes: Mapping[str, int],
    ) -> Sending:
        """Begin the span of a call.

        Args:
            client: The client that sends.
            operation: What it does: send, request or publish.
            to: The recipient or the topic, "" for several recipients.
            extension: The extension that the caller has given.
            attributes: More attributes of the span.
        """
        # The address is not checked yet.
        to = str(to)
        kinds = self.trace.SpanKind
        parent = self.trace.get_current_span().get_span_context()
        # Spans of all members of a pool have one name.
        target = to if operation == "publish" else to.partition("/")[0]
        span = self._tracer.start_span(
            f"{operation} {target}".rstrip(),
            kind=kinds.CLIENT if operation == "request" else kinds.PRODUCER,
            attributes={**_attributes(client, operation, "send", to), **attributes},
        )
        # A trace that exists is passed on also if its spans are not recorded. A new one
        # that is not recorded does not make the frame longer.
        passed_on = parent.is_valid or span.is_recording()
        if passed_on and _TRACEPARENT not in (extension or {}):
            carrier: dict[str, Any] = {}
            self._propagate.inject(carrier, self.trace.set_span_in_context(span))
            extension = {**carrier, **(extension or {})} or None
        return Sending(self, span, extension)

    def handling(self, message: Message, pattern: str = "", group: str | None = None) -> Handling:
        """Return the span of a handler, which begins when it is entered.

        Args:
            message: The message that the handler gets.
            pattern: The pattern of the subscription that got it, "" without one.
            group: The group of that subscription, or None.
        """
        return Handling(self, message, pattern, group)

    def begin_handling(self, message: Message, pattern: str, group: str | None) -> tuple[Span, Any]:
        """Return the span of a handler, and the context in which the handler runs."""
        # Not the present context, which is that of the task or thread that connected.
        # OpenTelemetry expects text.
        given = {
            key: value for key, value in (message.extension or {}).items() if isinstance(value, str)
        }
        context = self._propagate.extract(given, self.context.Context())
        client: Any = message._owner
        target = message.topic or client.name
        attributes = {
            **_attributes(client, "handle", "process", target),
            "messaging.message.id": str(message.id),
            BODY_SIZE: len(message.body),
            "messaging.brokerd.sender": message.sender,
        }
        if pattern:
            attributes["messaging.destination.template"] = pattern
        if group:
            attributes["messaging.consumer.group.name"] = group
        kinds = self.trace.SpanKind
        span: Span = self._tracer.start_span(
            f"handle {pattern or target}",
            context,
            kind=kinds.SERVER if message._kind == REQUEST_KIND else kinds.CONSUMER,
            attributes=attributes,
        )
        return span, self.trace.set_span_in_context(span, context)

    def note_failure(self, message: Message, code: str, text: str) -> None:
        """Record that the handler of a request has answered with an error."""
        span = self.handled.get(message)
        if span is not None:
            self.set_error(span, code, text)

    def set_error(self, span: Span, kind: str, text: str) -> None:
        """Set the span's status to an error."""
        span.set_attribute("error.type", kind)
        span.set_status(self.trace.Status(self.trace.StatusCode.ERROR, text))

    def record(self, span: Span, error: BaseException) -> None:
        """Record an exception that ended the span."""
        if span.is_recording():
            span.record_exception(error)
            self.set_error(span, type(error).__qualname__, str(error))


class Sending:
    """The span of a call that sends; it ends when the call does.

    Attributes:
        extension: The extension to send.
    """

    __slots__ = ("_span", "_tracer", "extension")

    def __init__(self, tracer: Tracer, span: Span, extension: Mapping[str, Any] | None) -> None:
        self._tracer = tracer
        self._span = span
        self.extension = extension

    def sent(self, result: R) -> R:
        """Record the id in the result of the call, and return the result."""
        self._note_id(getattr(result, "id", result))
        return result

    def outcomes(self, results: list[R]) -> list[R]:
        """Record the outcomes of several messages, and return them."""
        errors = [result for result in results if isinstance(result, BrokerdError)]
        if errors:
            text = f"{len(errors)} of {len(results)} messages failed; the first: {errors[0]}"
            self._tracer.set_error(self._span, type(errors[0]).__qualname__, text)
        return results

    def _note_id(self, message_id: object) -> None:
        self._span.set_attribute("messaging.message.id", str(message_id))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._tracer.record(self._span, error)
            if message_id := getattr(error, "message_id", 0):
                self._note_id(message_id)
        self._span.end()


class Handling:
    """The span of a handler: current while the handler runs."""

    __slots__ = ("_arguments", "_context", "_message", "_span", "_token", "_tracer")

    _span: Span
    _context: Any
    _token: Any

    def __init__(self, tracer: Tracer, message: Message, pattern: str, group: str | None) -> None:
        self._tracer = tracer
        self._message = message
        self._arguments = (pattern, group)

    def __enter__(self) -> None:
        tracer = self._tracer
        self._span, self._context = tracer.begin_handling(self._message, *self._arguments)
        self._token = tracer.context.attach(self._context)
        tracer.handled[self._message] = self._span

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        tracer = self._tracer
        tracer.handled.pop(self._message, None)
        # A coroutine that is dropped ends in the context of other code.
        if not isinstance(error, GeneratorExit) or tracer.context.get_current() is self._context:
            tracer.context.detach(self._token)
        if error is not None:
            tracer.record(self._span, error)
        elif self._message.cancelled:
            tracer.set_error(self._span, "cancelled", "the requester does not wait any more")
        self._span.end()


def _attributes(
    client: ClientProperties, operation: str, kind: str, target: str
) -> dict[str, str | int]:
    """Return the attributes that all spans of a client have.

    Args:
        client: The client that makes the span.
        operation: The library's word for what it does.
        kind: The word of the semantic conventions.
        target: The recipient or the topic, "" for several recipients.
    """
    broker = client._broker_address
    attributes: dict[str, str | int] = {
        "messaging.system": "brokerd",
        "messaging.operation.name": operation,
        "messaging.operation.type": kind,
        "messaging.client.id": client.address,
        "server.address": broker.host or str(broker),
    }
    if broker.port:
        attributes["server.port"] = broker.port
    if target:
        attributes["messaging.destination.name"] = target
    return attributes
