"""Keys bound to one TLS channel, and the agreement of two peers on the kind of binding.

Over TLS a client proves that it knows its key *on this channel*. It does not use the
key itself, but a MAC of the channel's binding data under the key. An attacker in the
middle has two channels with different data. So the proof of one side is not valid on
the other channel.

The broker lists the kinds of binding that it knows after the nonce of its challenge.
The client marks the kind that it used after its name. Proofs protect both. If the list
is altered, the answered challenge differs. Without its mark, an answer made with a
bound key is not valid. Each direction has a bound key of its own. So a client's proof
can never serve as a broker's proof. Source: docs/protocol.md, "Over TLS".

The module does not use TLS: the binding data are arguments.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from typing import Final

__all__ = [
    "BROKER",
    "CLIENT",
    "END_POINT",
    "EXPORTER",
    "KINDS",
    "Bindings",
    "bound_key",
    "choose",
    "marked",
    "offer",
    "unmarked",
]

#: RFC 9266: keying material that only the two ends of this channel can derive.
EXPORTER: Final = "tls-exporter"
#: RFC 5929: a digest of the listener's certificate.
END_POINT: Final = "tls-server-end-point"
#: The kinds of binding, best first.
KINDS: Final = (EXPORTER, END_POINT)

#: The binding data of one channel, by kind; empty without TLS.
Bindings = Mapping[str, bytes]

#: The directions: the client's answer (message 2), and the broker's (message 5).
CLIENT: Final = "client"
BROKER: Final = "broker"

#: The only version of key binding; a peer without it is refused.
_VERSION: Final = b"2"
_LABEL: Final = b"brokerd channel binding " + _VERSION


def bound_key(key: bytes, kind: str, data: bytes, direction: str) -> bytes:
    """Return the bound key, 32 bytes, for answers on the channel with this binding
    data.

    direction: CLIENT or BROKER, the side that answers.
    """
    return hmac.digest(
        key, b"%s\0%s\0%s\0%s" % (_LABEL, direction.encode(), kind.encode(), data), "sha256"
    )


def offer(bindings: Iterable[str]) -> bytes:
    """Return the list of known kinds that a listener appends to its nonce, or b""."""
    kinds = [kind.encode() for kind in KINDS if kind in bindings]
    return b"\0" + b" ".join([*kinds, _VERSION]) if kinds else b""


def choose(offered: bytes, bindings: Bindings) -> str:
    """Return the best kind that both sides know.

    END_POINT is the kind if the listener offers no known kind, because every listener
    must know it. A fallback to an unbound key is not possible: an attacker in the
    middle could force it.

    Args:
        offered: The bytes after the nonce.
        bindings: Never empty.

    Raises:
        ValueError: The offer does not end in the version of bound keys that is known
            here.
    """
    *kinds, version = offered[1:].split(b" ") if offered.startswith(b"\0") else [b""]
    if version != _VERSION:
        raise ValueError(
            "the listener does not offer keys bound to the channel, version 2: it is an older"
            " broker, or not a broker"
        )
    return next((kind for kind in KINDS if kind in bindings and kind.encode() in kinds), END_POINT)


def marked(name: bytes, kind: str) -> bytes:
    """Return the bytes after the MAC of an answer that was made with a bound key."""
    return b"%s\0%s %s" % (name, kind.encode(), _VERSION)


def unmarked(suffix: bytes) -> tuple[bytes, str]:
    """Return (name, kind) from the bytes after a MAC; the kind is "" for an unbound
    key.

    Raises ValueError: the bytes have a mark of an unknown kind.
    """
    name, mark, kind = suffix.partition(b"\0")
    if not mark:
        return name, ""
    for known_kind in KINDS:
        if kind == known_kind.encode() + b" " + _VERSION:
            return name, known_kind
    raise ValueError("the answer is bound to a kind of channel that is not known here")
