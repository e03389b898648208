"""No frame reaches what the rules deny: every kind of frame, every flag, every way to
name a recipient, every right.

The table is exhaustive on purpose. The kind of a frame and the rules alone decide what
it may do. For each combination the test computes, in a few lines, whether anything may
arrive, and compares that with what the broker does.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.fake_network import FakeNet, Peer, client

from brokerd.core import operations as operations_module
from brokerd_client.wire.envelope import BROKER, Envelope, Flag, Kind, encode, parse
from brokerd_client.wire.framing import frame

#: Recipients that the client "eve" may not reach; POOL stands for a pool member's own
#: address.
POOL = "pool/?"
CLOSED = ("bob", "bob/x", "pool", POOL, "nobody", "$broker/x", "$other", "")
#: The recipient that eve may reach.
OPEN = ("friend",)
FLAGS = [
    0,
    Flag.RECEIPT,
    Flag.EXTENSION,
    Flag.RECEIPT | Flag.EXTENSION,
    Flag.ACK,
    Flag.RECEIPT | Flag.ACK,
    8,
    128,
]
TOPICS = ("open.x", "closed.x", "$broker.online.bob", "$x", "open", "closed")


def network(**eve: Any) -> tuple[FakeNet, dict[str, Peer]]:
    """Return a network with eve and its other peers. eve may send to friend only, and
    publish and subscribe under open.> only.
    """
    rules: dict[str, Any] = {
        "send_to": ("friend",),
        "publish": ("open.>",),
        "subscribe": ("open.>",),
    }
    net = FakeNet(
        client("eve", **rules | eve),
        client("bob"),
        client("friend"),
        client("pool", connections=2),
        client("root", admin=True),
    )
    peers = {name: net.connect(name) for name in ("eve", "bob", "friend", "pool", "root")}
    for name in ("bob", "friend", "pool", "root"):
        peers[name].ask("subscribe", topic=">")
    # A channel begins with the first frame of its connection only.
    peers["eve"].ask("ping")
    for peer in peers.values():
        peer.take()
    return net, peers


def envelope_of(kind: int, flags: int, name: str, topic: str = "open.x") -> bytes:
    """Return a frame as eve would write it, even one that no library would write."""
    extension = b"\0\x02{}" if flags & Flag.EXTENSION else b""
    before = bytes([len(topic)]) + topic.encode() if kind == Kind.EVENT else b""
    header = bytes([kind, flags, 0, len(name)]) + (77).to_bytes(8, "big")
    return frame(header + name.encode() + before + extension + b"payload")


@pytest.mark.parametrize(
    "kind", [*(kind for kind in Kind if kind is not Kind.EVENT), 0, 10, 255], ids=str
)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("to", [*CLOSED, *OPEN])
def test_policy_frame_reaches_only_permitted_recipient(kind: int, flags: int, to: str) -> None:
    """Whatever eve sends, only its friend receives it, under eve's own name; and eve is
    told.
    """
    _, peers = network()
    eve = peers["eve"]

    name = peers["pool"].address if to == POOL else to
    eve.send_bytes(envelope_of(kind, flags, name))

    # No request is pending, so that an answer reaches no client.
    permitted = kind in (Kind.MESSAGE, Kind.REQUEST) and flags < Flag.ACK and to in OPEN
    for other in ("bob", "friend", "pool", "root"):
        got = peers[other].take()
        assert [each.name for each in got] == (
            ["eve"] if permitted and other == "friend" else []
        ), other
    answers = [each.kind for each in eve.take()]
    if permitted:
        assert answers == ([Kind.RECEIPT] if flags & Flag.RECEIPT else [])
    elif kind == Kind.ERROR and not flags & Flag.RECEIPT and flags <= Flag.ACK:
        # An ERROR that can't be delivered is not answered by another, so that no two
        # clients exchange errors without end.
        assert answers in ([], [Kind.ERROR])
    else:
        assert answers[-1:] == [Kind.ERROR]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("to", ["", *OPEN, "bob"])
@pytest.mark.parametrize("topic", TOPICS)
def test_policy_event_reaches_only_permitted_topic(flags: int, to: str, topic: str) -> None:
    """Eve's events arrive under open.> only, with its name as sender, and never if the
    frame names a recipient.
    """
    _, peers = network()

    peers["eve"].send_bytes(envelope_of(Kind.EVENT, flags, to, topic))

    permitted = topic == "open.x" and not to and flags < Flag.ACK
    for other in ("bob", "friend", "pool", "root"):
        got = [(each.name, each.topic) for each in peers[other].take()]
        assert got == ([("eve", topic)] if permitted else []), other


@pytest.mark.parametrize(
    "topic",
    [
        "closed.x",
        "closed.>",
        "*.x",
        ">",
        "*",
        "open",
        "$broker.>",
        "$broker.online.bob",
        "$broker.*.*",
        "open.>",
        "open.*",
    ],
)
@pytest.mark.parametrize("group", [None, "workers"])
def test_policy_subscription_receives_only_permitted_topics(topic: str, group: str | None) -> None:
    """A pattern that could match one forbidden topic is denied as a whole."""
    net, peers = network()
    eve = peers["eve"]

    eve.op("subscribe", topic=topic, group=group)

    (answer,) = eve.take()
    assert (answer.kind is Kind.REPLY) == (topic in ("open.>", "open.*"))
    peers["bob"].publish("closed.x")
    peers["bob"].publish("open.x", b"for all")
    net.connect("pool")
    allowed = [b"for all"] if answer.kind is Kind.REPLY else []
    assert eve.payloads() == allowed


@pytest.mark.parametrize("op", sorted(operations_module._ADMIN))
@pytest.mark.parametrize("flags", [0, Flag.RECEIPT, Flag.EXTENSION], ids=str)
def test_policy_admin_operation_without_admin_is_denied(op: str, flags: int) -> None:
    """Every operation for administrators is denied to eve, whatever its arguments, and
    has no effect.
    """
    net, peers = network(send_to=("*",), publish=(">",), subscribe=(">", "$broker.>"))
    eve = peers["eve"]
    arguments = {
        "address": "bob",
        "sender": "eve",
        "verb": "send",
        "target": "bob",
        "admin": True,
        "name": "root",
    }

    eve.send(
        Envelope(
            Kind.REQUEST,
            5,
            BROKER,
            json.dumps({"op": op, **arguments}).encode(),
            codec=2,
            flags=flags,
        )
    )

    answers = eve.take()
    assert answers[-1].kind is Kind.ERROR
    assert json.loads(answers[-1].payload)["code"] == "denied"
    assert not net.broker.operations.admin_commands
    assert not peers["bob"].gone


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.REQUEST])
def test_policy_frame_other_than_request_is_no_operation(kind: Kind) -> None:
    """No other kind of frame makes the broker do anything, even from an administrator."""
    net, peers = network()
    payload = json.dumps({"op": "drain"}).encode()

    peers["root"].send(
        Envelope(kind, 5, "" if kind is Kind.EVENT else BROKER, payload, codec=2, topic="a")
    )

    assert not net.broker.operations.admin_commands
    assert not net.broker.status.draining


@pytest.mark.parametrize("claim", ["bob", "friend", "$broker", "eve/0", "root"])
def test_policy_sender_name_is_set_by_broker(claim: str) -> None:
    """Nothing that eve writes becomes the sender that its friend sees."""
    _, peers = network()
    extension = {"sender": claim, "from": claim, "name": claim}

    peers["eve"].send(Envelope(Kind.MESSAGE, 1, "friend", claim.encode(), extension=extension))

    (got,) = peers["friend"].take()
    assert got.name == "eve"


@pytest.mark.parametrize("kind", [Kind.REPLY, Kind.ERROR])
def test_policy_request_permits_one_answer_to_forbidden_client(kind: Kind) -> None:
    """A request from a client that eve may not send to can be answered once, with its
    id. No other client receives the answer.
    """
    _, peers = network()
    eve, bob = peers["eve"], peers["bob"]
    bob.request("eve", message_id=9)
    eve.take()

    eve.send(Envelope(kind, 8, "bob", b"another id"))
    eve.send(Envelope(kind, 9, "pool", b"another one"))
    assert not bob.take()
    assert not peers["pool"].take()
    eve.send(Envelope(kind, 9, "bob", b"the answer"))
    eve.send(Envelope(kind, 9, "bob", b"once more"))

    assert bob.payloads() == [b"the answer"]


def test_policy_after_reload_overrides_cached_route() -> None:
    """The route cache is cleared when a reload removes the right, even during a read."""
    net, peers = network(send_to=("bob",))
    eve, bob = peers["eve"], peers["bob"]
    for _ in range(3):
        eve.message("bob", b"still")
    assert len(bob.take()) == 3
    entries = {name: peer.session.client.config for name, peer in peers.items()}
    net.broker.reconfigure(
        entries | {"eve": client("eve", send_to=())}, net.broker.status.limits, 0.0
    )
    bob.take()

    eve.send_bytes(
        b"".join(
            frame(encode(Envelope(Kind.MESSAGE, message_id, "bob", b"not any more")))
            for message_id in range(3)
        )
    )

    assert not [each for each in bob.take() if each.kind is Kind.MESSAGE]
    assert len(eve.take()) == 3


@pytest.mark.parametrize("to", ["nobody", "bob"])
@pytest.mark.parametrize("extension", [None, {"key": "k"}, {"delay": -1}, {"ttl": 0}])
def test_policy_unknown_name_is_answered_like_denied_name(
    to: str, extension: dict[str, Any] | None
) -> None:
    """A client that may not send to a name does not learn whether it exists, is
    connected, or has a mailbox.
    """
    _, peers = network()
    peers["eve"].message(to, message_id=1, extension=extension)
    (answer,) = peers["eve"].take()
    body = json.loads(answer.payload)
    assert body["code"] == "denied"
    assert body["message"].replace(to, "NAME") == "eve may not send to NAME"


def test_policy_table_covers_every_kind() -> None:
    """A kind added to the protocol fails here: it has to be sent above, and its rights
    decided.
    """
    assert [int(kind) for kind in Kind] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert parse(memoryview(envelope_of(1, 0, "bob"))[4:]).name == "bob"
