"""Bytes that wait for one connection: nothing lost, nothing twice, and the quota kept."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokerd.core import outbox as outbox_module
from brokerd.core.outbox import CHUNK, FrameOutbox, Outbox, Queued, StreamOutbox
from brokerd_client.wire.envelope import Envelope, Kind, encode
from brokerd_client.wire.framing import frame

KINDS = pytest.mark.parametrize("kind", [StreamOutbox, FrameOutbox])


def message(size: int, id: int = 0, name: str = "ann") -> bytes:
    """Return a frame of ``size`` bytes in all."""
    return frame(encode(Envelope(Kind.MESSAGE, id, name, b"x" * (size - 16 - len(name)))))


def put(outbox: Outbox, whole: bytes) -> bool:
    """Put a frame where there is room for it, as the broker does."""
    if not outbox.reserve(len(whole)):
        return False
    if isinstance(outbox, StreamOutbox):
        outbox.content += whole
        outbox.frames += 1
    else:
        outbox.put(Queued(whole))
    return True


@KINDS
def test_frames_come_out_in_order_however_they_are_taken(kind: type[Outbox]) -> None:
    """What is taken in small pieces is what was put in, and the outbox knows to the
    byte what waits.
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
def test_the_quota_is_kept(kind: type[Outbox]) -> None:
    """As much as the limit may wait, one byte more may not; what is taken makes room."""
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
def test_a_frame_longer_than_the_quota_passes_when_nothing_waits(kind: type[Outbox]) -> None:
    """A message larger than the whole queue can be delivered to somebody who reads."""
    outbox = kind(30)
    assert put(outbox, message(500))
    assert not put(outbox, message(20))
    outbox.sent(499)
    assert put(outbox, message(20))


@KINDS
def test_the_brokers_own_frames_are_always_taken(kind: type[Outbox]) -> None:
    """An answer is not refused for want of room; it counts like everything else."""
    outbox = kind(30)
    for _ in range(5):
        outbox.append(message(30))
    assert outbox.waiting == 150
    assert outbox.frames == 5
    assert outbox.size == 150
    assert not outbox.reserve(20)


def taken_back(outbox: Outbox) -> list[Queued]:
    """Return everything that the system did not take whole; how much that is was known
    before.
    """
    expected = outbox.unsent
    unsent = outbox.take_unsent()
    assert len(unsent) == expected
    given = []
    while (queued := unsent.pop()) is not None:
        given.append(queued)
    assert len(given) == expected
    assert len(unsent) == outbox.unsent == 0
    return given


@KINDS
def test_empty_outbox_is_not_stalled(kind: type[Outbox]) -> None:
    """A byte more that is taken does not end a stall; the last one does."""
    outbox = kind(100)
    outbox.append(message(30))
    outbox.stalled = True
    outbox.sent(29)
    assert outbox.stalled
    outbox.sent(1)
    assert not outbox.stalled


@KINDS
@pytest.mark.parametrize("taken", [0, 1, 29, 30, 31, 60, CHUNK, CHUNK + 60, 2 * CHUNK])
def test_what_was_not_taken_whole_is_given_back(kind: type[Outbox], taken: int) -> None:
    """Every frame of which the system does not have the last byte comes back whole,
    oldest first.
    """
    outbox = kind(1 << 30)
    frames = [message(size, number) for number, size in enumerate([30, 30, CHUNK, 30, CHUNK, 30])]
    for whole in frames:
        put(outbox, whole)
    outbox.sent(taken)
    ends = [sum(map(len, frames[: number + 1])) for number in range(len(frames))]
    expected = [whole for whole, end in zip(frames, ends, strict=True) if end > taken]
    assert [queued.frame for queued in taken_back(outbox)] == expected
    assert outbox.waiting == 0
    assert outbox.pieces() == []
    assert taken_back(outbox) == []


