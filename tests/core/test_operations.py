"""The operations of ``$broker``: their answers, who may use them, and their refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.fake_network import FakeNet, client

from brokerd.config.values import Rule, Source
from brokerd.core import broker as broker_module
from brokerd_client.wire.envelope import BROKER, Kind


def refused(peer: Any, op: str, **arguments: Any) -> tuple[str, str]:
    """Return (code, name) of the refusal of an operation."""
    peer.op(op, 77, **arguments)
    (answer,) = peer.take()
    assert (answer.kind, answer.id, answer.name, answer.codec) == (Kind.ERROR, 77, BROKER, 2)
    error = json.loads(answer.payload)
    return error["code"], error["name"]


def test_operation_whoami_returns_name_versions_and_limits() -> None:
    """A client is told its name, its address, the versions and its limits."""
    net = FakeNet(client("pool", connections=2, queue=1234))
    one = net.connect("pool")
    assert one.ask("whoami") == {
        "name": "pool",
        "address": one.address,
        "version": "test",
        "protocol": 1,
        "limits": {"max_message": 16 * 2**20, "queue": 1234},
        "features": ["goaway", "cancels", "in_flight", "channels"],
    }


def test_operation_reply_has_id_of_request_and_is_json() -> None:
    """A REPLY of the broker has the broker's name, the codec 2 and the id of the
    request.
    """
    net = FakeNet(client("ann"))
    ann = net.connect("ann")
    ann.op("ping", 2**64 - 1)
    (answer,) = ann.take()
    assert (answer.kind, answer.id, answer.name, answer.codec) == (Kind.REPLY, 2**64 - 1, BROKER, 2)
    assert json.loads(answer.payload) == {}


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        '{"op": "ping"}'.encode("utf-16"),
        b"\xff",
        b"[]",
        b'"ping"',
        b"{}",
        b'{"op": 5}',
        b'{"op": "fly"}',
        b'{"op": "' + b"x" * 999 + b'"}',
        b"[" * 99_999,
        b'{"op": "ping"} {}',
    ],
)
def test_operation_invalid_is_unsupported(payload: bytes) -> None:
    """Every payload that is not a valid operation is answered, and the connection stays
    open.
    """
    net = FakeNet(client("ann"))
    ann = net.connect("ann")
    ann.request(BROKER, payload, 4)
    assert ann.error() == (4, "unsupported")
    assert ann.ask("ping") == {}


def test_operation_larger_than_128_kib_is_unsupported() -> None:
    """A larger payload is refused by its size before it is read: it has room for
    millions of empty lists.
    """
    net = FakeNet(client("ann"))
    ann = net.connect("ann")
    ping = b'{"op": "ping"}'
    ann.request(BROKER, ping.ljust(128 * 1024), 4)
    (answer,) = ann.take()
    assert answer.kind is Kind.REPLY
    ann.request(BROKER, ping.ljust(128 * 1024 + 1), 5)
    assert ann.error() == (5, "unsupported")


@pytest.mark.parametrize("op", ["clients", "connections", "stats"])
def test_operation_long_answer_is_built_in_turns(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps are taken each time, whatever the turn budget is. The sender's next
    request waits for the answer.
    """
    monkeypatch.setattr(broker_module, "_STEPS", 2)
    net = FakeNet(*(client(f"c{number}", admin=True) for number in range(1500)))
    peers = [net.connect(f"c{number}") for number in range(200)]
    ann = peers[0]
    net._settling = True
    ann.op(op, 1)
    ann.op("ping", 2)
    net.write_touched()
    assert ann.take() == []
    assert ann.held
    turns = 0
    while net.broker.deferred:
        net.broker.run_deferred(0)
        turns += 1
    assert turns >= 4
    net._settling = False
    net.settle()
    first, second = ann.take()
    assert (first.id, second.id) == (1, 2)
    answer = json.loads(first.payload)
    assert {"clients": 1500, "connections": 200, "stats": 200}[op] == (
        answer["connections"] if op == "stats" else len(answer[op])
    )
    assert not net.broker.operations.asking


