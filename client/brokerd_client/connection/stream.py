"""A connection: whole messages over a descriptor, as in ``multiprocessing.connection``.

A message is a frame (docs/protocol.md, "Frame"); an object sent is a pickle in a frame.
No byte is read beyond the requested message. The next user of the descriptor, such as a
child process or :func:`wait`, therefore finds all later messages. Source of the
behaviour: CPython, Lib/multiprocessing/connection.py, ``_ConnectionBase`` and
``Connection``.

Beyond that, several threads may send, and several may receive. A message announced
above ``max_message`` is refused before memory is allocated for it. Lengths that no
frame can have are refused. After a frame was cut off, its direction is never used
again.

An exception may come at any bytecode: from a signal handler, or set by another thread.
Received bytes are stored by the C call that reads them, before the interpreter can look
for signals: ``list.extend(map(read, ...))``. They stay in the connection until the
message is returned, so an interrupted receive goes on with the same message. Sent bytes
can't be counted as cheaply: an interrupted send ends the sending, unless the system had
refused to begin.
"""

from __future__ import annotations

import errno
import io
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing import reduction
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NoReturn

from brokerd_client._common import forks
from brokerd_client.connection.call_lock import (
    CallLock,
    new_call_lock,
    refuse_nested_call,
    release_if_held,
)
from brokerd_client.connection.readiness import wait
from brokerd_client.errors import (
    BadLength,
    BufferTooShort,
    Closed,
    FrameTooBig,
    UndecodablePayload,
)
from brokerd_client.wire.framing import LENGTH, LONG_LENGTH, frame_prefix, frame_span

if sys.platform == "win32":
    import _multiprocessing  # type: ignore[import-not-found,unused-ignore]

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BadMessageLength", "Connection", "MessageTooBig", "adopt_socket"]

#: Largest body that is copied behind its header, in bytes: copying is cheaper than a
#: write of two buffers.
_JOIN_UP_TO: Final = 16384
#: Most bytes requested by one read. A new buffer of this size is cheap; a buffer for a
#: whole large message is not.
_READ_AT_ONCE: Final = 256 * 1024

_EMPTY: Final = memoryview(b"")
#: The sizes of the reads of a length field, in bytes.
_LENGTH_FIELD: Final = (LENGTH.size,)
#: The length field that announces a length of 64 bits.
_LONG_FORM: Final = LENGTH.pack(-1)

_dumps: Final = reduction.ForkingPickler.dumps
_loads: Final = reduction.ForkingPickler.loads
_unpack_length: Final = LENGTH.unpack
_pack_length: Final = LENGTH.pack


Buffer = Any  # bytes-like; collections.abc.Buffer is Python 3.12's


class MessageTooBig(FrameTooBig, OSError):
    """The peer announced a message above the limit; nothing of it was read.

    It is an OSError, as the standard library's error.
    """


class BadMessageLength(BadLength, OSError):
    """The peer announced a length that no message can have.

    It is an OSError, as the standard library's error.
    """


