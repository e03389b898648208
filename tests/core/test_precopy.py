"""State copied before the handover, and its changes between the copy and the
handover.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from support.fake_network import FakeNet, Peer, client
from support.session_fields import CAPTURED

from brokerd.config.values import WhenFull
from brokerd.core import precopy
from brokerd.core.broker import Broker, CoreLimits
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
    """Return a net with a pool whose frames are kept one by one."""
    changes = {"connections": 3, "when_full": WhenFull.DROP_OLDEST, **changes}
    return FakeNet(client("alice"), client("bob"), client("pool", **changes), client("carol"))


def test_precopy_queue_changed_meanwhile_arrives_in_order() -> None:
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


def test_precopy_queue_read_to_its_end_meanwhile_is_restored() -> None:
    net = pool()
    alice, worker = net.connect("alice"), net.connect("pool")
    worker.block()
    alice.message("pool", b"0")
    alice.message("pool", b"1")
    net.hand_over(meanwhile=lambda: (worker.read(), worker.block(), alice.message("pool", b"2")))
    worker.read()
    assert worker.payloads() == [b"0", b"1", b"2"]


def test_precopy_answers_keep_their_places_among_copied_frames() -> None:
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


def test_precopy_frames_dropped_meanwhile_stay_dropped() -> None:
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
def test_precopy_frame_undelivered_is_reported_to_same_session_only(leaves: bool) -> None:
    net = pool()
    alice, worker = net.connect("alice"), net.connect("pool")
    worker.block()
    alice.message("pool", b"x", 7)

    def meanwhile() -> None:
        if leaves:
            alice.leave()

    net.hand_over(meanwhile=meanwhile)
    session = net.connect("alice") if leaves else alice
    worker.leave()
    assert [each.id for each in session.take()] == ([] if leaves else [7])


def test_precopy_pool_member_left_meanwhile_passes_on_its_frames() -> None:
    net = pool()
    alice, first, second = net.connect("alice"), net.connect("pool"), net.connect("pool")
    first.block()
    second.block()
    for number in range(4):
        alice.message("pool", b"%d" % number)
    net.hand_over(meanwhile=first.leave)
    second.read()
    assert sorted(second.payloads()) == [b"0", b"1", b"2", b"3"]


def test_precopy_frame_of_disconnected_sender_is_copied_again() -> None:
    net = pool()
    alice, worker = net.connect("alice"), net.connect("pool")
    worker.block()
    alice.message("pool", b"x", 7)
    net.hand_over(meanwhile=alice.leave)
    net.hand_over()
    worker.read()
    assert worker.payloads() == [b"x"]


def test_precopy_frame_ttl_continues() -> None:
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


def test_precopy_subscriptions_changed_meanwhile_are_current() -> None:
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


def test_precopy_subscriptions_of_session_closed_meanwhile_are_gone() -> None:
    net = pool()
    bob = net.connect("bob")
    bob.ask("subscribe", topic="a")
    net.hand_over(meanwhile=bob.leave)
    assert len(net.broker.topics) == 0


def test_precopy_subscriptions_forbidden_by_new_rules_are_dropped() -> None:
    net = pool()
    bob = net.connect("bob")
    for topic in ("a", "b"):
        bob.ask("subscribe", topic=topic)
    net.hand_over(client("bob", subscribe=["a"]))
    assert (len(net.broker.topics), bob.session.subscriptions) == (1, {("a", None)})


def test_precopy_subscriptions_of_removed_client_end() -> None:
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
def test_precopy_block_contradicting_itself_is_refused(change: dict[str, Any]) -> None:
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
def test_precopy_block_with_invalid_bytes_is_refused(which: int, blob: bytes) -> None:
    net = pool()
    facts, blobs = frames_of(net)
    blobs[which] = blob
    with pytest.raises(BadSnapshot):
        Copies(Broker()).add(facts, memoryview(b"".join(blobs)), net.now)


def test_precopy_restore_without_copied_frames_is_refused() -> None:
    net = pool()
    alice, worker = net.connect("alice"), net.connect("pool")
    worker.block()
    alice.message("pool", b"x")
    copier = Copier(net.broker, few=1)
    list(copier.blocks(net.now))
    snapshot = capture(net.broker, [alice.session, worker.session], net.now, copier)
    new_broker = Broker([each.config for each in net.broker.exchange.clients.values()])
    with pytest.raises(BadSnapshot, match="other ones were copied"):
        restore(new_broker, snapshot.facts, Pieces(b"".join(snapshot.pieces)), net.now)


def test_precopy_blocks_of_long_frames_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precopy, "_BYTES", 100)
    net = pool()
    alice, worker = net.connect("alice"), net.connect("pool")
    worker.block()
    for _ in range(4):
        alice.message("pool", b"x" * 30)
    copier = Copier(net.broker, few=1)
    assert [facts["frames"] for facts, _ in copier.blocks(net.now)] == [2, 2]
    assert copier.copied(worker.session) == (0, 4)


def test_precopy_subscription_copied_twice_counts_once() -> None:
    net = pool()
    bob = net.connect("bob")
    bob.ask("subscribe", topic="a")
    ((facts, _),) = Copier(net.broker, few=1).blocks(net.now)
    new_broker = Broker([each.config for each in net.broker.exchange.clients.values()])
    copies = Copies(new_broker)
    for _ in range(2):
        copies.add(json.loads(json.dumps(facts)), memoryview(b""), net.now)
    assert len(new_broker.topics) == 1


def idle_facts(**changes: Any) -> dict[str, Any]:
    """Return what is copied of an idle session that has a subscription."""
    net = pool()
    bob = net.connect("bob")
    bob.ask("subscribe", topic="a")
    facts = capture_idle(net.broker, bob.session, net.now, Copier(net.broker))
    assert facts is not None
    return {**json.loads(json.dumps(facts)), **changes}


def test_precopy_idle_session_is_not_captured_again() -> None:
    net = pool()
    peers = [net.connect(name) for name in ("alice", "bob", "pool", "pool")]
    copier = Copier(net.broker)
    for peer in peers:
        assert capture_idle(net.broker, peer.session, net.now, copier) is not None
        assert capture_idle(net.broker, peer.session, net.now, copier) is None
    snapshot = capture(net.broker, [peer.session for peer in peers], net.now, copier)
    for key in ("sessions", "outboxes", "clients", "counts", "gone"):
        assert not snapshot.facts[key]


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
def test_precopy_session_with_changed_attribute_is_not_as_copied(attribute: str) -> None:
    """An attribute that is missing in the list of captured ones never changes, or
    changes only with one in the list.
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


