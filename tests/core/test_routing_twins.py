"""The compiled routing loop and its Python twin: equal to the byte for the same input."""

from __future__ import annotations

import os
import random
import struct
from typing import Any

import pytest
from support.fake_network import FakeNet, client, error_of
from support.loop_twins import HEADER, MAX_MESSAGE, Recorded, agree, frame
from support.seeds import random_seeds

from brokerd.core import _routing_py
from brokerd.core.mailboxes.journal import FailureKind
from brokerd.core.sink import KEY_SIZE
from brokerd_client.wire.envelope import MAX_KEY_SIZE, MAX_STORED_TTL, Envelope, encode, parse
from brokerd_client.wire.framing import LENGTH
from brokerd_client.wire.layout import EXTENSION_LENGTH, FRAME_HEAD, ID, SEQ, Flag, Kind

if os.environ.get("BROKERD_PURE") == "1":
    pytest.skip("BROKERD_PURE=1 leaves the compiled loop out", allow_module_level=True)
_routing_c = pytest.importorskip(
    "brokerd.core._routing_c", reason="the compiled loop was not built"
)

NAMES = [
    "a",
    "b",
    "c",
    "box",
    "pool",
    "drops",
    "slow",
    "metered",
    "nobody",
    "$broker",
    "pool/x",
    "a" * 64,
    "B",
    "ä",
    "",
    "-",
]
TOPICS = ["t", "t.x", "t.y.z", "u", "$t", "t..x", "*", "t" * 255, ""]


EXTENSIONS = [
    b"{}",
    b' {"traceparent" : "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"} ',
    b'{"traceparent":"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01","ttl":20}',
    b'{"ttl": 5}',
    b'{"ttl":0.75,"a":[1,{}],"b":"\\n"}',
    b'{"ttl":0.75}',
    b'{"ttl": 0}',
    b'{"ttl": -1}',
    b'{"ttl": true}',
    b'{"ttl": 1, "ttl": 2}',
    b'{"key": "k-1"}',
    b'{"ttl": 30, "key":"k-2", "a":"b"}',
    b'{"key":""}',
    b'{"key":7}',
    b'{"key":"a","key":"b"}',
    b'{"delay":0}',
    b'{"key":"k-3","delay":5}',
    b"[]",
    b"{",
    b"\xff",
]


def odd_frame(rng: random.Random) -> bytes:
    """Return a frame that is ordinary, odd or broken; most differ from an ordinary one
    in a single thing.
    """
    kind = rng.choice([1, 1, 1, 1, 5, 5, 5, 2, 2, 2, 3, 4, 6, 7, 0, 255])
    flags = rng.choice([0] * 9 + [1, 1, 2, 2, 3, 4, 8, 255])
    recipient = rng.choice(
        ["a", "b", "c", "box"] * 6 + ["pool"] * 6 + ["pool/i4"] * 3 + ["drops"] * 4 + NAMES
    )
    name = b"" if kind == 5 and rng.random() < 0.95 else recipient.encode()
    topic = rng.choice(["t.x"] * 12 + TOPICS).encode()
    between = bytes([len(topic)]) + topic if kind == 5 else b""
    if flags & 2:
        extension = rng.choice(EXTENSIONS)
        between += struct.pack("!H", len(extension)) + extension
    size = rng.choice(
        [0, 1, 16, 40, MAX_MESSAGE - len(between), MAX_MESSAGE, MAX_MESSAGE + 1, 2 * MAX_MESSAGE]
    )
    payload = rng.randbytes(max(size, 0))
    name_size = len(name)
    if rng.random() < 0.05:
        name_size = rng.choice(
            [0, 255, min(255, len(name + between + payload) + rng.choice([0, 1]))]
        )
    if kind == 5 and rng.random() < 0.1:
        # A topic whose length is wrong.
        between = (
            bytes([rng.choice([0, 255, min(255, len(between + payload) + rng.choice([-1, 0, 1]))])])
            + topic
        )
    body = (
        HEADER.pack(kind, flags, rng.randrange(256), name_size, rng.getrandbits(64))
        + name
        + between
        + payload
    )
    match rng.randrange(60):
        case 0:
            return frame(body[: rng.randrange(20)])
        case 1:
            return frame(body, length=rng.choice([-2, -(2**31), 0, 5, 11, 2**31 - 1]))
        case 2:
            return frame(body, long=True, length=rng.choice([len(body), 2**63, 2**64 - 1, 0]))
        case 3:
            return rng.randbytes(30)
        case 4:
            return frame(body, long=True)
        case 5:
            flipped = bytearray(frame(body))
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            return bytes(flipped)
    return frame(body)


