"""Large frames in buffers of their own: received in place, and passed on without a
copy.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from typing import Any, cast

import pytest
from support.fake_network import FakeNet, Peer, client, error_of

from brokerd.config.values import WhenFull
from brokerd.core import large_frame as large_frame_module
from brokerd.core.large_frame import SLACK, LargeFrame, MappedFrame, SpareFrames, joined
from brokerd.core.routing_result import RoutingResult
from brokerd.core.slow_path import handle_slow_path
from brokerd_client.wire.envelope import Envelope, Flag, Kind, encode
from brokerd_client.wire.framing import frame, frame_prefix

BIG = bytes(range(256)) * 1024


def collected(whole: bytes, begun: int = 20, most: int = 50_000) -> LargeFrame:
    """Return a frame that arrived ``most`` bytes at a time."""
    large_frame = LargeFrame(whole[:begun], len(whole))
    while not large_frame.is_whole:
        position = large_frame.filled - SLACK
        with large_frame.space(most) as space:
            size = min(len(space), len(whole) - position)
            space[:size] = whole[position : position + size]
        large_frame.filled += size
    return large_frame


def begun(received: int, size: int) -> LargeFrame:
    """Return a frame of which some bytes have arrived."""
    return LargeFrame((BIG * 16)[:received], size)


#: Mapped frames exist only where the system has huge pages.
with_huge_pages = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without huge pages"
)


def mapped(spare: SpareFrames, size: int, byte: bytes = b"y") -> MappedFrame:
    """Return a whole frame in mapped memory, whose end is all one byte."""
    large_frame = begun(2 << 20, size).moved(spare)
    assert isinstance(large_frame, MappedFrame)
    while not large_frame.is_whole:
        with large_frame.space(256 * 1024) as space:
            space[:] = byte * len(space)
            large_frame.filled += len(space)
    return large_frame


def place(large_frame: MappedFrame) -> int:
    """Return the address of a frame's memory."""
    with memoryview(large_frame) as view:
        return ctypes.addressof(ctypes.c_char.from_buffer(view))


@with_huge_pages
def test_large_frame_of_megabytes_is_moved_into_mapped_memory() -> None:
    """The bytes stay, the rest is received in place, and the head is written in front."""
    spare = SpareFrames()
    large_frame = mapped(spare, 5 << 20)
    assert large_frame.moved(spare) is large_frame
    whole = joined(b"head", memoryview(large_frame)[SLACK + 10 :])
    assert isinstance(whole, memoryview)
    assert whole.obj is large_frame
    assert whole == b"head" + ((BIG * 8)[10:] + b"y" * (3 << 20))


def test_large_frame_is_moved_only_when_much_has_come_and_is_missing() -> None:
    """A client that announces much and sends little takes little memory."""
    for received, size in ((1 << 20, 64 << 20), (3 << 20, 4 << 20)):
        large_frame = begun(received, size)
        assert large_frame.moved(SpareFrames()) is large_frame


def test_large_frame_stays_where_system_maps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on in its buffer without huge pages, or beyond the limit of mappings."""

    def refused(received: LargeFrame) -> MappedFrame:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(MappedFrame, "of", refused)
    for huge_pages in (14, 0):
        monkeypatch.setattr(large_frame_module, "_HUGE_PAGES", huge_pages)
        large_frame = begun(2 << 20, 5 << 20)
        assert large_frame.moved(SpareFrames()) is large_frame


@with_huge_pages
def test_large_frame_gets_memory_of_one_that_nothing_refers_to() -> None:
    """A shorter frame in the memory of a longer one contains only its own bytes."""
    spare = SpareFrames()
    first = mapped(spare, 9 << 20, b"o")
    before = place(first)
    del first
    again = mapped(spare, (9 << 20) - 1000)
    assert place(again) == before
    assert again.end == SLACK + (9 << 20) - 1000
    whole = joined(b"head", memoryview(again)[SLACK + 10 : again.end])
    assert whole == b"head" + ((BIG * 8)[10:] + b"y" * ((7 << 20) - 1000))


@with_huge_pages
def test_large_frame_in_an_outbox_keeps_its_memory() -> None:
    """Its bytes do not change while a view of them waits, whatever arrives meanwhile."""
    spare = SpareFrames()
    waiting = memoryview(mapped(spare, 9 << 20, b"o"))[SLACK:]
    others = [mapped(spare, 9 << 20) for _ in range(3)]
    assert waiting == (BIG * 8) + b"o" * (7 << 20)
    assert len({place(other) for other in others} | {place(cast("Any", waiting.obj))}) == 4


@with_huge_pages
@pytest.mark.parametrize("size", [9 << 20, 12 << 20])
def test_large_frame_of_another_length_gets_memory_of_its_own(size: int) -> None:
    """A frame does not hold much more memory than its length. The longer memory goes."""
    spare = SpareFrames()
    mapped(spare, 10 << 20 if size > 10 << 20 else 11 << 20)
    frame = mapped(spare, size)
    assert len(frame) == SLACK + size
    assert kept(spare) == [SLACK + size]


@with_huge_pages
def test_large_frame_memory_is_kept_of_two_frames_and_a_moment_only() -> None:
    """Memory is kept while large frames follow each other, and of few of them."""
    spare = SpareFrames()
    frames = [mapped(spare, 9 << 20) for _ in range(4)]
    assert len(kept(spare)) == 2
    del frames
    spare.drop_unused()
    assert spare
    spare.drop_unused()
    assert not spare


@with_huge_pages
def test_large_frame_memory_is_kept_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame beyond the limit is freed with its last reference."""
    monkeypatch.setattr(large_frame_module, "_KEPT_BYTES", 16 << 20)
    spare = SpareFrames()
    frames = [mapped(spare, 9 << 20) for _ in range(2)]
    assert len(frames) == 2
    assert kept(spare) == [SLACK + (9 << 20)]


