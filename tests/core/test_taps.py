"""Taps: copies of what passes, their outcomes and their bounds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.fake_network import FakeNet, Peer, client

from brokerd.config.values import TapScope, WhenFull
from brokerd.core.large_frame import SLACK, LargeFrame
from brokerd.core.routing_result import RoutingResult
from brokerd.core.slow_path import handle_slow_path
from brokerd.core.taps import MOST, TOPIC
from brokerd_client.wire.envelope import Envelope, Kind, encode
from brokerd_client.wire.framing import frame


def tapped(net: FakeNet, pattern: str, **arguments: Any) -> Peer:
    """Return an administrator that watches."""
    ops = net.connect("ops")
    ops.ask("tap", pattern=pattern, **arguments)
    return ops


def batches(ops: Peer) -> list[dict[str, Any]]:
    """Return what the tap has sent."""
    events = ops.take()
    assert {(event.kind, event.name, event.topic) for event in events} <= {
        (Kind.EVENT, "$broker", TOPIC)
    }
    return [json.loads(event.payload) for event in events]


def copies(ops: Peer) -> list[dict[str, Any]]:
    """Return all copies that the tap has sent."""
    return [copy for batch in batches(ops) for copy in batch["copies"]]


def brief(ops: Peer) -> list[tuple[Any, ...]]:
    """Return sender, recipient or topic, kind, size and outcome of each copy."""
    return [
        (
            copy["sender"],
            copy["topic"] or copy["recipient"],
            copy["kind"],
            copy["size"],
            copy["outcome"],
        )
        for copy in copies(ops)
    ]


def test_tap_copies_message_with_names_kind_size_and_outcome() -> None:
    """The second message takes the routing loop; the third is refused."""
    net = FakeNet(client("ops", admin=True), client("alice"), client("bob"), client("carol"))
    ops, alice, bob = tapped(net, "alice"), net.connect("alice"), net.connect("bob")

    for number in range(2):
        alice.message("bob", b"hello", message_id=number)
    alice.message("carol", b"x", message_id=7)

    (first, second, third) = copies(ops)
    assert first == {
        "sender": "alice",
        "recipient": "bob",
        "topic": None,
        "kind": "message",
        "id": 0,
        "size": 5,
        "outcome": "accepted",
    }
    assert (second["id"], second["outcome"]) == (1, "accepted")
    assert (third["id"], third["outcome"]) == (7, "offline")
    assert bob.payloads() == [b"hello", b"hello"]


@pytest.mark.parametrize(
    ("pattern", "seen"),
    [
        ("alic?", ["bob", "jobs.new", "alice"]),
        ("b*", ["bob", "alice"]),
        ("jobs.>", ["jobs.new"]),
        ("jobs.*", ["jobs.new"]),
        ("*", ["bob", "jobs.new", "alice"]),
        ("carol", []),
    ],
)
def test_tap_pattern_matches_either_end_or_topic(pattern: str, seen: list[str]) -> None:
    """Both the names and the topic are compared."""
    net = FakeNet(client("ops", admin=True), client("alice"), client("bob"))
    ops, alice, bob = tapped(net, pattern), net.connect("alice"), net.connect("bob")

    alice.message("bob", b"x")
    alice.publish("jobs.new", b"x")
    bob.message("alice", b"x")

    assert [copy["topic"] or copy["recipient"] for copy in copies(ops)] == seen


def test_tap_of_pool_member_matches_its_name() -> None:
    """A member's address belongs to the pool's name."""
    net = FakeNet(client("ops", admin=True), client("pool", connections=2), client("bob"))
    ops, member, bob = tapped(net, "pool"), net.connect("pool"), net.connect("bob")

    member.message("bob", b"x")
    bob.message(member.address, b"x")

    assert [(each["sender"], each["recipient"]) for each in copies(ops)] == [
        (member.address, "bob"),
        ("bob", member.address),
    ]


def test_tap_with_payload_shows_it_where_allowed() -> None:
    """The entry of the sender or of the recipient must say so; text is cut to a KiB."""
    net = FakeNet(
        client("ops", admin=True),
        client("alice", tap=TapScope.PAYLOAD),
        client("bob"),
        client("carol"),
    )
    ops = tapped(net, "*", payload=True)
    alice, bob, _ = net.connect("alice"), net.connect("bob"), net.connect("carol")

    alice.message("bob", ("é" * 600 + "z").encode())
    bob.message("alice", b"\xff")
    bob.message("carol", b"secret")
    bob.publish("news", b"secret")

    first, second, third, fourth = copies(ops)
    assert (first["size"], first["payload"], first["codec"]) == (1201, "é" * 512, 0)
    assert second["base64"] == "/w=="
    assert "payload" not in third
    assert "secret" not in json.dumps([third, fourth])
    alice.message("bob", ("a" + "é" * 600).encode())
    (cut,) = copies(ops)
    assert cut["payload"] == "a" + "é" * 511


def test_tap_without_payload_shows_none() -> None:
    """The configuration allows it, and the administrator has not asked for it."""
    net = FakeNet(client("ops", admin=True), client("alice", tap=TapScope.PAYLOAD))
    ops, alice = tapped(net, "alice"), net.connect("alice")
    alice.message("alice", b"hello", extension={"content-type": "text/plain"})
    (copy,) = copies(ops)
    assert copy["size"] == 5
    assert not {"payload", "base64", "codec"} & copy.keys()


def test_tap_of_later_failure_is_an_outcome() -> None:
    """A message that was accepted, and that its recipient never took, is reported."""
    net = FakeNet(client("ops", admin=True), client("alice"), client("bob"))
    ops, alice, bob = tapped(net, "bob"), net.connect("alice"), net.connect("bob")
    bob.block()
    alice.message("bob", b"x", message_id=3)

    bob.leave()
    net.broker.send_copies()
    net.settle()

    assert brief(ops) == [
        ("alice", "bob", "message", 1, "accepted"),
        ("alice", "bob", "outcome", 0, "offline"),
    ]


def test_tap_of_dropped_message_is_an_outcome() -> None:
    """The sender gets no error for it, and the tap has it."""
    net = FakeNet(
        client("ops", admin=True),
        client("alice"),
        client("bob", queue=1000, when_full=WhenFull.DROP_OLDEST),
    )
    ops, alice, bob = tapped(net, "bob"), net.connect("alice"), net.connect("bob")
    bob.block()
    for _ in range(3):
        alice.message("bob", bytes(400))

    assert ("alice", "bob", "outcome", 0, "drop_oldest") in brief(ops)


def test_tap_of_equal_frames_says_last_ones_were_refused() -> None:
    """Two of four frames with one id fit into the queue."""
    net = FakeNet(
        client("ops", admin=True),
        client("alice"),
        client("bob", queue=1000, when_full=WhenFull.REFUSE),
    )
    ops, alice, bob = tapped(net, "bob"), net.connect("alice"), net.connect("bob")
    bob.block()

    alice.send_bytes(frame(encode(Envelope(Kind.MESSAGE, 0, "bob", bytes(400)))) * 4)

    assert [copy["outcome"] for copy in copies(ops)] == ["accepted", "accepted", "full", "full"]


def test_tap_of_oversized_and_malformed_frames_has_their_outcome() -> None:
    """An oversized frame is skipped piece by piece, and copied once. A malformed one ends
    the look at the read.
    """
    net = FakeNet(client("ops", admin=True), client("alice"), client("bob"))
    ops, alice, bob = tapped(net, "alice"), net.connect("alice"), net.connect("bob")
    too_large = frame(encode(Envelope(Kind.MESSAGE, 5, "bob", bytes(17 * 2**20))))
    alice.send_bytes(too_large, step=2**20)
    alice.message("bob", b"x", message_id=6)
    assert brief(ops) == [
        ("alice", "bob", "message", 17 * 2**20, "too_large"),
        ("alice", "bob", "message", 1, "accepted"),
    ]

    alice.send_bytes(b"\xff\xff\xff\xf0" * 5)

    assert [copy["outcome"] for copy in copies(ops)] == ["malformed"]
    bob.send_bytes(frame(b"short"))
    assert bob.gone


def test_tap_of_large_frame_reads_its_head_before_it_is_overwritten() -> None:
    """A large frame is passed on in its own buffer, with another head."""
    net = FakeNet(client("ops", admin=True), client("alice"), client("bob"))
    ops, alice = tapped(net, "alice"), net.connect("alice")
    net.connect("bob")
    received = frame(encode(Envelope(Kind.MESSAGE, 5, "bob", bytes(300_000))))
    large_frame = LargeFrame(received, len(received))
    view, taps = memoryview(large_frame), net.broker.taps

    taps.begin(alice.session, view, SLACK, net.now)
    position, result = handle_slow_path(
        net.broker, alice.session, view, SLACK, large_frame.end, net.now
    )
    taps.end(view, position)
    net.broker.send_copies()
    net.settle()

    assert result is RoutingResult.CONSUMED
    assert brief(ops) == [("alice", "bob", "message", 300_000, "accepted")]


def test_tap_looks_at_a_bounded_number_of_frames_per_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rest is counted as unseen; in the next second, it looks again."""
    monkeypatch.setattr("brokerd.core.taps._LOOKED_AT", 10)
    net = FakeNet(client("ops", admin=True), client("alice"), client("bob"))
    ops, alice = tapped(net, "alice"), net.connect("alice")
    net.connect("bob")
    net.advance(2)
    data = frame(encode(Envelope(Kind.MESSAGE, 0, "bob", b"x")))

    alice.send_bytes(data * 50)
    (batch,) = batches(ops)
    assert (len(batch["copies"]), batch["unseen"], batch["dropped"]) == (10, 40, 0)
    alice.send_bytes(data)
    assert batches(ops) == []
    net.advance(2)
    alice.send_bytes(data)
    (batch,) = batches(ops)
    assert (len(batch["copies"]), batch["unseen"], batch["copied"]) == (1, 41, 11)


