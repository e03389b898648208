"""Operations on mailboxes: listing, show, kick, drop and purge."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.fake_network import Peer, client
from support.mailbox_net import MailboxNet, ack, open_mailbox, seqs, with_mailbox

from brokerd.core import operations
from brokerd.core.mailboxes.journal import FailureKind
from brokerd_client.wire.envelope import Kind


def ask(peer: Peer, op: str, **arguments: Any) -> dict[str, Any]:
    """Return the REPLY to an operation; other frames stay in ``peer.got``."""
    peer.op(op, 99, **arguments)
    (answer,) = [envelope for envelope in peer.got if envelope.id == 99]
    peer.got.remove(answer)
    assert answer.kind is Kind.REPLY, answer.payload
    reply = json.loads(answer.payload)
    assert isinstance(reply, dict)
    return reply


def net_with_every_state() -> tuple[MailboxNet, Peer, Peer]:
    """Return a network, bob and an administrator; bob's mailbox has every state.

    Messages 1 and 2 are dead, 3 is held, 4 is delayed, 5 and 6 are ready.
    """
    net = MailboxNet(
        client("alice"), client("ops", admin=True), client("carl"), with_mailbox(window=3)
    )
    alice, bob = net.connect("alice"), net.connect("bob")
    for number in (1, 2, 3):
        alice.message("bob", b"%d" % number, number)
    open_mailbox(bob)
    ack(bob, 1, "dead", reason="hopeless")
    ack(bob, 2, "dead")
    alice.message("bob", b"4", 4, extension={"delay": 60})
    open_mailbox(bob, window=1)
    alice.message("bob", b"\xff5", 5, extension={"key": "k"})
    alice.publish("x")
    alice.message("bob", "é".encode() * 3000, 6)
    bob.take()
    return net, bob, net.connect("ops")


def counts(net: MailboxNet) -> tuple[int, int, int, int]:
    box = net.box()
    return box.ready_count, len(box.held), box.delayed, box.dead


def test_mailboxes_lists_counts_and_connections_for_the_owner_and_administrators() -> None:
    net, bob, ops = net_with_every_state()
    net.advance(2)
    (entry,) = ask(ops, "mailboxes")["mailboxes"]
    assert ask(bob, "mailboxes")["mailboxes"] == [entry]
    assert ask(net.connect("carl"), "mailboxes") == {"mailboxes": []}
    assert {key: entry[key] for key in ("name", "ready", "held", "delayed", "dead", "oldest")} == {
        "name": "bob",
        "ready": 2,
        "held": 1,
        "delayed": 1,
        "dead": 2,
        "oldest": 2.0,
    }
    assert entry["orphaned"] is False
    assert entry["bytes"] == net.box().size + 128
    assert entry["connections"] == [{"address": "bob", "held": 1, "window": 1, "oldest": 2.0}]


@pytest.mark.parametrize(
    ("state", "shown"), [("ready", [5, 6]), ("held", [3]), ("delayed", [4]), ("dead", [1, 2])]
)
def test_mailbox_show_shows_messages_of_one_state(state: str, shown: list[int]) -> None:
    net, bob, _ = net_with_every_state()
    before = counts(net)
    messages = ask(bob, "mailbox_show", state=state)["messages"]
    assert [message["seq"] for message in messages] == shown
    assert {message["state"] for message in messages} == {state}
    assert {message["sender"] for message in messages} == {"alice"}
    assert counts(net) == before
    (second,) = (
        ask(bob, "mailbox_show", state=state, after=shown[-2])["messages"]
        if shown[1:]
        else ask(bob, "mailbox_show", state=state, after=0)["messages"]
    )
    assert second["seq"] == shown[-1]
    assert len(ask(bob, "mailbox_show", state=state, limit=1)["messages"]) == 1


def test_mailbox_show_of_held_messages_finds_retries() -> None:
    """On disk, a message that was tried before is still delayed."""
    net = MailboxNet(client("alice"), with_mailbox(), client("ops", admin=True))
    alice, bob = net.connect("alice"), net.connect("bob")
    for number in range(1, 7):
        alice.message("bob", b"x", number)
    open_mailbox(bob, window=5)
    ack(bob, 5, "failed", delay=5)
    ack(bob, 3, "failed", delay=6)
    for seq in (1, 2, 4, 6):
        ack(bob, seq)
    net.advance(10)
    ack(bob, 3)
    net.advance(10)
    alice.message("bob", b"x", 7)
    assert list(net.box().held) == [5]
    bob.take()
    (held,) = ask(bob, "mailbox_show", state="held")["messages"]
    assert (held["seq"], held["attempts"]) == (5, 1)
    shown = ask(bob, "mailbox_show", state="all")["messages"]
    assert [(message["seq"], message["state"]) for message in shown] == [
        (5, "held"),
        (7, "ready"),
    ]


def test_mailbox_show_shows_reasons_keys_and_payloads() -> None:
    _, bob, _ = net_with_every_state()
    dead, _ = ask(bob, "mailbox_show", state="dead")["messages"]
    assert (dead["reason"], dead["attempts"], dead["consumer"]) == ("hopeless", 0, "bob")
    assert (dead["encoding"], dead["payload"]) == ("text", "1")
    binary, long = ask(bob, "mailbox_show")["messages"]
    assert (binary["encoding"], binary["payload"], binary["key"]) == ("base64", "/zU=", "k")
    assert long["payload"] == "é" * 2048
    _, whole = ask(bob, "mailbox_show", full=True)["messages"]
    assert whole["payload"] == "é" * 3000


def test_mailbox_show_to_administrators_needs_admin_payload_for_payloads() -> None:
    net, _, ops = net_with_every_state()
    first, *_ = ask(ops, "mailbox_show", name="bob")["messages"]
    assert "payload" not in first
    configs = {name: each.config for name, each in net.broker.exchange.clients.items()}
    configs["ops"] = client("ops", admin=True, admin_payload=True)
    net.broker.reconfigure(configs, net.broker.status.limits, net.now)
    first, *_ = ask(ops, "mailbox_show", name="bob")["messages"]
    assert first["payload"] == "/zU="


@pytest.mark.parametrize(
    "arguments",
    [
        {"state": "gone"},
        {"state": 5},
        {"limit": 0},
        {"limit": 101},
        {"after": -1},
        {"full": 1},
        {"name": 5},
    ],
)
def test_mailbox_show_with_invalid_arguments_is_unsupported(arguments: dict[str, Any]) -> None:
    _, bob, _ = net_with_every_state()
    bob.op("mailbox_show", 5, **arguments)
    assert bob.error() == (5, "unsupported")


@pytest.mark.parametrize("op", ["mailbox_show", "mailbox_kick", "mailbox_drop", "mailbox_purge"])
def test_operation_on_the_mailbox_of_another_client_is_denied(op: str) -> None:
    net, _, ops = net_with_every_state()
    carl = net.connect("carl")
    carl.op(op, 5, name="bob", seq=1)
    assert carl.error() == (5, "denied")
    carl.op(op, 6, seq=1)
    assert carl.error() == (6, "unsupported")
    ops.op(op, 7, name="unknown", seq=1)
    assert ops.error() == (7, "unsupported")


def test_mailbox_kick_makes_a_dead_letter_ready_at_the_end() -> None:
    net, bob, ops = net_with_every_state()
    assert ask(ops, "mailbox_kick", name="bob", seq=1) == {"kicked": 1, "seq": 7}
    assert counts(net) == (3, 1, 1, 1)
    open_mailbox(bob, window=10)
    deliveries = bob.take()
    assert [(each.seq, each.attempt) for each in deliveries] == [(5, 1), (6, 1), (7, 1)]
    assert deliveries[-1].payload == b"1"
    # Message 1 was kicked, 5 is ready, and 99 has never been there.
    for seq in (1, 5, 99):
        ops.op("mailbox_kick", 5, name="bob", seq=seq)
        assert f"no dead letter with the seq {seq}" in json.loads(ops.got[-1].payload)["message"]
        assert ops.error() == (5, "expired")


def test_mailbox_kick_all_revives_every_dead_letter() -> None:
    net, bob, _ = net_with_every_state()
    assert ask(bob, "mailbox_kick", all=True) == {"kicked": 2}
    assert counts(net) == (4, 1, 1, 0)
    bob.op("mailbox_kick", 5)
    assert bob.error() == (5, "unsupported")


def test_mailbox_kick_of_damaged_dead_letter_is_refused() -> None:
    """Its content is lost: nothing is delivered, and ``all`` leaves it out."""
    net, bob, ops = net_with_every_state()
    rows = net.store.disk["bob"].rows
    rows[1] = rows[1]._replace(frame=b"", reason="damaged")
    ops.op("mailbox_kick", 5, name="bob", seq=1)
    assert "message 1 is damaged" in json.loads(ops.got[-1].payload)["message"]
    assert ops.error() == (5, "unsupported")
    assert counts(net) == (2, 1, 1, 2)
    assert ask(bob, "mailbox_kick", all=True) == {"kicked": 1, "damaged": 1}
    assert counts(net) == (3, 1, 1, 1)
    assert ask(bob, "mailbox_drop", seq=1) == {"dropped": 1}
    assert counts(net) == (3, 1, 1, 0)


@pytest.mark.parametrize("seq", [1, 3, 4, 5, 6])
def test_mailbox_drop_deletes_a_message_in_every_state(seq: int) -> None:
    net, bob, _ = net_with_every_state()
    assert ask(bob, "mailbox_drop", seq=seq) == {"dropped": 1}
    assert seq not in net.store.disk["bob"].rows
    assert net.box().messages == 5
    bob.op("mailbox_drop", 5, seq=seq)
    assert bob.got[-1].id == 5
    assert json.loads(bob.got[-1].payload)["code"] == "expired"
    bob.take()
    ask(bob, "mailbox_purge")
    open_mailbox(bob, window=10)
    net.advance(100)
    assert not seqs(bob)


@pytest.mark.parametrize("seq", [2**63, 2**64 - 1])
def test_operations_with_a_seq_beyond_all_find_no_message(seq: int) -> None:
    _, bob, _ = net_with_every_state()
    assert ask(bob, "mailbox_show", after=seq, state="all") == {"messages": []}
    for op in ("mailbox_kick", "mailbox_drop"):
        bob.op(op, 5, seq=seq)
        assert bob.error() == (5, "expired")


@pytest.mark.parametrize(
    ("state", "left"),
    [
        ("ready", [1, 2, 3, 4]),
        ("held", [1, 2, 4, 5, 6]),
        ("delayed", [1, 2, 3, 5, 6]),
        ("dead", [3, 4, 5, 6]),
        (None, [3]),
    ],
)
def test_mailbox_purge_deletes_all_messages_of_a_state(state: str | None, left: list[int]) -> None:
    net, bob, _ = net_with_every_state()
    arguments = {} if state is None else {"state": state}
    assert ask(bob, "mailbox_purge", **arguments) == {"purged": 6 - len(left)}
    assert sorted(net.store.disk["bob"].rows) == left
    box = net.box()
    rows = net.store.disk["bob"].rows.values()
    assert (box.messages, box.size) == (len(left), sum(row.stored.size for row in rows))
    open_mailbox(bob, window=10)
    net.advance(100)
    ready = {seq for seq in left if seq not in (1, 2, 3)}
    assert set(seqs(bob)) >= ready


def test_mailbox_purge_leaves_messages_on_their_way_to_the_disk() -> None:
    net, bob, _ = net_with_every_state()
    net.is_prompt = False
    net.peers[0].message("bob", b"new")
    ack(bob, 3, "failed")
    bob.op("mailbox_purge", 99)
    net.answer()
    assert sorted(net.store.disk["bob"].rows) == [3, 7]
    net.is_prompt = True
    bob.take()
    open_mailbox(bob, window=10)
    ack(bob, 3)
    assert net.box().messages == 1


def test_orphaned_mailbox_is_listed_until_it_is_purged() -> None:
    net, bob, ops = net_with_every_state()
    configs = {name: each.config for name, each in net.broker.exchange.clients.items()}
    configs["bob"] = client("bob")
    net.broker.reconfigure(configs, net.broker.status.limits, net.now)
    net.settle()
    bob.take()
    ops.take()
    (entry,) = ask(ops, "mailboxes")["mailboxes"]
    assert (entry["orphaned"], entry["ready"], entry["held"]) == (True, 3, 0)
    assert ask(ops, "mailbox_purge", name="bob") == {"purged": 6}
    assert ask(ops, "mailboxes") == {"mailboxes": []}


def test_changing_operations_are_logged_with_their_mailbox() -> None:
    net, _, ops = net_with_every_state()
    net.broker.replies.log_events.take()
    ask(ops, "mailbox_drop", name="bob", seq=1)
    ask(ops, "mailbox_purge", name="bob")
    events = net.broker.replies.log_events.take()
    assert [(e.event, e.other, e.code, e.reason) for e in events] == [
        ("mailbox.changed", "bob", "mailbox_drop", "1"),
        ("mailbox.changed", "bob", "mailbox_purge", "all"),
    ]


def test_mailbox_show_of_another_clients_mailbox_is_logged() -> None:
    net, bob, ops = net_with_every_state()
    net.broker.replies.log_events.take()
    ask(bob, "mailbox_show")
    ask(ops, "mailbox_show", name="bob", state="dead")
    events = net.broker.replies.log_events.take()
    assert [(e.event, e.other, e.code, e.reason) for e in events] == [
        ("mailbox.shown", "bob", "mailbox_show", "dead")
    ]


def test_operations_after_an_io_error_are_refused_and_the_listing_goes_on() -> None:
    net, bob, _ = net_with_every_state()
    net.store.failure = FailureKind.IO
    net.peers[0].message("bob", b"x")
    bob.op("mailbox_show", 5)
    assert bob.error() == (5, "store_failed")
    assert ask(bob, "mailboxes")["mailboxes"]


def test_stats_count_very_many_mailboxes_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other clients have their turns in between."""
    monkeypatch.setattr(operations, "_COUNTED", 1)
    _, _, ops = net_with_every_state()
    assert ops.ask("stats")["mailboxes"]["ready"] == 2