def kept(spare: SpareFrames) -> list[int]:
    """Return the lengths of the frames whose memory is kept."""
    return [len(frame) for frame in spare._kept]


def hand_over(source: Peer, envelope: Envelope) -> tuple[LargeFrame, RoutingResult]:
    """Route one large frame as the network layer does; return it and the routing
    result.
    """
    large_frame = collected(frame(encode(envelope)))
    return large_frame, route(source, large_frame)


def route(source: Peer, large_frame: LargeFrame) -> RoutingResult:
    net = source.net
    position, result = handle_slow_path(
        net.broker, source.session, memoryview(large_frame), SLACK, large_frame.end, net.now
    )
    assert position == (
        large_frame.end if result in (RoutingResult.CONSUMED, RoutingResult.CLOSE) else SLACK
    )
    net.settle()
    return result


def lies_in(piece: Any, large_frame: LargeFrame) -> bool:
    return isinstance(piece, memoryview) and piece.obj is large_frame


@pytest.mark.parametrize("most", [1000, 16 * 1024, 1 << 20])
@pytest.mark.parametrize("begun", [4, 200_000])
def test_large_frame_received_in_pieces_is_whole(begun: int, most: int) -> None:
    """Whatever the size of the pieces, the bytes are those that were sent."""
    whole = frame(BIG)
    large_frame = collected(whole, begun, most)
    assert bytes(large_frame[SLACK:]) == whole
    assert len(large_frame) == large_frame.end


def test_large_frame_memory_grows_with_received_bytes() -> None:
    """A client that announces 16 MiB and sends little takes little memory. A short buffer
    doubles, so that moving it costs little. A long one grows by as much as takes no time.
    """
    large_frame = LargeFrame(b"1234", 16 << 20)
    sizes = []
    while not large_frame.is_whole:
        with large_frame.space(256 * 1024) as space:
            assert 0 < len(space) <= 256 * 1024
            large_frame.filled += len(space)
        if len(large_frame) not in sizes:
            sizes.append(len(large_frame))
        assert len(large_frame) <= 2 * large_frame.filled
        assert len(large_frame) <= large_frame.filled + (4 << 20)
    assert sizes[0] < 20_000
    assert len(sizes) < 13


def test_large_frame_head_is_written_before_remainder() -> None:
    """The remainder of a large frame stays where it is; any other one is joined with
    the head.
    """
    large_frame = collected(frame(b"name" + BIG))
    whole = joined(b"a longer head", memoryview(large_frame)[SLACK + 8 :])
    assert lies_in(whole, large_frame)
    assert whole == b"a longer head" + BIG
    assert joined(b"head", memoryview(b"rest")) == b"headrest"


@pytest.mark.parametrize("sender", ["a", "a" * 64])
@pytest.mark.parametrize("flags", [0, Flag.RECEIPT, Flag.EXTENSION])
@pytest.mark.parametrize("kind", [Kind.MESSAGE, Kind.REQUEST])
def test_large_frame_is_passed_on_without_copy(kind: Kind, flags: Flag, sender: str) -> None:
    """The recipient gets the same as of a short message, and nothing was copied."""
    net = FakeNet(client(sender), client("recipient"))
    source, target = net.connect(sender), net.connect("recipient")
    target.block()
    target.message("recipient", b"before")
    extension = {"x": 1} if flags is Flag.EXTENSION else None
    large_frame, result = hand_over(
        source, Envelope(kind, 7, "recipient", BIG, 2, flags, extension=extension)
    )
    target.message("recipient", b"behind")
    assert result is RoutingResult.CONSUMED
    assert [lies_in(piece, large_frame) for piece in target.session.outbox.pieces()] == [
        False,
        True,
        False,
    ]
    target.read()
    assert target.take() == [
        Envelope(Kind.MESSAGE, 0, "recipient", b"before"),
        Envelope(kind, 7, sender, BIG, 2, flags & ~Flag.RECEIPT, extension=extension),
        Envelope(Kind.MESSAGE, 0, "recipient", b"behind"),
    ]
    assert [answer.kind for answer in source.take()] == (
        [Kind.RECEIPT] if flags is Flag.RECEIPT else []
    )
    assert source.session.messages_in == 1
    assert target.session.messages_out == 3


