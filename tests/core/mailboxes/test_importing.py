"""Importing: the messages of an export keep their senders, keys, states and attempts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.fake_network import Peer, client
from support.mailbox_net import MailboxNet, ack, open_mailbox, seqs, with_mailbox

from brokerd.core.mailboxes import mailbox as mailbox_module
from brokerd.core.mailboxes.journal import FailureKind
from brokerd_client.wire.envelope import Kind

LINE: dict[str, Any] = {"sender": "alice/1", "payload": "hello", "mark": "m1"}


def network(**box: Any) -> tuple[MailboxNet, Peer]:
    """Return a network with bob's mailbox, and an administrator."""
    net = MailboxNet(
        client("alice"),
        client("ops", admin=True, admin_payload=True),
        with_mailbox(**box),
    )
    return net, net.connect("ops")


def given(ops: Peer, *messages: dict[str, Any], name: str = "bob") -> dict[str, Any]:
    """Import messages; return the REPLY, or the content of the ERROR."""
    ops.op("mailbox_import", 9, name=name, messages=list(messages))
    (answer,) = [envelope for envelope in ops.take() if envelope.id == 9]
    content = json.loads(answer.payload)
    assert isinstance(content, dict)
    return content


def test_import_keeps_senders_states_and_attempts() -> None:
    net, ops = network()
    reply = given(
        ops,
        {**LINE, "kind": "event", "topic": "a.b", "id": 7, "codec": 2, "payload": "{}"},
        {**LINE, "mark": "m2", "state": "held", "attempts": 2, "error": "why"},
        {**LINE, "mark": "m3", "state": "delayed", "attempts": 1, "due_at": net.now + 50},
        {**LINE, "mark": "m4", "state": "dead", "attempts": 3, "reason": "bad", "consumer": "bob"},
        {**LINE, "mark": "m5", "state": "delayed", "encoding": "base64", "payload": "/zU="},
        {**LINE, "mark": "m6", "extension": {"x": [1]}, "expires_at": net.now + 70},
    )
    assert reply == {"imported": 6, "known": 0, "expired": 0}
    box = net.box()
    assert (box.ready_count, box.delayed, box.dead, box.uncommitted) == (4, 1, 1, 0)
    assert box.dead_size == net.store.disk["bob"].rows[4].stored.size
    bob = net.connect("bob")
    open_mailbox(bob, window=1)
    got = []
    for _ in range(4):
        (delivery,) = bob.take()
        got.append(delivery)
        ack(bob, delivery.seq)
    assert [(each.seq, each.attempt, each.name) for each in got] == [
        (1, 1, "alice/1"),
        (2, 3, "alice/1"),
        (5, 1, "alice/1"),
        (6, 1, "alice/1"),
    ]
    event, _, binary, last = got
    assert (event.kind, event.topic, event.id, event.codec) == (Kind.EVENT, "a.b", 7, 2)
    assert (binary.kind, binary.payload) == (Kind.MESSAGE, b"\xff5")
    assert last.extension == {"x": [1]}
    net.advance(60)
    assert [(each.seq, each.attempt) for each in bob.take()] == [(3, 2)]
    ops.op("mailbox_show", 8, name="bob", state="all")
    delayed, dead = json.loads(ops.got[-1].payload)["messages"]
    assert (delayed["state"], delayed["attempts"]) == ("held", 1)
    assert (dead["state"], dead["attempts"], dead["reason"]) == ("dead", 3, "bad")


def test_import_with_times_in_whole_seconds_keeps_them_as_fractions() -> None:
    """Other programs write a time so, such as jq. The database's seal differs for it."""
    net, ops = network()
    times = {"at": 5, "expires_at": 2_000_000_000, "due_at": 3_000_000}
    given(ops, {**LINE, **times, "state": "delayed", "attempts": 1})
    row = net.store.disk["bob"].rows[1]
    kept = (row.at, row.stored.expires_at, row.due_at)
    assert kept == (5.0, 2_000_000_000.0, 3_000_000.0)
    assert {type(each) for each in kept} == {float}


def test_import_repeated_stores_nothing_twice() -> None:
    """A message's own key goes with it, in its sender's name."""
    net, ops = network()
    lines = [{**LINE, "key": "k"}, {**LINE, "mark": "m2"}, {**LINE, "mark": "m3", "state": "dead"}]
    for imported in (3, 0):
        reply = {"imported": imported, "known": 3 - imported, "expired": 0}
        assert given(ops, *lines) == reply
    assert sorted(net.store.disk["bob"].rows) == [1, 2, 3]
    assert (net.box().messages, net.box().dead, net.box().keys) == (3, 1, 3)
    net.connect("alice").message("bob", b"again", 5, extension={"key": "k"})
    assert net.box().messages == 3
    ops.op("mailbox_show", 8, name="bob", state="all")
    shown = json.loads(ops.got[-1].payload)["messages"]
    assert [message["key"] for message in shown] == ["k", None, None]


