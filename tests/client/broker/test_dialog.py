"""The dialog without a socket: joined to a broker's core, or told byte by byte what a
broker says.
"""

from __future__ import annotations

import json
import random
import string
import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.dialog_pair import LOST, NONCE, OWNER, Pair, merge
from support.fake_broker import Session

from brokerd_client.errors import (
    AuthenticationError,
    BadLength,
    Closed,
    Denied,
    Disconnected,
    DisconnectedByOperator,
    Expired,
    FrameTooBig,
    Full,
    InDoubt,
    InvalidName,
    KeyRejected,
    KeyRemoved,
    MalformedEnvelope,
    NameTaken,
    Offline,
    ProtocolError,
    RemoteError,
    Replaced,
    RequestFailed,
    ShuttingDown,
    TimedOut,
)
from brokerd_client.message import Message, Receipt
from brokerd_client.presence import Presence
from brokerd_client.protocol import backoff, dialog, encoder, inbound
from brokerd_client.protocol.dialog import Effects
from brokerd_client.protocol.pending import Deadline
from brokerd_client.protocol.state import NEXT, State
from brokerd_client.wire.envelope import (
    HEADER,
    CodecId,
    Envelope,
    ErrorCode,
    Kind,
    encode,
    error_payload,
    parse,
)
from brokerd_client.wire.framing import FrameReader, frame
from brokerd_client.wire.layout import MAX_HEAD_SIZE, Flag


@pytest.fixture
def pair() -> Pair:
    """A dialog that is ready, and its broker."""
    pair = Pair()
    pair.connect()
    return pair


# The link


@pytest.mark.parametrize("step", [1, 3, 4096])
def test_handshake_cut_into_pieces_makes_dialog_ready(step: int) -> None:
    """However the bytes are cut, the dialog is ready and knows the name that the broker
    gives the client.
    """
    pair = Pair(name="")
    effects = pair.connect(step)
    assert pair.dialog.state is State.READY
    assert (pair.dialog.name, pair.dialog.address, effects.broken) == ("alice", "alice", None)
    assert pair.dialog.introduction["protocol"] == 1
    assert pair.dialog.next_deadline() is None


def test_message_behind_welcome_in_same_segment_is_received() -> None:
    """A message in the segment of the broker's #WELCOME# is not lost, and the limit of
    the handshake does not apply to it.
    """
    pair = Pair()
    pair.broker.intercept = lambda session, envelope: session.deliver(
        Envelope(Kind.MESSAGE, 7, "bob", b"x" * 1000)
    )
    effects = pair.connect()
    assert effects.messages[0].body == b"x" * 1000


def test_handshake_with_wrong_key_raises_error_with_client_name() -> None:
    """A key that the broker does not accept is an AuthenticationError with the client's
    name and never the key.
    """
    pair = Pair(key=b"s3cret")
    effects = pair.connect()
    assert isinstance(effects.broken, AuthenticationError)
    assert "alice" in str(effects.broken)
    assert "s3cret" not in str(effects.broken)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "does not accept the key used here for the name alice"),
        ({"name": ""}, "no client is known there by the key used here"),
        ({"without_key": True}, "no key was given for alice; give key"),
    ],
)
def test_handshake_with_rejected_key_says_what_was_given(
    options: dict[str, Any], says: str
) -> None:
    """The broker's refusal is the same; the client knows what it has shown."""
    effects = Pair(key=b"s3cret", **options).connect()
    assert type(effects.broken) is KeyRejected
    assert says in str(effects.broken)
    assert "s3cret" not in str(effects.broken)


def test_handshake_broker_without_key_is_sent_failure() -> None:
    """A broker that can't prove the key receives #FAILURE# before the connection ends."""
    pair = Pair()
    pair.dialog.dialing(0)
    pair.dialog.opened(NONCE)
    pair.hear(frame(b"#CHALLENGE#{sha256}" + b"c" * 40))
    pair.hear(frame(b"#WELCOME#"))
    pair.dialog.data_to_send()
    effects = pair.hear(frame(b"{sha256}" + b"0" * 32))
    assert isinstance(effects.broken, AuthenticationError)
    assert pair.dialog.data_to_send() == frame(b"#FAILURE#")


def test_first_connection_failed_is_not_repeated() -> None:
    """A loss before the first introduction is not followed by another try: the caller
    of connect() gets the error.
    """
    pair = Pair()
    pair.dialog.dialing(0)
    pair.lose()
    assert pair.dialog.state is State.GONE
    with pytest.raises(Disconnected, match="cut"):
        pair.dialog.send("bob", 0, b"")


def test_first_connection_cut_off_in_handshake_is_repeated() -> None:
    """A broker without room closes a connection without a reason. Within the timeout of
    connect() another try follows.
    """
    pair = Pair(timeout_s=3, reconnect=False)
    pair.dialog.dialing(10)
    for now in (10.0, 11.0, 11.9):
        pair.dialog.opened(NONCE)
        effects = pair.dialog.lost(pair.dialog.closed_by_broker(), now, 0.3)
        assert pair.dialog.state is State.WAITING
        assert pair.dialog.beginning
        assert effects.outcomes == []
        assert now < pair.dialog.retry_at < now + 1
        pair.dialog.dialing(pair.dialog.retry_at)
        assert pair.dialog.next_deadline() == 13
    pair.dialog.opened(NONCE)
    pair.dialog.lost(pair.dialog.closed_by_broker(), 12.9, 0.9)
    assert pair.dialog.state is State.GONE
    assert not pair.dialog.beginning
    assert (
        str(pair.dialog.reason) == "the broker closed the connection (the handshake is under way)"
    )
    assert (pair.dialog.losses, pair.dialog.failed_attempts) == (0, 4)


def test_first_connection_made_after_cut_off_counts_no_loss() -> None:
    """Once the connection is made, the failed tries before it leave no trace."""
    pair = Pair()
    pair.dialog.dialing(0)
    pair.dialog.opened(NONCE)
    pair.dialog.lost(pair.dialog.closed_by_broker(), 0, 0.9)
    pair.connect()
    assert (pair.dialog.state, pair.dialog.losses) == (State.READY, 0)
    pair.dialog.lost(LOST, 1, 0.9)
    assert pair.dialog.retry_at - 1 <= backoff.BASE_S


@pytest.mark.parametrize("cut_off", [False, True])
def test_first_connection_reset_at_open_is_repeated(
    cut_off: bool,
) -> None:
    """A reset may mean that the broker has no room; a refusal means that there is no
    listener.
    """
    pair = Pair()
    pair.dialog.dialing(0)
    reason = Disconnected("no connection")
    reason.cut_off = cut_off
    pair.dialog.lost(reason, 0.0, 0.5)
    assert pair.dialog.state is (State.WAITING if cut_off else State.GONE)


def test_first_connection_with_rejected_key_is_not_repeated() -> None:
    """A wrong key stays wrong."""
    pair = Pair(key=b"not hers")
    effects = pair.connect()
    assert isinstance(effects.broken, AuthenticationError)
    pair.dialog.lost(effects.broken, 0.0, 0.5)
    assert pair.dialog.state is State.GONE


def test_handshake_silent_broker_is_given_up_at_deadline() -> None:
    """A broker that sends nothing is given up at the connection's deadline, once."""
    pair = Pair(timeout_s=3)
    pair.dialog.dialing(10)
    pair.dialog.opened(NONCE)
    assert pair.dialog.next_deadline() == 13
    assert pair.dialog.tick(12.9).broken is None
    assert isinstance(pair.dialog.tick(13).broken, TimedOut)
    assert pair.dialog.tick(14).broken is None


def test_connection_closed_by_broker_names_phase_of_handshake(pair: Pair) -> None:
    """Before messages pass, the error names the step that was reached. After that there
    is nothing to add.
    """
    ready = str(pair.dialog.closed_by_broker())
    beginner = Pair()
    beginner.dialog.dialing(0.0)
    beginner.dialog.opened(NONCE)

    assert ready == "the broker closed the connection"
    assert (
        str(beginner.dialog.closed_by_broker())
        == "the broker closed the connection (the handshake is under way)"
    )


def test_introduction_refused_ends_connection_with_reason() -> None:
    """A broker that is shutting down refuses whoami: the connection ends with its
    reason.
    """
    pair = Pair()
    pair.broker.intercept = lambda session, envelope: (
        pair.broker.refuse(session, envelope, ErrorCode.SHUTTING_DOWN),
        True,
    )
    broken = pair.connect().broken
    assert type(broken) is Disconnected
    assert isinstance(broken.__cause__, ShuttingDown)


ENDINGS = {
    ErrorCode.NAME_TAKEN: NameTaken,
    ErrorCode.REPLACED: Replaced,
    ErrorCode.KEY_REMOVED: KeyRemoved,
    ErrorCode.DISCONNECTED: DisconnectedByOperator,
    ErrorCode.SHUTTING_DOWN: ShuttingDown,
}


@pytest.mark.parametrize("code", ENDINGS)
def test_error_with_id_0_from_broker_is_reason_of_closing(pair: Pair, code: ErrorCode) -> None:
    """The connection is over, and no send is reported as undelivered."""
    pair.dialog.send("bob", 0, b"plain")
    effects = pair.hear_frame(
        Kind.ERROR, 0, "$broker", codec=2, payload=error_payload(code, "why", "$broker")
    )
    broken = effects.broken
    assert type(broken) is Disconnected
    assert str(broken) == f"the broker closes the connection ({code}): why"
    assert type(broken.__cause__) is ENDINGS[code]
    assert (effects.undelivered, pair.dialog.undelivered) == ([], 0)


@pytest.mark.parametrize(
    ("sender", "code", "name"),
    [
        ("bob", ErrorCode.REPLACED, "$broker"),
        ("$broker", ErrorCode.OFFLINE, "$broker"),
        ("$broker", ErrorCode.SHUTTING_DOWN, "bob"),
    ],
)
def test_error_with_id_0_from_client_does_not_end_connection(
    pair: Pair, sender: str, code: ErrorCode, name: str
) -> None:
    """Only the broker can announce the closing. An error about a message with the id 0
    concerns that message.
    """
    effects = pair.hear_frame(
        Kind.ERROR, 0, sender, codec=2, payload=error_payload(code, "why", name)
    )
    assert (effects.broken, len(effects.undelivered)) == (None, sender == "$broker")


def test_introduction_answered_with_name_taken_is_not_repeated() -> None:
    pair = Pair()
    pair.broker.intercept = lambda session, envelope: True
    pair.connect()
    payload = error_payload(ErrorCode.NAME_TAKEN, "why", "$broker")
    broken = pair.hear_frame(Kind.ERROR, 0, "$broker", codec=2, payload=payload).broken
    assert broken is not None
    pair.dialog.lost(broken, pair.now, 0.5)
    assert (pair.dialog.state, pair.dialog.reason) == (State.GONE, broken)


@pytest.mark.parametrize("answer", [b"{}", b"[]", b"no json", b"\xff"])
def test_introduction_without_name_ends_connection(answer: bytes) -> None:
    """An answer to whoami without a name is a mistake of the broker."""
    pair = Pair()
    pair.broker.intercept = lambda session, envelope: (
        session.deliver(Envelope(Kind.REPLY, envelope.id, "$broker", answer, 2)),
        True,
    )
    assert isinstance(pair.connect().broken, ProtocolError)
    assert not pair.dialog.introduction


def test_dialog_in_every_state_but_last_can_be_closed() -> None:
    """The table lets the caller close at any time, and has a row for every state."""
    assert set(NEXT) == set(State)
    for row in NEXT.values():
        assert any(step.name == "CLOSE" for step in row)


# Reconnecting


def test_reconnect_wait_doubles_up_to_cap(pair: Pair) -> None:
    """A connection that ends at once is tried again after 0.1, 0.2, 0.4 ... 10 s, times
    the random factor.
    """
    waits = []
    for _ in range(10):
        pair.lose(jitter=0.999999)
        assert pair.dialog.state is State.WAITING
        waits.append(round(pair.dialog.retry_at - pair.now, 2))
        assert pair.dialog.next_deadline() == pair.dialog.retry_at
        pair.connect()
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10, 10]


