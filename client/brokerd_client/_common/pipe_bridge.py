"""A socket that stands for a named pipe, for programs whose loops can wait for sockets
only.

Two threads copy the data. A message of the pipe is a frame's body, and becomes a
length-prefixed frame on the socket. A frame from the socket becomes one message. Only a
piece of an incoming message is in memory, even if the message is long. The reader of
the socket gets the length first, and can refuse it. When one side closes, its earlier
data is delivered first. The bridge does not know the meaning of the frames.
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

#: Seconds in which the pipe's peer may still read data that was written before the
#: socket closed.
LINGER_S: Final = 5.0
#: Bytes per read of an idle pipe: the system keeps a buffer of this size for each of
#: them.
_FIRST_PIECE: Final = 4 * 1024
#: Bytes per read while a message comes in, and per read of the socket.
_PIECE: Final = 64 * 1024


class Pipe(Protocol):
    """A connected pipe that keeps the boundaries of messages.

    One thread reads, one thread writes, and any thread may call stop().
    """

    def read(self, size: int) -> tuple[bytes, int]:
        """Return the next piece of a message, and how many bytes of the message follow
        it.

        Raises EOFError: the other end is closed. Raises OSError: stopped, or broken.
        """

    def write(self, body: bytes) -> None:
        """Write one message. Raises BrokenPipeError: the other end is closed. Raises
        OSError: stopped, or broken.
        """

    def stop(self, *, writing: bool) -> None:
        """End current and later reads with an OSError; with ``writing``, writes too."""

    def close(self) -> None:
        """Close the pipe; no read or write may be in progress."""


class BridgedSocket(socket.socket):
    """The program's end of the bridge.

    After close(), the pipe's peer has LINGER_S seconds to read the remaining data. To
    deliver all data, shut down the writing side, and read until the end of the input.
    """

    _on_close: Callable[[], None] | None = None

    def close(self) -> None:
        """Close the socket, and notify the bridge.

        The bridge may be waiting for the pipe's peer, and would not notice.
        """
        super().close()
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()


def bridge(pipe: Pipe) -> BridgedSocket:
    """Return a socket that stands for the pipe, which now belongs to the bridge and is
    closed by it.

    Raises OSError: the system has no more sockets or threads; the pipe is closed.
    """
    try:
        program_end, bridge_end = socket.socketpair()
    except OSError:
        pipe.close()
        raise
    bridged_socket = BridgedSocket(
        program_end.family, program_end.type, program_end.proto, fileno=program_end.detach()
    )
    try:
        _Bridge(pipe, bridge_end).start()
    except OSError:
        bridged_socket.close()
        raise
    bridged_socket._on_close = lambda: pipe.stop(writing=False)
    return bridged_socket


def dial_pipe(name: str) -> BridgedSocket:
    """Return a socket for a new connection to the named pipe; wait for at most a
    millisecond.

    Raises BlockingIOError: the pipe is busy now; try again.
    Raises OSError: the pipe does not exist.
    """
    if sys.platform == "win32":
        from brokerd_client.connection.named_pipes import dial

        try:
            return bridge(dial(name, time.monotonic()).into_stream())
        except TimedOut as error:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
    raise AddressError(f"{name} is a named pipe: they exist on Windows only")


class _Bridge:
    """The two threads of a bridge; the thread that ends last closes the pipe and the
    socket.
    """

    def __init__(self, pipe: Pipe, sock: socket.socket) -> None:
        self._pipe = pipe
        self._sock = sock
        self._all_written = threading.Event()
        self._running_threads = 2
        self._end_lock = threading.Lock()

    def start(self) -> None:
        started = 0
        try:
            for thread_work in (self._write_messages, self._read_messages):
                # daemon: a program that needs all data delivered waits for that at the
                # socket.
                threading.Thread(target=thread_work, name="named pipe", daemon=True).start()
                started += 1
        except RuntimeError as error:
            self._pipe.stop(writing=True)
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            for _ in range(2 - started):
                self._end_thread()
            raise OSError(errno.EAGAIN, str(error)) from error

    def _read_messages(self) -> None:
        """Copy from pipe to socket, until the peer or the socket's other end closes."""
        pipe, sock = self._pipe, self._sock
        try:
            while True:
                piece, remaining = pipe.read(_FIRST_PIECE)
                sock.sendall(frame_prefix(len(piece) + remaining) + piece)
                while remaining:
                    piece, remaining = pipe.read(min(remaining, _PIECE))
                    sock.sendall(piece)
        except (EOFError, OSError):
            # One end is closed, or was stopped; earlier data is delivered first.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
            if not self._all_written.wait(LINGER_S):
                pipe.stop(writing=True)
        finally:
            self._end_thread()

    def _write_messages(self) -> None:
        """Copy from socket to pipe, until the socket's other end is closed."""
        pipe, sock, frames = self._pipe, self._sock, FrameReader()
        try:
            while data := sock.recv(_PIECE):
                frames.feed(data)
                while (body := frames.next_frame(MAX_SHORT)) is not None:
                    pipe.write(body)
            self._all_written.set()
            # A pipe can't be closed in one direction only.
            pipe.stop(writing=True)
        except (FrameError, OSError) as error:
            self._all_written.set()
            if not isinstance(error, BrokenPipeError):
                pipe.stop(writing=True)
            # Earlier data of a closed peer is still delivered; data for it is read and
            # dropped.
            with contextlib.suppress(OSError):
                while sock.recv(_PIECE):
                    pass
        finally:
            self._end_thread()

    def _end_thread(self) -> None:
        with self._end_lock:
            self._running_threads -= 1
            is_last = not self._running_threads
        if is_last:
            self._pipe.close()
            self._sock.close()
