"""The pulse of established connections over TCP: whose other end has answered nothing for too long is given up.

A client whose machine lost its power or its network sends no end of its connection. Idle ones the system itself asks,
as it is told here. Those to whom bytes are under way are looked at here, a few times within ``limits.keepalive``,
so that what waits for them goes back to its senders in time. Who does not read, but answers, stays.
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any, Final

from brokerd_client._common.keepalive import LOOKS, Silence, keep_alive

if TYPE_CHECKING:
    import asyncio

    from brokerd.net.connection.connection import Connection
    from brokerd.net.server import Server

__all__ = ["Liveness"]

_TCP: Final = (socket.AF_INET, socket.AF_INET6)
_SHORTEST_PAUSE_S: Final = 0.25
#: Connections looked at in one turn of the loop: less than a millisecond's work.
_SLICE: Final = 200


class Liveness:
    """Looks at a server's TCP connections; keeps a timer only while there are some, and a limit."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._watched: dict[Connection, Silence] = {}
        self._timer: asyncio.Handle | None = None
        self._left: list[Connection] = []
        #: Of which the system was told another ``limits.keepalive``.
        self._outdated: set[Connection] = set()

    def reset_recheck(self, connection: Connection, *, inherited: bool = False) -> None:
        """Look at this connection from now on, if it is one over TCP, until it is forgotten.

        inherited: another process has told the system something of it.
        """
        if connection.sock.family in _TCP:
            self._watched[connection] = Silence()
            if self._server.limits.keepalive or inherited:
                self._tell_system(connection)
            if self._timer is None:
                self._rest()

    def forget(self, connection: Connection) -> None:
        """Look at this connection no more."""
        self._watched.pop(connection, None)
        self._outdated.discard(connection)

    def reconfigure(self) -> None:
        """Have another ``limits.keepalive`` hold for those who are connected: at once, some in each turn."""
        self._outdated = set(self._watched)
        if self._timer is not None:
            self._timer.cancel()
        self._begin()

    def close(self) -> None:
        """Look at nothing any more."""
        self._watched.clear()
        self._outdated.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _rest(self) -> None:
        limit, self._timer = self._server.limits.keepalive, None
        if limit and self._watched:
            self._timer = self._server.loop.call_later(max(limit / LOOKS, _SHORTEST_PAUSE_S), self._begin)

    def _begin(self) -> None:
        self._left = list(self._watched)
        self._look()

    def _look(self) -> None:
        """Look at some, and at the others in the next turns."""
        limit, now = self._server.limits.keepalive, self._server.loop.time()
        for connection in self._left[-_SLICE:]:
            if connection in self._outdated:
                self._outdated.discard(connection)
                self._tell_system(connection)
            silence = self._watched.get(connection)
            if silence is not None and limit and silence.lasts(_socket_of(connection), now) >= limit:
                connection.lost(f"answered nothing for {limit:g} s (limits.keepalive)")
        del self._left[-_SLICE:]
        if self._left:
            self._timer = self._server.loop.call_soon(self._look)
        else:
            self._rest()

    def _tell_system(self, connection: Connection) -> None:
        """Have the system ask an idle one for signs of life, as ``limits.keepalive`` says."""
        sock, limit = _socket_of(connection), self._server.limits.keepalive
        # It may be over already, which reading it tells.
        with contextlib.suppress(OSError):
            if limit:
                keep_alive(sock, limit)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)


def _socket_of(connection: Connection) -> Any:
    # A link over TLS has a stream in its place: see TlsLink.
    return getattr(connection.sock, "raw", connection.sock)
