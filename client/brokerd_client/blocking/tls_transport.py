"""The blocking face's connection over TLS: a Channel whose bytes go through a TlsStream.

As with a Channel one thread dials, waits, reads and closes, and any thread may write, one at a time; since TLS is one
thing in both directions, reading and writing take turns here.
"""

from __future__ import annotations

import contextlib
import ssl
import threading

from brokerd_client.address import Address
from brokerd_client.blocking.transport import Transport, by_system
from brokerd_client.tls.stream import TlsStream

__all__ = ["TlsTransport"]

_READ_SIZE = 64 * 1024


class TlsTransport(Transport):
    """One connection at a time, to one address, over TLS. ``connecting`` lasts until its handshake is over."""

    def __init__(self, address: Address, context: ssl.SSLContext) -> None:
        super().__init__(address)
        self._context = context
        self._stream: TlsStream | None = None
        #: A thread can tell whether it holds this one: see mend.
        self._turn = threading.RLock()
        self._send = self._send_encrypted

    @property
    def bindings(self) -> dict[str, bytes]:
        """What the key is to be bound to."""
        assert self._stream is not None
        return self._stream.engine.bindings

    def unwritten(self) -> bool:
        """Return whether something that was to be written has not left yet."""
        return bool(self.backlog) or (self._stream is not None and self._stream.unsent)

    def dial(self) -> bool:
        """Begin to connect. Raises OSError where no candidate is left."""
        return super().dial() and self._begin()

    def connected(self) -> bool:
        """Return whether the connecting that was under way is done, TLS included. Raises OSError."""
        if self._stream is not None:
            return self._shake()
        return super().connected() and self._begin()

    def _begin(self) -> bool:
        assert self._socket is not None
        self.connecting = True
        self._stream = TlsStream(self._socket, self._context, hostname=self.address.host)
        self._send = self._send_encrypted
        return self._shake()

    def _shake(self) -> bool:
        assert self._stream is not None
        self.connecting = not self._stream.handshake()
        return not self.connecting

    def write(self, data: bytes) -> int:
        """Write as a Channel does; what TLS has taken counts as written."""
        sent = super().write(data)
        if self._stream is not None and self._stream.unsent:
            # Only the I/O thread waits for room.
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
                # What was taken before may have left. The next write fails again.
                if not sent or not by_system(error):
                    raise
        return sent

    def read(self) -> bytes | None:
        """Return what has arrived, as a Channel does."""
        assert self._stream is not None
        with self._turn:
            try:
                return self._stream.recv(_READ_SIZE)
            except (BlockingIOError, InterruptedError):
                self._raise_if_vanished()
                return None

    def shut(self) -> None:
        """Tell the peer that nothing more comes."""
        stream = self._stream
        if stream is not None and not self.connecting:
            with self._turn, contextlib.suppress(OSError):
                stream.finish()

    def wait(self, timeout: float | None, *, reading: bool) -> tuple[bool, bool]:
        """Wait as a Channel does; what TLS has decrypted already is readable."""
        stream = self._stream
        here = reading and stream is not None and stream.buffered and not self.connecting
        readable, writable = super().wait(0 if here else timeout, reading=reading)
        return readable or here, writable

    def _wanted(self, *, reading: bool) -> tuple[bool, bool]:
        if self._stream is None or not self.connecting:
            return super()._wanted(reading=reading)
        return True, self._stream.unsent

    def mend(self) -> None:
        """Release the turn, where an interrupted call of this thread still holds it."""
        with contextlib.suppress(RuntimeError):
            while True:
                self._turn.release()

    def drop(self) -> None:
        """Close the connection, if there is one."""
        super().drop()
        self._stream = None
