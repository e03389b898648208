"""Outcomes: every message has exactly one, also in the smallest cases that once failed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.fake_network import FakeNet, client, error_of

from brokerd.config.values import RateConfig, WhenFull
from brokerd.core import delivery
from brokerd.core import held_senders as held_senders_module
from brokerd.core.broker import CoreLimits
from brokerd.core.replies import OUTCOME_RESERVE
from brokerd_client.wire.envelope import BROKER, Envelope, Kind


def test_message_after_held_one_is_judged_afresh() -> None:
    """A message that was held and then passed has no effect on how the next one is
    judged.
    """
    net = FakeNet(client("ann"), client("bob", queue=100))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.message("bob", b"the route is cached from here on")
    bob.take()
    bob.block()
    for _ in range(3):
        ann.message("bob", b"x" * 40)
    assert ann.held
    net.advance(25)
    bob.read()
    assert not ann.held

    ann.message("bob", b"in time", 7, extension={"ttl": 10})

    assert ann.take() == []
    assert bob.payloads()[-1] == b"in time"


@pytest.mark.parametrize("when_full", [WhenFull.WAIT, WhenFull.DROP_OLDEST])
def test_session_reconnected_gets_no_errors_of_its_predecessor(
    when_full: WhenFull,
) -> None:
    """A connection is told of its own messages only, though an earlier one with its
    name used the same ids.
    """
    net = FakeNet(client("ann"), client("bob", when_full=when_full))
    first, bob = net.connect("ann"), net.connect("bob")
    bob.block(5)
    first.message("bob", b"from the first", 1)
    first.request("bob", b"from the first", 2)
    first.leave()
    second = net.connect("ann")
    second.message("bob", b"from the second", 1)
    second.request("bob", b"from the second", 2)

    bob.leave()

    assert [(each.id, error_of(each)) for each in second.take()] == [(1, "offline"), (2, "offline")]
    assert net.broker.replies.dropped == 2


def test_session_reconnected_gets_errors_of_its_own_messages() -> None:
    """The bytes of a former sender are told from its successor's by their position,
    however many bytes have been written since.
    """
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.block()
    ann.message("bob", b"x" * 200_000)
    ann.leave()
    second = net.connect("ann")
    second.message("bob", b"y" * 1000, 3)
    bob.read(200_100)
    second.message("bob", b"z" * 1000, 4)
    bob.leave()
    assert [each.id for each in second.take()] == [3, 4]


def test_drop_oldest_never_drops_answers() -> None:
    """Answers to a client's own messages are not dropped for newer messages: they are
    its outcomes.
    """
    net = FakeNet(client("ann", when_full=WhenFull.DROP_OLDEST, queue=500), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.request("bob", b"?", 5)
    ann.block()
    bob.reply("ann", b"!", 5)
    ann.message("bob", b"", 6, receipt=True)
    ann.message("nobody", b"", 7)
    for number in range(50):
        bob.message("ann", b"%2d" % number * 10)
    ann.read()

    got = ann.take()

    assert [(each.kind, each.id) for each in got[:3]] == [
        (Kind.REPLY, 5),
        (Kind.RECEIPT, 6),
        (Kind.ERROR, 7),
    ]
    assert got[-1].payload == b"49" * 10


def test_drop_oldest_queue_full_of_answers_refuses_message() -> None:
    """A message that finds no room is refused if nothing may be dropped; then nothing
    is dropped for it.
    """
    net = FakeNet(client("ann", when_full=WhenFull.DROP_OLDEST, queue=150), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.block()
    ann.message("nobody", b"", 1)
    bob.message("ann", b"small", 2)
    bob.message("ann", b"x" * 140, 3, receipt=True)
    assert bob.error() == (3, "full")
    ann.read()
    assert [each.id for each in ann.take()] == [1, 2]


def test_reply_refused_as_full_ends_request() -> None:
    """The requester receives the ERROR in its own queue, and another answer comes too
    late.
    """
    net = FakeNet(client("ann", when_full=WhenFull.REFUSE, queue=60), client("bob", send_to=[]))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.request("bob", b"?", 9)
    ann.block(1)
    bob.reply("ann", b"x" * 10, 9)
    ann.request("bob", b"?", 10)
    bob.take()
    bob.reply("ann", b"y" * 30, 10)
    assert bob.error() == (10, "full")
    ann.read()
    bob.reply("ann", b"again", 10)
    assert bob.error() == (10, "denied")
    got = ann.take()
    assert [got[0].payload, error_of(got[1])] == [b"x" * 10, "full"]
    assert not ann.session.outgoing_requests
    assert not bob.session.incoming_requests


@pytest.mark.parametrize("kind", [Kind.REPLY, Kind.ERROR])
@pytest.mark.parametrize("code", ["too_large", "rate_limited", "expired", "unsupported"])
@pytest.mark.parametrize("connections", [1, 2])
def test_answer_refused_is_reported_to_requester_at_once(
    kind: Kind, code: str, connections: int
) -> None:
    """The requester gets the refusal's code with the id of its request and the
    responder's name. The request is over.
    """
    rate = RateConfig(1 if code == "rate_limited" else None, None)
    bob_config = client("bob", send_to=[], rate=rate, connections=connections)
    net = FakeNet(client("ann"), bob_config, limits=CoreLimits(max_message=100))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.request("bob", b"?", 9)
    bob.take()
    extension = {"expired": {"ttl": 0}, "unsupported": {"ttl": "5"}}.get(code)
    if code == "rate_limited":
        bob.message("nobody", b"", 1)
        bob.take()
    bob.send(
        Envelope(kind, 9, "ann", b"x" * (101 if code == "too_large" else 1), extension=extension)
    )

    (error,) = ann.take()
    assert (error.kind, error.id, error.name, error_of(error)) == (Kind.ERROR, 9, BROKER, code)
    content = json.loads(error.payload)
    assert content["name"] == bob.address
    assert bob.address in content["message"]
    # An ERROR that can't be delivered is not answered by another, but for its size,
    # which is judged before its kind.
    expected = [] if kind is Kind.ERROR and code != "too_large" else [(9, code)]
    assert [(each.id, error_of(each)) for each in bob.take()] == expected
    assert not ann.session.outgoing_requests
    assert not bob.session.incoming_requests


def test_drop_oldest_for_long_message_works_in_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A queue of short messages is dropped a few at a time, and other senders have
    their turn in between.
    """
    monkeypatch.setattr(delivery, "_DROPPED", 3)
    net = FakeNet(client("ann"), client("bob", when_full=WhenFull.DROP_OLDEST, queue=2000))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.block()
    for number in range(40):
        ann.message("bob", b"x" * 31, number)
    dropped, counts = net.broker.replies.dropped, []
    feed = net.feed

    def counted(*arguments: Any) -> Any:
        before = net.broker.replies.dropped
        try:
            return feed(*arguments)
        finally:
            counts.append(net.broker.replies.dropped - before)

    net.feed = counted
    ann.message("bob", b"y" * 1900, 99)
    assert max(counts) == 3
    assert net.broker.replies.dropped - dropped > 30
    bob.read()
    assert [each.id for each in bob.take()][-1] == 99


