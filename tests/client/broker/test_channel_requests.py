"""Requests for channels in the dialog: who gets them, and when the client listens."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from support.dialog_pair import Pair
from support.fake_broker import Session

from brokerd_client.channel_offer import ChannelOffer
from brokerd_client.errors import Disconnected, TimedOut, Unsupported, WrongUse
from brokerd_client.wire.envelope import Envelope, ErrorCode, Kind

TOKEN = 2**63 + 5


@pytest.fixture
def pair() -> Pair:
    """A dialog that is ready, and its broker."""
    pair = Pair()
    pair.connect()
    return pair


def operations(pair: Pair, name: str) -> int:
    """Return how often the broker has received the operation."""
    return sum(
        envelope.kind is Kind.REQUEST and json.loads(envelope.payload)["op"] == name
        for envelope in pair.broker.seen
    )


def refuse(operation: str, pair: Pair) -> None:
    """Make the broker refuse the operation from now on."""

    def intercept(session: Session, envelope: Envelope) -> bool:
        refused = envelope.kind is Kind.REQUEST and operation.encode() in envelope.payload
        if refused:
            pair.broker.refuse(session, envelope, ErrorCode.UNSUPPORTED)
        return refused

    pair.broker.intercept = intercept


def ask(pair: Pair, **fields: bytes) -> list[tuple[object, object]]:
    """Pass on bob's request for a channel, as the broker does; return the dialog's events."""
    return pair.hear_frame(Kind.OPEN, TOKEN, "bob", **fields).events


def refusals(pair: Pair) -> list[tuple[int, str, str]]:
    """Return id, name and code of each ERROR that the broker has received."""
    pair.talk()
    return [
        (envelope.id, envelope.name, json.loads(envelope.payload)["code"])
        for envelope in pair.broker.seen
        if envelope.kind is Kind.ERROR
    ]


def test_channel_request_reaches_the_listener(pair: Pair) -> None:
    pair.dialog.listen("sink", "call", None)
    assert pair.talk().outcomes == [("call", {})]
    assert ask(pair, payload=b"hi") == [("sink", ChannelOffer("bob", b"hi", TOKEN))]


def test_channel_request_without_listener_is_refused_offline(pair: Pair) -> None:
    assert ask(pair) == []
    assert refusals(pair) == [(TOKEN, "", "offline")]


def test_channel_request_at_the_end_of_the_client_is_dropped(pair: Pair) -> None:
    pair.dialog.close(0.0)
    effects = pair.hear_frame(Kind.OPEN, TOKEN, "bob")
    assert (effects.broken, effects.events, pair.dialog.data_to_send()) == (None, [], b"")


def test_channel_request_is_refused_with_the_listeners_reason(pair: Pair) -> None:
    pair.dialog.refuse_channel(TOKEN, "busy", "not now")
    assert refusals(pair) == [(TOKEN, "", "busy")]


def test_channel_request_refused_too_late_is_counted(pair: Pair) -> None:
    """The broker's answer that the caller has gone is not a failed send."""
    pair.dialog.refuse_channel(TOKEN, "busy", "not now")
    payload = b'{"code":"expired","message":"no OPEN with this token waits","name":""}'
    effects = pair.hear_frame(Kind.ERROR, TOKEN, "$broker", payload=payload, codec=2)
    assert (effects.undelivered, pair.dialog.counters["late"]) == ([], 1)


def test_channel_request_without_connection_can_not_be_refused(pair: Pair) -> None:
    pair.lose()
    with pytest.raises(Disconnected):
        pair.dialog.refuse_channel(TOKEN, "busy", "not now")


@pytest.mark.parametrize("kind", [Kind.ACK, Kind.JOIN])
def test_channel_frame_that_no_broker_sends_is_skipped(pair: Pair, kind: Kind) -> None:
    effects = pair.hear_frame(kind, 1, "")
    assert [str(error) for error in effects.unreadable] == [f"the broker sends no {kind.name}"]


def test_channel_request_of_an_invalid_name_is_skipped(pair: Pair) -> None:
    pair.dialog.listen("sink", "call", None)
    effects = pair.hear_frame(Kind.OPEN, TOKEN, "a b")
    assert (len(effects.unreadable), effects.events) == (1, [])


def test_listen_second_time_is_wrong_use(pair: Pair) -> None:
    pair.dialog.listen("sink", "call", None)
    with pytest.raises(WrongUse, match="listens already"):
        pair.dialog.listen("other", "call", None)


def test_listen_without_connection_leaves_nothing(pair: Pair) -> None:
    pair.lose()
    with pytest.raises(Disconnected):
        pair.dialog.listen("sink", "call", None)
    pair.connect()
    assert operations(pair, "listen") == 0