def test_operation_long_answer_is_charged_to_turn_budget() -> None:
    """The part of it that is built at once is charged as several frames."""
    net = FakeNet(*(client(f"c{number}") for number in range(640)))
    peer = net.connect("c0")
    net.broker.turn.budget = 100
    peer.op("clients")
    assert net.broker.turn.budget < 60
    assert [len(json.loads(answer.payload)["clients"]) for answer in peer.take()] == [640]


def test_operation_long_answer_of_closed_session_is_discarded() -> None:
    """Nothing of it stays behind."""
    net = FakeNet(*(client(f"c{number}") for number in range(1500)))
    ann = net.connect("c0")
    net._settling = True
    ann.op("clients", 1)
    net._settling = False
    ann.leave()
    assert not net.broker.deferred
    assert not net.broker.operations.asking
    assert not net.leftovers()


@pytest.mark.parametrize("op", ["clients", "connections", "stats"])
def test_operation_long_answer_is_sent_after_upgrade(op: str) -> None:
    """An operation that is being answered is handed over, and its sender's next request
    waits for it there.
    """
    net = FakeNet(*(client(f"c{number}", admin=True) for number in range(5000)))
    for number in range(200):
        net.connect(f"c{number}")
    ann = net.peers[0]
    net._settling = True
    ann.op(op, 1)
    ann.op("ping", 2)
    net.write_touched()
    assert ann.take() == []
    net.hand_over()
    net._settling = False
    net.settle()
    assert [each.id for each in ann.take()] == [1, 2]


@pytest.mark.parametrize("op", ["subscribe", "unsubscribe"])
def test_operation_subscribe_is_charged_by_tokens_of_pattern(op: str) -> None:
    """For each token the tree grows, and is cut again."""
    net = FakeNet(client("ann"))
    ann = net.connect("ann")
    for topic, left in (("a.b.c", 99), (".".join("a" * 128), 92)):
        net.broker.turn.budget = 100
        ann.op(op, topic=topic)
        assert net.broker.turn.budget == left


def test_operation_subscribe_is_charged_by_unfinished_searches() -> None:
    """Each unfinished search has to check the new subscription."""
    net = FakeNet(client("ann"))
    ann = net.connect("ann")
    net.broker.topics.add("a.b.c", ann.session)
    for owner in range(40):
        assert net.broker.topics.search("a.b.c", owner, 1) == (None, 1)
    net.broker.turn.budget = 100
    ann.op("subscribe", topic="x")
    assert net.broker.turn.budget == 89


@pytest.mark.parametrize(
    ("op", "key", "others"),
    [
        ("subscribe", "topic", {}),
        ("disconnect", "address", {}),
        ("can", "sender", {"verb": "send", "target": "ann"}),
        ("can", "target", {"sender": "ann", "verb": "send"}),
    ],
)
def test_operation_with_too_long_name_is_not_repeated(
    op: str, key: str, others: dict[str, str]
) -> None:
    """A name of 64 KiB is refused with the right form; neither the answer nor the log
    repeats it.
    """
    net = FakeNet(client("ann", admin=True))
    ann = net.connect("ann")
    ann.op(op, 5, **{key: "x" * 2**16}, **others)
    (answer,) = ann.take()
    assert json.loads(answer.payload)["code"] == "unsupported"
    assert len(answer.payload) < 300
    assert b"at most 255 characters" in answer.payload
    assert all(
        len(noted.other) + len(noted.reason) < 600 for noted in net.broker.replies.log_events.take()
    )


@pytest.mark.parametrize("kind", [Kind.MESSAGE, Kind.REPLY])
def test_operation_as_message_or_reply_is_unsupported(kind: Kind) -> None:
    """A MESSAGE or REPLY to ``$broker`` is refused, and so is a frame to another name
    with a dollar.
    """
    net = FakeNet(client("ann"))
    ann = net.connect("ann")
    (ann.message if kind is Kind.MESSAGE else ann.reply)(BROKER, b"{}", 5)
    assert ann.error() == (5, "unsupported")
    ann.request("$else", b"{}", 6)
    assert ann.error() == (6, "no_such_client")