def test_drop_oldest_with_unrequested_replies_still_makes_room() -> None:
    """A REPLY without a request takes no room, so that a newer message still replaces
    an older one.
    """
    net = FakeNet(client("ann"), client("bob", when_full=WhenFull.DROP_OLDEST, queue=300))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.block()
    for number in range(50):
        ann.reply("bob", b"", number)
        ann.message("bob", b"x" * 50, 100 + number)
    assert {error_of(each) for each in ann.take()} == {"denied"}
    bob.read()
    assert [each.id for each in bob.take()][-1] == 149


def test_sender_of_oversized_frames_not_reading_errors_is_held() -> None:
    """Errors about oversized frames count like any others: nothing is read from the
    sender until it reads.
    """
    net = FakeNet(client("ann", queue=1000), limits=CoreLimits(max_message=1))
    ann = net.connect("ann")
    ann.block()
    while not ann.held:
        ann.message("ann", b"xx", 1)
        assert ann.session.outbox.waiting < 1000 + OUTCOME_RESERVE + 500
    ann.message("ann", b"xx", 2)
    ann.message("ann", b"", 3)
    ann.read()
    assert not ann.held
    assert [each.id for each in ann.take()][-3:] == [1, 2, 3]


def test_sender_held_longest_is_released_first() -> None:
    """New room goes to the sender whose message has waited longest, not to the sender
    that was held first.
    """
    net = FakeNet(client("ann"), client("cid"), client("bob", queue=100))
    ann, cid, bob = net.connect("ann"), net.connect("cid"), net.connect("bob")
    bob.block()
    ann.message("bob", b"1" * 70)
    net.advance(1)
    ann.message("bob", b"2" * 70)
    net.advance(1)
    cid.message("bob", b"c" * 70)
    ann.message("bob", b"3" * 70)
    assert ann.held
    assert cid.held
    net.advance(1)
    bob.read(89)
    bob.read(89)
    bob.read(89)
    assert [payload[:1] for payload in bob.payloads()] == [b"1", b"2", b"c"]