def test_import_leaves_out_what_has_expired_but_dead_letters() -> None:
    net, ops = network()
    old = {**LINE, "expires_at": net.now - 1}
    assert given(ops, old) == {"imported": 0, "known": 0, "expired": 1}
    assert given(ops, old, {**old, "state": "dead"}) == {"imported": 1, "known": 0, "expired": 1}
    assert net.box().dead == 1


def test_import_without_mark_is_not_remembered() -> None:
    net, ops = network()
    line = {"sender": "alice", "payload": ""}
    given(ops, line)
    given(ops, line)
    assert (net.box().messages, net.box().keys) == (2, 0)


@pytest.mark.parametrize("limit", ["messages", "size"])
def test_import_without_room_stores_nothing(limit: str) -> None:
    net, ops = network(**{limit: 1 if limit == "messages" else 300})
    assert given(ops, LINE, {**LINE, "mark": "m2"})["code"] == "full"
    assert net.box().messages == 0


def test_import_on_a_full_disk_is_full() -> None:
    net, ops = network()
    net.store.failure = FailureKind.FULL
    assert given(ops, LINE, {**LINE, "mark": "m2", "state": "dead"})["code"] == "full"
    assert (net.box().messages, net.box().dead) == (0, 0)


def test_import_into_an_orphaned_mailbox_is_unsupported() -> None:
    net, ops = network()
    given(ops, LINE)
    configs = {name: each.config for name, each in net.broker.exchange.clients.items()}
    configs["bob"] = client("bob")
    net.broker.reconfigure(configs, net.broker.status.limits, net.now)
    answer = given(ops, {**LINE, "mark": "m2"})
    assert answer["code"] == "unsupported"
    assert "clients.bob.mailbox" in answer["message"]


def test_import_larger_than_other_operations_is_accepted() -> None:
    net, ops = network()
    payload = "x" * 200_000
    assert given(ops, {**LINE, "payload": payload})["imported"] == 1
    bob = net.connect("bob")
    open_mailbox(bob)
    assert seqs(bob) == [1]
    bob.op("ping", 5, more=payload)
    assert bob.error() == (5, "unsupported")


def test_import_by_another_client_is_denied() -> None:
    net, _ = network()
    bob = net.connect("bob")
    bob.op("mailbox_import", 5, messages=[LINE])
    assert bob.error() == (5, "denied")


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        [LINE] * 101,
        ["text"],
        [{"payload": "x"}],
        [{**LINE, "sender": "no name"}],
        [{**LINE, "sender": "$broker"}],
        [{**LINE, "kind": "request"}],
        [{**LINE, "state": "gone"}],
        [{**LINE, "attempts": -1}],
        [{**LINE, "attempts": True}],
        [{**LINE, "kind": "event", "topic": ""}],
        [{**LINE, "encoding": "base64", "payload": "*"}],
        [{**LINE, "codec": 256}],
        [{**LINE, "key": ""}],
        [{**LINE, "mark": "x" * 65}],
        [{**LINE, "extension": {"ttl": 0}}],
        [{**LINE, "extension": {"x": json.loads("[" * 40 + "]" * 40)}}],
        [{**LINE, "state": "dead", "reason": "\ud800"}],
        [{**LINE, "state": "dead", "error": "\ud800"}],
        [{**LINE, "state": "dead", "consumer": "\ud800"}],
        [{**LINE, "payload": "\ud800"}],
        [{**LINE, "state": "dead", "at": 2**64}],
        [{**LINE, "state": "delayed", "due_at": 10**400}],
        [{**LINE, "expires_at": -1}],
    ],
)
def test_import_of_invalid_messages_is_unsupported(messages: Any) -> None:
    net, ops = network()
    ops.op("mailbox_import", 5, name="bob", messages=messages)
    assert ops.error() == (5, "unsupported")
    assert net.box().messages == 0


def test_import_beyond_the_memory_of_a_mailbox_arrives_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What found no memory stays on disk until it is due for delivery."""
    monkeypatch.setattr(mailbox_module, "_MESSAGES", 2)
    net, ops = network()
    lines = [{**LINE, "mark": f"m{number}", "payload": str(number)} for number in range(5)]
    assert given(ops, *lines)["imported"] == 5
    assert (net.box().ready_count, net.box().unloaded) == (5, 3)
    bob = net.connect("bob")
    open_mailbox(bob, window=10)
    assert bob.payloads() == [b"0", b"1", b"2", b"3", b"4"]
