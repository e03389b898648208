"""Spans of OpenTelemetry: for calls and handlers of both faces, and none without it."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import SpanKind, StatusCode
from support.client_faces import PATIENCE, Asyncio, Blocking, Face
from support.waiting import until

import brokerd_client
from brokerd.testing import RunningBroker, running
from brokerd_client._common import tracing
from brokerd_client.address import parse
from brokerd_client.aio.handlers import in_span
from brokerd_client.errors import BrokerdError, Offline, RequestFailed, TimedOut

#: A traceparent of another program, its trace and its span.
FOREIGN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
FOREIGN_TRACE, FOREIGN_SPAN = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
SENDER, ME = "messaging.brokerd.sender", "messaging.client.id"


@pytest.fixture
def broker() -> Iterator[RunningBroker]:
    with running(clients={"alice": {}, "bob": {}, "carol": {}}) as broker:
        yield broker


@pytest.fixture(params=[Blocking, Asyncio], ids=["blocking", "asyncio"])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    face: Face = request.param()
    yield face
    face.close()


class Spans:
    """A tracer provider, and the spans that have ended."""

    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False, **options)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("test")

    def __getitem__(self, name: str) -> ReadableSpan:
        """Return the span with the name, once it has ended."""
        until(lambda: any(span.name == name for span in self.exporter.get_finished_spans()))
        (found,) = (span for span in self.exporter.get_finished_spans() if span.name == name)
        return found

    def names(self) -> list[str]:
        """Return the names of the spans that have ended."""
        return sorted(span.name for span in self.exporter.get_finished_spans())


@pytest.fixture
def spans() -> Spans:
    return Spans()


class Pair:
    """Two clients of one face with the same tracer provider: alice and bob."""

    def __init__(self, face: Face, broker: RunningBroker, spans: Spans) -> None:
        self.face, self.broker, self.spans = face, broker, spans
        self.alice, self.bob = self.connect("alice"), self.connect("bob")

    def connect(self, name: str, **options: Any) -> Any:
        """Return a client of the face."""
        options = {"tracing": self.spans.provider, **options}
        return self.face.connect(self.broker.address, name, self.broker.key(name), **options)


@pytest.fixture
def pair(face: Face, broker: RunningBroker, spans: Spans) -> Pair:
    return Pair(face, broker, spans)


def child_of(span: ReadableSpan, parent: ReadableSpan) -> bool:
    """Return whether a span belongs to the other, in the same trace."""
    return (
        span.parent is not None
        and span.parent.span_id == parent.context.span_id
        and span.context.trace_id == parent.context.trace_id
    )


def attributes(span: ReadableSpan) -> dict[str, Any]:
    """Return the attributes of a span without the broker's address."""
    return {
        name: value
        for name, value in (span.attributes or {}).items()
        if not name.startswith("server.")
    }


def test_tracing_request_is_client_span_and_parent_of_the_handlers_server_span(
    pair: Pair,
) -> None:
    pair.bob.on_request(lambda message: message.payload)
    with pair.spans.tracer.start_as_current_span("work"):
        reply = pair.alice.request("bob", "twelve bytes", timeout=PATIENCE)
    work, request, handle = (pair.spans[name] for name in ("work", "request bob", "handle bob"))
    assert reply.payload == "twelve bytes"
    assert child_of(request, work)
    assert child_of(handle, request)
    assert (request.kind, handle.kind) == (SpanKind.CLIENT, SpanKind.SERVER)
    assert attributes(request) == {
        "messaging.system": "brokerd",
        "messaging.operation.name": "request",
        "messaging.operation.type": "send",
        "messaging.destination.name": "bob",
        "messaging.message.id": str(reply.id),
        "messaging.message.body.size": 14,
        ME: "alice",
    }
    assert attributes(handle) == {
        "messaging.system": "brokerd",
        "messaging.operation.name": "handle",
        "messaging.operation.type": "process",
        "messaging.destination.name": "bob",
        "messaging.message.id": str(reply.id),
        "messaging.message.body.size": 14,
        ME: "bob",
        SENDER: "alice",
    }
    assert (request.attributes or {})["server.address"]
    assert {request.status.status_code, handle.status.status_code} == {StatusCode.UNSET}


