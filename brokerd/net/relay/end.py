"""One end of a channel: a connection that began with OPEN or JOIN, or is to."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from typing import TYPE_CHECKING, Final

from brokerd.net.context import READ_BUFFER
from brokerd.net.handshake.peer_uid import peer_uid
from brokerd_client._common.pipe_bridge import BridgedSocket
from brokerd_client.wire.framing import FrameReader

if TYPE_CHECKING:
    from brokerd.net.byte_stream import ByteStream
    from brokerd.net.connection.connection import Connection
    from brokerd.net.handshake.keyring import Credential
    from brokerd.net.handshake.pending import PendingConnection
    from brokerd.net.handshake.tls import TlsPeer
    from brokerd_client.tls.stream import TlsStream

__all__ = ["End"]

#: Has the system reset a TCP connection when its socket is closed.
_RESETS: Final = struct.pack("ii", 1, 0)


class End:
    """One end of a channel: its socket, or TLS over it.

    stream: the bytes to read and write.
    tls_stream: the same stream, None without TLS.
    credential: the key that the client proved to know.
    reader: the bytes that arrived before the channel was joined.
    """

    __slots__ = ("credential", "fd", "peer", "reader", "sock", "stream", "tls_peer", "tls_stream")

    def __init__(
        self,
        sock: socket.socket,
        credential: Credential,
        peer: str,
        tls_peer: TlsPeer,
        tls_stream: TlsStream | None = None,
    ) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.tls_stream = tls_stream
        self.stream: ByteStream = tls_stream or sock
        self.credential = credential
        self.peer = peer
        self.tls_peer = tls_peer
        self.reader = FrameReader()

    @classmethod
    def of_pending(cls, pending: PendingConnection) -> End:
        """Return the end of a connection whose handshake is over."""
        assert pending.credential is not None
        end = cls(
            pending.sock,
            pending.credential,
            pending.peer,
            pending.tls_peer,
            pending.tls_stream,
        )
        end.reader = pending.reader
        return end

    @classmethod
    def of_connection(cls, connection: Connection, unread: bytes) -> End:
        """Return the end of a connection whose session is over.

        unread: the bytes that were read and not routed.
        """
        end = cls(
            connection.sock,
            connection.credential,
            connection.session.peer,
            connection.tls_peer,
            connection.tls_stream,
        )
        end.reader.feed(unread)
        return end

    @property
    def name(self) -> str:
        """The name of the client."""
        return self.credential.client.name

    @property
    def uid(self) -> int | None:
        """The user at the other end of a Unix socket, else None."""
        return None if self.tls_stream is not None else peer_uid(self.sock)

    @property
    def can_hand_over(self) -> bool:
        """Whether another process could continue: not over TLS."""
        return self.tls_stream is None

    @property
    def may_half_close(self) -> bool:
        """Whether one direction can end before the other."""
        return self.tls_peer.version != "TLSv1.2" and not isinstance(self.sock, BridgedSocket)

    @property
    def buffered(self) -> bool:
        """Whether TLS holds decrypted bytes, which the system does not report."""
        return self.tls_stream is not None and self.tls_stream.buffered

    @property
    def unsent(self) -> bool:
        """Whether TLS holds bytes that it has taken and not written."""
        return self.tls_stream is not None and self.tls_stream.unsent

    def make_room(self) -> None:
        """Give a Unix socket room for a whole read.

        Its default holds less, so that most writes would be partial. The buffer of a TCP
        socket grows by itself, unless its size is set.
        """
        if self.sock.family == getattr(socket, "AF_UNIX", None):
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, READ_BUFFER)

    def write(self, view: memoryview) -> int:
        """Write bytes, as many as the system takes; return their number. Raises OSError."""
        written = 0
        try:
            if self.tls_stream is None:
                return self.sock.send(view)
            self.tls_stream.flush()
            while written < len(view) and not self.tls_stream.unsent:
                written += self.tls_stream.send(view[written:])
        except (BlockingIOError, InterruptedError):
            pass
        return written

    def end_writing(self) -> None:
        """Close the sending half, with a close_notify of TLS before that."""
        with contextlib.suppress(OSError):
            if self.tls_stream is not None:
                self.tls_stream.finish()
            if not self.unsent:
                self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close the connection, and discard all bytes on their way."""
        if self.sock.family != getattr(socket, "AF_UNIX", None):
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESETS)
        self.sock.close()

    def has_gone(self) -> bool:
        """Return whether the other end has closed both directions, where that is known."""
        if not hasattr(select, "poll"):
            return False
        poll = select.poll()
        poll.register(self.fd, 0)
        return bool(poll.poll(0))
