"""The compiled routing loop and its Python twin: equal to the byte for the same input."""

from __future__ import annotations

import os
import random
import struct
from typing import Any

import pytest
from support.loop_twins import HEADER, MAX_MESSAGE, Recorded, agree, frame

from brokerd_client.wire.framing import LENGTH
from brokerd_client.wire.layout import (
    EVENT_KIND,
    FRAME_HEAD,
    ID,
    MESSAGE_KIND,
)

if os.environ.get("BROKERD_PURE") == "1":
    pytest.skip("BROKERD_PURE=1 leaves the compiled loop out", allow_module_level=True)
_routing_c = pytest.importorskip(
    "brokerd.core._routing_c", reason="the compiled loop was not built"
)

NAMES = [
    "a",
    "b",
    "c",
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


def odd_frame(rng: random.Random) -> bytes:
    """Return a frame that is ordinary, odd or broken; most differ from an ordinary one
    in a single thing.
    """
    kind = rng.choice([1, 1, 1, 1, 5, 5, 5, 2, 3, 4, 6, 7, 0, 255])
    flags = rng.choice([0] * 9 + [1, 2, 3, 4, 8, 255])
    recipient = rng.choice(["a", "b", "c"] * 6 + NAMES)
    name = b"" if kind == 5 and rng.random() < 0.95 else recipient.encode()
    topic = rng.choice(["t.x"] * 12 + TOPICS).encode()
    between = bytes([len(topic)]) + topic if kind == 5 else b""
    if flags & 2:
        extension = rng.choice([b"{}", b'{"ttl": 5}', b'{"ttl": 0}', b"[]", b"{"])
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
    """Return a random step for one of the seven connections, or for all of them."""
    entry = rng.randrange(7)
    match rng.randrange(20):
        case 0:
            return "repeat", entry, odd_frame(rng), rng.randrange(2, 60)
        case 1:
            return "subscribe", entry, rng.choice(["t.>", "t.*", ">", "t"])
        case 2 | 3:
            return "block", entry, rng.choice([0, 50, 300])
        case 4 | 5:
            return "read", entry, rng.choice([None, 20, 500])
        case 6:
            return "advance", rng.choice([0.1, 5.0, 40.0])
        case 7 | 8 | 9:
            return "reconnect", entry
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
    assert (layout["message"], layout["event"]) == (MESSAGE_KIND, EVENT_KIND)


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


def test_routing_twins_refuse_topic_ending_behind_its_frame() -> None:
    """The bytes behind the frame in the buffer would complete a known topic, and are
    not read.
    """
    plain = agree([("send", 0, [frame(HEADER.pack(5, 0, 0, 0, 7) + b"\x03t.") + b"x" * 40], 5000)])
    assert [call[0] for call in plain.calls[:2]] == ["handle", "malformed"]


@pytest.mark.parametrize(
    "seed", [random.randrange(2**32) for _ in range(int(os.environ.get("BROKERD_SEEDS", "60")))]
)
def test_routing_twins_agree_on_random_steps(seed: int) -> None:
    """Bytes out, bytes kept, calls of the broker and counters are equal after every
    step; the seed is in the name.
    """
    rng = random.Random(seed)
    agree(odd_step(rng) for _ in range(60))


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (3, 2), (0, 11), (11, 11)])
def test_routing_compiled_with_bounds_outside_buffer_is_refused(start: int, end: int) -> None:
    """Bounds outside the buffer are refused before a byte is read."""
    net = Recorded(_routing_c.feed)
    with pytest.raises(ValueError, match="outside the buffer"):
        net.feed(net.broker, net.entries[0].session, memoryview(bytes(10)), start, end, 0.0)
