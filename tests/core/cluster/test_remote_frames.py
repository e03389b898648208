"""Frames as hosts exchange them, and the outbox that they are taken from."""

from __future__ import annotations

import pytest

from brokerd.core.cluster.remote_frames import walk
from brokerd.core.cluster.remote_outbox import _identified, _whole_frames
from brokerd_client.wire.envelope import Envelope, Kind, encode
from brokerd_client.wire.framing import frame


def message(number: int, payload: bytes = b"x", sender: str = "ann") -> bytes:
    """Return a MESSAGE."""
    return frame(encode(Envelope(Kind.MESSAGE, number, sender, payload)))


@pytest.mark.parametrize(
    ("frames", "fault"),
    [
        (b"\0", "the last frame is not whole"),
        (b"\0\0\0\5hello", "a frame is not whole"),
        (message(1)[:-1], "a frame is not whole"),
        (b"\0\0\0\x0c\1\0\0\x09" + bytes(8), "a frame is shorter than its name"),
    ],
)
def test_walk_over_broken_bytes_says_what_is_wrong(frames: bytes, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        list(walk(message(7) + frames))


def test_run_ends_behind_the_last_frame_that_has_room() -> None:
    """The first frame is taken even without room for it.

    A frame of 2 GiB has another form of length.
    """
    both = message(1) + message(2)
    assert _whole_frames(memoryview(both), len(message(1))) == len(message(1))
    assert _whole_frames(memoryview(both), 1) == len(message(1))
    assert _whole_frames(memoryview(both), 1000) == len(both)
    huge = b"\xff\xff\xff\xff" + (1 << 31).to_bytes(8, "big")
    assert _whole_frames(memoryview(huge), 1) == 12 + (1 << 31)


def test_frame_gets_the_identity_of_its_sender_once() -> None:
    whole = message(1, sender="ann/x1a1")
    assert _identified(message(1), b"ann/x1a1") == whole
    assert _identified(whole, b"ann/x1a1") == whole
