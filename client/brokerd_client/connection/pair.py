"""Two connections joined to each other: ``Pipe``."""

from __future__ import annotations

import os
import socket
import sys

from brokerd_client.connection.stream import Connection, adopted

__all__ = ["Pipe"]

if sys.platform == "win32":
    from brokerd_client.connection.named_pipes import Pipe
else:

    def Pipe(duplex: bool = True) -> tuple[Connection, Connection]:  # noqa: N802 - the standard library's name
        """Return two connections joined to each other; without ``duplex`` the first
        receives and the second sends.
        """
        if duplex:
            one, other = socket.socketpair()
            one.settimeout(None)  # there may be a default timeout
            other.settimeout(None)
            return adopted(one), adopted(other)
        reader, writer = os.pipe()
        return Connection(reader, writable=False), Connection(writer, readable=False)
