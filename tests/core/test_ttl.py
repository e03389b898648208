"""Time to live: it counts from a frame's arrival at the broker, and bounds how long the
frame may wait.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.fake_network import FakeNet, Peer, client, error_of

from brokerd.config.values import WhenFull
from brokerd.core import broker as broker_module
from brokerd.core import outbox as outbox_module
from brokerd.core.deadlines import Deadlines
from brokerd.core.outbox import FrameOutbox, StreamOutbox
from brokerd_client.wire.envelope import Envelope, Kind

#: Every kind of queue: a stream, a pool's, and one that drops its oldest.
QUEUES = pytest.mark.parametrize(
    "changes",
    [{}, {"connections": 2}, {"when_full": WhenFull.DROP_OLDEST}],
    ids=["stream", "pool", "drop_oldest"],
)
#: Whether a new process takes over in between.
UPGRADED = pytest.mark.parametrize("upgraded", [False, True])


def slow_pair(**changes: Any) -> tuple[FakeNet, Peer, Peer]:
    """Return a net with ann and bob. bob has read a part of the one message that waits
    for it.
    """
    net = FakeNet(client("ann"), client("bob", **changes))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.block(5)
    ann.message("bob", b"first", 1)
    return net, ann, bob


@QUEUES
@UPGRADED
def test_ttl_over_message_is_not_written(changes: dict[str, Any], upgraded: bool) -> None:
    """Its sender gets `expired`; messages before and behind it arrive, in order."""
    net, ann, bob = slow_pair(**changes)
    for number in range(2, 8):
        ttl = {3: 5, 4: 5, 6: 60}.get(number)
        ann.message("bob", b"%d" % number, number, extension=None if ttl is None else {"ttl": ttl})
    net.advance(3)
    if upgraded:
        net.hand_over()
    net.advance(3)
    bob.read()
    assert [each.id for each in bob.take()] == [1, 2, 5, 6, 7]
    assert [(each.id, error_of(each)) for each in ann.take()] == [(3, "expired"), (4, "expired")]
    assert not bob.session.outbox.waiting
    assert not bob.session.outbox.timed


@QUEUES
def test_ttl_not_over_message_is_written_after_wait(changes: dict[str, Any]) -> None:
    """A wait shorter than the ttl changes nothing."""
    net, ann, bob = slow_pair(**changes)
    ann.message("bob", b"2", 2, extension={"ttl": 5})
    net.advance(4.9)
    bob.read()
    assert [each.id for each in bob.take()] == [1, 2]
    assert ann.take() == []


@QUEUES
def test_ttl_over_partly_written_message_is_completed(changes: dict[str, Any]) -> None:
    """A frame cannot be taken back once a part of it has been written."""
    net, ann, bob = slow_pair(**changes)
    ann.message("bob", b"2", 2, extension={"ttl": 5})
    bob.read(25)
    net.advance(10)
    bob.read()
    assert [each.id for each in bob.take()] == [1, 2]
    assert ann.take() == []


@QUEUES
@UPGRADED
def test_ttl_over_request_without_answer_is_expired(
    changes: dict[str, Any], upgraded: bool
) -> None:
    """The requester is told at that time, whether it was delivered or not. A waiting
    request is not delivered, and an answer is denied.
    """
    net, ann, bob = slow_pair(**changes)
    bob.read()
    ann.request("bob", b"delivered", 2, extension={"ttl": 5})
    bob.take()
    bob.block()
    ann.request("bob", b"waits", 3, extension={"ttl": 6})
    net.advance(4)
    if upgraded:
        net.hand_over()
    assert ann.take() == []
    net.advance(1.1)
    assert ann.error() == (2, "expired")
    net.advance(1)
    assert ann.error() == (3, "expired")
    bob.reply("ann", b"late", 2)
    bob.read()
    assert bob.error() == (2, "denied")
    assert ann.take() == []
    assert not net.leftovers().get("deadlines")


@QUEUES
@pytest.mark.parametrize("end", ["leave", "drop"])
def test_ttl_over_request_still_waiting_has_one_outcome(changes: dict[str, Any], end: str) -> None:
    """Its frame is discarded when the recipient leaves, or when it makes room for a
    newer one.
    """
    net, ann, bob = slow_pair(queue=200, **changes)
    ann.request("bob", b"waits", 3, extension={"ttl": 6})
    net.advance(7)
    assert ann.error() == (3, "expired")
    if end == "drop":
        for number in range(10, 20):
            ann.message("bob", b"x" * 100, number)
        net.advance(31)
    elif "connections" in changes:
        net.connect("bob")
    bob.leave()
    assert 3 not in [each.id for each in ann.take()]


def test_ttl_of_request_moved_to_pool_member_continues() -> None:
    """The time it has waited counts, whichever member has it."""
    net = FakeNet(client("ann"), client("pool", connections=2))
    ann, one = net.connect("ann"), net.connect("pool")
    one.block()
    ann.request("pool", b"?", 1, extension={"ttl": 10})
    two = net.connect("pool")
    net.advance(6)
    one.leave()
    assert [each.id for each in two.take()] == [1]
    net.advance(4)
    assert ann.error() == (1, "expired")


def test_ttl_deadline_ends_with_answer() -> None:
    """The deadline leaves no entry, and the id may be used again."""
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    for _ in range(3):
        ann.request("bob", b"?", 1, extension={"ttl": 10})
        bob.reply("ann", b"!", 1)
        net.advance(6)
    assert ann.payloads() == [b"!"] * 3
    assert not net.broker.requests.deadlines
    ann.request("bob", b"?", 1, extension={"ttl": 10})
    ann.leave()
    assert not net.broker.requests.deadlines
    assert net.broker.next_deadline is None


@pytest.mark.parametrize("kind", [Kind.REPLY, Kind.ERROR])
@QUEUES
def test_ttl_over_answer_is_reported_to_both_sides(kind: Kind, changes: dict[str, Any]) -> None:
    """The requester gets an ERROR instead of the answer."""
    net = FakeNet(client("ann", **changes), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.request("bob", b"?", 9)
    bob.take()
    ann.block(1)
    bob.message("ann", b"first", 1)
    bob.send(Envelope(kind, 9, ann.address, b"{}", extension={"ttl": 5}))
    net.advance(6)
    ann.read()
    first, error = ann.take()
    assert (first.payload, error.id, error_of(error), json.loads(error.payload)["name"]) == (
        b"first",
        9,
        "expired",
        "bob",
    )
    expected = [(9, "expired")] if kind is Kind.REPLY else []
    assert [(each.id, error_of(each)) for each in bob.take()] == expected


@QUEUES
def test_ttl_over_event_is_dropped_and_counted(changes: dict[str, Any]) -> None:
    """Its publisher is not told of each subscriber that missed it; other subscribers
    received it.
    """
    net = FakeNet(client("ann"), client("bob", **changes), client("cid"))
    ann, bob, cid = (net.connect(name) for name in ("ann", "bob", "cid"))
    for each in (bob, cid):
        each.ask("subscribe", topic="t")
    bob.block(1)
    ann.message("bob", b"first", 1)
    ann.publish("t", b"event", 2, extension={"ttl": 5})
    net.advance(6)
    bob.read()
    assert [each.id for each in bob.take()] == [1]
    assert cid.payloads() == [b"event"]
    assert ann.take() == []
    assert net.broker.replies.dropped == 1


def test_ttl_over_message_of_held_sender_is_refused() -> None:
    """Its sender is no longer held, and the recipient does not count as one that never
    reads.
    """
    net = FakeNet(client("ann"), client("bob", queue=60))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.block()
    ann.message("bob", b"x" * 40, 1)
    ann.message("bob", b"x" * 40, 2, extension={"ttl": 5})
    assert ann.held
    net.advance(5)
    assert ann.error() == (2, "expired")
    ann.message("bob", b"x" * 40, 3)
    assert ann.held
    net.advance(30)
    assert ann.error() == (3, "full")


@QUEUES
def test_ttl_over_many_messages_are_reported_in_turns(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call reports a limited number of them, in the queue and among the requests."""
    monkeypatch.setattr(broker_module, "_EXPIRED", 3)
    net, ann, bob = slow_pair(**changes)
    for number in range(2, 22):
        ann.message("bob", b"", number, extension={"ttl": 5})
        ann.request("bob", b"", 100 + number, extension={"ttl": 5})
    net.now += 6
    refused = net.broker.replies.refused
    net.broker.tick(net.now)
    assert refused["expired"] == 3
    net.broker.expire(bob.session, net.now)
    bob.session.outbox.sent(bob.session.outbox.waiting and len(bob.session.outbox.pieces()[0]))
    net.broker.expire(bob.session, net.now)
    assert 3 < refused["expired"] <= 6
    for _ in range(20):
        net.advance(0)
    bob.read()
    net.settle()
    assert sorted(each.id for each in ann.take()) == [*range(2, 22), *range(102, 122)]
    assert not bob.session.outbox.waiting


