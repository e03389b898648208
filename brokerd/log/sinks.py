"""Where lines of the log go, each place with a thread of its own: nobody waits for a full pipe or a slow disk.

Lines come out whole and in order. What can't be written, or would wait too long a queue, is counted, and the count
takes its place as a line of its own when writing works again. No descriptor is made non-blocking: others may
share it.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol, TextIO

__all__ = [
    "MOST_BYTES",
    "MOST_LINES",
    "Descriptor",
    "Journal",
    "Outlet",
    "Target",
    "Text",
    "of_stream",
    "open_for_append",
]

#: What may wait for one place, in lines and in bytes.
MOST_LINES: Final = 10_000
MOST_BYTES: Final = 4 * 2**20
#: Seconds until it is tried again to say how many lines are lost, when no further line comes.
_TRY_AGAIN: Final = 5.0
#: Seconds between two looks at a descriptor that somebody else has made non-blocking.
_POLL: Final = 0.02


class Target(Protocol):
    """What lines are written to; only an Outlet's thread calls it."""

    def write(self, line: bytes) -> None:
        """Write one line, for as long as that takes. Raises OSError where it is lost."""

    def close(self) -> None:
        """Let go of what it holds."""


class Descriptor:
    """A file, a pipe or a terminal, by its descriptor.

    owned: the descriptor is closed with this.
    """

    def __init__(self, descriptor: int, *, owned: bool = False) -> None:
        self._descriptor = descriptor
        self._owned = owned
        self._rest = _missing_line_end(descriptor)

    def write(self, line: bytes) -> None:
        """Write one line; of one that can't be written to its end, the rest comes before the next."""
        while self._rest:
            self._rest = self._rest[self._attempt(self._rest) :]
        rest = line
        while rest:
            try:
                rest = rest[self._attempt(rest) :]
            except OSError:
                if len(rest) == len(line):
                    raise
                self._rest = rest
                return

    def _attempt(self, data: bytes) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:
                # Somebody who shares it has made it non-blocking.
                time.sleep(_POLL)

    def replace(self, descriptor: int) -> None:
        """Go on with another descriptor, such as that of a file begun anew."""
        old, self._descriptor = self._descriptor, descriptor
        self._rest = _missing_line_end(descriptor)
        os.close(old)

    def close(self) -> None:
        """Close the descriptor, if it is ours."""
        if self._owned:
            os.close(self._descriptor)


def _missing_line_end(descriptor: int) -> bytes:
    """Return a line end if the file ends in a line cut short, by a process that has ended since; else nothing."""
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or not found.st_size:
            return b""
        # The descriptor itself is open for writing only.
        reader = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
    except OSError:
        return b""
    try:
        return b"\n" if os.pread(reader, 1, found.st_size - 1) not in (b"", b"\n") else b""
    except OSError:
        return b""
    finally:
        os.close(reader)


class Text:
    """A stream that has no descriptor, such as one that a program keeps its output in."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, line: bytes) -> None:
        """Write one line."""
        try:
            self._stream.write(line.decode())
            self._stream.flush()
        except ValueError as error:
            raise OSError("the stream is closed") from error

    def close(self) -> None:
        """Do nothing: it is not ours."""


class Journal:
    """The system's journal, a datagram for each entry.

    Raises OSError where there is none.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket = self._connect()

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            raise
        return sock

    def write(self, line: bytes) -> None:
        """Send one entry; a journal that was started anew is found again."""
        try:
            self._socket.send(line)
        except OSError:
            old, self._socket = self._socket, self._connect()
            old.close()
            self._socket.send(line)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class _Lost:
    """The place of lines that found no room."""

    def __init__(self) -> None:
        self.count = 0


class Outlet:
    """Lines on their way to one place.

    lost_line: returns the line that says how many were lost.
    """

    def __init__(self, target: Target, lost_line: Callable[[int], bytes]) -> None:
        self.target = target
        self._lost_line = lost_line
        self._queue: deque[bytes | _Lost | Callable[[], None]] = deque()
        self._bytes = 0
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._busy = False
        self._closed = False
        #: Lines that could not be written, in the thread's hands.
        self._failed = 0

    def put(self, line: bytes) -> None:
        """Have a line written when it is its turn; never waits."""
        with self._change:
            if self._closed:
                return
            last = self._queue[-1] if self._queue else None
            lines = len(self._queue) - isinstance(last, _Lost)
            if lines < MOST_LINES and self._bytes + len(line) <= MOST_BYTES:
                self._bytes += len(line)
                self._add(line)
            else:
                if not isinstance(last, _Lost):
                    last = _Lost()
                    self._add(last)
                last.count += 1

    def call(self, function: Callable[[], None]) -> None:
        """Have something done between the lines before and those after."""
        with self._change:
            self._add(function)

    def _add(self, item: bytes | _Lost | Callable[[], None]) -> None:
        self._queue.append(item)
        if self._thread is None:
            # A daemon's thread must not keep a process alive that nobody listens to: see flush.
            self._thread = threading.Thread(target=self._run, name="brokerd log", daemon=True)
            self._thread.start()
        self._change.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is written; return False if that takes longer than the time."""
        with self._change:
            return self._change.wait_for(lambda: not self._queue and not self._busy, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Write what waits, and end; what takes longer than the time is given up."""
        done = self.flush(timeout_s)
        with self._change:
            self._closed = True
            self._queue.clear()
            self._change.notify_all()
        if self._thread is None:
            self.target.close()
        elif done:
            self._thread.join(timeout_s)
        return done

    # In the thread

    def _run(self) -> None:
        while True:
            with self._change:
                self._busy = False
                self._change.notify_all()
                self._change.wait_for(lambda: self._queue or self._closed, _TRY_AGAIN if self._failed else None)
                if self._closed:
                    break
                item = self._queue.popleft() if self._queue else b""
                self._busy = True
                if isinstance(item, bytes):
                    self._bytes -= len(item)
            if isinstance(item, _Lost):
                self._failed += item.count
                item = b""
            if callable(item):
                item()
            else:
                self._write(item)
        self.target.close()

    def _write(self, line: bytes) -> None:
        try:
            if self._failed:
                self.target.write(self._lost_line(self._failed))
                self._failed = 0
            if line:
                self.target.write(line)
        except OSError:
            self._failed += bool(line)


def of_stream(stream: TextIO) -> Target:
    """Return what writes to a stream: past its buffer where it has a descriptor."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):
        return Text(stream)
    stream.flush()
    return Descriptor(descriptor)


def open_for_append(path: str) -> int:
    """Return a descriptor that appends to a file; a new one is its owner's alone. Raises OSError."""
    # O_NONBLOCK: a FIFO that nobody reads is an error, and holds nobody up.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.open(path, flags, 0o600)
