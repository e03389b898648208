"""The outcome of every message: each quota and each rule of docs/protocol.md from
"Outcome" on.
"""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_network import FakeNet, Peer, client, error_of

from brokerd.config.values import RateConfig, WhenFull
from brokerd.core import replies as replies_module
from brokerd.core.allowance import Allowance
from brokerd.core.broker import CoreLimits
from brokerd.core.routing_result import RoutingResult
from brokerd_client.wire.envelope import BROKER, HEADER, Envelope, Flag, Kind, encode
from brokerd_client.wire.framing import frame

KINDS = pytest.mark.parametrize("kind", [Kind.MESSAGE, Kind.REQUEST])
EVERY_WHEN_FULL = pytest.mark.parametrize("when_full", list(WhenFull))


def full(when_full: WhenFull, queue: int = 100, **changes: Any) -> tuple[FakeNet, Peer, Peer]:
    """Return a net with ann and bob. bob's queue of 100 bytes holds two messages of 40
    bytes, with the ids 1 and 2.
    """
    net = FakeNet(client("ann"), client("bob", queue=queue, when_full=when_full, **changes))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.block()
    for message_id in (1, 2):
        ann.message("bob", b"x" * 21, message_id, receipt=True)
        assert [(each.kind, each.id) for each in ann.take()] == [(Kind.RECEIPT, message_id)]
    return net, ann, bob


# Delivery and refusal


@pytest.mark.parametrize("kind", [Kind.MESSAGE, Kind.REQUEST, Kind.REPLY])
def test_message_keeps_kind_id_codec_and_payload(kind: Kind) -> None:
    """Kind, id, codec and payload are the sender's; the broker fills in the name of the
    sender.
    """
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    if kind is Kind.REPLY:
        bob.request("ann", message_id=2**64 - 1)
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
def test_message_undeliverable_is_answered_by_error(
    kind: Kind, receipt: bool, to: str, code: str
) -> None:
    """The ERROR has the id, the code, a readable message, and the recipient; nothing
    else is sent.
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
def test_message_with_receipt_flag_is_confirmed(kind: Kind) -> None:
    """With the flag RECEIPT the sender is told of success too; the recipient does not
    see the flag.
    """
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.send(Envelope(kind, 9, "bob", b"x", flags=Flag.RECEIPT))
    assert ann.take() == [Envelope(Kind.RECEIPT, 9, BROKER)]
    assert bob.take() == [Envelope(kind, 9, "ann", b"x")]


def test_receipt_recipient_leaves_without_reading_is_followed_by_error() -> None:
    """A message that was accepted and not read is answered: the ERROR is the final
    outcome.
    """
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


def test_message_written_whole_has_no_error_at_disconnect() -> None:
    """A message written whole to the socket gets no ERROR when its recipient
    disconnects.
    """
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.message("bob", b"x", 1)
    bob.leave()
    assert ann.take() == []


@pytest.mark.parametrize("kind", [Kind.OPEN, Kind.JOIN])
def test_frame_of_channels_behind_another_frame_is_unsupported(kind: Kind) -> None:
    """OPEN and JOIN are refused where they do not begin a connection, which stays open."""
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.message("bob", b"1", 1)
    ann.send(Envelope(kind, 3, "bob"))
    assert ann.error() == (3, "unsupported")
    ann.message("bob", b"2", 4)
    assert [each.payload for each in bob.take()] == [b"1", b"2"]


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
def test_frame_of_stored_messages_is_unsupported(envelope: Envelope) -> None:
    """Kinds and flags of stored messages are understood and refused; the connection
    stays open.
    """
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.send(envelope)
    assert ann.error() == (3, "unsupported")
    assert bob.take() == []
    assert not ann.gone


def test_message_to_own_name_is_delivered_and_may_hold_its_sender() -> None:
    """A client may send to its own name. The message waits in its own queue, and the
    client is held when that queue is full.
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
    for message_id in range(3, 6):
        ann.message("ann", b"x" * 30, message_id)
    assert ann.held
    ann.read()
    assert [each.id for each in ann.take()] == [3, 4, 5]
    ann.block()
    ann.message("ann", b"x", 6)
    ann.leave()
    assert not net.leftovers()


