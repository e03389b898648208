"""Incidents: what `why` tells of a client's refusals, drops and disconnects, and their
bounds.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.fake_network import FakeNet, client
from support.mailbox_net import MailboxNet, ack, open_mailbox, with_mailbox

from brokerd.config.values import RateConfig, Rule, Source, WhenFull
from brokerd.core.broker import CoreLimits
from brokerd.core.incidents import MOST, MOST_OF_ONE
from brokerd.core.precopy import Copier
from brokerd_client.wire.envelope import BROKER, CodecId, Envelope, Kind

BODY = bytes(400)


def take_in(net: FakeNet, now_wall: float = 100.0) -> None:
    """Keep the noted log events as incidents, as the network layer does."""
    net.broker.incidents.add(net.broker.replies.log_events.take(), now_wall)


def asked(net: FakeNet, peer: Any, **arguments: Any) -> list[dict[str, Any]]:
    """Return the incidents that the operation tells."""
    take_in(net)
    peer.take()
    incidents: list[dict[str, Any]] = peer.ask("why", **arguments)["incidents"]
    return incidents


def test_why_of_denied_message_names_rule_and_place() -> None:
    """The incident has both names, the code, the id, and the rules with their place."""
    rules = (Rule("carol", Source("c.d/alice.yaml", 7)), Rule("dave*"))
    net = FakeNet(client("ops", admin=True), client("alice", send_to=rules), client("bob"))
    ops, alice = net.connect("ops"), net.connect("alice")
    alice.message("bob", b"x", message_id=5)
    alice.message("bob", b"x", message_id=6)

    (incident,) = asked(net, ops, name="bob")

    assert incident == {
        "event": "message.refused",
        "sender": "alice",
        "recipient": "bob",
        "code": "denied",
        "reason": "alice may not send to bob",
        "rule": "send_to: [carol, dave*]",
        "where": "c.d/alice.yaml:7",
        "first": 100.0,
        "last": 100.0,
        "count": 2,
        "ids": [5, 6],
    }


@pytest.mark.parametrize(
    ("verb", "rule"), [("publish", "publish: [ok]"), ("subscribe", "subscribe: []")]
)
def test_why_of_denied_topic_names_topic_and_rule(verb: str, rule: str) -> None:
    """The topic stands where a recipient would; without rules, the entry is the place."""
    net = FakeNet(
        client("ops", admin=True),
        client("alice", publish=(Rule("ok", Source("test.yaml", 1)),), subscribe=()),
    )
    ops, alice = net.connect("ops"), net.connect("alice")
    if verb == "publish":
        alice.publish("news", b"x")
    else:
        alice.op("subscribe", topic="news")

    (incident,) = asked(net, ops, name="alice")

    assert (incident["recipient"], incident["rule"]) == ("news", rule)
    assert incident["where"] == "test.yaml:1"


def test_why_of_many_patterns_shows_first_ones() -> None:
    """A long list of rules is cut."""
    net = FakeNet(
        client("ops", admin=True),
        client("alice", send_to=tuple(f"c{number}" for number in range(50))),
        client("bob"),
    )
    ops, alice = net.connect("ops"), net.connect("alice")
    alice.message("bob", b"x")

    (incident,) = asked(net, ops, name="alice")

    assert incident["rule"] == "send_to: [c0, c1, c2, c3, c4, c5, c6, c7, ...]"
    assert incident["where"] == "default"


def full_queue(when_full: WhenFull) -> tuple[FakeNet, Any, Any]:
    """Return a net in which bob reads nothing and its queue is full."""
    net = FakeNet(
        client("ops", admin=True),
        client("alice"),
        client("bob", queue=1000, when_full=when_full, source=Source("b.yaml", 3)),
        limits=CoreLimits(wait_timeout=5.0),
    )
    ops, alice, bob = net.connect("ops"), net.connect("alice"), net.connect("bob")
    bob.block()
    for number in range(3):
        alice.message("bob", BODY, message_id=number)
    return net, ops, bob


@pytest.mark.parametrize(
    ("when_full", "events"),
    [
        (WhenFull.REFUSE, [("client.slow", "refuse"), ("message.refused", "full")]),
        (
            WhenFull.DROP_OLDEST,
            [("client.slow", "drop_oldest"), ("message.dropped", "drop_oldest")],
        ),
        (WhenFull.WAIT, [("client.slow", "wait"), ("client.held", None)]),
    ],
)
def test_why_of_full_queue_names_quota_of_recipient(
    when_full: WhenFull, events: list[tuple[str, str | None]]
) -> None:
    """Whatever ``when_full`` is, alice is the sender, bob the recipient, and the queue of
    bob's entry the rule.
    """
    net, ops, _ = full_queue(when_full)

    incidents = asked(net, ops, name="bob", **{"from": "alice"})

    assert [(each["event"], each["code"]) for each in incidents] == events
    for each in incidents:
        assert (each["sender"], each["recipient"]) == ("alice", "bob")
        if each["event"] != "client.held":
            assert each["rule"] == f"queue: 1000, when_full: {when_full}"
            assert each["where"] == "b.yaml:3"


def test_why_of_undeliverable_error_names_sender_and_recipient() -> None:
    """Neither its sender nor its recipient gets another error for it."""
    bob_entry = client("bob", queue=500, when_full=WhenFull.REFUSE)
    net = FakeNet(client("ops", admin=True), client("alice"), bob_entry)
    ops, alice, bob = net.connect("ops"), net.connect("alice"), net.connect("bob")
    bob.request("alice", b"?", 3)
    bob.block()
    alice.message("bob", BODY)
    alice.send(Envelope(Kind.ERROR, 3, "bob", b'{"code": "x"}' * 20, codec=CodecId.JSON))

    (incident,) = asked(net, ops, name="bob", id=3, **{"from": "alice"})

    assert (incident["event"], incident["code"]) == ("message.unreported", "full")
    assert (incident["sender"], incident["recipient"]) == ("alice", "bob")
    assert incident["ids"] == [3]


def refuse_channel(net: FakeNet, recipient: str, code: str, now_wall: float = 1.0) -> None:
    """Keep a refused OPEN of alice, as the network layer does."""
    net.broker.incidents.add_refused_channel("alice", recipient, code, "why", 5, now_wall)


@pytest.mark.parametrize(
    ("send_to", "code", "rule", "where"),
    [
        (("bob",), "denied", "open_from: [carol]", "b.yaml:3"),
        (("carol",), "denied", "send_to: [carol]", "default"),
        (("bob",), "offline", None, None),
    ],
)
def test_why_of_refused_channel_names_rule_of_caller_or_recipient(
    send_to: tuple[str, ...], code: str, rule: str | None, where: str | None
) -> None:
    """Those of one kind are counted together."""
    open_from = (Rule("carol", Source("b.yaml", 3)),)
    net = FakeNet(
        client("ops", admin=True),
        client("alice", send_to=send_to),
        client("bob", open_from=open_from),
    )
    refuse_channel(net, "bob", code)
    refuse_channel(net, "bob", code, 2.0)

    (incident,) = asked(net, net.connect("ops"), name="bob")

    assert (incident["event"], incident["sender"]) == ("channel.refused", "alice")
    assert (incident["rule"], incident["where"]) == (rule, where)
    assert (incident["first"], incident["last"], incident["count"]) == (1.0, 2.0, 2)
    assert incident["ids"] == [5, 5]


def test_incidents_of_channel_to_unknown_name_are_kept_for_its_caller() -> None:
    """A caller whose name is not configured has none."""
    net = FakeNet(client("alice", send_to=()))
    refuse_channel(net, "nobody", "denied")
    net.broker.incidents.add_refused_channel("nobody", "alice", "key_removed", "why", 5, 1.0)

    assert [each.rule for each in net.broker.incidents.newest("nobody")] == ["send_to: []"]
    assert len(net.broker.incidents) == 1


def test_why_shows_state_of_slow_client_and_held_sender() -> None:
    """The answer tells what waits for a connection, and by which it is held."""
    net, ops, _ = full_queue(WhenFull.WAIT)
    take_in(net)

    (bob,) = ops.ask("why", name="bob")["connections"]
    (alice,) = ops.ask("why", name="alice")["connections"]

    assert (bob["slow"], bob["holds"], bob["queue"]) == (True, 1, 1000)
    assert (alice["held_by"], alice["slow"]) == ("bob", False)


def test_why_of_full_mailbox_names_its_limits() -> None:
    """The queue of a connection has nothing to do with it."""
    bob = with_mailbox("bob", messages=1, entry={"source": Source("b.yaml", 3)})
    net = MailboxNet(client("ops", admin=True), client("alice"), bob)
    ops, alice = net.connect("ops"), net.connect("alice")
    for number in range(2):
        alice.message("bob", b"x", number)

    (incident,) = asked(net, ops, name="bob")

    assert (incident["code"], incident["ids"]) == ("full", [1])
    assert incident["rule"] == f"mailbox: messages: 1, size: {1 << 30}, when_full: refuse"
    assert incident["where"] == "b.yaml:3"
    # The client may have lost its mailbox before the refusal is kept.
    assert net.broker.incidents._limits_of_mailbox("alice") == ("", "")


def test_why_tells_of_dead_letters() -> None:
    """Their consumer gives the reason; those with one reason are counted together."""
    net = MailboxNet(client("ops", admin=True), client("alice"), with_mailbox("bob"))
    ops, alice, bob = net.connect("ops"), net.connect("alice"), net.connect("bob")
    open_mailbox(bob)
    for seq in (1, 2):
        alice.message("bob", b"x", seq)
        ack(bob, seq, "dead", reason="no such order")

    (incident,) = asked(net, ops, name="bob")

    assert (incident["event"], incident["recipient"]) == ("mailbox.dead", "bob")
    assert (incident["reason"], incident["count"]) == ("bob: no such order", 2)


def test_why_of_rate_limited_message_names_rate() -> None:
    """The rule is the sender's rate."""
    net = FakeNet(
        client("ops", admin=True), client("alice", rate=RateConfig(1.0, 4096.0)), client("bob")
    )
    ops, alice, _ = net.connect("ops"), net.connect("alice"), net.connect("bob")
    for _ in range(3):
        alice.message("bob", b"x")

    incidents = asked(net, ops, name="alice")

    assert [each["rule"] for each in incidents] == ["rate: messages 1/s, bytes 4096/s"]