def odd_step(rng: random.Random) -> tuple[Any, ...]:
    """Return a random step for one of the eight connections, or for all of them."""
    entry = rng.randrange(8)
    match rng.randrange(20):
        case 0:
            return "repeat", entry, odd_frame(rng), rng.randrange(2, 60)
        case 1:
            group = rng.choice(["", "", "g", "h"])
            return "subscribe", entry, rng.choice(["t.>", "t.*", ">", "t"]), group
        case 2 | 3:
            return "block", entry, rng.choice([0, 50, 300])
        case 4 | 5:
            return "read", entry, rng.choice([None, 20, 500])
        case 6:
            return "advance", rng.choice([0.1, 5.0, 40.0])
        case 7:
            return "reconnect", entry
        case 14:
            return "acknowledge", [rng.randrange(25) for _ in range(rng.randrange(1, 12))]
        case 12 | 13:
            failure = rng.choice([None] * 8 + [FailureKind.FULL] * 2 + [FailureKind.IO])
            return "store", rng.choice([1, 2, None]), failure
        case 8 | 9 | 10 | 11:
            payload = rng.choice([b"", b"done", b'{"code": "back"}', b'{"code": "x"}', b"b" * 150])
            kind, flags = rng.choice([3, 3, 4]), rng.choice([0, 0, 0, 1, 2, 3])
            return "answer", entry, rng.randrange(9), kind, flags, payload
    frames = [odd_frame(rng) for _ in range(rng.randrange(1, 12))]
    return "send", entry, frames, rng.choice([1, 7, 100, 5000, 5000])


def test_routing_compiled_layout_equals_wire_layout() -> None:
    """The compiled loop's own offsets and numbers are those of wire.layout."""
    layout = _routing_c.LAYOUT
    message_id = 0x1112131415161718
    head = FRAME_HEAD.pack(0x01020304, 0xA1, 0xA2, 0xA3, 0xA4, message_id)

    assert layout["head_size"] == FRAME_HEAD.size
    assert layout["length_size"] == FRAME_HEAD.size - HEADER.size == LENGTH.size
    offsets = ("kind_offset", "flags_offset", "codec_offset", "name_size_offset")
    assert [head[layout[offset]] for offset in offsets] == [0xA1, 0xA2, 0xA3, 0xA4]
    start = layout["id_offset"]
    assert head[start : start + layout["id_size"]] == ID.pack(message_id)
    kinds = ("message", "request", "reply", "error", "event", "receipt", "ack")
    assert [layout[kind] for kind in kinds] == [Kind[kind.upper()] for kind in kinds]
    assert (layout["receipt_flag"], layout["extension_flag"]) == (Flag.RECEIPT, Flag.EXTENSION)
    assert layout["extension_length_size"] == EXTENSION_LENGTH.size
    assert (layout["ack_flag"], layout["seq_size"]) == (Flag.ACK, SEQ.size)
    stored = (layout["largest_key"], layout["key_size"], layout["longest_ttl"])
    assert stored == (MAX_KEY_SIZE, KEY_SIZE, MAX_STORED_TTL)


@pytest.mark.parametrize("step", [1, 3, 5000])
def test_routing_twins_pass_on_ordinary_frames_without_broker(step: int) -> None:
    """Runs of messages and events, in every segmentation: the loops pass them on
    without a call of the broker.
    """
    message = frame(HEADER.pack(1, 0, 9, 1, 7) + b"b" + b"x" * 30)
    event = frame(HEADER.pack(5, 0, 0, 0, 7) + b"\x03t.x" + b"y" * 30)
    plain = agree([("send", 0, [message] * 20 + [event] * 20, step)])
    assert not plain.calls
    assert plain.entries[1].session.messages_out > 40


