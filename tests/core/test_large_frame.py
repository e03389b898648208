"""Large frames in buffers of their own: received in place, and passed on without a
copy.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.fake_network import FakeNet, Peer, client, error_of

from brokerd.config.values import WhenFull
from brokerd.core.large_frame import SLACK, LargeFrame, joined
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


def hand_over(source: Peer, envelope: Envelope) -> tuple[LargeFrame, RoutingResult]:
    """Route one long frame as the network layer does; return it and what the broker
    said.
    """
    large_frame = collected(frame(encode(envelope)))
    return large_frame, again(source, large_frame)


def again(source: Peer, large_frame: LargeFrame) -> RoutingResult:
    net = source.net
    position, verdict = handle_slow_path(
        net.broker, source.session, memoryview(large_frame), SLACK, large_frame.end, net.now
    )
    assert position == (
        large_frame.end if verdict in (RoutingResult.CONSUMED, RoutingResult.CLOSE) else SLACK
    )
    net.settle()
    return verdict


def lies_in(piece: Any, large_frame: LargeFrame) -> bool:
    return isinstance(piece, memoryview) and piece.obj is large_frame


@pytest.mark.parametrize("most", [1000, 16 * 1024, 1 << 20])
@pytest.mark.parametrize("begun", [4, 200_000])
def test_a_frame_is_collected_whole(begun: int, most: int) -> None:
    """In whatever pieces it arrives, the bytes are those that were sent."""
    whole = frame(BIG)
    large_frame = collected(whole, begun, most)
    assert bytes(large_frame[SLACK:]) == whole
    assert len(large_frame) == large_frame.end


def test_memory_grows_with_what_arrives_and_not_with_what_was_announced() -> None:
    """Whoever announces 16 MiB and sends little has little kept for it; it doubles, so
    moving costs little.
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
    assert sizes[0] < 20_000
    assert len(sizes) < 13


def test_the_head_is_written_before_the_rest() -> None:
    """A rest that lies in a parcel stays where it is; any other is joined with the
    head.
    """
    large_frame = collected(frame(b"name" + BIG))
    whole = joined(b"a longer head", memoryview(large_frame)[SLACK + 8 :])
    assert lies_in(whole, large_frame)
    assert whole == b"a longer head" + BIG
    assert joined(b"head", memoryview(b"rest")) == b"headrest"


@pytest.mark.parametrize("sender", ["a", "a" * 64])
@pytest.mark.parametrize("flags", [0, Flag.RECEIPT, Flag.EXTENSION])
@pytest.mark.parametrize("kind", [Kind.MESSAGE, Kind.REQUEST])
def test_a_long_message_goes_out_in_the_buffer_it_came_in(
    kind: Kind, flags: Flag, sender: str
) -> None:
    """Whoever sends to whom, the recipient gets what it would get of a short one, and
    nothing was copied.
    """
    net = FakeNet(client(sender), client("recipient"))
    source, target = net.connect(sender), net.connect("recipient")
    target.block()
    target.message("recipient", b"before")
    extension = {"x": 1} if flags is Flag.EXTENSION else None
    large_frame, verdict = hand_over(
        source, Envelope(kind, 7, "recipient", BIG, 2, flags, extension=extension)
    )
    target.message("recipient", b"behind")
    assert verdict is RoutingResult.CONSUMED
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


def test_a_length_of_the_long_form_is_understood() -> None:
    """The prefix of 12 bytes is replaced by one of 4."""
    net = FakeNet(client("a"), client("b"))
    source, target = net.connect("a"), net.connect("b")
    body = encode(Envelope(Kind.MESSAGE, 7, "b", BIG))
    large_frame = collected(b"\xff\xff\xff\xff" + len(body).to_bytes(8, "big") + body)
    assert again(source, large_frame) is RoutingResult.CONSUMED
    (got,) = target.take()
    assert got.payload == BIG
    assert target.stream.startswith(frame_prefix(len(body)))


def test_a_long_event_is_shared_by_all_who_get_it() -> None:
    """One buffer for every subscriber, of a pool too and with drop_oldest, each of whom
    reads at its own pace.
    """
    names = ("b", "c", "pool", "drops")
    configs = (client("pool", connections=2), client("drops", when_full=WhenFull.DROP_OLDEST))
    net = FakeNet(client("a"), client("b"), client("c"), *configs)
    source, *targets = (net.connect(name) for name in ("a", *names))
    for target in targets:
        target.op("subscribe", 1, topic="t.>")
        target.take()
        target.block(1000)
    large_frame, verdict = hand_over(source, Envelope(Kind.EVENT, 7, "", BIG, topic="t.x"))
    assert verdict is RoutingResult.CONSUMED
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
def test_a_long_message_that_is_not_taken_comes_back(options: dict[str, Any], taken: int) -> None:
    """Its recipient leaves before the system took all of it: the sender hears of it,
    and what follows goes its way.
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


def test_a_long_message_moves_to_another_member_of_the_pool() -> None:
    """It is still the buffer that it came in."""
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


def test_a_long_message_waits_untouched_until_there_is_room() -> None:
    """Its sender is held; when it is handed over again it is as it came."""
    net = FakeNet(client("a"), client("b", queue=1000))
    source, target = net.connect("a"), net.connect("b")
    target.block()
    target.message("b", b"x" * 500)
    whole = frame(encode(Envelope(Kind.MESSAGE, 7, "b", BIG)))
    large_frame = collected(whole)
    assert again(source, large_frame) is RoutingResult.BLOCKED
    assert bytes(large_frame[SLACK:]) == whole
    target.read()
    assert not source.held
    assert again(source, large_frame) is RoutingResult.CONSUMED
    assert target.payloads() == [b"x" * 500, BIG]


def test_the_quota_counts_a_long_message() -> None:
    """What follows a long message finds no room, and is dropped or refused like behind
    any other.
    """
    net = FakeNet(client("a"), client("b", queue=len(BIG) + 100, when_full=WhenFull.REFUSE))
    source, target = net.connect("a"), net.connect("b")
    target.block()
    hand_over(source, Envelope(Kind.MESSAGE, 7, "b", BIG))
    source.message("b", b"x" * 100, 8)
    assert source.error() == (8, "full")
    target.read()
    assert target.payloads() == [BIG]