def test_why_with_id_or_sender_filters() -> None:
    """Only incidents of that message, or of that sender, are told."""
    net = FakeNet(client("ops", admin=True), client("alice"), client("carol"), client("bob"))
    ops, alice, carol = net.connect("ops"), net.connect("alice"), net.connect("carol")
    alice.message("bob", b"x", message_id=1)
    carol.message("bob", b"x", message_id=2)

    assert len(asked(net, ops, name="bob")) == 2
    assert [each["sender"] for each in asked(net, ops, name="bob", id=1)] == ["alice"]
    assert [each["sender"] for each in asked(net, ops, name="bob", **{"from": "carol"})] == [
        "carol"
    ]
    assert asked(net, ops, name="bob", id=3) == []


def test_why_without_admin_is_about_itself_only() -> None:
    """A client sees its own incidents without places in files, and no sender that it may
    not send to.
    """
    net = FakeNet(
        client("alice", send_to=("bob",)),
        client("bob", send_to=("alice",)),
        client("carol", send_to=()),
    )
    alice, bob, carol = net.connect("alice"), net.connect("bob"), net.connect("carol")
    carol.message("bob", b"x")
    bob.leave()
    alice.message("bob", b"x")
    bob = net.connect("bob")

    assert [each["sender"] for each in asked(net, bob)] == ["alice"]
    (own,) = asked(net, carol, name="carol")
    assert (own["rule"], own["where"]) == ("send_to: []", None)
    bob.op("why", 4, name="carol")
    assert bob.error() == (4, "denied")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"name": "unknown"}, "no_such_client"),
        ({"name": 5}, "unsupported"),
        ({"id": "x"}, "unsupported"),
        ({"from": []}, "unsupported"),
    ],
)
def test_why_with_invalid_argument_is_refused(arguments: dict[str, Any], code: str) -> None:
    """The answer is an ERROR, and the connection stays open."""
    net = FakeNet(client("ops", admin=True))
    ops = net.connect("ops")
    ops.op("why", 9, **arguments)
    assert ops.error() == (9, code)