@pytest.mark.parametrize(
    ("address", "server"),
    [
        ("broker.example:6000", {"server.address": "broker.example", "server.port": 6000}),
        ("@brokerd", {"server.address": "@brokerd"}),
    ],
)
def test_tracing_span_names_the_brokers_address(
    spans: Spans, address: str, server: dict[str, Any]
) -> None:
    client: Any = SimpleNamespace(address="alice", _broker_address=parse(address))
    with tracing.Tracer(spans.provider).sending(client, "send", "bob", None, {}):
        pass
    found = spans["send bob"].attributes or {}
    assert {name: found[name] for name in found if name.startswith("server.")} == server


def test_tracing_call_of_a_method_is_a_request_and_its_handler(pair: Pair) -> None:
    class Service:
        def double(self, n: int) -> int:
            if n < 0:
                raise ValueError("negative")
            return 2 * n

    pair.bob.service(Service())
    assert pair.alice.proxy("bob").double(2) == 4
    assert child_of(pair.spans["handle bob"], pair.spans["request bob"])
    pair.spans.exporter.clear()
    with pytest.raises(ValueError, match="negative"):
        pair.alice.proxy("bob").double(-1)
    failed, handled = pair.spans["request bob"], pair.spans["handle bob"]
    assert {failed.status.status_code, handled.status.status_code} == {StatusCode.ERROR}
    assert (handled.attributes or {})["error.type"] == "ValueError"


