"""AF_PIPE: connections, handshakes and listening over the named pipes of Windows.

A pipe is in message mode: the system keeps messages whole, so there is no length in
front of them. The reading and writing itself is the standard library's; what is added
is what our socket connections have too. It is imported on Windows only.
"""

from __future__ import annotations

import sys

if sys.platform == "win32":
    import _winapi
    import contextlib
    import errno
    import io
    import os
    import threading
    import time
    from collections.abc import Collection
    from multiprocessing import connection as standard
    from multiprocessing import reduction
    from typing import Any, Final

    from brokerd_client.connection.call_lock import new_turn, refuse_nested_call, release_if_held
    from brokerd_client.connection.readiness import shortened
    from brokerd_client.errors import TimedOut
    from brokerd_client.wire.handshake import LIMIT

    __all__ = ["Pipe", "PipeConnection", "PipePeer", "PipeServer", "PipeStream", "dial"]

    _BUFFER_SIZE: Final = 8192
    #: Milliseconds between two looks at the clock while a pipe is busy.
    _LOOK_EVERY_MS: Final = 200

    class PipeConnection(standard.PipeConnection):
        """One end of a named pipe: the standard library's, with locks, a maximum
        message size and the old names.
        """

        def __init__(
            self,
            handle: int,
            readable: bool = True,
            writable: bool = True,
            *,
            max_message: int | None = None,
        ) -> None:
            super().__init__(handle, readable, writable)
            self.max_message: Final = max_message
            self._sending = new_turn()
            self._receiving = new_turn()
            #: True while a message is received, and for good where an exception cut
            #: that off.
            self._in_receive = False

        def send_bytes(self, buf: Any, offset: int = 0, size: int | None = None) -> None:
            """Send as the standard library does, of a buffer with several dimensions
            too.
            """
            view = memoryview(buf)
            if view.ndim != 1:
                view = view.cast("B") if view.nbytes else memoryview(b"")
            super().send_bytes(view, offset, size)

        def _send_bytes(self, buf: Any) -> None:
            # The system takes a message whole or not at all.
            if self._sending._is_owned():
                refuse_nested_call("send")
            try:
                with self._sending:
                    super()._send_bytes(buf)  # type: ignore[misc]
            except BaseException:
                release_if_held(self._sending)
                raise

        def _recv_bytes(self, maxsize: int | None = None) -> io.BytesIO:
            if self.max_message is not None:
                maxsize = self.max_message if maxsize is None else min(maxsize, self.max_message)
            if self._receiving._is_owned():
                refuse_nested_call("receive")
            try:
                with self._receiving:
                    if self._in_receive:
                        # The rest of a message would be taken for the next one.
                        self.close()
                        raise OSError(
                            "can't receive: the connection was cut off in the middle of a message"
                        )
                    self._in_receive = True
                    received: io.BytesIO = super()._recv_bytes(maxsize)  # type: ignore[misc]
                    self._in_receive = False
                    return received
            except (EOFError, OSError):
                self._in_receive = False
                release_if_held(self._receiving)
                raise
            except BaseException:
                release_if_held(self._receiving)
                raise

        sendBytes = send_bytes  # noqa: N815
        recvBytes = standard.PipeConnection.recv_bytes  # noqa: N815
        recvBytesInto = standard.PipeConnection.recv_bytes_into  # noqa: N815

    def Pipe(duplex: bool = True) -> tuple[PipeConnection, PipeConnection]:  # noqa: N802 - the standard library's name
        """Return two connections joined to each other; without ``duplex`` the first
        receives and the second sends.
        """
        one, other = standard.Pipe(duplex)
        return _adopted(one), _adopted(other)

    def _adopted(connection: Any) -> PipeConnection:
        handle, connection._handle = connection._handle, None
        return PipeConnection(handle, connection.readable, connection.writable)

    class PipePeer:
        """A handshake's messages over a named pipe, which it owns."""

        def __init__(self, handle: int) -> None:
            self.connection: Final = PipeConnection(handle)

        def fileno(self) -> int:
            return self.connection.fileno()

        def wait(self, timeout: float | None) -> None:
            standard.wait([self.connection], shortened(timeout))

        def send_frame(self, body: bytes) -> None:
            self.connection.send_bytes(body)

        def next_frame(self) -> bytes | None:
            return self.connection.recv_bytes(LIMIT) if self.connection.poll(0) else None

        def into_connection(self, max_message: int | None) -> PipeConnection:
            return PipeConnection(self._detach(), max_message=max_message)

        def into_stream(self) -> PipeStream:
            return PipeStream(self._detach())

        def _detach(self) -> int:
            handle: int
            handle, self.connection._handle = self.connection._handle, None  # type: ignore[attr-defined]
            return handle

        def close(self) -> None:
            self.connection.close()

    class PipeStream:
        """One end of a named pipe: messages read in pieces and written whole, until
        some thread says stop.

        This is a ``brokerd_client._common.pipe_bridge.Pipe``.
        """

        def __init__(self, handle: int) -> None:
            self._handle = handle
            self._lock = threading.Lock()
            self._readable = self._writable = True
            # What is under way; kept until it is over, for the system writes into their
            # memory.
            self._reading: Any = None
            self._writing: Any = None

        def read(self, size: int) -> tuple[bytes, int]:
            try:
                with self._lock:
                    if not self._readable:
                        raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
                    self._reading, _ = _winapi.ReadFile(self._handle, size, overlapped=True)
                _, error = self._reading.GetOverlappedResult(True)
                if error == _winapi.ERROR_OPERATION_ABORTED:
                    raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
                piece = bytes(self._reading.getbuffer())
                left = (
                    _winapi.PeekNamedPipe(self._handle)[1]
                    if error == _winapi.ERROR_MORE_DATA
                    else 0
                )
            except BrokenPipeError as error:
                raise EOFError from error
            return piece, left

        def write(self, body: bytes) -> None:
            with self._lock:
                if not self._writable:
                    raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
                self._writing, _ = _winapi.WriteFile(self._handle, body, overlapped=True)
            written, error = self._writing.GetOverlappedResult(True)
            self._writing = None
            if error or written != len(body):
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))

        def stop(self, *, writing: bool) -> None:
            with self._lock:
                self._readable = False
                under_way = [self._reading]
                if writing:
                    self._writable = False
                    under_way.append(self._writing)
                for each in under_way:
                    if each is not None:
                        each.cancel()

        def close(self) -> None:
            _winapi.CloseHandle(self._handle)

    class PipeServer:
        """A named pipe that takes connections: one instance of it always waits for the
        next peer.
        """

        #: Windows waits for 64 handles at once, and some are needed for other things.
        most_peers: Final = 50

        def __init__(self, address: str) -> None:
            self.address = address
            self._handle: int | None = None
            self._connecting: Any = None
            self._waker_in, self._rope = standard.Pipe(duplex=False)
            try:
                self._handle = _new_instance(address, first=True)
            except BaseException:
                self.close()
                raise

        def __del__(self) -> None:
            if hasattr(self, "_rope"):
                self.close()

        def wait(
            self, peer_streams: Collection[Any], timeout: float | None
        ) -> tuple[bool, set[int]]:
            if self._handle is None:
                return False, set()
            come: list[int] = []
            if self._connecting is None:
                try:
                    self._connecting = _winapi.ConnectNamedPipe(self._handle, overlapped=True)
                except OSError as error:
                    # A peer has come, written and gone again already: what it wrote can
                    # be read.
                    if error.winerror != _winapi.ERROR_NO_DATA:
                        raise
                    return True, set()
            come = [self._connecting.event]
            waiting = [
                *come,
                self._waker_in,
                *(peer_stream.connection for peer_stream in peer_streams),
            ]
            ready = standard.wait(waiting, shortened(timeout))
            if self._waker_in in ready:
                self._waker_in.recv_bytes()
            return come[0] in ready, {
                each.fileno() for each in ready if isinstance(each, PipeConnection)
            }

        def take(self) -> tuple[PipePeer, object] | None:
            handle, connecting = self._handle, self._connecting
            assert handle is not None
            self._handle = _new_instance(self.address, first=False)
            self._connecting = None
            if connecting is not None:
                try:
                    connecting.GetOverlappedResult(True)
                except OSError:
                    _winapi.CloseHandle(handle)
                    raise
            return PipePeer(handle), None

        def wake(self) -> None:
            if not self._rope.closed:
                self._rope.send_bytes(b"\0")

        def close(self) -> None:
            handle, self._handle = self._handle, None
            connecting, self._connecting = self._connecting, None
            if connecting is not None:
                connecting.cancel()
                with contextlib.suppress(OSError):
                    # Until this returns the system may still write into the memory of
                    # ``connecting``.
                    connecting.GetOverlappedResult(True)
            if handle is not None:
                _winapi.CloseHandle(handle)
            self._waker_in.close()
            self._rope.close()

        def renew(self) -> None:
            """Do nothing: Windows does not fork."""

    def _new_instance(address: str, *, first: bool) -> int:
        flags = _winapi.PIPE_ACCESS_DUPLEX | _winapi.FILE_FLAG_OVERLAPPED
        if first:
            # Nobody else may have the name already and sit between us and our peers.
            flags |= _winapi.FILE_FLAG_FIRST_PIPE_INSTANCE
        return _winapi.CreateNamedPipe(
            address,
            flags,
            _winapi.PIPE_TYPE_MESSAGE | _winapi.PIPE_READMODE_MESSAGE | _winapi.PIPE_WAIT,
            _winapi.PIPE_UNLIMITED_INSTANCES,
            _BUFFER_SIZE,
            _BUFFER_SIZE,
            _winapi.NMPWAIT_WAIT_FOREVER,
            _winapi.NULL,
        )

    def dial(address: str, deadline: float | None) -> PipePeer:
        """Return a channel to the pipe.

        Raises TimedOut, if it is busy until the deadline, and OSError.
        """
        while True:
            left_ms = _LOOK_EVERY_MS if deadline is None else (deadline - time.monotonic()) * 1000
            try:
                _winapi.WaitNamedPipe(address, max(1, int(min(left_ms, _LOOK_EVERY_MS))))
                handle = _winapi.CreateFile(
                    address,
                    _winapi.GENERIC_READ | _winapi.GENERIC_WRITE,
                    0,
                    _winapi.NULL,
                    _winapi.OPEN_EXISTING,
                    _winapi.FILE_FLAG_OVERLAPPED,
                    _winapi.NULL,
                )
                break
            except OSError as error:
                if error.winerror not in (_winapi.ERROR_SEM_TIMEOUT, _winapi.ERROR_PIPE_BUSY):
                    raise
            if deadline is not None and time.monotonic() >= deadline:
                raise TimedOut
        _winapi.SetNamedPipeHandleState(handle, _winapi.PIPE_READMODE_MESSAGE, None, None)
        return PipePeer(handle)

    def _rebuild(
        shared: Any, readable: bool, writable: bool, max_message: int | None
    ) -> PipeConnection:
        return PipeConnection(shared.detach(), readable, writable, max_message=max_message)

    def _reduce(connection: PipeConnection) -> tuple[Any, ...]:
        _, arguments = standard.reduce_pipe_connection(connection)  # type: ignore[attr-defined]
        return _rebuild, (*arguments, connection.max_message)

    reduction.register(PipeConnection, _reduce)
