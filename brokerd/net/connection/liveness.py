"""Liveness of TCP connections: a connection whose peer has answered nothing for too
long is closed.

A client whose machine loses power or network sends no end of its connection. The system
itself probes idle connections (TCP keepalive, set here). Connections with bytes under
way are checked here, a few times within ``limits.keepalive``. A silent peer is
checked once more when that time is over. So messages that wait for a dead peer go back
to their senders in time. A client that does not read, but whose system acknowledges,
stays connected. A connection on which nothing was written since all its bytes were
acknowledged costs no system call.
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Final, Protocol

from brokerd.net.connection.lingering_close import unacknowledged
from brokerd_client._common.keepalive import LOOKS, Silence, keep_alive, leave_to_system

if TYPE_CHECKING:
    import asyncio

__all__ = ["Liveness", "Watched"]

_TCP: Final = (socket.AF_INET, socket.AF_INET6)
_SHORTEST_PAUSE_S: Final = 0.25
#: Connections checked in one turn of the event loop: at most a millisecond's work, and
#: two where the system is told of all of them.
_SLICE: Final = 200


class Watched(Protocol):
    """A connection that is checked.

    sock: the socket.
    bytes_out: the bytes of its output so far.
    is_busy: bytes wait for the socket, or its end is awaited.
    """

    @property
    def sock(self) -> socket.socket: ...

    @property
    def bytes_out(self) -> int: ...

    @property
    def is_busy(self) -> bool: ...

    def lost(self, reason: str) -> None:
        """Close the connection."""


class Liveness:
    """Checks a server's TCP connections; has a timer only while there are any and a
    limit.

    limit_s: ``limits.keepalive`` in seconds, or 0.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, limit_s: float) -> None:
        self._loop = loop
        self._limit_s = limit_s
        #: The value of ``bytes_out`` of each connection when its peer's system had
        #: acknowledged all of them; -1 before that.
        self._watched: dict[Watched, int] = {}
        #: The checks of those with bytes under way.
        self._silences: dict[Watched, Silence] = {}
        self._timer: asyncio.Handle | None = None
        self._left: list[Watched] = []
        #: Connections whose socket does not have the keepalive of ``limits.keepalive`` yet:
        #: the new ones, and after a reload all.
        self._outdated: set[Watched] = set()

    def add(self, connection: Watched, *, inherited: bool = False) -> None:
        """Check this connection, if it is over TCP, until it is forgotten.

        The system is told in the next round: many connections have ended by then. The first
        probe is due later, and counts from the last bytes all the same.

        inherited: another process has set keepalive options on its socket.
        """
        if connection.sock.family in _TCP:
            self._watched[connection] = -1
            if self._limit_s:
                self._outdated.add(connection)
            elif inherited:
                self._tell_system(connection)
            if self._timer is None:
                self._rest()

    def forget(self, connection: Watched) -> None:
        """Stop checking this connection."""
        self._watched.pop(connection, None)
        self._silences.pop(connection, None)
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
        self._silences.clear()
        self._outdated.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _rest(self) -> None:
        self._timer = None
        if self._limit_s and self._watched:
            self._timer = self._loop.call_later(self._pause_s, self._begin)

    @property
    def _pause_s(self) -> float:
        """Seconds between two rounds."""
        return max(self._limit_s / LOOKS, _SHORTEST_PAUSE_S)

    def _begin(self) -> None:
        self._left = list(self._watched)
        self._look()

    def _look(self) -> None:
        """Check some connections now, and the rest in the next turns."""
        connections = self._left[-_SLICE:]
        del self._left[-_SLICE:]
        for connection in self._outdated.intersection(connections) if self._outdated else ():
            self._outdated.discard(connection)
            self._tell_system(connection)
        # Of thousands of connections most are idle, and cost only this comparison.
        for connection, acknowledged in zip(
            connections, map(self._watched.get, connections), strict=True
        ):
            if acknowledged != connection.bytes_out:
                self._check(connection)
        if self._left:
            self._timer = self._loop.call_soon(self._look)
        else:
            self._rest()

    def _check(self, connection: Watched) -> None:
        """Close this connection if its peer has answered nothing for too long; check it
        again when it will have.
        """
        limit = self._limit_s
        if not limit or connection not in self._watched:
            return
        if not (connection.is_busy or unacknowledged(connection.sock)):
            self._watched[connection] = connection.bytes_out
            self._silences.pop(connection, None)
            return
        silence = self._silences.get(connection)
        if silence is None:
            silence = self._silences[connection] = Silence()
        remaining_s = silence.remaining_s(connection.sock, self._loop.time(), limit)
        if remaining_s <= 0:
            connection.lost(f"no answer within {limit:g} s (limits.keepalive)")
        # A round of many connections takes time, so the next one may come late.
        elif remaining_s < 2 * self._pause_s:
            self._loop.call_later(remaining_s, self._check, connection)

    def _tell_system(self, connection: Watched) -> None:
        """Set the socket's TCP keepalive as ``limits.keepalive`` says."""
        sock, limit = connection.sock, self._limit_s
        # The connection may have ended already; the next read detects that.
        with contextlib.suppress(OSError):
            if limit:
                keep_alive(sock, limit)
            else:
                leave_to_system(sock)
