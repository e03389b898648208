"""A key bound to one TLS channel, and how two peers agree on what it is bound to.

Over TLS a client proves that it knows its key *on this channel*: what it uses is not the key but a MAC of the channel's
binding data under it. Somebody in the middle has two channels, with different data, so neither side's proof is good on
the other. The broker says behind the nonce of its challenge which kinds of binding it knows; the client says behind its
name which one it has used. Both are covered by proofs: to alter the offer alters the challenge that is answered,
and without its mark an answer made with a bound key is no answer at all. Each direction has a bound key of its own, so
that what a client proves is never what a broker would have to prove. Source: docs/protocol.md, "Over TLS".

Nothing here knows TLS: the data come in as an argument.
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
#: Best first.
KINDS: Final = (EXPORTER, END_POINT)

#: By kind, the binding data of one channel; empty without TLS.
Bindings = Mapping[str, bytes]

#: The directions: the client's answer (message 2), and the broker's (message 5).
CLIENT: Final = "client"
BROKER: Final = "broker"

#: Of this way to bind keys. There is no other: a peer without it is refused.
_VERSION: Final = b"2"
_LABEL: Final = b"brokerd channel binding " + _VERSION


def bound_key(key: bytes, kind: str, data: bytes, direction: str) -> bytes:
    """Return the key with which CLIENT or BROKER answers on the channel with these binding data: 32 bytes."""
    return hmac.digest(key, b"%s\0%s\0%s\0%s" % (_LABEL, direction.encode(), kind.encode(), data), "sha256")


def offer(bindings: Iterable[str]) -> bytes:
    """Return what a listener appends to its nonce to say which kinds it knows; b"" where there are none."""
    kinds = [kind.encode() for kind in KINDS if kind in bindings]
    return b"\0" + b" ".join([*kinds, _VERSION]) if kinds else b""


def choose(offered: bytes, bindings: Bindings) -> str:
    """Return the best kind that both sides know.

    offered: what stands behind the nonce. bindings: never empty. A listener that offers no known kind is taken to
    know END_POINT, as every listener must: there is no going back to an unbound key, which a peer in the middle could
    bring about.
    Raises ValueError: the offer does not end in the version of bound keys that is known here.
    """
    *kinds, version = offered[1:].split(b" ") if offered.startswith(b"\0") else [b""]
    if version != _VERSION:
        raise ValueError("the listener does not offer keys bound to the channel, version 2: it is older, or no broker")
    return next((kind for kind in KINDS if kind in bindings and kind.encode() in kinds), END_POINT)


def marked(name: bytes, kind: str) -> bytes:
    """Return what stands behind the MAC of an answer made with a bound key."""
    return b"%s\0%s %s" % (name, kind.encode(), _VERSION)


def unmarked(rest: bytes) -> tuple[bytes, str]:
    """Return (name, kind) of what stands behind a MAC; the kind is "" for a key that is not bound.

    Raises ValueError: there is a mark, and it says nothing that is known here.
    """
    name, mark, kind = rest.partition(b"\0")
    if not mark:
        return name, ""
    for known in KINDS:
        if kind == known.encode() + b" " + _VERSION:
            return name, known
    raise ValueError("the answer is bound to a kind of channel that is not known here")