@KINDS
def test_one_write_gets_a_bounded_number_of_pieces(
    kind: type[Outbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system takes only so many pieces at once; the others come next."""
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
def test_any_mix_of_putting_and_taking(steps: list[int], limit: int, kind: type[Outbox]) -> None:
    """However frames are put and taken, bytes come out in order and the quota is
    exceeded by a lone frame only.
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


def test_a_stream_grows_without_being_asked_within_its_room() -> None:
    """The routing loop may write up to ``room``: never past the quota."""
    outbox = StreamOutbox(1000)
    assert outbox.room == 1000
    outbox.append(message(400))
    outbox.sent(100)
    assert outbox.room == 1100
    assert outbox.reserve(700)
    assert not outbox.reserve(701)


def test_senders_that_left_are_told_from_those_that_came_after() -> None:
    """What waited when a sender left is orphaned; what its successor sends is not, nor
    what others send.
    """
    outbox = StreamOutbox(1 << 30)
    for name in ("ann", "bob"):
        outbox.append(message(50, 1, name))
    outbox.sent(10)
    outbox.sender_left(b"ann")
    outbox.append(message(CHUNK, 2, "ann"))
    outbox.append(message(50, 3, "ann"))
    given = taken_back(outbox)
    assert [(queued.frame, queued.orphaned) for queued in given] == [
        (message(50, 1, "ann"), True),
        (message(50, 1, "bob"), False),
        (message(CHUNK, 2, "ann"), False),
        (message(50, 3, "ann"), False),
    ]


def test_nobody_is_remembered_where_nothing_waits() -> None:
    """A sender that leaves an empty outbox leaves no trace, and one whose bytes were
    taken none either.
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
    assert not taken_back(outbox)[0].orphaned


def dropping(*frames: Queued, limit: int = 100) -> FrameOutbox:
    """Return an outbox in which these wait."""
    outbox = FrameOutbox(limit)
    for queued in frames:
        outbox.put(queued)
    return outbox


def test_the_oldest_are_dropped_until_there_is_room() -> None:
    """No more is dropped than has to be."""
    first, second, third = (Queued(message(30, number)) for number in range(3))
    outbox = dropping(first, second, third)
    assert outbox.drop_oldest(40) == [first]
    assert outbox.waiting == 60
    assert outbox.drop_oldest(40) == []
    assert b"".join(outbox.pieces()) == second.frame + third.frame


def test_a_frame_that_was_begun_is_not_dropped() -> None:
    """What the system has a part of goes out whole; when nothing else is left there is
    room for anything.
    """
    first, second = Queued(message(30, 1)), Queued(message(30, 2))
    outbox = dropping(first, second)
    outbox.sent(1)
    assert outbox.drop_oldest(100) == [second]
    assert outbox.waiting == 29
    assert outbox.drop_oldest(100) == []
    assert b"".join(outbox.pieces()) == first.frame[1:]


def test_answers_are_passed_over_when_the_oldest_are_dropped() -> None:
    """A kept frame stays in its place."""
    answer, first, second = (
        Queued(message(30, 1), kept=True),
        Queued(message(30, 2)),
        Queued(message(30, 3)),
    )
    outbox = dropping(answer, first, second)
    assert outbox.drop_oldest(40) == [first]
    assert b"".join(outbox.pieces()) == answer.frame + second.frame


def test_nothing_is_dropped_in_vain() -> None:
    """Where what may be dropped would not make room, all of it stays, in order."""
    answer, first = Queued(message(90, 1), kept=True), Queued(message(20, 2))
    outbox = dropping(first, answer, limit=120)
    outbox.put(Queued(message(20, 3)))
    before = b"".join(outbox.pieces())
    assert outbox.drop_oldest(50) is None
    assert b"".join(outbox.pieces()) == before
    assert outbox.waiting == 130


@pytest.mark.parametrize("taken", [0, 1, 30, CHUNK, CHUNK + 30, 2 * CHUNK + 30, 3 * CHUNK])
def test_what_another_process_filled_is_counted_too(taken: int) -> None:
    """An outbox that goes on where another one stopped knows how many frames were not
    taken, and so after more.
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
    assert len(taken_back(second)) == len(taken_back(first))


def test_dropping_the_oldest_costs_the_same_whatever_else_waits() -> None:
    """However many frames that stay lie before it, the oldest of the others is found at
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


def test_frames_that_stay_and_frames_that_may_go_keep_their_order() -> None:
    """Both kinds come out in the order in which they were put, whatever was dropped in
    between.
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
    again = FrameOutbox(10_000)
    again.refill(outbox.queue(), outbox.begun)
    assert b"".join(again.pieces()) == b"".join(outbox.pieces())
    assert again.waiting == outbox.waiting
    assert [queued.frame for queued in taken_back(again)] == [
        queued.frame for queued in expected[1:]
    ]


def test_dropping_may_be_done_in_turns() -> None:
    """No more frames are dropped at once than asked for; the outbox says when there is
    room.
    """
    outbox = dropping(*(Queued(message(20, number)) for number in range(5)))
    assert len(outbox.drop_oldest(60, 2) or ()) == 2
    assert not outbox.has_made_room(60)
    assert len(outbox.drop_oldest(60, 2) or ()) == 1
    assert outbox.has_made_room(60)