@pytest.mark.parametrize("kind", [StreamOutbox, FrameOutbox])
def test_outbox_without_ttl_examines_no_deadline(kind: type[StreamOutbox | FrameOutbox]) -> None:
    """Messages without a ttl cost one look at a number that is 0."""
    net = FakeNet(
        client("ann"),
        client("bob", when_full=WhenFull.DROP_OLDEST if kind is FrameOutbox else WhenFull.WAIT),
    )
    ann, bob = net.connect("ann"), net.connect("bob")
    assert isinstance(bob.session.outbox, kind)
    bob.block()
    for number in range(10):
        ann.message("bob", b"x", number)
    assert bob.session.outbox.timed == 0
    assert bob.session.outbox.take_expired(1e12, 10) == []


def test_deadlines_are_due_in_order_and_never_early() -> None:
    """A key is due up to one slot late; a discarded key is not due."""
    deadlines = Deadlines()
    for number in range(100):
        deadlines.add(10 + number / 10, f"k{number}")
        deadlines.add(10 + number / 10, "gone")
        deadlines.discard(10 + number / 10, "gone")
    deadlines.discard(5.0, "never there")
    assert deadlines.due(9.999, 10) == []
    keys = deadlines.due(12.5, 5)
    keys += deadlines.due(12.5, 1000)
    assert keys == [f"k{number}" for number in range(26)]
    assert deadlines.next is not None
    assert 12.6 <= deadlines.next <= 12.64
    for number in range(26, 100):
        deadlines.discard(10 + number / 10, f"k{number}")
    assert not deadlines
    assert deadlines.next is None
    assert deadlines.due(1e9, 10) == []


