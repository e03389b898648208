"""Bytes that wait for one connection: none lost, none written twice, within the quota."""

from __future__ import annotations

import gc
import time
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokerd.core import outbox as outbox_module
from brokerd.core.outbox import CHUNK, FrameOutbox, Outbox, Queued, StreamOutbox
from brokerd_client.wire.envelope import Envelope, Kind, encode
from brokerd_client.wire.framing import frame

KINDS = pytest.mark.parametrize("kind", [StreamOutbox, FrameOutbox])


def message(size: int, message_id: int = 0, name: str = "ann") -> bytes:
    """Return a frame of ``size`` bytes in all."""
    return frame(encode(Envelope(Kind.MESSAGE, message_id, name, b"x" * (size - 16 - len(name)))))


def put(outbox: Outbox, whole: bytes) -> bool:
    """Queue a frame if there is room for it, as the broker does."""
    if not outbox.reserve(len(whole)):
        return False
    if isinstance(outbox, StreamOutbox):
        outbox.content += whole
        outbox.frames += 1
    else:
        outbox.put(Queued(whole))
    return True


@KINDS
def test_outbox_written_in_pieces_keeps_bytes_in_order(kind: type[Outbox]) -> None:
    """The bytes written in small pieces are the bytes queued. The outbox counts the
    waiting ones exactly.
    """
    outbox = kind(1 << 30)
    sizes = [20, 100, CHUNK - 10, 50, 3 * CHUNK, 20, 21, CHUNK]
    whole = b"".join(message(size, number) for number, size in enumerate(sizes))
    for number, size in enumerate(sizes):
        assert put(outbox, message(size, number))
    assert outbox.waiting == len(whole)
    taken = b""
    for size in (0, 1, 19, 100, CHUNK, 7, *[70_000] * 20):
        piece = b"".join(outbox.pieces())[:size]
        outbox.sent(len(piece))
        taken += piece
        assert outbox.waiting == len(whole) - len(taken)
    assert taken == whole
    assert outbox.pieces() == []


@KINDS
def test_outbox_beyond_limit_refuses(kind: type[Outbox]) -> None:
    """As many bytes as the limit may wait, not one more; written bytes make room."""
    outbox = kind(100)
    assert put(outbox, message(60))
    assert not put(outbox, message(41))
    assert put(outbox, message(40))
    assert not outbox.reserve(1)
    assert outbox.reserve(1, 1)
    outbox.sent(30)
    assert put(outbox, message(30))
    assert not outbox.reserve(1)


@KINDS
def test_outbox_frame_longer_than_limit_is_accepted_when_empty(kind: type[Outbox]) -> None:
    """A message larger than the whole queue can be delivered to a recipient that reads."""
    outbox = kind(30)
    assert put(outbox, message(500))
    assert not put(outbox, message(20))
    outbox.sent(499)
    assert put(outbox, message(20))


@KINDS
def test_outbox_append_ignores_limit(kind: type[Outbox]) -> None:
    """The broker's own answer is not refused for want of room; it counts like every
    other frame.
    """
    outbox = kind(30)
    for _ in range(5):
        outbox.append(message(30))
    assert outbox.waiting == 150
    assert outbox.frames == 5
    assert outbox.size == 150
    assert not outbox.reserve(20)


def take_unsent(outbox: Outbox) -> list[Queued]:
    """Take the frames that were not written whole; check that the outbox knew their
    number before.
    """
    expected = outbox.unsent
    unsent = outbox.take_unsent()
    assert len(unsent) == expected
    frames = []
    while (queued := unsent.pop()) is not None:
        frames.append(queued)
    assert len(frames) == expected
    assert len(unsent) == outbox.unsent == 0
    return frames


@KINDS
def test_outbox_stalled_until_empty(kind: type[Outbox]) -> None:
    """A byte more that is written does not end a stall; the last one does."""
    outbox = kind(100)
    outbox.append(message(30))
    outbox.stalled = True
    outbox.sent(29)
    assert outbox.stalled
    outbox.sent(1)
    assert not outbox.stalled


