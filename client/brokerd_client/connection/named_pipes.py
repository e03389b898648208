"""AF_PIPE: connections, handshakes and listening over the named pipes of Windows.

A pipe is in message mode: the system keeps messages whole, so no length precedes them.
The standard library reads and writes. This module adds the locks, the maximum message
size and the old method names of the socket connections. It is imported on Windows only.
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

    from brokerd_client.connection.call_lock import (
        new_call_lock,
        refuse_nested_call,
        release_if_held,
    )
    from brokerd_client.connection.readiness import clamp_timeout
    from brokerd_client.errors import TimedOut
    from brokerd_client.wire.handshake import LIMIT

    __all__ = ["Pipe", "PipeConnection", "PipePeer", "PipeServer", "PipeStream", "dial"]

    _BUFFER_SIZE: Final = 8192
    #: Longest wait for a busy pipe between two checks of the clock, in milliseconds.
    _CLOCK_CHECK_MS: Final = 200

    class PipeConnection(standard.PipeConnection):
        """One end of a named pipe.

        It is the standard library's, with locks, a maximum message size, and the method
        names of ``processing.connection``.

        Args:
            handle: The handle of a connected named pipe, which the connection owns.
            readable: Whether messages can be received.
            writable: Whether messages can be sent.
            max_message: Largest message that the connection accepts, in bytes; None for
                any.
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
            self._send_lock = new_call_lock()
            self._receive_lock = new_call_lock()
            #: True during a receive, and permanently after an exception has interrupted
            #: one.
            self._in_receive = False

        def send_bytes(self, buf: Any, offset: int = 0, size: int | None = None) -> None:
            """Send bytes as the standard library does, also from a multidimensional
            buffer.

            Args:
                buf: A bytes-like object.
                offset: First byte to send.
                size: Number of bytes to send; None for all that follow.

            Raises:
                ValueError: The slice is not inside the buffer.
                OSError: The connection is closed or broken.
                RuntimeError: This call interrupts another send of the same thread.
            """
            view = memoryview(buf)
            if view.ndim != 1:
                view = view.cast("B") if view.nbytes else memoryview(b"")
            super().send_bytes(view, offset, size)

        def _send_bytes(self, buf: Any) -> None:
            # The system accepts a whole message or nothing of it.
            if self._send_lock._is_owned():
                refuse_nested_call("send")
            try:
                with self._send_lock:
                    super()._send_bytes(buf)  # type: ignore[misc]
            except BaseException:
                release_if_held(self._send_lock)
                raise

        def _recv_bytes(self, maxsize: int | None = None) -> io.BytesIO:
            if self.max_message is not None:
                maxsize = self.max_message if maxsize is None else min(maxsize, self.max_message)
            if self._receive_lock._is_owned():
                refuse_nested_call("receive")
            try:
                with self._receive_lock:
                    if self._in_receive:
                        # The rest of the message would be read as the next one.
                        self.close()
                        raise OSError(
                            "can't receive: a receive was cut off in the middle of a message"
                        )
                    self._in_receive = True
                    received: io.BytesIO = super()._recv_bytes(maxsize)  # type: ignore[misc]
                    self._in_receive = False
                    return received
            except (EOFError, OSError):
                self._in_receive = False
                release_if_held(self._receive_lock)
                raise
            except BaseException:
                release_if_held(self._receive_lock)
                raise

        sendBytes = send_bytes  # noqa: N815
        recvBytes = standard.PipeConnection.recv_bytes  # noqa: N815
        recvBytesInto = standard.PipeConnection.recv_bytes_into  # noqa: N815

    def Pipe(duplex: bool = True) -> tuple[PipeConnection, PipeConnection]:  # noqa: N802 - the standard library's name
        """Return two connections that are the ends of one pipe.

        Args:
            duplex: Whether both can send and receive. Otherwise the first receives, and
                the second sends.
        """
        first, second = standard.Pipe(duplex)
        return _adopt(first), _adopt(second)

    def _adopt(connection: Any) -> PipeConnection:
        handle, connection._handle = connection._handle, None
        return PipeConnection(handle, connection.readable, connection.writable)

    class PipePeer:
        """A named pipe during a handshake; it owns the pipe's handle."""

        def __init__(self, handle: int) -> None:
            self.connection: Final = PipeConnection(handle)

        def fileno(self) -> int:
            return self.connection.fileno()

        def wait(self, timeout: float | None) -> None:
            standard.wait([self.connection], clamp_timeout(timeout))

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
        """One end of a named pipe: reads messages in pieces, and writes whole messages.

        It implements ``brokerd_client._common.pipe_bridge.Pipe``.
        """

        def __init__(self, handle: int) -> None:
            self._handle = handle
            self._lock = threading.Lock()
            self._readable = self._writable = True
            # The current operations. They must live until they end, because the system
            # writes into their memory.
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
                remaining = (
                    _winapi.PeekNamedPipe(self._handle)[1]
                    if error == _winapi.ERROR_MORE_DATA
                    else 0
                )
            except BrokenPipeError as error:
                raise EOFError from error
            return piece, remaining

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
                operations = [self._reading]
                if writing:
                    self._writable = False
                    operations.append(self._writing)
                for operation in operations:
                    if operation is not None:
                        operation.cancel()

        def close(self) -> None:
            _winapi.CloseHandle(self._handle)

    class PipeServer:
        """A named pipe that accepts connections: one instance of it always waits for
        the next peer.
        """

        #: Most peer streams that one wait can watch. Windows waits for at most 64
        #: handles at once; some are needed for other purposes.
        most_peers: Final = 50

        def __init__(self, address: str) -> None:
            self.address = address
            self._handle: int | None = None
            self._connecting: Any = None
            self._waker_reader, self._waker_writer = standard.Pipe(duplex=False)
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
            if self._connecting is None:
                try:
                    self._connecting = _winapi.ConnectNamedPipe(self._handle, overlapped=True)
                except OSError as error:
                    # A peer has connected, written and closed already; its messages
                    # can still be read.
                    if error.winerror != _winapi.ERROR_NO_DATA:
                        raise
                    return True, set()
            connected = self._connecting.event
            handles = [
                connected,
                self._waker_reader,
                *(peer_stream.connection for peer_stream in peer_streams),
            ]
            ready = standard.wait(handles, clamp_timeout(timeout))
            if self._waker_reader in ready:
                self._waker_reader.recv_bytes()
            return connected in ready, {
                handle.fileno() for handle in ready if isinstance(handle, PipeConnection)
            }

        def accept(self) -> tuple[PipePeer, object] | None:
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
            if not self._waker_writer.closed:
                self._waker_writer.send_bytes(b"\0")

        def close(self) -> None:
            handle, self._handle = self._handle, None
            connecting, self._connecting = self._connecting, None
            if connecting is not None:
                connecting.cancel()
                with contextlib.suppress(OSError):
                    # Until this returns, the system may write into the memory of
                    # ``connecting``.
                    connecting.GetOverlappedResult(True)
            if handle is not None:
                _winapi.CloseHandle(handle)
            self._waker_reader.close()
            self._waker_writer.close()

        def renew_waker(self) -> None:
            """Do nothing: Windows does not fork."""

    def _new_instance(address: str, *, first: bool) -> int:
        flags = _winapi.PIPE_ACCESS_DUPLEX | _winapi.FILE_FLAG_OVERLAPPED
        if first:
            # No other process may own the name already: it could read and change all
            # messages.
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
        """Return a connected stream to the pipe's server.

        Args:
            address: The pipe's name.
            deadline: On the clock of ``time.monotonic()``; None for no limit.

        Raises:
            TimedOut: The pipe was busy until the deadline.
            OSError: The pipe does not exist, for example.
        """
        while True:
            wait_ms = float(_CLOCK_CHECK_MS)
            if deadline is not None:
                wait_ms = min(wait_ms, (deadline - time.monotonic()) * 1000)
            try:
                _winapi.WaitNamedPipe(address, max(1, int(wait_ms)))
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
