"""What becomes of a message: every outcome, every quota, every rule of docs/protocol.md
from "Outcome" on.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_network import FakeNet, Peer, client, error_of

from brokerd.config.values import RateConfig, WhenFull
from brokerd.core import events as events_module
from brokerd.core import replies as replies_module
from brokerd.core.allowance import Allowance
from brokerd.core.broker import CoreLimits
from brokerd_client.wire.envelope import BROKER, HEADER, Envelope, Flag, Kind, encode
from brokerd_client.wire.framing import frame

KINDS = pytest.mark.parametrize("kind", [Kind.MESSAGE, Kind.REQUEST])
EVERY_WAY = pytest.mark.parametrize("when_full", list(WhenFull))


def full(when_full: WhenFull, queue: int = 100, **changes: Any) -> tuple[FakeNet, Peer, Peer]:
    """Return a net with ann, and bob whose queue of 100 bytes holds two messages of 40
    bytes, ids 1 and 2.
    """
    net = FakeNet(client("ann"), client("bob", queue=queue, when_full=when_full, **changes))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.block()
    for id in (1, 2):
        ann.message("bob", b"x" * 21, id, receipt=True)
        assert [(each.kind, each.id) for each in ann.take()] == [(Kind.RECEIPT, id)]
    return net, ann, bob


# Delivery and refusal


@pytest.mark.parametrize("kind", [Kind.MESSAGE, Kind.REQUEST, Kind.REPLY])
def test_a_message_arrives_as_it_was_sent(kind: Kind) -> None:
    """Kind, id, codec and payload are the sender's, the name is the broker's word for
    the sender.
    """
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    if kind is Kind.REPLY:
        bob.request("ann", id=2**64 - 1)
        ann.take()
    ann.send(Envelope(kind, 2**64 - 1, "bob", b"\x00\xff", codec=200))
    assert bob.take() == [Envelope(kind, 2**64 - 1, "ann", b"\x00\xff", codec=200)]
    assert ann.take() == []


@KINDS
@pytest.mark.parametrize("receipt", [False, True])
@pytest.mark.parametrize(
    ("to", "code"),
    [
        ("nobody", "no_such_client"),
        ("nobody/1", "no_such_client"),
        ("cid", "offline"),
        ("bob/1", "offline"),
        ("pool", "offline"),
        ("pool/1", "offline"),
        ("dan", "denied"),
        ("dent", "denied"),
    ],
)
def test_what_can_not_be_delivered_comes_back(
    kind: Kind, receipt: bool, to: str, code: str
) -> None:
    """The ERROR has the id, the code, what a person wants to read, and the recipient;
    nothing else comes.
    """
    net = FakeNet(
        client("ann", send_to=["nobody", "bob", "cid", "pool"]),
        client("bob"),
        client("cid"),
        client("dan"),
        client("pool", connections=2),
    )
    ann, _ = net.connect("ann"), net.connect("bob")
    ann.send(Envelope(kind, 7, to, b"x", flags=Flag.RECEIPT if receipt else 0))
    (error,) = ann.take()
    assert (error.kind, error.id, error.name, error.codec, error.flags) == (
        Kind.ERROR,
        7,
        BROKER,
        2,
        0,
    )
    content = json.loads(error.payload)
    assert (content["code"], content["name"]) == (code, to)
    assert content["message"]
    assert net.broker.replies.refused == {code: 1}


@KINDS
def test_a_receipt_says_that_the_broker_answers_for_it(kind: Kind) -> None:
    """With RECEIPT success is told too; the recipient does not see the flag."""
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.send(Envelope(kind, 9, "bob", b"x", flags=Flag.RECEIPT))
    assert ann.take() == [Envelope(Kind.RECEIPT, 9, BROKER)]
    assert bob.take() == [Envelope(kind, 9, "ann", b"x")]


def test_a_receipt_is_followed_by_an_error_when_the_recipient_goes_without_reading() -> None:
    """What was accepted and not taken is answered: the ERROR is the last word."""
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.block(5)
    ann.message("bob", b"half taken", 1, receipt=True)
    ann.request("bob", b"", 2)
    ann.publish("topic")
    bob.leave()
    assert [(each.kind, each.id) for each in ann.take()] == [
        (Kind.RECEIPT, 1),
        (Kind.ERROR, 1),
        (Kind.ERROR, 2),
    ]


def test_what_the_system_took_is_delivered() -> None:
    """A message taken whole has no ERROR when its recipient goes."""
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.message("bob", b"x", 1)
    bob.leave()
    assert ann.take() == []


@pytest.mark.parametrize(
    "envelope",
    [
        Envelope(Kind.RECEIPT, 3, "bob"),
        Envelope(Kind.ACK, 3, "bob"),
        Envelope(Kind.ACK, 3, ""),
        Envelope(Kind.MESSAGE, 3, "bob", flags=Flag.ACK),
        Envelope(Kind.EVENT, 3, "", topic="t", flags=Flag.ACK),
    ],
)
def test_what_is_not_served_is_unsupported(envelope: Envelope) -> None:
    """Kinds and flags of stored messages are understood and refused; the connection
    lives on.
    """
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.send(envelope)
    assert ann.error() == (3, "unsupported")
    assert bob.take() == []
    assert not ann.gone


def test_one_may_send_to_oneself() -> None:
    """A message to one's own name arrives; it waits in one's own queue, and holds
    oneself when that is full.
    """
    net = FakeNet(client("ann", queue=100))
    ann = net.connect("ann")
    ann.message("ann", b"me", 1, receipt=True)
    assert [(each.kind, each.name) for each in ann.take()] == [
        (Kind.MESSAGE, "ann"),
        (Kind.RECEIPT, BROKER),
    ]
    ann.request("ann", b"?", 2)
    ann.reply("ann", b"!", 2)
    assert ann.payloads() == [b"?", b"!"]
    ann.block()
    for id in range(3, 6):
        ann.message("ann", b"x" * 30, id)
    assert ann.held
    ann.read()
    assert [each.id for each in ann.take()] == [3, 4, 5]
    ann.block()
    ann.message("ann", b"x", 6)
    ann.leave()
    assert not net.leftovers()


# Time to live


@pytest.mark.parametrize("ttl", [1, 0.001, 1e9, 2**31 - 1])
def test_a_message_within_its_ttl_passes(ttl: float) -> None:
    """A message that need not wait passes with any time to live; the extension is the
    sender's.
    """
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.message("bob", b"x", 1, extension={"ttl": ttl, "traceparent": "00-é"})
    (got,) = bob.take()
    assert got.extension == {"ttl": ttl, "traceparent": "00-é"}
    assert ann.take() == []


@pytest.mark.parametrize("kind", [Kind.MESSAGE, Kind.REQUEST, Kind.REPLY, Kind.EVENT])
@pytest.mark.parametrize(
    ("ttl", "code"),
    [
        (0, "expired"),
        (-1, "expired"),
        (0.0, "expired"),
        (-(10**20), "expired"),
        (2**31, "unsupported"),
        (1e300, "unsupported"),
        (10**20, "unsupported"),
        ("5", "unsupported"),
        (None, "unsupported"),
        (True, "unsupported"),
        ([5], "unsupported"),
        ({}, "unsupported"),
    ],
)
def test_a_ttl_that_is_over_or_none(kind: Kind, ttl: Any, code: str) -> None:
    """Without time left a message expires; what is no number of seconds is not guessed
    at.
    """
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    topic, name = ("t", "") if kind is Kind.EVENT else ("", "bob")
    ann.send(Envelope(kind, 4, name, b"x", topic=topic, extension={"ttl": ttl}))
    assert ann.error() == (4, code)
    assert bob.take() == []


@pytest.mark.parametrize("kind", [Kind.MESSAGE, Kind.REQUEST, Kind.REPLY, Kind.ERROR, Kind.EVENT])
def test_extension_nested_too_deeply_is_unsupported(kind: Kind) -> None:
    """Neither end is disconnected, nothing is delivered, and what follows passes; an
    ERROR is not answered by one.
    """
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.ask("subscribe", topic="t")
    parts = (b"", b"\1t") if kind is Kind.EVENT else (b"bob", b"")
    for levels in (33, 976, 20_000):
        raw = b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"
        extension = len(raw).to_bytes(2, "big") + raw
        ann.send_bytes(
            frame(
                HEADER.pack(kind, Flag.EXTENSION, 0, len(parts[0]), 4),
                *parts,
                extension,
                b"payload",
            )
        )
        if kind is Kind.ERROR:
            assert ann.take() == []
        else:
            assert ann.error() == (4, "unsupported")
        assert bob.take() == []
    ann.message("bob", b"next")
    assert bob.payloads() == [b"next"]
    assert ann.session.messages_in == 4


def test_extension_nested_too_deeply_counts_for_the_rate() -> None:
    """A client can't send more of these frames than of others."""
    net = FakeNet(client("ann", rate=RateConfig(2, None)), client("bob"))
    ann = net.connect("ann")
    raw = b'{"a":' + b"[" * 40 + b"]" * 40 + b"}"
    whole = frame(HEADER.pack(1, Flag.EXTENSION, 0, 3, 4), b"bob", len(raw).to_bytes(2, "big"), raw)
    ann.send_bytes(whole * 5)
    assert [error_of(each) for each in ann.take()] == ["unsupported"] * 2 + ["rate_limited"] * 3


