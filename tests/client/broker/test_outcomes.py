"""Whatever bytes a broker sends, every call that waits gets one outcome, at the latest
when the connection is lost.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.dialog_pair import LOST, NONCE, OWNER, Pair

from brokerd_client.errors import AuthenticationError, BrokerdError, InDoubt, ProtocolError
from brokerd_client.message import Message, Receipt
from brokerd_client.protocol.dialog import Dialog, Effects
from brokerd_client.protocol.state import State
from brokerd_client.wire.envelope import HEADER, Kind
from brokerd_client.wire.framing import frame

#: What leaves a call waiting; each returns the id.
CALLS: dict[str, Callable[[Dialog[Message], str, float | None], int]] = {
    "request": lambda dialog, waiter, deadline: dialog.request(
        "bob", 0, b"", None, waiter, deadline
    ),
    "receipt": lambda dialog, waiter, deadline: dialog.send_for_receipt(
        "bob", 0, b"", None, waiter, deadline
    ),
    "publish": lambda dialog, waiter, deadline: dialog.publish_for_receipt(
        "a.b", 0, b"", None, waiter, deadline
    ),
    "ping": lambda dialog, waiter, deadline: dialog.control("ping", {}, waiter, deadline),
    "clients": lambda dialog, waiter, deadline: dialog.control("clients", {}, waiter, deadline),
    "subscribe": lambda dialog, waiter, deadline: dialog.subscribe(
        "a.>", None, waiter, waiter, deadline
    )[0],
    "group": lambda dialog, waiter, deadline: dialog.subscribe(
        "a.>", "g", waiter, waiter, deadline
    )[0],
    "watch": lambda dialog, waiter, deadline: dialog.watch(waiter, waiter, deadline)[0],
}
WHOAMI = b'{"name":"alice","address":"alice","limits":{}}'
DEEP = b"[" * 900 + b"]" * 900
PAYLOADS = st.sampled_from(
    [
        b"",
        b"{}",
        b"[1]",
        b"7",
        b"\xff",
        b"[" * 5000,
        b'{"a":' + DEEP + b"}",
        b'{"code":' + DEEP + b',"message":' + DEEP + b',"name":[]}',
        b'{"code":"denied","message":"\\ud800","name":"a.b"}',
        b'{"code":7,"message":{},"name":null}',
        b'{"code":"offline","name":"bob/1"}',
        b'{"n":' + b"9" * 5000 + b"}",
        b'{"clients":[]}',
        b'{"clients":7}',
        b'{"clients":[{"name":"bob","online":true,"since":1e999}]}',
        b'{"clients":[{"name":"bob","online":true}]}',
        WHOAMI,
        b'{"name":"\\ud800","address":"alice"}',
    ]
) | st.binary(max_size=30)
#: (kind, flags, which call it answers, name, topic, extension, payload)
ANSWERS = st.tuples(
    st.integers(1, 7) | st.integers(0, 255),
    st.sampled_from([0, 0, 0, 1, 2, 4]) | st.integers(0, 255),
    st.integers(0, 30),
    st.sampled_from([b"$broker", b"$broker", b"bob", b"bob/1", b"carol", b"", b"\xff"]),
    st.sampled_from([b"\3a.b", b"\0", b"\x13$broker.online.bob\xff", b"\x12$broker.online.bob"]),
    st.sampled_from([b"\0\2{}", b'\0\7{"a":1}', b"\0\1{", b"\xff\xff"]),
    PAYLOADS,
)
PIECES = st.one_of(ANSWERS, ANSWERS, ANSWERS, st.binary(max_size=20))


def packed(piece: Any, ids: list[int]) -> bytes:
    """Return the bytes of a piece."""
    if isinstance(piece, bytes):
        return piece
    kind, flags, which, name, topic, extension, payload = piece
    header = HEADER.pack(kind, flags, 2, len(name), ids[which % len(ids)])
    return frame(
        header, name, topic if kind == Kind.EVENT else b"", extension if flags & 2 else b"", payload
    )


def collect(effects: Effects[Message], outcomes: list[tuple[Any, Any]]) -> None:
    """Note the outcomes, each of a kind that a face can pass on."""
    for waiter, value in effects.outcomes:
        assert isinstance(value, (Message, Receipt, dict, BrokerdError))
        outcomes.append((waiter, value))
    for error in (*effects.undelivered, *effects.unreadable, *(why for _, why in effects.ended)):
        assert isinstance(error, BrokerdError)
        str(error).encode()
    assert effects.broken is None or isinstance(
        effects.broken, (ProtocolError, AuthenticationError, BrokerdError)
    )


@settings(max_examples=200)
@given(
    calls=st.lists(
        st.tuples(st.sampled_from(list(CALLS)), st.sampled_from([None, 5.0])),
        min_size=1,
        max_size=6,
    ),
    pieces=st.lists(PIECES, max_size=8),
    step=st.sampled_from([1, 7, 10**6]),
    end=st.sampled_from(["lost", "tick", "close"]),
    later=st.lists(PIECES, max_size=4),
)
@example(
    calls=[("ping", None)],
    pieces=[(3, 0, 0, b"$broker", b"", b"", b"[1]")],
    step=7,
    end="lost",
    later=[],
)
@example(
    calls=[("clients", None)],
    pieces=[(3, 0, 0, b"$broker", b"", b"", b"7")],
    step=7,
    end="lost",
    later=[],
)
def test_call_has_one_outcome_for_any_broker_answer(
    calls: list[tuple[str, float | None]], pieces: list[Any], step: int, end: str, later: list[Any]
) -> None:
    """Whether its answer is right, wrong, twice, cut or never there; and on the next
    connection too.
    """
    pair = Pair()
    pair.connect()
    dialog = pair.dialog
    ids = [
        CALLS[call](dialog, f"{number} {call}", deadline)
        for number, (call, deadline) in enumerate(calls)
    ]
    waiters = [f"{number} {call}" for number, (call, _) in enumerate(calls)]
    dialog.wrote(len(dialog.data_to_send()))
    outcomes: list[tuple[Any, Any]] = []
    data = b"".join(packed(piece, ids) for piece in pieces)
    broken = None
    for start in range(0, len(data), step):
        effects = dialog.receive(data[start : start + step], OWNER, 0.0)
        collect(effects, outcomes)
        broken = effects.broken
        if broken is not None:
            break
    if end == "close":
        collect(dialog.close(1.0), outcomes)
    else:
        if end == "tick":
            collect(dialog.tick(10.0), outcomes)
            told = Counter(waiter for waiter, _ in outcomes)
            assert all(
                told[waiter]
                for waiter, (_, deadline) in zip(waiters, calls, strict=True)
                if deadline
            )
        collect(dialog.lost(broken or LOST, 10.0, 0.5), outcomes)
    assert Counter(waiter for waiter, _ in outcomes) == Counter(waiters)
    assert len(dialog.pending_calls) == 0
    if dialog.state is not State.WAITING:
        return
    # The subscriptions and watches that are left are made again; the answers to that
    # are anything, too.
    dialog.dialing(10.0)
    dialog.opened(NONCE)
    session_data = again(pair)
    own = list(dialog.pending_calls)
    collect(
        dialog.receive(session_data + b"".join(packed(piece, own) for piece in later), OWNER, 10.0),
        outcomes,
    )
    collect(dialog.lost(LOST, 10.0, 0.5), outcomes)
    assert Counter(waiter for waiter, _ in outcomes) == Counter(waiters)
    assert len(dialog.pending_calls) == 0
    assert dialog.name == "alice"


def again(pair: Pair) -> bytes:
    """Shake hands once more; return what the broker then says first."""
    from support.fake_broker import Session

    pair.broker.intercept = lambda session, envelope: True
    session = pair.session = Session(pair.broker)
    while pair.dialog.state is State.AUTHENTICATING:
        heard, session.out = bytes(session.out), bytearray()
        pair.dialog.receive(heard, OWNER, 10.0)
        session.receive(pair.dialog.data_to_send())
    return bytes(session.out)


def test_call_dialog_exception_is_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of the library ends the connection, and every call gets it as its
    outcome.
    """
    pair = Pair()
    pair.connect()
    pair.dialog.request("bob", 0, b"", None, "w", None)
    pair.dialog.wrote(len(pair.dialog.data_to_send()))

    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr(pair.dialog._inbound, "_on_event", fail)
    effects = pair.hear_frame(Kind.MESSAGE)
    assert not effects.broken
    effects = pair.hear_frame(Kind.EVENT, topic="a")
    assert isinstance(effects.broken, ProtocolError)
    assert isinstance(effects.broken.__cause__, ZeroDivisionError)
    [(waiter, error)] = pair.dialog.lost(effects.broken, 0.0, 0.5).outcomes
    assert (waiter, type(error)) == ("w", InDoubt)


@pytest.mark.parametrize(
    "payload", [b"[1]", b"7", b"", b"{", b"\xff", json.dumps({"n": "x"})[:-1].encode()]
)
def test_operation_answered_without_object_fails_at_once(payload: bytes) -> None:
    """Its caller need not wait for its timeout."""
    pair = Pair()
    pair.connect()
    message_id = pair.dialog.control("ping", {}, "w", None)
    [(waiter, error)] = pair.hear_frame(
        Kind.REPLY, message_id, "$broker", payload=payload, codec=2
    ).outcomes
    assert (waiter, type(error)) == ("w", ProtocolError)
    assert len(pair.dialog.pending_calls) == 0