class Connection:
    """One end of a connection, over a file descriptor that it owns.

    Args:
        handle: An open, blocking file descriptor; on Windows, a socket handle.
        readable: Whether messages can be received.
        writable: Whether messages can be sent.
        max_message: Largest message that the connection accepts, in bytes; None for
            any.

    Raises:
        ValueError: The descriptor is negative, ``max_message`` is negative, or the
            connection is neither readable nor writable.
    """

    __slots__ = (
        "__weakref__",
        "_handle",
        "_in_direct_read",
        "_in_write",
        "_kept_messages",
        "_max_message",
        "_peer",
        "_pieces",
        "_read_piece",
        "_readable",
        "_receive_lock",
        "_send_lock",
        "_unpickles",
        "_writable",
    )

    def __init__(
        self,
        handle: int,
        readable: bool = True,
        writable: bool = True,
        *,
        max_message: int | None = None,
    ) -> None:
        self._handle: int | None = None
        descriptor = handle.__index__()
        if descriptor < 0:
            raise ValueError("invalid handle")
        if not readable and not writable:
            raise ValueError("at least one of `readable` and `writable` must be True")
        if max_message is not None and max_message < 0:
            raise ValueError("max_message is negative")
        self._prepare(descriptor, readable, writable, max_message)
        self._handle = descriptor

    def _prepare(
        self, descriptor: int, readable: bool, writable: bool, max_message: int | None
    ) -> None:
        """Set all attributes but the handle: the connection does not own it yet."""
        self._readable = readable
        self._writable = writable
        self._max_message = max_message
        #: The client at the other end of a channel, or "".
        self._peer = ""
        #: Whether recv() unpickles what the peer sends.
        self._unpickles = True
        self._send_lock: CallLock = new_call_lock()
        self._receive_lock: CallLock = new_call_lock()
        #: The current message so far: pieces of its length field and body; or one pair
        #: of its size and a BytesIO with its body. When the message is returned, the
        #: list is replaced, not emptied.
        self._pieces: list[Any] = []
        #: Complete messages, as in ``_pieces``, whose return an exception prevented.
        self._kept_messages: list[list[Any]] = []
        #: True during a read into a caller's buffer, and permanently after an exception
        #: has interrupted one.
        self._in_direct_read = False
        #: True during a write, and permanently after an exception has interrupted one.
        self._in_write = False
        self._read_piece: Callable[[int], bytes] = partial(_read, descriptor)
        forks.register(self)

    def __del__(self) -> None:
        # getattr: __init__ may have raised before it set the handle.
        if getattr(self, "_handle", None) is not None:
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._handle is None else f"handle {self._handle}"
        return f"<{type(self).__name__}, {state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a connection is pickled only to be handed to a process: by Process(args=...) or"
            " Connection.send"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _after_fork(self) -> None:
        forks.register(self)
        # A thread that held one of the locks does not exist in the child.
        self._send_lock = new_call_lock()
        self._receive_lock = new_call_lock()
        # An incomplete message belongs to the parent, which has its first bytes too.
        if self._pieces or self._in_direct_read:
            self._readable = False
        if self._in_write:
            self._writable = False
        self._pieces, self._kept_messages = [], []

    # State.

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
        """The largest accepted message in bytes; None for any."""
        return self._max_message

    @property
    def peer(self) -> str:
        """The address of the client at the other end of a channel; "" if it is none."""
        return self._peer

    def fileno(self) -> int:
        """Return the file descriptor; on Windows, the socket handle.

        Raises:
            Closed: The connection is closed.
        """
        if self._handle is None:
            raise Closed("handle is closed")
        return self._handle

    def close(self) -> None:
        """Close this end. A second call does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            _close(handle)

    def _detach(self) -> None:
        """Give the descriptor up without closing it, as Python 3.14's connections can."""
        self._handle = None

    # Sending.

    def send(self, obj: object) -> None:
        """Send an object as a pickle.

        Args:
            obj: The object. It may hold connections, which the peer process gets too.

        Raises:
            Closed: The connection is closed.
            OSError: The connection is broken, or its sending has ended.
            RuntimeError: This call interrupts another send of the same thread.
        """
        handle = self._handle
        if handle is None or not self._writable:
            self._refuse_to("send")
        self._send_body(_dumps(obj))

    def send_bytes(self, buf: Buffer, offset: int = 0, size: int | None = None) -> None:
        """Send bytes as one message.

        Args:
            buf: A bytes-like object.
            offset: Position of the first byte to send.
            size: Number of bytes to send; None for all that follow.

        Raises:
            ValueError: The slice is not inside the buffer.
            TypeError: The buffer is not contiguous.
            BufferError: The buffer is not contiguous and larger than 16 KiB.
            Closed: The connection is closed.
            OSError: The connection is broken, or its sending has ended.
            RuntimeError: This call interrupts another send of the same thread.
        """
        if self._handle is None or not self._writable:
            self._refuse_to("send")
        view = memoryview(buf)
        if view.itemsize > 1 or view.ndim != 1:
            view = _flat_view(view)
        end = _end_of_slice(view.nbytes, offset, size)
        self._send_body(view[offset:end] if offset or end != view.nbytes else view)

    def _send_body(self, body: memoryview) -> None:
        size = len(body)
        if size <= _JOIN_UP_TO:
            # One write for both: Nagle's algorithm can't delay the body.
            head = _pack_length(size) + body
            body = _EMPTY
        else:
            if not body.c_contiguous:
                # The standard library raises this too, but after it has sent the length.
                raise BufferError("the buffer is not C-contiguous")
            head = frame_prefix(size)
        lock = self._send_lock
        if lock._is_owned():
            refuse_nested_call("send")
        # Negative before and after the writes.
        sent = -1
        try:
            with lock:
                handle = self._handle
                if handle is None or not self._writable or self._in_write:
                    self._refuse_to("send")
                sent = 0
                self._in_write = True
                sent = _write_both(handle, head, body) if body else _write(handle, head)
                while sent < len(head):
                    sent += _write(handle, head[sent:])
                if body:
                    total = len(head) + size
                    while sent < total:
                        sent += _write(handle, body[sent - len(head) :])
                self._in_write = False
                sent = -1
        except BaseException as error:
            release_if_held(lock)
            # If the system refused the first write, no byte was sent. After any other
            # exception the peer may have half a frame, and would read the next frame as
            # its other half.
            if not sent and isinstance(error, OSError) and error.errno and _raised_by_c_call(error):
                self._in_write = False
            elif sent >= 0:
                self._writable = False
            self._raise_if_closed(error, "send")
            raise

    # Receiving.

    def recv(self) -> Any:
        """Return the next object.

        Unpickling runs code that the peer chooses. Call this only if the peer has
        proved that it knows the key.

        Raises:
            UndecodablePayload: The peer of a channel is not trusted with pickles. The
                message stays for recv_bytes.
            Exception: As recv_bytes, or any error of unpickling the object.
        """
        if not self._unpickles:
            raise UndecodablePayload(
                f"pickles from {self._peer or 'the peer'} are not read: name it in"
                " allow_pickle_from, or prove an authkey at both ends; recv_bytes() works"
            )
        return _loads(self.recv_bytes())

    def recv_bytes(self, maxlength: int | None = None) -> bytes:
        """Return the next message.

        After an unlisted exception, the next call returns the message that this call
        would have returned.

        Args:
            maxlength: Largest message to accept, in bytes; None for ``max_message``.

        Raises:
            EOFError: The peer closed its end, and all messages were received.
            MessageTooBig: The message is too large. Nothing more can be received.
            BadMessageLength: No message can have this length. Nothing more can be
                received.
            Closed: The connection is closed.
            OSError: The peer closed its end in the middle of a message.
            RuntimeError: This call interrupts another receive of the same thread.
        """
        limit = self._max_message
        if maxlength is not None:
            if maxlength < 0:
                raise ValueError("negative maxlength")
            limit = maxlength if limit is None or maxlength < limit else limit
        lock = self._receive_lock
        if lock._is_owned():
            refuse_nested_call("receive")
        pieces: list[Any] = []
        next_pieces: list[Any] | None = None
        try:
            with lock:
                if (
                    self._handle is None
                    or not self._readable
                    or self._in_direct_read
                    or self._kept_messages
                ):
                    self._begin_receive()
                pieces, body, size = self._pieces, b"", -1
                if not pieces:
                    pieces.extend(map(self._read_piece, _LENGTH_FIELD))
                    prefix = pieces[0]
                    if len(prefix) == 4:
                        (size,) = _unpack_length(prefix)
                        if 0 < size <= _READ_AT_ONCE and (limit is None or size <= limit):
                            pieces.extend(map(self._read_piece, (size,)))
                            body = pieces[1]
                if len(body) != size:
                    body = self._read_body(pieces, limit)
                next_pieces = self._pieces = []
                return body
        except BaseException as error:
            self._keep_interrupted(pieces, next_pieces, error)
            raise

    def recv_bytes_into(self, buf: Buffer, offset: int = 0) -> int:
        """Receive the next message into a buffer; return its size in bytes.

        Args:
            buf: A writable bytes-like object.
            offset: Position in the buffer of the message's first byte.

        Raises:
            BufferTooShort: The message does not fit. ``args[0]`` is the whole message.
            ValueError: The offset is not inside the buffer.
            TypeError: The buffer is not writable.
            EOFError: As recv_bytes.
            OSError: As recv_bytes.
            RuntimeError: This call interrupts another receive of the same thread.
        """
        lock = self._receive_lock
        if lock._is_owned():
            refuse_nested_call("receive")
        pieces: list[Any] = []
        next_pieces: list[Any] | None = None
        in_place: list[Any] | None = None
        try:
            with memoryview(buf) as view, _flat_view(view) as target:
                if target.readonly:
                    raise TypeError("recv_bytes_into needs a writable bytes-like object")
                if offset < 0:
                    raise ValueError("negative offset")
                if offset > len(target):
                    raise ValueError("offset too large")
                with lock:
                    if (
                        self._handle is None
                        or not self._readable
                        or self._in_direct_read
                        or self._kept_messages
                    ):
                        self._begin_receive()
                    pieces = self._pieces
                    size = self._read_size(pieces, self._max_message)
                    if offset + size > len(target):
                        body = self._read_body(pieces, self._max_message)
                        next_pieces = self._pieces = []
                        raise BufferTooShort(body)
                    if size <= _COPIED_UP_TO or isinstance(pieces[0], tuple):
                        target[offset : offset + size] = self._read_body(pieces, self._max_message)
                        next_pieces = self._pieces = []
                    else:
                        next_pieces = in_place = []
                        with target[offset : offset + size] as body_view:
                            self._read_into(pieces, body_view, next_pieces)
            return size
        except BaseException as error:
            if in_place is not None and self._pieces is not pieces:
                # Only the buffer holds the body, and the next call may have another
                # buffer.
                with memoryview(buf) as view, _flat_view(view) as target:
                    pieces[:] = (_partial_message(target[offset:], size, size),)
            self._keep_interrupted(pieces, next_pieces, error)
            raise

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Return whether a message can be received, or the peer is gone.

        Args:
            timeout: Seconds to wait. None means no limit; a negative time does not
                wait.

        Raises:
            Closed: The connection is closed.
            OSError: The connection can't receive.
        """
        if self._handle is None or not self._readable:
            self._refuse_to("receive")
        return bool(wait([self], timeout))

    @property
    def _holds_message(self) -> bool:
        """Whether a whole message, or the end, was already read from the system.

        An exception prevented an earlier call from returning it.
        """
        if self._kept_messages:
            return True
        pieces = self._pieces
        if not pieces:
            return False
        if isinstance(pieces[0], tuple):
            size, body_buffer = pieces[0]
            return bool(body_buffer.tell() >= size)
        data = b"".join(pieces)
        try:
            span = frame_span(data, 0, len(data))
        except BadLength:
            return True
        return not pieces[-1] or (span is not None and sum(span) <= len(data))

    def _begin_receive(self) -> None:
        """Raise if nothing can be received; else continue with a kept message, if any."""
        if self._in_direct_read:
            self._in_direct_read = False
            self._stop_receiving()
        if self._handle is None or not self._readable:
            self._refuse_to("receive")
        # In this order, an exception between two steps loses and repeats nothing.
        if not self._pieces:
            self._pieces = self._kept_messages[0]
        if self._pieces is self._kept_messages[0]:
            del self._kept_messages[0]

    def _keep_interrupted(
        self, pieces: list[Any], next_pieces: list[Any] | None, error: BaseException
    ) -> None:
        """Keep the message of a receive that ended in an exception.

        Args:
            pieces: The current message, or an empty list.
            next_pieces: The list that has replaced it in ``_pieces``, or None.
            error: The exception.
        """
        release_if_held(self._receive_lock)
        if (
            next_pieces is not None
            and self._pieces is not pieces
            and not isinstance(error, BufferTooShort)
        ):
            self._kept_messages.append(pieces)
        self._raise_if_closed(error, "receive")

    def _raise_if_closed(self, error: BaseException, act: str) -> None:
        """Raise Closed if the error means that the descriptor was closed meanwhile."""
        if self._handle is None and isinstance(error, OSError) and error.errno == errno.EBADF:
            raise Closed(f"handle was closed during {act}") from error

    def _read_size(self, pieces: list[Any], limit: int | None) -> int:
        """Read the length field, and no byte more; return the size of the message."""
        take = self._read_piece
        if not pieces:
            pieces.extend(map(take, _LENGTH_FIELD))
        if isinstance(pieces[0], tuple):
            size = pieces[0][0]
        else:
            start = b"".join(pieces)
            while True:
                try:
                    span = frame_span(start, 0, len(start))
                except BadLength as error:
                    self._stop_receiving()
                    raise BadMessageLength(*error.args) from None
                if span is not None:
                    break
                if not pieces[-1]:
                    self._raise_end(pieces, start)
                missing = (LENGTH.size if len(start) < LENGTH.size else LONG_LENGTH.size) - len(
                    start
                )
                pieces.extend(map(take, (missing,)))
                start = b"".join(pieces)
            size = span[1]
        if (limit is not None and size > limit) or size > sys.maxsize:
            self._stop_receiving()
            raise MessageTooBig(size, sys.maxsize if limit is None else limit)
        return int(size)

    def _read_body(self, pieces: list[Any], limit: int | None) -> bytes:
        """Read the rest of the current message; return its body.

        Memory grows with the bytes that arrive. All of them stay in ``pieces``.
        """
        size = self._read_size(pieces, limit)
        if not isinstance(pieces[0], tuple):
            start = b"".join(pieces)
            first = LENGTH.size if start[: LENGTH.size] != _LONG_FORM else LONG_LENGTH.size
            body_buffer = io.BytesIO()
            body_buffer.write(start[first:])
            if not pieces[-1] and body_buffer.tell() < size:
                self._raise_end(pieces, start)
            pieces[:] = ((size, body_buffer),)
        _, body_buffer = pieces[0]
        while (received := body_buffer.tell()) < size:
            body_buffer.writelines(map(self._read_piece, (min(size - received, _READ_AT_ONCE),)))
            if body_buffer.tell() == received:
                self._stop_receiving()
                raise OSError("got end of file during message")
        body: bytes = body_buffer.getvalue()
        return body

    def _raise_end(self, pieces: list[Any], start: bytes) -> NoReturn:
        """Raise the error for the end of the peer's bytes after ``start``."""
        if not start:
            pieces.clear()
            raise EOFError
        self._stop_receiving()
        raise OSError("got end of file during message")

    def _read_into(self, pieces: list[Any], body_view: memoryview, next_pieces: list[Any]) -> None:
        """Read a whole body into a caller's buffer; then replace ``pieces`` by
        ``next_pieces``.
        """
        handle, size = self.fileno(), len(body_view)
        counts: list[int] = []
        try:
            self._in_direct_read = True
            received = 0
            while received < size:
                counts.extend(map(_read_into, (handle,), ((body_view[received:],),)))
                if not counts[-1]:
                    self._stop_receiving()
                    raise OSError("got end of file during message")
                # A statement between branch and jump: Python 3.14 leaves a jump right
                # behind a branch out of the handler below.
                received = sum(counts)
            self._in_direct_read = False
            self._pieces = next_pieces
        except BaseException:
            # The next call may have another buffer.
            pieces[:] = (_partial_message(body_view, sum(counts), size),)
            self._pieces = pieces
            self._in_direct_read = False
            raise

    def _stop_receiving(self) -> None:
        """Prevent reading on in the middle of a frame.

        The standard library's ``_bad_message_length`` does the same.
        """
        if self._writable:
            self._readable = False
        else:
            self.close()

    def _check_between_messages(self) -> None:
        """Raise OSError if this end holds a part of a message.

        Another process could not continue with the descriptor.
        """
        if self._pieces or self._kept_messages or self._in_direct_read or self._in_write:
            raise OSError("can't hand over a connection in the middle of a message")

    def _refuse_to(self, act: str) -> NoReturn:
        if self._handle is None:
            raise Closed("handle is closed")
        raise OSError(
            f"can't {act}: the connection is {'read' if act == 'send' else 'write'}-only, or a"
            " message was cut off"
        )

    # The method names of processing.connection.

    sendBytes = send_bytes  # noqa: N815
    recvBytes = recv_bytes  # noqa: N815
    recvBytesInto = recv_bytes_into  # noqa: N815


