"""What is copied before the hand-over, and what becomes of it when it changes meanwhile."""

from __future__ import annotations

import json
from array import array
from typing import Any

import pytest
from core.fakenet import FakeNet, client

from brokerd.config.values import WhenFull
from brokerd.core import precopy
from brokerd.core.broker import Broker
from brokerd.core.precopy import Copier, Copies
from brokerd.core.snapshot import BadSnapshot, Pieces, capture, restore


def pool(**changes: Any) -> FakeNet:
    return FakeNet(client("alice"), client("bob"), client("pool", connections=3, **changes), client("carol"))


def test_frames_that_left_and_came_meanwhile_arrive_in_order() -> None:
    net = pool()
    alice, worker = net.connect("alice"), net.connect("pool")
    worker.block()
    for number in range(5):
        alice.message("pool", b"%d" % number)

    def meanwhile() -> None:
        worker.read(60)
        for number in range(5, 8):
            alice.message("pool", b"%d" % number)

    net.hand_over(meanwhile=meanwhile)
    alice.message("pool", b"8")
    worker.read()
    assert worker.payloads() == [b"%d" % number for number in range(9)]


def test_queue_that_was_read_to_its_end_meanwhile_begins_anew() -> None:
    net = pool()
    alice, worker = net.connect("alice"), net.connect("pool")
    worker.block()
    alice.message("pool", b"0")
    alice.message("pool", b"1")
    net.hand_over(meanwhile=lambda: (worker.read(), worker.block(), alice.message("pool", b"2")))
    worker.read()
    assert worker.payloads() == [b"0", b"1", b"2"]


def test_answers_keep_their_places_among_copied_frames() -> None:
    net = pool()
    alice, bob, worker = net.connect("alice"), net.connect("bob"), net.connect("pool")
    for number in (1, 2):
        worker.request("bob", b"?", number)
    bob.take()
    worker.block()
    alice.message("pool", b"a")
    bob.reply(worker.address, b"first", 1)
    alice.message("pool", b"b")

    def meanwhile() -> None:
        bob.reply(worker.address, b"second", 2)
        alice.message("pool", b"c")

    net.hand_over(meanwhile=meanwhile)
    worker.read()
    assert worker.payloads() == [b"a", b"first", b"b", b"second", b"c"]


def test_oldest_frames_that_were_dropped_meanwhile_stay_dropped() -> None:
    net = FakeNet(client("alice"), client("bob", when_full=WhenFull.DROP_OLDEST, queue=100))
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.block()
    for number in range(3):
        alice.message("bob", b"%d" % number * 10, number)
    net.hand_over(meanwhile=lambda: [alice.message("bob", b"%d" % number * 10, number) for number in (3, 4)])
    bob.read()
    assert [payload[:1] for payload in bob.payloads()] == [b"2", b"3", b"4"]


@pytest.mark.parametrize("leaves", [False, True])
def test_failure_of_a_copied_frame_is_reported_to_the_same_sender_only(leaves: bool) -> None:
    net = pool()
    alice, worker = net.connect("alice"), net.connect("pool")
    worker.block()
    alice.message("pool", b"x", 7)

    def meanwhile() -> None:
        if leaves:
            alice.leave()

    net.hand_over(meanwhile=meanwhile)
    heir = net.connect("alice") if leaves else alice
    worker.leave()
    assert [each.id for each in heir.take()] == ([] if leaves else [7])


def test_member_that_left_meanwhile_leaves_its_frames_to_another() -> None:
    net = pool()
    alice, first, second = net.connect("alice"), net.connect("pool"), net.connect("pool")
    first.block()
    second.block()
    for number in range(4):
        alice.message("pool", b"%d" % number)
    net.hand_over(meanwhile=first.leave)
    second.read()
    assert sorted(second.payloads()) == [b"0", b"1", b"2", b"3"]


def test_ttl_of_a_copied_frame_goes_on() -> None:
    net = pool()
    alice, worker = net.connect("alice"), net.connect("pool")
    worker.block()
    alice.message("pool", b"short", 1, extension={"ttl": 5})
    alice.message("pool", b"long", 2, extension={"ttl": 500})
    net.hand_over(meanwhile=lambda: net.advance(3))
    net.advance(3)
    worker.read()
    assert worker.payloads() == [b"long"]
    assert alice.error() == (1, "expired")


