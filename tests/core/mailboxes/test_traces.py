"""What administrators see of stored messages: taps, incidents, and lists of connections."""

from __future__ import annotations

import json
from typing import Any

from support.fake_network import Peer, client
from support.mailbox_net import MailboxNet, ack, open_mailbox, with_mailbox


def network(**box: Any) -> tuple[MailboxNet, Peer, Peer, Peer]:
    """Return a network, alice, bob, and an administrator."""
    net = MailboxNet(
        client("alice"), client("ops", admin=True), with_mailbox(subscribe=["a.>"], **box)
    )
    return net, net.connect("alice"), net.connect("bob"), net.connect("ops")


def outcomes(ops: Peer) -> list[tuple[Any, ...]]:
    """Return recipient or topic, seq, outcome and reason of each copy of a tap."""
    copies = [copy for event in ops.take() for copy in json.loads(event.payload)["copies"]]
    return [
        (copy["topic"] or copy["recipient"], copy.get("seq"), copy["outcome"], copy.get("reason"))
        for copy in copies
    ]


def test_tap_tells_what_becomes_of_a_stored_message() -> None:
    net, alice, bob, ops = network()
    ops.ask("tap", pattern="alice")
    alice.message("bob", b"1", 11)
    alice.publish("a.b")
    open_mailbox(bob, window=1)
    ack(bob, 1, "back")
    ack(bob, 2, "failed", reason="why")
    ack(bob, 2, "dead", reason="hopeless")
    net.advance(1)
    ack(bob, 1)
    net.settle()
    assert outcomes(ops) == [
        ("bob", None, "accepted", None),
        ("bob", 1, "stored", None),
        ("a.b", None, "accepted", None),
        ("a.b", 2, "stored", None),
        ("bob", 1, "delivered", None),
        ("bob", 1, "returned", None),
        ("a.b", 2, "delivered", None),
        ("a.b", 2, "failed", "why"),
        ("a.b", 2, "delivered", None),
        ("a.b", 2, "dead", "hopeless"),
        ("bob", 1, "delivered", None),
        ("bob", 1, "acknowledged", None),
    ]


def test_tap_tells_of_messages_that_were_stored_together() -> None:
    """The routing loop collects them."""
    net, alice, _, ops = network()
    ops.ask("tap", pattern="bob")
    net.is_prompt = False
    for number in range(4):
        alice.message("bob", b"x", number)
    net.answer()
    net.settle()
    stored = [outcome for outcome in outcomes(ops) if outcome[2] == "stored"]
    assert stored == [("bob", seq, "stored", None) for seq in (1, 2, 3, 4)]


def test_tap_tells_of_messages_that_are_delivered_and_acknowledged_together() -> None:
    _, alice, bob, ops = network()
    for number in range(3):
        alice.message("bob", b"x", number)
    ops.ask("tap", pattern="alice")
    open_mailbox(bob, window=10)
    for seq in (1, 2, 3):
        ack(bob, seq)
    assert sorted(outcomes(ops)) == [
        ("bob", seq, outcome, None)
        for seq in (1, 2, 3)
        for outcome in ("acknowledged", "delivered")
    ]


def test_tap_of_a_mailbox_is_limited() -> None:
    """What passes too fast is counted, not copied."""
    net, alice, _, ops = network()
    ops.ask("tap", pattern="*")
    alice.message("bob", b"1", 11)
    ops.take()
    net.broker.taps._left = 0
    net.broker.taps.note_stored(b"", "bob", "stored")
    assert net.broker.taps.all[ops.session].unseen == 1


def test_why_tells_of_dead_and_expired_messages_and_of_the_mailbox() -> None:
    """Also when their senders have gone."""
    net, alice, bob, ops = network(attempts=1)
    for number in (21, 22, 23):
        alice.message("bob", b"x", number, extension={"ttl": 10} if number == 23 else None)
    alice.leave()
    open_mailbox(bob, window=2)
    ack(bob, 1, "failed", reason="no disk")
    net.advance(20)
    ack(bob, 3, "back")
    net.broker.incidents.add(net.broker.replies.log_events.take(), net.now)
    bob.take()
    answer = ops.ask("why", name="bob")
    assert [
        (each["event"], each["sender"], each["recipient"], each["code"], each["ids"])
        for each in answer["incidents"]
        if each["event"].startswith("mailbox.")
    ] == [
        ("mailbox.dead", "alice", "bob", "dead", [21]),
        ("mailbox.expired", "alice", "bob", "expired", [23]),
    ]
    assert "1 attempt failed: no disk" in answer["incidents"][0]["reason"]
    assert ops.ask("why", name="bob", **{"from": "alice", "id": 21})["incidents"][0]["count"] == 1
    box = answer["mailbox"]
    assert (box["ready"], box["held"], box["dead"]) == (0, 1, 1)
    assert box["connections"][0]["window"] == 2
    assert "mailbox" not in ops.ask("why", name="alice")


def test_connections_tell_what_each_holds_of_its_mailbox() -> None:
    _, alice, bob, ops = network()
    alice.message("bob", b"x", 1)
    open_mailbox(bob, window=5)
    bob.take()
    by_name = {each["name"]: each for each in ops.ask("connections")["connections"]}
    assert (by_name["bob"]["mailbox_held"], by_name["bob"]["mailbox_window"]) == (1, 5)
    assert "mailbox_held" not in by_name["alice"]
