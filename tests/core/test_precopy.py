"""What is copied before the hand-over, and what becomes of it when it changes
meanwhile.
"""

from __future__ import annotations

import json
from array import array
from typing import Any

import pytest
from support.fake_network import FakeNet, client
from support.session_fields import CAPTURED

from brokerd.config.values import WhenFull
from brokerd.core import precopy
from brokerd.core.broker import Broker
from brokerd.core.precopy import Copier, Copies
from brokerd.core.snapshot import (
    BadSnapshot,
    Pieces,
    adapt,
    capture,
    capture_clients,
    capture_idle,
    restore,
    restore_idle,
)


def pool(**changes: Any) -> FakeNet:
    return FakeNet(
        client("alice"), client("bob"), client("pool", connections=3, **changes), client("carol")
    )


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
    net.hand_over(
        meanwhile=lambda: [alice.message("bob", b"%d" % number * 10, number) for number in (3, 4)]
    )
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
    new_process = net.connect("alice") if leaves else alice
    worker.leave()
    assert [each.id for each in new_process.take()] == ([] if leaves else [7])


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


def test_frame_whose_sender_left_during_an_upgrade_is_copied_in_the_next_one() -> None:
    net = pool()
    alice, worker = net.connect("alice"), net.connect("pool")
    worker.block()
    alice.message("pool", b"x", 7)
    net.hand_over(meanwhile=alice.leave)
    net.hand_over()
    worker.read()
    assert worker.payloads() == [b"x"]


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


def idle_facts(**changes: Any) -> dict[str, Any]:
    """Return what is copied of an idle session that has a subscription."""
    net = pool()
    bob = net.connect("bob")
    bob.ask("subscribe", topic="a")
    facts = capture_idle(net.broker, bob.session, net.now, Copier(net.broker))
    assert facts is not None
    return {**json.loads(json.dumps(facts)), **changes}


def test_idle_sessions_are_not_captured_again() -> None:
    net = pool()
    peers = [net.connect(name) for name in ("alice", "bob", "pool", "pool")]
    copier = Copier(net.broker)
    for peer in peers:
        assert capture_idle(net.broker, peer.session, net.now, copier) is not None
        assert capture_idle(net.broker, peer.session, net.now, copier) is None
    taken = capture(net.broker, [peer.session for peer in peers], net.now, copier)
    for what in ("sessions", "outboxes", "clients", "counts", "gone"):
        assert not taken.facts[what]


@pytest.mark.parametrize(
    "attribute",
    sorted(
        CAPTURED
        - {
            "arrived",
            "instance",
            "open",
            "peer",
            "since",
            "sender_header",
            "waiters",
            "client",
            "number",
        }
    ),
)
def test_session_is_not_as_copied_once_what_is_captured_of_it_changes(attribute: str) -> None:
    """What the list of captured attributes leaves out never changes, or only with what
    is in it.
    """
    net = pool()
    alice, bob = net.connect("alice"), net.connect("bob")
    copier = Copier(net.broker)
    assert capture_idle(net.broker, bob.session, net.now, copier) is not None
    assert copier.is_as_copied(bob.session)
    changed: dict[type, Any] = {
        bool: True,
        int: 77,
        str: "changed",
        set: {("b", None)},
        dict: {(1, "x"): alice.session},
    }
    before = getattr(bob.session, attribute)
    setattr(bob.session, attribute, changed.get(type(before), alice.session.outbox))
    assert not copier.is_as_copied(bob.session)


def test_outbox_that_has_something_new_is_not_as_copied() -> None:
    net = pool()
    alice, bob = net.connect("alice"), net.connect("bob")
    copier = Copier(net.broker)
    assert capture_idle(net.broker, bob.session, net.now, copier) is not None
    alice.message("bob", b"x")
    bob.read()
    assert not copier.is_as_copied(bob.session)


@pytest.mark.parametrize("blocked", [False, True])
def test_session_that_is_busy_is_not_copied(blocked: bool) -> None:
    net = pool()
    alice, bob = net.connect("alice"), net.connect("bob")
    if blocked:
        bob.block()
        alice.message("bob", b"x")
    else:
        alice.request("bob", b"?", 1)
        assert capture_idle(net.broker, alice.session, net.now, Copier(net.broker)) is None
    assert capture_idle(net.broker, bob.session, net.now, Copier(net.broker)) is None