def test_precopy_session_with_new_message_is_not_as_copied() -> None:
    net = pool()
    alice, bob = net.connect("alice"), net.connect("bob")
    copier = Copier(net.broker)
    assert capture_idle(net.broker, bob.session, net.now, copier) is not None
    alice.message("bob", b"x")
    bob.read()
    assert not copier.is_as_copied(bob.session)


@pytest.mark.parametrize("blocked", [False, True])
def test_precopy_busy_session_is_not_copied(blocked: bool) -> None:
    net = pool()
    alice, bob = net.connect("alice"), net.connect("bob")
    if blocked:
        bob.block()
        alice.message("bob", b"x")
    else:
        alice.request("bob", b"?", 1)
        assert capture_idle(net.broker, alice.session, net.now, Copier(net.broker)) is None
    assert capture_idle(net.broker, bob.session, net.now, Copier(net.broker)) is None


def test_precopy_message_and_presence_after_copy_arrive_once() -> None:
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
def test_precopy_idle_session_with_invalid_facts_is_refused(
    part: str, changes: dict[str, Any]
) -> None:
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
        ({"sessions": [1], "outboxes": [None], "next_number": 1}, "came after all"),
        ({"sessions": [1, 1]}, "one address"),
        ({"counts": [[99, 1, 1, 1, 1, 1]]}, "was not copied"),
        ({"counts": [[1, 1, 1, 1, 1, 1]], "gone": [1]}, "was not copied"),
        ({"counts": [[1, 1, 1, 1, 1]]}, "a list of 6"),
        ({"counts": [[1, 1, 1, 1, 1, -1]]}, "whole number"),
        ({"gone": [None]}, "whole number"),
    ],
)
def test_precopy_wrong_session_number_is_refused(change: dict[str, Any], expected: str) -> None:
    net = pool()
    bob = net.connect("bob")
    assert bob.session.number == 1
    copier = Copier(net.broker)
    idle = capture_idle(net.broker, bob.session, net.now, copier)
    facts = capture(net.broker, [bob.session], net.now, copier).facts
    for changed in ({}, change):
        new_broker = Broker([client("bob")])
        copies = Copies(new_broker)
        restore_idle(new_broker, json.loads(json.dumps(idle)), net.now, copies)
        if changed:
            with pytest.raises(BadSnapshot, match=expected):
                restore(new_broker, {**facts, **changed}, Pieces(b""), net.now, copies)
        else:
            restore(new_broker, facts, Pieces(b""), net.now, copies)
            assert [session.number for session in new_broker.exchange.sessions()] == [1]