def test_a_message_may_expire_while_its_sender_is_held() -> None:
    """Waiting for room takes from the time to live: a message that has some left
    passes, one that has not expires.
    """
    net, ann, bob = full(WhenFull.WAIT)
    ann.message("bob", b"x" * 21, 3, extension={"ttl": 5})
    ann.message("bob", b"x" * 21, 4, extension={"ttl": 5})
    assert ann.held
    net.advance(5)
    bob.read()
    assert ann.error() == (3, "expired")
    assert [each.id for each in bob.take()] == [1, 2, 4]


@given(
    rest=st.dictionaries(
        st.text(max_size=5), st.integers() | st.text() | st.booleans() | st.none(), max_size=5
    )
)
def test_other_extensions_pass_untouched(rest: dict[str, Any]) -> None:
    """Byte for byte, whatever they are."""
    rest.pop("ttl", None)
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    text = json.dumps(rest, indent=1).encode()
    content = struct.pack("!H", len(text)) + text + b"payload"
    ann.send_bytes(frame(struct.pack("!BBBBQ", 1, 2, 0, 3, 1) + b"bob" + content))
    assert bytes(bob.stream) == frame(struct.pack("!BBBBQ", 1, 2, 0, 3, 1) + b"ann" + content)


# Requests


def test_a_reply_is_allowed_to_whom_a_request_is_outstanding_and_once() -> None:
    """Even where send_to forbids; a second REPLY, another id or another client is
    denied.
    """
    net = FakeNet(client("ann"), client("bob", send_to=[]), client("cid"))
    ann, bob, cid = (net.connect(name) for name in ("ann", "bob", "cid"))
    ann.request("bob", b"?", 5)
    assert bob.payloads() == [b"?"]
    bob.reply("ann", b"", 6)
    assert bob.error() == (6, "denied")
    bob.reply("cid", b"", 5)
    assert bob.error() == (5, "denied")
    bob.message("ann", b"", 5)
    bob.take()
    bob.reply("ann", b"!", 5)
    assert ann.payloads() == [b"!"]
    assert not ann.session.outgoing_requests
    bob.reply("ann", b"!", 5)
    assert [error_of(each) for each in bob.take() if each.kind is Kind.ERROR] == ["denied"]
    assert ann.take() == []
    assert cid.take() == []