def test_tap_that_does_not_read_drops_copies_and_counts_them() -> None:
    """What waits for it is bounded, and its senders are not held."""
    net = FakeNet(client("ops", admin=True), client("alice"), client("bob"))
    ops, alice = tapped(net, "alice"), net.connect("alice")
    net.connect("bob")
    ops.block()
    data = frame(encode(Envelope(Kind.MESSAGE, 0, "bob", b"x")))
    for _ in range(40):
        alice.send_bytes(data * 100)
    assert not alice.held
    assert ops.session.outbox.waiting < 512 * 1024

    ops.read()
    alice.send_bytes(data)

    sent = batches(ops)
    last = sent[-1]
    assert last["dropped"] > 0
    assert last["copied"] == last["dropped"] + sum(len(batch["copies"]) for batch in sent)


def test_tap_ends_by_request_with_its_counts_and_costs_nothing_then() -> None:
    """A null pattern ends it; without a tap there is nothing to look at."""
    net = FakeNet(client("ops", admin=True), client("alice"))
    ops, alice = tapped(net, "alice"), net.connect("alice")
    alice.message("alice", b"x")
    ops.take()

    assert ops.ask("tap", pattern=None) == {
        "pattern": "alice",
        "copied": 1,
        "dropped": 0,
        "unseen": 0,
    }
    assert ops.ask("tap", pattern=None) == {}
    assert not net.broker.taps.active
    net.broker.taps.end(memoryview(b""), 0)