def test_precopy_facts_of_older_formats_list_every_session() -> None:
    """Sessions that they do not list have closed; a session listed by its number is as
    copied.
    """
    net = pool()
    peers = [net.connect(name) for name in ("alice", "bob")]
    copier = Copier(net.broker)
    copied = [capture_idle(net.broker, peer.session, net.now, copier) for peer in peers]
    facts = capture(net.broker, [], net.now, copier).facts
    facts |= {"sessions": [2], "outboxes": [None]}
    del facts["counts"], facts["gone"]
    new_broker = Broker([client("alice"), client("bob")])
    copies = Copies(new_broker)
    for each in copied:
        restore_idle(new_broker, json.loads(json.dumps(each)), net.now, copies)
    adapt(facts, copies)
    restored = restore(new_broker, facts, Pieces(b""), net.now, copies)
    assert restored.sessions == list(new_broker.exchange.sessions())
    assert [session.address for session in restored.sessions] == ["bob"]


def test_precopy_session_with_changed_counters_is_captured_by_them() -> None:
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


def test_precopy_capture_examines_only_changed_sessions_and_clients() -> None:
    """The number of sessions and clients does not matter."""
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


def test_precopy_pool_with_busy_oldest_member_keeps_its_order() -> None:
    net = pool()
    bob, first = net.connect("bob"), net.connect("pool")
    bob.request(first.address, b"?", 1)
    others = [net.connect("pool") for _ in range(2)]
    net.hand_over(meanwhile=lambda: first.reply("bob", b"!", 1))
    numbers = [each.number for each in net.broker.exchange.clients["pool"].sessions.values()]
    assert numbers == [peer.session.number for peer in (first, *others)]


def test_precopy_client_reconnected_meanwhile_is_restored_once() -> None:
    net = pool()
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.ask("subscribe", topic="a")
    peers = []

    def meanwhile() -> None:
        bob.leave()
        peers.append(net.connect("bob"))
        peers[0].ask("subscribe", topic="b")

    net.hand_over(meanwhile=meanwhile)
    for topic in ("a", "b"):
        alice.publish(topic, topic.encode())
    assert peers[0].payloads() == [b"b"]
    assert net.broker.exchange.find("bob") is peers[0].session
    peers[0].leave()
    alice.leave()
    assert not net.leftovers()


def test_precopy_idle_session_of_older_format_has_no_limit_of_its_own() -> None:
    """The facts of the formats 2 and 3 have no requests in flight."""
    facts = idle_facts()
    for name in ("cancels", "in_flight", "revoked"):
        del facts["session"][name]
    new_broker = Broker([client("bob")])
    restore_idle(new_broker, facts, 0.0, Copies(new_broker))
    (session,) = new_broker.exchange.sessions()
    assert (session.cancels, session.in_flight, session.revoked) == (False, None, set())


def test_precopy_sessions_of_removed_client_are_counted_and_written() -> None:
    """Their messages after the copy change only the counters."""
    net = pool()
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.message("bob", b"0")
    net.copy(client("alice"))
    alice.message("bob", b"1")
    net.copy()
    net.take_over()
    assert bob.session.messages_out == 2
    assert net.broker.exchange.resolve("bob") is None
    assert bob.payloads() == [b"0", b"1"]


def test_precopy_session_copied_twice_is_gone_once_it_leaves() -> None:
    """Its first copy's outbox takes no message in its place."""
    net = pool()
    alice, bob = net.connect("alice"), net.connect("bob")
    net.copy()
    bob.block()
    alice.message("bob", b"waits")
    net.copy()
    net.take_over()
    bob.leave()
    alice.take()
    alice.message("bob", b"?", 7, receipt=True)
    assert alice.error() == (7, "offline")