def test_an_error_may_answer_a_request_too() -> None:
    """A client's ERROR reaches who asked, in the responder's name, and settles the
    request.
    """
    net = FakeNet(client("ann"), client("bob", send_to=[]))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.request("bob", b"?", 5)
    bob.send(Envelope(Kind.ERROR, 5, "ann", b'{"code": "failed"}', codec=2))
    (got,) = ann.take()
    assert (got.kind, got.id, got.name, error_of(got)) == (Kind.ERROR, 5, "bob", "failed")
    assert not bob.session.incoming_requests


def test_an_error_that_can_not_be_delivered_is_answered_only_if_that_was_asked_for() -> None:
    """Errors about errors would go round in circles: without RECEIPT one ends there,
    and is counted.
    """
    net = FakeNet(client("ann", send_to=[]))
    ann = net.connect("ann")
    ann.send(Envelope(Kind.ERROR, 5, BROKER, b"{}"))
    assert ann.take() == []
    assert net.broker.replies.dropped == 1
    ann.send(Envelope(Kind.ERROR, 5, BROKER, b"{}", flags=Flag.RECEIPT))
    assert ann.error() == (5, "unsupported")


@pytest.mark.parametrize("kind", [Kind.REPLY, Kind.ERROR])
@pytest.mark.parametrize("to", ["bob", "nobody", "bob/1", "pool"])
@pytest.mark.parametrize("flags", [0, Flag.RECEIPT])
def test_answer_without_an_outstanding_request_is_denied(kind: Kind, to: str, flags: int) -> None:
    """The answer is not delivered, whatever send_to allows, and its sender's rate
    counts it.
    """
    limited = client("ann", rate=RateConfig(2, None))
    net = FakeNet(limited, client("bob"), client("pool", connections=2))
    ann, bob, pool = net.connect("ann"), net.connect("bob"), net.connect("pool")
    for _ in range(2):
        ann.send(Envelope(kind, 5, to, b"{}", flags=flags))
        assert ann.error() == (5, "denied")
    ann.message("bob", b"", 6)
    assert ann.error() == (6, "rate_limited")
    assert bob.take() == pool.take() == []


def test_a_waiting_error_of_a_client_ends_with_its_recipient() -> None:
    """An ERROR for somebody who goes is nobody's business any more."""
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.request("ann", id=5)
    ann.take()
    bob.block()
    ann.send(Envelope(Kind.ERROR, 5, "bob", b"{}"))
    bob.leave()
    assert ann.take() == []


def test_a_responder_that_goes_leaves_an_error_for_each_request() -> None:
    """A requester hears abandoned of what was taken, and offline of what was not; what
    was answered stays answered.
    """
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    for id in (1, 2):
        ann.request("bob", b"", id)
    bob.reply("ann", b"!", 1)
    bob.block()
    ann.request("bob", b"", 3)
    ann.take()
    bob.leave()
    assert sorted((each.id, error_of(each)) for each in ann.take()) == [
        (2, "abandoned"),
        (3, "offline"),
    ]
    assert not ann.session.outgoing_requests


@pytest.mark.parametrize("connections", [1, 2])
def test_request_of_which_a_part_was_taken_is_not_delivered(connections: int) -> None:
    """A recipient without the last byte of a request cannot have begun with it."""
    net = FakeNet(client("ann"), client("bob", connections=connections))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.request("bob", b"whole", 1)
    bob.block(20)
    ann.request("bob", b"in part", 2)
    bob.leave()
    assert sorted((each.id, error_of(each)) for each in ann.take()) == [
        (1, "abandoned"),
        (2, "offline"),
    ]


def test_a_requester_that_goes_leaves_nothing_behind() -> None:
    """A REPLY to a requester that has left answers no outstanding request."""
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.request("bob", b"", 1)
    bob.take()
    ann.leave()
    assert not bob.session.incoming_requests
    bob.reply("ann", b"!", 1)
    assert bob.error() == (1, "denied")
    bob.leave()
    assert not net.leftovers()


# Full queues


def test_wait_holds_the_sender_until_there_is_room() -> None:
    """Nothing more is read from it; when half of the queue is free everything it sent
    arrives, in order.
    """
    net, ann, bob = full(WhenFull.WAIT)
    for id in (3, 4, 5):
        ann.message("bob", b"x" * 21, id)
    assert ann.held
    assert net.broker.next_deadline == net.now + 30
    bob.read(20)
    assert ann.held, "not half free yet"
    bob.read()
    assert not ann.held
    assert [each.id for each in bob.take()] == [1, 2, 3, 4, 5]
    assert net.broker.next_deadline is None
    assert ann.take() == []


