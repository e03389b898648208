"""Checks connections again after a read, for a reset that the event loop reports only
once.

Under uvloop, a socket in error is reported only once. libuv stops watching it then
(uv__poll_io in its src/unix/poll.c). If bytes had arrived too, reading them used up
that one report. A connection that was reset would then stay until the broker writes to
it. So each connection that was read from is polled again a moment later, all with one
call. Soon after the last read, no timer runs any more.
"""

from __future__ import annotations

import select
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio

    from brokerd.net.connection.connection import Connection

__all__ = ["ResetRecheck"]

#: Seconds between a read and the check.
_LATER: Final = 1.0


class ResetRecheck:
    """The connections to check again; has a timer only while any was read lately."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._connections: set[Connection] = set()
        #: Those checked last.
        self._checked: set[Connection] = set()
        self._timer: asyncio.TimerHandle | None = None

    def note(self, connection: Connection) -> None:
        """Check a connection again in a moment, because it has just been read from."""
        self._connections.add(connection)
        if self._timer is None and hasattr(select, "poll"):
            self._timer = self._loop.call_later(_LATER, self._look)

    def forget(self, connection: Connection) -> None:
        """Forget a connection that has ended, whose memory would be kept for two seconds."""
        self._connections.discard(connection)
        self._checked.discard(connection)

    def read_lately(self) -> Iterator[Connection]:
        """Yield the connections that were read in the last second, and some others."""
        yield from self._connections
        yield from self._checked

    def close(self) -> None:
        """Stop checking all connections."""
        self._connections.clear()
        self._checked.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        connections = {
            connection.fd: connection for connection in self._connections if not connection.closed
        }
        # Once more, so that no closed connection is kept for long.
        self._timer = self._loop.call_later(_LATER, self._look) if self._connections else None
        self._checked, self._connections = set(connections.values()), set()
        poll = select.poll()
        for fd in connections:
            # poll() reports errors even if no event is asked for.
            poll.register(fd, 0)
        for fd, events in poll.poll(0):
            # A held client that has disconnected is detected on its next read; its
            # earlier frames are processed first.
            if events & (select.POLLERR | select.POLLHUP) and connections[fd].may_read():
                connections[fd].on_readable()