def test_precopy_subscription_ended_after_its_copy_stays_ended() -> None:
    net = pool()
    alice, bob = net.connect("alice"), net.connect("bob")
    for topic in ("a", "b"):
        bob.ask("subscribe", topic=topic)

    def meanwhile() -> None:
        bob.ask("unsubscribe", topic="a")
        alice.request("bob", b"?", 1)

    net.hand_over(meanwhile=meanwhile)
    bob.take()
    for topic in ("a", "b"):
        alice.publish(topic, topic.encode())
    assert bob.payloads() == [b"b"]


def test_precopy_sender_held_after_the_copy_stays_held() -> None:
    net = FakeNet(client("alice"), client("bob", queue=60))
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.block()

    def meanwhile() -> None:
        for number in range(3):
            alice.message("bob", b"%d" % number * 30)

    net.hand_over(meanwhile=meanwhile)
    assert alice.held
    bob.read()
    assert not alice.held
    assert [payload[:1] for payload in bob.payloads()] == [b"0", b"1", b"2"]


def test_precopy_subscription_forbidden_by_a_reload_after_the_copy_ends() -> None:
    net = pool()
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.ask("subscribe", topic="a")

    def meanwhile() -> None:
        entries = {name: each.config for name, each in net.broker.exchange.clients.items()}
        entries["bob"] = client("bob", subscribe=("b",))
        net.broker.reconfigure(entries, CoreLimits(), net.now)
        net.settle()

    net.hand_over(meanwhile=meanwhile)
    alice.publish("a", b"a")
    assert not bob.take()
    assert not bob.session.subscriptions


def test_precopy_idle_session_forgotten_is_captured_again() -> None:
    """The connection may have changed although the session has not."""
    net = pool()
    bob = net.connect("bob")
    copier = Copier(net.broker)
    copier.watch()
    assert capture_idle(net.broker, bob.session, net.now, copier) is not None
    assert copier.changed_sessions() == []
    assert copier.is_as_copied(bob.session)
    copier.forget_idle(bob.session)
    assert not copier.is_as_copied(bob.session)
    assert capture_idle(net.broker, bob.session, net.now, copier) is not None


def test_precopy_successor_at_one_address_discards_the_copy_before() -> None:
    """The numbers of discarded copies are reported once."""
    net = pool()
    former = net.connect("bob")
    copier = Copier(net.broker)
    new_broker = Broker([client("bob")])
    copies = Copies(new_broker)
    sessions = []
    for _ in range(2):
        facts = capture_idle(net.broker, former.session, net.now, copier)
        restore_idle(new_broker, json.loads(json.dumps(facts)), net.now, copies)
        sessions.append(former.session.number)
        former.leave()
        former = net.connect("bob")
    assert [session.number for session in new_broker.exchange.sessions()] == sessions[1:]
    assert copies.take_discarded() == sessions[:1]
    assert copies.take_discarded() == []


def test_precopy_session_copied_and_captured_in_part_is_refused() -> None:
    net = pool()
    bob = net.connect("bob")
    outbox = capture(net.broker, [bob.session], net.now).facts["outboxes"][0]
    copier = Copier(net.broker)
    idle = capture_idle(net.broker, bob.session, net.now, copier)
    facts = capture(net.broker, [], net.now, copier).facts
    new_broker = Broker([client("bob")])
    copies = Copies(new_broker)
    restore_idle(new_broker, json.loads(json.dumps(idle)), net.now, copies)
    facts |= {"sessions": [bob.session.number], "outboxes": [outbox]}
    with pytest.raises(BadSnapshot, match="copied in part"):
        restore(new_broker, facts, Pieces(b""), net.now, copies)


def test_precopy_two_open_sessions_at_one_address_are_refused() -> None:
    """The facts do not say that the copied session has left."""
    net = pool()
    former = net.connect("bob")
    copier = Copier(net.broker)
    idle = capture_idle(net.broker, former.session, net.now, copier)
    former.leave()
    bob = net.connect("bob")
    facts = capture(net.broker, [bob.session], net.now, copier).facts
    new_broker = Broker([client("bob")])
    copies = Copies(new_broker)
    restore_idle(new_broker, json.loads(json.dumps(idle)), net.now, copies)
    with pytest.raises(BadSnapshot, match="one address"):
        restore(new_broker, facts | {"gone": []}, Pieces(b""), net.now, copies)


