"""Lingering close: the last bytes written to a connection arrive before the connection
ends.

The system resets a TCP socket that is closed while bytes from the peer are unread. A
reset discards all bytes that the peer's system has not acknowledged. So the broker
shuts down its sending half, then reads and discards what still comes in. It closes the
socket when the peer has received everything, has closed, or its time is over. Source:
RFC 9293, 3.10.4, and RFC 2525, 2.17.
"""

from __future__ import annotations

import array
import asyncio
import socket
import sys
from collections.abc import Callable
from typing import Final

from brokerd_client._common.pipe_bridge import BridgedSocket

__all__ = ["LingeringClose", "unacknowledged"]

#: Seconds between two checks for unacknowledged bytes.
_LOOK_AGAIN: Final = 0.02


class LingeringClose:
    """A socket whose connection is over except for bytes on their way to the peer.

    buffer: the buffer into which discarded input is read.
    time_s: seconds until the socket is closed, even if bytes have not arrived.
    on_closed: called once, when the socket is closed.
    """

    def __init__(
        self,
        sock: socket.socket,
        buffer: memoryview,
        time_s: float,
        loop: asyncio.AbstractEventLoop,
        on_closed: Callable[[LingeringClose], None],
    ) -> None:
        self._sock = sock
        self._buffer = buffer
        self._loop = loop
        self._deadline = loop.time() + time_s
        self._on_closed = on_closed
        self._timer: asyncio.TimerHandle | None = None

    @property
    def sock(self) -> socket.socket:
        """The socket, for another process to continue with."""
        return self._sock

    @property
    def time_left_s(self) -> float:
        """Seconds until the socket is closed, even if bytes have not arrived."""
        return self._deadline - self._loop.time()

    def begin(self) -> None:
        """Shut down the sending half; close at once if no bytes are on their way."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
            return
        self._loop.add_reader(self._sock.fileno(), self._on_readable)
        self._look()

    def _look(self) -> None:
        if not self._throw_away():
            return
        if not unacknowledged(self._sock) or self._loop.time() >= self._deadline:
            self.close()
        else:
            self._timer = self._loop.call_later(_LOOK_AGAIN, self._look)

    def _on_readable(self) -> None:
        self._throw_away()

    def _throw_away(self) -> bool:
        """Read and discard input; return whether the peer is still connected."""
        try:
            is_connected = self._sock.recv_into(self._buffer) > 0
        except (BlockingIOError, InterruptedError):
            is_connected = True
        except OSError:
            is_connected = False
        if not is_connected:
            self.close()
        return is_connected

    def close(self) -> None:
        """Close the socket, even if bytes are on their way."""
        if self._sock.fileno() < 0:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        self._on_closed(self)


def unacknowledged(sock: socket.socket) -> int:
    """Return how many bytes written to a TCP socket the peer's system has not
    acknowledged.

    Return 0 for other sockets, whose written bytes are with the peer already. Return 0
    also if the system does not report the number. Return 1 for a socket that stands for
    a pipe: its bridge closes after passing everything on.
    """
    if isinstance(sock, BridgedSocket):
        return 1
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or not sys.platform.startswith("linux"):
        return 0
    import fcntl
    import termios

    count = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, count)
    return count[0]