def test_routing_compiled_passes_on_without_broker() -> None:
    """Neither a group, nor an outbox of single frames, nor a receipt in one needs the
    broker. A request that waits for room in flight does not either.
    """
    net = Recorded(_routing_c.feed)
    for entry in net.entries[3:5]:
        entry.op("subscribe", 1, topic="t.g", group="g")
    drops = net.entries[7]
    drops.op("subscribe", 1, topic="t.g")
    for peer, name in ((net.entries[0], "drops"), (net.entries[0], "pool"), (drops, "a")):
        peer.message(name, b"first")
    net.entries[0].publish("t.g", b"first")
    drops.publish("t.g", b"first")
    before = [entry.session.messages_out for entry in net.entries]
    net.calls.clear()

    event = frame(HEADER.pack(5, 0, 0, 0, 7) + b"\x03t.g" + b"y" * 10)
    net.play(("send", 0, [frame(HEADER.pack(1, 0, 0, 5, 7) + b"drops" + b"x")] * 3, 5000))
    net.play(("send", 0, [event] * 4, 5000))
    net.play(("send", 7, [frame(HEADER.pack(1, 1, 0, 1, 8) + b"ax")], 5000))

    assert not net.calls
    after = [entry.session.messages_out for entry in net.entries]
    assert [new - old for old, new in zip(before, after, strict=True)] == [1, 4, 0, 2, 2, 0, 0, 8]

    requests = [frame(HEADER.pack(2, 1, 0, 4, n) + b"pool" + b"x") for n in range(8)]
    net.play(("send", 0, requests, 5000))
    assert not net.calls
    flight = net.broker.exchange.clients["pool"].flight
    assert flight is not None
    assert [request.id for request, _ in flight.waiting()] == [6, 7]


def test_routing_compiled_stores_messages_of_a_batch_without_broker() -> None:
    """The broker sees the first message to a mailbox that does not collect: it decides
    whether mailboxes take messages. The next batch begins without it.
    """
    net = Recorded(_routing_c.feed)
    net.play(("store", None, None))
    net.broker.mailboxes.commits.collect_all()
    net.calls.clear()
    stored = [frame(HEADER.pack(1, n % 2, 0, 3, n) + b"box" + b"x") for n in range(8)]
    for begin, calls in ((0, ["handle"]), (4, [])):
        net.play(("send", 0, stored[begin : begin + 4], 5000))
        assert [call[0] for call in net.calls] == calls
        net.play(("store", None, None))
        net.calls.clear()
        assert len(net.store.batches[-1].records[0].messages) == 4
    receipts = [envelope.id for envelope in net.entries[0].got if envelope.kind is Kind.RECEIPT]
    assert receipts == [1, 3, 5, 7]


def test_routing_twins_refuse_topic_ending_behind_its_frame() -> None:
    """The bytes behind the frame in the buffer would complete a known topic, and are
    not read.
    """
    plain = agree([("send", 0, [frame(HEADER.pack(5, 0, 0, 0, 7) + b"\x03t.") + b"x" * 40], 5000)])
    assert [call[0] for call in plain.calls[:2]] == ["handle", "malformed"]


def test_routing_twins_confirm_an_answer_before_the_next_request() -> None:
    """A RECEIPT of an answer comes before the request that the answer makes room for."""
    request = frame(HEADER.pack(Kind.REQUEST, 0, 0, 4, 1) + b"pool")
    steps = [("repeat", 1, request, 10), ("answer", 3, 0, Kind.REPLY, Flag.RECEIPT, b"")]
    member = agree(steps).entries[3]
    assert [each.kind for each in member.take()][-2:] == [Kind.RECEIPT, Kind.REQUEST]


@pytest.mark.parametrize("seed", random_seeds(int(os.environ.get("BROKERD_SEEDS", "60"))))
def test_routing_twins_agree_on_random_steps(seed: int) -> None:
    """Bytes out, bytes kept, calls of the broker and counters are equal after every
    step; the seed is in the name.
    """
    rng = random.Random(seed)
    agree(odd_step(rng) for _ in range(60))


@pytest.mark.parametrize("seed", random_seeds(int(os.environ.get("BROKERD_SEEDS", "30"))))
def test_routing_twins_agree_on_runs_to_pools(seed: int) -> None:
    """Each member of two pools gets the same bytes of long reads from both loops."""
    rng = random.Random(seed)
    reads = []
    for _ in range(4):
        data, most = bytearray(), rng.choice([1, 5, 100, 3000])
        sizes = rng.choice([[10], [0, 10, 100], [10, 3000], [500]])
        while len(data) < 200_000:
            name = rng.choice([b"p2", b"p2", b"p9", b"b"])
            flags = rng.choice([0] * 20 + [1, 2])
            extension = EXTENSION_LENGTH.pack(2) + b"{}" if flags == 2 else b""
            for _ in range(rng.randrange(1, most + 1) if not flags else 1):
                head = HEADER.pack(1, flags, 0, len(name), len(data))
                data += frame(head + name + extension + rng.choice(sizes) * b"x")
        reads.append(bytes(data))
    outputs = []
    for feed in (_routing_c.feed, _routing_py.feed):
        net = FakeNet(
            client("a"),
            client("b"),
            client("p2", connections=2),
            client("p9", connections=9),
            feed=feed,
        )
        peers = [net.connect(name) for name in ["a", "b", *["p2"] * 2, *["p9"] * 9]]
        for name in ("b", "p2", "p9"):
            peers[0].message(name)
        for number, data in enumerate(reads):
            peers[0].send_bytes(data)
            if number == 1:
                # Its outbox leaves the ring in the middle of a round.
                peers[5].block()
        outputs.append([bytes(peer.stream) for peer in peers])
    assert outputs[0] == outputs[1]