def test_listen_refused_leaves_nothing(pair: Pair) -> None:
    refuse('"listen"', pair)
    pair.dialog.listen("sink", "call", None)
    [(call, error)] = pair.talk().outcomes
    assert (call, type(error)) == ("call", Unsupported)
    pair.dialog.listen("other", "call", None)


def test_listen_is_repeated_on_a_new_connection(pair: Pair) -> None:
    pair.dialog.listen("sink", "call", None)
    pair.talk()
    pair.lose()
    pair.connect()
    assert operations(pair, "listen") == 2
    assert ask(pair) == [("sink", ChannelOffer("bob", b"", TOKEN))]


def test_listen_refused_on_a_new_connection_ends(pair: Pair) -> None:
    pair.dialog.listen("sink", "call", None)
    pair.talk()
    refuse('"listen"', pair)
    pair.lose()
    [(sink, error)] = pair.connect().ended
    assert (sink, type(error)) == ("sink", Unsupported)
    assert ask(pair) == []


def test_listen_ended_before_its_refusal_is_not_reported(pair: Pair) -> None:
    """The refusal of a listener that has ended meanwhile reaches no other one."""
    pair.dialog.listen("sink", "call", None)
    pair.talk()
    pair.lose()
    pair.broker.intercept = lambda session, envelope: b'"listen"' in envelope.payload
    pair.connect()
    [again] = pair.dialog.pending_calls.values()
    pair.dialog.unlisten("sink", "call", None)
    effects = pair.hear_frame(
        Kind.ERROR, again.id, "$broker", payload=b'{"code":"unsupported","message":""}', codec=2
    )
    assert effects.ended == []


def test_unlisten_ends_the_listener_once(pair: Pair) -> None:
    pair.dialog.listen("sink", "call", None)
    pair.talk()
    assert pair.dialog.unlisten("other", "call", None) is None
    assert pair.dialog.unlisten("sink", "call", None) is not None
    assert pair.dialog.unlisten("sink", "call", None) is None
    assert pair.talk().outcomes == [("call", {})]
    assert ask(pair) == []


def test_unlisten_without_connection_needs_no_answer(pair: Pair) -> None:
    pair.dialog.listen("sink", "call", None)
    pair.talk()
    pair.lose()
    assert pair.dialog.unlisten("sink", "call", None) is None
    pair.connect()
    assert operations(pair, "listen") == 1


GIVE_UP: list[Callable[[Pair, int], object]] = [
    lambda pair, message_id: pair.dialog.abandon(message_id),
    lambda pair, message_id: pair.dialog.forget("sink"),
    lambda pair, message_id: pair.dialog.tick(5.0),
]


@pytest.mark.parametrize("give_up", GIVE_UP, ids=["abandoned", "forgotten", "late"])
def test_listen_given_up_is_taken_back(pair: Pair, give_up: Callable[[Pair, int], object]) -> None:
    """The broker is told, and requests for channels are refused."""
    message_id = pair.dialog.listen("sink", "call", 5.0)
    give_up(pair, message_id)
    pair.talk()
    assert operations(pair, "unlisten") == 1
    assert ask(pair) == []


def test_listen_given_up_after_its_end_is_not_taken_back_twice(pair: Pair) -> None:
    message_id = pair.dialog.listen("sink", "call", 5.0)
    pair.dialog.unlisten("sink", None, None)
    pair.dialog.abandon(message_id)
    pair.talk()
    assert operations(pair, "unlisten") == 1


def test_listen_forgotten_without_connection_is_not_repeated(pair: Pair) -> None:
    pair.dialog.listen("sink", "call", None)
    pair.talk()
    pair.lose()
    pair.dialog.forget("sink")
    pair.connect()
    assert (operations(pair, "listen"), operations(pair, "unlisten")) == (1, 0)


def test_listen_under_way_at_a_loss_leaves_nothing(pair: Pair) -> None:
    pair.dialog.listen("sink", "call", None)
    [(call, error)] = pair.lose().outcomes
    assert (call, isinstance(error, Disconnected)) == ("call", True)
    pair.connect()
    assert operations(pair, "listen") == 0


def test_listen_without_answer_times_out(pair: Pair) -> None:
    pair.broker.intercept = lambda session, envelope: b'"listen"' in envelope.payload
    pair.dialog.listen("sink", "call", 5.0)
    pair.talk()
    [(call, error)] = pair.dialog.tick(5.0).outcomes
    assert (call, type(error)) == ("call", TimedOut)
