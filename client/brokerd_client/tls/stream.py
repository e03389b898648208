"""TLS over a non-blocking socket, used like one: a read or write that can't go on raises BlockingIOError.

What differs from a socket, for whoever waits for it:

- bytes may be here already when the system says that there are none: ``buffered``;
- bytes that were taken may not have gone yet, one piece of them at most: ``unsent``, until :meth:`flush` says so.

Reading may write (an answer to the peer's TLS), never the other way round.

An exception of a signal handler may end a read or a write in the middle. What was decrypted or taken by then is known
to no caller, so that the stream goes no further: later reads and writes raise TlsError.

A peer may send much in which there is nothing for anybody: updates of its keys, records of one byte. Each costs this
end some microseconds, so that a call takes in little of that at once, and leaves the rest to the system until the next.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import Final

from brokerd_client.errors import TlsError
from brokerd_client.tls.engine import Engine, room

__all__ = ["TlsStream"]

#: Bytes from the wire read at once, and bytes to send taken at once: this much is kept for every connection.
_PIECE: Final = 32 * 1024
#: The same where the last ones were mostly TLS's own: as many updates of keys take a millisecond.
_SIP: Final = 4 * 1024
#: Where less than this share was in it, a piece was mostly TLS's own. The smallest frames, each in a record of its own,
#: are twice that.
_YIELD: Final = 1 / 5
#: The longest record (RFC 5246, 6.2.3): nothing of what is in it is there before all of it is.
_RECORD: Final = 5 + 16 * 1024 + 2048
#: Bytes that are taken in without anything in them, and by a listener from whoever has not proved who it is.
_MOST_BARREN: Final = 64 * 1024
_MOST_BARREN_AT_THE_DOOR: Final = 20 * 1024
#: Answers of TLS itself that wait for a peer who does not read.
_MOST_UNSENT: Final = 2 * _PIECE


class TlsStream:
    """One connection, its socket non-blocking and now this object's own."""

    __slots__ = ("_barren", "_left", "_most_barren", "_torn", "_unsent", "_wary", "engine", "raw")

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
        #: True while a read or a write is under way, and for good where an exception cut it off.
        self._torn = False
        #: Bytes that came since the last of which there was something to read.
        self._barren = 0
        self._most_barren = _MOST_BARREN if end_point is None else _MOST_BARREN_AT_THE_DOOR
        self._wary = True
        #: Whether the last read stopped though the system may have had more.
        self._left = False

    def trust(self) -> None:
        """The peer has proved who it is: it may do what any client may."""
        self._most_barren = _MOST_BARREN

    @property
    def family(self) -> int:
        """As a socket's."""
        return self.raw.family

    @property
    def buffered(self) -> bool:
        """Whether there may be something to read, be it the end, of which the system tells nothing, or not again."""
        return self.engine.more or self.engine.ended or self._left

    @property
    def unsent(self) -> bool:
        """Whether bytes wait for the socket to take them: for :meth:`flush`."""
        return bool(self._unsent)

    def fileno(self) -> int:
        """As a socket's."""
        return self.raw.fileno()

    def handshake(self) -> bool:
        """Go on with the handshake, by what one read brings; return whether it is over. Raises OSError."""
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
            # The peer may be owed the word of what was wrong.
            with contextlib.suppress(OSError):
                self.flush()
            raise
        self.flush()
        return ready

    def _feed(self, size: int) -> int:
        """Read once from the socket; return how many bytes, 0 for the end. Raises OSError."""
        data = self.raw.recv(size)
        if data:
            self.engine.feed(data)
        else:
            self.engine.feed_end()
        return len(data)

    def recv_into(self, view: memoryview, size: int = 0) -> int:
        """As a socket's: 0 is the end. Raises OSError."""
        self._begin()
        try:
            got = self._receive_into(view, size)
        except OSError as error:
            self._torn = not _by_system(error)
            raise
        self._torn = False
        return got

    def _begin(self) -> None:
        if self._torn:
            raise TlsError("an exception at this end cut off a read or a write")
        self._torn = True

    def _receive_into(self, view: memoryview, size: int = 0) -> int:
        if len(self._unsent) > _MOST_UNSENT:
            raise TlsError("the peer has TLS answer again and again, and does not read the answers")
        if size:
            view = view[:size]
        engine = self.engine
        got, fed = engine.read_into(view), 0
        # At the door little is asked for, and little is decrypted for it.
        piece = min(_SIP, 2 * len(view)) if self._wary else _PIECE
        self._left = False
        try:
            while not engine.more and not engine.ended:
                if fed - got >= piece * 3 // 4:
                    self._left = True
                    break
                came = self._feed(piece)
                fed += came
                got += engine.read_into(view[got:])
                if got and came < piece:
                    break
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            # What came before it is read first; the next read fails again.
            if not got:
                raise
        finally:
            # Where the answer can't be written any more, what came counts all the same.
            with contextlib.suppress(OSError):
                self.flush()
        self._judge(got, fed)
        if not got and not engine.ended:
            raise BlockingIOError
        return got

    def _judge(self, got: int, fed: int) -> None:
        """Be wary of a peer whose bytes are mostly TLS's own. Raises TlsError: there is nothing in them at all."""
        if fed and got >= fed * _YIELD:
            self._wary = False
        elif fed > _RECORD:
            self._wary = True
        self._barren = 0 if got else self._barren + fed
        if self._barren > self._most_barren:
            raise TlsError(f"the peer has sent {self._barren} bytes of TLS with nothing in them")

    def recv(self, size: int) -> bytes:
        """As a socket's: b"" is the end. Raises OSError."""
        self._begin()
        view = room()[:size]
        try:
            data = bytes(view[: self._receive_into(view)])
        except OSError as error:
            self._torn = not _by_system(error)
            raise
        self._torn = False
        return data

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """As a socket's: return how many bytes were taken. They are as good as sent: :meth:`flush`. Raises OSError."""
        self._begin()
        try:
            taken = self._take(data)
        except OSError as error:
            self._torn = not _by_system(error)
            raise
        self._torn = False
        return taken

    def _take(self, data: bytes | bytearray | memoryview) -> int:
        if not self.flush():
            raise BlockingIOError
        taken = memoryview(data)[:_PIECE]
        self.engine.write(taken)
        # Some of it may have left before the connection broke, and in it what the peer takes for a whole message. The
        # next write fails again.
        try:
            self.flush()
        except OSError as error:
            if not _by_system(error):
                raise
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


def _by_system(error: OSError) -> bool:
    """Return whether the system has raised it, and not a signal handler, whose TimeoutError is an OSError too."""
    return error.errno is not None or isinstance(error, (TlsError, BlockingIOError, InterruptedError, ConnectionError))
