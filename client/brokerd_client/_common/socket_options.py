"""Options of sockets that the library's listeners share with the broker's."""

from __future__ import annotations

import socket

__all__ = ["own_port"]


def own_port(sock: socket.socket) -> None:
    """Allow a listener its port at once after a restart, and no other program the port."""
    # On Windows SO_REUSEADDR would let any program take over the port; the opposite
    # option is right there.
    option = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
    sock.setsockopt(socket.SOL_SOCKET, option, 1)