def test_operation_clients_lists_only_permitted_recipients() -> None:
    """Each client that the sender may send to is listed, with its presence and since
    when.
    """
    net = FakeNet(
        client("ann", send_to=["bob", "cid"]), client("bob"), client("cid"), client("dan")
    )
    ann = net.connect("ann")
    net.advance(5)
    net.connect("bob")
    assert ann.ask("clients") == {
        "clients": [
            {"name": "bob", "online": True, "since": 1005.0},
            {"name": "cid", "online": False, "since": 1000.0},
        ]
    }


def test_operation_subscribe_and_unsubscribe_take_effect_at_once() -> None:
    """The answer repeats the arguments. Unsubscribing twice is not an error."""
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    assert ann.ask("subscribe", topic="jobs.*") == {"topic": "jobs.*", "group": None}
    assert ann.ask("subscribe", topic="jobs.*", group="g") == {"topic": "jobs.*", "group": "g"}
    bob.publish("jobs.new", b"1")
    assert ann.payloads() == [b"1"]
    assert ann.ask("unsubscribe", topic="jobs.*") == {"topic": "jobs.*", "group": None}
    bob.publish("jobs.new", b"2")
    assert ann.payloads() == [b"2"]
    ann.ask("unsubscribe", topic="jobs.*", group="g")
    ann.ask("unsubscribe", topic="jobs.*", group="g")
    bob.publish("jobs.new", b"3")
    assert ann.take() == []


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"topic": 5},
        {"topic": ""},
        {"topic": "a..b"},
        {"topic": "a.>.b"},
        {"topic": "x" * 256},
        {"topic": "\ud800"},
        {"topic": "a", "group": ""},
        {"topic": "a", "group": 5},
        {"topic": "a", "group": "not a name"},
    ],
)
def test_operation_subscribe_invalid_is_unsupported(arguments: dict[str, Any]) -> None:
    """An invalid pattern or group is refused, and no subscription is added."""
    net = FakeNet(client("ann"))
    ann = net.connect("ann")
    assert refused(ann, "subscribe", **arguments) == ("unsupported", BROKER)
    assert refused(ann, "unsubscribe", **arguments) == ("unsupported", BROKER)
    assert len(net.broker.topics) == 0


def test_operation_subscribe_outside_rules_is_denied() -> None:
    """The whole pattern has to be allowed by one rule."""
    net = FakeNet(client("ann", subscribe=["jobs.*"]))
    ann = net.connect("ann")
    assert refused(ann, "subscribe", topic="jobs.>") == ("denied", BROKER)
    assert refused(ann, "subscribe", topic="$broker.>") == ("denied", BROKER)
    ann.ask("subscribe", topic="jobs.new")


@pytest.mark.parametrize("op", ["stats", "connections", "disconnect", "reload", "drain", "can"])
def test_operation_for_administrators_without_admin_is_denied(op: str) -> None:
    """Without admin: true the answer is denied, whatever the arguments."""
    net = FakeNet(client("ann"))
    ann = net.connect("ann")
    assert refused(ann, op) == ("denied", BROKER)
    assert net.broker.operations.admin_commands == []


def test_operation_stats_counts_messages_and_bytes() -> None:
    """The counters include closed connections and open ones."""
    net = FakeNet(client("ops", admin=True), client("ann"), client("bob"))
    ops, ann, bob = net.connect("ops"), net.connect("ann"), net.connect("bob")
    before = ops.ask("stats")
    for number in range(3):
        ann.message("bob", b"12345", number)
    ann.message("nobody", b"", 4)
    bob.leave()
    after = ops.ask("stats")
    assert after["messages_in"] - before["messages_in"] == 5
    assert after["bytes_in"] - before["bytes_in"] == 3 * 20 + 18 + (
        12 + 7 + len(b'{"op": "stats"}')
    )
    assert after["messages_out"] - before["messages_out"] == 5
    assert after["refused"] == {"no_such_client": 1}
    assert (before["online"], after["online"], after["clients"], after["connections"]) == (
        3,
        2,
        3,
        2,
    )
    assert after["draining"] is False
    assert after["waiting_bytes"] == 0


