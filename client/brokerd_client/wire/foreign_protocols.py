"""Recognition of peers that speak another protocol, by their first bytes.

A wrong port is a common mistake. The first bytes of the other protocol, read as a
frame's length, would make a confusing error. Sources: RFC 9112 (HTTP), RFC 4253 (SSH),
RFC 8446 (TLS); the RESP specification (Redis); RFC 5321 (SMTP), RFC 959 (FTP), RFC 9051
(IMAP), RFC 1939 (POP3); RFC 6143 (VNC).
"""

from __future__ import annotations

from typing import Final

__all__ = ["SILENT", "foreign_protocol", "foreign_speech"]

#: (First bytes, protocol). The four bytes of a frame's length are enough to recognise
#: each.
_BEGINNINGS: Final = (
    (b"HTTP", "HTTP"),
    (b"SSH-", "SSH"),
    (b"\x15\x03", "TLS"),
    (b"\x16\x03", "TLS"),
    (b"-ERR", "Redis"),
    (b"-NOA", "Redis"),
    (b"-DEN", "Redis"),
    (b"-WRO", "Redis"),
    (b"+PON", "Redis"),
    (b"220", "SMTP or FTP"),
    (b"* OK", "IMAP"),
    (b"+OK", "POP3"),
    (b"RFB ", "VNC"),
    (b"AMQP", "AMQP"),
    (b"<htm", "HTTP"),
    (b"<HTM", "HTTP"),
    (b"<!DO", "HTTP"),
    (b"<!do", "HTTP"),
)
#: The possible reasons why a peer sends nothing although a challenge is due.
SILENT: Final = (
    "no challenge came: the listener seems to have no authkey, or does not accept connections now,"
    " or the port is that of another protocol, whose clients speak first (HTTP, TLS, Redis)"
)


def foreign_protocol(data: bytes | bytearray | memoryview) -> str:
    """Return the name of the protocol with these first bytes, or "" if it is not known."""
    first_bytes = bytes(data[:4])
    return next((name for prefix, name in _BEGINNINGS if first_bytes.startswith(prefix)), "")


def foreign_speech(data: bytes | bytearray | memoryview) -> str:
    """Return an error text for a peer with these first bytes, or "" if they are not
    known.
    """
    name = foreign_protocol(data)
    if not name:
        return ""
    return f"the peer speaks {name}; is this the right address and port?"
