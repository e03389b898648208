"""All connections of one server: the established ones, and those in their lingering
close.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from brokerd.net.connection.connection import GRACE
from brokerd.net.connection.lingering_close import LingeringClose

if TYPE_CHECKING:
    from brokerd.core.broker import Broker
    from brokerd.core.session import Session
    from brokerd.log.rate_limit import LogRateLimiter
    from brokerd.net.connection.connection import Connection
    from brokerd.net.connection.liveness import Liveness
    from brokerd.net.relay.relay import Relay
    from brokerd.net.settlement import Settlement

__all__ = ["Connections"]

#: Size of the buffer for input that is discarded, in bytes.
_WASTE: Final = 64 * 1024


class Connections:
    """The connections of one server until their sockets are closed.

    wall: returns the time of day in seconds since the epoch.
    on_left: called when a session has ended.
    established: the connections that have a session.
    relays: the relays of all channels.
    on_channel: called with a connection whose session has just ended, because its first
        frame makes it a channel, and with its unread bytes.
    on_leaving: called when a session is about to end.
    linger_s: seconds that a closed connection has for its last bytes.
    empty: set when the last connection has ended.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        broker: Broker,
        log_limiter: LogRateLimiter,
        liveness: Liveness,
        settlement: Settlement,
        *,
        wall: Callable[[], float],
        on_left: Callable[[Session], None],
    ) -> None:
        self._loop = loop
        self._broker = broker
        self._log_limiter = log_limiter
        self._liveness = liveness
        self._settlement = settlement
        self._wall = wall
        self._on_left = on_left
        self.established: set[Connection] = set()
        self.relays: set[Relay] = set()
        self.on_channel: Callable[[Connection, bytes], None] = lambda connection, unread: None
        self.on_leaving: Callable[[Session], None] = lambda session: None
        self.linger_s = GRACE
        self.empty = asyncio.Event()
        self._lingering: set[LingeringClose] = set()
        #: The buffer for discarded input. It is not the read buffer of the established
        #: connections, in which frames of another connection may lie.
        self._waste = memoryview(bytearray(_WASTE))

    @property
    def is_empty(self) -> bool:
        """Whether every connection and channel has ended, and its last bytes have arrived."""
        return not (self.established or self.relays or self._lingering)

    @property
    def lingering(self) -> list[LingeringClose]:
        """The sockets in their lingering close."""
        return list(self._lingering)

    @property
    def count(self) -> int:
        """Number of open sockets."""
        return len(self.established) + 2 * len(self.relays) + len(self._lingering)

    def add(self, connection: Connection) -> None:
        """Add a connection that has a session now."""
        self.established.add(connection)
        self._liveness.add(connection)

    def release_name(self, connection: Connection) -> None:
        """Make the core send nothing more to a connection that closes."""
        self._broker.release_name(connection.session, self._wall())
        # This leaves work in the core, which a single write does not look for.
        self._settlement.has_more = True

    def on_lost(self, connection: Connection, reason: str) -> None:
        """Detach the session of a connection that has just been closed, and log its
        end.
        """
        session = connection.session
        self.on_leaving(session)
        self.established.discard(connection)
        self._liveness.forget(connection)
        now_wall = self._wall()
        self._broker.detach(session, now_wall)
        self._broker.incidents.add_disconnect(
            session.client.name, session.address, reason, now_wall
        )
        self._on_left(session)
        self._log_limiter.note(
            "info",
            "client.disconnected",
            session.client.name,
            # Not bound to a logger, which would take as long as the line.
            name=session.client.name,
            address=session.address,
            peer=session.peer,
            reason=reason,
        )
        self.note_if_empty()
        self._settlement.settle()

    def close_gracefully(self, sock: socket.socket) -> None:
        """Close a socket when all bytes written to it have arrived."""
        self.linger(sock, self.linger_s)

    def linger(self, sock: socket.socket, time_s: float) -> None:
        """Close a socket when all bytes written to it have arrived, or after ``time_s``
        seconds.
        """
        linger = LingeringClose(sock, self._waste, time_s, self._loop, self._on_lingered)
        self._lingering.add(linger)
        linger.begin()

    def _on_lingered(self, linger: LingeringClose) -> None:
        self._lingering.discard(linger)
        self.note_if_empty()

    def note_if_empty(self) -> None:
        """Set ``empty`` if the last connection has ended."""
        if self.is_empty:
            self.empty.set()