def _partial_message(view: memoryview, received: int, size: int) -> tuple[int, io.BytesIO]:
    """Return the entry of ``Connection._pieces`` for a message with ``received`` bytes."""
    body_buffer = io.BytesIO()
    body_buffer.write(view[:received])
    return size, body_buffer


def _raised_by_c_call(error: BaseException) -> bool:
    """Return whether a C function raised the error, not a signal handler during it."""
    traceback = error.__traceback__
    return traceback is not None and traceback.tb_next is None


def _flat_view(view: memoryview) -> memoryview:
    """Return the view's bytes in one dimension.

    Raises TypeError: the view is not contiguous.
    """
    if not view.nbytes:
        return memoryview(b"" if view.readonly else bytearray())
    return view.cast("B")


def adopt_socket(
    sock: socket.socket,
    *,
    max_message: int | None = None,
    peer: str = "",
    unpickles: bool = True,
) -> Connection:
    """Return a connection that takes over the socket's descriptor; close the socket.

    The descriptor changes its owner in one C call, so an exception can't come between.
    """
    connection = Connection.__new__(Connection)
    connection._handle = None
    connection._prepare(sock.fileno(), True, True, max_message)
    connection._peer, connection._unpickles = peer, unpickles
    any(map(setattr, (connection,), ("_handle",), map(socket.socket.detach, (sock,))))
    return connection


