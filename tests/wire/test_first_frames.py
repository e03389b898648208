"""The first frames of a channel, and the answers to them."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokerd_client.errors import (
    BrokerdError,
    InvalidName,
    Offline,
    PayloadError,
    ProtocolError,
    RequestFailed,
)
from brokerd_client.wire.envelope import Envelope, encode
from brokerd_client.wire.first_frames import (
    MAX_PAYLOAD,
    channel_name,
    join_frame,
    open_frame,
    peer_of,
)
from brokerd_client.wire.layout import Kind


def error(payload: bytes, sender: str = "$broker") -> bytes:
    """Return the body of an ERROR with id 7."""
    return encode(Envelope(Kind.ERROR, 7, sender, payload, 2))


def test_channel_name_has_the_word_channel_behind_it() -> None:
    assert channel_name("alice") == b"alice channel"
    assert channel_name("") == b""


def test_open_frame_has_recipient_id_and_payload() -> None:
    assert open_frame("bob", 7, b"hi") == b"\x08\0\0\x03" + (7).to_bytes(8, "big") + b"bobhi"


def test_join_frame_has_token_and_empty_name() -> None:
    assert join_frame(2**64 - 1) == b"\x09\0\0\0" + b"\xff" * 8


def test_open_frame_with_long_payload_is_refused() -> None:
    """The longest payload is accepted, and one byte more is not."""
    open_frame("bob", 7, bytes(MAX_PAYLOAD))
    with pytest.raises(PayloadError, match="at most 1024 bytes, not 1025"):
        open_frame("bob", 7, bytes(MAX_PAYLOAD + 1))


def test_open_frame_to_unwritable_name_is_refused() -> None:
    with pytest.raises(InvalidName):
        open_frame("\ud800", 7, b"")


def test_answer_receipt_names_the_peer() -> None:
    assert peer_of(encode(Envelope(Kind.RECEIPT, 7, "bob/2")), 7) == "bob/2"


def test_answer_error_of_broker_is_raised_as_its_class() -> None:
    payload = json.dumps({"code": "offline", "message": "bob is away", "name": "bob"}).encode()
    with pytest.raises(Offline, match="bob is away") as caught:
        peer_of(error(payload), 7)
    assert (caught.value.name, caught.value.message_id) == ("bob", 7)


def test_answer_error_of_recipient_is_request_failed_with_its_code() -> None:
    """A recipient can't make the caller believe that the broker refused."""
    payload = json.dumps({"code": "offline", "message": "not now"}).encode()
    with pytest.raises(RequestFailed, match="not now") as caught:
        peer_of(error(payload, "bob"), 7)
    assert (caught.value.code, caught.value.name) == ("offline", "bob")


@pytest.mark.parametrize("payload", [b"", b"{", b"[1]", b'{"code": 1, "message": []}', b"[" * 9999])
def test_answer_error_without_readable_reason_has_a_text(payload: bytes) -> None:
    with pytest.raises(RequestFailed, match=r"no reason was given \(failed\)"):
        peer_of(error(payload), 7)


@pytest.mark.parametrize(
    "answer",
    [b"", b"junk", encode(Envelope(Kind.MESSAGE, 7, "bob")), encode(Envelope(Kind.RECEIPT, 8))],
    ids=["empty", "junk", "message", "other id"],
)
def test_answer_of_another_kind_is_a_protocol_error(answer: bytes) -> None:
    with pytest.raises(ProtocolError, match="the broker"):
        peer_of(answer, 7)


@given(st.binary(max_size=64))
def test_answer_of_any_bytes_raises_only_brokerd_errors(answer: bytes) -> None:
    with contextlib.suppress(BrokerdError):
        peer_of(answer, 7)
