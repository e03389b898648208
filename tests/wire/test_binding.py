"""Keys bound to a TLS channel, in the handshake and by themselves."""

from __future__ import annotations

import hmac
from typing import Any

import pytest

from brokerd_client.errors import AuthenticationError
from brokerd_client.wire import channel_binding as binding
from brokerd_client.wire.channel_binding import BROKER, CLIENT, END_POINT, EXPORTER
from brokerd_client.wire.handshake import (
    FAILURE,
    NONCE_SIZE,
    RECEIVE,
    Established,
    Proof,
    Send,
    answer_challenge,
    as_dialer,
    as_listener,
)

NONCE = bytes(range(NONCE_SIZE))
KEY = b"alice's key"


def converse(
    dialers: dict[str, bytes],
    listeners: dict[str, bytes],
    *,
    nonce: bytes | None = None,
    name: bytes = b"alice",
) -> tuple[Established, Established, Proof]:
    """Return what both sides get, and the dialer's proof; a listener that looks up the
    key as a broker does.
    """
    near = as_dialer(KEY, NONCE, name=name, bindings=dialers)
    far = as_listener(NONCE + binding.offer(listeners) if nonce is None else nonce, named=True)
    proofs: list[Proof] = []
    ends: dict[str, Established] = {}
    sent: dict[str, list[bytes]] = {"near": [], "far": []}
    steps: dict[str, Any] = {"near": next(near), "far": next(far)}
    sides = {"near": near, "far": far}
    while len(ends) < 2:
        for side, other in (("far", "near"), ("near", "far")):
            if side in ends:
                continue
            step = steps[side]
            try:
                if isinstance(step, Send):
                    sent[other].append(step.body)
                    steps[side] = sides[side].send(None)
                elif isinstance(step, Proof):
                    proofs.append(step)
                    data = listeners.get(step.binding, b"")
                    key = answer_key = KEY
                    if step.binding:
                        key = binding.bound_key(KEY, step.binding, data, CLIENT)
                        answer_key = binding.bound_key(KEY, step.binding, data, BROKER)
                    steps[side] = sides[side].send(answer_key if step.made_with(key) else None)
                elif sent[side]:
                    steps[side] = sides[side].send(sent[side].pop(0))
            except StopIteration as end:
                ends[side] = end.value
    return ends["near"], ends["far"], proofs[0]


@pytest.mark.parametrize("name", [b"alice", b""])
@pytest.mark.parametrize(
    ("dialers", "listeners", "kind"),
    [
        ({END_POINT: b"1"}, {END_POINT: b"1"}, END_POINT),
        ({END_POINT: b"1", EXPORTER: b"2"}, {END_POINT: b"1"}, END_POINT),
        ({END_POINT: b"1"}, {END_POINT: b"1", EXPORTER: b"2"}, END_POINT),
        ({END_POINT: b"1", EXPORTER: b"2"}, {EXPORTER: b"2", END_POINT: b"1"}, EXPORTER),
    ],
)
def test_best_kind_that_both_know_is_used(
    dialers: dict[str, bytes], listeners: dict[str, bytes], kind: str, name: bytes
) -> None:
    """Both end with the key bound to it, and the proof says which kind that is and who
    gave it.
    """
    near, far, proof = converse(dialers, listeners, name=name)

    assert (proof.binding, proof.name) == (kind, name)
    assert near.key == far.key == binding.bound_key(KEY, kind, dialers[kind], BROKER)


def test_bound_key_is_as_documented() -> None:
    """The derivation of docs/protocol.md, "Over TLS", spelt out."""
    for direction in (CLIENT, BROKER):
        text = b"brokerd channel binding 2\0" + direction.encode() + b"\0tls-server-end-point\0data"
        assert (
            binding.bound_key(KEY, END_POINT, b"data", direction)
            == hmac.new(KEY, text, "sha256").digest()
        )


def test_bound_key_of_one_direction_is_not_that_of_the_other() -> None:
    """What a client proves is not what a broker has to prove on the same channel."""
    assert binding.bound_key(KEY, END_POINT, b"data", CLIENT) != binding.bound_key(
        KEY, END_POINT, b"data", BROKER
    )


def test_different_channels_do_not_meet() -> None:
    """With other data on the other side the answer is rejected."""
    with pytest.raises(AuthenticationError):
        converse({END_POINT: b"1"}, {END_POINT: b"2"})


