"""A socket that stands for a named pipe, for programs whose loops can wait for sockets only.

Two threads carry what comes: a message of the pipe is a frame's body, and becomes a length-prefixed frame on the
socket; a frame from the socket becomes one message. Of a message that comes in only a piece is in memory, however long
it is: whoever reads the socket sees its length first and judges it. When either side ends, what it has said before is
delivered first. Nothing here knows what the frames mean.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from brokerd_client.errors import AddressError, FrameError, TimedOut
from brokerd_client.wire.framing import MAX_SHORT, FrameReader, frame_prefix

__all__ = ["LINGER_S", "BridgedSocket", "Pipe", "bridge", "dial_pipe"]

#: Seconds in which the pipe's peer may still take what the closed socket had been given.
LINGER_S: Final = 5.0
#: Bytes asked for while nothing comes: the system keeps a buffer of this size for every idle pipe.
_FIRST_PIECE: Final = 4 * 1024
_PIECE: Final = 64 * 1024


class Pipe(Protocol):
    """A connected pipe that keeps messages whole. One thread reads, one writes, and any thread may call stop()."""

    def read(self, size: int) -> tuple[bytes, int]:
        """Return the next piece of a message, and how many bytes of that message come after it.

        Raises EOFError: the other end is closed. Raises OSError: stopped, or broken.
        """

    def write(self, body: bytes) -> None:
        """Write one message. Raises BrokenPipeError: the other end is closed. Raises OSError: stopped, or broken."""

    def stop(self, *, writing: bool) -> None:
        """End a read under way and every later one with an OSError; with ``writing`` writes too."""

    def close(self) -> None:
        """Close; nothing is under way any more."""


class BridgedSocket(socket.socket):
    """The program's end. When it is closed, the pipe's peer has LINGER_S seconds to take what was written to it.

    To have all of it delivered, shut down the writing side and wait for the end of what can be read.
    """

    _on_close: Callable[[], None] | None = None

    def close(self) -> None:
        """Close, and let the bridge know: it may be waiting for the pipe's peer, and would not notice."""
        super().close()
        tell, self._on_close = self._on_close, None
        if tell is not None:
            tell()


def bridge(pipe: Pipe) -> BridgedSocket:
    """Return a socket that stands for the pipe, which now belongs to the bridge and is closed by it.

    Raises OSError: the system has no more sockets or threads; the pipe is closed.
    """
    try:
        near, far = socket.socketpair()
    except OSError:
        pipe.close()
        raise
    given = BridgedSocket(near.family, near.type, near.proto, fileno=near.detach())
    try:
        _Bridge(pipe, far).start()
    except OSError:
        given.close()
        raise
    given._on_close = lambda: pipe.stop(writing=False)
    return given


def dial_pipe(name: str) -> BridgedSocket:
    """Return a socket that stands for a connection to the pipe of that name; waits for a millisecond at most.

    Raises BlockingIOError: the pipe is busy, and may not be a moment later. Raises OSError: there is no such pipe.
    """
    if sys.platform == "win32":
        from brokerd_client.connection.named_pipes import dial

        try:
            return bridge(dial(name, time.monotonic()).into_stream())
        except TimedOut as error:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
    raise AddressError(f"{name} is a named pipe: they exist on Windows only")


class _Bridge:
    """The two threads; the last one that ends closes the pipe and the socket."""

    def __init__(self, pipe: Pipe, sock: socket.socket) -> None:
        self._pipe = pipe
        self._sock = sock
        self._all_written = threading.Event()
        self._running = 2
        self._leaving = threading.Lock()

    def start(self) -> None:
        started = 0
        try:
            for work in (self._write_messages, self._read_messages):
                # daemon: whoever wants everything delivered waits for it, at the socket.
                threading.Thread(target=work, name="named pipe", daemon=True).start()
                started += 1
        except RuntimeError as error:
            self._pipe.stop(writing=True)
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            for _ in range(2 - started):
                self._leave()
            raise OSError(errno.EAGAIN, str(error)) from error

    def _read_messages(self) -> None:
        """Pipe to socket, until the peer closes or the socket's other end does."""
        pipe, sock = self._pipe, self._sock
        try:
            while True:
                piece, left = pipe.read(_FIRST_PIECE)
                sock.sendall(frame_prefix(len(piece) + left) + piece)
                while left:
                    piece, left = pipe.read(min(left, _PIECE))
                    sock.sendall(piece)
        except (EOFError, OSError):
            # Either end is gone, or was told to stop; what came before that is delivered.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
            if not self._all_written.wait(LINGER_S):
                pipe.stop(writing=True)
        finally:
            self._leave()

    def _write_messages(self) -> None:
        """Socket to pipe, until the socket's other end is closed."""
        pipe, sock, frames = self._pipe, self._sock, FrameReader()
        try:
            while data := sock.recv(_PIECE):
                frames.feed(data)
                while (body := frames.next_frame(MAX_SHORT)) is not None:
                    pipe.write(body)
            self._all_written.set()
            # A pipe has no half that could stay open.
            pipe.stop(writing=True)
        except (FrameError, OSError) as error:
            self._all_written.set()
            if not isinstance(error, BrokenPipeError):
                pipe.stop(writing=True)
            # A peer that is gone may have said something before: it is delivered, and nothing more goes the other way.
            with contextlib.suppress(OSError):
                while sock.recv(_PIECE):
                    pass
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._leaving:
            self._running -= 1
            last = not self._running
        if last:
            self._pipe.close()
            self._sock.close()