def test_wait_refuses_after_the_timeout_and_at_once_until_half_is_free() -> None:
    """A held message comes back as full; the next ones do at once until half of the
    recipient's queue is free.
    """
    net, ann, bob = full(WhenFull.WAIT)
    ann.message("bob", b"x" * 21, 3)
    net.advance(29.9)
    assert ann.held
    net.advance(0.2)
    assert ann.error() == (3, "full")
    ann.message("bob", b"x" * 21, 4)
    assert ann.error() == (4, "full")
    bob.read(1)
    ann.message("bob", b"x" * 21, 5)
    assert ann.error() == (5, "full")
    bob.read(40)
    ann.message("bob", b"x" * 21, 6)
    ann.message("bob", b"x" * 21, 7)
    assert ann.held


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("taken", [1, 39, 80, 120])
def test_recipient_that_reads_little_holds_its_sender_for_a_small_part_of_the_time(
    taken: int, replaced: bool
) -> None:
    """Whatever it takes every 29 seconds, its sender goes on for most of the time, and
    hears `full` at once.
    """
    net, ann, bob = full(WhenFull.WAIT)
    held = 0.0
    id = 10
    for second in range(2000):
        if second % 29 == 0:
            bob.read(taken)
            if replaced:
                net.hand_over()
        for _ in range(5):
            if not ann.held:
                id += 1
                ann.message("bob", b"x" * 21, id)
        held += ann.held
        ann.take()
        bob.take()
        net.advance(1)
    assert held < 2000 * 0.25


def test_recipient_that_reads_steadily_holds_its_sender_as_often_as_it_likes() -> None:
    """Where half of the queue is read within a tenth of wait_timeout no message comes
    back.
    """
    net, ann, bob = full(WhenFull.WAIT)
    id = 10
    held = 0
    for _ in range(2000):
        for _ in range(5):
            if not ann.held:
                id += 1
                ann.message("bob", b"x" * 21, id)
        held += ann.held
        bob.read(25)
        net.advance(1)
    assert held > 1500
    assert [each for each in ann.take() if each.kind is Kind.ERROR] == []


def test_recipient_that_held_its_sender_earns_time_by_holding_none() -> None:
    """After a long while it may hold a sender for as long as at first."""
    net, ann, bob = full(WhenFull.WAIT)
    ann.message("bob", b"x" * 21, 3)
    net.advance(30)
    bob.read()
    net.advance(300)
    ann.take()
    bob.block()
    for id in (4, 5, 6):
        ann.message("bob", b"x" * 21, id)
    net.advance(29)
    assert ann.held
    net.advance(1)
    assert ann.error() == (6, "full")


def test_recipient_without_time_left_holds_no_sender() -> None:
    """A message for a full queue comes back at once."""
    net, ann, bob = full(WhenFull.WAIT)
    bob.session.allowance = Allowance(30.0, net.now)
    ann.message("bob", b"x" * 21, 3)
    assert ann.error() == (3, "full")
    assert bob.session.outbox.stalled


def test_senders_held_together_count_once() -> None:
    """The time of a recipient is used up by the clock, however many senders it holds."""
    net = FakeNet(client("ann"), client("cid"), client("bob", queue=100))
    ann, cid, bob = net.connect("ann"), net.connect("cid"), net.connect("bob")
    bob.block()
    for id in (1, 2, 3):
        ann.message("bob", b"x" * 21, id)
    net.advance(20)
    cid.message("bob", b"x" * 21, 4)
    assert net.broker.next_deadline == net.now + 10
    net.advance(10)
    assert ann.error() == (3, "full")
    assert cid.error() == (4, "full")
    assert bob.session.allowance is not None
    assert bob.session.allowance.used == 30


def test_a_slow_reader_that_takes_a_little_does_not_extend_the_wait() -> None:
    """The timeout counts from the moment the message was held, though a byte was taken
    meanwhile.
    """
    net, ann, bob = full(WhenFull.WAIT)
    ann.message("bob", b"x" * 21, 3)
    net.now += 30
    net.broker.tick(net.now)
    # Between the end of the wait and the next look at the message.
    bob.read(1)
    assert ann.error() == (3, "full")


def test_who_is_waited_for_may_go() -> None:
    """A sender held for somebody who leaves goes on, and hears of each message."""
    net, ann, bob = full(WhenFull.WAIT)
    ann.message("bob", b"x" * 21, 3)
    bob.leave()
    assert not ann.held
    assert [(each.id, error_of(each)) for each in ann.take()] == [
        (1, "offline"),
        (2, "offline"),
        (3, "offline"),
    ]
    assert not net.broker.held.deadlines


def test_who_is_held_may_go() -> None:
    """A held sender that leaves is waited for by nobody; what it had not got through
    never arrives.
    """
    net, ann, bob = full(WhenFull.WAIT)
    ann.message("bob", b"x" * 21, 3)
    ann.leave()
    assert not bob.session.waiters
    assert net.broker.next_deadline is None
    bob.read()
    assert [each.id for each in bob.take()] == [1, 2]


def test_refuse_answers_at_once() -> None:
    """The message that finds no room comes back as full, a smaller one still passes."""
    _, ann, bob = full(WhenFull.REFUSE)
    ann.message("bob", b"x" * 21, 3)
    assert ann.error() == (3, "full")
    ann.message("bob", b"", 4)
    assert ann.take() == []
    bob.read()
    assert [each.id for each in bob.take()] == [1, 2, 4]


