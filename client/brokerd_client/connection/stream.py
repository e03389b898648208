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
from typing import Any, Final, NoReturn, Self, TypeAlias

from brokerd_client._common import forks
from brokerd_client.connection.call_lock import Turn, new_turn, refuse_nested_call, release_if_held
from brokerd_client.connection.readiness import wait
from brokerd_client.errors import BadLength, BufferTooShort, Closed, FrameTooBig
from brokerd_client.wire.framing import LENGTH, LONG_LENGTH, frame_prefix, frame_span

if sys.platform == "win32":
    import _multiprocessing  # type: ignore[import-not-found,unused-ignore]

__all__ = ["BadMessageLength", "Connection", "MessageTooBig", "adopted"]

#: Up to this many bytes a header is joined to its body: copying is cheaper than a
#: second buffer.
_JOIN_UP_TO: Final = 16384
#: Asked of the kernel at once: a fresh buffer of this size is cheap, one of a whole
#: large message is not.
_READ_AT_ONCE: Final = 256 * 1024

_NOTHING: Final = memoryview(b"")
#: What a read of a length field asks for.
_LENGTH_FIELD: Final = (LENGTH.size,)
#: What announces a length of 64 bits.
_LONG_FORM: Final = LENGTH.pack(-1)

_pickled: Final = reduction.ForkingPickler.dumps
_unpickled: Final = reduction.ForkingPickler.loads
_unpack_length: Final = LENGTH.unpack
_pack_length: Final = LENGTH.pack


Buffer: TypeAlias = Any  # bytes-like; collections.abc.Buffer is Python 3.12's


class MessageTooBig(FrameTooBig, OSError):
    """The peer announced a message above the limit; nothing of it was read. An OSError,
    as the standard library's.
    """


class BadMessageLength(BadLength, OSError):
    """The peer announced a length that no message can have.

    An OSError, as the standard library's.
    """