def test_reconnect_after_long_connection_waits_shortly(pair: Pair) -> None:
    """After a connection longer than the cap, the waits begin at the shortest again."""
    for _ in range(5):
        pair.lose(jitter=0.5)
        pair.connect()
    pair.now += backoff.CAP_S + 1
    pair.lose(jitter=0.5)
    assert pair.dialog.retry_at - pair.now == pytest.approx(backoff.BASE_S / 2)


def test_reconnect_failed_tries_lengthen_wait(pair: Pair) -> None:
    """A try that never reaches the broker makes the next wait longer."""
    pair.lose(jitter=0.5)
    pair.dialog.dialing(1)
    pair.dialog.lost(LOST, 1, 0.5)
    assert pair.dialog.retry_at == pytest.approx(1 + backoff.BASE_S)
    assert (pair.dialog.losses, pair.dialog.failed_attempts) == (1, 1)


def test_reconnect_disabled_first_loss_is_final() -> None:
    """With reconnect=False the dialog has ended, and its error says why."""
    pair = Pair(reconnect=False)
    pair.connect()
    pair.lose()
    assert pair.dialog.state is State.GONE
    with pytest.raises(Disconnected, match="cut"):
        pair.dialog.request("bob", 0, b"", None, "w", None)


def test_subscriptions_are_repeated_on_new_connection(pair: Pair) -> None:
    """After a reconnect the broker knows every subscription, each once, before anything
    else is sent.
    """
    pair.dialog.subscribe("a.>", None, "one", "w", None)
    pair.dialog.subscribe("a.>", None, "two", "w", None)
    pair.dialog.subscribe("b", "g", "three", "w", None)
    pair.talk()
    pair.lose()
    pair.connect()
    assert pair.session is not None
    assert sorted(pair.session.subscriptions) == [("a.>", ""), ("b", "g")]
    effects = pair.hear_frame(Kind.EVENT, topic="a.x")
    assert [sink for sink, _ in effects.events] == ["one", "two"]


def test_subscription_refused_on_new_connection_ends(pair: Pair) -> None:
    """If the rules have changed meanwhile, the subscriptions concerned end with the
    broker's reason; the rest go on.
    """
    pair.dialog.subscribe("a", None, "one", "w", None)
    pair.dialog.subscribe("b", None, "two", "w", None)
    pair.talk()
    pair.lose()
    pair.broker.intercept = lambda session, envelope: (
        b'"a"' in envelope.payload
        and (pair.broker.refuse(session, envelope, ErrorCode.DENIED), True)
    )
    effects = pair.connect()
    assert [(sink, type(error)) for sink, error in effects.ended] == [("one", Denied)]
    assert [entry.pattern for entry in pair.dialog.subscriptions] == ["b"]


# Outcomes


def test_request_reply_with_its_id_is_outcome(pair: Pair) -> None:
    """The reply with the request's id, from the client that was asked, is the outcome;
    nothing stays behind.
    """
    message_id = pair.dialog.request("bob", 0, b"?", None, "w", 5.0)
    [(waiter, reply)] = pair.hear_frame(Kind.REPLY, message_id, "bob", payload=b"!").outcomes
    assert (waiter, reply.body, len(pair.dialog.pending_calls), pair.dialog.next_deadline()) == (
        "w",
        b"!",
        0,
        None,
    )


def test_request_to_pool_is_answered_by_any_member(pair: Pair) -> None:
    """A request to a name is answered by name/instance; a request to an instance by no
    other.
    """
    message_id = pair.dialog.request("bob", 0, b"?", None, "w", None)
    assert pair.hear_frame(Kind.REPLY, message_id, "bob/1").outcomes
    message_id = pair.dialog.request("bob/1", 0, b"?", None, "w", None)
    assert not pair.hear_frame(Kind.REPLY, message_id, "bob/2").outcomes
    assert pair.hear_frame(Kind.REPLY, message_id, "bob/1").outcomes


@pytest.mark.parametrize("sender", ["carol", "bobby", "bo", "$broker"])
def test_reply_from_wrong_client_is_counted_and_dropped(pair: Pair, sender: str) -> None:
    """A reply with the right id from the wrong client is dropped and counted; the
    request still waits.
    """
    message_id = pair.dialog.request("bob", 0, b"?", None, "w", None)
    assert not pair.hear_frame(Kind.REPLY, message_id, sender).outcomes
    assert (pair.dialog.counters["late"], len(pair.dialog.pending_calls)) == (1, 1)


def test_request_refused_by_broker_has_typed_error(pair: Pair) -> None:
    """An ERROR of the broker about the recipient is the outcome, typed by its code."""
    message_id = pair.dialog.request("carol", 0, b"?", None, "w", None)
    [(_, error)] = pair.talk().outcomes
    assert (type(error), error.message_id, error.name) == (Offline, message_id, "carol")


def test_error_about_other_client_does_not_end_own_request(pair: Pair) -> None:
    """An undeliverable REPLY comes back with the id that its requester chose. An own
    request with that id goes on waiting.
    """
    message_id = pair.dialog.request("bob", 0, b"?", None, "w", None)
    pair.dialog.reply("carol", message_id, 0, b"late answer")
    effects = pair.hear_frame(
        Kind.ERROR,
        message_id,
        "$broker",
        payload=error_payload(ErrorCode.OFFLINE, "gone", "carol/1"),
        codec=2,
    )
    assert not effects.outcomes
    assert [type(error) for error in effects.undelivered] == [Offline]
    assert len(pair.dialog.pending_calls) == 1


def test_dialog_denied_late_answer_is_counted_and_not_reported(pair: Pair) -> None:
    """The requester has its outcome already, so that nothing was lost; other refusals
    of an answer are reported.
    """
    pair.dialog.reply("carol", 7, 0, b"late answer")
    payload = error_payload(ErrorCode.DENIED, "not outstanding", "carol")
    effects = pair.hear_frame(Kind.ERROR, 7, "$broker", payload=payload, codec=2)
    assert (
        effects.outcomes,
        effects.undelivered,
        pair.dialog.counters["late"],
        pair.dialog.undelivered,
    ) == (
        [],
        [],
        1,
        0,
    )
    payload = error_payload(ErrorCode.RATE_LIMITED, "too fast", "carol")
    effects = pair.hear_frame(Kind.ERROR, 7, "$broker", payload=payload, codec=2)
    assert [error.message_id for error in effects.undelivered] == [7]


def test_dialog_denied_send_is_reported(pair: Pair) -> None:
    """A message of this client that the rules forbid is no late answer."""
    message_id = pair.dialog.send("carol", 0, b"x")
    payload = error_payload(ErrorCode.DENIED, "no", "carol")
    effects = pair.hear_frame(Kind.ERROR, message_id, "$broker", payload=payload, codec=2)
    assert ([error.message_id for error in effects.undelivered], pair.dialog.counters["late"]) == (
        [message_id],
        0,
    )


def test_error_from_responder_is_request_failed(pair: Pair) -> None:
    """Whatever code the responder sends, even a code of the broker's, the outcome is
    RequestFailed with that code.
    """
    message_id = pair.dialog.request("bob", 0, b"?", None, "w", None)
    payload = error_payload(ErrorCode.OFFLINE, "no luck", "")
    [(_, error)] = pair.hear_frame(Kind.ERROR, message_id, "bob", payload=payload, codec=2).outcomes
    assert (type(error), error.code, str(error), error.name) == (
        RequestFailed,
        "offline",
        "no luck",
        "bob",
    )