def test_drop_oldest_makes_room_and_tells_who_asked_for_a_receipt() -> None:
    """The oldest go, the newest stays; whoever was promised a RECEIPT, or an answer,
    hears which.
    """
    net, ann, bob = full(WhenFull.DROP_OLDEST)
    ann.message("bob", b"x" * 21, 3)
    assert ann.error() == (1, "full")
    ann.request("bob", b"x" * 21, 4)
    assert ann.error() == (2, "full")
    ann.message("bob", b"x" * 21, 5)
    assert ann.take() == [], "nobody asked after the third"
    ann.message("bob", b"x" * 21, 6)
    assert ann.error() == (4, "full")
    assert not ann.session.outgoing_requests
    assert not bob.session.incoming_requests
    assert net.broker.replies.dropped == 4
    bob.read()
    assert [each.id for each in bob.take()] == [5, 6]


def test_drop_oldest_tells_nobody_who_is_gone() -> None:
    """A dropped message of somebody who left is counted, and its successor hears
    nothing.
    """
    net, ann, _ = full(WhenFull.DROP_OLDEST)
    ann.request("bob", b"", 3)
    ann.leave()
    again = net.connect("ann")
    for id in range(1, 5):
        again.message("bob", b"x" * 50, id)
    assert again.take() == []


def test_disconnect_ends_who_does_not_read() -> None:
    """The recipient is cut off; the message comes back as full, what waited as offline."""
    _, ann, bob = full(WhenFull.DISCONNECT)
    ann.message("bob", b"x" * 21, 3)
    assert bob.gone == "queue is full and the client does not read"
    assert sorted((each.id, error_of(each)) for each in ann.take()) == [
        (1, "offline"),
        (2, "offline"),
        (3, "full"),
    ]


@EVERY_WAY
def test_a_client_that_reads_never_meets_its_quota(when_full: WhenFull) -> None:
    """More than the queue in one go is no reason to hold, drop or refuse while the
    recipient takes it.
    """
    net = FakeNet(client("ann"), client("bob", queue=100, when_full=when_full))
    ann, bob = net.connect("ann"), net.connect("bob")
    one = frame(encode(Envelope(Kind.MESSAGE, 1, "bob", b"x" * 30)))
    ann.send_bytes(one * 50 + frame(encode(Envelope(Kind.MESSAGE, 2, "bob", b"x" * 500))))
    assert len(bob.take()) == 51
    assert ann.take() == []


@EVERY_WAY
def test_an_event_for_a_full_subscriber(when_full: WhenFull) -> None:
    """No publisher is held: the subscriber misses the event, or what when_full says;
    the others get it at once.
    """
    net, ann, bob = full(when_full)
    net.broker.reconfigure(
        {
            "ann": client("ann"),
            "bob": client("bob", queue=100, when_full=when_full),
            "cid": client("cid"),
        },
        net.broker.status.limits,
        net.now,
    )
    cid = net.connect("cid")
    cid.ask("subscribe", topic="t")
    # bob can't be answered while it does not read, but it is heard.
    bob.op("subscribe", topic="t")
    ann.publish("t", b"event", 9, receipt=True)
    assert not ann.held
    assert cid.payloads() == [b"event"]
    assert (Kind.RECEIPT, 9) in [(each.kind, each.id) for each in ann.take()]
    assert bool(bob.gone) is (when_full is WhenFull.DISCONNECT)
    if not bob.gone:
        bob.read()
        assert (b"event" in bob.payloads()) is (when_full is WhenFull.DROP_OLDEST)
    assert net.broker.replies.dropped == {WhenFull.DROP_OLDEST: 2}.get(when_full, 1)


def test_an_event_for_many_who_read_is_flushed_first() -> None:
    """Subscribers whose outbox is full of what is about to be written are written to,
    not judged.
    """
    net = FakeNet(
        client("ann"),
        *(client(name, queue=60, when_full=WhenFull.REFUSE) for name in ("bob", "cid")),
    )
    ann, bob, cid = (net.connect(name) for name in ("ann", "bob", "cid"))
    for each in (bob, cid):
        each.ask("subscribe", topic="t")
    ann.send_bytes(frame(encode(Envelope(Kind.EVENT, 1, "", b"x" * 30, topic="t"))) * 10)
    assert len(bob.take()) == len(cid.take()) == 10


def test_a_sender_that_does_not_read_its_errors_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers may exceed the queue by the reserve; then nothing is read from the sender
    until it reads.
    """
    monkeypatch.setattr(replies_module, "OUTCOME_RESERVE", 500)
    net = FakeNet(client("ann", queue=100))
    ann = net.connect("ann")
    ann.block()
    for id in range(20):
        ann.message("nobody", b"", id)
    assert ann.held
    assert 600 < ann.session.outbox.waiting < 800
    assert net.broker.next_deadline == float("inf")
    net.advance(1e6)
    assert ann.held
    ann.read()
    assert [each.id for each in ann.take()] == list(range(20))
    assert not ann.held


def test_a_sender_that_reads_is_not_held_by_its_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many errors in one go are written in between."""
    monkeypatch.setattr(replies_module, "OUTCOME_RESERVE", 500)
    net = FakeNet(client("ann", queue=100))
    ann = net.connect("ann")
    ann.send_bytes(frame(encode(Envelope(Kind.MESSAGE, 1, "nobody"))) * 100)
    assert len(ann.take()) == 100