def test_precopy_frame_of_removed_client_is_still_written() -> None:
    net = pool()
    worker, bob = net.connect("pool"), net.connect("bob")
    worker.block()
    pool_entry = client("pool", connections=3, when_full=WhenFull.DROP_OLDEST)
    net.copy(client("alice"), pool_entry)
    bob.message("pool", b"waits", 1, extension={"ttl": 60})
    net.copy()
    net.take_over()
    assert net.broker.exchange.resolve("bob") is None
    worker.read()
    assert worker.payloads() == [b"waits"]


@pytest.mark.parametrize("busy", [False, True])
def test_precopy_subscription_forbidden_there_may_end_after_the_copy(busy: bool) -> None:
    """The new rules have kept it out of the copy."""
    net = FakeNet(client("alice"), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")
    for topic in ("a", "b"):
        bob.ask("subscribe", topic=topic)
    if busy:
        alice.request("bob", b"?", 1)
        bob.take()

    net.hand_over(
        client("alice"),
        client("bob", subscribe=("b",)),
        meanwhile=lambda: bob.ask("unsubscribe", topic="a"),
    )
    assert bob.session.subscriptions == {("b", None)}
    for topic in ("a", "b"):
        alice.publish(topic, topic.encode())
    assert bob.payloads() == [b"b"]


def test_precopy_subscriptions_of_busy_session_closed_meanwhile_are_gone() -> None:
    net = pool()
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.ask("subscribe", topic="a")
    alice.request("bob", b"?", 1)
    net.hand_over(meanwhile=bob.leave)
    assert len(net.broker.topics) == 0
    assert net.connect("bob").session.subscriptions == set()


def test_precopy_session_closed_between_blocks_of_its_queue_is_not_copied_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precopy, "_FRAMES", 2)
    net = pool()
    alice, worker = net.connect("alice"), net.connect("pool")
    worker.block()
    for number in range(7):
        alice.message("pool", b"%d" % number)
    copier = Copier(net.broker, few=1)
    blocks = copier.blocks(net.now)
    facts, _ = next(blocks)
    assert facts["frames"] == 2
    worker.leave()
    assert [each for each, _ in blocks if "frames" in each] == []


def copied_bob(*names: str) -> tuple[Broker, Copies, dict[str, Any], dict[str, Any]]:
    """Return a broker of these clients and the copies of a session of bob in it, the
    facts without that session, and the facts with all of it.
    """
    net = pool()
    bob = net.connect("bob")
    with_all = capture(net.broker, [bob.session], net.now).facts
    copier = Copier(net.broker)
    idle = capture_idle(net.broker, bob.session, net.now, copier)
    facts = capture(net.broker, [], net.now, copier).facts
    broker = Broker([client(name) for name in names])
    copies = Copies(broker)
    restore_idle(broker, json.loads(json.dumps(idle)), net.now, copies)
    return broker, copies, facts, with_all


def test_precopy_session_of_removed_client_is_restored_by_its_number() -> None:
    broker, copies, facts, _ = copied_bob("alice")
    facts |= {"sessions": [1], "outboxes": [None]}
    restored = restore(broker, facts, Pieces(b""), 1000.0, copies)
    assert [session.address for session in restored.sessions] == ["bob"]
    assert not list(broker.exchange.sessions())


def test_precopy_session_that_has_lost_its_entry_since_leaves_its_name() -> None:
    broker, copies, _, with_all = copied_bob("bob")
    assert broker.exchange.find("bob") is not None
    with_all["sessions"][0]["configured"] = False
    restored = restore(broker, with_all, Pieces(b""), 1000.0, copies)
    assert [session.address for session in restored.sessions] == ["bob"]
    assert broker.exchange.find("bob") is None


def stream(queue: int = 10_000_000) -> tuple[FakeNet, Peer, Peer]:
    """Return a net with alice, and bob, who does not read."""
    net = FakeNet(client("alice"), client("bob", queue=queue), client("carol"))
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.block()
    return net, alice, bob


def test_precopy_stream_changed_meanwhile_arrives_in_order() -> None:
    """Chunks that leave, a chunk that was begun, and chunks that come after the copy."""
    net, alice, bob = stream()
    sent = [b"%d" % number * 50_000 for number in range(9)]
    for body in sent[:6]:
        alice.message("bob", body)

    def meanwhile() -> None:
        bob.read(180_000)
        for body in sent[6:]:
            alice.message("bob", body)

    net.hand_over(meanwhile=meanwhile)
    alice.message("bob", b"last")
    bob.read()
    assert bob.payloads() == [*sent, b"last"]