def test_deadlines_discarded_take_no_memory() -> None:
    """However many requests are answered in time, memory does not grow until their
    deadlines.
    """
    deadlines = Deadlines()
    for number in range(10_000):
        deadlines.add(1000.0 + number, number)
        deadlines.discard(1000.0 + number, number)
    assert len(deadlines._heap) < 100


def test_ttl_of_frame_being_reported_continues_after_upgrade() -> None:
    """The frame moves to another member in the new process, and is not written when its
    ttl is over.
    """
    net = FakeNet(client("ann"), client("pool", connections=2))
    ann, one = net.connect("ann"), net.connect("pool")
    one.block()
    ann.request("pool", b"?", 1, extension={"ttl": 10})
    ann.message("pool", b"!", 2, extension={"ttl": 10})
    two = net.connect("pool")
    two.block()
    net._settling = True
    net.peers.remove(one)
    net.broker.detach(one.session, net.now)
    net.write_touched()
    net.hand_over()
    net._settling = False
    net.settle()
    assert len(two.session.outbox.take_expired(net.now, 10)) == 0
    net.advance(11)
    assert ann.error() == (1, "expired")
    two.read()
    assert two.take() == []
    assert ann.error() == (2, "expired")


def test_ttl_of_frame_behind_many_chunks_holds_when_its_turn_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the chunks of one write are searched for expired frames."""
    monkeypatch.setattr(outbox_module, "_PIECES", 2)
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.block()
    for number in range(5):
        ann.message("bob", b"%d" % number * 70_000)
    ann.message("bob", b"expires", 7, extension={"ttl": 5})
    ann.message("bob", b"last")
    net.advance(6)
    bob.read()
    assert [payload[:4] for payload in bob.payloads()] == [
        *(b"%d" % number * 4 for number in range(5)),
        b"last",
    ]
    assert ann.error() == (7, "expired")