def test_a_closing_client_is_not_waited_for() -> None:
    """Nobody is held for somebody whose connection is about to end."""
    net, ann, bob = full(WhenFull.WAIT)
    bob.send_bytes(b"\xff\xff\xff\x00")
    assert bob.session.closing
    ann.message("bob", b"x" * 21, 3)
    assert ann.error() == (3, "full")
    net.broker.replies.close(bob.session, "another reason", cut=True)
    net.settle()
    assert bob.gone == "malformed"


# Events


def test_an_event_goes_once_to_each_connection() -> None:
    """However many of its subscriptions match, its own publisher included; nobody
    subscribed is no error.
    """
    net = FakeNet(client("ann"), client("bob"), client("pool", connections=2))
    ann, bob, one, two = (net.connect(name) for name in ("ann", "bob", "pool", "pool"))
    for peer, pattern in (
        (ann, "a.b"),
        (bob, "a.*"),
        (bob, ">"),
        (bob, "a.b"),
        (one, "a.>"),
        (two, "x"),
    ):
        peer.ask("subscribe", topic=pattern)
    ann.publish("a.b", b"event", 3, receipt=True, extension={"k": 1}, codec=7)
    expected = Envelope(
        Kind.EVENT,
        3,
        "ann",
        b"event",
        codec=7,
        flags=Flag.EXTENSION,
        topic="a.b",
        extension={"k": 1},
    )
    assert bob.take() == one.take() == [expected]
    assert ann.take() == [expected, Envelope(Kind.RECEIPT, 3, BROKER)]
    assert two.take() == []
    ann.publish("nobody.wants.it", b"", 4, receipt=True)
    assert ann.take() == [Envelope(Kind.RECEIPT, 4, BROKER)]
    ann.publish("nobody.wants.it", b"", 5)
    assert ann.take() == []


def test_one_member_of_a_group_gets_each_event() -> None:
    """Members take turns; who has more waiting is passed over; who gets it anyway
    counts as the group's.
    """
    net = FakeNet(client("ann"), client("pool", connections=3))
    ann = net.connect("ann")
    members = [net.connect("pool") for _ in range(3)]
    for member in members:
        member.ask("subscribe", topic="t", group="g")
    for _ in range(6):
        ann.publish("t")
    assert [len(member.take()) for member in members] == [2, 2, 2]
    members[0].block()
    ann.message(members[0].address, b"x" * 100)
    for _ in range(6):
        ann.publish("t")
    got = [len(member.take()) for member in members]
    assert got[0] == 0
    assert min(got[1:]) >= 2
    assert sum(got) == 6
    members[1].ask("subscribe", topic="t")
    for _ in range(6):
        ann.publish("t")
    assert [len(member.take()) for member in members] == [0, 6, 0]