def test_incidents_of_one_kind_are_counted_together() -> None:
    """The first time and the last are kept, and the newest ids."""
    net = FakeNet(client("ops", admin=True), client("alice"), client("bob"))
    alice = net.connect("alice")
    for number in range(20):
        alice.message("bob", b"x", message_id=number)
        take_in(net, float(number))

    (incident,) = asked(net, net.connect("ops"), name="bob")

    assert (incident["first"], incident["last"], incident["count"]) == (0.0, 19.0, 20)
    assert incident["ids"] == list(range(4, 20))


def test_incidents_of_own_connection_are_kept() -> None:
    """Ends and refused connections are counted by their reason; a claimed name that does
    not exist is not kept.
    """
    net = FakeNet(client("ops", admin=True), client("pool", connections=2))
    incidents = net.broker.incidents
    incidents.add_disconnect("pool", "pool/1", "closed", 1.0)
    incidents.add_disconnect("pool", "pool/2", "closed", 2.0)
    incidents.add_rejection("pool", "unknown key", 3.0)
    incidents.add_rejection("unknown", "unknown key", 3.0)

    found = asked(net, net.connect("ops"), name="pool")

    assert [(each["event"], each["recipient"], each["count"]) for each in found] == [
        ("client.refused", "pool", 1),
        ("client.disconnected", "pool/2", 2),
    ]
    assert (found[1]["first"], found[1]["last"]) == (1.0, 2.0)
    assert len(incidents) == 2


