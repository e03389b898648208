"""NATS's protocol on a connection that stands: messages in both directions, and pings.

nats-py makes the connection and authenticates. Then this protocol takes its place on the
transport. A message then needs neither a queue nor a task.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

__all__ = ["NatsStream"]

#: Most subjects whose origin and kind are remembered.
_MOST_SOURCES: Final = 1024
#: Most bytes that are copied to be written in one piece.
_LONGEST_COPY: Final = 8192
#: Longest line of the server, in bytes: one that begins with INFO can be long.
_LONGEST_LINE: Final = 1024 * 1024


class NatsStream(asyncio.Protocol):
    """One connection.

    Args:
        read_subject: Returns the origin and the kind of messages with a subject, or None
            for those to ignore.
        on_message: Is called with the origin, the kind and the payload of each message.
        on_read: Is called after the messages of one read.
        on_error: Is called with what the server complained about.
        on_lost: Is called with the reason, or "", when the connection has ended.
    """

    def __init__(
        self,
        *,
        read_subject: Callable[[str], tuple[str, str] | None],
        on_message: Callable[[str, str, bytes], None],
        on_read: Callable[[], None],
        on_error: Callable[[str], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._read_subject = read_subject
        self._on_message = on_message
        self._on_read = on_read
        self._on_error = on_error
        self._on_lost = on_lost
        self._transport: asyncio.Transport
        #: The beginning of a message, and how many bytes are needed to go on.
        self._unread = bytearray()
        self._needed = 0
        #: What ``read_subject`` has returned, by the begin of a message's line.
        self._sources: dict[bytes, tuple[str, str] | None] = {}
        #: For each ping without an answer, what waits for it.
        self._pings: deque[asyncio.Future[None] | None] = deque()
        self._ping_timer: asyncio.TimerHandle | None = None
        self._is_over = False

    def take_over(self, client: Any) -> None:
        """Take the place of a connected client of nats-py on its transport."""
        for name in ("_reading_task", "_ping_interval_task", "_flusher_task"):
            getattr(client, name).cancel()
        streams = client._transport
        self._transport = streams._io_writer.transport
        # The writer closes the transport at its end.
        self._client = client
        self._transport.set_protocol(self)
        self._transport.resume_reading()
        self.data_received(bytes(client._ps.buf + streams._io_reader._buffer))

    def subscribe(self, subjects: Iterable[str]) -> None:
        """Subscribe to subjects."""
        lines = [f"SUB {subject} {number}\r\n" for number, subject in enumerate(subjects, 1)]
        self._transport.write("".join(lines).encode())

    def publish(self, messages: Iterable[tuple[bytes, bytes]]) -> None:
        """Publish payloads, each with its subject."""
        pieces: list[bytes] = []
        for subject, payload in messages:
            pieces += (b"PUB %b %d\r\n" % (subject, len(payload)), payload, b"\r\n")
        if self._is_over:
            return
        if sum(map(len, pieces)) <= _LONGEST_COPY:
            # To copy these costs less than three pieces in one system call.
            self._transport.write(b"".join(pieces))
        else:
            self._transport.writelines(pieces)

    async def flush(self) -> None:
        """Return when the server has handled what was written. Raises ConnectionError."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ping(waiter)
        await waiter

    def keep_alive(self, seconds: float, most: int) -> None:
        """Ping the server from now on.

        Args:
            seconds: Between two pings.
            most: Pings without an answer after which the connection is lost.
        """
        if len(self._pings) >= most:
            self._lose("the server does not answer")
            return
        self._ping(None)
        loop = asyncio.get_running_loop()
        self._ping_timer = loop.call_later(seconds, self.keep_alive, seconds, most)

    def _ping(self, waiter: asyncio.Future[None] | None) -> None:
        if self._is_over:
            raise ConnectionError("the connection has ended")
        self._pings.append(waiter)
        self._transport.write(b"PING\r\n")

    def close(self) -> None:
        """Close the connection once what was written has left."""
        self._end("it was closed")
        self._transport.close()

    def abort(self) -> None:
        """Close the connection at once."""
        self._end("it was closed")
        self._transport.abort()

    def _lose(self, reason: str) -> None:
        """End a connection that is of no use any more."""
        if not self._is_over:
            self.abort()
            self._on_lost(reason)

    def _end(self, reason: str) -> None:
        self._is_over = True
        if self._ping_timer is not None:
            self._ping_timer.cancel()
        for waiter in self._pings:
            if waiter is not None and not waiter.done():
                waiter.set_exception(ConnectionError(reason))
        self._pings.clear()

    # Called by the transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end of the connection."""
        if not self._is_over:
            reason = "" if exc is None else str(exc)
            self._end(reason)
            self._on_lost(reason)

    def data_received(self, data: bytes) -> None:
        """Take the bytes of one read."""
        if self._unread:
            self._unread += data
            if len(self._unread) < self._needed:
                return
            data = bytes(self._unread)
            self._unread.clear()
        position = self._take_messages(data)
        if position < len(data):
            self._unread += data[position:]
        if not self._is_over:
            self._on_read()

    def _take_messages(self, data: bytes) -> int:
        """Handle whole messages; return where the rest begins."""
        position, end = 0, len(data)
        while position < end and not self._is_over:
            line_end = data.find(b"\r\n", position)
            if line_end < 0:
                self._needed = 0
                if end - position > _LONGEST_LINE:
                    self._lose("a line of the server is too long")
                break
            # All but the size is the same in most lines.
            begin, _, size = data[position:line_end].rpartition(b" ")
            if begin[:4].rstrip() not in (b"MSG", b"HMSG"):
                self._take_line(data[position:line_end].split(None, 1))
                position = line_end + 2
                continue
            try:
                source = self._sources[begin] if begin in self._sources else self._learn(begin)
                stop = line_end + 2 + int(size)
            except ValueError:
                self._lose("the server has sent a line that is not NATS's protocol")
                break
            if stop + 2 > end:
                self._needed = stop + 2 - position
                break
            if source is not None:
                self._on_message(*source, data[line_end + 2 : stop])
            position = stop + 2
        return position

    def _learn(self, begin: bytes) -> tuple[str, str] | None:
        """Return the origin and the kind of messages whose lines begin like this.

        Raises ValueError.
        """
        verb, subject, *_ = begin.decode("ascii").split()
        # A host sends no headers; what has some is not for this broker.
        source = self._read_subject(subject) if verb == "MSG" else None
        if len(self._sources) >= _MOST_SOURCES:
            self._sources.clear()
        self._sources[begin] = source
        return source

    def _take_line(self, words: list[bytes]) -> None:
        """Handle a line that is not a message; INFO and +OK tell nothing of use."""
        verb = words[0].upper() if words else b""
        if verb == b"PING":
            self._transport.write(b"PONG\r\n")
        elif verb == b"PONG":
            waiter = self._pings.popleft() if self._pings else None
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
        elif verb == b"-ERR":
            self._on_error(words[-1].decode("utf-8", "replace").strip("' ").lower())
        elif verb not in (b"INFO", b"+OK"):
            self._lose("the server has sent a line that is not NATS's protocol")