@pytest.mark.parametrize("payload", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_error_with_unreadable_payload_fails_request(pair: Pair, payload: bytes) -> None:
    """A payload that is not a JSON object does not hide that the request failed."""
    message_id = pair.dialog.request("bob", 0, b"?", None, "w", None)
    [(_, error)] = pair.hear_frame(Kind.ERROR, message_id, "bob", payload=payload).outcomes
    assert (type(error), error.code) == (RequestFailed, "failed")


def test_error_from_wrong_client_is_dropped(pair: Pair) -> None:
    """A client that was not asked can't fail a request, nor a send that waits for its
    receipt.
    """
    first = pair.dialog.request("bob", 0, b"?", None, "w", None)
    second = pair.dialog.send_for_receipt("bob", 0, b"", None, "w", None)
    for message_id, sender in ((first, "carol"), (second, "bob"), (5, "bob")):
        assert not pair.hear_frame(Kind.ERROR, message_id, sender, payload=b"{}").outcomes
    assert (pair.dialog.counters["late"], len(pair.dialog.pending_calls)) == (3, 2)


def test_receipt_is_outcome_of_send_that_asked(pair: Pair) -> None:
    """A RECEIPT is the outcome of a send or a publication that asked for it; any other
    is counted.
    """
    first = pair.dialog.send_for_receipt("alice", 0, b"", None, "one", None)
    second = pair.dialog.publish_for_receipt("a.b", 0, b"", None, "two", None)
    assert pair.talk().outcomes == [
        ("one", Receipt(first, "alice")),
        ("two", Receipt(second, "a.b")),
    ]
    request = pair.dialog.request("bob", 0, b"", None, "w", None)
    for message_id in (first, request):
        assert not pair.hear_frame(Kind.RECEIPT, message_id, "$broker").outcomes
    assert pair.dialog.counters["late"] == 2


def test_reply_to_send_is_not_receipt(pair: Pair) -> None:
    """A client's REPLY does not count as a RECEIPT of the broker."""
    message_id = pair.dialog.send_for_receipt("bob", 0, b"", None, "w", None)
    assert not pair.hear_frame(Kind.REPLY, message_id, "bob").outcomes
    assert pair.dialog.counters["late"] == 1


@pytest.mark.parametrize(
    ("seq", "names", "expected"),
    [
        (258, ["bob", "carol"], (258, ("bob", "carol"))),
        (2**64 - 1, [], (2**64 - 1, ())),
        (2**64, "bob", (0, ())),
        (-1, {"bob": 1}, (0, ())),
        ("7", [1, "bob", None], (0, ("bob",))),
        (True, None, (0, ())),
        (1.0, ["x" * 300], (0, ("x" * 255,))),
        (None, ["m"] * 1001, (0, ("m",) * 1000)),
    ],
)
def test_error_about_stored_message_tells_seq_and_names(
    pair: Pair, seq: object, names: object, expected: tuple[int, tuple[str, ...]]
) -> None:
    """Values that are not a number of 64 bits, or not a list of texts, are left out."""
    payload = json.dumps({"code": "full", "message": "", "seq": seq, "names": names}).encode()

    [error] = pair.hear_frame(Kind.ERROR, 7, "$broker", payload=payload).undelivered

    assert isinstance(error, Full)
    assert (error.seq, error.names) == expected


@pytest.mark.parametrize(("names", "is_outcome"), [(["bob", "carol"], True), (["carol"], False)])
def test_error_about_event_concerns_publisher_by_its_mailboxes(
    pair: Pair, names: list[str], is_outcome: bool
) -> None:
    """The name of such an ERROR is the first mailbox without the event."""
    message_id = pair.dialog.publish_for_receipt("t.x", 0, b"", None, "w", None)
    payload = json.dumps({"code": "full", "message": "", "name": "bob", "names": names}).encode()

    effects = pair.hear_frame(Kind.ERROR, message_id, "$broker", payload=payload)

    assert (len(effects.outcomes), len(effects.undelivered)) == (is_outcome, not is_outcome)


def test_send_without_receipt_refused_is_undelivered(pair: Pair) -> None:
    """No call waits for it, so its failure is reported as undelivered, with the id that
    send returned.
    """
    message_id = pair.dialog.send("carol", 0, b"")
    [error] = pair.talk().undelivered
    assert (type(error), error.message_id, pair.dialog.undelivered) == (Offline, message_id, 1)  # type: ignore[attr-defined]


def test_control_operation_outcome_is_dict_or_refusal(pair: Pair) -> None:
    """An operation's outcome is the JSON object, or the broker's refusal."""
    pair.dialog.control("clients", {}, "one", None)
    pair.dialog.control("no such", {"n": 1, "address": "bob"}, "two", None)
    (_, answer), (_, error) = pair.talk().outcomes
    assert answer["clients"][0]["name"] == "alice"
    assert error.code == "unsupported"


def test_subscription_refused_leaves_nothing(pair: Pair) -> None:
    """A subscription that is denied is not made again later, and gets no event."""
    pair.dialog.subscribe("denied.x", None, "sink", "w", None)
    [(_, error)] = pair.talk().outcomes
    assert isinstance(error, Denied)
    assert len(pair.dialog.subscriptions) == 0


# Time, and callers who give up


def test_pending_deadlines_end_calls_in_order(pair: Pair) -> None:
    """Each waiter gets TimedOut at its own deadline, whatever the order of the calls. A
    later answer is counted as late.
    """
    first = pair.dialog.request("bob", 0, b"", None, "slow", 9.0)
    pair.dialog.request("bob", 0, b"", None, "quick", 3.0)
    pair.dialog.send_for_receipt("bob", 0, b"", None, "never", None)
    assert pair.dialog.next_deadline() == 3.0
    assert [waiter for waiter, _ in pair.dialog.tick(3.0).outcomes] == ["quick"]
    assert pair.dialog.next_deadline() == 9.0
    [(waiter, error)] = pair.dialog.tick(99.0).outcomes
    assert (waiter, type(error)) == ("slow", TimedOut)
    assert not pair.hear_frame(Kind.REPLY, first).outcomes
    assert (pair.dialog.counters["late"], len(pair.dialog.pending_calls)) == (1, 1)


def test_next_deadline_is_nearer_of_connection_and_request(pair: Pair) -> None:
    """The next deadline is the nearer of the connection's and the requests'."""
    pair.dialog.close(100.0)
    assert pair.dialog.next_deadline() == 100.0 + dialog.LINGER_S


def test_request_abandoned_leaves_nothing(pair: Pair) -> None:
    """After a cancellation the table is empty, its reply is counted, and abandoning
    twice is harmless.
    """
    message_id = pair.dialog.request("bob", 0, b"", None, "w", 5.0)
    pair.dialog.abandon(message_id)
    pair.dialog.abandon(message_id)
    assert not pair.hear_frame(Kind.REPLY, message_id).outcomes
    assert (
        len(pair.dialog.pending_calls),
        pair.dialog.next_deadline(),
        pair.dialog.counters["late"],
    ) == (
        0,
        None,
        1,
    )


def test_requests_finished_leave_no_deadlines(pair: Pair) -> None:
    """The heap of deadlines does not grow with finished requests."""
    for _ in range(1000):
        pair.dialog.abandon(pair.dialog.request("bob", 0, b"", None, "w", 5.0))
    assert len(pair.dialog.pending_calls._deadlines) < 100


@pytest.mark.parametrize("how", ["abandon", "deadline"])
def test_subscription_abandoned_is_unsubscribed(pair: Pair, how: str) -> None:
    """A caller that stops waiting for a subscription has none: it is ended at the
    broker, and no event is delivered here.
    """
    assert pair.session is not None
    message_id, _ = pair.dialog.subscribe("a", None, "sink", "w", 5.0)
    if how == "abandon":
        pair.dialog.abandon(message_id)
    else:
        pair.dialog.tick(5.0)
    pair.talk()
    assert pair.session.subscriptions == []
    assert not pair.hear_frame(Kind.EVENT, topic="a").events
    assert (pair.dialog.counters["unrouted"], pair.dialog.counters["late"]) == (1, 1)


@pytest.mark.parametrize("how", ["abandon", "deadline", "loss", "refusal"])
def test_watch_abandoned_is_ended(pair: Pair, how: str) -> None:
    """A watch whose list never came is over, here and at the broker."""
    assert pair.session is not None
    message_id, _ = pair.dialog.watch("sink", "w", 5.0)
    if how == "abandon":
        pair.dialog.abandon(message_id)
    elif how == "deadline":
        pair.dialog.tick(5.0)
    elif how == "loss":
        pair.lose()
    else:
        pair.broker.intercept = lambda session, envelope: (
            b"clients" in envelope.payload
            and (pair.broker.refuse(session, envelope, ErrorCode.DENIED), True)
        )
    if how != "loss":
        pair.talk()
    assert len(pair.dialog.subscriptions) == 0
    if how in ("abandon", "deadline"):
        assert pair.session.subscriptions == []


# What becomes of sends when the connection goes


def test_loss_whole_frames_are_in_doubt_and_cut_ones_not_sent(pair: Pair) -> None:
    """A whole frame that was handed over is in doubt; a frame with a byte missing can't
    have been delivered.
    """
    pair.dialog.request("bob", 0, b"first", None, "left", None)
    whole = len(pair.dialog.data_to_send())
    second = pair.dialog.request("bob", 0, b"second", None, "cut", None)
    part = len(pair.dialog.data_to_send()) - 1
    pair.dialog.send_for_receipt("bob", 0, b"third", None, "kept", None)
    pair.dialog.wrote(whole + part)
    outcomes = dict(pair.lose().outcomes)
    assert type(outcomes["left"]) is InDoubt
    assert type(outcomes["cut"]) is Disconnected
    assert type(outcomes["kept"]) is Disconnected
    assert outcomes["cut"].message_id == second
    pair.connect()
    payloads = [envelope.payload for envelope in pair.broker.seen if envelope.kind is Kind.REQUEST]
    assert payloads[-2:] == [b'{"op":"whoami"}', b'{"op":"goaway"}']


def test_loss_with_unknown_written_bytes_is_in_doubt(pair: Pair) -> None:
    """If the face can't say how much has left, the frames given to it are in doubt. The
    rest were not sent.
    """
    pair.dialog.request("bob", 0, b"first", None, "given", None)
    sent = pair.dialog.send("bob", 0, b"plain")
    given = len(pair.dialog.data_to_send())
    assert pair.dialog.untaken == 0
    pair.dialog.request("bob", 0, b"second", None, "kept", None)
    kept = pair.dialog.publish("t", 0, b"plain")
    assert pair.dialog.untaken > 0
    effects = pair.lose(doubtful=given)
    assert {waiter: type(error) for waiter, error in effects.outcomes} == {
        "given": InDoubt,
        "kept": Disconnected,
    }
    assert [(type(error), error.message_id) for error in effects.undelivered] == [  # type: ignore[attr-defined]
        (InDoubt, sent),
        (Disconnected, kept),
    ]
    assert pair.dialog.undelivered == 2


def test_loss_send_without_receipt_written_is_not_reported(pair: Pair) -> None:
    """A send without receipt has no outcome: once it is written, a loss does not report
    it.
    """
    pair.dialog.send("bob", 0, b"x")
    first = len(pair.dialog.data_to_send())
    pair.dialog.reply("bob", 1, 0, b"y")
    pair.dialog.wrote(first)
    assert len(pair.lose().undelivered) == 1


def test_loss_refused_send_is_not_reported_again(pair: Pair) -> None:
    """A face that can't say how much of many frames has left may receive the refusal of
    the first before the last has left.
    """
    first, second, third = (pair.dialog.send(name, 0, b"x") for name in ("nobody", "bob", "nobody"))
    data = pair.dialog.data_to_send()
    pair.session.receive(data[: len(data) // 3 + 2])
    heard, pair.session.out = bytes(pair.session.out), bytearray()
    assert [error.message_id for error in pair.hear(heard).undelivered] == [first]  # type: ignore[attr-defined]
    effects = pair.lose(doubtful=len(data))
    assert [error.message_id for error in effects.undelivered] == [second, third]  # type: ignore[attr-defined]
    assert pair.dialog.undelivered == 3


def test_refused_ids_are_forgotten_when_all_bytes_left(pair: Pair) -> None:
    """The memory does not grow with messages that are refused."""
    for _ in range(3):
        pair.dialog.send("nobody", 0, b"x")
        data = pair.dialog.data_to_send()
        pair.session.receive(data)
        heard, pair.session.out = bytes(pair.session.out), bytearray()
        assert len(pair.hear(heard).undelivered) == 1
        assert len(pair.dialog._encoder._refused) == 1
        pair.dialog.wrote(len(data))
        assert not pair.dialog._encoder._refused


def test_loss_ends_subscription_under_way(pair: Pair) -> None:
    """Its caller gets the error of the loss, so the subscription is not made again
    without the caller's knowledge.
    """
    pair.dialog.subscribe("a", None, "sink", "w", None)
    [(_, error)] = pair.lose().outcomes
    assert isinstance(error, Disconnected)
    assert len(pair.dialog.subscriptions) == 0


def test_reconnect_discards_bytes_of_old_connection(pair: Pair) -> None:
    """Half a received frame, and bytes still to be written, are forgotten with their
    connection.
    """
    pair.hear(b"\0\0\0\x20half")
    pair.dialog.send("bob", 0, b"never")
    pair.lose()
    assert pair.connect().broken is None
    assert not any(envelope.payload == b"never" for envelope in pair.broker.seen)


# Closing


def test_close_fails_waiters_and_reports_late_refusals(pair: Pair) -> None:
    """Waiters get Closed; refusals that come before the connection ends are still
    reported.
    """
    pair.dialog.request("bob", 0, b"", None, "w", None)
    pair.dialog.subscribe("a", None, "sink", "v", None)
    message_id = pair.dialog.send("carol", 0, b"")
    effects = pair.dialog.close(1.0)
    assert [(waiter, type(error)) for waiter, error in effects.outcomes] == [
        ("w", Closed),
        ("v", Closed),
    ]
    assert pair.dialog.state is State.CLOSING
    assert message_id in [error.message_id for error in pair.talk().undelivered]  # type: ignore[attr-defined]
    with pytest.raises(Closed):
        pair.dialog.send("bob", 0, b"")
    pair.lose()
    assert pair.dialog.state is State.CLOSED
    pair.dialog.close(2.0)


def test_close_broker_without_end_is_given_up_after_linger(pair: Pair) -> None:
    """A broker that does not end the connection is given up after LINGER_S."""
    pair.dialog.close(1.0)
    broken = pair.dialog.tick(1.0 + dialog.LINGER_S).broken
    assert f"did not answer within {dialog.LINGER_S:g} s (close() was called" in str(broken)


def test_close_before_connection_ends_at_once() -> None:
    """There are no answers to wait for."""
    pair = Pair()
    pair.dialog.close(0)
    assert pair.dialog.state is State.CLOSED
    assert pair.dialog.next_deadline() is None


def test_close_forgets_internal_operations(pair: Pair) -> None:
    """The outcome of an operation without a waiter is reported to no caller."""
    pair.lose()
    pair.dialog.dialing(0)
    pair.dialog.opened(NONCE)
    pair.session = Session(pair.broker)
    pair.hear(bytes(pair.session.out))
    pair.session.receive(pair.dialog.data_to_send())
    pair.session.out, heard = bytearray(), bytes(pair.session.out)
    pair.hear(heard)
    pair.session.receive(pair.dialog.data_to_send())
    pair.hear(bytes(pair.session.out)[: len(pair.session.out)])
    assert not pair.dialog.close(0).outcomes


# Events


def test_event_reaches_every_matching_subscription_once(pair: Pair) -> None:
    """Plain subscriptions each get the event; those of one group and pattern take
    turns.
    """
    for sink, pattern, group in (
        ("all", ">", None),
        ("exact", "a.b", None),
        ("star", "a.*", None),
        ("other", "b.*", None),
        ("g1", "a.>", "g"),
        ("g2", "a.>", "g"),
    ):
        pair.dialog.subscribe(pattern, group, sink, "w", None)
    pair.talk()
    got = [
        sorted(sink for sink, _ in pair.hear_frame(Kind.EVENT, topic="a.b").events)
        for _ in range(2)
    ]
    assert [set(each) - {"g1", "g2"} for each in got] == [{"all", "exact", "star"}] * 2
    assert {sink for each in got for sink in each if sink[0] == "g"} == {"g1", "g2"}
    assert all(len(each) == 4 for each in got)


def test_unsubscribe_is_sent_when_last_local_one_ends(pair: Pair) -> None:
    """Two local subscriptions of one pattern are one at the broker: only the second end
    is sent.
    """
    _, entry = pair.dialog.subscribe("a", None, "one", "w", None)
    pair.dialog.subscribe("a", None, "two", "w", None)
    pair.talk()
    assert pair.dialog.unsubscribe(entry, "one", "w", None) is None
    assert pair.dialog.unsubscribe(entry, "two", "w", None) is not None
    assert pair.dialog.unsubscribe(entry, "two", "w", None) is None
    assert len(pair.dialog.subscriptions) == 0


def test_unsubscribe_without_connection_needs_no_answer(pair: Pair) -> None:
    """A subscription that is not made again need not be ended at the broker."""
    _, entry = pair.dialog.subscribe("a", None, "one", "w", None)
    pair.talk()
    pair.lose()
    assert pair.dialog.unsubscribe(entry, "one", "w", None) is None
    pair.connect()
    assert pair.session is not None
    assert pair.session.subscriptions == []


@pytest.mark.parametrize(
    ("pattern", "group"), [("a..b", None), (">.a", None), ("", None), ("a", ""), ("a", "a b")]
)
def test_subscribe_with_invalid_pattern_or_group_raises(
    pair: Pair, pattern: str, group: str | None
) -> None:
    """Nothing is sent for a pattern or group that the broker would refuse."""
    what = "topic pattern" if group is None else "group name"
    with pytest.raises(InvalidName, match=what):
        pair.dialog.subscribe(pattern, group, "sink", "w", None)
    assert not pair.dialog.data_to_send()
    assert len(pair.dialog.subscriptions) == 0


# Presence


def test_watch_yields_list_once_and_then_changes(pair: Pair) -> None:
    """The list comes first, then each change; an event that repeats a known state is
    ignored.
    """
    pair.dialog.watch("sink", "w", None)
    effects = pair.talk()
    assert [item for _, item in effects.events] == [
        Presence("alice", online=True),
        Presence("bob", online=False),
        Presence("carol", online=False),
    ]
    assert [waiter for waiter, _ in effects.outcomes] == ["w"]
    told = [
        [item for _, item in pair.hear_frame(Kind.EVENT, name="$broker", topic=topic).events]
        for topic in (
            "$broker.online.bob",
            "$broker.online.bob",
            "$broker.offline.bob",
            "$broker.online.x.y",
        )
    ]
    assert told == [
        [Presence("bob", online=True)],
        [],
        [Presence("bob", online=False)],
        [Presence("x.y", online=True)],
    ]


def test_watch_event_before_list_is_not_repeated(pair: Pair) -> None:
    """Events that arrive before the list are in the list: passing them on would repeat
    a client.
    """
    pair.dialog.watch("sink", "w", None)
    assert not pair.hear_frame(Kind.EVENT, name="$broker", topic="$broker.online.alice").events
    assert Presence("alice", online=True) in [item for _, item in pair.talk().events]


def test_watch_after_reconnect_yields_missed_changes(pair: Pair) -> None:
    """Changes that happened without a connection are passed on after the reconnect, and
    nothing else.
    """
    bob = Pair(pair.broker, "bob", b"bob")
    bob.connect()
    pair.dialog.watch("sink", "w", None)
    pair.talk()
    pair.lose()
    bob.lose()
    carol = Pair(pair.broker, "carol", b"carol")
    carol.connect()
    effects = pair.connect()
    assert [item for _, item in effects.events] == [
        Presence("bob", online=False),
        Presence("carol", online=True),
    ]
    del pair.broker.keys["carol"]
    pair.lose()
    assert [item for _, item in pair.connect().events] == [Presence("carol", online=False)]


def test_unwatch_leaves_nothing(pair: Pair) -> None:
    """A watch that is over costs nothing here or at the broker; the list's late answer
    is ignored.
    """
    _, watch = pair.dialog.watch("sink", "w", None)
    pair.dialog.unwatch(watch)
    pair.dialog.unwatch(watch)
    effects = pair.talk()
    assert pair.session is not None
    assert (effects.events, pair.session.subscriptions, len(pair.dialog.subscriptions)) == (
        [],
        [],
        0,
    )


@pytest.mark.parametrize("refused", [b"subscribe", b"clients"])
def test_watch_refused_on_a_new_connection_ends(pair: Pair, refused: bytes) -> None:
    """A watch that can't be made again ends, once, with the broker's reason."""
    pair.dialog.watch("sink", "w", None)
    pair.talk()
    pair.lose()
    pair.broker.intercept = lambda session, envelope: (
        refused in envelope.payload
        and (pair.broker.refuse(session, envelope, ErrorCode.DENIED), True)
    )
    effects = pair.connect()
    assert [(sink, type(error)) for sink, error in effects.ended] == [("sink", Denied)]
    assert len(pair.dialog.subscriptions) == 0


BAD_LISTS = [
    b"{}",
    b"7",
    b"[1]",
    b"\xff",
    b'{"clients": 5}',
    b'{"clients": [1]}',
    *(
        b'{"clients": [{"name": "a", "online": true}, ' + entry + b"]}"
        for entry in (
            b'{"online": true}',
            b'{"name": 5, "online": true}',
            b'{"name": "\\ud800", "online": true}',
            b'{"name": "a/b", "online": true}',
            b'{"name": "$broker", "online": true}',
            b'{"name": "b"}',
            b'{"name": "b", "online": 1}',
            b'{"name": "b", "online": null}',
            b'{"name": "b", "online": true, "since": "now"}',
            b'{"name": "b", "online": true, "since": true}',
            b'{"name": "b", "online": true, "since": NaN}',
            b'{"name": "b", "online": true, "since": Infinity}',
            b'{"name": "b", "online": true, "since": 1e400}',
            b'{"name": "b", "online": true, "since": 1' + b"0" * 4000 + b"}",
        )
    ),
]


@pytest.mark.parametrize("answer", BAD_LISTS)
def test_watch_answered_with_a_list_that_is_not_valid_fails(pair: Pair, answer: bytes) -> None:
    """Its caller hears of it, the watch leaves nothing behind, and the connection goes
    on.
    """
    message_id, _ = pair.dialog.watch("sink", "w", None)
    effects = pair.hear_frame(Kind.REPLY, message_id, "$broker", payload=answer, codec=2)
    assert [(waiter, type(error)) for waiter, error in effects.outcomes] == [("w", ProtocolError)]
    assert (effects.broken, effects.events, len(pair.dialog.subscriptions)) == (None, [], 0)
    pair.talk()
    assert pair.session is not None
    assert pair.session.subscriptions == []


@pytest.mark.parametrize("answer", BAD_LISTS)
def test_watch_resumed_with_a_list_that_is_not_valid_breaks_the_link(
    pair: Pair, answer: bytes
) -> None:
    """No call waits that could hear of it."""
    pair.dialog.watch("sink", "w", None)
    pair.talk()
    pair.lose()
    pair.broker.intercept = lambda session, envelope: (
        b"clients" in envelope.payload
        and (session.deliver(Envelope(Kind.REPLY, envelope.id, "$broker", answer, 2)), True)
    )
    assert isinstance(pair.connect().broken, ProtocolError)


def test_presence_event_without_valid_name_is_ignored(pair: Pair) -> None:
    """A text that can't be a client's name is ignored, and so is an event from another
    sender.
    """
    _, watch = pair.dialog.watch("sink", "w", None)
    pair.talk()
    known = len(watch._states)
    for name, sender in (
        ("x" * 65, "$broker"),
        ("a b", "$broker"),
        ("-", "$broker"),
        ("eve", "bob"),
    ):
        assert not pair.hear_frame(Kind.EVENT, name=sender, topic=f"$broker.online.{name}").events
    assert len(watch._states) == known


def test_presence_of_too_many_names_ends_connection(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of a watch is bounded."""
    monkeypatch.setattr("brokerd_client.presence._MAX_NAMES", 5)
    _, watch = pair.dialog.watch("sink", "w", None)
    pair.talk()
    batches = [
        pair.hear_frame(Kind.EVENT, name="$broker", topic=f"$broker.online.n{n}") for n in range(3)
    ]
    assert [type(effects.broken) for effects in batches] == [type(None), type(None), ProtocolError]
    assert len(watch._states) == 5


# Bytes in


FRAMES = [
    Envelope(Kind.MESSAGE, 1, "bob", b"one"),
    Envelope(Kind.MESSAGE, 2, "bob", b""),
    Envelope(Kind.REQUEST, 3, "carol/x1", b"\0" * 300, 128),
    Envelope(Kind.MESSAGE, 4, "bob", b"ext", 2, extension={"ttl": 1}),
    Envelope(Kind.MESSAGE, 5, "b" * 64, b"x" * 5000),
    Envelope(Kind.EVENT, 6, "bob", b"event", topic="a.b"),
    Envelope(Kind.EVENT, 7, "bob", b"", extension={"k": "v"}, topic="a"),
    Envelope(Kind.REPLY, 8, "bob", b"late"),
    Envelope(Kind.REQUEST, 9, "bob", b"in time", extension={"ttl": 30.0}),
    Envelope(Kind.REQUEST, 10, "carol/x2", b"", 2, extension={"ttl": 30, "traceparent": "00-1-2"}),
]


@pytest.mark.parametrize("step", [1, 2, 15, 16, 17, 64, 4096, 10**6])
def test_frames_cut_anywhere_give_same_messages(pair: Pair, step: int) -> None:
    """Whole, a byte at a time, with a tail: the same messages, in order, with all their
    fields.
    """
    pair.dialog.subscribe(">", None, "sink", "w", None)
    pair.talk()
    data = b"".join(frame(encode(envelope)) for envelope in FRAMES) + frame(encode(FRAMES[0]))[:-1]
    effects: Effects[Message] = Effects()
    for start in range(0, len(data), step):
        merge(effects, pair.hear(data[start : start + step]))
    got = [(m.kind, m.id, m.sender, m.body, m.codec, m.extension) for m in effects.messages]
    assert got == [
        (e.kind, e.id, e.name, e.payload, e.codec, e.extension)
        for e in FRAMES
        if e.kind in (Kind.MESSAGE, Kind.REQUEST)
    ]
    assert [(m.topic, m.body, m.sender) for _, m in effects.events] == [
        ("a.b", b"event", "bob"),
        ("a", b"", "bob"),
    ]
    assert pair.dialog.counters["late"] == 1
    assert not effects.broken
    merge(effects, pair.hear(b"e"))
    assert effects.messages[-1].body == b"one"


RUNS = st.lists(
    st.tuples(
        st.integers(1, 12),
        st.builds(
            Envelope,
            kind=st.sampled_from([Kind.MESSAGE, Kind.REQUEST]),
            name=st.sampled_from(["bob", "eve", "carol/x1"]),
            payload=st.sampled_from([b"", b"0123", b"9876", b"x" * 5000]),
            codec=st.sampled_from([0, 2]),
            extension=st.sampled_from(
                [None, None, {}, {"ttl": 30.0}, {"ttl": 20.0}, {"ttl": 5, "k": "v"}]
            ),
        ),
    ),
    max_size=12,
)


@given(RUNS, st.integers(1, 20_000))
def test_frames_alike_in_runs_give_same_messages(
    runs: list[tuple[int, Envelope]], step: int
) -> None:
    """Many frames that begin alike, and the end of such a run: the same messages as one
    by one, cut anywhere.
    """
    pair = Pair()
    pair.connect()
    sent = [
        replace(envelope, id=index)
        for index, envelope in enumerate(e for count, e in runs for _ in range(count))
    ]
    data = b"".join(frame(encode(envelope)) for envelope in sent)
    effects: Effects[Message] = Effects()
    for start in range(0, len(data), step):
        merge(effects, pair.hear(data[start : start + step]))
    got = [(m.kind, m.id, m.sender, m.body, m.codec, m.extension) for m in effects.messages]
    assert got == [(e.kind, e.id, e.name, e.payload, e.codec, e.extension) for e in sent]
    assert not effects.broken


#: Frames that end calls: the receipt of a broker as it is written, and other forms of it.
OUTCOMES = st.lists(
    st.tuples(
        st.integers(1, 12),
        st.sampled_from(
            [
                Envelope(Kind.RECEIPT, name="$broker"),
                Envelope(Kind.RECEIPT, name="$broker", payload=b"!"),
                Envelope(Kind.RECEIPT, name="$brokes"),
                Envelope(Kind.RECEIPT),
                Envelope(Kind.RECEIPT, name="$broker", codec=2),
                Envelope(Kind.RECEIPT, name="$broker", extension={"ttl": 1}),
                Envelope(Kind.REPLY, name="bob", payload=b"yes"),
                Envelope(Kind.REPLY, name="eve", payload=b"yes"),
                Envelope(Kind.REPLY, name="bob", payload=b"yes", extension={"ttl": 1}),
                Envelope(Kind.MESSAGE, name="bob", payload=b"0123"),
            ]
        ),
    ),
    max_size=12,
)


@given(OUTCOMES, st.integers(1, 1000))
def test_outcomes_in_runs_end_their_calls_in_order(
    runs: list[tuple[int, Envelope]], step: int
) -> None:
    """Every receipt and every reply ends its call, whatever stands beside it, cut
    anywhere.
    """
    pair = Pair()
    pair.connect()
    dialog = pair.dialog
    sent, expected = [], []
    for envelope in (e for count, e in runs for _ in range(count)):
        message_id = len(sent)
        if envelope.kind is Kind.RECEIPT:
            message_id = dialog.send_for_receipt("bob", 0, b"", None, len(sent), None)
        elif envelope.kind is Kind.REPLY:
            message_id = dialog.request(envelope.name, 0, b"", None, len(sent), None)
        if envelope.kind is not Kind.MESSAGE:
            expected.append((len(sent), envelope.kind, message_id))
        sent.append(replace(envelope, id=message_id))
    # A call that is not known any more.
    sent += [Envelope(Kind.RECEIPT, 2**63, "$broker")] * 2
    data = b"".join(frame(encode(envelope)) for envelope in sent)
    effects: Effects[Message] = Effects()
    for start in range(0, len(data), step):
        merge(effects, pair.hear(data[start : start + step]))

    got = [
        (waiter, Kind.RECEIPT if isinstance(value, Receipt) else value.kind, value.id)
        for waiter, value in effects.outcomes
    ]
    assert got == expected
    assert [m.id for m in effects.messages] == [e.id for e in sent if e.kind is Kind.MESSAGE]
    assert (dialog.counters["late"], len(dialog.pending_calls), effects.broken) == (2, 0, None)


@pytest.mark.parametrize("count", [3, 30])
def test_requests_with_equal_ttl_have_extensions_of_their_own(pair: Pair, count: int) -> None:
    """A recipient may change the extension of a message: that of the next is as sent."""
    data = frame(encode(Envelope(Kind.REQUEST, 1, "bob", extension={"ttl": 30.0})))
    for message in pair.hear(data * count).messages:
        assert message.extension == {"ttl": 30.0}
        assert isinstance(message.extension, dict)
        message.extension["ttl"] = 5


def test_requests_with_ttl_in_run_take_room_of_single_ones(pair: Pair) -> None:
    data = frame(encode(Envelope(Kind.REQUEST, 1, "bob", b"x", extension={"ttl": 30.0})))
    assert pair.hear(data * 30).size == 30 * pair.hear(data).size


@pytest.mark.parametrize("name", [b"b\xffb", b"b b", b"/ab", b"b/A"])
@pytest.mark.parametrize("alike", [0, 3, 5, 30])
def test_frames_alike_with_invalid_sender_are_skipped(pair: Pair, alike: int, name: bytes) -> None:
    """A message whose sender is not valid is skipped wherever it stands; all others are
    delivered.
    """
    good = frame(encode(Envelope(Kind.MESSAGE, 1, "bob", b"x")))
    effects = pair.hear(good * alike + good.replace(b"bob", name) + good * 10)
    assert (len(effects.messages), len(effects.unreadable), effects.broken) == (alike + 10, 1, None)
    assert isinstance(effects.unreadable[0], MalformedEnvelope)


def test_frame_with_long_length_form_is_received(pair: Pair) -> None:
    """A frame announced with -1 and 64 bits is a frame like any other, whole or in
    pieces.
    """
    body = encode(FRAMES[0])
    data = b"\xff\xff\xff\xff" + len(body).to_bytes(8, "big") + body
    assert pair.hear(data).messages[0].body == b"one"
    effects: Effects[Message] = Effects()
    for byte in data:
        merge(effects, pair.hear(bytes([byte])))
    assert effects.messages[0].body == b"one"


@pytest.mark.parametrize("pieces", [1, 12])
@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"\xff\xff\xff\xfe" + b"\0" * 12, BadLength),
        (b"\xff\xff\xff\xff" + b"\xff" * 8 + b"\0" * 4, FrameTooBig),
        (b"\x40\0\0\0" + b"\0" * MAX_HEAD_SIZE, FrameTooBig),
        (
            b"\x40\0\0\0" + HEADER.pack(1, 0, 0, 3, 7) + b"b b" + b"\0" * MAX_HEAD_SIZE,
            FrameTooBig,
        ),
    ],
)
def test_frame_with_invalid_length_ends_connection(
    pair: Pair, data: bytes, cause: type[RemoteError], pieces: int
) -> None:
    """The beginning of the next frame is not known any more. The frames before it are
    delivered.
    """
    effects = pair.hear(frame(encode(FRAMES[0])))
    step = len(data) if pieces == 1 else 1
    for start in range(0, len(data), step):
        merge(effects, pair.hear(data[start : start + step]))
        if effects.broken:
            break
    assert isinstance(effects.broken, ProtocolError)
    assert isinstance(effects.broken.__cause__, cause)
    assert len(effects.messages) == 1


@pytest.mark.parametrize("pieces", [1, 12])
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"\0\0\0\x02ab", MalformedEnvelope),
        (b"\0\0\0\x0c\x08" + b"\0" * 11, MalformedEnvelope),
        (b"\0\0\0\x0c\x09" + b"\0" * 11, MalformedEnvelope),
        (b"\0\0\0\x0c\x0a" + b"\0" * 11, MalformedEnvelope),
        (b"\0\0\0\x0c\x01\0\0\x05" + b"\0" * 8, MalformedEnvelope),
        (b"\0\0\0\x0c\x07" + b"\0" * 11, MalformedEnvelope),
        (b"\0\0\0\x0d\x01\0\0\x01" + b"\0" * 8 + b"\xff", MalformedEnvelope),
        (b"\0\0\0\x0f\x05\0\0\x01" + b"\0" * 8 + b"a\x01\xff", MalformedEnvelope),
        (b"\0\0\0\x0f\x05\0\0\x01" + b"\0" * 8 + b"a\x09b", MalformedEnvelope),
        (b"\0\0\0\x0d\x05\0\0\x01" + b"\0" * 8 + b"a", MalformedEnvelope),
        (b"\0\0\0\x0e\x05\0\0\x01" + b"\0" * 8 + b"a\0", MalformedEnvelope),
    ],
)
def test_frame_unreadable_is_skipped(
    pair: Pair, data: bytes, error: type[RemoteError], pieces: int
) -> None:
    """The frames before and behind it are delivered."""
    good = frame(encode(FRAMES[0]))
    effects: Effects[Message] = Effects()
    for each in (good, data, good, data * 2, good):
        step = len(each) if pieces == 1 else 1
        for start in range(0, len(each), step):
            merge(effects, pair.hear(each[start : start + step]))
    assert [type(each) for each in effects.unreadable] == [error] * 3
    assert (len(effects.messages), effects.broken, pair.dialog.counters["unreadable"]) == (
        3,
        None,
        3,
    )


TOO_DEEP = b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"


def with_extension(
    raw: bytes,
    kind: Kind = Kind.REQUEST,
    message_id: int = 7,
    name: bytes = b"bob",
    rest: bytes = b"",
) -> bytes:
    """Return a frame with these bytes for its extension."""
    return frame(
        HEADER.pack(kind, 2, 0, len(name), message_id), name, len(raw).to_bytes(2, "big"), raw, rest
    )


def test_request_unreadable_is_answered_with_error(pair: Pair) -> None:
    """Its requester does not wait for its timeout; a message is only reported."""
    effects = pair.hear(
        with_extension(TOO_DEEP)
        + with_extension(b"no json")
        + with_extension(TOO_DEEP, Kind.MESSAGE)
    )
    assert len(effects.unreadable) == 3
    pair.broker.seen.clear()
    pair.talk()
    answers = [
        (each.kind, each.name, each.id, json.loads(each.payload)["code"])
        for each in pair.broker.seen
    ]
    assert answers == [(Kind.ERROR, "bob", 7, "unreadable")] * 2


@pytest.mark.parametrize("kind", [Kind.REPLY, Kind.ERROR])
@pytest.mark.parametrize("purpose", ["request", "control"])
def test_answer_unreadable_fails_its_call(pair: Pair, kind: Kind, purpose: str) -> None:
    """The call that it answers gets an error, and does not wait without end."""
    if purpose == "request":
        message_id, name = pair.dialog.request("bob", 0, b"", None, "w", None), b"bob"
    else:
        message_id, name = pair.dialog.control("ping", {}, "w", None), b"$broker"
    assert not pair.hear(with_extension(TOO_DEEP, kind, message_id, b"carol")).outcomes
    effects = pair.hear(with_extension(TOO_DEEP, kind, message_id, name))
    assert [(waiter, type(error)) for waiter, error in effects.outcomes] == [("w", ProtocolError)]
    assert (effects.unreadable, effects.broken, len(pair.dialog.pending_calls)) == ([], None, 0)


@pytest.mark.parametrize(
    ("kind", "purpose", "is_answer"),
    [
        (Kind.RECEIPT, "receipt", True),
        (Kind.RECEIPT, "request", False),
        (Kind.REPLY, "receipt", False),
    ],
)
def test_unreadable_frame_ends_only_a_call_that_its_kind_can_answer(
    pair: Pair, kind: Kind, purpose: str, is_answer: bool
) -> None:
    if purpose == "request":
        message_id = pair.dialog.request("bob", 0, b"", None, "w", None)
    else:
        message_id = pair.dialog.send_for_receipt("bob", 0, b"", None, "w", None)
    effects = pair.hear(with_extension(TOO_DEEP, kind, message_id, b"$broker"))
    outcomes = [(waiter, type(error)) for waiter, error in effects.outcomes]
    assert outcomes == ([("w", ProtocolError)] if is_answer else [])
    assert len(pair.dialog.pending_calls) == (0 if is_answer else 1)


@pytest.mark.parametrize("size", [MAX_HEAD_SIZE + 1, 2 * MAX_HEAD_SIZE + 1])
def test_frame_cut_behind_its_head_arrives_whole(pair: Pair, size: int) -> None:
    """Also one that is too short to be taken as a large one."""
    whole = frame(encode(Envelope(Kind.MESSAGE, 1, "bob", b"x" * size)))
    cut = MAX_HEAD_SIZE + 5
    assert not pair.hear(whole[:cut]).messages
    (message,) = pair.hear(whole[cut:]).messages
    assert message.body == b"x" * size


@given(st.binary(max_size=200), st.integers(1, 40))
def test_random_bytes_raise_remote_errors_only(data: bytes, step: int) -> None:
    """Whatever bytes arrive, before or after the handshake, the dialog goes on or
    reports a mistake of the peer.
    """
    for ready in (False, True):
        pair = Pair()
        if ready:
            pair.connect()
        else:
            pair.dialog.dialing(0)
            pair.dialog.opened(NONCE)
        for start in range(0, len(data), step):
            effects = pair.hear(data[start : start + step])
            if effects.broken:
                assert isinstance(effects.broken, RemoteError)
                break


# Bytes out


def test_sent_frames_hold_given_fields(pair: Pair) -> None:
    """Recipient, codec, payload and extension of every kind arrive at the broker as
    given.
    """
    pair.broker.seen.clear()
    pair.dialog.send("bob", 2, b"{}", {"ttl": 3})
    pair.dialog.publish("a.b", 0, b"x", {"k": 1})
    pair.dialog.publish("a.b", 0, b"y")
    pair.dialog.reply("bob/1", 99, 0, b"r")
    pair.dialog.fail("bob", 98, "mine", "text")
    pair.talk()
    first, second, third, fourth, fifth = pair.broker.seen
    assert (first.name, first.codec, first.payload, first.extension) == (
        "bob",
        2,
        b"{}",
        {"ttl": 3},
    )
    assert (second.topic, second.payload, second.extension) == ("a.b", b"x", {"k": 1})
    assert (third.topic, third.payload) == ("a.b", b"y")
    assert (fourth.kind, fourth.name, fourth.id, fourth.payload) == (Kind.REPLY, "bob/1", 99, b"r")
    assert (fifth.kind, fifth.id, fifth.codec) == (Kind.ERROR, 98, CodecId.JSON)
    assert json.loads(fifth.payload) == {"code": "mine", "message": "text", "name": "alice"}


LOT = [
    ("bob", 0, b"one"),
    ("carol/x1", 2, b"{}"),
    ("bob", 0, b""),
    ("bob", 0, b"two"),
    ("alice", 128, b"x" * 3000),
]


@pytest.mark.parametrize("limit", [2**31, 100])
def test_bulk_bytes_equal_those_of_single_sends(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Messages sent together have the bytes of the same messages sent one after the
    other, long ones too.
    """
    monkeypatch.setattr(encoder, "_MAX_SHORT_BODY", limit)
    one, many = Pair(), Pair()
    one.connect()
    many.connect()
    ids = [one.dialog.send(*message) for message in LOT]
    assert many.dialog.send_many(*zip(*LOT, strict=True)) == ids
    assert many.dialog.untaken == one.dialog.untaken
    assert many.dialog.data_to_send() == one.dialog.data_to_send()
    assert many.dialog.send("bob", 0, b"") == ids[-1] + 1
    assert many.dialog.send_many((), (), ()) == []


@pytest.mark.parametrize("size", [0, 1, 16, 32, 33])
@pytest.mark.parametrize("count", [1, 3, 300])
def test_many_messages_of_one_size_are_those_of_single_sends(size: int, count: int) -> None:
    one, many = Pair(), Pair()
    bodies = [bytes((number + place) % 256 for place in range(size)) for number in range(count)]
    for pair in (one, many):
        pair.connect()

    ids = [one.dialog.send("bob/1", 128, body) for body in bodies]

    assert many.dialog.send_many(["bob/1"] * count, [128] * count, bodies) == ids
    assert many.dialog.untaken == one.dialog.untaken
    assert many.dialog.data_to_send() == one.dialog.data_to_send()


@pytest.mark.parametrize("size", [0, 1000, 1011, 5000])
@pytest.mark.parametrize("extension", [None, {"ttl": 2.5}, {"key": "value"}])
def test_frame_of_any_size_is_written_as_its_envelope(
    pair: Pair, size: int, extension: dict[str, Any] | None
) -> None:
    """The joined frames and those whose bodies are not copied have the same bytes."""
    body = b"x" * size
    sent = pair.dialog.send("bob", 2, body, extension)
    published = pair.dialog.publish("a.b", 2, body, extension)
    envelopes = [
        Envelope(Kind.MESSAGE, sent, "bob", body, 2, extension=extension),
        Envelope(Kind.EVENT, published, "", body, 2, topic="a.b", extension=extension),
    ]
    data = b"".join(frame(encode(envelope)) for envelope in envelopes)
    assert (pair.dialog.untaken, pair.dialog.data_to_send()) == (len(data), data)


@pytest.mark.parametrize("handed", [0, 1, 21, 22, 60, 3000, None])
@pytest.mark.parametrize("doubtful", [0, 30])
def test_bulk_lost_has_outcomes_of_single_sends(handed: int | None, doubtful: int) -> None:
    """If the connection ends in between, each message is in doubt or was not sent, as
    if it had been sent alone.
    """
    told = []
    for together in (False, True):
        pair = Pair()
        pair.connect()
        if together:
            pair.dialog.send_many(*zip(*LOT, strict=True))
        else:
            for message in LOT:
                pair.dialog.send(*message)
        pair.dialog.send("bob", 0, b"last")
        data = pair.dialog.data_to_send()
        pair.dialog.wrote(len(data) if handed is None else handed)
        told.append(
            [
                (type(error), error.message_id, str(error))
                for error in pair.lose(doubtful=doubtful).undelivered
            ]
        )
    assert told[0] == told[1]
    assert bool(told[0]) is (handed is not None)


@pytest.mark.parametrize("handed", [0, 1, 21, 22, 60, 3000, None])
@pytest.mark.parametrize("extension", [None, {"key": "value"}])
def test_bulk_for_receipts_is_and_ends_as_single_sends_do(
    handed: int | None, extension: dict[str, Any] | None
) -> None:
    """The bytes are those of single sends, and so is the outcome of each when the
    connection ends in between.
    """
    told, written = [], []
    for together in (False, True):
        pair = Pair()
        pair.connect()
        if together:
            columns = zip(*LOT, strict=True)
            ids = pair.dialog.send_many_for_receipts(*columns, extension, range(len(LOT)), 5.0)
            assert list(ids) == list(pair.dialog.pending_calls)
        else:
            for waiter, message in enumerate(LOT):
                pair.dialog.send_for_receipt(*message, extension, waiter, 5.0)
        assert pair.dialog.next_deadline() == 5.0
        data = pair.dialog.data_to_send()
        pair.dialog.wrote(len(data) if handed is None else handed)
        effects = pair.lose()
        assert not effects.undelivered
        told.append([(waiter, type(error), str(error)) for waiter, error in effects.outcomes])
        written.append(data)
    assert written[0] == written[1]
    assert told[0] == told[1]
    assert [waiter for waiter, *_ in told[0]] == list(range(len(LOT)))


def test_bulk_with_invalid_recipient_sends_nothing(pair: Pair) -> None:
    """With one invalid recipient nothing is written; without a connection neither."""
    with pytest.raises(InvalidName):
        pair.dialog.send_many(["bob", "b b"], [0, 0], [b"", b""])
    with pytest.raises(InvalidName):
        pair.dialog.send_many_for_receipts(["bob", "b b"], [0, 0], [b"", b""], None, "ab", None)
    assert (pair.dialog.untaken, len(pair.dialog.pending_calls)) == (0, 0)
    pair.lose()
    with pytest.raises(Disconnected):
        pair.dialog.send_many(["bob"], [0], [b""])


@pytest.mark.parametrize("to", ["", "a b", "x/Y", "-a", "a/", "ä"])
def test_send_to_invalid_name_raises(pair: Pair, to: str) -> None:
    """Nothing is sent to a name that can't exist."""
    with pytest.raises(InvalidName):
        pair.dialog.send(to, 0, b"")
    with pytest.raises(InvalidName):
        pair.dialog.publish("a.*", 0, b"")
    assert not pair.dialog.data_to_send()


def test_name_and_topic_caches_are_bounded(pair: Pair) -> None:
    """Any number of different names and topics, in and out, costs bounded memory and
    arrives unchanged.
    """
    draw = random.Random(1)
    names = ["".join(draw.choices(string.ascii_letters, k=12)) for _ in range(10_000)]
    pair.dialog.subscribe(">", None, "sink", "w", None)
    pair.talk()
    for name in names:
        pair.dialog.send(name, 0, b"")
        pair.dialog.publish(name, 0, b"")
        assert pair.hear_frame(Kind.MESSAGE, 1, name).messages[0].sender == name
        assert pair.hear_frame(Kind.EVENT, 1, "bob", topic=name).events[0][1].topic == name
        pair.dialog.send_many([name], [0], [b""])
    frame_encoder, frame_decoder = pair.dialog._encoder, pair.dialog._inbound._decoder
    for table in (
        frame_encoder._recipients,
        frame_encoder._starts,
        frame_encoder._topics,
        frame_decoder._senders,
        frame_decoder._topics,
        pair.dialog.subscriptions._remembered,
    ):
        assert 0 < len(table) <= 4096


def test_frame_encoder_long_body_uses_long_length_form(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body beyond the short form is framed by wire.framing, to the same effect."""
    monkeypatch.setattr(encoder, "_MAX_SHORT_BODY", 10)
    pair.broker.seen.clear()
    pair.dialog.send("bob", 0, b"x" * 20)
    pair.dialog.publish("a", 0, b"y" * 20)
    pair.talk()
    assert [envelope.payload for envelope in pair.broker.seen] == [b"x" * 20, b"y" * 20]


def test_dialog_counters_are_read_by_name(pair: Pair) -> None:
    """The counters can be read by name."""
    pair.lose()
    assert pair.dialog.counters == {
        "late": 0,
        "dropped": 0,
        "undelivered": 0,
        "unreadable": 0,
        "unrouted": 0,
        "losses": 1,
        "failed_attempts": 0,
    }


def test_watch_ended_before_refused_list_is_not_reported(pair: Pair) -> None:
    """On a new connection, the refused list of a watch that is over already is ignored."""
    _, watch = pair.dialog.watch("sink", "w", None)
    pair.talk()
    pair.lose()
    pair.broker.intercept = lambda session, envelope: (
        b"clients" in envelope.payload
        and (
            pair.dialog.unwatch(watch),
            pair.broker.refuse(session, envelope, ErrorCode.DENIED),
            True,
        )
    )
    assert pair.connect().ended == []


def test_internal_operation_refused_is_ignored(pair: Pair) -> None:
    """Taking back a subscription may fail; no caller waits for the outcome."""
    pair.dialog.subscribe("a", None, "sink", "w", None)
    pair.broker.intercept = lambda session, envelope: (
        b"unsubscribe" in envelope.payload
        and (pair.broker.refuse(session, envelope, ErrorCode.DENIED), True)
    )
    pair.talk()
    _, entry = pair.dialog.subscribe("a", None, "other", "v", None)
    pair.talk()
    pair.dialog.unsubscribe(entry, "sink", "u", None)
    second, _ = pair.dialog.subscribe("b", None, "third", "w", None)
    pair.dialog.abandon(second)
    effects = pair.talk()
    assert (effects.outcomes, effects.undelivered, len(pair.dialog.pending_calls)) == ([], [], 0)


# The broker goes away


def draining(pair: Pair) -> Effects[Message]:
    """Tell the dialog that its connection is about to be closed, and let both sides
    talk.
    """
    effects = pair.hear_frame(Kind.EVENT, name="$broker", topic="$broker.draining", payload=b"{}")
    if effects.broken is None:
        merge(effects, pair.talk())
    return effects


def requested_operations(pair: Pair) -> list[str]:
    """Return the operations requested from the broker, in order."""
    return [json.loads(each.payload)["op"] for each in pair.broker.seen if each.name == "$broker"]


def test_draining_event_ends_connection_after_finished(pair: Pair) -> None:
    effects = draining(pair)
    assert requested_operations(pair) == ["whoami", "goaway", "finished"]
    assert type(effects.broken) is Disconnected
    assert type(effects.broken.__cause__) is ShuttingDown
    assert pair.dialog.counters["unrouted"] == 0
    pair.dialog.lost(effects.broken, pair.now, 0.5)
    assert pair.dialog.state is State.WAITING
    pair.connect()
    assert pair.dialog.state is State.READY


def test_draining_dialog_answers_and_sends_nothing_new(pair: Pair) -> None:
    pair.hear_frame(Kind.REQUEST, 9, payload=b"?")
    pair.dialog.control("ping", {}, "pending", None)
    pair.hear_frame(Kind.EVENT, name="$broker", topic="$broker.draining", payload=b"{}")
    assert pair.dialog.state is State.DRAINING
    for send in (
        lambda: pair.dialog.send("bob", 0, b""),
        lambda: pair.dialog.send_many(["bob"], [0], [b""]),
        lambda: pair.dialog.send_for_receipt("bob", 0, b"", None, None, None),
        lambda: pair.dialog.send_many_for_receipts(["bob"], [0], [b""], None, [None], None),
        lambda: pair.dialog.publish("t", 0, b""),
        lambda: pair.dialog.request("bob", 0, b"", None, None, None),
        lambda: pair.dialog.control("ping", {}, None, None),
    ):
        with pytest.raises(Disconnected, match="closes the connection soon"):
            send()
    pair.dialog.reply("bob", 9, 0, b"!")
    pair.dialog.fail("bob", 10, "failed", "no")
    pair.talk()
    assert [each.kind for each in pair.broker.seen if each.name == "bob"] == [
        Kind.REPLY,
        Kind.ERROR,
    ]


@pytest.mark.parametrize("end", ["answer", "timeout", "abandon"])
def test_draining_finished_waits_for_calls_under_way(pair: Pair, end: str) -> None:
    pair.broker.intercept = lambda session, envelope: envelope.name == "bob"
    message_id = pair.dialog.request("bob", 0, b"?", None, "waiter", 5.0)
    assert draining(pair).broken is None
    assert requested_operations(pair)[-1] == "goaway"
    if end == "answer":
        assert pair.hear_frame(Kind.REPLY, message_id, payload=b"!").outcomes
    elif end == "timeout":
        assert pair.dialog.tick(5.0).outcomes
    else:
        pair.dialog.abandon(message_id)
    assert type(pair.talk().broken) is Disconnected
    assert requested_operations(pair)[-1] == "finished"


def test_draining_refusals_before_finished_are_reported(pair: Pair) -> None:
    def refuse(session: Session, envelope: Envelope) -> bool:
        if envelope.name == "bob":
            pair.broker.refuse(session, envelope, ErrorCode.SHUTTING_DOWN)
        return envelope.name == "bob"

    pair.broker.intercept = refuse
    ids = [pair.dialog.send("bob", 0, b"x") for _ in range(3)]
    effects = draining(pair)
    assert [
        (type(error), error.message_id)
        for error in effects.undelivered
        if isinstance(error, ShuttingDown)
    ] == [(ShuttingDown, message_id) for message_id in ids]
    assert effects.broken is not None


@pytest.mark.parametrize("subscribed", [False, True])
def test_draining_event_without_goaway_changes_nothing(subscribed: bool) -> None:
    """A broker that does not know the operation refuses it; a subscriber still gets the
    event.
    """
    pair = Pair()

    def refuse(session: Session, envelope: Envelope) -> bool:
        unknown = b"goaway" in envelope.payload
        if unknown:
            pair.broker.refuse(session, envelope, ErrorCode.UNSUPPORTED)
        return unknown

    pair.broker.intercept = refuse
    pair.connect()
    if subscribed:
        pair.dialog.subscribe("$broker.draining", None, "sink", "waiter", None)
        pair.talk()
    effects = draining(pair)
    assert (len(effects.events), effects.broken, pair.dialog.state) == (
        subscribed,
        None,
        State.READY,
    )


def test_draining_event_reaches_subscribers(pair: Pair) -> None:
    pair.dialog.subscribe("$broker.draining", None, "sink", "waiter", None)
    pair.talk()
    effects = draining(pair)
    assert [sink for sink, _ in effects.events] == ["sink"]
    assert effects.broken is not None


def test_draining_event_from_client_changes_nothing(pair: Pair) -> None:
    pair.hear_frame(Kind.EVENT, name="bob", topic="$broker.draining")
    assert pair.dialog.state is State.READY


@pytest.mark.parametrize("close", [False, True])
def test_draining_dialog_closed_or_cut_ends(pair: Pair, close: bool) -> None:
    pair.broker.intercept = lambda session, envelope: b"finished" in envelope.payload
    draining(pair)
    assert pair.dialog.state is State.DRAINING
    if close:
        pair.dialog.close(pair.now)
        assert pair.dialog.state is State.CLOSING
    else:
        pair.lose()
        assert pair.dialog.state is State.WAITING


def frames_sent(pair: Pair) -> list[Envelope]:
    """Return the frames that the dialog wants to send."""
    reader = FrameReader()
    reader.feed(pair.dialog.data_to_send())
    frames = []
    while (body := reader.next_frame(2**20)) is not None:
        frames.append(parse(body))
    return frames


def test_dialog_bulk_with_an_extension_gives_it_to_every_message(pair: Pair) -> None:
    """The ids, the order and the payloads are those of a bulk without one."""
    frames_sent(pair)
    ids = pair.dialog.send_many(["bob", "carol"], [0, 2], [b"1", b"2"], {"key": "value"})
    sent = frames_sent(pair)
    assert [(frame.id, frame.name, frame.codec, frame.payload) for frame in sent] == [
        (ids[0], "bob", 0, b"1"),
        (ids[1], "carol", 2, b"2"),
    ]
    assert [frame.extension for frame in sent] == [{"key": "value"}] * 2


def with_features(pair: Pair) -> Pair:
    """Make the broker one that limits requests in flight and cancels them."""
    pair.dialog._features = frozenset({"cancels", "in_flight"})
    return pair


def test_dialog_request_given_up_is_cancelled_and_its_late_error_is_not_reported(
    pair: Pair,
) -> None:
    """The broker's confirmation of a cancellation is no failure of a send."""
    dialog = with_features(pair).dialog
    message_id = dialog.request("bob", 0, b"", None, "waiter", None)
    frames_sent(pair)
    dialog.abandon(message_id)
    (cancel,) = frames_sent(pair)
    assert (cancel.kind, cancel.id, cancel.name) == (Kind.ERROR, message_id, "$broker")
    assert json.loads(cancel.payload)["code"] == "cancelled"
    payload = error_payload("cancelled", "it was", "bob")
    effects = pair.hear_frame(Kind.ERROR, message_id, "$broker", payload=payload)
    assert not effects.undelivered
    assert dialog.counters["late"] == 1


def test_dialog_that_gives_up_many_requests_remembers_the_last(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of requests that were given up is bounded."""
    monkeypatch.setattr(inbound, "_MAX_GIVEN_UP", 2)
    ids = [pair.dialog.request("bob", 0, b"", None, "waiter", None) for _ in range(3)]
    for message_id in ids:
        pair.dialog.abandon(message_id)
    payload = error_payload("expired", "it was", "bob")
    heard = [
        pair.hear_frame(Kind.ERROR, message_id, "$broker", payload=payload) for message_id in ids
    ]
    assert [len(effects.undelivered) for effects in heard] == [1, 0, 0]


def test_dialog_cancelled_request_is_marked_unless_it_is_answered(pair: Pair) -> None:
    """The broker's word that a request is over reaches the message, once."""
    payload = error_payload("cancelled", "it was", "alice")
    (request,) = pair.hear_frame(Kind.REQUEST, 5).messages
    (answered,) = pair.hear_frame(Kind.REQUEST, 6).messages
    pair.dialog.reply("bob", 6, 0, b"")
    answered.mark_answered()
    for message_id in (5, 5, 6, 7):
        pair.hear_frame(Kind.ERROR, message_id, payload=payload, flags=Flag.ACK)
    assert (request.cancelled, answered.cancelled) == (True, False)
    assert pair.dialog.needs_no_answer(request)
    assert not pair.dialog.needs_no_answer(answered)
    assert pair.dialog.counters["late"] == 1


def test_dialog_request_past_its_deadline_is_over(pair: Pair) -> None:
    """A request that no handler has begun is dropped when its time is over."""
    (timed,) = pair.hear_frame(Kind.REQUEST, 5, extension={"ttl": 2}).messages
    (endless,) = pair.hear_frame(Kind.REQUEST, 6, extension={"other": 1}).messages
    assert (timed.deadline, endless.deadline) == (pair.now + 2, None)
    assert not pair.dialog.is_over(timed, pair.now + 1)
    assert pair.dialog.is_over(timed, pair.now + 2)
    assert not pair.dialog.is_over(endless, pair.now + 1e9)
    assert pair.dialog.counters["dropped"] == 1


def test_dialog_limits_requests_in_flight_until_it_stops_them(pair: Pair) -> None:
    """The limit is told when it changes, and stays at 0 once requests are stopped."""
    dialog = with_features(pair).dialog

    def told() -> list[int]:
        return [json.loads(frame.payload)["n"] for frame in frames_sent(pair)]

    dialog.raise_in_flight(9)
    assert told() == []
    dialog.limit_in_flight(4)
    dialog.limit_in_flight(4)
    dialog.raise_in_flight(3)
    dialog.raise_in_flight(6)
    assert told() == [4, 6]
    dialog.stop_requests()
    dialog.raise_in_flight(7)
    assert told() == [0]
    assert dialog.returns_requests
    dialog.give_back("bob", 5)
    (returned,) = frames_sent(pair)
    assert json.loads(returned.payload)["code"] == "back"


def test_dialog_timeout_known_to_the_broker_is_timed_out_not_expired(pair: Pair) -> None:
    """The broker's clock may be the first to end a request with the caller's timeout."""
    ids = [
        pair.dialog.request("bob", 0, b"", {"ttl": 3}, waiter, None, limit_s=limit_s)
        for waiter, limit_s in (("timeout", 3.0), ("ttl", None))
    ]
    payload = error_payload("expired", "it was", "bob")
    outcomes = [
        pair.hear_frame(Kind.ERROR, message_id, "$broker", payload=payload).outcomes[0]
        for message_id in ids
    ]
    assert [(waiter, type(error)) for waiter, error in outcomes] == [
        ("timeout", TimedOut),
        ("ttl", Expired),
    ]
    assert "within 3 s" in str(outcomes[0][1])


def test_timed_out_call_says_after_how_long(pair: Pair) -> None:
    pair.dialog.request("bob", 0, b"?", None, "w", Deadline.after(1.5, 3.5))
    [(_, error)] = pair.dialog.tick(5.0).outcomes
    assert str(error).endswith("within 1.5 s")


def test_dialog_late_sends_keep_the_ids_that_they_were_given(pair: Pair) -> None:
    """A face may take an id first and queue the frame later; without a connection the
    frame is not queued.
    """
    first, second = next(pair.dialog.late_ids), next(pair.dialog.late_ids)
    pair.dialog.send_as(first, "bob", 0, b"late", {"ttl": 3})
    pair.dialog.publish_as(second, "news", 0, b"later", None)
    sent = frames_sent(pair)
    assert [(each.kind, each.id, each.payload) for each in sent] == [
        (Kind.MESSAGE, first, b"late"),
        (Kind.EVENT, second, b"later"),
    ]
    assert (sent[0].extension, sent[1].topic) == ({"ttl": 3}, "news")
    assert [(type(each), each.message_id) for each in pair.lose().undelivered] == [
        (Disconnected, first),
        (Disconnected, second),
    ]
    with pytest.raises(Disconnected):
        pair.dialog.send_as(first, "bob", 0, b"", None)
    with pytest.raises(Disconnected):
        pair.dialog.publish_as(second, "news", 0, b"", None)
    assert not pair.dialog.untaken


def test_dialog_counts_are_in_order_when_every_byte_is_written_or_waits(pair: Pair) -> None:
    pair.dialog.send("bob", 0, b"x")
    assert not pair.dialog.in_order(0)
    size = len(pair.dialog.data_to_send())
    assert pair.dialog.in_order(size)
    assert not pair.dialog.in_order(size - 1)
    pair.dialog.wrote(size - 1)
    assert pair.dialog.in_order(1)


@pytest.mark.parametrize("given", [False, True])
def test_dialog_recovered_between_peek_and_took_writes_each_byte_once(
    pair: Pair, given: bool
) -> None:
    """The face says how many bytes it got; bytes that it did not get are still queued."""
    encoder = pair.dialog._encoder
    written = encoder.written
    pair.dialog.send("bob", 0, b"x")
    piece = pair.dialog.peek()
    pair.dialog.recover(written + len(piece) if given else written, len(piece) if given else 0)
    assert pair.dialog.unwritten == len(piece)
    assert pair.dialog.data_to_send() == (b"" if given else piece)
    pair.dialog.wrote(len(piece))
    assert pair.dialog.in_order(0)
    assert not pair.lose().undelivered


def test_dialog_forgotten_sink_leaves_its_subscriptions_and_watches(pair: Pair) -> None:
    """Other sinks keep theirs."""
    pair.dialog.subscribe("a", None, "sink", "waiter", None)
    pair.dialog.subscribe("a", None, "other", "waiter", None)
    pair.dialog.watch("sink", "waiter", None)
    pair.talk()
    pair.dialog.forget("sink")
    pair.talk()
    assert requested_operations(pair)[-2:] == ["unsubscribe", "unsubscribe"]
    effects = pair.hear_frame(Kind.EVENT, topic="a")
    assert [sink for sink, _ in effects.events] == ["other"]
    assert not pair.dialog._watches


def test_dialog_answer_without_connection_is_refused(pair: Pair) -> None:
    pair.hear_frame(Kind.REQUEST, 9)
    assert pair.dialog.may_answer
    pair.lose()
    assert not pair.dialog.may_answer
    with pytest.raises(Disconnected, match="cut"):
        pair.dialog.reply("bob", 9, 0, b"!")
    with pytest.raises(Disconnected, match="cut"):
        pair.dialog.fail("bob", 9, "failed", "no")
    pair.dialog.close(pair.now)
    with pytest.raises(Closed):
        pair.dialog.reply("bob", 9, 0, b"!")


@pytest.mark.parametrize("state", ["ready", "not_written", "closing"])
def test_dialog_unreadable_request_is_answered_only_if_the_broker_reads(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """Answers that can't leave would fill memory; a closing client sends none."""
    if state == "not_written":
        monkeypatch.setattr(dialog, "_MAX_UNWRITTEN", 10)
        pair.dialog.send("carol", 0, b"x" * 10)
    elif state == "closing":
        pair.dialog.control("ping", {}, "waiter", None)
        pair.dialog.close(pair.now)
    effects = pair.hear(with_extension(b"no json", message_id=9))
    assert len(effects.unreadable) == 1
    answers = [each for each in frames_sent(pair) if each.kind is Kind.ERROR]
    assert [each.id for each in answers] == ([9] if state == "ready" else [])


def test_draining_event_heard_twice_is_reported_once(pair: Pair) -> None:
    pair.dialog.control("ping", {}, "waiter", None)
    heard = [
        pair.hear_frame(Kind.EVENT, name="$broker", topic="$broker.draining", payload=b"{}")
        for _ in range(2)
    ]
    assert [len(effects.changes) for effects in heard] == [1, 0]
    assert pair.dialog.state is State.DRAINING


def test_dialog_of_small_inbox_warns_of_longer_messages() -> None:
    """A broker may pass on longer messages than the inbox of this client allows."""
    pair = Pair(inbox=2**20)
    largest = 2**26

    def answer(session: Session, envelope: Envelope) -> bool:
        introduces = b"whoami" in envelope.payload
        if introduces:
            introduction = {
                "name": "alice",
                "address": "alice",
                "limits": {"max_message": largest},
            }
            body = json.dumps(introduction).encode()
            session.deliver(Envelope(Kind.REPLY, envelope.id, "$broker", body, CodecId.JSON))
        return introduces

    pair.broker.intercept = answer
    (warning,) = pair.connect().warnings
    assert f"messages of up to {largest} bytes" in warning
    assert f"an inbox of at least {largest // 4} bytes" in warning


def test_dialog_invalid_answer_that_is_not_needed_changes_nothing(pair: Pair) -> None:
    """No call waits for the end of a subscription, so its answer ends nothing."""
    _, entry = pair.dialog.subscribe("a", None, "sink", "waiter", None)
    pair.talk()
    pair.dialog.forget("sink")
    (operation,) = frames_sent(pair)
    assert (json.loads(operation.payload)["op"], entry.sinks) == ("unsubscribe", [])
    effects = pair.hear_frame(Kind.REPLY, operation.id, "$broker", payload=b"[", codec=CodecId.JSON)
    assert (effects.broken, effects.outcomes, len(pair.dialog.pending_calls)) == (None, [], 0)


def test_dialog_send_refused_between_peek_and_took_is_reported_once(pair: Pair) -> None:
    message_id = pair.dialog.send("bob", 0, b"x")
    piece = pair.dialog.peek()
    payload = error_payload("offline", "it is", "bob")
    effects = pair.hear_frame(Kind.ERROR, message_id, "$broker", payload=payload)
    assert [error.message_id for error in effects.undelivered] == [message_id]
    pair.dialog.took(len(piece))
    assert not pair.lose().undelivered


@pytest.mark.parametrize("step", [1, 10])
def test_dialog_short_frame_above_the_limit_is_skipped(pair: Pair, step: int) -> None:
    """The frame behind it is delivered, however the bytes are cut."""
    pair.dialog._inbound._decoder._largest_body = 20
    data = frame(encode(Envelope(Kind.MESSAGE, 1, "bob", b"x" * 30)))
    data += frame(encode(Envelope(Kind.MESSAGE, 2, "bob", b"y")))
    effects: Effects[Message] = Effects()
    for start in range(0, len(data), step):
        merge(effects, pair.hear(data[start : start + step]))
    assert [type(error) for error in effects.unreadable] == [FrameTooBig]
    assert [message.body for message in effects.messages] == [b"y"]


# Looking ahead


def framed(*envelopes: Envelope) -> bytes:
    """Return the frames of the envelopes."""
    return b"".join(frame(encode(envelope)) for envelope in envelopes)


def ask_everything(pair: Pair) -> list[int]:
    """Make a request, a confirmed send and an operation; return their ids."""
    dialog = pair.dialog
    return [
        dialog.request("bob", 0, b"", None, "request", None),
        dialog.send_for_receipt("bob", 0, b"", None, "receipt", None),
        dialog.control("ping", {}, "control", None),
    ]


def test_look_ahead_whole_frames_changes_nothing_until_passed_over(pair: Pair) -> None:
    request, receipt, control = ask_everything(pair)
    data = framed(
        Envelope(Kind.REPLY, request, "bob", b"answer"),
        Envelope(Kind.MESSAGE, 1, "carol", b"message"),
        Envelope(Kind.RECEIPT, receipt, "$broker"),
        Envelope(Kind.REQUEST, 2, "carol", b"question", extension={"ttl": 30.0}),
        Envelope(Kind.REPLY, control, "$broker", b"{}", 2),
    )
    dialog = pair.dialog
    assert dialog.looks_ahead

    ahead = dialog.look_ahead(data, OWNER)

    assert ahead is not None
    messages, outcomes = ahead.messages, ahead.outcomes
    assert [message.body for message in messages] == [b"message", b"question"]
    assert ahead.size >= len(data)
    assert [pending.waiter for pending, _ in outcomes] == ["request", "receipt", "control"]
    assert [type(outcome).__name__ for _, outcome in outcomes] == ["Message", "Receipt", "dict"]
    assert len(dialog.pending_calls) == 3

    dialog.pass_over(ahead, 10.0)

    assert len(dialog.pending_calls) == 0
    assert messages[1].deadline == 40.0
    pair.hear_frame(Kind.ERROR, 2, "carol", payload=b"{}", flags=Flag.ACK)
    assert messages[1].cancelled


@pytest.mark.parametrize(
    "other",
    [
        Envelope(Kind.REPLY, 1000, "bob", b"of another client"),
        Envelope(Kind.ERROR, 0, "bob", b"{}"),
        Envelope(Kind.RECEIPT, 1, "$broker"),
        Envelope(Kind.EVENT, 1, "bob", topic="a.b"),
    ],
    ids=lambda envelope: envelope.kind.name,
)
def test_look_ahead_other_frame_returns_none(pair: Pair, other: Envelope) -> None:
    message = Envelope(Kind.MESSAGE, 1, "carol", b"message")

    assert pair.dialog.look_ahead(framed(message, other), OWNER) is None

    assert [each.body for each in pair.hear(framed(message)).messages] == [b"message"]


@pytest.mark.parametrize("sender", ["bob", "carol"])
def test_look_ahead_frame_that_is_no_outcome_returns_none(pair: Pair, sender: str) -> None:
    """A receipt for a request, and a reply to a confirmed send or of another client."""
    request, receipt, control = ask_everything(pair)
    for envelope in (
        Envelope(Kind.RECEIPT, request, "$broker"),
        Envelope(Kind.REPLY, receipt, sender),
        Envelope(Kind.REPLY, control, sender, b"{}"),
        Envelope(Kind.REPLY, control, "$broker", b"not JSON"),
        Envelope(Kind.MESSAGE, 1, "in valid"),
    ):
        assert pair.dialog.look_ahead(framed(envelope), OWNER) is None
    pair.dialog.watch("sink", "watch", None)
    listing = pair.dialog.pending_calls.of("watch")[0].id
    reply = framed(Envelope(Kind.REPLY, listing, "$broker", b"{}"))
    assert pair.dialog.look_ahead(reply, OWNER) is None


def test_look_ahead_incomplete_frame_is_given_again(pair: Pair) -> None:
    one, two = (framed(Envelope(Kind.MESSAGE, each, "bob", b"body")) for each in (1, 2))
    dialog = pair.dialog

    ahead = dialog.look_ahead(one + two[:-1], OWNER)

    assert ahead is not None
    assert ([message.id for message in ahead.messages], ahead.size) == ([1], len(one))
    assert dialog.begun_ahead == len(two) - 1
    assert dialog.looks_ahead
    # Without a whole frame there is nothing to deliver.
    assert dialog.look_ahead(two[:-1], OWNER) is None
    ahead = dialog.look_ahead(two, OWNER)
    assert ahead is not None
    assert ([message.id for message in ahead.messages], dialog.begun_ahead) == ([2], 0)


def test_dialog_begun_frame_is_taken_and_given_again(pair: Pair) -> None:
    data = framed(Envelope(Kind.MESSAGE, 1, "bob", b"one"))
    assert pair.hear(data[:-1]).messages == []
    assert not pair.dialog.looks_ahead

    assert pair.dialog.lone_message(data, OWNER) is None
    begun = pair.dialog.take_begun()

    assert begun == data[:-1]
    assert pair.dialog.looks_ahead
    assert pair.dialog.take_begun() == b""
    assert [message.body for message in pair.hear(data).messages] == [b"one"]


def test_dialog_begun_long_frame_is_not_taken(pair: Pair) -> None:
    data = framed(Envelope(Kind.MESSAGE, 1, "bob", bytes(5000)))
    pair.hear(data[:-1])
    assert pair.dialog.take_begun() == b""
    assert (
        pair.dialog.look_ahead(framed(Envelope(Kind.MESSAGE, 2, "bob")) + data[:-1], OWNER) is None
    )
    assert [len(message) for message in pair.hear(data[-1:]).messages] == [5000]


def test_lone_reply_to_request_is_found_and_changes_nothing(pair: Pair) -> None:
    """The sender is a member of the pool that was asked."""
    dialog = pair.dialog
    request = dialog.request("bob", 0, b"", None, "request", None)
    reply = framed(Envelope(Kind.REPLY, request, "bob/1", b"answer"))

    message = dialog.lone_message(reply, OWNER)

    assert message is not None
    assert (message.sender, message.kind) == ("bob/1", Kind.REPLY)
    assert (message.id, message.body) == (request, b"answer")
    pending = dialog.answered_request(message)
    assert pending is not None
    assert pending.waiter == "request"
    assert len(dialog.pending_calls) == 1


def test_lone_reply_to_no_request_answers_none(pair: Pair) -> None:
    request, receipt, control = ask_everything(pair)
    dialog = pair.dialog

    for message_id, sender in (
        (request, "carol"),
        (receipt, "bob"),
        (control, "$broker"),
        (1000, "bob"),
    ):
        message = dialog.lone_message(framed(Envelope(Kind.REPLY, message_id, sender)), OWNER)
        assert message is not None
        assert dialog.answered_request(message) is None


@pytest.mark.parametrize("ttl", [None, 30.0, 5])
def test_lone_request_is_as_any_other(pair: Pair, ttl: float | None) -> None:
    extension = None if ttl is None else {"ttl": ttl}
    data = framed(Envelope(Kind.REQUEST, 7, "bob", b"question", 128, extension=extension))

    message = pair.dialog.lone_message(data, OWNER)

    assert message is not None
    assert (message.kind, message.id, message.sender) == (Kind.REQUEST, 7, "bob")
    assert (message.codec, message.body, message.extension) == (128, b"question", extension)
    assert not message.answered
    pair.dialog.note_request(message, 10.0)
    assert message.deadline == (None if ttl is None else 10.0 + ttl)
    pair.hear_frame(Kind.ERROR, 7, "bob", payload=b"{}", flags=Flag.ACK)
    assert message.cancelled


def test_lone_message_of_other_bytes_is_none(pair: Pair) -> None:
    message = framed(Envelope(Kind.MESSAGE, 1, "bob", b"message"))
    assert pair.dialog.lone_message(message, OWNER) is not None
    head = struct.Struct("!BBBBQ")

    for data in (
        b"",
        message[:12],
        message[:-1],
        message + b"x",
        message + message,
        framed(Envelope(Kind.MESSAGE, 1, "in valid")),
        framed(Envelope(Kind.MESSAGE, 1, "bob", extension={"ttl": 1})),
        framed(Envelope(Kind.REPLY, 1, "bob", extension={"ttl": 1})),
        framed(Envelope(Kind.REQUEST, 1, "bob", extension={"ttl": 1, "a": 1})),
        framed(Envelope(Kind.EVENT, 1, "bob", topic="a.b")),
        framed(Envelope(Kind.ERROR, 1, "bob", b"{}")),
        framed(Envelope(Kind.RECEIPT, 1, "bob")),
        # The name is longer than the frame, the extension has no length or is too long.
        frame(head.pack(Kind.REPLY, 0, 0, 4, 1) + b"bob"),
        frame(head.pack(Kind.REQUEST, Flag.EXTENSION, 0, 3, 1) + b"bob\0"),
        frame(head.pack(Kind.REQUEST, Flag.EXTENSION, 0, 3, 1) + b'bob\0\x0a{"ttl":1}'),
    ):
        assert pair.dialog.lone_message(data, OWNER) is None