@pytest.mark.parametrize(
    "nonce", [NONCE + b"\0tls-unheard-of 2", NONCE + b"\0 2", NONCE + b"\x002"]
)
def test_offer_of_no_known_kind_does_not_unbind(nonce: bytes) -> None:
    """A listener that offers no known kind gets a key bound to its certificate all the
    same.
    """
    near, _, proof = converse({END_POINT: b"1", EXPORTER: b"2"}, {END_POINT: b"1"}, nonce=nonce)

    assert proof.binding == END_POINT
    assert near.key != KEY


@pytest.mark.parametrize(
    "offered",
    [
        b"",
        b"\0tls-server-end-point",
        b"\0tls-server-end-point 1",
        b"\0tls-server-end-point 2 3",
        b"\0tls-server-end-point  ",
        b"tls-server-end-point 2",
    ],
)
def test_offer_without_version_2_is_refused(offered: bytes) -> None:
    """A client over TLS does not speak to a listener that binds no keys, or binds them
    in another way.
    """
    near = as_dialer(KEY, NONCE, bindings={END_POINT: b"1"})
    next(near)

    with pytest.raises(AuthenticationError, match="version 2"):
        near.send(b"#CHALLENGE#{sha256}" + NONCE + offered)


@pytest.mark.parametrize(
    "mark", [b"\0tls-server-end-point", b"\0tls-server-end-point 1", b"\0tls-server-end-point 2 "]
)
def test_answer_of_another_version_is_refused(mark: bytes) -> None:
    """A broker knows keys bound in one way."""
    steps = as_listener(NONCE, named=True)
    next(steps)
    next(steps)
    assert steps.send(b"{sha256}" + bytes(32) + b"alice" + mark) == Send(FAILURE)
    with pytest.raises(AuthenticationError, match="not known here"):
        next(steps)


def test_without_tls_nothing_changes() -> None:
    """No bindings, no mark, the bare key."""
    near, far, proof = converse({}, {})

    assert (proof.binding, proof.name, near.key, far.key) == ("", b"alice", KEY, KEY)


def test_unknown_kind_is_refused() -> None:
    """A listener tells a peer that uses a kind nobody knows that it failed."""
    steps = as_listener(NONCE, named=True)
    next(steps)
    assert steps.send(None) is RECEIVE
    assert steps.send(b"{sha256}" + bytes(32) + b"alice\0tls-unheard-of") == Send(FAILURE)
    with pytest.raises(AuthenticationError, match="not known here"):
        next(steps)


def test_mark_is_refused_where_no_name_may_stand() -> None:
    """A listener that is no broker takes an answer of the digest's length and nothing
    else.
    """
    steps = as_listener(NONCE)
    next(steps)
    next(steps)
    assert steps.send(b"{sha256}" + bytes(32) + b"\0tls-server-end-point") == Send(FAILURE)
    with pytest.raises(AuthenticationError, match="instead of 32"):
        next(steps)


def test_md5_has_no_room_for_a_mark() -> None:
    """A bound key is never used with the bare MD5 of old Pythons, even where that is
    allowed.
    """
    steps = answer_challenge(KEY, allow_md5=True, bindings={END_POINT: b"1"})
    next(steps)
    with pytest.raises(AuthenticationError, match="MD5"):
        steps.send(b"#CHALLENGE#" + bytes(20))


@pytest.mark.parametrize(
    ("behind", "said"), [(b" speak TLS\x1b[2J", r"speak TLS\?\[2J"), (b"", "gave no reason")]
)
def test_failure_instead_of_a_challenge_tells_why(behind: bytes, said: str) -> None:
    """What a listener says behind #FAILURE#, before anything else, is passed on,
    without what would move a cursor.
    """
    steps = answer_challenge(KEY)
    next(steps)
    with pytest.raises(AuthenticationError, match=said):
        steps.send(FAILURE + behind)


def test_a_channel_without_the_kind_that_is_offered_is_refused() -> None:
    """A listener that knows no kind that this channel has data for ends in a refusal,
    not in a bug.
    """
    near = answer_challenge(KEY, bindings={EXPORTER: b"data"})
    next(near)

    with pytest.raises(AuthenticationError, match="offers no kind of channel binding"):
        near.send(b"#CHALLENGE#{sha256}" + NONCE + b"\x002")