def test_incidents_other_log_events_are_not_kept() -> None:
    """An administrator's operation is no incident."""
    net = FakeNet(client("ops", admin=True))
    net.connect("ops").op("stats")
    take_in(net)
    assert len(net.broker.incidents) == 0


def test_incidents_are_bounded_for_each_client_and_in_all() -> None:
    """A client that invents names replaces its own incidents only; of very many clients,
    the ones without new incidents lose theirs.
    """
    net = FakeNet(client("alice"), client("bob"))
    incidents = net.broker.incidents
    incidents.add_disconnect("bob", "bob", "closed", 0.0)
    for number in range(10 * MOST_OF_ONE):
        incidents.add_disconnect("alice", "alice", f"reason {number}", float(number))

    assert len(incidents) == MOST_OF_ONE + 1
    assert incidents.newest("alice")[-1].reason == f"reason {9 * MOST_OF_ONE}"
    assert len(incidents.newest("bob")) == 1
    for number in range(2 * MOST):
        incidents.add_disconnect(f"c{number}", "x", "closed", 0.0)
    assert len(incidents) == MOST
    assert incidents.newest("bob") == []
    assert len(incidents._kept) == MOST


def test_incidents_go_over_with_an_upgrade_in_their_order() -> None:
    """Those that happen while the others are copied go over too, and are counted once."""
    net = FakeNet(client("ops", admin=True), client("alice"), client("bob"), client("carol"))
    ops, alice = net.connect("ops"), net.connect("alice")
    for number, name in enumerate(("bob", "carol")):
        alice.message(name, b"x", message_id=number)
        take_in(net, float(number))
    copier = Copier(net.broker)
    first = copier.take_incidents()
    alice.message("bob", b"x", message_id=5)
    take_in(net, 5.0)
    changed = copier.take_incidents()
    assert [(len(first), len(changed)), copier.take_incidents()] == [(2, 1), []]
    before = asked(net, ops, name="alice")

    net.hand_over()
    incidents = net.broker.incidents
    incidents.restore(json.loads(json.dumps(first)))
    incidents.restore(json.loads(json.dumps(changed)))

    assert [(each["recipient"], each["last"]) for each in before] == [("bob", 5.0), ("carol", 1.0)]
    assert asked(net, ops, name="alice") == before
    assert len(incidents) == 2
    alice.message("bob", b"x", message_id=6)
    (newest, _) = asked(net, ops, name="alice")
    assert (newest["count"], newest["ids"]) == (3, [0, 5, 6])


def test_why_answer_is_bounded() -> None:
    """At most a hundred incidents are told, the newest."""
    net = FakeNet(
        client("ops", admin=True), *(client(f"c{number}") for number in range(150)), client("bob")
    )
    for number in range(150):
        net.connect(f"c{number}").message("bob", b"x")
        take_in(net, float(number))

    found = net.connect("ops").ask("why", name="bob")["incidents"]

    assert len(found) == 100
    assert found[0]["sender"] == "c149"
    assert BROKER not in {each["recipient"] for each in found}