@pytest.mark.parametrize("topic", ["other", "$broker.online.ann", "$x"])
def test_publishing_outside_the_rules_is_denied(topic: str) -> None:
    """As is publishing on any topic of the broker's own."""
    net = FakeNet(client("ann", publish=["jobs.>", "$broker.>"]), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.ask("subscribe", topic=">")
    ann.publish(topic, b"", 3)
    assert ann.error() == (3, "denied")
    ann.publish("jobs.new")
    assert len(bob.take()) == 1


def test_remembered_events_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher on ever new topics does not fill the memory."""
    monkeypatch.setattr(events_module, "_REMEMBERED_OUTBOXES", 3)
    monkeypatch.setattr(events_module, "_SMALL_FANOUT", 1)
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.ask("subscribe", topic=">")
    for number in range(10):
        ann.publish(f"t{number}")
        assert len(ann.session.fanouts) <= 3
    assert len(bob.take()) == 10


def test_publishers_share_what_is_remembered_of_a_topic() -> None:
    """However many publish on a topic, its subscribers are kept once."""
    net = FakeNet(client("ann"), client("bob"), client("carol"))
    ann, bob, carol = net.connect("ann"), net.connect("bob"), net.connect("carol")
    carol.ask("subscribe", topic="a")
    ann.publish("a")
    bob.publish("a")
    assert ann.session.fanouts[b"a"] is bob.session.fanouts[b"a"]


def test_what_is_remembered_of_a_topic_ends_with_another_kind_of_queue() -> None:
    """After a reload that changes how a subscriber's queue is kept, events still
    arrive, and in it.
    """
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.ask("subscribe", topic="a")
    ann.publish("a", b"1")
    entries = {"ann": client("ann"), "bob": client("bob", when_full=WhenFull.DROP_OLDEST)}
    net.broker.reconfigure(entries, net.broker.status.limits, 0.0)
    ann.publish("a", b"2")
    ann.publish("a", b"3")
    assert [event.payload for event in bob.take()] == [b"1", b"2", b"3"]
    assert ann.session.fanouts == {}


# What a client may have the broker keep in mind


def test_subscriptions_are_limited() -> None:
    """One more than allowed is refused and named; repeating one, or ending one first,
    is not.
    """
    net = FakeNet(client("ann", subscriptions=2))
    ann = net.connect("ann")
    ann.ask("subscribe", topic="a")
    ann.ask("subscribe", topic="b", group="g")
    with pytest.raises(AssertionError, match="full"):
        ann.ask("subscribe", topic="c")
    assert ann.ask("subscribe", topic="b", group="g") == {"topic": "b", "group": "g"}
    ann.ask("unsubscribe", topic="a")
    ann.ask("subscribe", topic="c")
    assert len(net.broker.topics) == 2


def test_unanswered_requests_are_limited() -> None:
    """One more than allowed ends the oldest, which is told to its sender; an answer to
    it is then any message.
    """
    net = FakeNet(client("ann", requests=2), client("bob", send_to=()))
    ann, bob = net.connect("ann"), net.connect("bob")
    for id in (1, 2, 3):
        ann.request("bob", id=id)
    assert ann.error() == (1, "expired")
    assert len(ann.session.outgoing_requests) == len(bob.session.incoming_requests) == 2
    bob.take()
    bob.reply("ann", id=1)
    assert bob.error() == (1, "denied")
    bob.reply("ann", b"2", id=2)
    bob.reply("ann", b"3", id=3)
    assert [reply.payload for reply in ann.take()] == [b"2", b"3"]
    assert not ann.session.outgoing_requests
    assert not bob.session.incoming_requests


# Presence


def test_presence_is_told_and_agrees_with_the_list() -> None:
    """The first connection of a name and the end of its last one are events, and
    `clients` says the same.
    """
    net = FakeNet(client("ann"), client("pool", connections=2))
    ann = net.connect("ann")
    ann.ask("subscribe", topic="$broker.>")
    one, two = net.connect("pool"), net.connect("pool")
    net.advance(3)
    one.leave()
    listed = ann.take()
    assert [(each.topic, json.loads(each.payload)) for each in listed] == [
        ("$broker.online.pool", {"name": "pool", "since": 1000.0})
    ]
    assert (listed[0].name, listed[0].codec) == (BROKER, 2)
    two.leave()
    (offline,) = ann.take()
    assert (offline.topic, json.loads(offline.payload)) == (
        "$broker.offline.pool",
        {"name": "pool", "since": 1003.0},
    )
    assert {"name": "pool", "online": False, "since": 1003.0} in ann.ask("clients")["clients"]


def test_presence_is_filtered_by_what_one_may_see() -> None:
    """Who may not send to a client hears nothing of it, in events as in the list."""
    net = FakeNet(client("ann", send_to=["bob"]), client("bob"), client("cid"))
    ann = net.connect("ann")
    ann.ask("subscribe", topic="$broker.>")
    net.connect("cid").leave()
    net.connect("bob").leave()
    assert [each.topic for each in ann.take()] == ["$broker.online.bob", "$broker.offline.bob"]
    assert [each["name"] for each in ann.ask("clients")["clients"]] == ["bob"]


def test_a_subscriber_to_presence_that_does_not_read_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It asked to miss nothing: an end that it can see is better than a gap that it
    can't.
    """
    monkeypatch.setattr(replies_module, "OUTCOME_RESERVE", 300)
    net = FakeNet(client("ann", queue=100), client("bob"))
    ann = net.connect("ann")
    ann.ask("subscribe", topic="$broker.>")
    ann.block()
    for _ in range(10):
        net.connect("bob").leave()
    assert ann.gone == "it subscribed to events of the broker and does not read them"


def test_lifecycle_is_told_to_whoever_subscribed() -> None:
    """A new configuration and a drain are events; a drain is told once."""
    net = FakeNet(client("ann", send_to=[]))
    ann = net.connect("ann")
    ann.ask("subscribe", topic="$broker.*")
    net.broker.reconfigure({"ann": client("ann", send_to=[])}, net.broker.status.limits, net.now)
    net.broker.drain()
    net.broker.drain()
    net.settle()
    assert [each.topic for each in ann.take()] == ["$broker.reloaded", "$broker.draining"]


# Draining, reloading


def test_a_draining_broker_takes_nothing_new() -> None:
    """Messages and events are refused and nobody is let in; a REPLY somebody waits for,
    and questions, pass.
    """
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.request("bob", b"?", 1)
    bob.take()
    bob.block()
    ann.message("bob", b"waits", 2)
    net.broker.drain()
    ann.message("bob", b"", 3)
    assert ann.error() == (3, "shutting_down")
    ann.publish("t", b"", 4)
    assert ann.error() == (4, "shutting_down")
    bob.reply("ann", b"!", 1)
    assert ann.payloads() == [b"!"]
    assert ann.ask("ping") == {}
    bob.read()
    assert bob.payloads() == [b"waits"]
    bob.leave()
    assert net.try_connect("bob") is None


@pytest.mark.parametrize("changed_names", [None, ["bob", "ann"]])
def test_a_reload_ends_subscriptions_that_are_no_longer_allowed(
    changed_names: list[str] | None,
) -> None:
    """The others stay; a client that is gone from the configuration is returned to be
    closed; a rate starts.
    """
    net = FakeNet(client("ann"), client("bob"), client("cid"))
    ann, bob, cid = (net.connect(name) for name in ("ann", "bob", "cid"))
    for topic in ("a.b", "b"):
        bob.ask("subscribe", topic=topic)
    changed = {
        "ann": client("ann", rate=RateConfig(2, None)),
        "bob": client("bob", subscribe=["a.*"]),
    }
    assert net.broker.reconfigure(changed, net.broker.status.limits, net.now, changed_names) == [
        cid.session
    ]
    net.broker.replies.close(cid.session, "gone from the configuration")
    net.settle()
    assert cid.gone
    for topic in ("a.b", "b", "a.b"):
        ann.publish(topic, b"", 5)
    assert [each.topic for each in bob.take()] == ["a.b"]
    assert ann.error() == (5, "rate_limited")


def test_a_session_ends_once() -> None:
    """Ending it again changes nothing, and answers to it go nowhere."""
    net = FakeNet(client("ann"))
    ann = net.connect("ann")
    session = ann.session
    ann.leave()
    net.broker.detach(session, net.now)
    net.broker.replies.answer(session, Envelope(Kind.RECEIPT, 1, BROKER))
    net.broker.replies.close(session, "again")
    net.settle()
    assert session.outbox.waiting == 0
    assert not net.leftovers()


def test_payload_limits_are_the_configurations() -> None:
    """A smaller max_message of a reload counts from the next frame on."""
    net = FakeNet(client("ann"), client("bob"), limits=CoreLimits(max_message=100))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.message("bob", b"x" * 100, 1)
    net.broker.reconfigure(
        {name: client(name) for name in ("ann", "bob")}, CoreLimits(max_message=99), net.now
    )
    ann.message("bob", b"x" * 100, 2)
    assert ann.error() == (2, "too_large")
    assert [each.id for each in bob.take()] == [1]


def test_nobody_of_a_group_hears_of_whom_none_may_see() -> None:
    """A group none of whose members may send to a client gets no word of its coming and
    going.
    """
    net = FakeNet(client("ann", send_to=[]), client("bob"))
    ann = net.connect("ann")
    ann.ask("subscribe", topic="$broker.>", group="g")
    net.connect("bob").leave()
    assert ann.take() == []


def test_a_drain_ends_the_waiting_for_room() -> None:
    """Who is held when the drain begins is not kept until its timeout: its message is
    refused.
    """
    net, ann, _ = full(WhenFull.WAIT)
    ann.message("bob", b"x" * 21, 3)
    net.broker.drain()
    net.settle()
    assert ann.error() == (3, "shutting_down")


def test_what_a_session_leaves_behind_is_answered_for_in_slices() -> None:
    """A long queue and many requests, given back at once, would hold up everybody else."""
    net = FakeNet(client("a"), client("b"))
    alice, bob = net.connect("a"), net.connect("b")
    for id in range(20):
        alice.request("b", b"taken", id)
    bob.block()
    for id in range(20, 50):
        alice.message("b", b"waiting", id)
    alice.take()
    broker = net.broker
    net.peers.remove(bob)
    broker.detach(bob.session, net.now)
    assert (broker.has_deferred_work, broker.replies.refused.total()) == (True, 0)
    done = 0
    while broker.has_deferred_work:
        broker.run_deferred(7)
        assert broker.replies.refused.total() - done <= 7
        done = broker.replies.refused.total()
    net.settle()
    assert [envelope.id for envelope in alice.take()] == [*range(20, 50), *range(20)]


def test_the_subscriptions_of_who_is_gone_are_put_away_in_slices() -> None:
    """Ten thousand of them at once would hold up everybody else; nothing is sent to it
    meanwhile.
    """
    net = FakeNet(client("a"), client("b"))
    alice, bob = net.connect("a"), net.connect("b")
    for number in range(50):
        bob.ask("subscribe", topic=f"t.{number}")
    alice.ask("subscribe", topic="t.*")
    broker = net.broker
    net.peers.remove(bob)
    broker.detach(bob.session, net.now)
    assert (broker.has_deferred_work, len(broker.topics), bob.session.subscriptions) == (
        True,
        1,
        set(),
    )
    assert list(broker.topics.find("t.7").everyone) == [alice.session]
    slices = 0
    while broker.has_deferred_work:
        broker.run_deferred(7)
        slices += 1
    assert slices >= 50 // 7
    net.settle()
    alice.publish("t.7", b"x")
    assert alice.payloads() == [b"x"]


def test_a_request_to_a_successor_is_not_taken_for_one_to_its_predecessor() -> None:
    """While what the old connection left is answered for, a request under the same id
    goes to the new one, and back.
    """
    net = FakeNet(client("a"), client("b"))
    alice, bob = net.connect("a"), net.connect("b")
    alice.request("b", id=1)
    broker = net.broker
    net.peers.remove(bob)
    broker.detach(bob.session, net.now)
    # Nothing is carried out in between: what bob left is still to be answered for.
    net._settling = True
    new_process = net.connect("b")
    alice.request("b", id=1)
    net._settling = False
    net.settle()
    assert alice.error() == (1, "abandoned")
    assert alice.session.outgoing_requests == {(1, "b"): new_process.session}
    new_process.take()
    new_process.reply("a", b"here", id=1)
    assert alice.payloads() == [b"here"]
    assert not alice.session.outgoing_requests
    assert not new_process.session.incoming_requests


def test_a_successor_does_not_hear_what_its_predecessor_sent() -> None:
    """Also when it comes while the frames are being given back."""
    net = FakeNet(client("a"), client("b"))
    alice, bob = net.connect("a"), net.connect("b")
    bob.block()
    for id in range(10):
        alice.message("b", b"waiting", id)
    broker = net.broker
    net.peers.remove(bob)
    broker.detach(bob.session, net.now)
    broker.run_deferred(3)
    net.peers.remove(alice)
    broker.detach(alice.session, net.now)
    new_process = broker.attach("a", "i9", peer="test", now_wall=net.now)
    while broker.has_deferred_work:
        broker.run_deferred(3)
    assert new_process.errors_in == 0
    assert broker.replies.dropped == 7