def test_large_frame_with_12_byte_length_is_understood() -> None:
    """The prefix of 12 bytes is replaced by one of 4."""
    net = FakeNet(client("a"), client("b"))
    source, target = net.connect("a"), net.connect("b")
    body = encode(Envelope(Kind.MESSAGE, 7, "b", BIG))
    large_frame = collected(b"\xff\xff\xff\xff" + len(body).to_bytes(8, "big") + body)
    assert route(source, large_frame) is RoutingResult.CONSUMED
    (got,) = target.take()
    assert got.payload == BIG
    assert target.stream.startswith(frame_prefix(len(body)))


def test_large_frame_event_is_shared_by_subscribers() -> None:
    """All subscribers share one buffer, also in a pool and with drop_oldest; each reads
    at its own speed.
    """
    names = ("b", "c", "pool", "drops")
    configs = (client("pool", connections=2), client("drops", when_full=WhenFull.DROP_OLDEST))
    net = FakeNet(client("a"), client("b"), client("c"), *configs)
    source, *targets = (net.connect(name) for name in ("a", *names))
    for target in targets:
        target.op("subscribe", 1, topic="t.>")
        target.take()
        target.block(1000)
    large_frame, result = hand_over(source, Envelope(Kind.EVENT, 7, "", BIG, topic="t.x"))
    assert result is RoutingResult.CONSUMED
    for target in targets:
        (piece,) = target.session.outbox.pieces()
        assert lies_in(piece, large_frame)
        assert target.session.outbox.waiting == len(large_frame) - SLACK - 1000 + len("a")
    for target in targets:
        target.read(100_000)
        target.read()
        assert target.take() == [Envelope(Kind.EVENT, 7, "a", BIG, topic="t.x")]


@pytest.mark.parametrize("taken", [0, 5, 100_000])
@pytest.mark.parametrize("options", [{}, {"connections": 2}])
def test_large_frame_recipient_disconnected_is_reported(
    options: dict[str, Any], taken: int
) -> None:
    """Its recipient leaves before all of it was written: the sender is told, of the
    next message too.
    """
    net = FakeNet(client("a"), client("b", **options))
    source, target = net.connect("a"), net.connect("b")
    target.block(taken)
    hand_over(source, Envelope(Kind.MESSAGE, 7, "b", BIG))
    source.message("b", b"behind", 8)
    target.leave()
    assert [(answer.id, error_of(answer)) for answer in source.take()] == [
        (7, "offline"),
        (8, "offline"),
    ]


def test_large_frame_moves_to_another_pool_member() -> None:
    """It is still in the buffer that it was received in."""
    net = FakeNet(client("a"), client("pool", connections=2))
    source, first, second = net.connect("a"), net.connect("pool"), net.connect("pool")
    first.block()
    second.block()
    large_frame, _ = hand_over(source, Envelope(Kind.MESSAGE, 7, "pool", BIG))
    (holder,) = [member for member in (first, second) if member.session.outbox.waiting]
    (other,) = [member for member in (first, second) if member is not holder]
    holder.leave()
    assert [lies_in(piece, large_frame) for piece in other.session.outbox.pieces()] == [True]
    other.read()
    assert other.payloads() == [BIG]


def test_large_frame_of_held_sender_is_unchanged() -> None:
    """Its sender is held; when the frame is handed over again, it is as it was
    received.
    """
    net = FakeNet(client("a"), client("b", queue=1000))
    source, target = net.connect("a"), net.connect("b")
    target.block()
    target.message("b", b"x" * 500)
    whole = frame(encode(Envelope(Kind.MESSAGE, 7, "b", BIG)))
    large_frame = collected(whole)
    assert route(source, large_frame) is RoutingResult.BLOCKED
    assert bytes(large_frame[SLACK:]) == whole
    target.read()
    assert not source.held
    assert route(source, large_frame) is RoutingResult.CONSUMED
    assert target.payloads() == [b"x" * 500, BIG]


def test_large_frame_counts_for_queue_quota() -> None:
    """The next message finds no room behind a large one, and is refused as behind any
    other.
    """
    net = FakeNet(client("a"), client("b", queue=len(BIG) + 100, when_full=WhenFull.REFUSE))
    source, target = net.connect("a"), net.connect("b")
    target.block()
    hand_over(source, Envelope(Kind.MESSAGE, 7, "b", BIG))
    source.message("b", b"x" * 100, 8)
    assert source.error() == (8, "full")
    target.read()
    assert target.payloads() == [BIG]
