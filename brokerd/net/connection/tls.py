"""One established connection over TLS.

What differs from a plain one: bytes may be there of which the system knows nothing, and of those the outbox has given
away one piece, of some kilobytes, may still wait here; it counts as sent, as bytes in the system's own buffer do.
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Final, cast

from brokerd.core.session import Session
from brokerd.net.connection.connection import Connection
from brokerd.net.handshake.tls import TlsPeer
from brokerd_client.tls.stream import TlsStream

if TYPE_CHECKING:
    from brokerd.net.handshake.keyring import Credential
    from brokerd.net.server import Server

__all__ = ["TlsConnection"]

#: Small pieces are encrypted together, up to so many bytes: a record has room for 16 KiB.
_TOGETHER: Final = 16 * 1024


class TlsConnection(Connection):
    """One established connection over TLS. Its keys are in this process, and can't be handed to another."""

    can_hand_over = False

    __slots__ = ("_reading_on", "_stream")

    def __init__(self, server: Server, stream: TlsStream, credential: Credential, tls_peer: TlsPeer) -> None:
        # It does all that a Link asks of a socket.
        super().__init__(server, cast("socket.socket", stream), credential, tls_peer)
        self._stream = stream
        stream.trust()
        self._reading_on = False

    # Reading

    def open(self, session: Session, early: bytes) -> None:
        """Begin, as a Link does; more may have come behind the handshake than early."""
        super().open(session, early)
        self._after_reading()

    def on_readable(self) -> None:
        """Read and route what came, as a Link does."""
        super().on_readable()
        self._after_reading()

    def resume(self) -> None:
        """Read on after being held, as a Link does."""
        super().resume()
        self._after_reading()

    def _after_reading(self) -> None:
        if self.closed:
            return
        if self._stream.unsent and not self.writing:
            # TLS itself had something to answer.
            self.writing = True
            self.server.loop.add_writer(self.fd, self.on_writable)
        if self._stream.buffered and self.may_read() and not self._reading_on:
            # In a turn of its own, so that the others get theirs.
            self._reading_on = True
            self.server.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        self._reading_on = False
        if self._stream.buffered and self.may_read():
            self.on_readable()

    def advance(self) -> bool:
        """Route what has arrived, as a Link does; a read that brought nothing may have left something."""
        there = super().advance()
        # Whoever asked may not ask again.
        self._after_reading()
        return there or (self._stream.buffered and self.may_read())

    # Writing

    def write(self) -> None:
        """Offer the outbox to the system, encrypted; where it does not take all, wait until it takes more."""
        session = self.session
        outbox, stream = session.outbox, self._stream
        try:
            while True:
                if not stream.flush():
                    raise BlockingIOError
                if outbox.timed:
                    self.server.broker.expire(session, self.server.loop.time())
                pieces = outbox.pieces()
                if not pieces:
                    if outbox.waiting:
                        # More has expired than is answered for in one turn.
                        raise BlockingIOError
                    break
                outbox.sent(stream.send(pieces[0] if len(pieces) == 1 else _together(pieces)))
        except (BlockingIOError, InterruptedError):
            self._wait_to_write()
        except OSError as error:
            self.lost(error.strerror or type(error).__name__)
        else:
            self._all_written()

    def _end_writing(self) -> None:
        """End the sending half, as a Link does; with a goodbye of TLS before that."""
        if self._stream.buffered:
            # OpenSSL fails when it finds data while it says goodbye, and the data are lost.
            return
        with contextlib.suppress(OSError):
            self._stream.finish()
            if not self._stream.unsent:
                self._stream.raw.shutdown(socket.SHUT_WR)

    def lost(self, why: str, *, written: bool = False) -> None:
        """End the connection, as a Link does; with a goodbye, where all that was to be said was said."""
        if written and not self.closed:
            try:
                self._stream.finish()
            except OSError:
                written = False
            else:
                # What comes from here on is thrown away, encrypted or not.
                self.sock = self._stream.raw
        super().lost(why, written=written)


def _together(pieces: list[bytearray | memoryview]) -> bytes | bytearray | memoryview:
    """Return the first of the pieces, or as many as one record has room for."""
    size, count = 0, 0
    for piece in pieces:
        size += len(piece)
        if count and size > _TOGETHER:
            break
        count += 1
    return pieces[0] if count == 1 else b"".join(pieces[:count])
