"""One connection: whole messages over a file descriptor, as ``multiprocessing.connection.Connection`` has them.

A message is a frame (docs/protocol.md, "Frame"); an object sent is a pickle in one. Nothing is ever read beyond the
message asked for, so that whoever holds the descriptor next - a child process, :func:`wait` - finds all that is still
to come. Source of the behaviour: CPython, Lib/multiprocessing/connection.py, ``_ConnectionBase`` and ``Connection``.

Beyond that: several threads may send, and several receive; a message announced above ``max_message`` is refused
before anything is allocated for it; lengths that no frame can have are refused; and a connection on which a frame was
cut off in the middle is never used in that direction again.
"""

from __future__ import annotations

import io
import os
import socket
import sys
import threading
from collections.abc import Callable
from multiprocessing import reduction
from types import TracebackType
from typing import Any, Final, NoReturn, Self, TypeAlias

from brokerd_client.connection.forks import reset_after_fork
from brokerd_client.connection.readiness import wait
from brokerd_client.errors import BadLength, BufferTooShort, Closed, FrameTooBig
from brokerd_client.wire.framing import LENGTH, LONG_LENGTH, frame_prefix, frame_span

if sys.platform == "win32":
    import _multiprocessing  # type: ignore[import-not-found,unused-ignore]

__all__ = ["BadMessageLength", "Connection", "MessageTooBig"]

#: Up to this many bytes a header is joined to its body: copying is cheaper than a second buffer.
_JOIN_UP_TO: Final = 16384
#: Asked of the kernel at once: a fresh buffer of this size is cheap, one of a whole large message is not.
_READ_AT_ONCE: Final = 256 * 1024

_NOTHING: Final = memoryview(b"")

_pickled: Final = reduction.ForkingPickler.dumps
_unpickled: Final = reduction.ForkingPickler.loads
_unpack_length: Final = LENGTH.unpack
_pack_length: Final = LENGTH.pack


Buffer: TypeAlias = Any  # bytes-like; collections.abc.Buffer is Python 3.12's


class MessageTooBig(FrameTooBig, OSError):
    """The peer announced a message above the limit; nothing of it was read. An OSError, as the standard library's."""


class BadMessageLength(BadLength, OSError):
    """The peer announced a length that no message can have. An OSError, as the standard library's."""


