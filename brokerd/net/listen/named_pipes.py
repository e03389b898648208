"""A listening named pipe of Windows, which behaves like a listening socket for the
server.

The event loop can wait for sockets only. So a thread accepts the connections of the
pipe. It gives each a socket that stands for it
(``brokerd_client._common.pipe_bridge``), and wakes the event loop. Handshakes are not
handled here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
from collections import deque
from collections.abc import Collection
from typing import Any, Final, Protocol

from brokerd_client._common.pipe_bridge import BridgedSocket, Pipe, bridge

__all__ = ["PipeListener", "open_pipe"]

#: Connections kept until the server accepts them; further peers wait in the system.
_WAITING: Final = 64
#: Seconds before the next try after the system had no handle, socket or thread left.
_PAUSE_S: Final = 0.1


class _PipePeer(Protocol):
    def into_stream(self) -> Pipe: ...


class _PipeServer(Protocol):
    """``PipeServer`` of brokerd_client.connection.named_pipes."""

    def wait(self, channels: Collection[Any], timeout: float | None) -> tuple[bool, set[int]]: ...
    def accept(self) -> tuple[_PipePeer, object] | None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...


class PipeListener:
    """The part of a listening socket that the server needs: fileno(), accept() and
    close().

    pipe_server: takes the connections; it belongs to the listener's thread, which
        closes it.
    name: the name of the pipe.
    """

    def __init__(self, pipe_server: _PipeServer, name: str) -> None:
        self._pipe_server = pipe_server
        self._name = name
        self._accepted: deque[BridgedSocket | OSError] = deque()
        self._room = threading.Condition()
        self._closing = threading.Event()
        self._waker_out, self._waker_in = socket.socketpair()
        self._waker_out.setblocking(False)
        self._thread = threading.Thread(
            target=self._take_connections, name=f"named pipe {name}", daemon=True
        )
        self._thread.start()

    def fileno(self) -> int:
        """Return a descriptor that is readable when accept() will not raise
        BlockingIOError.
        """
        return self._waker_out.fileno()

    def accept(self) -> tuple[BridgedSocket, str]:
        """Return a socket that stands for the next connection, and the pipe's name.

        A pipe's peer has no address. Raises BlockingIOError if no connection waits.
        Raises OSError with ENOBUFS if the system has no room for a connection that
        waits.
        """
        self._waker_out.recv(1)
        with self._room:
            connection = self._accepted.popleft()
            self._room.notify()
        if isinstance(connection, OSError):
            raise connection
        return connection, self._name

    def close(self) -> None:
        """Stop listening: connections that were not accepted are closed, the others
        stay.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        with self._room:
            self._room.notify()
        self._pipe_server.wake()
        self._thread.join()
        for connection in self._accepted:
            if isinstance(connection, BridgedSocket):
                connection.close()
        self._accepted.clear()
        self._waker_out.close()
        self._waker_in.close()

    def _take_connections(self) -> None:
        with contextlib.closing(self._pipe_server):
            while not self._closing.is_set():
                try:
                    has_peer, _ = self._pipe_server.wait((), None)
                    peer = (
                        self._pipe_server.accept()
                        if has_peer and not self._closing.is_set()
                        else None
                    )
                    if peer is not None:
                        self._announce(bridge(peer[0].into_stream()))
                except OSError as error:
                    # Whatever the system's own code, ENOBUFS makes the server pause for
                    # a moment.
                    self._announce(
                        OSError(errno.ENOBUFS, error.strerror or os.strerror(errno.ENOBUFS))
                    )
                    self._closing.wait(_PAUSE_S)

    def _announce(self, connection: BridgedSocket | OSError) -> None:
        with self._room:
            self._room.wait_for(lambda: len(self._accepted) < _WAITING or self._closing.is_set())
            self._accepted.append(connection)
        self._waker_in.send(b"\0")


def open_pipe(name: str) -> PipeListener:
    """Return a listener at the pipe of that name.

    Raises OSError if it can't be created, or if this is not Windows.
    """
    if sys.platform == "win32":
        from brokerd_client.connection.named_pipes import PipeServer

        return PipeListener(PipeServer(name), name)
    raise OSError(errno.EAFNOSUPPORT, "named pipes exist on Windows only")
