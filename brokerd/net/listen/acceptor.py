"""Accepts connections of every listener and begins their handshakes.

If the system has no descriptor left, a listener pauses for a moment. If
``limits.handshakes`` is reached, all listeners pause. New connections wait in the
system's queue meanwhile. When there is room again, the listeners take turns.
"""

from __future__ import annotations

import errno
import sys
from collections import deque
from typing import TYPE_CHECKING, Final

from brokerd.net.bound_loggers import listener_logger
from brokerd.net.connection.connection import tune

if TYPE_CHECKING:
    import asyncio

    from brokerd.net.context import Context
    from brokerd.net.handshake.handshakes import PendingHandshakes
    from brokerd.net.listen.listener import Listening

__all__ = ["Acceptor"]

#: Connections accepted in one turn of the event loop. So a flood of new connections
#: does not delay the established ones.
_ACCEPTS: Final = 32
#: Seconds without accepting after the system had no descriptor left.
_OUT_OF_DESCRIPTORS_PAUSE: Final = 0.1
#: Error numbers for a lack of descriptors; Windows has numbers of its own for sockets.
_OUT_OF_DESCRIPTORS: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM} | {
    getattr(errno, name) for name in ("WSAEMFILE", "WSAENOBUFS") if hasattr(errno, name)
}
#: Most connections that are open at once. On Windows an event loop can wait for 512
#: sockets, including the listening ones.
_MOST_SOCKETS: Final = 480 if sys.platform == "win32" else sys.maxsize


class Acceptor:
    """Accepts connections of the listeners of one server."""

    def __init__(self, context: Context, handshakes: PendingHandshakes) -> None:
        self._context = context
        self._handshakes = handshakes
        self._loop = context.loop
        #: Every listener; the next one in turn comes first.
        self._listeners: deque[Listening] = deque()
        #: Listeners that wait for descriptors.
        self._paused: list[Listening] = []
        #: The timer of the next check for room; None while there is room.
        self._full: asyncio.TimerHandle | None = None
        self._coming = False
        handshakes.on_room = self._on_room

    def add(self, listening: Listening) -> None:
        """Accept connections of this listener from now on."""
        self._listeners.append(listening)
        self._listen(listening)

    def remove(self, listening: Listening) -> None:
        """Accept no more connections of this listener."""
        self._loop.remove_reader(listening.sock.fileno())
        self._listeners = deque(
            listener for listener in self._listeners if listener is not listening
        )
        self._paused = [paused for paused in self._paused if paused is not listening]
        if self._full is not None and not self._listeners:
            self._full.cancel()
            self._full = None

    def _listen(self, listening: Listening) -> None:
        if self._full is None and listening not in self._paused:
            self._loop.add_reader(listening.sock.fileno(), self.accept_some, listening)

    def accept_some(self, listening: Listening) -> None:
        """Accept waiting connections of a listener, at most one turn's share."""
        for _ in range(_ACCEPTS):
            if not self._accept(listening):
                break

    def _accept(self, listening: Listening) -> bool:
        """Accept one connection; return whether there may be more to accept."""
        wait = self._handshakes.seconds_to_room()
        if wait:
            self._stop(wait)
            return False
        try:
            if (
                sys.maxsize != _MOST_SOCKETS
                and self._context.connections.count + len(self._handshakes) >= _MOST_SOCKETS
            ):
                raise OSError(errno.EMFILE, "more connections than the event loop can wait for")
            sock, peer = listening.sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError, ConnectionResetError):
            return False
        except OSError as error:
            if error.errno not in _OUT_OF_DESCRIPTORS:
                raise
            self._pause(listening, error)
            return False
        try:
            # Only the peer of a TCP socket has a pair of address and port.
            tune(sock, is_tcp=isinstance(peer, tuple))
        except OSError:
            # The peer has disconnected already.
            sock.close()
            return True
        entry = listening.config
        self._handshakes.begin(sock, peer, listening.text, allow_md5=entry.allow_md5, tls=entry.tls)
        return True

    def _stop(self, wait: float) -> None:
        """Accept nothing until a handshake is over, or may have to give way."""
        if self._full is not None:
            self._full.cancel()
        self._full = self._loop.call_later(wait, self._go_on)
        for listening in self._listeners:
            self._loop.remove_reader(listening.sock.fileno())

    def _on_room(self) -> None:
        if self._full is not None and not self._coming:
            self._coming = True
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Accept one connection of each listener in turn, while there is room.

        At most one turn's share is accepted.
        """
        self._coming = False
        if self._full is None:
            return
        self._full.cancel()
        self._full = None
        empty = 0
        for _ in range(_ACCEPTS):
            if empty >= len(self._listeners):
                break
            wait = self._handshakes.seconds_to_room()
            if wait:
                # The listener whose turn it is keeps its turn.
                self._stop(wait)
                break
            listening = self._listeners[0]
            self._listeners.rotate(-1)
            empty = 0 if listening not in self._paused and self._accept(listening) else empty + 1
        if self._full is None:
            for listening in self._listeners:
                self._listen(listening)

    def _pause(self, listening: Listening, error: OSError) -> None:
        """Leave connections in the system's queue until there are descriptors again."""
        self._context.counters.pauses += 1
        log = listener_logger(self._context.log, listening.address)
        log.warning("listener.paused", reason=error.strerror)
        self._loop.remove_reader(listening.sock.fileno())
        self._paused.append(listening)
        self._loop.call_later(_OUT_OF_DESCRIPTORS_PAUSE, self._resume, listening)

    def _resume(self, listening: Listening) -> None:
        if listening in self._paused:
            self._paused.remove(listening)
            self._listen(listening)