def test_precopy_stream_keeps_ttl_and_pinned_frames_in_place() -> None:
    net, alice, bob = stream()
    alice.message("bob", b"x" * 200_000)
    alice.message("bob", b"short", 1, extension={"ttl": 5})
    alice.message("bob", b"y" * 200_000)
    alice.message("bob", b"long", 2, extension={"ttl": 50})
    net.hand_over(meanwhile=lambda: bob.read(10))
    net.advance(6)
    bob.read()
    net.settle()
    assert [len(payload) for payload in bob.payloads()] == [200_000, 200_000, 4]
    assert alice.error() == (1, "expired")


def test_precopy_stream_read_to_its_end_meanwhile_is_restored() -> None:
    net, alice, bob = stream()
    for _ in range(3):
        alice.message("bob", b"z" * 100_000)
    net.hand_over(meanwhile=bob.read)
    alice.message("bob", b"next")
    bob.read()
    assert [len(payload) for payload in bob.payloads()] == [100_000] * 3 + [4]


def test_precopy_blocks_of_stream_are_bounded_and_not_repeated() -> None:
    net, alice, _ = stream()
    for _ in range(30):
        alice.message("bob", b"z" * 100_000)
    copier = Copier(net.broker)
    sizes = [sum(facts["chunks"]) for facts, _ in copier.blocks(net.now)]
    assert max(sizes) <= 2**20 + 200_000
    assert sum(sizes) > 2_500_000
    assert list(copier.blocks(net.now)) == []


def copied_stream() -> tuple[Copies, dict[str, Any], memoryview, Callable[[], object]]:
    """Return copies, a block with the chunks of bob's stream, and a call that restores."""
    net, alice, bob = stream()
    for _ in range(5):
        alice.message("bob", b"z" * 100_000)
    copier = Copier(net.broker, least=1)
    ((facts, chunks),) = copier.blocks(net.now)
    new_broker = Broker([client("alice"), client("bob"), client("carol")])
    copies = Copies(new_broker)
    snapshot = capture(net.broker, [alice.session, bob.session], net.now, copier)
    pieces = Pieces(b"".join(snapshot.pieces))
    restored = partial(restore, new_broker, snapshot.facts, pieces, net.now, copies)
    return copies, facts, memoryview(b"".join(chunks)), restored


def test_precopy_chunks_of_other_length_are_refused() -> None:
    copies, facts, body, _ = copied_stream()
    with pytest.raises(BadSnapshot, match="as long as it says"):
        copies.add({**facts, "chunks": [1]}, body, 0.0)


def test_precopy_restore_without_copied_chunks_is_refused() -> None:
    _, _, _, restored = copied_stream()
    with pytest.raises(BadSnapshot, match="other ones were copied"):
        restored()


def test_precopy_restore_with_gap_between_copied_chunks_is_refused() -> None:
    copies, facts, body, restored = copied_stream()
    copies.add({**facts, "place": 1}, body, 0.0)
    with pytest.raises(BadSnapshot, match="not copied"):
        restored()


def test_precopy_session_closed_between_blocks_of_its_stream_is_not_copied_further() -> None:
    net, alice, bob = stream()
    for _ in range(30):
        alice.message("bob", b"z" * 100_000)
    blocks = Copier(net.broker).blocks(net.now)
    facts, _ = next(blocks)
    assert facts["place"] == 0
    bob.leave()
    assert [each for each, _ in blocks if "chunks" in each] == []


def test_precopy_stream_begun_beyond_its_first_chunk_is_refused() -> None:
    net, alice, bob = stream()
    for _ in range(5):
        alice.message("bob", b"z" * 100_000)
    copier = Copier(net.broker, least=1)
    ((facts, chunks),) = copier.blocks(net.now)
    new_broker = Broker([client("alice"), client("bob"), client("carol")])
    copies = Copies(new_broker)
    copies.add(facts, memoryview(b"".join(chunks)), net.now)
    snapshot = capture(net.broker, [alice.session, bob.session], net.now, copier)
    snapshot.facts["outboxes"][1]["begun"] = 100_021
    with pytest.raises(BadSnapshot, match="more of a stream was begun"):
        restore(new_broker, snapshot.facts, Pieces(b"".join(snapshot.pieces)), net.now, copies)
