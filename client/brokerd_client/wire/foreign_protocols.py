"""Which protocol a peer speaks that does not speak this one: known by its first bytes.

A wrong port is a common mistake, and its first bytes, read as a frame's length, make a puzzling error. Sources:
RFC 9112 (HTTP), RFC 4253 (SSH), RFC 8446 (TLS), the RESP specification (Redis), RFC 5321 (SMTP), RFC 959 (FTP),
RFC 9051 (IMAP), RFC 1939 (POP3), RFC 6143 (VNC).
"""

from __future__ import annotations

from typing import Final

__all__ = ["SILENT", "foreign_protocol", "foreign_speech"]

#: Four bytes, which is what a frame's length has, are enough for all.
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
#: Why a peer may say nothing at all where a challenge is due.
SILENT: Final = (
    "no challenge came: the listener seems to have no authkey, or does not accept connections now, or the port is that "
    "of another protocol, whose clients speak first (HTTP, TLS, Redis)"
)


def foreign_protocol(data: bytes | bytearray | memoryview) -> str:
    """Return the name of the protocol that the first bytes of a peer belong to, "" where they belong to none known."""
    begin = bytes(data[:4])
    return next((name for first, name in _BEGINNINGS if begin.startswith(first)), "")


def foreign_speech(data: bytes | bytearray | memoryview) -> str:
    """Return what is wrong with a peer whose first bytes these are, "" where that is not known."""
    name = foreign_protocol(data)
    if not name:
        return ""
    return f"the peer speaks {name}; is this the right address and port?"
