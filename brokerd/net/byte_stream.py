"""The stream of bytes of a connection: its socket, or TLS over that socket."""

from __future__ import annotations

from typing import Protocol

__all__ = ["ByteStream"]


class ByteStream(Protocol):
    """A non-blocking stream of bytes: a ``socket.socket``, or a ``TlsStream``.

    Calls that can't continue raise BlockingIOError, and OSError if the connection is
    lost.
    """

    def recv(self, size: int, /) -> bytes:
        """Read at most ``size`` bytes; b"" is the end."""

    def recv_into(self, view: memoryview, /) -> int:
        """Read into a buffer; return the number of bytes, 0 at the end."""

    def send(self, data: bytes | bytearray | memoryview, /) -> int:
        """Send bytes; return how many were taken."""
