"""A second look at connections that were read from: has the peer gone without the event loop saying so again?

Under uvloop a socket in error is reported once, and then no more: libuv stops to watch it (uv__poll_io in its
src/unix/poll.c). If bytes were there too, that one report was used up by reading them, and a connection that was reset
stays, until somebody writes to it. So whatever was read from is looked at once more a moment later, all with one call.
Nothing runs while nothing is read.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio

    from brokerd.net.connection.connection import Connection

__all__ = ["ResetRecheck"]

#: Seconds after a read.
_LATER: Final = 1.0


class ResetRecheck:
    """The connections to look at again; keeps a timer only while there are any."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._connections: set[Connection] = set()
        self._timer: asyncio.TimerHandle | None = None

    def note(self, connection: Connection) -> None:
        """Look at a connection again in a moment: it has just been read from."""
        self._connections.add(connection)
        if self._timer is None and hasattr(select, "poll"):
            self._timer = self._loop.call_later(_LATER, self._look)

    def close(self) -> None:
        """Look at nothing any more."""
        self._connections.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        connections = {connection.fd: connection for connection in self._connections if not connection.closed}
        self._connections.clear()
        poll = select.poll()
        for fd in connections:
            # Errors are reported whatever is asked for.
            poll.register(fd, 0)
        for fd, events in poll.poll(0):
            # Who is held and gone is found gone when he is read from again: what he sent before counts first.
            if events & (select.POLLERR | select.POLLHUP) and connections[fd].may_read():
                connections[fd].on_readable()