def test_sender_held_for_pool_is_released_when_any_member_reads() -> None:
    """A sender held because a pool is full goes on as soon as one member reads, though
    another still does not.
    """
    net = FakeNet(client("ann"), client("pool", connections=2, queue=100))
    ann, one, two = net.connect("ann"), net.connect("pool"), net.connect("pool")
    one.block()
    two.block()
    for _ in range(5):
        ann.message("pool", b"x" * 40)
    assert ann.held
    dead, alive = (one, two) if ann.session.held_by is one.session else (two, one)
    alive.read()
    assert not ann.held
    assert len(alive.take()) == 4
    assert not dead.got


def test_sender_held_for_pool_is_released_when_member_joins() -> None:
    """A connection that joins a full pool receives the message that waits for room."""
    net = FakeNet(client("ann"), client("pool", connections=2, queue=50))
    ann, one = net.connect("ann"), net.connect("pool")
    one.block()
    for _ in range(2):
        ann.message("pool", b"x" * 20)
    assert ann.held
    two = net.connect("pool")
    assert not ann.held
    assert len(two.take()) == 1


def test_event_groups_of_equal_size_take_turns() -> None:
    """Members of two groups of equal size each get every other event."""
    net = FakeNet(client("ann"), client("pool", connections=4))
    ann = net.connect("ann")
    members = [net.connect("pool") for _ in range(4)]
    for index, member in enumerate(members):
        member.ask("subscribe", topic="jobs", group="one" if index < 2 else "two")
    for _ in range(4):
        ann.publish("jobs")
    assert [len(member.take()) for member in members] == [2, 2, 2, 2]


def test_presence_in_group_goes_to_permitted_member() -> None:
    """A presence event goes to a member of the group that may see the client, not to
    one that may not.
    """
    net = FakeNet(client("ann"), client("cid", send_to=["ann"]), client("bob"))
    cid, ann = net.connect("cid"), net.connect("ann")
    for each in (cid, ann):
        each.ask("subscribe", topic="$broker.>", group="watch")
    for _ in range(4):
        net.connect("bob").leave()
    assert len(ann.take()) == 8
    assert not cid.take()


def test_event_group_member_with_room_is_preferred() -> None:
    """An event goes to the member that has room for it, though one without room has
    fewer bytes waiting.
    """
    small, large = client("small", queue=100), client("large")
    net = FakeNet(client("ann"), small, large)
    ann, small_peer, large_peer = net.connect("ann"), net.connect("small"), net.connect("large")
    for each in (small_peer, large_peer):
        each.ask("subscribe", topic="jobs", group="g")
        each.block()
    ann.message("small", b"x" * 50)
    ann.message("large", b"x" * 500)
    ann.publish("jobs", b"y" * 50)
    assert not ann.held
    large_peer.read()
    assert len(large_peer.take()) == 2


