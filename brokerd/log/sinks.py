"""Log sinks, each with a thread of its own, so that no full pipe or slow disk blocks
the broker.

The thread also makes the lines of the events, many at a time. Lines are written whole
and in order. Lines that can't be written, or that find the queue full, are counted.
When writing works again, a line with the count takes their place. No descriptor is made
non-blocking: other processes may share it.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, TextIO, TypeAlias

from brokerd.log.processors import RawEvent, add_header

__all__ = [
    "MOST_BYTES",
    "MOST_LINES",
    "Descriptor",
    "Journal",
    "Sink",
    "Target",
    "Text",
    "of_stream",
    "open_for_append",
]

#: Most that may wait for one sink, in lines and in bytes.
MOST_LINES: Final = 10_000
MOST_BYTES: Final = 4 * 2**20
#: Seconds until the thread tries again to report lost lines, when no further line
#: comes.
_TRY_AGAIN: Final = 5.0
#: Seconds between two attempts to write to a descriptor that another process made
#: non-blocking.
_POLL: Final = 0.02
#: Seconds for which the thread gathers events after it has written: to wake it for each
#: event would cost more than the event.
_GATHER_S: Final = 0.05
#: Most events that wait until the thread makes their lines, and most that it takes at
#: once. While more wait, ``put`` makes the line, whose length is then known.
_BATCH: Final = 256
#: Bytes that a write to a pipe takes whole, so that lines of several processes do not
#: mix (pipe(7), PIPE_BUF).
_WHOLE: Final = 4096
#: Most bytes of one write to a file, which takes every write whole.
_WHOLE_IN_FILE: Final = 64 * 1024


class Target(Protocol):
    """A destination of log lines; only a Sink's thread calls it.

    together: most bytes of several lines that one call of ``write`` gets; a longer line
        comes alone.
    """

    together: int

    def write(self, line: bytes) -> None:
        """Write a line or several, however long that takes. Raises OSError if all are
        lost.
        """

    def close(self) -> None:
        """Release its resources."""


class Descriptor:
    """A file, a pipe or a terminal, by its descriptor.

    owned: the descriptor is closed with this object.
    """

    def __init__(self, descriptor: int, *, owned: bool = False) -> None:
        self._descriptor = descriptor
        self._owned = owned
        self._unwritten = _missing_line_end(descriptor)
        self.together = _written_whole(descriptor)

    def write(self, line: bytes) -> None:
        """Write lines; the rest of a partly written line is written before the next one."""
        while self._unwritten:
            self._unwritten = self._unwritten[self._attempt(self._unwritten) :]
        unwritten = line
        while unwritten:
            try:
                unwritten = unwritten[self._attempt(unwritten) :]
            except OSError:
                if len(unwritten) == len(line):
                    raise
                self._unwritten = unwritten
                return

    def _attempt(self, data: bytes) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:
                # A process that shares the descriptor has made it non-blocking.
                time.sleep(_POLL)

    def replace(self, descriptor: int) -> None:
        """Switch to another descriptor, such as that of a newly opened file."""
        old, self._descriptor = self._descriptor, descriptor
        self._unwritten = _missing_line_end(descriptor)
        self.together = _written_whole(descriptor)
        os.close(old)

    def close(self) -> None:
        """Close the descriptor, if this object owns it."""
        if self._owned:
            os.close(self._descriptor)


def _written_whole(descriptor: int) -> int:
    """Return how many bytes a write takes whole, so that no other line gets in between."""
    try:
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:
        is_file = False
    return _WHOLE_IN_FILE if is_file else _WHOLE


def _missing_line_end(descriptor: int) -> bytes:
    """Return a line end if the file ends in an incomplete line, else nothing.

    A process that has ended since may have left such a line.
    """
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            return b""
        # The descriptor itself is open for writing only.
        reader = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
    except OSError:
        return b""
    try:
        return b"\n" if os.pread(reader, 1, status.st_size - 1) not in (b"", b"\n") else b""
    except OSError:
        return b""
    finally:
        os.close(reader)


class Text:
    """A stream without a descriptor, such as one in which a program collects its
    output.
    """

    together = _WHOLE

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, line: bytes) -> None:
        """Write lines."""
        try:
            self._stream.write(line.decode())
            self._stream.flush()
        except ValueError as error:
            raise OSError("the stream is closed") from error

    def close(self) -> None:
        """Do nothing: the stream belongs to the program."""


class Journal:
    """The system's journal, with a datagram for each entry.

    Raises OSError where there is none.
    """

    together = 0

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
        """Send one entry; connect again if the journal was restarted."""
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
    """The place of lines for which the queue had no room."""

    def __init__(self) -> None:
        self.count = 0


#: An event, with its header fields or without them.
_Event: TypeAlias = Mapping[str, Any] | RawEvent
_Item: TypeAlias = _Event | bytes | _Lost | Callable[[], None]


class Sink:
    """The queue of events for one target, and the thread that writes their lines.

    render: returns the line of an event; it is called in the thread, too.
    lost: the number of lines that could not be written.
    """

    def __init__(self, target: Target, render: Callable[[_Event], bytes]) -> None:
        self.target = target
        self._render = render
        self._queue: deque[_Item] = deque()
        #: Of the lines in the queue.
        self._bytes = 0
        # To enter a lock takes less time than to enter a condition, which is in Python.
        self._lock = threading.RLock()
        self._change = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._busy = False
        #: Whether the thread waits for an item, and has to be woken or started.
        self._idle = True
        #: Whether ``flush`` waits for the lines.
        self._hurries = False
        self._closed = False
        #: Lines that could not be written; only the thread uses this count.
        self._failed = 0
        self.lost = 0

    def put(self, event: _Event | bytes) -> None:
        """Queue an event, which is not changed any more, or its line; never blocks."""
        with self._lock:
            if self._closed:
                return
            queue = self._queue
            if len(queue) < _BATCH and not isinstance(event, bytes):
                if self._idle or len(queue) == _BATCH - 1:
                    self._add(event)
                else:
                    # The thread need not be woken: it takes what has gathered.
                    queue.append(event)
                return
            line = event if isinstance(event, bytes) else self._render(event)
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
                self.lost += 1

    def call(self, function: Callable[[], None]) -> None:
        """Call a function between the lines queued before it and those after."""
        with self._change:
            self._add(function)

    def _add(self, item: _Item) -> None:
        self._queue.append(item)
        if self._thread is None:
            # A daemon thread: pending log lines must not keep a process alive; see
            # flush.
            self._thread = threading.Thread(target=self._run, name="brokerd log", daemon=True)
            self._thread.start()
        if self._idle or len(self._queue) == _BATCH:
            self._idle = False
            self._change.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until every line is written; return False if that takes longer than the
        time.
        """
        with self._change:
            self._hurries = True
            self._change.notify_all()
            done = self._change.wait_for(lambda: not self._queue and not self._busy, timeout_s)
            self._hurries = False
            return done

    def close(self, timeout_s: float) -> bool:
        """Write the waiting lines and close; discard those that take longer than the
        time.
        """
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
                self._wait()
                if self._closed:
                    break
                self._busy = True
                items = self._take()
            self._carry_out(items)
        self.target.close()

    def _wait(self) -> None:
        """Wait for an item, or until lost lines are to be reported."""
        if not self._queue:
            self._change.wait_for(
                lambda: self._hurries or self._closed or len(self._queue) >= _BATCH, _GATHER_S
            )
        self._idle = True
        self._change.wait_for(
            lambda: self._queue or self._closed, _TRY_AGAIN if self._failed else None
        )
        self._idle = False

    def _take(self) -> list[_Item]:
        """Return the next items of the queue."""
        items = [self._queue.popleft() for _ in range(min(len(self._queue), _BATCH))]
        if self._bytes:
            self._bytes -= sum(len(item) for item in items if isinstance(item, bytes))
        return items

    def _carry_out(self, items: list[_Item]) -> None:
        """Write the lines, as many as possible together, and do what stands between
        them.
        """
        lines: list[bytes] = []
        size = 0
        for item in items:
            line = b"" if isinstance(item, _Lost) or callable(item) else self._line(item)
            size += len(line)
            if lines and (not line or size > self.target.together):
                self._write(lines)
                lines, size = [], len(line)
            if line:
                lines.append(line)
            elif isinstance(item, _Lost):
                self._failed += item.count
            elif callable(item):
                item()
            else:
                self._count_lost(1)
        self._write(lines)

    def _line(self, item: _Event | bytes) -> bytes:
        """Return the line of an event, or nothing if it can't be made."""
        try:
            return item if isinstance(item, bytes) else self._render(item)
        except Exception:  # noqa: BLE001 - the lines of other events are still written
            return b""

    def _count_lost(self, lines: int) -> None:
        self._failed += lines
        with self._change:
            self.lost += lines

    def _lost_line(self) -> bytes:
        event = add_header(None, "warning", {"event": "log.lost", "count": self._failed})
        return self._render(event)

    def _write(self, lines: list[bytes]) -> None:
        data = b"".join(lines)
        try:
            if self._failed:
                self.target.write(self._lost_line())
                self._failed = 0
            if data:
                self.target.write(data)
        except OSError:
            self._count_lost(len(lines))


def of_stream(stream: TextIO) -> Target:
    """Return the target for a stream; it bypasses the buffer of one with a descriptor."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):
        return Text(stream)
    stream.flush()
    return Descriptor(descriptor)


def open_for_append(path: str) -> int:
    """Return a descriptor that appends to a file. Raises OSError.

    Only its owner may read or write a new file.
    """
    # O_NONBLOCK: opening a FIFO without a reader fails instead of blocking.
    flags = (
        os.O_WRONLY
        | os.O_APPEND
        | os.O_CREAT
        | getattr(os, "O_CLOEXEC", 0)
        | getattr(os, "O_NONBLOCK", 0)
    )
    return os.open(path, flags, 0o600)