class Connection:
    """One end of a connection, over a file descriptor (on Windows a socket handle) that
    it owns.

    handle: an open, blocking descriptor. readable, writable: what may be done with it;
    at least one. max_message: largest message that recv and its kin accept, in bytes;
    None for any.
    """

    __slots__ = (
        "__weakref__",
        "_got",
        "_handle",
        "_in_direct_read",
        "_in_write",
        "_kept",
        "_max_message",
        "_readable",
        "_receiving",
        "_sending",
        "_take",
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
        """Set all attributes but the handle; without it this object owns nothing yet."""
        self._readable = readable
        self._writable = writable
        self._max_message = max_message
        self._sending: Turn = new_turn()
        self._receiving: Turn = new_turn()
        #: Bytes of the message under way: its length field and what followed it, in
        #: pieces; or one pair of its size and a BytesIO with its body so far. It is
        #: replaced, not emptied, when the message is returned.
        self._got: list[Any] = []
        #: Messages, as in ``_got``, that were complete when an exception kept them from
        #: being returned.
        self._kept: list[list[Any]] = []
        #: True while a body goes directly into a caller's buffer, and True for good if
        #: that was cut off.
        self._in_direct_read = False
        #: True while a message is written, and True for good if that was cut off.
        self._in_write = False
        self._take: Callable[[int], bytes] = partial(_read, descriptor)
        forks.register(self)

    def __del__(self) -> None:
        # getattr: __init__ may not have come that far.
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
        # A thread that held one of these does not exist in the child.
        self._sending = new_turn()
        self._receiving = new_turn()
        # A message begun belongs to the parent, which has its first bytes too.
        if self._got or self._in_direct_read:
            self._readable = False
        if self._in_write:
            self._writable = False
        self._got, self._kept = [], []

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
        """Return the file descriptor, or the socket handle on Windows.

        Raises Closed.
        """
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
        """Send an object as a pickle; it may itself hold connections. Raises Closed, or
        OSError as the system does.
        """
        handle = self._handle
        if handle is None or not self._writable:
            self._refuse_to("send")
        self._send_body(_pickled(obj))

    def send_bytes(self, buf: Buffer, offset: int = 0, size: int | None = None) -> None:
        """Send ``size`` bytes of a bytes-like object from ``offset`` on, all that
        follow by default, as one message.

        Raises ValueError where they are not all inside the buffer, else as send.
        """
        if self._handle is None or not self._writable:
            self._refuse_to("send")
        view = memoryview(buf)
        if view.itemsize > 1 or view.ndim != 1:
            view = _flattened(view)
        end = _checked_end(view.nbytes, offset, size)
        self._send_body(view[offset:end] if offset or end != view.nbytes else view)

    def _send_body(self, body: memoryview) -> None:
        size = len(body)
        if size <= _JOIN_UP_TO:
            # One write for all: neither Nagle's algorithm nor another thread comes
            # between header and body.
            head = _pack_length(size) + body
            body = _NOTHING
        else:
            if not body.c_contiguous:
                # As the standard library, which however has sent the length by then.
                raise BufferError("the buffer is not C-contiguous")
            head = frame_prefix(size)
        turn = self._sending
        if turn._is_owned():
            refuse_nested_call("send")
        # Below 0 while nothing is being written.
        sent = -1
        try:
            with turn:
                handle = self._handle
                if handle is None or not self._writable or self._in_write:
                    self._refuse_to("send")
                sent = 0
                self._in_write = True
                sent = _write_both(handle, head, body) if body else _write(handle, head)
                while sent < len(head):
                    sent += _write(handle, head[sent:])
                if body:
                    whole = len(head) + size
                    while sent < whole:
                        sent += _write(handle, body[sent - len(head) :])
                self._in_write = False
                sent = -1
        except BaseException as error:
            release_if_held(turn)
            # The system itself refused the first write: nothing has left. After any
            # other exception the peer may have half a frame, and would take the next
            # one for its end.
            if not sent and isinstance(error, OSError) and error.errno and _raised_here(error):
                self._in_write = False
            elif sent >= 0:
                self._writable = False
            self._raise_if_closed(error, "send")
            raise

    # Receiving.

    def recv(self) -> Any:
        """Return the next object. Raises the same errors as recv_bytes.

        Unpickling runs code that the peer chooses. Call this only if the peer has
        proved that it knows the key.
        """
        return _unpickled(self.recv_bytes())

    def recv_bytes(self, maxlength: int | None = None) -> bytes:
        """Return the next message.

        maxlength: refuse a longer one, as ``max_message`` does for all. Raises
        EOFError: the peer closed its end and nothing is left. MessageTooBig,
        BadMessageLength: both are OSErrors, and nothing more can be received. OSError:
        the peer went in the middle of a message. After any other exception the next
        call returns the message that this call would have returned.
        """
        limit = self._max_message
        if maxlength is not None:
            if maxlength < 0:
                raise ValueError("negative maxlength")
            limit = maxlength if limit is None or maxlength < limit else limit
        turn = self._receiving
        if turn._is_owned():
            refuse_nested_call("receive")
        got: list[Any] = []
        rest: list[Any] | None = None
        try:
            with turn:
                if self._handle is None or not self._readable or self._in_direct_read or self._kept:
                    self._begin_receive()
                got, body, size = self._got, b"", -1
                if not got:
                    got.extend(map(self._take, _LENGTH_FIELD))
                    prefix = got[0]
                    if len(prefix) == 4:
                        (size,) = _unpack_length(prefix)
                        if 0 < size <= _READ_AT_ONCE and (limit is None or size <= limit):
                            got.extend(map(self._take, (size,)))
                            body = got[1]
                if len(body) != size:
                    body = self._read_on(got, limit)
                rest = self._got = []
                return body
        except BaseException as error:
            self._interrupted(got, rest, error)
            raise

    def recv_bytes_into(self, buf: Buffer, offset: int = 0) -> int:
        """Put the next message into a writable bytes-like object, ``offset`` bytes in;
        return its size in bytes.

        Raises BufferTooShort, whose args[0] is the whole message, and as recv_bytes.
        """
        turn = self._receiving
        if turn._is_owned():
            refuse_nested_call("receive")
        got: list[Any] = []
        rest: list[Any] | None = None
        in_place: list[Any] | None = None
        try:
            with memoryview(buf) as view, _flattened(view) as target:
                if target.readonly:
                    raise TypeError("recv_bytes_into needs a writable bytes-like object")
                if offset < 0:
                    raise ValueError("negative offset")
                if offset > len(target):
                    raise ValueError("offset too large")
                with turn:
                    if (
                        self._handle is None
                        or not self._readable
                        or self._in_direct_read
                        or self._kept
                    ):
                        self._begin_receive()
                    got = self._got
                    size = self._read_size(got, self._max_message)
                    if offset + size > len(target):
                        body = self._read_on(got, self._max_message)
                        rest = self._got = []
                        raise BufferTooShort(body)
                    if size <= _COPIED_UP_TO or isinstance(got[0], tuple):
                        target[offset : offset + size] = self._read_on(got, self._max_message)
                        rest = self._got = []
                    else:
                        rest = in_place = []
                        with target[offset : offset + size] as place:
                            self._read_into(got, place, rest)
            return size
        except BaseException as error:
            if in_place is not None and self._got is not got:
                # The body is nowhere else, and the next call may have another buffer.
                with memoryview(buf) as view, _flattened(view) as target:
                    got[:] = (_copied(target[offset:], size, size),)
            self._interrupted(got, rest, error)
            raise

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Return whether a message can be received, or the peer is gone.

        This waits up to ``timeout`` seconds. None means no limit; a negative time does
        not wait.
        """
        if self._handle is None or not self._readable:
            self._refuse_to("receive")
        return bool(wait([self], timeout))

    @property
    def _holds_message(self) -> bool:
        """Whether a message, or the end, is here already: an exception kept an earlier
        call from returning it.
        """
        if self._kept:
            return True
        got = self._got
        if not got:
            return False
        if isinstance(got[0], tuple):
            size, collected = got[0]
            return bool(collected.tell() >= size)
        data = b"".join(got)
        try:
            span = frame_span(data, 0, len(data))
        except BadLength:
            return True
        return not got[-1] or (span is not None and sum(span) <= len(data))

    def _begin_receive(self) -> None:
        """Refuse to receive where that is impossible; else go on with a message that
        was kept, if there is one.
        """
        if self._in_direct_read:
            self._in_direct_read = False
            self._cut_off()
        if self._handle is None or not self._readable:
            self._refuse_to("receive")
        # The order of these steps: an exception between two of them loses nothing, and
        # repeats nothing.
        if not self._got:
            self._got = self._kept[0]
        if self._got is self._kept[0]:
            del self._kept[0]

    def _interrupted(self, got: list[Any], rest: list[Any] | None, error: BaseException) -> None:
        """Keep the message of a receive that ended in an exception.

        got: the message under way, or an empty list. rest: what has replaced it in
        ``_got``, None for nothing.
        """
        release_if_held(self._receiving)
        if rest is not None and self._got is not got and not isinstance(error, BufferTooShort):
            self._kept.append(got)
        self._raise_if_closed(error, "receive")

    def _raise_if_closed(self, error: BaseException, act: str) -> None:
        """Raise Closed for the system's error about a descriptor that was closed
        meanwhile.
        """
        if self._handle is None and isinstance(error, OSError) and error.errno == errno.EBADF:
            raise Closed(f"handle was closed during {act}") from error

    def _read_size(self, got: list[Any], limit: int | None) -> int:
        """Return the size of the message under way, having read its length field and
        nothing more.
        """
        take = self._take
        if not got:
            got.extend(map(take, _LENGTH_FIELD))
        if isinstance(got[0], tuple):
            size = got[0][0]
        else:
            begun = b"".join(got)
            while True:
                try:
                    span = frame_span(begun, 0, len(begun))
                except BadLength as error:
                    self._cut_off()
                    raise BadMessageLength(*error.args) from None
                if span is not None:
                    break
                if not got[-1]:
                    self._end(got, begun)
                missing = (LENGTH.size if len(begun) < LENGTH.size else LONG_LENGTH.size) - len(
                    begun
                )
                got.extend(map(take, (missing,)))
                begun = b"".join(got)
            size = span[1]
        if (limit is not None and size > limit) or size > sys.maxsize:
            self._cut_off()
            raise MessageTooBig(size, sys.maxsize if limit is None else limit)
        return int(size)

    def _read_on(self, got: list[Any], limit: int | None) -> bytes:
        """Return the body of the message under way, as far as it was read before or
        not.

        Memory grows with what comes.

        All of it stays in ``got``.
        """
        size = self._read_size(got, limit)
        if not isinstance(got[0], tuple):
            begun = b"".join(got)
            first = LENGTH.size if begun[: LENGTH.size] != _LONG_FORM else LONG_LENGTH.size
            collected = io.BytesIO()
            collected.write(begun[first:])
            if not got[-1] and collected.tell() < size:
                self._end(got, begun)
            got[:] = ((size, collected),)
        _, collected = got[0]
        while (come := collected.tell()) < size:
            collected.writelines(map(self._take, (min(size - come, _READ_AT_ONCE),)))
            if collected.tell() == come:
                self._cut_off()
                raise OSError("got end of file during message")
        body: bytes = collected.getvalue()
        return body

    def _end(self, got: list[Any], begun: bytes) -> NoReturn:
        """Raise what the end of the peer's bytes means after ``begun``."""
        if not begun:
            got.clear()
            raise EOFError
        self._cut_off()
        raise OSError("got end of file during message")

    def _read_into(self, got: list[Any], place: memoryview, rest: list[Any]) -> None:
        """Read the body of the message under way, of which nothing was read yet, and
        replace ``got`` by ``rest``.
        """
        handle, size = self.fileno(), len(place)
        counts: list[int] = []
        try:
            self._in_direct_read = True
            while (come := sum(counts)) < size:
                counts.extend(map(_read_into, (handle,), ((place[come:],),)))
                if not counts[-1]:
                    self._cut_off()
                    raise OSError("got end of file during message")
            self._in_direct_read = False
            self._got = rest
        except BaseException:
            # The next call may have another buffer.
            got[:] = (_copied(place, sum(counts), size),)
            self._got = got
            self._in_direct_read = False
            raise

    def _cut_off(self) -> None:
        """Prevent reading on in the middle of a frame.

        The standard library's ``_bad_message_length`` does the same.
        """
        if self._writable:
            self._readable = False
        else:
            self.close()

    def _check_between_messages(self) -> None:
        """Raise OSError if another process could not go on with the descriptor: a part
        of a message is here.
        """
        if self._got or self._kept or self._in_direct_read or self._in_write:
            raise OSError("can't hand over a connection in the middle of a message")

    def _refuse_to(self, act: str) -> NoReturn:
        if self._handle is None:
            raise Closed("handle is closed")
        raise OSError(
            f"can't {act}: the connection is {'read' if act == 'send' else 'write'}-only or was"
            " cut off"
        )

    # The forerunner's names.

    sendBytes = send_bytes  # noqa: N815
    recvBytes = recv_bytes  # noqa: N815
    recvBytesInto = recv_bytes_into  # noqa: N815


def _copied(view: memoryview, come: int, size: int) -> tuple[int, io.BytesIO]:
    """Return, as kept in ``Connection._got``, a message of that size of which so many
    bytes have come.
    """
    collected = io.BytesIO()
    collected.write(view[:come])
    return size, collected


def _raised_here(error: BaseException) -> bool:
    """Return whether a C function raised the error, and not a signal handler that it
    ran.
    """
    traceback = error.__traceback__
    return traceback is not None and traceback.tb_next is None


def _flattened(view: memoryview) -> memoryview:
    """Return the view's bytes in one dimension.

    Raises TypeError: the view is not contiguous.
    """
    if not view.nbytes:
        return memoryview(b"" if view.readonly else bytearray())
    return view.cast("B")


def adopted(sock: socket.socket, *, max_message: int | None = None) -> Connection:
    """Return a connection that owns what the socket owned, which is closed now.

    The descriptor changes its owner in one C call, so that an exception can't come
    while it has none.
    """
    connection = Connection.__new__(Connection)
    connection._handle = None
    connection._prepare(sock.fileno(), True, True, max_message)
    any(map(setattr, (connection,), ("_handle",), map(socket.socket.detach, (sock,))))
    return connection


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
_read_into: Callable[[int, tuple[memoryview]], int]

if sys.platform == "win32":
    _write = _multiprocessing.send
    _read = _multiprocessing.recv
    _close = _multiprocessing.closesocket

    def _write_both(handle: int, prefix: bytes, body: memoryview) -> int:
        return _write(handle, prefix)

    #: Windows has no read that puts bytes into a buffer.
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

if sys.platform == "win32":
    from multiprocessing import resource_sharer

    def _rebuild(
        shared: Any, readable: bool, writable: bool, max_message: int | None
    ) -> Connection:
        return Connection(shared.detach().detach(), readable, writable, max_message=max_message)

    def _reduce(connection: Connection) -> tuple[Any, ...]:
        connection._check_between_messages()
        with socket.fromfd(connection.fileno(), socket.AF_INET, socket.SOCK_STREAM) as sock:
            shared = resource_sharer.DupSocket(sock)
        return _rebuild, (shared, connection.readable, connection.writable, connection.max_message)

else:

    def _rebuild(
        shared: Any, readable: bool, writable: bool, max_message: int | None
    ) -> Connection:
        return Connection(shared.detach(), readable, writable, max_message=max_message)

    def _reduce(connection: Connection) -> tuple[Any, ...]:
        connection._check_between_messages()
        shared = reduction.DupFd(connection.fileno())
        return _rebuild, (shared, connection.readable, connection.writable, connection.max_message)


reduction.register(Connection, _reduce)