# Time to live


@pytest.mark.parametrize("ttl", [1, 0.001, 1e9, 2**31 - 1])
def test_message_within_ttl_is_delivered(ttl: float) -> None:
    """A message that need not wait is delivered with any ttl; its extension is
    unchanged.
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
def test_message_ttl_over_or_invalid_is_refused(kind: Kind, ttl: Any, code: str) -> None:
    """A message whose ttl is over expires. A ttl that is not a valid number of seconds
    is refused, not guessed at.
    """
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    topic, name = ("t", "") if kind is Kind.EVENT else ("", "bob")
    ann.send(Envelope(kind, 4, name, b"x", topic=topic, extension={"ttl": ttl}))
    assert ann.error() == (4, code)
    assert bob.take() == []


@pytest.mark.parametrize("kind", [Kind.MESSAGE, Kind.REQUEST, Kind.REPLY, Kind.ERROR, Kind.EVENT])
def test_extension_nested_too_deeply_is_unsupported(kind: Kind) -> None:
    """Neither end is disconnected, nothing is delivered, and the next message passes.
    An ERROR frame is not answered by another ERROR.
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


def test_extension_nested_too_deeply_counts_for_rate() -> None:
    """A client can't send more frames with such an extension than its rate allows."""
    net = FakeNet(client("ann", rate=RateConfig(2, None)), client("bob"))
    ann = net.connect("ann")
    raw = b'{"a":' + b"[" * 40 + b"]" * 40 + b"}"
    whole = frame(HEADER.pack(1, Flag.EXTENSION, 0, 3, 4), b"bob", len(raw).to_bytes(2, "big"), raw)
    ann.send_bytes(whole * 5)
    assert [error_of(each) for each in ann.take()] == ["unsupported"] * 2 + ["rate_limited"] * 3


def test_message_ttl_over_while_sender_is_held_expires() -> None:
    """Waiting for room uses up the ttl: a message with time left is delivered, one
    without expires.
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
    extension=st.dictionaries(
        st.text(max_size=5), st.integers() | st.text() | st.booleans() | st.none(), max_size=5
    )
)
def test_extension_without_ttl_is_passed_on_unchanged(extension: dict[str, Any]) -> None:
    """An extension without a key that the broker knows arrives byte for byte as it was
    sent.
    """
    for known in ("ttl", "key", "delay"):
        extension.pop(known, None)
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    text = json.dumps(extension, indent=1).encode()
    content = struct.pack("!H", len(text)) + text + b"payload"
    ann.send_bytes(frame(struct.pack("!BBBBQ", 1, 2, 0, 3, 1) + b"bob" + content))
    assert bytes(bob.stream) == frame(struct.pack("!BBBBQ", 1, 2, 0, 3, 1) + b"ann" + content)


# Requests


def test_reply_only_to_pending_request_is_delivered_once() -> None:
    """A REPLY to a pending request is delivered even if send_to forbids it. A second
    REPLY, another id or another client is denied.
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


def test_request_answered_by_error_of_client_is_over() -> None:
    """A client's ERROR reaches the requester in the responder's name, and ends the
    request.
    """
    net = FakeNet(client("ann"), client("bob", send_to=[]))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.request("bob", b"?", 5)
    bob.send(Envelope(Kind.ERROR, 5, "ann", b'{"code": "failed"}', codec=2))
    (got,) = ann.take()
    assert (got.kind, got.id, got.name, error_of(got)) == (Kind.ERROR, 5, "bob", "failed")
    assert not bob.session.incoming_requests


def test_error_undeliverable_is_answered_only_with_receipt_flag() -> None:
    """Errors about errors could circulate without end. Without RECEIPT an undeliverable
    ERROR is only counted.
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
def test_answer_without_pending_request_is_denied(kind: Kind, to: str, flags: int) -> None:
    """The answer is not delivered, whatever send_to allows, and counts for its sender's
    rate.
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


