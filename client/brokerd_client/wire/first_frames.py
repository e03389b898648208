"""The frames that make a connection a channel: OPEN, JOIN and their answers. No I/O.

Source: docs/protocol.md, "Channels". A channel begins with one of these frames, directly
after the handshake. The broker answers with RECEIPT or ERROR, and relays all bytes behind
a RECEIPT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from brokerd_client.errors import (
    MalformedEnvelope,
    PayloadError,
    ProtocolError,
    Refused,
    RequestFailed,
    refusal,
)
from brokerd_client.wire.envelope import BROKER, Envelope, encode, parse
from brokerd_client.wire.layout import Kind

__all__ = [
    "MAX_ANSWER",
    "MAX_PAYLOAD",
    "OPEN_ID",
    "channel_name",
    "join_frame",
    "open_frame",
    "peer_of",
    "place_in",
    "without_channel",
]

#: The id of an OPEN of this library: there is one on each connection.
OPEN_ID: Final = 1
#: Longest payload of an OPEN, in bytes.
MAX_PAYLOAD: Final = 1024
#: Longest answer that is read, in bytes. A recipient's refusal may be any ERROR that the
#: recipient can send; a longer one ends the connection.
MAX_ANSWER: Final = 64 * 1024
#: What follows the name in the handshake of a channel's connection.
_CHANNEL: Final = b" channel"
#: Most characters kept of an ERROR's texts: its code, and the others.
_MAX_CODE: Final = 64
_MAX_TEXT: Final = 1000
#: Most addresses of another host, and characters of each.
_MAX_ADDRESSES: Final = 16
_MAX_ADDRESS: Final = 300


def channel_name(name: str) -> bytes:
    """Return the bytes behind the MAC in the handshake of a channel's connection.

    Without a name the broker takes the first frame for the sign of a channel.
    """
    return name.encode() + _CHANNEL if name else b""


def without_channel(name: bytes) -> tuple[bytes, bool]:
    """Return the name in a handshake's answer, and whether the word ``channel`` is behind it."""
    plain = name.removesuffix(_CHANNEL)
    return plain, plain != name


def open_frame(to: str, message_id: int, payload: bytes) -> bytes:
    """Return the body of an OPEN to a client.

    Raises PayloadError if the payload is too long, InvalidName.
    """
    if len(payload) > MAX_PAYLOAD:
        raise PayloadError(
            f"the payload of an open has at most {MAX_PAYLOAD} bytes, not {len(payload)}: send"
            " more over the channel"
        )
    return encode(Envelope(Kind.OPEN, message_id, to, payload))


def join_frame(token: int) -> bytes:
    """Return the body of a JOIN, which accepts the OPEN with this token."""
    return encode(Envelope(Kind.JOIN, token))


def peer_of(answer: bytes, message_id: int) -> str:
    """Return the address of the other client, from the broker's answer.

    Raises:
        Refused: The answer is an ERROR, of the broker or the other client.
        ProtocolError: The answer is neither RECEIPT nor ERROR.
    """
    try:
        envelope = parse(answer)
    except MalformedEnvelope as error:
        raise ProtocolError(f"the broker's answer can't be read: {error}") from error
    if envelope.kind is Kind.ERROR:
        raise _refusal(envelope)
    if envelope.kind is not Kind.RECEIPT or envelope.id != message_id:
        raise ProtocolError(
            f"the broker answered a channel's first frame with {envelope.kind.name},"
            " not with RECEIPT or ERROR"
        )
    return envelope.name


def _refusal(envelope: Envelope) -> Refused:
    """Return the exception for an ERROR; a client's error is always a RequestFailed."""
    try:
        fields = json.loads(envelope.payload)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        fields = {}
    code = _text(fields.get("code"), _MAX_CODE) or RequestFailed.code
    text = _text(fields.get("message"), _MAX_TEXT) or f"no reason was given ({code})"
    if envelope.name not in ("", BROKER):
        return RequestFailed(text, name=envelope.name, message_id=envelope.id, code=code)
    name = _text(fields.get("name"), _MAX_TEXT)
    host, addresses = place_in(fields)
    return refusal(code, text, name=name, message_id=envelope.id, host=host, addresses=addresses)


def place_in(fields: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Return the host of an ERROR ``elsewhere``, and where clients can connect to it."""
    listed = fields.get("addresses")
    addresses = tuple(
        filter(None, (_text(each, _MAX_ADDRESS) for each in listed[:_MAX_ADDRESSES]))
        if isinstance(listed, list)
        else ()
    )
    return _text(fields.get("host"), _MAX_CODE), addresses


def _text(value: object, max_length: int) -> str:
    """Return the first characters of a received text; "" for another type."""
    return value[:max_length].encode(errors="replace").decode() if isinstance(value, str) else ""
