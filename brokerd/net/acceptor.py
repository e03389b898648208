"""Accepts connections of every listener and passes each to the door.

Where the system has no descriptor left, a listener rests for a moment and its newcomers wait in the system's queue.
"""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING, Final

from brokerd.net.link import tune

if TYPE_CHECKING:
    from brokerd.net.listening import Listening
    from brokerd.net.server import Server

__all__ = ["Acceptor"]

#: Connections accepted in one turn of the loop, so that a crowd at the door holds up nobody inside.
_ACCEPTS: Final = 32
#: Seconds without accepting after the system had no descriptor left.
_OUT_OF_DESCRIPTORS_PAUSE: Final = 0.1
#: What the system says then; Windows has numbers of its own for sockets.
_OUT_OF_DESCRIPTORS: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM} | {
    getattr(errno, name) for name in ("WSAEMFILE", "WSAENOBUFS") if hasattr(errno, name)
}
#: Connections that are held at once: on Windows a loop can wait for 512 sockets, and those that listen are among them.
_MOST_SOCKETS: Final = 480 if sys.platform == "win32" else sys.maxsize


class Acceptor:
    """Accepts what comes to the listeners of one server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = server.loop
        self._paused: list[Listening] = []

    def add(self, listening: Listening) -> None:
        """Accept connections of this listener from now on."""
        self._loop.add_reader(listening.sock.fileno(), self.accept_some, listening)

    def remove(self, listening: Listening) -> None:
        """Accept no more connections of this listener."""
        self._loop.remove_reader(listening.sock.fileno())
        self._paused = [paused for paused in self._paused if paused is not listening]

    def accept_some(self, listening: Listening) -> None:
        """Accept what has come to a listener, up to one turn's share."""
        server = self._server
        for _ in range(_ACCEPTS):
            try:
                if len(server.links) + len(server.door) + server.seen_off >= _MOST_SOCKETS:
                    raise OSError(errno.EMFILE, "more connections than the event loop can wait for")
                sock, peer = listening.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError, ConnectionResetError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_DESCRIPTORS:
                    raise
                self._pause(listening, error)
                return
            try:
                tune(sock)
            except OSError:
                # Gone before it was begun.
                sock.close()
                continue
            entry = listening.config
            server.door.knock(sock, peer, str(listening.address), allow_md5=entry.allow_md5, tls=entry.tls)

    def _pause(self, listening: Listening, error: OSError) -> None:
        """Leave connections in the system's queue until there are descriptors again."""
        self._server.tally.pauses += 1
        self._server.log.warning("listener.paused", listener=str(listening.address), reason=error.strerror)
        self._loop.remove_reader(listening.sock.fileno())
        self._paused.append(listening)
        self._loop.call_later(_OUT_OF_DESCRIPTORS_PAUSE, self._resume, listening)

    def _resume(self, listening: Listening) -> None:
        if listening in self._paused:
            self._paused.remove(listening)
            self.add(listening)