def test_operation_connections_shows_slow_held_and_waiting_bytes() -> None:
    """An administrator sees which connection is slow or held, and how many bytes wait."""
    net = FakeNet(client("ops", admin=True), client("ann"), client("bob", queue=50))
    ops, ann, bob = net.connect("ops"), net.connect("ann"), net.connect("bob")
    bob.block(1)
    ann.request("bob", b"x" * 10, 1)
    ann.message("bob", b"x" * 10, 2)
    shown = {each["address"]: each for each in ops.ask("connections")["connections"]}
    assert shown["bob"]["slow"] is True
    assert shown["bob"]["waiting_bytes"] == 28
    assert shown["bob"]["owed"] == 1
    assert shown["bob"]["queue"] == 50
    assert shown["ann"]["held"] is True
    assert (shown["ann"]["held_by"], shown["bob"]["holds"]) == ("bob", 1)
    assert shown["ops"] | {"bytes_out": 0, "bytes_in": 0} == {
        "address": "ops",
        "name": "ops",
        "peer": "test",
        "since": 1000.0,
        "messages_in": 1,
        "bytes_in": 0,
        "messages_out": 0,
        "bytes_out": 0,
        "errors": 0,
        "waiting_bytes": 0,
        "queue": 1 << 20,
        "slow": False,
        "held": False,
        "held_by": None,
        "holds": 0,
        "subscriptions": 0,
        "owed": 0,
        "in_flight": None,
    }


def test_operation_disconnect_closes_by_address_or_name() -> None:
    """A connection is closed by its address, a whole pool by its name. The sender's own
    connection is closed after the answer.
    """
    net = FakeNet(client("ops", admin=True), client("pool", connections=3), client("ann"))
    ops = net.connect("ops")
    one, two, three = (net.connect("pool") for _ in range(3))
    assert ops.ask("disconnect", address=two.address) == {
        "disconnected": [two.address],
        "channels": 0,
    }
    assert two.gone == "disconnected by ops"
    assert ops.ask("disconnect", address="pool") == {
        "disconnected": [one.address, three.address],
        "channels": 0,
    }
    assert three.gone
    assert refused(ops, "disconnect", address="pool") == ("offline", "pool")
    assert refused(ops, "disconnect", address=two.address) == ("offline", two.address)
    assert refused(ops, "disconnect", address="ann") == ("offline", "ann")
    assert refused(ops, "disconnect", address="nobody") == ("no_such_client", "nobody")
    assert refused(ops, "disconnect", address="nobody/1") == ("no_such_client", "nobody/1")
    assert refused(ops, "disconnect") == ("unsupported", BROKER)
    assert ops.ask("disconnect", address="ops") == {"disconnected": ["ops"], "channels": 0}
    assert ops.gone == "disconnected by ops"


@pytest.mark.parametrize("op", ["reload", "drain", "keys"])
def test_operation_for_daemon_is_queued_as_admin_command(op: str) -> None:
    """An operation that only the daemon can do is passed to it with its source; the
    daemon answers.
    """
    net = FakeNet(client("ops", admin=True))
    ops = net.connect("ops")
    ops.op(op, 9, why="x")
    (order,) = net.broker.operations.admin_commands
    assert (order.op, order.source, order.id, order.arguments) == (op, ops.session, 9, {"why": "x"})
    assert ops.take() == []


def test_operation_reload_dry_run_not_boolean_is_unsupported() -> None:
    """Any value but true or false is refused: it might be meant either way."""
    net = FakeNet(client("ops", admin=True))
    ops = net.connect("ops")
    assert refused(ops, "reload", dry_run="no") == ("unsupported", BROKER)
    ops.op("reload", 9, dry_run=True)
    assert [order.arguments for order in net.broker.operations.admin_commands] == [
        {"dry_run": True}
    ]


