"""The last frame to a connection that is then closed, whether the system takes it at
once or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from brokerd.net.connection.connection import GRACE

if TYPE_CHECKING:
    import asyncio

    from brokerd.net.context import Context
    from brokerd.net.relay.end import End

__all__ = ["LastFrame"]


class LastFrame:
    """Writes one frame to an end, and closes its connection, at the latest after GRACE
    seconds.
    """

    __slots__ = ("_context", "_end", "_rest", "_timer")

    def __init__(self, context: Context, end: End, frame: bytes) -> None:
        self._context = context
        self._end = end
        self._rest = memoryview(frame)
        self._timer: asyncio.TimerHandle | None = None

    def write(self) -> None:
        """Write the frame, or what is left of it."""
        end, loop = self._end, self._context.loop
        try:
            self._rest = self._rest[end.write(self._rest) :]
        except OSError:
            self._close()
            return
        if not (self._rest or end.unsent):
            end.end_writing()
            self._stop()
            self._context.connections.close_gracefully(end.sock)
        elif self._timer is None:
            self._timer = loop.call_later(GRACE, self._close)
            loop.add_writer(end.fd, self.write)

    def _close(self) -> None:
        self._stop()
        self._end.sock.close()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._context.loop.remove_writer(self._end.fd)
