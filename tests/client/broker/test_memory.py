"""Limits of the memory that a broker can fill: frames, errors, extensions, names."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.client_faces import PATIENCE, Asyncio, Blocking, Face
from support.dialog_pair import Pair, merge
from support.fake_broker import FakeServer, Session

from brokerd_client.errors import FrameTooBig, ProtocolError
from brokerd_client.message import Message, extension_cost
from brokerd_client.protocol.dialog import Effects
from brokerd_client.protocol.inbox import largest_message
from brokerd_client.wire.envelope import HEADER, Envelope, Kind, encode
from brokerd_client.wire.framing import frame
from brokerd_client.wire.layout import MAX_HEAD_SIZE as HEAD

MIB = 2**20
PIECE = 65536


@pytest.fixture(params=[Blocking, Asyncio], ids=["blocking", "asyncio"])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    """The blocking client, and the asyncio client."""
    face: Face = request.param()
    yield face
    face.close()


@pytest.fixture
def pair() -> Pair:
    """A ready dialog that accepts messages of up to 16 MiB."""
    pair = Pair()
    pair.connect()
    return pair


def announced(size: int, kind: int = Kind.MESSAGE, name: bytes = b"bob") -> bytes:
    """Return the header and the name of a frame whose payload has this size."""
    return (
        (HEADER.size + len(name) + size).to_bytes(4, "big")
        + HEADER.pack(kind, 0, 0, len(name), 7)
        + name
    )


def receive_pieces(pair: Pair, size: int) -> tuple[Effects[Message], int]:
    """Pass ``size`` bytes to the dialog in pieces, and then a message.

    Return the effects, and the largest number of bytes held meanwhile.
    """
    effects: Effects[Message] = Effects()
    piece = bytes(PIECE)
    tracemalloc.start()
    try:
        for start in range(0, size, PIECE):
            merge(effects, pair.hear(piece[: min(PIECE, size - start)]))
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    merge(effects, pair.hear_frame(Kind.MESSAGE, 8, payload=b"next"))
    return effects, held


@pytest.mark.parametrize("kind", [Kind.MESSAGE, Kind.REQUEST, Kind.EVENT, Kind.REPLY])
def test_inbox_longer_frame_is_not_stored(pair: Pair, kind: Kind) -> None:
    """The frame is reported once, and a request is answered with an error.

    The next message arrives.
    """
    size = 16 * MIB + HEAD
    head = announced(size, kind)
    if kind is Kind.EVENT:
        head += b"\1t"
    merge(first := Effects(), pair.hear(head))
    effects, held = receive_pieces(pair, size - (2 if kind is Kind.EVENT else 0))
    assert held < MIB
    assert [message.body for message in effects.messages] == [b"next"]
    assert [type(error) for error in (*first.unreadable, *effects.unreadable)] == [FrameTooBig]
    pair.broker.seen.clear()
    pair.talk()
    answers = [
        (each.kind, each.name, json.loads(each.payload)["code"]) for each in pair.broker.seen
    ]
    assert answers == ([(Kind.ERROR, "bob", "too_large")] if kind is Kind.REQUEST else [])


def test_inbox_longer_answer_fails_its_call(pair: Pair) -> None:
    """The call fails before the last byte of the answer has come."""
    message_id = pair.dialog.control("clients", {}, "w", None)
    size = 2**30
    data = (
        size.to_bytes(4, "big")
        + HEADER.pack(Kind.REPLY, 0, 2, 7, message_id)
        + b"$broker"
        + bytes(HEAD)
    )
    [(waiter, error)] = pair.hear(data).outcomes
    assert (waiter, type(error)) == ("w", ProtocolError)


def test_inbox_long_frame_is_stored_once(pair: Pair) -> None:
    """The message holds the collected bytes themselves, not a copy."""
    pair.hear(announced(16 * MIB))
    effects, held = receive_pieces(pair, 16 * MIB)
    assert [len(message) for message in effects.messages] == [16 * MIB, 4]
    assert held < 1.3 * 16 * MIB


def test_inbox_limits_message_length() -> None:
    """Whatever its inbox, a client accepts messages of the default length limit."""
    assert [largest_message(inbox) for inbox in (1, 4 * MIB, 8 * MIB)] == [
        16 * MIB,
        16 * MIB,
        32 * MIB,
    ]


def introduce_with(limit: int) -> Callable[[Session, Envelope], bool]:
    """Return an intercept that answers whoami with this max_message, in bytes."""

    def answer(session: Session, envelope: Envelope) -> bool:
        if json.loads(envelope.payload).get("op") != "whoami":
            return False
        introduction = {"name": "alice", "address": "alice", "limits": {"max_message": limit}}
        payload = json.dumps(introduction).encode()
        session.deliver(Envelope(Kind.REPLY, envelope.id, "$broker", payload, 2))
        return True

    return answer


@pytest.mark.parametrize(
    ("max_message", "accepted"),
    [(0, 16), (1, 16), (16, 16), (20, 20), (64, 64), (65, 64), (2**40, 64)],
)
def test_largest_message_is_bounded_by_max_message_and_inbox(
    max_message: int, accepted: int
) -> None:
    """The smaller of the two limits counts, but 16 MiB are accepted in any case."""
    assert largest_message(16 * MIB, max_message * MIB) == accepted * MIB


@pytest.mark.parametrize(("max_message", "accepted"), [(1, 16), (20, 20), (1000, 64)])
def test_dialog_frame_above_max_message_and_inbox_is_skipped(
    max_message: int, accepted: int
) -> None:
    """A frame of exactly the limit is stored; a longer one costs no memory."""
    pair = Pair(inbox=16 * MIB)
    pair.broker.intercept = introduce_with(max_message * MIB)
    pair.connect()

    pair.hear(announced(accepted * MIB))
    effects, _ = receive_pieces(pair, accepted * MIB)
    assert [len(message) for message in effects.messages] == [accepted * MIB, 4]

    size = accepted * MIB + HEAD
    pair.hear(announced(size))
    effects, held = receive_pieces(pair, size)
    assert [message.body for message in effects.messages] == [b"next"]
    assert held < MIB
    assert pair.dialog.counters["unreadable"] == 1


def test_dialog_list_of_clients_is_bounded_by_max_message(pair: Pair) -> None:
    """The limit of messages also limits the memory of a decoded list."""
    pair.dialog._inbound.accept(MIB)
    message_id, _ = pair.dialog.watch("sink", "w", None)
    payload = b'{"clients":[' + b",".join([b"{}"] * (MIB // 10)) + b"]}"
    [(_, error)] = pair.hear_frame(
        Kind.REPLY, message_id, "$broker", payload=payload, codec=2
    ).outcomes
    assert isinstance(error, ProtocolError)


def test_dialog_message_before_introduction_is_bounded_by_inbox_alone() -> None:
    """On each connection messages may arrive before the introduction. Until then its
    max_message is not known.
    """
    pair = Pair(inbox=16 * MIB)
    pair.broker.intercept = introduce_with(16 * MIB)
    pair.connect()
    pair.lose()
    pair.now = 100.0
    pair.broker.intercept = lambda session, envelope: True
    pair.connect()

    pair.hear(announced(20 * MIB))
    effects, _ = receive_pieces(pair, 20 * MIB)
    assert [len(message) for message in effects.messages] == [20 * MIB, 4]


def test_client_frame_above_max_message_is_skipped_and_counted(
    face: Face, server: FakeServer
) -> None:
    """A hostile broker that sends longer frames than its max_message does not fill the
    memory.
    """
    server.broker.intercept = introduce_with(MIB)
    client = face.connect(server.path, "alice", b"alice", timeout=PATIENCE, inbox=16 * MIB)
    for size in (16 * MIB + HEAD, 10):
        envelope = Envelope(Kind.MESSAGE, 7, "bob", bytes(size))
        server.act(lambda broker, sent=envelope: broker.online["alice"].deliver(sent))  # type: ignore[misc]
    assert len(client.recv(timeout=20).body) == 10
    assert client.counters["unreadable"] == 1


@pytest.mark.parametrize(("most", "warned"), [(16 * MIB, False), (16 * MIB + 1, True)])
def test_inbox_smaller_than_broker_limit_is_warned_about(most: int, warned: bool) -> None:
    """The warning names the size of ``inbox`` that suffices."""
    pair = Pair()
    pair.broker.intercept = introduce_with(most)
    warnings = pair.connect().warnings
    assert bool(warnings) is warned
    assert not warned or f"at least {4 * MIB + 1} bytes" in warnings[0]


SIZES = st.sampled_from(
    [
        0,
        10,
        HEAD - 100,
        HEAD,
        HEAD + 1,
        2 * HEAD - 80,
        2 * HEAD - 1,
        2 * HEAD + 200,
        3 * HEAD,
    ]
)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 2, 5]),
            SIZES,
            st.none() | st.sampled_from([{}, {"a": "x" * 60_000}]),
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([4001, 30_011, PIECE, 100_003]),
)
def test_inbox_long_frames_cut_anywhere_give_same_messages(
    frames: list[tuple[int, int, dict[str, Any] | None]], step: int
) -> None:
    """Short, long and too long frames arrive in pieces no longer than the accepted
    length. The accepted messages are always the same.
    """
    pair = Pair()
    pair.connect()
    pair.dialog.subscribe("t", None, "sink", "w", None)
    pair.talk()
    most = pair.dialog._inbound._decoder._largest_body = 2 * HEAD + 100
    data, right = b"", []
    for message_id, (kind, size, extension) in enumerate(frames):
        topic = "t" if kind == Kind.EVENT else ""
        body = encode(
            Envelope(
                Kind(kind), message_id, "bob", bytes(size), 0, topic=topic, extension=extension
            )
        )
        data += frame(body)
        if len(body) <= most:
            right.append((kind, message_id, size, extension))
    effects: Effects[Message] = Effects()
    for start in range(0, len(data), step):
        merge(effects, pair.hear(data[start : start + step]))
    got = [
        (m._kind, m.id, len(m), m.extension)
        for m in (*effects.messages, *(m for _, m in effects.events))
    ]
    assert sorted(got, key=lambda each: each[1]) == right
    assert len(effects.unreadable) == len(frames) - len(right)
    assert not effects.broken


def test_inbox_long_frame_with_invalid_header_is_skipped(pair: Pair) -> None:
    """Only the head of a frame within the limit is examined, and the end of the frame
    is known.
    """
    size = 3 * HEAD
    effects = pair.hear(
        size.to_bytes(4, "big") + HEADER.pack(1, 128, 0, 3, 7) + b"bob" + bytes(size - 15 - 100)
    )
    merge(effects, pair.hear(bytes(100) + frame(encode(Envelope(Kind.MESSAGE, 8, "bob", b"next")))))
    assert (len(effects.unreadable), [m.body for m in effects.messages], effects.broken) == (
        1,
        [b"next"],
        None,
    )


def test_extension_counts_with_its_memory(pair: Pair) -> None:
    """64 KiB of empty objects are more than a megabyte in memory."""
    extension = {"a": [{} for _ in range(21_000)]}
    assert extension_cost(extension) > 20 * len(json.dumps(extension, separators=(",", ":")))
    assert pair.hear_frame(Kind.MESSAGE, extension=extension).size > MIB
    assert pair.hear_frame(Kind.MESSAGE, extension={"ttl": 5}).size < 300


def test_request_unreadable_answers_are_bounded(pair: Pair) -> None:
    """A broker may send such requests and read no answers. It gets some answers; the
    other requests are only counted.
    """
    unreadable = frame(HEADER.pack(Kind.REQUEST, 2, 0, 3, 7), b"bob\0\0")
    for _ in range(100):
        pair.hear(unreadable * 100)
    assert pair.dialog.counters["unreadable"] == 10_000
    waiting = pair.dialog.data_to_send()
    assert 2**18 <= len(waiting) < 2**18 + 1000
    pair.dialog.wrote(len(waiting))
    pair.hear(unreadable)
    assert pair.dialog.data_to_send()


def test_refusals_of_unsent_messages_are_bounded(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that reads nothing can refuse messages that were never sent. Their ids
    do not fill the memory.
    """
    monkeypatch.setattr("brokerd_client.protocol.encoder._MAX_REFUSED", 10)
    pair.dialog.send("bob", 0, b"")
    payload = b'{"code":"denied"}'
    for message_id in range(100):
        pair.hear_frame(Kind.ERROR, message_id, "$broker", payload=payload, codec=2)
    assert len(pair.dialog._encoder._refused) == 10


