"""TLS over a non-blocking socket, used like one: a read or write that can't go on raises BlockingIOError.

What differs from a socket, for whoever waits for it:

- bytes may be here already when the system says that there are none: ``buffered``;
- bytes that were taken may not have gone yet, one piece of them at most: ``unsent``, until :meth:`flush` says so.

Reading may write (an answer to the peer's TLS), never the other way round.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import Final

from brokerd_client.errors import TlsError
from brokerd_client.tls import Engine

__all__ = ["TlsStream"]

#: Bytes from the wire read at once, and bytes to send taken at once: this much is kept for every connection.
_PIECE: Final = 32 * 1024
#: Answers of TLS itself that wait for a peer who does not read.
_MOST_UNSENT: Final = 2 * _PIECE


class TlsStream:
    """One connection, its socket non-blocking and now this object's own."""

    __slots__ = ("_unsent", "engine", "raw")

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        hostname: str | None = None,
        end_point: bytes | None = None,
    ) -> None:
        self.raw = sock
        self.engine = Engine(context, hostname=hostname, end_point=end_point)
        self._unsent = b""

    @property
    def family(self) -> int:
        """As a socket's."""
        return self.raw.family

    @property
    def buffered(self) -> bool:
        """Whether there is something to read, be it the end, of which the system knows nothing."""
        return self.engine.more or self.engine.ended

    @property
    def unsent(self) -> bool:
        """Whether bytes wait for the socket to take them: for :meth:`flush`."""
        return bool(self._unsent)

    def fileno(self) -> int:
        """As a socket's."""
        return self.raw.fileno()

    def handshake(self) -> bool:
        """Go on with the handshake as far as the peer lets it; return whether it is over. Raises OSError."""
        engine = self.engine
        try:
            while not engine.handshake():
                self.flush()
                data = self.raw.recv(_PIECE)
                if data:
                    engine.feed(data)
                else:
                    engine.feed_end()
        except (BlockingIOError, InterruptedError):
            return False
        except TlsError:
            # The peer may be owed the word of what was wrong.
            with contextlib.suppress(OSError):
                self.flush()
            raise
        self.flush()
        return True

    def recv_into(self, view: memoryview, size: int = 0) -> int:
        """As a socket's: 0 is the end. Raises OSError."""
        if size:
            view = view[:size]
        engine = self.engine
        got = engine.read_into(view)
        try:
            while not engine.more and not engine.ended:
                data = self.raw.recv(_PIECE)
                if data:
                    engine.feed(data)
                else:
                    engine.feed_end()
                got += engine.read_into(view[got:])
                if got and len(data) < _PIECE:
                    break
        except (BlockingIOError, InterruptedError):
            if not got:
                raise
        except OSError:
            # What came before it is read first; the next read fails again.
            if not got:
                raise
        finally:
            self._answer()
        return got

    def _answer(self) -> None:
        self.flush()
        if len(self._unsent) > _MOST_UNSENT:
            raise TlsError("the peer has TLS answer again and again, and does not read the answers")

    def recv(self, size: int) -> bytes:
        """As a socket's: b"" is the end. Raises OSError."""
        buffer = bytearray(size)
        return bytes(memoryview(buffer)[: self.recv_into(memoryview(buffer))])

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """As a socket's: return how many bytes were taken. They are as good as sent: :meth:`flush`. Raises OSError."""
        if not self.flush():
            raise BlockingIOError
        taken = memoryview(data)[:_PIECE]
        self.engine.write(taken)
        self.flush()
        return len(taken)

    def flush(self) -> bool:
        """Offer what was taken and not sent to the system; return whether all is gone. Raises OSError."""
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
        """Say goodbye, if that can be sent now: nothing more is written. Raises OSError."""
        self.engine.finish()
        self.flush()

    def close(self) -> None:
        """Close the socket."""
        self.raw.close()