class Connection:
    """One end of a connection, over a file descriptor (on Windows a socket handle) that it owns.

    handle: an open, blocking descriptor. readable, writable: what may be done with it; at least one.
    max_message: largest message that recv and its kin accept, in bytes; None for any.
    """

    __slots__ = ("__weakref__", "_handle", "_max_message", "_readable", "_receiving", "_sending", "_writable")

    def __init__(
        self, handle: int, readable: bool = True, writable: bool = True, *, max_message: int | None = None
    ) -> None:
        self._handle: int | None = None
        descriptor = handle.__index__()
        if descriptor < 0:
            raise ValueError("invalid handle")
        if not readable and not writable:
            raise ValueError("at least one of `readable` and `writable` must be True")
        if max_message is not None and max_message < 0:
            raise ValueError("max_message is negative")
        self._readable = readable
        self._writable = writable
        self._max_message = max_message
        self._sending = threading.Lock()
        self._receiving = threading.Lock()
        self._handle = descriptor
        reset_after_fork(self)

    def __del__(self) -> None:
        # getattr: __init__ may not have come that far.
        if getattr(self, "_handle", None) is not None:
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._handle is None else f"handle {self._handle}"
        return f"<{type(self).__name__}, {state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a connection is pickled only to be handed to a process: by Process(args=...) or Connection.send"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _reset_after_fork(self) -> None:
        # A thread that held one of these does not exist in the child.
        self._sending = threading.Lock()
        self._receiving = threading.Lock()

    # What it is.

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._handle is None

    @property
    def readable(self) -> bool:
        """Whether messages can be received."""
        return self._readable

    @property
    def writable(self) -> bool:
        """Whether messages can be sent."""
        return self._writable

    @property
    def max_message(self) -> int | None:
        """The largest message accepted, in bytes; None for any."""
        return self._max_message

    def fileno(self) -> int:
        """Return the file descriptor, or the socket handle on Windows. Raises Closed."""
        if self._handle is None:
            raise Closed("handle is closed")
        return self._handle

    def close(self) -> None:
        """Close this end; doing so twice does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            _close(handle)

    # Sending.

    def send(self, obj: object) -> None:
        """Send an object as a pickle; it may itself hold connections. Raises Closed, or OSError as the system does."""
        handle = self._handle
        if handle is None or not self._writable:
            self._refuse_to("send")
        self._send_body(_pickled(obj))

    def send_bytes(self, buf: Buffer, offset: int = 0, size: int | None = None) -> None:
        """Send ``size`` bytes of a bytes-like object from ``offset`` on, all that follow by default, as one message.

        Raises ValueError where they are not all inside the buffer, else as send.
        """
        if self._handle is None or not self._writable:
            self._refuse_to("send")
        view = memoryview(buf)
        if view.itemsize > 1:
            view = view.cast("B")
        end = _checked_end(view.nbytes, offset, size)
        self._send_body(view[offset:end] if offset or end != view.nbytes else view)

    def _send_body(self, body: memoryview) -> None:
        size = len(body)
        if size <= _JOIN_UP_TO:
            # One write for all: neither Nagle's algorithm nor another thread comes between header and body.
            head = _pack_length(size) + body
            body = _NOTHING
        else:
            head = frame_prefix(size)
        with self._sending:
            handle = self._handle
            if handle is None or not self._writable:
                self._refuse_to("send")
            sent = 0
            try:
                sent = _write_both(handle, head, body) if body else _write(handle, head)
                while sent < len(head):
                    sent += _write(handle, head[sent:])
                sent -= len(head)
                while sent < len(body):
                    sent += _write(handle, body[sent:])
            except BaseException as error:
                # What the system refused whole, it has not begun. After anything else, such as an exception from a
                # signal handler, the peer may have half a frame, and would take the next one for its end.
                if sent or not (isinstance(error, OSError) and error.errno):
                    self._writable = False
                raise

    # Receiving.

    def recv(self) -> Any:
        """Return the next object. Raises EOFError where the peer is gone, and as recv_bytes.

        Unpickling runs what the peer says: only ever from a peer that has proved to know the key.
        """
        return _unpickled(self.recv_bytes())

    def recv_bytes(self, maxlength: int | None = None) -> bytes:
        """Return the next message.

        maxlength: refuse a longer one, as ``max_message`` does for all.
        Raises EOFError: the peer closed its end and nothing is left. MessageTooBig, BadMessageLength: both are
        OSErrors, and nothing more can be received. OSError: the peer went in the middle of a message.
        """
        limit = self._max_message
        if maxlength is not None:
            if maxlength < 0:
                raise ValueError("negative maxlength")
            limit = maxlength if limit is None or maxlength < limit else limit
        with self._receiving:
            handle = self._handle
            if handle is None or not self._readable:
                self._refuse_to("receive")
            size = self._read_length(handle, limit)
            if size > _READ_AT_ONCE:
                return self._read_rest(handle, b"", size)
            if not size:
                return b""
            try:
                body = _read(handle, size)
            except BaseException:
                self._cut_off()
                raise
            return body if len(body) == size else self._read_rest(handle, body, size)

    def recv_bytes_into(self, buf: Buffer, offset: int = 0) -> int:
        """Put the next message into a writable bytes-like object, ``offset`` bytes in; return its size in bytes.

        Raises BufferTooShort, whose args[0] is the whole message, and as recv_bytes.
        """
        with memoryview(buf) as view, view.cast("B") as target:
            if target.readonly:
                raise TypeError("recv_bytes_into needs a writable bytes-like object")
            if offset < 0:
                raise ValueError("negative offset")
            if offset > len(target):
                raise ValueError("offset too large")
            with self._receiving:
                handle = self._handle
                if handle is None or not self._readable:
                    self._refuse_to("receive")
                size = self._read_length(handle, self._max_message)
                if offset + size > len(target):
                    raise BufferTooShort(self._read_rest(handle, b"", size))
                with target[offset : offset + size] as place:
                    self._read_into(handle, place)
        return size

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Return whether there is something to receive, or the peer is gone, waiting up to ``timeout`` seconds.

        None waits for ever; a negative time does not wait.
        """
        if self._handle is None or not self._readable:
            self._refuse_to("receive")
        return bool(wait([self], timeout))

    def _read_length(self, handle: int, limit: int | None) -> int:
        """Return the size of the message that comes next, having read its length and nothing more."""
        prefix = _read(handle, LENGTH.size)
        if len(prefix) != LENGTH.size:
            if not prefix:
                raise EOFError
            prefix = self._read_rest(handle, prefix, LENGTH.size)
        (size,) = _unpack_length(prefix)
        if size < 0:
            if size == -1:
                prefix = self._read_rest(handle, prefix, LONG_LENGTH.size)
            try:
                span = frame_span(prefix, 0, len(prefix))
            except BadLength as error:
                self._cut_off()
                raise BadMessageLength(*error.args) from None
            assert span is not None
            size = span[1]
        if (limit is not None and size > limit) or size > sys.maxsize:
            self._cut_off()
            raise MessageTooBig(size, sys.maxsize if limit is None else limit)
        return int(size)

    def _read_rest(self, handle: int, begun: bytes, size: int) -> bytes:
        """Return ``size`` bytes of which ``begun`` were read already. Memory grows with what comes."""
        collected = io.BytesIO()
        missing = size - collected.write(begun)
        try:
            while missing:
                chunk = _read(handle, min(missing, _READ_AT_ONCE))
                if not chunk:
                    raise OSError("got end of file during message")
                missing -= collected.write(chunk)
        except BaseException:
            self._cut_off()
            raise
        return collected.getvalue()

    def _read_into(self, handle: int, place: memoryview) -> None:
        filled = 0
        try:
            while filled < len(place):
                with place[filled:] as rest:
                    count = _read_into(handle, rest)
                if not count:
                    raise OSError("got end of file during message")
                filled += count
        except BaseException:
            self._cut_off()
            raise

    def _cut_off(self) -> None:
        """Let nobody read on in the middle of a frame, as ``_bad_message_length`` in the standard library."""
        if self._writable:
            self._readable = False
        else:
            self.close()

    def _refuse_to(self, act: str) -> NoReturn:
        if self._handle is None:
            raise Closed("handle is closed")
        raise OSError(f"can't {act}: the connection is {'read' if act == 'send' else 'write'}-only or was cut off")

    # The forerunner's names.

    sendBytes = send_bytes  # noqa: N815
    recvBytes = recv_bytes  # noqa: N815
    recvBytesInto = recv_bytes_into  # noqa: N815