def test_error_waiting_for_disconnected_requester_is_discarded() -> None:
    """A client's ERROR that waits for a requester is discarded when the requester
    disconnects; its sender is not told.
    """
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.request("ann", message_id=5)
    ann.take()
    bob.block()
    ann.send(Envelope(Kind.ERROR, 5, "bob", b"{}"))
    bob.leave()
    assert ann.take() == []


def test_responder_disconnected_ends_each_request_with_error() -> None:
    """A requester receives abandoned for requests that were read, and offline for those
    that were not. An answered request stays answered.
    """
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    for message_id in (1, 2):
        ann.request("bob", b"", message_id)
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
def test_request_written_in_part_counts_as_not_delivered(connections: int) -> None:
    """A recipient without the last byte of a request cannot have begun to process it."""
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


def test_requester_disconnected_leaves_no_pending_request() -> None:
    """A REPLY to a requester that has left answers no pending request."""
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


def test_sender_held_goes_on_when_half_of_queue_is_free() -> None:
    """With when_full: wait, nothing more is read from the sender. When half of the
    queue is free, everything it sent arrives in order.
    """
    net, ann, bob = full(WhenFull.WAIT)
    for message_id in (3, 4, 5):
        ann.message("bob", b"x" * 21, message_id)
    assert ann.held
    assert net.broker.next_deadline == net.now + 30
    bob.read(20)
    assert ann.held, "not half free yet"
    bob.read()
    assert not ann.held
    assert [each.id for each in bob.take()] == [1, 2, 3, 4, 5]
    assert net.broker.next_deadline is None
    assert ann.take() == []