def test_message_and_presence_after_an_idle_session_was_copied_arrive_once() -> None:
    net = pool()
    alice, bob, carol = net.connect("alice"), net.connect("bob"), net.connect("carol")
    carol.ask("subscribe", topic="$broker.>")
    net.hand_over(meanwhile=lambda: alice.message("bob", b"1"))
    alice.message("bob", b"2")
    assert bob.payloads() == [b"1", b"2"]
    carol.take()
    bob.leave()
    assert len(carol.take()) == 1
    assert net.broker.exchange.clients["bob"].changed_at == net.now


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("session", {"charged": True}),
        ("session", {"closing": "for a reason"}),
        ("session", {"skip": 5}),
        ("session", {"configured": False}),
        ("session", {"address": "alice"}),
        ("session", {"owed": [["alice", 1, 0]]}),
        ("session", {"reached_by_event": [0]}),
        ("session", {"subscriptions": [["a..b", None]]}),
        ("outbox", {"chunks": [16], "size": 1000}),
        ("outbox", {"begun": 3}),
        ("client", {"turn": -1}),
        ("client", {"levels": [1.0, None]}),
    ],
)
def test_idle_session_that_can_not_be_one_is_refused(part: str, changes: dict[str, Any]) -> None:
    net = pool()
    facts = idle_facts()
    restore_idle(net.broker, facts, net.now, Copies(net.broker))
    with pytest.raises(BadSnapshot):
        restore_idle(
            net.broker, {**facts, part: {**facts[part], **changes}}, net.now, Copies(net.broker)
        )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sessions": [99]}, "was not copied"),
        ({"sessions": [1], "outboxes": [{}]}, "frames"),
        ({"sessions": [1], "gone": [1]}, "was not copied"),
        ({"next_number": 0}, "came after all"),
        ({"sessions": [1, 1]}, "one address"),
        ({"counts": [[99, 1, 1, 1, 1, 1]]}, "was not copied"),
        ({"counts": [[1, 1, 1, 1, 1, 1]], "gone": [1]}, "was not copied"),
        ({"counts": [[1, 1, 1, 1, 1]]}, "a list of 6"),
        ({"counts": [[1, 1, 1, 1, 1, -1]]}, "whole number"),
        ({"gone": [None]}, "whole number"),
    ],
)
def test_number_of_a_session_that_was_not_copied_so_is_refused(
    change: dict[str, Any], expected: str
) -> None:
    net = pool()
    bob = net.connect("bob")
    assert bob.session.number == 1
    copier = Copier(net.broker)
    idle = capture_idle(net.broker, bob.session, net.now, copier)
    facts = capture(net.broker, [bob.session], net.now, copier).facts
    for changed in ({}, change):
        fresh = Broker([client("bob")])
        copies = Copies(fresh)
        restore_idle(fresh, json.loads(json.dumps(idle)), net.now, copies)
        if changed:
            with pytest.raises(BadSnapshot, match=expected):
                restore(fresh, {**facts, **changed}, Pieces(b""), net.now, copies)
        else:
            restore(fresh, facts, Pieces(b""), net.now, copies)
            assert [session.number for session in fresh.exchange.sessions()] == [1]


def test_facts_of_the_formats_before_list_every_session() -> None:
    """Those that they do not list have left; whatever is listed by its number is as
    copied.
    """
    net = pool()
    peers = [net.connect(name) for name in ("alice", "bob")]
    copier = Copier(net.broker)
    copied = [capture_idle(net.broker, peer.session, net.now, copier) for peer in peers]
    facts = capture(net.broker, [], net.now, copier).facts
    facts |= {"sessions": [2], "outboxes": [None]}
    del facts["counts"], facts["gone"]
    fresh = Broker([client("alice"), client("bob")])
    copies = Copies(fresh)
    for each in copied:
        restore_idle(fresh, json.loads(json.dumps(each)), net.now, copies)
    adapt(facts, copies)
    restored = restore(fresh, facts, Pieces(b""), net.now, copies)
    assert restored.sessions == list(fresh.exchange.sessions())
    assert [session.address for session in restored.sessions] == ["bob"]


def test_session_whose_counters_alone_have_changed_is_captured_as_its_counters() -> None:
    net = pool()
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.message("bob", b"0")
    copier = Copier(net.broker)
    copier.watch()
    for peer in (alice, bob):
        assert capture_idle(net.broker, peer.session, net.now, copier) is not None
    assert copier.changed_sessions() == []
    alice.message("bob", b"1")
    facts = capture(net.broker, copier.changed_sessions(), net.now, copier).facts
    assert facts["sessions"] == []
    assert [number for number, *_ in facts["counts"]] == [1, 2]


def test_work_of_the_capture_is_proportional_to_what_has_changed() -> None:
    """However many sessions and clients there are."""
    net = FakeNet(*(client(f"c{number}") for number in range(300)), client("bob"))
    peers = [net.connect(f"c{number}") for number in range(200)]
    copier = Copier(net.broker)
    copier.watch()
    for session in copier.changed_sessions():
        capture_idle(net.broker, session, net.now, copier)
    list(capture_clients(net.broker, net.now, copier))
    peers[5].message("c6", b"x")
    peers[7].leave()
    net.connect("bob")
    changed = [session.address for session in copier.changed_sessions()]
    assert changed == ["c5", "c6", "bob"]
    assert {each.name for each in copier.changed_clients()} == {"c5", "c6", "c7", "bob"}


def test_pool_keeps_its_order_when_its_oldest_member_was_busy() -> None:
    net = pool()
    bob, first = net.connect("bob"), net.connect("pool")
    bob.request(first.address, b"?", 1)
    others = [net.connect("pool") for _ in range(2)]
    net.hand_over(meanwhile=lambda: first.reply("bob", b"!", 1))
    numbers = [each.number for each in net.broker.exchange.clients["pool"].sessions.values()]
    assert numbers == [peer.session.number for peer in (first, *others)]


def test_client_that_left_and_came_again_meanwhile_is_there_once() -> None:
    net = pool()
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.ask("subscribe", topic="a")
    again = []

    def meanwhile() -> None:
        bob.leave()
        again.append(net.connect("bob"))
        again[0].ask("subscribe", topic="b")

    net.hand_over(meanwhile=meanwhile)
    for topic in ("a", "b"):
        alice.publish(topic, topic.encode())
    assert again[0].payloads() == [b"b"]
    assert net.broker.exchange.find("bob") is again[0].session
    again[0].leave()
    alice.leave()
    assert not net.leftovers()
