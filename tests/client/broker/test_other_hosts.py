"""The error ``elsewhere``: a client follows it to the host of its mailbox."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.dialog_pair import Pair
from support.fake_broker import FakeBroker, Session

from brokerd_client.address import Address, parse
from brokerd_client.errors import Disconnected, Elsewhere, Offline, refusal
from brokerd_client.message import Receipt
from brokerd_client.protocol.state import State
from brokerd_client.settings import Settings, channel_routes, resolve, same_kind
from brokerd_client.wire.envelope import CodecId, Envelope, ErrorCode, Kind, encode, error_payload
from brokerd_client.wire.first_frames import peer_of

HOME = parse("b.example:6000")
TOLD = ("b.example:6000",)


def settings_of(address: str) -> Settings:
    return resolve(
        address, "alice", b"k", None, 5.0, reconnect=True, allow_pickle_from=(), inbox=1 << 20
    )


# What an ERROR tells, and where a client goes


def test_refusal_elsewhere_has_host_and_addresses() -> None:
    error = refusal("elsewhere", "it is at b", name="bob", host="b", addresses=TOLD)

    assert isinstance(error, Elsewhere)
    assert (error.host, error.addresses, error.name) == ("b", TOLD, "bob")


@pytest.mark.parametrize(
    ("addresses", "kept"),
    [
        (["b:1", 5, None, "tls://b:2"], ("b:1", "tls://b:2")),
        ("b:1", ()),
        (None, ()),
        (["x"] * 40, ("x",) * 16),
    ],
)
def test_channel_answer_elsewhere_keeps_only_texts(addresses: Any, kept: tuple[str, ...]) -> None:
    body = json.dumps({"code": "elsewhere", "message": "m", "host": "b", "addresses": addresses})
    answer = Envelope(Kind.ERROR, 1, "$broker", body.encode(), 2)
    with pytest.raises(Elsewhere) as refused:
        peer_of(encode(answer), 1)

    assert (refused.value.host, refused.value.addresses) == ("b", kept)


def test_client_over_tls_follows_tls_addresses_only() -> None:
    told = ("b:1", "tls://b:2", "/run/b.sock", "nonsense", "@b")
    plain, over_tls = settings_of("a:1"), settings_of("tls://a:1")
    elsewhere = Elsewhere("it is at b")
    elsewhere.addresses = told

    assert [str(each) for each in same_kind(told, plain)] == ["b:1"]
    assert [str(each) for each in same_kind(told, over_tls)] == ["tls://b:2"]
    assert [str(address) for address, _ in channel_routes(elsewhere, plain)] == [
        "b:1",
        "tls://b:2",
    ]
    routes = list(channel_routes(elsewhere, over_tls))
    assert [(str(address), each is over_tls) for address, each in routes] == [("tls://b:2", True)]
    assert [each.tls is None for _, each in channel_routes(elsewhere, plain)] == [True, False]
    elsewhere.addresses = ("b:1",)
    assert len(list(channel_routes(elsewhere, plain))) == 1


# The dialog


def away(session: Session, envelope: Envelope, addresses: tuple[str, ...] = TOLD) -> bool:
    """Answer open_mailbox as a host that does not keep the mailbox."""
    if envelope.name != "$broker" or json.loads(envelope.payload)["op"] != "open_mailbox":
        return False
    body = error_payload(
        ErrorCode.ELSEWHERE, "the mailbox is at b", "$broker", host="b", addresses=addresses
    )
    session.deliver(Envelope(Kind.ERROR, envelope.id, "$broker", body, CodecId.JSON))
    return True


def pair(
    usable: tuple[Address, ...] = (HOME,), addresses: tuple[str, ...] = TOLD, **options: Any
) -> Pair:
    """Return a connected client whose mailbox is at another host."""
    broker = FakeBroker({"alice": b"alice", "bob": b"bob"})
    broker.features = ["mailboxes", "goaway"]
    broker.limits = {"max_message": 1 << 20, "dedup": 3600.0, "home": "b"}
    broker.intercept = lambda session, envelope: away(session, envelope, addresses)
    joined = Pair(broker, usable=lambda told: usable, **options)
    joined.connect()
    return joined


def test_client_leaves_for_the_host_of_its_mailbox() -> None:
    joined = pair(addresses=TOLD)
    joined.dialog.open_mailbox()

    effects = joined.talk()

    assert isinstance(effects.broken, Disconnected)
    assert isinstance(effects.broken.__cause__, Elsewhere)
    joined.dialog.lost(effects.broken, joined.now, 0.5)
    assert joined.dialog.state is State.WAITING
    assert joined.dialog.retry_at == joined.now
    assert (joined.dialog.detour, joined.dialog.turn) == ((HOME,), 0)


def test_client_finishes_its_calls_before_it_leaves() -> None:
    joined = pair()
    kept: list[Envelope] = []
    intercept = joined.broker.intercept
    assert intercept is not None

    def hold(session: Session, envelope: Envelope) -> object:
        if envelope.kind is Kind.REQUEST and envelope.name == "bob":
            kept.append(envelope)
            return True
        return intercept(session, envelope)

    joined.broker.intercept = hold
    asked = joined.dialog.request("bob", 0, b"?", None, waiter := object(), None)
    joined.dialog.open_mailbox()
    effects = joined.talk()
    assert effects.broken is None
    assert joined.dialog.state is State.DRAINING

    joined.session.deliver(Envelope(Kind.REPLY, kept[0].id, "bob", b"!"))  # type: ignore[union-attr]
    effects = joined.talk()

    assert [call for call, _ in effects.outcomes] == [waiter]
    assert effects.broken is not None
    assert asked is not None


def test_client_returns_to_its_own_addresses_if_home_is_away() -> None:
    joined = pair()
    joined.dialog.open_mailbox()
    broken = joined.talk().broken
    assert broken is not None
    joined.dialog.lost(broken, joined.now, 0.5)

    joined.dialog.dialing(joined.now)
    joined.dialog.lost(Disconnected("can't connect"), joined.now, 0.5)

    assert (joined.dialog.turn, joined.dialog.retry_at) == (1, joined.now)
    joined.connect()
    effects = joined.talk()
    assert (effects.broken, effects.warnings) == (None, [])
    assert joined.dialog.state is State.READY
    due = joined.dialog.mailbox_due
    assert due is not None
    assert joined.now < due <= joined.now + 5
    # It asks again, and leaves again.
    joined.now = due
    joined.dialog.tick(joined.now)
    assert joined.talk().broken is not None


@pytest.mark.parametrize(
    ("options", "why"),
    [({"usable": ()}, "can't connect"), ({"reconnect": False}, "does not, with reconnect=False")],
)
def test_client_that_cannot_follow_stays_and_warns(options: dict[str, Any], why: str) -> None:
    joined = pair(**options)
    joined.dialog.open_mailbox()

    effects = joined.talk()

    assert effects.broken is None
    (warning,) = effects.warnings
    assert f"the mailbox is at host b, where this client {why} (b.example:6000)" in warning
    assert joined.dialog.state is State.READY


def test_client_asks_for_a_far_mailbox_at_growing_intervals() -> None:
    joined = pair(usable=())
    joined.dialog.open_mailbox()
    joined.talk()
    waits = []
    for _ in range(6):
        due = joined.dialog.mailbox_due
        assert due is not None
        waits.append(due - joined.now)
        joined.now = due
        joined.dialog.tick(joined.now)
        joined.talk()

    assert waits == [5, 10, 20, 40, 60, 60]


def test_post_in_doubt_is_repeated_while_home_is_away() -> None:
    joined = pair()
    answers: list[ErrorCode] = [ErrorCode.IN_DOUBT, ErrorCode.OFFLINE, ErrorCode.FULL]
    before = joined.broker.intercept
    assert before is not None

    def answer(session: Session, envelope: Envelope) -> object:
        if envelope.name == "bob" and answers:
            joined.broker.refuse(session, envelope, answers.pop(0))
        elif envelope.name == "bob":
            session.deliver(Envelope(Kind.RECEIPT, envelope.id, "$broker"))
        else:
            return before(session, envelope)
        return True

    joined.broker.intercept = answer
    waiter = object()
    joined.dialog.post("bob", 0, b"x", {"key": "k"}, waiter, joined.now)
    outcomes: list[Any] = []
    for _ in range(5):
        outcomes += joined.talk().outcomes
        if outcomes:
            break
        joined.now += 20
        joined.dialog.tick(joined.now)
        outcomes += joined.talk().outcomes

    assert answers == []
    ((_, outcome),) = outcomes
    assert isinstance(outcome, Receipt)


def test_post_that_is_not_in_doubt_ends_as_offline() -> None:
    joined = pair()
    joined.broker.intercept = lambda session, envelope: (
        envelope.name == "bob" and not joined.broker.refuse(session, envelope, ErrorCode.OFFLINE)  # type: ignore[func-returns-value]
    )
    joined.dialog.post("bob", 0, b"x", {"key": "k"}, object(), joined.now)

    ((_, outcome),) = joined.talk().outcomes
    assert isinstance(outcome, Offline)
