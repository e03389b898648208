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


def odd_frame(chance: random.Random) -> bytes:
    """Return a frame that is ordinary, odd or broken; most differ from an ordinary one
    in a single thing.
    """
    kind = chance.choice([1, 1, 1, 1, 5, 5, 5, 2, 3, 4, 6, 7, 0, 255])
    flags = chance.choice([0] * 9 + [1, 2, 3, 4, 8, 255])
    recipient = chance.choice(["a", "b", "c"] * 6 + NAMES)
    name = b"" if kind == 5 and chance.random() < 0.95 else recipient.encode()
    topic = chance.choice(["t.x"] * 12 + TOPICS).encode()
    between = bytes([len(topic)]) + topic if kind == 5 else b""
    if flags & 2:
        extension = chance.choice([b"{}", b'{"ttl": 5}', b'{"ttl": 0}', b"[]", b"{"])
        between += struct.pack("!H", len(extension)) + extension
    size = chance.choice(
        [0, 1, 16, 40, MAX_MESSAGE - len(between), MAX_MESSAGE, MAX_MESSAGE + 1, 2 * MAX_MESSAGE]
    )
    payload = chance.randbytes(max(size, 0))
    name_size = len(name)
    if chance.random() < 0.05:
        name_size = chance.choice(
            [0, 255, min(255, len(name + between + payload) + chance.choice([0, 1]))]
        )
    if kind == 5 and chance.random() < 0.1:
        # A topic that ends in the middle of nowhere.
        between = (
            bytes(
                [
                    chance.choice(
                        [0, 255, min(255, len(between + payload) + chance.choice([-1, 0, 1]))]
                    )
                ]
            )
            + topic
        )
    body = (
        HEADER.pack(kind, flags, chance.randrange(256), name_size, chance.getrandbits(64))
        + name
        + between
        + payload
    )
    match chance.randrange(60):
        case 0:
            return frame(body[: chance.randrange(20)])
        case 1:
            return frame(body, length=chance.choice([-2, -(2**31), 0, 5, 11, 2**31 - 1]))
        case 2:
            return frame(body, long=True, length=chance.choice([len(body), 2**63, 2**64 - 1, 0]))
        case 3:
            return chance.randbytes(30)
        case 4:
            return frame(body, long=True)
        case 5:
            flipped = bytearray(frame(body))
            flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
            return bytes(flipped)
    return frame(body)


def odd_step(chance: random.Random) -> tuple[Any, ...]:
    """Return something that happens to one of the seven connections, or to all."""
    entry = chance.randrange(7)
    match chance.randrange(20):
        case 0:
            return "repeat", entry, odd_frame(chance), chance.randrange(2, 60)
        case 1:
            return "subscribe", entry, chance.choice(["t.>", "t.*", ">", "t"])
        case 2 | 3:
            return "block", entry, chance.choice([0, 50, 300])
        case 4 | 5:
            return "read", entry, chance.choice([None, 20, 500])
        case 6:
            return "advance", chance.choice([0.1, 5.0, 40.0])
        case 7 | 8 | 9:
            return "reconnect", entry
    frames = [odd_frame(chance) for _ in range(chance.randrange(1, 12))]
    return "send", entry, frames, chance.choice([1, 7, 100, 5000, 5000])


def test_compiled_loop_layout_is_that_of_the_wire() -> None:
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
def test_both_pass_on_the_ordinary(step: int) -> None:
    """Runs of messages and events, in every segmentation: the loops do them without a
    call to the broker.
    """
    message = frame(HEADER.pack(1, 0, 9, 1, 7) + b"b" + b"x" * 30)
    event = frame(HEADER.pack(5, 0, 0, 0, 7) + b"\x03t.x" + b"y" * 30)
    plain = agree([("send", 0, [message] * 20 + [event] * 20, step)])
    assert not plain.calls
    assert plain.entries[1].session.messages_out > 40


def test_both_see_a_topic_that_ends_behind_its_frame() -> None:
    """What follows the frame in the buffer would complete a known topic, and is not
    looked at.
    """
    plain = agree([("send", 0, [frame(HEADER.pack(5, 0, 0, 0, 7) + b"\x03t.") + b"x" * 40], 5000)])
    assert [call[0] for call in plain.calls[:2]] == ["handle", "malformed"]


@pytest.mark.parametrize(
    "seed", [random.randrange(2**32) for _ in range(int(os.environ.get("BROKERD_SEEDS", "60")))]
)
def test_both_do_the_same(seed: int) -> None:
    """Bytes out, bytes kept, calls to the broker and counters are equal after every
    step; the seed is in the name.
    """
    chance = random.Random(seed)
    agree(odd_step(chance) for _ in range(60))


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (3, 2), (0, 11), (11, 11)])
def test_the_compiled_loop_reads_nothing_outside_its_buffer(start: int, end: int) -> None:
    """Bounds that lie outside are refused before a byte is looked at."""
    net = Recorded(_routing_c.feed)
    with pytest.raises(ValueError, match="outside the buffer"):
        net.feed(net.broker, net.entries[0].session, memoryview(bytes(10)), start, end, 0.0)
