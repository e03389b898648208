"""Two connections that are the ends of one pipe: ``Pipe``."""

from __future__ import annotations

import os
import socket
import sys

from brokerd_client.connection.stream import Connection, adopt_socket

__all__ = ["Pipe"]

if sys.platform == "win32":
    from brokerd_client.connection.named_pipes import Pipe
else:

    def Pipe(duplex: bool = True) -> tuple[Connection, Connection]:  # noqa: N802 - the standard library's name
        """Return two connections that are the ends of one pipe.

        Args:
            duplex: Whether both can send and receive. Otherwise the first receives, and
                the second sends.

        Raises:
            OSError: The process has no more file descriptors, for example.
        """
        if duplex:
            first, second = socket.socketpair()
            first.settimeout(None)  # there may be a default timeout
            second.settimeout(None)
            return adopt_socket(first), adopt_socket(second)
        reader, writer = os.pipe()
        return Connection(reader, writable=False), Connection(writer, readable=False)