def test_queue_made_smaller_by_reload_applies_at_once() -> None:
    """A quota made smaller by a reload applies to the next message."""
    net = FakeNet(client("ann"), client("bob", queue=100_000, when_full=WhenFull.REFUSE))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.block()
    ann.message("bob", b"x" * 40, 1)
    ann.message("bob", b"x" * 40, 2)
    smaller = {"ann": client("ann"), "bob": client("bob", queue=150, when_full=WhenFull.REFUSE)}
    net.broker.reconfigure(smaller, net.broker.status.limits, net.now)
    ann.message("bob", b"", 3)
    ann.message("bob", b"x" * 40, 4)
    assert ann.error() == (4, "full")


def test_receipt_of_request_to_broker_is_sent() -> None:
    """Every frame with the flag RECEIPT gets one, and an operation is no exception."""
    net = FakeNet(client("ann"))
    ann = net.connect("ann")
    ann.request("$broker", b'{"op": "ping"}', 3, receipt=True)
    ann.request("$broker", b"no operation", 4, receipt=True)
    assert [(each.kind, each.id) for each in ann.take()] == [
        (Kind.RECEIPT, 3),
        (Kind.REPLY, 3),
        (Kind.RECEIPT, 4),
        (Kind.ERROR, 4),
    ]


def test_request_ended_by_limit_keeps_same_id_of_other_session() -> None:
    """A client removed and configured again may have two connections for a moment; each
    counts its own requests.
    """
    net = FakeNet(client("ann", requests=1), client("bob"))
    bob, older = net.connect("bob"), net.connect("ann")
    older.request("bob", b"first", 7)
    net.broker.reconfigure({"bob": client("bob")}, net.broker.status.limits, net.now)
    net.broker.reconfigure(
        {"ann": client("ann"), "bob": client("bob")}, net.broker.status.limits, net.now
    )
    newer = net.connect("ann")
    newer.request("bob", b"second", 7)

    older.request("bob", b"third", 8)

    assert older.error() == (7, "expired")
    bob.reply("ann", b"answer", 7)
    assert newer.payloads() == [b"answer"]


def test_request_of_former_session_ends_without_effect_on_new_one() -> None:
    """A client removed and configured again may have two connections for a moment. The
    end of the older one ends its own requests only.
    """
    net = FakeNet(client("ann"), client("bob"))
    older, bob = net.connect("ann"), net.connect("bob")
    older.request("bob", b"?", 1)
    (request,) = bob.take()
    net.broker.reconfigure({"bob": client("bob")}, net.broker.status.limits, net.now)
    net.broker.reconfigure(
        {"ann": client("ann"), "bob": client("bob")}, net.broker.status.limits, net.now
    )
    newer = net.connect("ann")
    newer.request("bob", b"?", 1)
    older.leave()
    bob.reply(request.name, b"!", 1)
    assert newer.payloads() == [b"!"]
    assert not bob.session.incoming_requests
    assert not newer.session.outgoing_requests