def test_tracing_message_is_producer_span_and_parent_of_the_consumer_span(pair: Pair) -> None:
    pair.bob.on_message(lambda message: None)
    message_id = pair.alice.send("bob", b"raw", codec=200)
    send, handle = pair.spans["send bob"], pair.spans["handle bob"]
    assert (send.kind, handle.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert child_of(handle, send)
    assert send.parent is None
    for span in (send, handle):
        assert attributes(span)["messaging.message.id"] == str(message_id)
        assert attributes(span)["messaging.message.body.size"] == 3


def test_tracing_event_is_parent_of_the_callbacks_span(pair: Pair) -> None:
    got: list[Any] = []
    pair.bob.subscribe("news.*", "readers", got.append)
    message_id = pair.alice.publish("news.sport", "goal")
    publish, handle = pair.spans["publish news.sport"], pair.spans["handle news.*"]
    assert child_of(handle, publish)
    assert attributes(publish)["messaging.message.id"] == str(message_id)
    assert attributes(handle)["messaging.destination.name"] == "news.sport"
    assert attributes(handle)["messaging.destination.template"] == "news.*"
    assert attributes(handle)["messaging.consumer.group.name"] == "readers"
    assert [message.payload for message in got] == ["goal"]


def test_tracing_confirmed_calls_have_spans_with_the_id(pair: Pair) -> None:
    sent = pair.alice.send_confirmed("bob", 1, ttl=60)
    published = pair.alice.publish_confirmed("news", 1)
    assert attributes(pair.spans["send bob"])["messaging.message.id"] == str(sent.id)
    assert attributes(pair.spans["publish news"])["messaging.message.id"] == str(published.id)
    received = pair.bob.recv(PATIENCE)
    assert received.extension.keys() == {"ttl", "traceparent"}


def test_tracing_handler_runs_in_its_span_across_calls(pair: Pair) -> None:
    """What a handler sends belongs to its span, also while other handlers run."""
    carol = pair.connect("carol")
    carol.on_request(lambda message: message.payload)

    async def forward(message: Any) -> Any:
        await asyncio.sleep(0.01)
        return (await pair.bob._inner.request("carol", message.payload)).payload

    def forward_here(message: Any) -> Any:
        return pair.bob.request("carol", message.payload).payload

    pair.bob.on_request(forward if isinstance(pair.face, Asyncio) else forward_here)
    threads = [
        threading.Thread(target=pair.alice.request, args=("bob", number)) for number in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    until(lambda: len(pair.spans.names()) == 20)
    ended = pair.spans.exporter.get_finished_spans()
    by_id = {span.context.span_id: span for span in ended}
    chains = []
    for span in ended:
        if span.name == "handle carol":
            chain = [span]
            while chain[-1].parent is not None:
                chain.append(by_id[chain[-1].parent.span_id])
            assert len({each.context.trace_id for each in chain}) == 1
            chains.append([each.name for each in chain])
    assert chains == [["handle carol", "request carol", "handle bob", "request bob"]] * 5


def test_tracing_handler_of_message_without_trace_begins_one(
    face: Face, broker: RunningBroker, spans: Spans
) -> None:
    """The span in which the client connected is not the parent."""
    with spans.tracer.start_as_current_span("start of the program"):
        pair = Pair(face, broker, spans)
        pair.bob.on_message(lambda message: None)
    with brokerd_client.connect(broker.address, "carol", broker.key("carol")) as carol:
        carol.send("bob", 1)
        assert spans["handle bob"].parent is None
    assert not trace.get_current_span().get_span_context().is_valid


def test_tracing_callers_own_traceparent_is_left_alone(pair: Pair) -> None:
    extension = {"traceparent": FOREIGN, "tracestate": "vendor=1", "mine": [1]}
    pair.bob.on_message(got := Collected())
    pair.alice.send("bob", 1, extension=extension)
    handle = pair.spans["handle bob"]
    assert got.messages[0].extension == extension
    assert handle.parent is not None
    assert (handle.parent.trace_id, handle.parent.span_id) == (FOREIGN_TRACE, FOREIGN_SPAN)
    assert handle.parent.trace_state["vendor"] == "1"
    assert pair.spans["send bob"].parent is None


def test_tracing_tracestate_and_baggage_are_passed_on(pair: Pair) -> None:
    seen: list[tuple[Any, object]] = []
    foreign = trace.SpanContext(
        FOREIGN_TRACE,
        FOREIGN_SPAN,
        is_remote=True,
        trace_flags=trace.TraceFlags(1),
        trace_state=trace.TraceState([("vendor", "1")]),
    )
    pair.bob.on_message(lambda message: seen.append((message, baggage.get_baggage("tenant"))))
    present = trace.set_span_in_context(trace.NonRecordingSpan(foreign))
    token = context.attach(baggage.set_baggage("tenant", "red", present))
    pair.alice.send("bob", 1)
    context.detach(token)
    until(lambda: len(seen) == 1)
    ((message, tenant),) = seen
    assert message.extension["tracestate"] == "vendor=1"
    assert message.extension["traceparent"].startswith(FOREIGN[:36])
    assert tenant == "red"


@pytest.mark.parametrize(
    "extension",
    [
        {"traceparent": 5, "tracestate": {"a": 1}},
        {"traceparent": [None], "baggage": [1]},
        {"traceparent": "00-nonsense", "tracestate": ",,=,"},
        {"traceparent": None},
    ],
    ids=str,
)
def test_tracing_traceparent_that_is_not_valid_begins_a_trace(
    pair: Pair, extension: dict[str, Any]
) -> None:
    pair.bob.on_request(lambda message: message.payload)
    assert pair.alice.request("bob", 1, extension=extension).payload == 1
    assert pair.spans["handle bob"].parent is None


def test_tracing_failed_handler_and_its_requester_have_error_spans(pair: Pair) -> None:
    def fail(message: Any) -> None:
        raise KeyError("missing")

    pair.bob.on_request(fail)
    with pytest.raises(RequestFailed):
        pair.alice.request("bob", 1)
    handle, request = pair.spans["handle bob"], pair.spans["request bob"]
    assert handle.status.status_code is request.status.status_code is StatusCode.ERROR
    assert attributes(handle)["error.type"] == "KeyError"
    assert attributes(request)["error.type"] == "RequestFailed"
    assert [event.name for event in handle.events] == ["exception"]


def test_tracing_request_refused_by_its_handler_has_error_spans(pair: Pair) -> None:
    if isinstance(pair.face, Asyncio):

        async def refuse(message: Any) -> None:
            await message.fail("come back later", "busy")

    else:

        def refuse(message: Any) -> None:  # type: ignore[misc]
            message.fail("come back later", "busy")

    pair.bob.on_request(refuse)
    with pytest.raises(RequestFailed):
        pair.alice.request("bob", 1)
    handle = pair.spans["handle bob"]
    assert handle.status.status_code is StatusCode.ERROR
    assert handle.status.description == "come back later"
    assert attributes(handle)["error.type"] == "busy"


def test_tracing_request_that_times_out_has_error_spans(pair: Pair) -> None:
    async def wait(message: Any) -> None:
        await asyncio.sleep(PATIENCE)

    pair.bob.on_request(
        wait if isinstance(pair.face, Asyncio) else lambda message: until(lambda: message.cancelled)
    )
    with pytest.raises(TimedOut):
        pair.alice.request("bob", 1, timeout=3)
    assert attributes(pair.spans["request bob"])["error.type"] == "TimedOut"
    handle = pair.spans["handle bob"]
    assert handle.status.status_code is StatusCode.ERROR
    assert attributes(handle)["error.type"] in ("cancelled", "CancelledError")


def test_tracing_refused_call_has_error_span_with_the_id(pair: Pair) -> None:
    with pytest.raises(Offline) as caught:
        pair.alice.send_confirmed("carol/x", 1)
    span = pair.spans["send carol"]
    assert span.status.status_code is StatusCode.ERROR
    assert attributes(span)["error.type"] == "Offline"
    assert attributes(span)["messaging.message.id"] == str(caught.value.message_id)


def test_tracing_bulk_is_one_span_that_all_its_messages_carry(pair: Pair) -> None:
    got = Collected()
    pair.bob.on_message(got)
    ids = pair.alice.send_many([("bob", number) for number in range(3)])
    until(lambda: len(got.messages) == 3)
    assert [message.id for message in got.messages] == ids
    span = pair.spans["send"]
    assert attributes(span)["messaging.batch.message_count"] == 3
    until(lambda: pair.spans.names() == ["handle bob"] * 3 + ["send"])
    assert all(
        child_of(each, span)
        for each in pair.spans.exporter.get_finished_spans()
        if each.name == "handle bob"
    )


def test_tracing_confirmed_bulk_has_error_span_if_a_message_fails(pair: Pair) -> None:
    first, second = pair.alice.send_many_confirmed([("bob", 1), ("carol", 2)])
    assert not isinstance(first, BrokerdError)
    assert isinstance(second, Offline)
    span = pair.spans["send"]
    assert (span.status.description or "").startswith("1 of 2 messages failed; the first: ")
    assert attributes(span)["error.type"] == "Offline"
    pair.spans.exporter.clear()
    pair.alice.send_many_confirmed([("bob", 1)])
    assert pair.spans["send"].status.status_code is StatusCode.UNSET


def test_tracing_new_trace_that_is_not_recorded_is_not_sent(
    face: Face, broker: RunningBroker
) -> None:
    pair = Pair(face, broker, Spans(sampler=ParentBased(ALWAYS_OFF)))
    pair.alice.send("bob", 1)
    assert pair.bob.recv(PATIENCE).extension is None
    assert pair.alice.request("$broker", {"op": "ping"}).payload == {}


def test_tracing_present_trace_that_is_not_recorded_is_passed_on(
    face: Face, broker: RunningBroker
) -> None:
    """Its recipients follow the decision of its sampler instead of making their own."""
    pair = Pair(face, broker, Spans(sampler=ParentBased(ALWAYS_OFF)))
    pair.bob.on_request(got := Collected())
    with pair.spans.tracer.start_as_current_span("work"):
        pair.alice.request("bob", 1)
    (message,) = got.messages
    flags = int(message.extension["traceparent"].rpartition("-")[2], 16)
    assert flags & trace.TraceFlags.SAMPLED == 0
    assert pair.spans.names() == []


def test_tracing_handler_that_is_not_recorded_fails_as_any_other(
    face: Face, broker: RunningBroker
) -> None:
    pair = Pair(face, broker, Spans(sampler=ALWAYS_OFF))

    def fail(message: Any) -> None:
        raise KeyError("missing")

    pair.bob.on_request(fail)
    with pytest.raises(RequestFailed):
        pair.alice.request("bob", 1)


def test_tracing_subscription_without_callback_is_as_before(pair: Pair) -> None:
    events = pair.bob.subscribe("news")
    pair.alice.publish("news", "goal")
    event = events.recv(PATIENCE)
    context_id = pair.spans["publish news"].context.trace_id
    assert event.extension["traceparent"].split("-")[1] == trace.format_trace_id(context_id)


def test_tracing_without_provider_changes_nothing(face: Face, broker: RunningBroker) -> None:
    """The class and the frames are those of a client without OpenTelemetry."""
    alice, bob = (face.connect(broker.address, name, broker.key(name)) for name in ("alice", "bob"))
    alice.send("bob", 1)
    assert bob.recv(PATIENCE).extension is None
    assert type(getattr(alice, "_inner", alice)).__name__ == "Client"


def test_tracing_uses_the_programs_provider_unless_it_is_switched_off(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: pair.spans.provider)
    silent = pair.connect("carol", tracing=False)
    silent.send("bob", 1)
    assert pair.bob.recv(PATIENCE).extension is None
    silent.close()
    pair.connect("carol", tracing=True).send("bob", 1)
    assert pair.bob.recv(PATIENCE).extension.keys() == {"traceparent"}


@pytest.mark.parametrize("provider", [trace.NoOpTracerProvider(), trace.ProxyTracerProvider()])
def test_tracing_provider_that_records_nothing_is_not_used(
    provider: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    assert tracing.tracer_for(True) is None


def test_tracing_variable_that_names_a_provider_loads_the_api(
    spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: spans.provider)
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    assert tracing.tracer_for(True) is None
    monkeypatch.setenv("OTEL_PYTHON_TRACER_PROVIDER", "sdk_tracer_provider")
    assert tracing.tracer_for(True) is not None
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert tracing.tracer_for(True) is None


def test_tracing_argument_of_another_type_raises(broker: RunningBroker) -> None:
    with pytest.raises(TypeError, match="tracing takes a TracerProvider, True or False, not str"):
        brokerd_client.connect(broker.address, "alice", broker.key("alice"), tracing="on")  # type: ignore[arg-type]


def test_tracing_asyncio_handler_that_is_dropped_logs_nothing(
    broker: RunningBroker, spans: Spans, caplog: pytest.LogCaptureFixture
) -> None:
    """The coroutine of a handler may be closed outside its own context."""
    face = Asyncio()
    pair = Pair(face, broker, spans)
    (message,) = face.run(lambda: received(pair))

    async def wait(message: Any) -> None:
        await asyncio.sleep(PATIENCE)

    def drop() -> None:
        coroutine: Any = in_span(wait, pair.bob._inner._tracer.handling)(message)
        contextvars.copy_context().run(coroutine.send, None)
        coroutine.close()

    with caplog.at_level(logging.WARNING, "opentelemetry"):
        face.run(drop)
    assert attributes(spans["handle bob"])["error.type"] == "GeneratorExit"
    assert caplog.records == []
    face.close()


async def received(pair: Pair) -> list[Any]:
    """Return the message that alice sends to bob."""
    await pair.alice._inner.send("bob", 1)
    return [await pair.bob._inner.recv(PATIENCE)]


class Collected:
    """A handler that keeps its messages."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def __call__(self, message: Any) -> None:
        self.messages.append(message)
