"""One established connection over TLS.

It differs from a plain one in two ways. Decrypted bytes may wait in the stream, and the
system does not report them. A piece of some kilobytes that the outbox has given away
may still wait in the stream. It counts as sent, like bytes in the system's own buffer.
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Final

from brokerd.core.session import Session
from brokerd.net.connection.connection import BYTES_PER_TURN, Connection
from brokerd.net.handshake.tls import TlsPeer
from brokerd_client.tls.budget import MOST_EMPTY
from brokerd_client.tls.stream import TlsStream

if TYPE_CHECKING:
    from brokerd.net.context import Context
    from brokerd.net.handshake.keyring import Credential

__all__ = ["TlsConnection"]

#: Most bytes of small pieces that are encrypted together: a TLS record has room for 16
#: KiB.
_TOGETHER: Final = 16 * 1024


class TlsConnection(Connection):
    """One established connection over TLS; its keys can't be handed to another process."""

    can_hand_over = False

    __slots__ = ("_reading_on", "_stream")

    def __init__(
        self, context: Context, stream: TlsStream, credential: Credential, tls_peer: TlsPeer
    ) -> None:
        super().__init__(context, stream.raw, credential, tls_peer, stream)
        self._stream = stream
        stream.budget.most_empty = MOST_EMPTY
        self._reading_on = False

    @property
    def tls_stream(self) -> TlsStream:
        return self._stream

    # Reading

    def open(self, session: Session, early: bytes) -> None:
        """Start reading; more than ``early`` may have arrived behind the handshake."""
        super().open(session, early)
        self._after_reading()

    def on_readable(self) -> None:
        """Read and route, then check for bytes that are decrypted and unread."""
        super().on_readable()
        self._after_reading()

    def resume(self) -> None:
        """Continue reading after the sender was held."""
        super().resume()
        self._after_reading()

    def _after_reading(self) -> None:
        if self.closed:
            return
        if self._stream.unsent and not self.writing:
            # TLS itself has a reply to write.
            self.writing = True
            self.context.loop.add_writer(self.fd, self.on_writable)
        if self._stream.buffered and self.may_read() and not self._reading_on:
            # In a turn of its own, so that the other connections get theirs.
            self._reading_on = True
            self.context.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        self._reading_on = False
        if self._stream.buffered and self.may_read():
            self.on_readable()

    def advance(self) -> bool:
        """Route what has arrived; return whether there was input or some is still
        decrypted.
        """
        had_input = super().advance()
        # The caller may not call again.
        self._after_reading()
        return had_input or (self._stream.buffered and self.may_read())

    # Writing

    def write(self) -> None:
        """Encrypt and write the outbox; if the system does not take all, wait to write."""
        session = self.session
        outbox, stream = session.outbox, self._stream
        left = BYTES_PER_TURN
        try:
            while True:
                if not stream.flush() or left <= 0:
                    raise BlockingIOError
                if outbox.timed:
                    self.context.broker.expire(session, self.context.loop.time())
                pieces = outbox.pieces()
                if not pieces:
                    if outbox.waiting:
                        # More messages have expired than are reported to their senders
                        # in one turn.
                        raise BlockingIOError
                    break
                size = stream.send(pieces[0] if len(pieces) == 1 else _together(pieces))
                left -= size
                outbox.sent(size)
        except (BlockingIOError, InterruptedError):
            self._wait_to_write()
        except OSError as error:
            self.lost(error.strerror or type(error).__name__)
        else:
            self._all_written()

    def _end_writing(self) -> None:
        """Close the sending half, with a close_notify of TLS before that."""
        if self._stream.buffered:
            # OpenSSL fails if it finds data while it sends close_notify, and the data
            # are lost.
            return
        with contextlib.suppress(OSError):
            self._stream.finish()
            if not self._stream.unsent:
                self.sock.shutdown(socket.SHUT_WR)

    def lost(self, reason: str, *, written: bool = False) -> None:
        """Close the connection, with a close_notify of TLS if all output was written."""
        if written and not self.closed:
            try:
                self._stream.finish()
            except OSError:
                written = False
        super().lost(reason, written=written)


def _together(pieces: list[bytearray | memoryview]) -> bytes | bytearray | memoryview:
    """Return the first of the pieces, or as many pieces as fit into one record."""
    size, count = 0, 0
    for piece in pieces:
        size += len(piece)
        if count and size > _TOGETHER:
            break
        count += 1
    return pieces[0] if count == 1 else b"".join(pieces[:count])