def _checked_end(length: int, offset: int, size: int | None) -> int:
    if offset < 0:
        raise ValueError("offset is negative")
    if length < offset:
        raise ValueError("buffer length < offset")
    if size is None:
        return length
    if size < 0:
        raise ValueError("size is negative")
    if offset + size > length:
        raise ValueError("buffer length < offset + size")
    return offset + size


# What moves bytes, by system.

_write: Callable[[int, bytes | memoryview], int]
_read: Callable[[int, int], bytes]

if sys.platform == "win32":
    _write = _multiprocessing.send
    _read = _multiprocessing.recv
    _close = _multiprocessing.closesocket

    def _write_both(handle: int, prefix: bytes, body: memoryview) -> int:
        return _write(handle, prefix)

    def _read_into(handle: int, place: memoryview) -> int:
        data = _read(handle, min(len(place), _READ_AT_ONCE))
        place[: len(data)] = data
        return len(data)

else:
    _write = os.write
    _read = os.read
    _close = os.close

    def _write_both(handle: int, prefix: bytes, body: memoryview) -> int:
        return os.writev(handle, (prefix, body))

    def _read_into(handle: int, place: memoryview) -> int:
        return os.readv(handle, (place,))


# Handing a connection to another process.

if sys.platform == "win32":
    from multiprocessing import resource_sharer

    def _rebuild(shared: Any, readable: bool, writable: bool, max_message: int | None) -> Connection:
        return Connection(shared.detach().detach(), readable, writable, max_message=max_message)

    def _reduce(connection: Connection) -> tuple[Any, ...]:
        with socket.fromfd(connection.fileno(), socket.AF_INET, socket.SOCK_STREAM) as sock:
            shared = resource_sharer.DupSocket(sock)
        return _rebuild, (shared, connection.readable, connection.writable, connection.max_message)

else:

    def _rebuild(shared: Any, readable: bool, writable: bool, max_message: int | None) -> Connection:
        return Connection(shared.detach(), readable, writable, max_message=max_message)

    def _reduce(connection: Connection) -> tuple[Any, ...]:
        shared = reduction.DupFd(connection.fileno())
        return _rebuild, (shared, connection.readable, connection.writable, connection.max_message)


reduction.register(Connection, _reduce)