def test_sender_held_for_wait_timeout_is_refused() -> None:
    """The held message is refused as full after the timeout. The next ones are refused
    at once until half of the recipient's queue is free.
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
def test_recipient_reading_little_holds_sender_for_small_part_of_time(
    taken: int, replaced: bool
) -> None:
    """However much the recipient reads every 29 seconds, its sender is held for little
    of the time. It gets `full` at once.
    """
    net, ann, bob = full(WhenFull.WAIT)
    held = 0.0
    message_id = 10
    for second in range(2000):
        if second % 29 == 0:
            bob.read(taken)
            if replaced:
                net.hand_over()
        for _ in range(5):
            if not ann.held:
                message_id += 1
                ann.message("bob", b"x" * 21, message_id)
        held += ann.held
        ann.take()
        bob.take()
        net.advance(1)
    assert held < 2000 * 0.25


def test_recipient_reading_steadily_holds_sender_without_limit() -> None:
    """If half of the queue is read within a tenth of wait_timeout, no message is
    refused.
    """
    net, ann, bob = full(WhenFull.WAIT)
    message_id = 10
    held = 0
    for _ in range(2000):
        for _ in range(5):
            if not ann.held:
                message_id += 1
                ann.message("bob", b"x" * 21, message_id)
        held += ann.held
        bob.read(25)
        net.advance(1)
    assert held > 1500
    assert [each for each in ann.take() if each.kind is Kind.ERROR] == []


def test_recipient_holding_no_sender_earns_hold_time() -> None:
    """After a long time without holding a sender, a recipient may hold one for the
    whole timeout again.
    """
    net, ann, bob = full(WhenFull.WAIT)
    ann.message("bob", b"x" * 21, 3)
    net.advance(30)
    bob.read()
    net.advance(300)
    ann.take()
    bob.block()
    for message_id in (4, 5, 6):
        ann.message("bob", b"x" * 21, message_id)
    net.advance(29)
    assert ann.held
    net.advance(1)
    assert ann.error() == (6, "full")


def test_recipient_without_hold_time_left_refuses_at_once() -> None:
    """A message for its full queue is refused at once."""
    net, ann, bob = full(WhenFull.WAIT)
    bob.session.allowance = Allowance(30.0, net.now)
    ann.message("bob", b"x" * 21, 3)
    assert ann.error() == (3, "full")
    assert bob.session.outbox.stalled


def test_recipient_hold_time_counts_senders_held_together_once() -> None:
    """The hold time of a recipient is used up by the clock, however many senders it
    holds.
    """
    net = FakeNet(client("ann"), client("cid"), client("bob", queue=100))
    ann, cid, bob = net.connect("ann"), net.connect("cid"), net.connect("bob")
    bob.block()
    for message_id in (1, 2, 3):
        ann.message("bob", b"x" * 21, message_id)
    net.advance(20)
    cid.message("bob", b"x" * 21, 4)
    assert net.broker.next_deadline == net.now + 10
    net.advance(10)
    assert ann.error() == (3, "full")
    assert cid.error() == (4, "full")
    assert bob.session.allowance is not None
    assert bob.session.allowance.used == 30


def test_recipient_reading_one_byte_does_not_extend_wait() -> None:
    """The timeout counts from the moment the message was held, even if a byte was read
    meanwhile.
    """
    net, ann, bob = full(WhenFull.WAIT)
    ann.message("bob", b"x" * 21, 3)
    net.now += 30
    net.broker.tick(net.now)
    # After the end of the wait, and before the message is handled again.
    bob.read(1)
    assert ann.error() == (3, "full")


def test_sender_held_is_released_when_recipient_disconnects() -> None:
    """A sender held for a recipient that leaves is released, and receives an ERROR for
    each message.
    """
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


def test_sender_held_and_disconnected_is_released() -> None:
    """A held sender that disconnects is no longer listed as waiting; its message that
    found no room never arrives.
    """
    net, ann, bob = full(WhenFull.WAIT)
    ann.message("bob", b"x" * 21, 3)
    ann.leave()
    assert not bob.session.waiters
    assert net.broker.next_deadline is None
    bob.read()
    assert [each.id for each in bob.take()] == [1, 2]


def test_queue_full_with_refuse_refuses_at_once() -> None:
    """The message that finds no room is refused as full; a smaller one is still
    delivered.
    """
    _, ann, bob = full(WhenFull.REFUSE)
    ann.message("bob", b"x" * 21, 3)
    assert ann.error() == (3, "full")
    ann.message("bob", b"", 4)
    assert ann.take() == []
    bob.read()
    assert [each.id for each in bob.take()] == [1, 2, 4]


def test_queue_full_with_drop_oldest_reports_receipt_and_request() -> None:
    """The oldest messages are dropped, the newest stays. A sender that asked for a
    RECEIPT or an answer is told which were dropped.
    """
    net, ann, bob = full(WhenFull.DROP_OLDEST)
    ann.message("bob", b"x" * 21, 3)
    assert ann.error() == (1, "full")
    ann.request("bob", b"x" * 21, 4)
    assert ann.error() == (2, "full")
    ann.message("bob", b"x" * 21, 5)
    assert ann.take() == [], "no outcome was requested for the message 3"
    ann.message("bob", b"x" * 21, 6)
    assert ann.error() == (4, "full")
    assert not ann.session.outgoing_requests
    assert not bob.session.incoming_requests
    assert net.broker.replies.dropped == 4
    bob.read()
    assert [each.id for each in bob.take()] == [5, 6]


def test_drop_oldest_sender_disconnected_gets_no_error() -> None:
    """A dropped message of a disconnected sender is counted; a new session with its
    address gets no ERROR.
    """
    net, ann, _ = full(WhenFull.DROP_OLDEST)
    ann.request("bob", b"", 3)
    ann.leave()
    successor = net.connect("ann")
    for message_id in range(1, 5):
        successor.message("bob", b"x" * 50, message_id)
    assert successor.take() == []


def test_queue_full_with_disconnect_closes_recipient() -> None:
    """The recipient is disconnected. The new message is refused as full, the waiting
    ones are reported as offline.
    """
    _, ann, bob = full(WhenFull.DISCONNECT)
    ann.message("bob", b"x" * 21, 3)
    assert bob.gone == "queue is full and the client does not read"
    assert sorted((each.id, error_of(each)) for each in ann.take()) == [
        (1, "offline"),
        (2, "offline"),
        (3, "full"),
    ]


@EVERY_WHEN_FULL
def test_queue_of_reading_recipient_is_never_full(when_full: WhenFull) -> None:
    """More than the queue at once does not hold, drop or refuse anything while the
    recipient reads.
    """
    net = FakeNet(client("ann"), client("bob", queue=100, when_full=when_full))
    ann, bob = net.connect("ann"), net.connect("bob")
    one = frame(encode(Envelope(Kind.MESSAGE, 1, "bob", b"x" * 30)))
    ann.send_bytes(one * 50 + frame(encode(Envelope(Kind.MESSAGE, 2, "bob", b"x" * 500))))
    assert len(bob.take()) == 51
    assert ann.take() == []


@EVERY_WHEN_FULL
def test_event_for_full_subscriber_does_not_hold_publisher(when_full: WhenFull) -> None:
    """The full subscriber misses the event, or is treated as when_full says. Other
    subscribers get it at once.
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
    # bob does not read, so it gets no answer; but its operation is carried out.
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