@pytest.mark.parametrize("value", [b"{}", b"[]", b"1.5", b'""', b"[[]]"])
def test_list_of_clients_above_memory_limit_is_not_decoded(pair: Pair, value: bytes) -> None:
    """A few bytes of JSON can take many times their size in memory."""
    message_id, _ = pair.dialog.watch("sink", "w", None)
    payload = b'{"clients":[' + b",".join([value] * (16 * MIB // (len(value) + 1) - 10)) + b"]}"
    tracemalloc.start()
    try:
        [(_, error)] = pair.hear_frame(
            Kind.REPLY, message_id, "$broker", payload=payload, codec=2
        ).outcomes
        assert tracemalloc.get_traced_memory()[1] < 6 * len(payload)
    finally:
        tracemalloc.stop()
    assert isinstance(error, ProtocolError)


def test_list_of_hundred_thousand_clients_is_decoded(pair: Pair) -> None:
    """The list of a large broker is far below the limit."""
    message_id, _ = pair.dialog.watch("sink", "w", None)
    clients = [{"name": f"client-{n}", "online": False, "since": 1.7e9 + n} for n in range(100_000)]
    payload = json.dumps({"clients": clients}).encode()
    [(_, answer)] = pair.hear_frame(
        Kind.REPLY, message_id, "$broker", payload=payload, codec=2
    ).outcomes
    assert len(answer["clients"]) == 100_000


@pytest.mark.parametrize("text", [10, 900])
def test_inbox_errors_waiting_for_handler_count_with_size(
    face: Face, server: FakeServer, text: int
) -> None:
    """The inbox becomes full, and the remaining errors stay in the broker."""
    client = face.connect(server.path, "alice", b"alice", timeout=PATIENCE, inbox=100_000)
    free = threading.Event()
    reported = []

    async def hold(error: Exception) -> None:
        while not free.is_set():  # noqa: ASYNC110 - set by the test, in another thread
            await asyncio.sleep(0.01)
        reported.append(error)

    def wait(error: Exception) -> None:
        free.wait(20)
        reported.append(error)

    client.on_undelivered(wait if isinstance(face, Blocking) else hold)
    payload = json.dumps({"code": "offline", "message": "m" * text, "name": "bob"}).encode()
    error = Envelope(Kind.ERROR, 5, "$broker", payload, 2)
    try:
        server.act(lambda broker: [broker.online["alice"].deliver(error) for _ in range(4000)])
        end = time.monotonic() + PATIENCE
        while not client._meter.full and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)
        taken = client.counters["undelivered"]
        assert client._meter.full
        assert client._meter.held >= taken * (800 + text)
        # All errors of one read are taken in.
        assert client._meter.held < 100_000 + 2 * 262_144 // len(payload) * (1000 + text)
    finally:
        free.set()
    while len(reported) < 4000 and time.monotonic() < end + PATIENCE:
        time.sleep(0.01)
    assert len(reported) == 4000