@KINDS
@pytest.mark.parametrize("taken", [0, 1, 29, 30, 31, 60, CHUNK, CHUNK + 60, 2 * CHUNK])
def test_outbox_unsent_frames_are_returned_whole(kind: type[Outbox], taken: int) -> None:
    """Every frame whose last byte was not written is returned whole, oldest first."""
    outbox = kind(1 << 30)
    frames = [message(size, number) for number, size in enumerate([30, 30, CHUNK, 30, CHUNK, 30])]
    for whole in frames:
        put(outbox, whole)
    outbox.sent(taken)
    ends = [sum(map(len, frames[: number + 1])) for number in range(len(frames))]
    expected = [whole for whole, end in zip(frames, ends, strict=True) if end > taken]
    assert [queued.frame for queued in take_unsent(outbox)] == expected
    assert outbox.waiting == 0
    assert outbox.pieces() == []
    assert take_unsent(outbox) == []


@KINDS
def test_outbox_pieces_of_one_write_are_bounded(
    kind: type[Outbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system accepts a limited number of pieces at once; the next write gets more."""
    monkeypatch.setattr(outbox_module, "_PIECES", 3)
    monkeypatch.setattr(outbox_module, "CHUNK", 20)
    outbox = kind(1 << 30)
    frames = [message(20, number) for number in range(7)]
    for whole in frames:
        put(outbox, whole)
    taken = b""
    while pieces := outbox.pieces():
        assert 0 < len(pieces) <= 3
        assert all(pieces)
        taken += b"".join(pieces)
        outbox.sent(sum(map(len, pieces)))
    assert taken == b"".join(frames)


@given(
    steps=st.lists(st.one_of(st.integers(20, 90), st.integers(-200, -1)), max_size=60),
    limit=st.sampled_from([10, 100, 300]),
    kind=st.sampled_from([StreamOutbox, FrameOutbox]),
)
def test_outbox_any_mix_of_puts_and_writes_keeps_order_and_limit(
    steps: list[int], limit: int, kind: type[Outbox]
) -> None:
    """However frames are queued and written, bytes stay in order. Only a single frame
    may exceed the quota.
    """
    outbox = kind(limit)
    accepted = taken = b""
    for number, step in enumerate(steps):
        if step > 0:
            whole = message(step, number)
            before = outbox.waiting
            if put(outbox, whole):
                accepted += whole
            assert (outbox.waiting > before) == (not before or before + step <= limit)
        else:
            piece = b"".join(outbox.pieces())[:-step]
            outbox.sent(len(piece))
            taken += piece
        assert accepted == taken + b"".join(outbox.pieces())
        assert outbox.waiting == len(accepted) - len(taken)


def test_outbox_room_of_stream_never_exceeds_limit() -> None:
    """The routing loop may write up to ``room``: never past the quota."""
    outbox = StreamOutbox(1000)
    assert outbox.room == 1000
    outbox.append(message(400))
    outbox.sent(100)
    assert outbox.room == 1100
    assert outbox.reserve(700)
    assert not outbox.reserve(701)


def test_outbox_frames_of_disconnected_sender_are_orphaned() -> None:
    """Frames that waited when a sender left are orphaned; those of its successor and of
    other senders are not.
    """
    outbox = StreamOutbox(1 << 30)
    for name in ("ann", "bob"):
        outbox.append(message(50, 1, name))
    outbox.sent(10)
    outbox.sender_left(b"ann")
    outbox.append(message(CHUNK, 2, "ann"))
    outbox.append(message(50, 3, "ann"))
    unsent = take_unsent(outbox)
    assert [(queued.frame, queued.orphaned) for queued in unsent] == [
        (message(50, 1, "ann"), True),
        (message(50, 1, "bob"), False),
        (message(CHUNK, 2, "ann"), False),
        (message(50, 3, "ann"), False),
    ]


def test_outbox_idle_holds_no_deque() -> None:
    """An idle connection costs little memory, also after it has had much to read."""

    def deques() -> int:
        return sum(isinstance(each, deque) for each in gc.get_referents(outbox))

    outbox = StreamOutbox(8 * CHUNK)
    assert deques() == 0
    for _ in range(3):
        outbox.put(Queued(bytes(CHUNK), deadline=5.0))
    assert deques() == 3
    assert outbox.sent(outbox.waiting)
    assert deques() == 0


def test_outbox_empty_forgets_disconnected_sender() -> None:
    """A sender that leaves an empty outbox leaves no entry. One whose bytes have been
    written leaves none either.
    """
    outbox = StreamOutbox(1000)
    outbox.sender_left(b"ann")
    assert outbox._left == {}
    outbox.append(message(50))
    outbox.sender_left(b"ann")
    assert outbox._left
    outbox.sent(50)
    assert outbox._left == {}
    outbox.append(message(50))
    assert not take_unsent(outbox)[0].orphaned


def outbox_with(*frames: Queued, limit: int = 100) -> FrameOutbox:
    """Return an outbox in which these frames wait."""
    outbox = FrameOutbox(limit)
    for queued in frames:
        outbox.put(queued)
    return outbox


def test_outbox_drop_oldest_drops_only_until_there_is_room() -> None:
    """No more frames are dropped than necessary."""
    first, second, third = (Queued(message(30, number)) for number in range(3))
    outbox = outbox_with(first, second, third)
    assert outbox.drop_oldest(40) == [first]
    assert outbox.waiting == 60
    assert outbox.drop_oldest(40) == []
    assert b"".join(outbox.pieces()) == second.frame + third.frame


def test_outbox_drop_oldest_keeps_partly_written_frame() -> None:
    """A partly written frame is sent whole. If no other frame is left, there is room
    for any frame.
    """
    first, second = Queued(message(30, 1)), Queued(message(30, 2))
    outbox = outbox_with(first, second)
    outbox.sent(1)
    assert outbox.drop_oldest(100) == [second]
    assert outbox.waiting == 29
    assert outbox.drop_oldest(100) == []
    assert b"".join(outbox.pieces()) == first.frame[1:]


def test_outbox_drop_oldest_skips_answers() -> None:
    """A kept frame stays in its place."""
    answer, first, second = (
        Queued(message(30, 1), kept=True),
        Queued(message(30, 2)),
        Queued(message(30, 3)),
    )
    outbox = outbox_with(answer, first, second)
    assert outbox.drop_oldest(40) == [first]
    assert b"".join(outbox.pieces()) == answer.frame + second.frame


def test_outbox_drop_oldest_without_effect_drops_nothing() -> None:
    """If dropping could not make enough room, all frames stay, in order."""
    answer, first = Queued(message(90, 1), kept=True), Queued(message(20, 2))
    outbox = outbox_with(first, answer, limit=120)
    outbox.put(Queued(message(20, 3)))
    before = b"".join(outbox.pieces())
    assert outbox.drop_oldest(50) is None
    assert b"".join(outbox.pieces()) == before
    assert outbox.waiting == 130


@pytest.mark.parametrize("taken", [0, 1, 30, CHUNK, CHUNK + 30, 2 * CHUNK + 30, 3 * CHUNK])
def test_outbox_refilled_after_upgrade_counts_unsent_frames(taken: int) -> None:
    """An outbox that continues another one knows how many frames are unsent, and so
    after more are queued.
    """
    first, second = StreamOutbox(1 << 30), StreamOutbox(1 << 30)
    for size in (30, CHUNK, 30, CHUNK, 30):
        put(first, message(size))
    second.refill([bytearray(chunk) for chunk in first.chunks()], first.begun, first.left())
    second.frames = first.frames
    for size in (CHUNK, 30):
        put(first, message(size))
        put(second, message(size))
    for outbox in (first, second):
        outbox.sent(taken)
    assert second.unsent == first.unsent
    assert len(take_unsent(second)) == len(take_unsent(first))


def test_outbox_drop_oldest_behind_many_kept_frames_is_fast() -> None:
    """However many kept frames lie before it, the oldest droppable frame is found at
    once.
    """

    def seconds(kept: int) -> float:
        outbox = FrameOutbox(30 * (kept + 10))
        for number in range(kept):
            outbox.put(Queued(message(30, number), kept=True))
        began = time.perf_counter()
        for number in range(300):
            assert outbox.drop_oldest(30) is not None
            outbox.put(Queued(message(30, number)))
        return time.perf_counter() - began

    assert seconds(50_000) < 20 * min(seconds(1) for _ in range(5)) + 0.05


def test_outbox_kept_and_droppable_frames_stay_in_order() -> None:
    """Both kinds are written in the order in which they were queued, whatever was
    dropped in between.
    """
    outbox = FrameOutbox(10_000)
    expected = []
    for number in range(60):
        queued = Queued(message(30, number), kept=number % 3 == 0)
        outbox.put(queued)
        expected.append(queued)
        if number % 7 == 0:
            outbox.limit = outbox.waiting
            for dropped in outbox.drop_oldest(30) or ():
                expected.remove(dropped)
    assert outbox.queue() == expected
    outbox.sent(45)
    assert outbox.queue() == expected[1:]
    copy = FrameOutbox(10_000)
    copy.refill(outbox.queue(), outbox.begun)
    assert b"".join(copy.pieces()) == b"".join(outbox.pieces())
    assert copy.waiting == outbox.waiting
    assert [queued.frame for queued in take_unsent(copy)] == [
        queued.frame for queued in expected[1:]
    ]


def test_outbox_drop_oldest_in_turns_is_bounded() -> None:
    """No more frames are dropped at once than the given limit; the outbox says when
    there is room.
    """
    outbox = outbox_with(*(Queued(message(20, number)) for number in range(5)))
    assert len(outbox.drop_oldest(60, 2) or ()) == 2
    assert not outbox.has_made_room(60)
    assert len(outbox.drop_oldest(60, 2) or ()) == 1
    assert outbox.has_made_room(60)


def test_outbox_with_many_ttl_frames_is_offered_up_to_one_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So one write looks at a limited number of them; what expires behind is found later."""
    monkeypatch.setattr(outbox_module, "_MARKS", 2)
    outbox = StreamOutbox(10_000)
    for number in range(5):
        outbox.put(Queued(message(30, number), deadline=10.0))
    outbox.append(message(30, 9))
    assert [len(piece) for piece in outbox.pieces()] == [60]
    outbox.sent(70)
    assert [len(piece) for piece in outbox.pieces()] == [50]
    assert outbox.take_expired(11.0, 10) == []
    assert [len(piece) for piece in outbox.pieces()] == [20]
    outbox.sent(20)
    assert len(outbox.take_expired(11.0, 10)) == 2
    assert b"".join(outbox.pieces()) == message(30, 9)
    assert not outbox.timed


def test_outbox_unsent_frames_keep_their_ttl() -> None:
    """Also the frame of which the system has taken a part."""
    outbox = StreamOutbox(10_000)
    outbox.append(message(30, 1))
    outbox.put(Queued(message(30, 2), deadline=7.0))
    outbox.put(Queued(memoryview(message(30, 3)), deadline=8.0))
    outbox.append(message(30, 4))
    outbox.sent(40)
    unsent = list(outbox.take_unsent())
    assert [queued.deadline for queued in unsent] == [7.0, 8.0, None]
    assert not outbox.timed
    outbox.put(Queued(message(30, 5), deadline=9.0))
    assert [queued.deadline for queued in outbox.take_unsent()] == [9.0]