def test_event_for_reading_subscribers_is_flushed_before_drop() -> None:
    """Subscribers whose outbox is full of bytes about to be written are written to
    first; none misses an event.
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


def test_sender_not_reading_errors_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers may exceed the queue by the reserve; then nothing is read from the sender
    until it reads.
    """
    monkeypatch.setattr(replies_module, "OUTCOME_RESERVE", 500)
    net = FakeNet(client("ann", queue=100))
    ann = net.connect("ann")
    ann.block()
    for message_id in range(20):
        ann.message("nobody", b"", message_id)
    assert ann.held
    assert 600 < ann.session.outbox.waiting < 800
    assert net.broker.next_deadline == float("inf")
    net.advance(1e6)
    assert ann.held
    ann.read()
    assert [each.id for each in ann.take()] == list(range(20))
    assert not ann.held


def test_sender_reading_errors_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many errors at once are written in between."""
    monkeypatch.setattr(replies_module, "OUTCOME_RESERVE", 500)
    net = FakeNet(client("ann", queue=100))
    ann = net.connect("ann")
    ann.send_bytes(frame(encode(Envelope(Kind.MESSAGE, 1, "nobody"))) * 100)
    assert len(ann.take()) == 100


def test_recipient_closing_holds_no_sender() -> None:
    """No sender is held for a recipient whose connection is about to be closed."""
    net, ann, bob = full(WhenFull.WAIT)
    bob.send_bytes(b"\xff\xff\xff\x00")
    assert bob.session.closing
    ann.message("bob", b"x" * 21, 3)
    assert ann.error() == (3, "full")
    net.broker.replies.close(bob.session, "another reason", cut=True)
    net.settle()
    assert bob.gone == "malformed"


# Events


def test_event_reaches_each_subscribed_connection_once() -> None:
    """The event arrives once, however many subscriptions match, at its publisher too.
    An event without subscribers is not an error.
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


