"""Liveness of TCP connections: a connection whose peer has answered nothing for too
long is closed.

A client whose machine loses power or network sends no end of its connection. The system
itself probes idle connections (TCP keepalive, set here). Connections with bytes under
way are checked here, a few times within ``limits.keepalive``. So messages that wait for
a dead peer go back to their senders in time. A client that does not read, but whose
system acknowledges, stays connected.
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Final

from brokerd_client._common.keepalive import LOOKS, Silence, keep_alive

if TYPE_CHECKING:
    import asyncio

    from brokerd.net.connection.connection import Connection

__all__ = ["Liveness"]

_TCP: Final = (socket.AF_INET, socket.AF_INET6)
_SHORTEST_PAUSE_S: Final = 0.25
#: Connections checked in one turn of the event loop: less than a millisecond's work.
_SLICE: Final = 200


class Liveness:
    """Checks a server's TCP connections; has a timer only while there are any and a
    limit.

    limit_s: ``limits.keepalive`` in seconds, or 0.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, limit_s: float) -> None:
        self._loop = loop
        self._limit_s = limit_s
        self._watched: dict[Connection, Silence] = {}
        self._timer: asyncio.Handle | None = None
        self._left: list[Connection] = []
        #: Connections whose socket still has the keepalive of an earlier
        #: ``limits.keepalive``.
        self._outdated: set[Connection] = set()

    def add(self, connection: Connection, *, inherited: bool = False) -> None:
        """Check this connection, if it is over TCP, until it is forgotten.

        inherited: another process has set keepalive options on its socket.
        """
        if connection.sock.family in _TCP:
            self._watched[connection] = Silence()
            if self._limit_s or inherited:
                self._tell_system(connection)
            if self._timer is None:
                self._rest()

    def forget(self, connection: Connection) -> None:
        """Stop checking this connection."""
        self._watched.pop(connection, None)
        self._outdated.discard(connection)

    def reconfigure(self, limit_s: float) -> None:
        """Apply a new ``limits.keepalive`` to the existing connections, some in each
        turn.
        """
        if limit_s == self._limit_s:
            return
        self._limit_s = limit_s
        self._outdated = set(self._watched)
        if self._timer is not None:
            self._timer.cancel()
        self._begin()

    def close(self) -> None:
        """Stop checking all connections."""
        self._watched.clear()
        self._outdated.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _rest(self) -> None:
        limit, self._timer = self._limit_s, None
        if limit and self._watched:
            self._timer = self._loop.call_later(max(limit / LOOKS, _SHORTEST_PAUSE_S), self._begin)

    def _begin(self) -> None:
        self._left = list(self._watched)
        self._look()

    def _look(self) -> None:
        """Check some connections now, and the rest in the next turns."""
        limit, now = self._limit_s, self._loop.time()
        for connection in self._left[-_SLICE:]:
            if connection in self._outdated:
                self._outdated.discard(connection)
                self._tell_system(connection)
            silence = self._watched.get(connection)
            if silence is not None and limit and silence.lasts(connection.sock, now) >= limit:
                connection.lost(f"no answer for {limit:g} s (limits.keepalive)")
        del self._left[-_SLICE:]
        if self._left:
            self._timer = self._loop.call_soon(self._look)
        else:
            self._rest()

    def _tell_system(self, connection: Connection) -> None:
        """Set the socket's TCP keepalive as ``limits.keepalive`` says."""
        sock, limit = connection.sock, self._limit_s
        # The connection may have ended already; the next read detects that.
        with contextlib.suppress(OSError):
            if limit:
                keep_alive(sock, limit)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