def _end_of_slice(length: int, offset: int, size: int | None) -> int:
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


# The system's calls that read and write.

_write: Callable[[int, bytes | memoryview], int]
_read: Callable[[int, int], bytes]
_read_into: Callable[[int, tuple[memoryview]], int]

if sys.platform == "win32":
    _write = _multiprocessing.send
    _read = _multiprocessing.recv
    _close = _multiprocessing.closesocket

    def _write_both(handle: int, prefix: bytes, body: memoryview) -> int:
        return _write(handle, prefix)

    #: Largest body that is copied into a caller's buffer, in bytes. Windows has no read
    #: into a buffer.
    _COPIED_UP_TO: int = sys.maxsize

else:
    _write = os.write
    _read = os.read
    _close = os.close

    def _write_both(handle: int, prefix: bytes, body: memoryview) -> int:
        return os.writev(handle, (prefix, body))

    _read_into = os.readv
    _COPIED_UP_TO = _JOIN_UP_TO


# Handing a connection to another process.


def _rebuild(
    shared: Any,
    readable: bool,
    writable: bool,
    max_message: int | None,
    peer: str,
    unpickles: bool,
) -> Connection:
    descriptor = shared.detach()
    if sys.platform == "win32":
        descriptor = descriptor.detach()  # a socket
    connection = Connection(descriptor, readable, writable, max_message=max_message)
    connection._peer, connection._unpickles = peer, unpickles
    return connection


def _reduce(connection: Connection) -> tuple[Any, ...]:
    connection._check_between_messages()
    return _rebuild, (
        _shared(connection.fileno()),
        connection.readable,
        connection.writable,
        connection.max_message,
        connection._peer,
        connection._unpickles,
    )


if sys.platform == "win32":
    from multiprocessing import resource_sharer

    def _shared(handle: int) -> Any:
        with socket.fromfd(handle, socket.AF_INET, socket.SOCK_STREAM) as sock:
            return resource_sharer.DupSocket(sock)

else:
    _shared = reduction.DupFd


reduction.register(Connection, _reduce)