def test_event_reaches_one_member_of_group() -> None:
    """Members take turns; a member with more bytes waiting is skipped. A member that
    gets the event anyway counts for the group.
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
def test_publish_outside_rules_or_on_broker_topic_is_denied(topic: str) -> None:
    """Publishing on a topic of the broker's own is denied too, whatever the rules."""
    net = FakeNet(client("ann", publish=["jobs.>", "$broker.>"]), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.ask("subscribe", topic=">")
    ann.publish(topic, b"", 3)
    assert ann.error() == (3, "denied")
    ann.publish("jobs.new")
    assert len(bob.take()) == 1


def test_fanout_cache_is_shared_by_publishers_that_may_publish() -> None:
    """A topic's subscribers are stored once. A client is not allowed to publish because
    another one may.
    """
    net = FakeNet(*map(client, ("ann", "bob", "carol")), client("dan", publish=["b"]))
    ann, bob, carol, dan = map(net.connect, ("ann", "bob", "carol", "dan"))
    carol.ask("subscribe", topic="*")
    ann.publish("a", b"1")
    cached = net.broker.topics.known("a")
    for _ in range(2):
        dan.publish("a", b"", 7)
        assert dan.error() == (7, "denied")
        bob.publish("a", b"2")
        assert net.broker.topics.known("a") is cached
    dan.publish("b", b"3")
    ann.publish("b", b"4")
    dan.publish("b", b"5")
    assert [event.payload for event in carol.take()] == [b"1", b"2", b"2", b"3", b"4", b"5"]


def test_fanout_cache_after_reload_with_other_publish_rules_is_cleared() -> None:
    """A client that may not publish on a topic any more is refused at once."""
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.ask("subscribe", topic=">")
    ann.publish("a", b"1")
    bob.publish("a", b"2")
    entries = {"ann": client("ann", publish=["b"]), "bob": client("bob")}
    net.broker.reconfigure(entries, net.broker.status.limits, 0.0)
    bob.publish("a", b"3")
    ann.publish("a", b"4", 7)
    assert ann.error() == (7, "denied")
    assert [event.payload for event in bob.take()] == [b"1", b"2", b"3"]


def test_fanout_cache_after_drain_refuses_events() -> None:
    """An event on a topic that was published on before is refused too."""
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.ask("subscribe", topic="a")
    ann.publish("a", b"1")
    net.broker.drain()
    for topic in ("a", "b"):
        ann.publish(topic, b"2", 7)
        assert ann.error() == (7, "shutting_down")
    assert [event.payload for event in bob.take()] == [b"1"]


def test_event_to_many_subscribers_waits_for_short_turn() -> None:
    """The routing loop sends the first event on a wide topic in the sender's next turn,
    of which the network layer reads less.
    """
    names = [f"w{number}" for number in range(3)]
    net = FakeNet(client("ann"), *map(client, names))
    ann, *peers = map(net.connect, ["ann", *names])
    for peer in peers:
        peer.ask("subscribe", topic="t")
    ann.publish("other")
    ann.session.widest = 2
    data = memoryview(frame(encode(Envelope(Kind.EVENT, 1, payload=b"x", topic="t"))))
    for budget, outcome in ((5, RoutingResult.YIELD), (5, RoutingResult.CONSUMED)):
        net.broker.turn.budget = budget
        done = len(data) if outcome is RoutingResult.CONSUMED else 0
        assert net.feed(net.broker, ann.session, data, 0, len(data), 0.0) == (done, outcome)
    assert ann.session.widest == 3
    net.settle()
    assert [peer.payloads() for peer in peers] == [[b"x"]] * 3


def test_fanout_cache_after_reload_with_other_queue_kind_is_cleared() -> None:
    """After a reload that changes the kind of a subscriber's outbox, events still
    arrive, through the new outbox.
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


# Limits on what the broker stores for a client


def test_subscription_beyond_limit_is_refused() -> None:
    """One subscription more than allowed is refused. Repeating one, or ending another
    one first, is allowed.
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


def test_request_beyond_limit_ends_oldest_pending_request() -> None:
    """One request more than allowed ends the oldest one, and its sender is told. An
    answer to that one is then denied.
    """
    net = FakeNet(client("ann", requests=2), client("bob", send_to=()))
    ann, bob = net.connect("ann"), net.connect("bob")
    for message_id in (1, 2, 3):
        ann.request("bob", message_id=message_id)
    assert ann.error() == (1, "expired")
    assert len(ann.session.outgoing_requests) == len(bob.session.incoming_requests) == 2
    bob.take()
    bob.reply("ann", message_id=1)
    assert bob.error() == (1, "denied")
    bob.reply("ann", b"2", message_id=2)
    bob.reply("ann", b"3", message_id=3)
    assert [reply.payload for reply in ann.take()] == [b"2", b"3"]
    assert not ann.session.outgoing_requests
    assert not bob.session.incoming_requests


# Presence


def test_presence_events_agree_with_list_of_clients() -> None:
    """The first connection of a client and the end of its last one are published, and
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


def test_presence_of_forbidden_client_is_hidden() -> None:
    """A client that may not send to another one does not see its presence, in events or
    in the list.
    """
    net = FakeNet(client("ann", send_to=["bob"]), client("bob"), client("cid"))
    ann = net.connect("ann")
    ann.ask("subscribe", topic="$broker.>")
    net.connect("cid").leave()
    net.connect("bob").leave()
    assert [each.topic for each in ann.take()] == ["$broker.online.bob", "$broker.offline.bob"]
    assert [each["name"] for each in ann.ask("clients")["clients"]] == ["bob"]


def test_presence_subscriber_not_reading_is_disconnected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It subscribed to miss nothing: a disconnect that it can see is better than a gap
    that it can't see.
    """
    monkeypatch.setattr(replies_module, "OUTCOME_RESERVE", 300)
    net = FakeNet(client("ann", queue=100), client("bob"))
    ann = net.connect("ann")
    ann.ask("subscribe", topic="$broker.>")
    ann.block()
    for _ in range(10):
        net.connect("bob").leave()
    assert ann.gone == "it subscribed to events of the broker and does not read them"


def test_reload_and_drain_are_published_once() -> None:
    """A new configuration and a drain are events; a drain is published once."""
    net = FakeNet(client("ann", send_to=[]))
    ann = net.connect("ann")
    ann.ask("subscribe", topic="$broker.*")
    net.broker.reconfigure({"ann": client("ann", send_to=[])}, net.broker.status.limits, net.now)
    net.broker.drain()
    net.broker.drain()
    net.settle()
    assert [each.topic for each in ann.take()] == ["$broker.reloaded", "$broker.draining"]


# Draining, reloading


def test_drain_refuses_new_messages_events_and_sessions() -> None:
    """Messages, events and new sessions are refused. A REPLY to a pending request, and
    operations, are still served.
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
def test_reload_ends_forbidden_subscriptions(
    changed_names: list[str] | None,
) -> None:
    """Other subscriptions stay. The session of a removed client is returned to be
    closed; a new rate is in force.
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


def test_session_detached_twice_changes_nothing() -> None:
    """Detaching a session again changes nothing, and answers to it are discarded."""
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


def test_reload_smaller_max_message_applies_to_next_frame() -> None:
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


def test_presence_of_forbidden_client_is_hidden_from_group() -> None:
    """A group none of whose members may send to a client gets no events of its
    presence.
    """
    net = FakeNet(client("ann", send_to=[]), client("bob"))
    ann = net.connect("ann")
    ann.ask("subscribe", topic="$broker.>", group="g")
    net.connect("bob").leave()
    assert ann.take() == []


def test_sender_held_at_drain_is_refused() -> None:
    """A sender that is held when the drain begins does not wait for its timeout: its
    message is refused.
    """
    net, ann, _ = full(WhenFull.WAIT)
    ann.message("bob", b"x" * 21, 3)
    net.broker.drain()
    net.settle()
    assert ann.error() == (3, "shutting_down")


def test_session_closed_with_long_queue_is_reported_in_slices() -> None:
    """Reporting a long queue and many requests at once would delay all other clients."""
    net = FakeNet(client("a"), client("b"))
    alice, bob = net.connect("a"), net.connect("b")
    for message_id in range(20):
        alice.request("b", b"taken", message_id)
    bob.block()
    for message_id in range(20, 50):
        alice.message("b", b"waiting", message_id)
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


def test_subscriptions_of_closed_session_are_removed_in_slices() -> None:
    """Removing ten thousand subscriptions at once would delay all other clients. No
    event is sent to the closed session meanwhile.
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


def test_request_to_new_session_is_not_mixed_up_with_former_one() -> None:
    """The former session's requests are still being reported. A request with the same
    id reaches the new session, and its answer comes back.
    """
    net = FakeNet(client("a"), client("b"))
    alice, bob = net.connect("a"), net.connect("b")
    alice.request("b", message_id=1)
    broker = net.broker
    net.peers.remove(bob)
    broker.detach(bob.session, net.now)
    # No deferred work is done in between: bob's frames are still to be reported.
    net._settling = True
    successor = net.connect("b")
    alice.request("b", message_id=1)
    net._settling = False
    net.settle()
    assert alice.error() == (1, "abandoned")
    (request,) = alice.session.outgoing_requests[1]
    assert request.responder is successor.session
    successor.take()
    successor.reply("a", b"here", message_id=1)
    assert alice.payloads() == [b"here"]
    assert not alice.session.outgoing_requests
    assert not successor.session.incoming_requests


def test_session_with_former_address_gets_no_errors_of_predecessor() -> None:
    """This also holds if it connects while the frames are being reported."""
    net = FakeNet(client("a"), client("b"))
    alice, bob = net.connect("a"), net.connect("b")
    bob.block()
    for message_id in range(10):
        alice.message("b", b"waiting", message_id)
    broker = net.broker
    net.peers.remove(bob)
    broker.detach(bob.session, net.now)
    broker.run_deferred(3)
    net.peers.remove(alice)
    broker.detach(alice.session, net.now)
    successor = broker.attach("a", "i9", peer="test", now_wall=net.now)
    while broker.has_deferred_work:
        broker.run_deferred(3)
    assert successor.errors_in == 0
    assert broker.replies.dropped == 7


@pytest.mark.parametrize(("ttl", "due"), [(5, 5), (40, 30)])
def test_broker_with_held_sender_and_pending_request_is_due_at_the_earlier(
    ttl: int, due: int
) -> None:
    net = FakeNet(client("alice"), client("bob", queue=60), client("carol"))
    alice, bob, _ = (net.connect(name) for name in ("alice", "bob", "carol"))
    alice.request("carol", b"?", 1, extension={"ttl": ttl})
    bob.block()
    for number in range(3):
        alice.message("bob", b"x" * 30, number)
    assert alice.held
    deadline = net.broker.next_deadline
    assert deadline is not None
    assert deadline == pytest.approx(net.now + due, abs=1)


def test_session_closed_without_frames_or_requests_leaves_no_work() -> None:
    """Most connections end with nothing to report, and need no further turn."""
    net = FakeNet(client("a"), client("b"))
    alice, bob = net.connect("a"), net.connect("b")
    alice.message("b", b"read")
    assert bob.payloads() == [b"read"]
    net.peers.remove(bob)
    net.broker.detach(bob.session, net.now)
    assert not net.broker.has_deferred_work


def test_reconfiguring_removes_few_clients_per_turn() -> None:
    net = FakeNet(*(client(f"c{number}") for number in range(600)))
    clients = net.broker.exchange.clients
    sizes = [600]
    turns = net.broker.reconfiguring(
        {"c0": client("c0")}, CoreLimits(), net.now, removed_names=list(clients)[1:]
    )
    sizes += [len(clients) for _ in turns]
    assert max(before - after for before, after in pairwise(sizes)) <= 256
    assert list(clients) == ["c0"]


@pytest.mark.parametrize(
    ("name", "changes", "code"),
    [
        ("bob", {"queue": 1000}, ""),
        ("bob", {"queue": 60, "when_full": WhenFull.REFUSE}, "full"),
        ("alice", {"send_to": []}, "denied"),
    ],
)
def test_reconfigured_entry_judges_the_frame_of_a_held_sender_again(
    name: str, changes: dict[str, Any], code: str
) -> None:
    """It does not wait until the recipient reads, or for the rest of the time."""
    entries = {"alice": client("alice"), "bob": client("bob", queue=60)}
    net = FakeNet(*entries.values())
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.block()
    for number in range(3):
        alice.message("bob", b"%d" % number * 30, number)
    assert alice.held

    entries[name] = client(name, **changes)
    net.broker.reconfigure(entries, net.broker.status.limits, net.now)
    net.settle()

    assert not alice.held
    assert [error_of(each) for each in alice.take()] == ([code, code] if code else [])
    bob.read()
    assert len(bob.payloads()) == (1 if code else 3)