@pytest.mark.parametrize("end", ["read", "leave", "timeout"])
def test_sender_held_among_many_is_released_in_turns(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn releases a few senders, those that have waited longest first; every
    message has one outcome.
    """
    monkeypatch.setattr(held_senders_module, "_RELEASED", 3)
    names = [f"s{number:02}" for number in range(20)]
    net = FakeNet(*map(client, names), client("bob", queue=2000))
    bob = net.connect("bob")
    senders = [net.connect(name) for name in names]
    bob.block()
    senders[0].message("bob", b"x" * 1900)
    for number, sender in enumerate(senders):
        sender.message("bob", b"x" * 100, number)
        net.advance(0.1)
    assert all(sender.held for sender in senders)
    net._settling = True
    if end == "read":
        bob.read()
    elif end == "leave":
        net.peers.remove(bob)
        net.broker.detach(bob.session, net.now)
    else:
        net.now += 40
        net.broker.tick(net.now)
    assert len(net.broker.held.released) == 3
    net._settling = False
    for _ in range(20):
        net.advance(0)
    assert not any(sender.held for sender in senders)
    if end == "read":
        assert [each.id for each in bob.take()] == [0, *range(20)]
    else:
        codes = {error_of(each) for sender in senders for each in sender.take()}
        assert codes == {"offline" if end == "leave" else "full"}
    assert not net.broker.held.deadlines


def test_request_ended_by_limit_is_reported_once() -> None:
    """Its frame waits for a member that leaves before it has read it."""
    net = FakeNet(client("ann", requests=1), client("pool", connections=2))
    ann, one, two = net.connect("ann"), net.connect("pool"), net.connect("pool")
    one.block(0)
    two.block(0)
    ann.request(one.address, b"first", 1)
    ann.request(two.address, b"second", 2)
    assert ann.error() == (1, "expired")
    one.leave()
    net.settle()
    assert ann.take() == []


def test_requests_with_one_id_to_one_connection_are_each_reported() -> None:
    net = FakeNet(client("ann"), client("bob"), client("cid"))
    ann, bob, cid = net.connect("ann"), net.connect("bob"), net.connect("cid")
    bob.block(0)
    for _ in range(2):
        ann.request("bob", b"?", 7)
    ann.request("cid", b"?", 7)
    bob.leave()
    net.settle()
    assert [error_of(each) for each in ann.take()] == ["offline", "offline"]
    cid.leave()
    net.settle()
    assert ann.error() == (7, "abandoned")


def test_request_of_former_session_gives_its_kept_frame_up_to_one_with_its_id() -> None:
    """A client removed and configured again may have two connections for a moment."""
    entry, pool = client("ann"), client("pool", connections=2)
    net = FakeNet(entry, pool)
    older, worker = net.connect("ann"), net.connect("pool")
    older.request("pool", b"first", 7)
    flight = net.broker.exchange.clients["pool"].flight
    assert flight is not None
    kept = flight.retained
    net.broker.reconfigure({"pool": pool}, net.broker.status.limits, net.now)
    net.broker.reconfigure({"ann": entry, "pool": pool}, net.broker.status.limits, net.now)
    newer = net.connect("ann")
    newer.request("pool", b"other", 7)
    assert flight.retained == kept
    worker.reply("ann", b"answer", 7)
    assert newer.payloads() == [b"answer"]
    assert flight.retained == 0


@pytest.mark.parametrize("kind", [Kind.MESSAGE, Kind.REQUEST])
def test_frame_with_id_of_cancelled_request_is_reported(kind: Kind) -> None:
    """Both wait for a member that leaves."""
    net = FakeNet(client("ann"), client("pool", connections=2))
    ann, one = net.connect("ann"), net.connect("pool")
    one.block(0)
    ann.request(one.address, b"?", 7)
    ann.send(Envelope(Kind.ERROR, 7, BROKER, json.dumps({"code": "cancelled"}).encode(), codec=2))
    assert ann.error() == (7, "cancelled")
    ann.send(Envelope(kind, 7, one.address, b"!"))
    one.leave()
    net.settle()
    assert ann.error() == (7, "offline")


def test_request_forgotten_twice_leaves_another_of_its_id() -> None:
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    requests = net.broker.requests
    ann.request("bob", b"", 7)
    (first,) = bob.session.incoming_requests.values()
    requests.end(first)
    requests.end(first)
    assert ann.session.outgoing_count == 0

    ann.request("bob", b"", 7)
    requests.end(first)

    assert ann.session.outgoing_count == 1
    assert len(bob.session.incoming_requests) == 1