def test_stats_count_messages_of_all_mailboxes() -> None:
    _, _, ops = net_with_every_state()
    counts = {"ready": 2, "held": 1, "delayed": 1, "dead": 2}
    assert ops.ask("stats")["mailboxes"] == counts


def test_whoami_tells_of_mailboxes() -> None:
    _, bob, ops = net_with_every_state()
    assert ops.ask("whoami")["limits"]["dedup"] == 3600.0
    answer = bob.ask("whoami")
    assert answer["limits"]["window"] == 3
    assert "mailboxes" in answer["features"]


def net_with_one_message(*, dead: bool = False) -> tuple[MailboxNet, Peer, Peer]:
    """Return a network with a slow store, bob and an administrator: one message is held,
    or dead.
    """
    net = MailboxNet(client("alice"), client("ops", admin=True), with_mailbox())
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.message("bob", b"one")
    open_mailbox(bob)
    bob.take()
    if dead:
        ack(bob, 1, "dead")
    net.is_prompt = False
    return net, bob, net.connect("ops")


def answers(peer: Peer) -> list[dict[str, Any]]:
    """Return what was answered to operations."""
    return [json.loads(envelope.payload) for envelope in peer.take()]


def test_mailbox_kick_twice_at_once_revives_a_dead_letter_once() -> None:
    net, bob, ops = net_with_one_message(dead=True)
    ops.op("mailbox_kick", 1, name="bob", all=True)
    ops.op("mailbox_kick", 2, name="bob", all=True)
    net.answer()
    assert answers(ops) == [{"kicked": 1}, {"kicked": 0}]
    assert seqs(bob) == [2]
    assert counts(net) == (0, 1, 0, 0)
    net.hand_over()
    ack(bob, 2)
    net.answer()
    assert (net.box().messages, net.box().size) == (0, 0)


