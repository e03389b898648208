"""The frames of a batch are sorted by their senders, by both loops alike."""

from __future__ import annotations

import os
from typing import Any

import pytest

from brokerd.core import _routing_py
from brokerd_client.wire.envelope import Envelope, Kind, encode, parse
from brokerd_client.wire.framing import FrameReader, frame
from brokerd_client.wire.layout import Flag

LOOPS: list[Any] = [_routing_py]
if os.environ.get("BROKERD_PURE") != "1":
    LOOPS.append(pytest.importorskip("brokerd.core._routing_c", reason="it was not built"))


@pytest.mark.parametrize("loop", LOOPS)
def test_sort_frames_of_several_senders_gives_each_its_own_as_sent(loop: Any) -> None:
    """The recipient's name takes the sender's place; a frame with ACK is left."""
    sent = [
        (Kind.MESSAGE, "ann/1", 0),
        (Kind.REQUEST, "ann/1", Flag.RECEIPT),
        (Kind.REPLY, "eve/2", 0),
        (Kind.MESSAGE, "ann/1", 0),
        (Kind.ERROR, "eve/2", Flag.ACK),
        (Kind.MESSAGE, "ann/1", 0),
    ]
    each = [
        frame(encode(Envelope(kind, number, name, b"payload", flags=flags)))
        for number, (kind, name, flags) in enumerate(sent)
    ]
    frames = b"".join(each)
    buffers: dict[bytes, bytearray] = {}
    position = loop.sort_frames(frames, 0, b"bob", buffers)
    assert position == sum(map(len, each[:4]))
    position += len(each[4])
    assert loop.sort_frames(memoryview(frames), position, b"bob", buffers) == len(frames)
    found = {}
    for sender, data in buffers.items():
        reader = FrameReader()
        reader.feed(bytes(data))
        found[sender] = []
        while (body := reader.next_frame(1 << 20)) is not None:
            envelope = parse(body)
            assert (envelope.name, envelope.payload) == ("bob", b"payload")
            found[sender].append((envelope.kind, envelope.id, envelope.flags))
    assert found == {
        b"ann/1": [
            (Kind.MESSAGE, 0, 0),
            (Kind.REQUEST, 1, Flag.RECEIPT),
            (Kind.MESSAGE, 3, 0),
            (Kind.MESSAGE, 5, 0),
        ],
        b"eve/2": [(Kind.REPLY, 2, 0)],
    }


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("frames", [b"\0", b"\xff" * 20, b"\0\0\0\x20" + b"\1" * 20])
def test_sort_frames_of_bytes_that_are_not_whole_frames_fails(loop: Any, frames: bytes) -> None:
    """Nothing is read behind their end."""
    with pytest.raises(ValueError, match="not whole"):
        loop.sort_frames(frames, 0, b"bob", {})