def test_operation_can_names_rule_and_its_source() -> None:
    """Each answer says which rule decided, where that is written, and why."""
    rule = Rule("b*", Source("brokerd.yaml", 7))
    net = FakeNet(
        client("ops", admin=True),
        client("ann", send_to=[rule], publish=["jobs.>"], subscribe=[]),
        client("bob"),
        client("cid"),
    )
    ops = net.connect("ops")

    def can(verb: str, target: str) -> dict[str, Any]:
        return ops.ask("can", sender="ann", verb=verb, target=target)

    assert can("send", "bob") == {
        "allowed": True,
        "rule": "b*",
        "where": "brokerd.yaml:7",
        "why": "b* allows it",
    }
    assert can("send", "bob/1")["allowed"] is True
    assert can("send", "bert")["why"] == "unknown client bert"
    denied = can("send", "cid")
    assert (denied["allowed"], denied["where"]) == (False, "brokerd.yaml:7")
    assert denied["why"] == "none of its rules matches: b*"
    assert can("publish", "jobs.new")["where"] == "default"
    assert can("publish", "other")["allowed"] is False
    assert can("subscribe", "a") == {
        "allowed": False,
        "rule": None,
        "where": None,
        "why": "none of its rules matches: nothing",
    }


def test_operation_can_tells_who_may_open_a_channel() -> None:
    """The caller has to be allowed to send, and the recipient to accept it."""
    net = FakeNet(
        client("ops", admin=True),
        client("ann", send_to=["b*"]),
        client("bob"),
        client("bea", open_from=["cid"]),
        client("cid"),
    )
    ops = net.connect("ops")

    def can(target: str) -> dict[str, Any]:
        return ops.ask("can", sender="ann", verb="open", target=target)

    assert can("bob/1")["allowed"] is True
    assert can("cid")["why"] == "none of its rules matches: b*"
    assert can("bert")["why"] == "unknown client bert"
    assert can("bea")["why"] == "none of its rules matches: cid"


def test_operation_can_without_rules_decides_for_broker_and_its_topics() -> None:
    """Every client may send requests to the broker, and no client may publish under
    ``$``, whatever the rules.
    """
    net = FakeNet(client("ops", admin=True), client("ann", send_to=[]))
    ops = net.connect("ops")
    asking = ops.ask("can", sender="ann", verb="send", target="$broker")
    assert asking == {
        "allowed": True,
        "rule": None,
        "where": None,
        "why": "every client may send requests to the broker",
    }
    publishing = ops.ask("can", sender="ann", verb="publish", target="$broker.draining")
    assert publishing == {
        "allowed": False,
        "rule": None,
        "where": None,
        "why": "only the broker publishes on topics that begin with $",
    }


def test_operation_can_unknown_sender_or_verb_is_refused() -> None:
    """An unknown sender or verb is an error, not the answer no."""
    net = FakeNet(client("ops", admin=True))
    ops = net.connect("ops")
    assert refused(ops, "can", sender="nobody", verb="send", target="ops") == (
        "no_such_client",
        "nobody",
    )
    assert refused(ops, "can", sender="ops", verb="fly", target="ops") == ("unsupported", BROKER)
    assert refused(ops, "can", sender="ops", verb="send") == ("unsupported", BROKER)


@pytest.mark.parametrize("payload", [b"", b"  ", b"{", b"{} x", b"\xff", b"[" * 100_000, b"[1]"])
def test_operation_that_is_not_one_object_is_refused(payload: bytes) -> None:
    """Whatever is wrong with the JSON, the answer is an ERROR, and the connection goes on."""
    ann = FakeNet(client("ann")).connect("ann")
    ann.request("$broker", payload, 5)
    assert ann.error() == (5, "unsupported")
    assert ann.ask("ping") == {}