@pytest.mark.parametrize("op", ["mailbox_drop", "mailbox_purge"])
def test_mailbox_changes_at_once_count_each_message_once(op: str) -> None:
    net, _, ops = net_with_one_message(dead=True)
    arguments = {"seq": 1} if op == "mailbox_drop" else {"state": "dead"}
    ops.op("mailbox_drop", 1, name="bob", seq=1)
    ops.op(op, 2, name="bob", **arguments)
    ops.op("mailbox_kick", 3, name="bob", all=True)
    net.answer()
    first, second, third = answers(ops)
    assert (first, third) == ({"dropped": 1}, {"kicked": 0})
    assert second.get("code") == "expired" or second == {"purged": 0}
    box = net.box()
    assert (box.messages, box.size, box.dead, box.dead_size) == (0, 0, 0, 0)


@pytest.mark.parametrize("verb", ["", "dead"])
def test_mailbox_drop_counts_message_once_that_is_acknowledged_meanwhile(verb: str) -> None:
    net, bob, ops = net_with_one_message()
    ops.op("mailbox_drop", 1, name="bob", seq=1)
    ack(bob, 1, verb)
    net.answer()
    (answer,) = answers(ops)
    assert answer == {"dropped": 1} if verb else answer["code"] == "expired"
    box = net.box()
    assert (box.messages, box.size, box.dead, box.dead_size) == (0, 0, 0, 0)
    assert not net.store.disk["bob"].rows
