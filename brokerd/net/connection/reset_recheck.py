"""Checks connections again after a read, for a reset that the event loop reports only
once.

Under uvloop, a socket in error is reported only once. libuv stops watching it then
(uv__poll_io in its src/unix/poll.c). If bytes had arrived too, reading them used up
that one report. A connection that was reset would then stay until the broker writes to
it. So each connection that was read from is polled again a moment later, all with one
call. No timer runs while nothing is read.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio

    from brokerd.net.connection.connection import Connection

__all__ = ["ResetRecheck"]

#: Seconds between a read and the check.
_LATER: Final = 1.0


class ResetRecheck:
    """The connections to check again; has a timer only while there are any."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._connections: set[Connection] = set()
        self._timer: asyncio.TimerHandle | None = None

    def note(self, connection: Connection) -> None:
        """Check a connection again in a moment, because it has just been read from."""
        self._connections.add(connection)
        if self._timer is None and hasattr(select, "poll"):
            self._timer = self._loop.call_later(_LATER, self._look)

    def close(self) -> None:
        """Stop checking all connections."""
        self._connections.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        connections = {
            connection.fd: connection for connection in self._connections if not connection.closed
        }
        self._connections.clear()
        poll = select.poll()
        for fd in connections:
            # poll() reports errors even if no event is asked for.
            poll.register(fd, 0)
        for fd, events in poll.poll(0):
            # A held client that has disconnected is detected on its next read; its
            # earlier frames are processed first.
            if events & (select.POLLERR | select.POLLHUP) and connections[fd].may_read():
                connections[fd].on_readable()