def test_subscriptions_that_came_and_ended_meanwhile_are_as_they_were() -> None:
    net = pool()
    alice, bob = net.connect("alice"), net.connect("bob")
    for topic in ("a", "b", "c"):
        bob.ask("subscribe", topic=topic)
    bob.ask("subscribe", topic="d", group="g")

    def meanwhile() -> None:
        bob.ask("unsubscribe", topic="a")
        bob.ask("unsubscribe", topic="d", group="g")
        bob.ask("subscribe", topic="e")
        bob.ask("unsubscribe", topic="b")
        bob.ask("subscribe", topic="b")

    net.hand_over(meanwhile=meanwhile)
    for topic in "abcde":
        alice.publish(topic, topic.encode())
    assert bob.payloads() == [b"b", b"c", b"e"]
    assert len(net.broker.topics) == 3


def test_subscriptions_of_a_session_that_left_meanwhile_are_gone() -> None:
    net = pool()
    bob = net.connect("bob")
    bob.ask("subscribe", topic="a")
    net.hand_over(meanwhile=bob.leave)
    assert len(net.broker.topics) == 0


def test_subscriptions_that_new_rules_forbid_are_not_restored() -> None:
    net = pool()
    bob = net.connect("bob")
    for topic in ("a", "b"):
        bob.ask("subscribe", topic=topic)
    net.hand_over(client("bob", subscribe=["a"]))
    assert (len(net.broker.topics), bob.session.subscriptions) == (1, {("a", None)})


def test_subscriptions_of_a_name_that_is_gone_end() -> None:
    net = pool()
    bob = net.connect("bob")
    bob.ask("subscribe", topic="a")
    net.hand_over(client("alice"))
    assert (len(net.broker.topics), bob.session.subscriptions) == (0, set())


def frames_of(net: FakeNet) -> tuple[dict[str, Any], list[bytes]]:
    """Return the block of a queue with two frames."""
    alice, worker = net.connect("alice"), net.connect("pool")
    worker.block()
    for _ in range(2):
        alice.message("pool", b"x")
    (block,) = Copier(net.broker, few=1).blocks(net.now)
    return block


@pytest.mark.parametrize(
    "change",
    [
        {"session": -1},
        {"first": "1"},
        {"frames": 3},
        {"frames": 1 << 40},
        {"frames": None},
    ],
)
def test_block_that_contradicts_itself_is_refused(change: dict[str, Any]) -> None:
    net = pool()
    facts, blobs = frames_of(net)
    with pytest.raises(BadSnapshot):
        Copies(Broker()).add({**facts, **change}, memoryview(b"".join(blobs)), net.now)


@pytest.mark.parametrize(
    ("which", "blob"),
    [
        (0, array("Q", [20, 23]).tobytes()),
        (0, array("Q", [10, 33]).tobytes()),
        (1, b"\x10\x00"),
        (1, b"\x08\x00"),
        (3, array("d", [float("nan"), 1.0]).tobytes()),
        (4, b"short"),
    ],
)
def test_block_whose_bytes_make_no_sense_is_refused(which: int, blob: bytes) -> None:
    net = pool()
    facts, blobs = frames_of(net)
    blobs[which] = blob
    with pytest.raises(BadSnapshot):
        Copies(Broker()).add(facts, memoryview(b"".join(blobs)), net.now)


def test_hand_over_without_the_copied_frames_is_refused() -> None:
    net = pool()
    alice, worker = net.connect("alice"), net.connect("pool")
    worker.block()
    alice.message("pool", b"x")
    copier = Copier(net.broker, few=1)
    list(copier.blocks(net.now))
    taken = capture(net.broker, [alice.session, worker.session], net.now, copier)
    fresh = Broker([each.config for each in net.broker.exchange.clients.values()])
    with pytest.raises(BadSnapshot, match="other ones were copied"):
        restore(fresh, taken.facts, Pieces(b"".join(taken.pieces)), net.now)


def test_blocks_of_long_frames_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precopy, "_BYTES", 100)
    net = pool()
    alice, worker = net.connect("alice"), net.connect("pool")
    worker.block()
    for _ in range(4):
        alice.message("pool", b"x" * 30)
    copier = Copier(net.broker, few=1)
    assert [facts["frames"] for facts, _ in copier.blocks(net.now)] == [2, 2]
    assert copier.copied(worker.session) == (0, 4)


def test_subscription_that_is_copied_twice_counts_once() -> None:
    net = pool()
    bob = net.connect("bob")
    bob.ask("subscribe", topic="a")
    ((facts, _),) = Copier(net.broker, few=1).blocks(net.now)
    fresh = Broker([each.config for each in net.broker.exchange.clients.values()])
    copies = Copies(fresh)
    for _ in range(2):
        copies.add(json.loads(json.dumps(facts)), memoryview(b""), net.now)
    assert len(fresh.topics) == 1
