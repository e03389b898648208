"""Messages that are no longer routed, counted in bytes that are cut anywhere."""

from __future__ import annotations

import pytest
from support.raw_client import ERROR, EVENT, MESSAGE, RECEIPT, REPLY, REQUEST, packed

from brokerd.net.connection.unread import UnreadCounter

FRAMES = [
    packed(MESSAGE, "bob", b"x") * 3,
    packed(REQUEST, "$broker", b"{}"),
    packed(EVENT, "", b"\x01t"),
    packed(REPLY, "bob"),
    packed(ERROR, "bob"),
    packed(MESSAGE, "bob", bytes(70_000)),
    packed(RECEIPT, ""),
    b"\xff\xff\xff\xff" + (20).to_bytes(8, "big") + packed(MESSAGE, "bob", b"12345")[4:],
    # This frame is incomplete.
    packed(MESSAGE, "bob", b"yy")[:-1],
]


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7, 17, 1000, 1 << 20])
def test_unread_counter_counts_whole_messages_only(step: int) -> None:
    data = b"".join(FRAMES)
    counter = UnreadCounter()
    for start in range(0, len(data), step):
        counter.feed(data[start : start + step])
    assert counter.count == 3 + 1 + 1 + 1 + 1


def test_unread_counter_skips_bytes_already_judged() -> None:
    counter = UnreadCounter(bytes_to_skip=5)
    counter.feed(b"#####" + packed(MESSAGE, "bob"))
    assert counter.count == 1


def test_unread_counter_counts_nothing_after_invalid_frame() -> None:
    counter = UnreadCounter()
    counter.feed(packed(MESSAGE, "bob") + b"\x00\x00\x00\x05hello" + packed(MESSAGE, "bob") * 3)
    assert counter.count == 1