def test_routing_twins_have_the_same_runs() -> None:
    """Both loops begin runs in reads of the same length, and end them alike."""
    assert _routing_c.RUNS == (_routing_py.PLENTY, _routing_py.LONGEST_RUN)


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (3, 2), (0, 11), (11, 11)])
def test_routing_compiled_with_bounds_outside_buffer_is_refused(start: int, end: int) -> None:
    """Bounds outside the buffer are refused before a byte is read."""
    net = Recorded(_routing_c.feed)
    with pytest.raises(ValueError, match="outside the buffer"):
        net.feed(net.broker, net.entries[0].session, memoryview(bytes(10)), start, end, 0.0)


@pytest.mark.parametrize("seed", random_seeds(int(os.environ.get("BROKERD_SEEDS", "200"))))
def test_routing_compiled_extension_is_read_as_json_or_left(seed: int) -> None:
    """What the loop takes for valid is valid, and has the ttl that the decoder finds."""
    rng = random.Random(seed)
    parts = [
        b"{",
        b"}",
        b",",
        b":",
        b'"ttl"',
        b'"key"',
        b'"a"',
        b'"',
        b"1",
        b"0.5",
        b"-2",
        b"true",
        b"null",
    ]
    parts += [
        b" ",
        b"\n",
        b"[1]",
        b"1e3",
        b"01",
        b"\\",
        b"x",
        b"\x7f",
        b"\xc3\xa9",
        b"123456789.0625",
    ]
    for _ in range(200):
        if rng.random() < 0.5:
            members = [
                b":".join((rng.choice(parts[4:7]), rng.choice([b'"k"', *parts[6:]])))
                for _ in range(rng.randrange(3))
            ]
            extension = b"{" + rng.choice([b",", b" , "]).join(members) + b"}"
        else:
            extension = b"".join(rng.choices(parts, k=rng.randrange(8)))
        is_valid, ttl, key = _routing_c.read_extension(extension)
        if is_valid:
            envelope = Envelope(Kind.MESSAGE, 1, "a")
            body = bytearray(encode(envelope))
            body[1] = Flag.EXTENSION
            whole = parse(bytes(body) + EXTENSION_LENGTH.pack(len(extension)) + extension)
            assert whole.extension is not None
            assert whole.extension.get("ttl") == ttl
            assert whole.extension.get("key", "") == key.decode()


@pytest.mark.parametrize("extension", [b'{"key":"x"}', b'{"delay":1}', b'{"ttl":5,"key":"x"}'])
def test_routing_compiled_key_or_delay_of_live_message_is_refused(extension: bytes) -> None:
    """What only a mailbox takes is not passed on, whichever loop runs."""
    net = FakeNet(client("a"), client("b"), feed=_routing_c.feed)
    a, b = net.connect("a"), net.connect("b")
    between = EXTENSION_LENGTH.pack(len(extension)) + extension
    a.send_bytes(
        frame(HEADER.pack(Kind.MESSAGE, 0, 0, 1, 1) + b"b")
        + frame(HEADER.pack(Kind.MESSAGE, Flag.EXTENSION, 0, 1, 2) + b"b" + between)
    )

    assert [envelope.id for envelope in b.take()] == [1]
    assert [(error_of(envelope), envelope.id) for envelope in a.take()] == [("unsupported", 2)]


def test_routing_compiled_extension_of_usual_forms_is_read() -> None:
    """A traceparent and the library's ttl need no decoder."""
    usual = [
        b"{}",
        b'{"ttl":30}',
        b'{"ttl":0.25}',
        b'{"traceparent":"00-4b-00-01","ttl":5.5}',
        b'{"key":"k-1"}',
        b'{"ttl":60,"key":"k-2"}',
    ]
    assert [_routing_c.read_extension(extension) for extension in usual] == [
        (True, None, b""),
        (True, 30.0, b""),
        (True, 0.25, b""),
        (True, 5.5, b""),
        (True, None, b"k-1"),
        (True, 60.0, b"k-2"),
    ]
