"""The blocking face's connection over TLS: a Transport whose bytes go through a
TlsStream.

As with a Transport, one thread dials, waits, reads and closes. Any thread may write,
one at a time. TLS shares its state between both directions, so a lock serializes
reading and writing.
"""

from __future__ import annotations

import contextlib
import ssl
import threading

from brokerd_client.address import Address
from brokerd_client.blocking.transport import Transport, raised_by_system
from brokerd_client.tls.stream import TlsStream

__all__ = ["TlsTransport"]

_READ_SIZE = 64 * 1024


class TlsTransport(Transport):
    """The connection to one address over TLS, one at a time.

    ``connecting`` stays true until the TLS handshake is over.
    """

    def __init__(self, address: Address, context: ssl.SSLContext) -> None:
        super().__init__(address)
        self._context = context
        self._stream: TlsStream | None = None
        #: Reentrant, because a thread can release such a lock completely: see release_locks.
        self._turn = threading.RLock()
        self._send = self._send_encrypted

    @property
    def bindings(self) -> dict[str, bytes]:
        """The channel bindings of the key."""
        assert self._stream is not None
        return self._stream.engine.bindings

    def unwritten(self) -> bool:
        """Return whether bytes wait to be written."""
        return bool(self.backlog) or (self._stream is not None and self._stream.unsent)

    def dial(self) -> bool:
        """Begin to connect. Raises OSError if all candidate addresses have failed."""
        return super().dial() and self._begin()

    def connected(self) -> bool:
        """Return whether the connection is made, TLS included. Raises OSError."""
        if self._stream is not None:
            return self._handshake()
        return super().connected() and self._begin()

    def _begin(self) -> bool:
        assert self._socket is not None
        self.connecting = True
        self._stream = TlsStream(self._socket, self._context, hostname=self.address.host)
        self._send = self._send_encrypted
        return self._handshake()

    def _handshake(self) -> bool:
        assert self._stream is not None
        self.connecting = not self._stream.handshake()
        return not self.connecting

    def write(self, data: bytes) -> int:
        """Write as a Transport does; bytes that TLS has taken count as written."""
        sent = super().write(data)
        if self._stream is not None and self._stream.unsent:
            # Only the I/O thread waits until the socket is writable.
            self.wake()
        return sent

    def _send_encrypted(self, data: bytes | memoryview) -> int:
        assert self._stream is not None
        sent = 0
        with self._turn:
            try:
                self._stream.flush()
                while sent < len(data):
                    sent += self._stream.send(memoryview(data)[sent:])
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                # The bytes taken before may have been sent. The next write fails again.
                if not sent or not raised_by_system(error):
                    raise
        return sent

    def _receive(self) -> bytes | None:
        assert self._stream is not None
        with self._turn:
            try:
                return self._stream.recv(_READ_SIZE)
            except (BlockingIOError, InterruptedError):
                self._raise_if_vanished()
                return None

    def borrow_input(self) -> None:
        """Return None: only the I/O thread reads.

        A waiting thread may be interrupted while it decrypts, and bytes would be lost.
        """

    def shut(self) -> None:
        """End the sending side of the TLS connection."""
        stream = self._stream
        if stream is not None and not self.connecting:
            with self._turn, contextlib.suppress(OSError):
                stream.finish()

    def wait(self, timeout: float | None, *, reading: bool) -> tuple[bool, bool]:
        """Wait as a Transport does; bytes that TLS has decrypted already are readable."""
        stream = self._stream
        is_buffered = reading and stream is not None and stream.buffered and not self.connecting
        readable, writable = super().wait(0 if is_buffered else timeout, reading=reading)
        return readable or is_buffered, writable

    def _wanted(self, *, reading: bool) -> tuple[bool, bool]:
        if self._stream is None or not self.connecting:
            return super()._wanted(reading=reading)
        return True, self._stream.unsent

    def release_locks(self) -> None:
        """Release the lock, if an interrupted call of this thread still holds it."""
        with contextlib.suppress(RuntimeError):
            while True:
                self._turn.release()

    def drop(self) -> None:
        """Close the connection, if there is one."""
        super().drop()
        self._stream = None