def test_tap_with_other_pattern_replaces_the_former() -> None:
    """The same pattern again keeps the counts."""
    net = FakeNet(client("ops", admin=True), client("alice"), client("bob"))
    ops, alice = tapped(net, "alice"), net.connect("alice")
    alice.message("alice", b"x")
    ops.take()
    assert ops.ask("tap", pattern="alice")["copied"] == 1
    assert ops.ask("tap", pattern="bob")["copied"] == 0
    alice.message("alice", b"x")
    assert ops.take() == []


def test_tap_ends_with_its_connection_or_its_right() -> None:
    """A reload that takes the right away ends the tap."""
    net = FakeNet(client("ops", admin=True), client("alice"))
    tapped(net, "alice").leave()
    assert not net.broker.taps.active
    tapped(net, "alice")
    configs = {name: client(name) for name in ("ops", "alice")}
    net.broker.reconfigure(configs, net.broker.status.limits, 0.0)

    net.broker.send_copies()

    assert not net.broker.taps.active


@pytest.mark.parametrize(
    "arguments", [{}, {"pattern": 5}, {"pattern": "x" * 256}, {"pattern": "x", "payload": 1}]
)
def test_tap_with_invalid_argument_is_unsupported(arguments: dict[str, Any]) -> None:
    """No tap begins."""
    net = FakeNet(client("ops", admin=True))
    ops = net.connect("ops")
    ops.op("tap", 3, **arguments)
    assert ops.error() == (3, "unsupported")
    assert not net.broker.taps.active


