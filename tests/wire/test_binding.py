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
    """Run a handshake whose listener looks up the key as a broker does.

    Return what both sides get, and the dialer's proof.
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
def test_channel_binding_best_common_kind_is_used(
    dialers: dict[str, bytes], listeners: dict[str, bytes], kind: str, name: bytes
) -> None:
    """Both sides end with the key bound to the channel. The proof names the kind of
    binding and the client.
    """
    near, far, proof = converse(dialers, listeners, name=name)

    assert (proof.binding, proof.name) == (kind, name)
    assert near.key == far.key == binding.bound_key(KEY, kind, dialers[kind], BROKER)


def test_channel_binding_bound_key_is_as_documented() -> None:
    """The derivation of docs/protocol.md, "Over TLS", spelt out."""
    for direction in (CLIENT, BROKER):
        text = b"brokerd channel binding 2\0" + direction.encode() + b"\0tls-server-end-point\0data"
        assert (
            binding.bound_key(KEY, END_POINT, b"data", direction)
            == hmac.new(KEY, text, "sha256").digest()
        )


def test_channel_binding_bound_keys_of_both_directions_differ() -> None:
    """On the same channel, the client and the broker prove different bound keys."""
    assert binding.bound_key(KEY, END_POINT, b"data", CLIENT) != binding.bound_key(
        KEY, END_POINT, b"data", BROKER
    )


def test_channel_binding_different_data_is_rejected() -> None:
    """If the two sides have different binding data, the answer is rejected."""
    with pytest.raises(AuthenticationError):
        converse({END_POINT: b"1"}, {END_POINT: b"2"})


@pytest.mark.parametrize(
    "nonce", [NONCE + b"\0tls-unheard-of 2", NONCE + b"\0 2", NONCE + b"\x002"]
)
def test_channel_binding_offer_without_known_kind_still_binds(nonce: bytes) -> None:
    """If a listener offers no known kind, the client still binds its key, to the
    listener's certificate.
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
def test_channel_binding_offer_without_version_2_is_refused(offered: bytes) -> None:
    """A client over TLS refuses a listener that binds no keys, or binds them in another
    way.
    """
    near = as_dialer(KEY, NONCE, bindings={END_POINT: b"1"})
    next(near)

    with pytest.raises(AuthenticationError, match="version 2"):
        near.send(b"#CHALLENGE#{sha256}" + NONCE + offered)


@pytest.mark.parametrize(
    "mark", [b"\0tls-server-end-point", b"\0tls-server-end-point 1", b"\0tls-server-end-point 2 "]
)
def test_channel_binding_answer_of_other_version_is_refused(mark: bytes) -> None:
    """A broker knows only one way to bind a key."""
    steps = as_listener(NONCE, named=True)
    next(steps)
    next(steps)
    assert steps.send(b"{sha256}" + bytes(32) + b"alice" + mark) == Send(FAILURE)
    with pytest.raises(AuthenticationError, match="not known here"):
        next(steps)


def test_handshake_without_channel_binding_uses_bare_key() -> None:
    """Without bindings the answer carries no mark, and the key is the configured one."""
    near, far, proof = converse({}, {})

    assert (proof.binding, proof.name, near.key, far.key) == ("", b"alice", KEY, KEY)


def test_channel_binding_unknown_kind_is_refused() -> None:
    """A listener sends #FAILURE# to a peer that uses an unknown kind of binding."""
    steps = as_listener(NONCE, named=True)
    next(steps)
    assert steps.send(None) is RECEIVE
    assert steps.send(b"{sha256}" + bytes(32) + b"alice\0tls-unheard-of") == Send(FAILURE)
    with pytest.raises(AuthenticationError, match="not known here"):
        next(steps)


def test_channel_binding_mark_without_name_allowed_is_refused() -> None:
    """A listener outside a broker accepts an answer of the digest's length and nothing
    else.
    """
    steps = as_listener(NONCE)
    next(steps)
    next(steps)
    assert steps.send(b"{sha256}" + bytes(32) + b"\0tls-server-end-point") == Send(FAILURE)
    with pytest.raises(AuthenticationError, match="instead of 32"):
        next(steps)


def test_channel_binding_with_bare_md5_is_refused() -> None:
    """A bound key is never used with the bare MD5 of old Pythons, even where that is
    allowed.
    """
    steps = answer_challenge(KEY, allow_md5=True, bindings={END_POINT: b"1"})
    next(steps)
    with pytest.raises(AuthenticationError, match="MD5"):
        steps.send(b"#CHALLENGE#" + bytes(20))


@pytest.mark.parametrize(
    ("suffix", "reason"), [(b" speak TLS\x1b[2J", r"speak TLS\?\[2J"), (b"", "gave no reason")]
)
def test_handshake_failure_instead_of_challenge_raises_its_reason(
    suffix: bytes, reason: str
) -> None:
    """The listener's text behind an early #FAILURE# is in the error, without control
    characters.
    """
    steps = answer_challenge(KEY)
    next(steps)
    with pytest.raises(AuthenticationError, match=reason):
        steps.send(FAILURE + suffix)


def test_channel_binding_offer_without_data_for_it_is_refused() -> None:
    """If the offer names no kind that this channel has data for, the client refuses it
    with a named error.
    """
    near = answer_challenge(KEY, bindings={EXPORTER: b"data"})
    next(near)

    with pytest.raises(AuthenticationError, match="offers no kind of channel binding"):
        near.send(b"#CHALLENGE#{sha256}" + NONCE + b"\x002")
