"""TLS over a non-blocking socket, used like a socket.

A read or write that can't continue raises BlockingIOError. A caller that waits for the
stream must know these differences from a socket:

- bytes may be here already when the system says that there are none: ``buffered``;
- bytes that were taken may not be written yet, at most one piece of them: ``unsent``.
  They are written when :meth:`flush` returns True.

Reading may write (an answer to the peer's TLS); writing never reads.

A signal handler's exception may interrupt a read or a write. No caller then knows which
bytes were decrypted or taken. The stream can't continue: later reads and writes raise
TlsError.

A peer may send many bytes with little or no payload: see :mod:`budget`. A call reads
few such bytes at once, and leaves the rest to the system until the next call.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import Final

from brokerd_client.errors import TlsError
from brokerd_client.tls.budget import RecordBudget
from brokerd_client.tls.engine import Engine, thread_buffer

__all__ = ["TlsStream"]

#: Most bytes read from the wire at once, and most bytes taken for sending at once. This
#: much memory is kept for every connection.
_PIECE: Final = 32 * 1024
#: Most bytes of TLS's own answers that wait for a peer that does not read.
_MOST_UNSENT: Final = 2 * _PIECE


class TlsStream:
    """A TLS connection over a socket, which it owns and makes non-blocking.

    budget: bounds the work that the peer's TLS causes without carrying payload.
    """

    __slots__ = ("_left", "_torn", "_unsent", "budget", "engine", "raw")

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        hostname: str | None = None,
        end_point: bytes | None = None,
        budget: RecordBudget | None = None,
    ) -> None:
        self.raw = sock
        self.budget = budget or RecordBudget()
        self.engine = Engine(context, hostname=hostname, end_point=end_point)
        self._unsent = b""
        #: True during a read or a write, and permanently if an exception cut it off.
        self._torn = False
        #: Whether the last read stopped although the system may have had more bytes.
        self._left = False

    @property
    def family(self) -> int:
        """The address family of the socket."""
        return self.raw.family

    @property
    def buffered(self) -> bool:
        """Whether input, or the end, may be readable although the system does not
        report it.
        """
        return self.engine.more or self.engine.ended or self._left

    @property
    def unsent(self) -> bool:
        """Whether bytes wait to be written to the socket by :meth:`flush`."""
        return bool(self._unsent)

    def fileno(self) -> int:
        """Return the socket's file descriptor."""
        return self.raw.fileno()

    def handshake(self) -> bool:
        """Advance the handshake by one read; return whether it is over. Raises OSError."""
        engine = self.engine
        try:
            ready = engine.handshake()
            if not ready:
                self.flush()
                self._feed(_PIECE)
                ready = engine.handshake()
        except (BlockingIOError, InterruptedError):
            return False
        except TlsError:
            # The peer may have to be sent a TLS alert.
            with contextlib.suppress(OSError):
                self.flush()
            raise
        self.flush()
        return ready

    def _feed(self, size: int) -> int:
        """Read once from the socket; return the number of bytes, 0 at the end. Raises
        OSError.
        """
        data = self.raw.recv(size)
        if data:
            self.engine.feed(data)
        else:
            self.engine.feed_end()
        return len(data)

    def recv_into(self, view: memoryview, size: int = 0) -> int:
        """Read into a buffer as a socket does; 0 is the end. Raises OSError."""
        self._begin()
        try:
            payload = self._receive_into(view, size)
        except OSError as error:
            self._torn = not _by_system(error)
            raise
        self._torn = False
        return payload

    def _begin(self) -> None:
        if self._torn:
            raise TlsError("an exception at this end interrupted a read or a write")
        self._torn = True

    def _receive_into(self, view: memoryview, size: int = 0) -> int:
        if len(self._unsent) > _MOST_UNSENT:
            raise TlsError("the peer has TLS answer again and again, and does not read the answers")
        if size:
            view = view[:size]
        engine = self.engine
        payload, received = engine.read_into(view), 0
        piece = self.budget.read_size(len(view), _PIECE)
        self._left = False
        try:
            while not engine.more and not engine.ended:
                if received - payload >= piece * 3 // 4:
                    self._left = True
                    break
                size_read = self._feed(piece)
                received += size_read
                payload += engine.read_into(view[payload:])
                if payload and size_read < piece:
                    break
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            # The bytes before the error are read first; the next read fails again.
            if not payload:
                raise
        finally:
            # If TLS's answer can't be written any more, the input is still returned.
            with contextlib.suppress(OSError):
                self.flush()
        self.budget.charge(payload, received)
        if not payload and not engine.ended:
            raise BlockingIOError
        return payload

    def recv(self, size: int) -> bytes:
        """Read as a socket does; b"" is the end. Raises OSError."""
        self._begin()
        view = thread_buffer()[:size]
        try:
            data = bytes(view[: self._receive_into(view)])
        except OSError as error:
            self._torn = not _by_system(error)
            raise
        self._torn = False
        return data

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Send as a socket does; return the number of bytes taken. Raises OSError.

        The bytes taken count as sent; :meth:`flush` writes the rest of them.
        """
        self._begin()
        try:
            accepted = self._take(data)
        except OSError as error:
            self._torn = not _by_system(error)
            raise
        self._torn = False
        return accepted

    def _take(self, data: bytes | bytearray | memoryview) -> int:
        if not self.flush():
            raise BlockingIOError
        piece = memoryview(data)[:_PIECE]
        self.engine.write(piece)
        # Some bytes may have been sent before the connection broke, and the peer may
        # have got a whole message. The next write fails again.
        try:
            self.flush()
        except OSError as error:
            if not _by_system(error):
                raise
        return len(piece)

    def flush(self) -> bool:
        """Write the bytes that were taken and not sent; return whether all are. Raises
        OSError.
        """
        output = self.engine.output()
        if output:
            self._unsent = self._unsent + output if self._unsent else output
        while self._unsent:
            try:
                sent = self.raw.send(self._unsent)
            except (BlockingIOError, InterruptedError):
                return False
            self._unsent = self._unsent[sent:]
        return True

    def finish(self) -> None:
        """End the sending side, if that can be sent now. Raises OSError."""
        self.engine.finish()
        self.flush()

    def close(self) -> None:
        """Close the socket."""
        self.raw.close()


def _by_system(error: OSError) -> bool:
    """Return whether the system raised the error, not a signal handler.

    A signal handler may raise a TimeoutError, which is an OSError too.
    """
    return error.errno is not None or isinstance(
        error, (TlsError, BlockingIOError, InterruptedError, ConnectionError)
    )