def test_tap_needs_admin_and_their_number_is_bounded() -> None:
    """The ninth is refused; the broker logs each with its pattern."""
    net = FakeNet(client("ops", admin=True, connections=20), client("alice"))
    alice = net.connect("alice")
    alice.op("tap", 3, pattern="*")
    assert alice.error() == (3, "denied")
    for _ in range(MOST):
        net.connect("ops").ask("tap", pattern="alice")
    late = net.connect("ops")
    late.op("tap", 3, pattern="alice")
    assert late.error() == (3, "full")
    asked = [each for each in net.broker.replies.log_events.take() if each.event == "admin.asked"]
    assert {(each.code, each.other) for each in asked} == {("tap", "alice")}


def test_tap_remembers_a_bounded_number_of_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that invents topics does not fill the memory."""
    monkeypatch.setattr("brokerd.core.taps._REMEMBERED", 5)
    net = FakeNet(client("ops", admin=True), client("alice"))
    ops, alice = tapped(net, "t7"), net.connect("alice")
    for number in range(20):
        alice.publish(f"t{number}", b"x")
    assert [copy["topic"] for copy in copies(ops)] == ["t7"]
    assert len(net.broker.taps.all[ops.session]._known) <= 5


def test_tap_of_held_sender_sees_its_message_once() -> None:
    """Nothing has passed unseen then."""
    net = FakeNet(client("ops", admin=True), client("alice"), client("bob", queue=100))
    ops, alice, bob = tapped(net, "alice"), net.connect("alice"), net.connect("bob")
    bob.block()
    for payload in (b"1" * 60, b"2" * 60):
        alice.message("bob", payload)
    assert alice.held

    bob.read()

    assert not alice.held
    tap = net.broker.taps.all[ops.session]
    assert (tap.copied, tap.unseen) == (2, 0)


def test_tap_tells_of_error_that_reaches_no_client() -> None:
    """Its sender and its recipient are not swapped."""
    net = FakeNet(client("ops", admin=True), client("alice"))
    ops, alice = tapped(net, "alice"), net.connect("alice")

    alice.send(Envelope(Kind.ERROR, 3, "$broker", b"{}"))

    (outcome,) = [copy for copy in copies(ops) if copy["kind"] == "outcome"]
    assert (outcome["sender"], outcome["recipient"]) == ("alice", "$broker")
    assert outcome["outcome"] == "unsupported"


@pytest.mark.parametrize("is_copied", [False, True])
def test_tap_goes_on_after_an_upgrade(is_copied: bool) -> None:
    """Its counts go over, whether its connection was copied as idle before or not."""
    net = FakeNet(client("ops", admin=True), client("alice"), client("bob"))
    ops, alice = tapped(net, "alice"), net.connect("alice")
    alice.message("bob", b"x")
    assert len(copies(ops)) == 1
    if is_copied:
        net.copy()

    net.hand_over()
    alice.message("bob", b"12")

    (batch,) = batches(ops)
    assert [copy["size"] for copy in batch["copies"]] == [2]
    assert (batch["pattern"], batch["copied"], batch["dropped"]) == ("alice", 2, 0)
    ops.leave()
    assert not net.broker.taps.active


def test_tap_upgrade_counts_copies_that_were_not_sent_as_dropped() -> None:
    """The connection that watches learns of it with the next copies."""
    net = FakeNet(client("ops", admin=True), client("alice"), client("bob"))
    ops, alice = tapped(net, "alice"), net.connect("alice")
    net.broker.taps.all[ops.session].add({"sender": "alice"})

    net.hand_over()
    alice.message("bob", b"x")

    (batch,) = batches(ops)
    assert (batch["copied"], batch["dropped"]) == (2, 1)


def test_tap_of_client_that_is_no_administrator_after_an_upgrade_ends() -> None:
    """The new process has another configuration."""
    net = FakeNet(client("ops", admin=True), client("alice"), client("bob"))
    ops, alice = tapped(net, "alice"), net.connect("alice")

    net.hand_over(client("ops"), client("alice"), client("bob"))
    alice.message("bob", b"x")

    assert ops.take() == []
    assert not net.broker.taps.active
