"""The bridge of a channel over TLS: a plain socket for the program, TLS to the broker.

A Connection reads and writes a descriptor, which another process may inherit. TLS has
state that only one process can have. So a thread passes the bytes between a TLS stream
and one end of a pair of sockets; the Connection owns the other end. A channel that has
been given to another process therefore lasts as long as the process that made it.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from typing import TYPE_CHECKING, Final

from brokerd_client._common import forks
from brokerd_client.connection.dialing import remaining
from brokerd_client.errors import TlsError
from brokerd_client.tls.stream import TlsStream
from brokerd_client.wire.channel_binding import Bindings

if TYPE_CHECKING:
    from ssl import SSLContext

__all__ = ["bridge_tls"]

#: Most bytes read at once, of either side.
_PIECE: Final = 64 * 1024


def bridge_tls(
    sock: socket.socket, context: SSLContext, hostname: str, deadline: float | None
) -> tuple[socket.socket, Bindings]:
    """Make TLS ready over a connected socket, which it owns.

    Returns:
        (a socket for the program's bytes, the channel bindings of the key).

    Raises:
        TlsError: TLS could not be made ready.
        TimedOut: The deadline has passed; without a text.
        OSError: The connection is lost.
    """
    sock.setblocking(False)
    stream = TlsStream(sock, context, hostname=hostname)
    try:
        while not stream.handshake():
            if stream.engine.ended:
                raise TlsError("the peer closed the connection during the TLS handshake")
            _wait([sock], [sock] if stream.unsent else [], remaining(deadline))
        bindings = stream.engine.bindings
        program_end, bridge_end = socket.socketpair()
    except BaseException:
        stream.close()
        raise
    try:
        threading.Thread(
            target=_Bridge(stream, bridge_end).run, name="brokerd channel", daemon=True
        ).start()
    except BaseException as error:
        for each in (stream, bridge_end, program_end):
            each.close()
        if isinstance(error, RuntimeError):
            raise OSError(str(error)) from error  # the system has no more threads
        raise
    return program_end, bindings


class _Bridge:
    """The thread between the TLS stream and the program's socket.

    Each direction holds one piece at most, and reads the next when that is written.
    """

    def __init__(self, stream: TlsStream, plain: socket.socket) -> None:
        plain.setblocking(False)
        self._stream = stream
        self._plain = plain
        #: Bytes on their way to the program, and to the broker.
        self._inward = memoryview(b"")
        self._outward = memoryview(b"")
        self._inward_ended = False
        self._outward_ended = False
        forks.register(self)

    def _after_fork(self) -> None:
        """Close the copies in a forked child.

        A connection that the child has inherited would otherwise never see its end.
        """
        self._plain.close()
        self._stream.close()

    def run(self) -> None:
        """Pass bytes on until both directions have ended, or one side is gone."""
        try:
            while not (self._inward_ended and self._outward_ended and not self._stream.unsent):
                moved = self._move_inward()
                moved = self._move_outward() or moved
                if not moved and not self._wait():
                    break
        except OSError:
            # The program learns of a broken connection as of an ended one.
            pass
        finally:
            self._plain.close()
            self._stream.close()

    def _move_inward(self) -> bool:
        """Pass on a piece from the broker; return whether any byte has moved."""
        if self._inward_ended:
            return False
        with contextlib.suppress(BlockingIOError):
            if not self._inward:
                data = self._stream.recv(_PIECE)
                if not data:
                    self._inward_ended = True
                    self._plain.shutdown(socket.SHUT_WR)
                    return True
                self._inward = memoryview(data)
            try:
                self._inward = self._inward[self._plain.send(self._inward) :]
            except ConnectionError:
                # The program has closed its end; what it has sent before is still sent.
                self._inward_ended = True
            return True
        return False

    def _move_outward(self) -> bool:
        """Pass on a piece from the program; return whether any byte has moved."""
        with contextlib.suppress(BlockingIOError):
            if not self._outward and not self._outward_ended:
                try:
                    data = self._plain.recv(_PIECE)
                except ConnectionError:
                    # The program has closed its end, and had not read everything.
                    data = b""
                if not data:
                    self._outward_ended = True
                    self._stream.finish()
                    return True
                self._outward = memoryview(data)
            if self._outward:
                self._outward = self._outward[self._stream.send(self._outward) :]
                return True
        self._stream.flush()
        return False

    def _wait(self) -> bool:
        """Wait until bytes can move; return False if the program has closed its end."""
        reads: list[socket.socket] = []
        writes: list[socket.socket] = []
        if not self._inward_ended:
            (writes if self._inward else reads).append(
                self._plain if self._inward else self._stream.raw
            )
        if self._outward or self._stream.unsent:
            writes.append(self._stream.raw)
        if not self._outward and not self._outward_ended:
            reads.append(self._plain)
        all_sent = self._outward_ended and not self._stream.unsent
        return not _wait(reads, writes, None, self._plain if all_sent else None)


def _wait(
    reads: list[socket.socket],
    writes: list[socket.socket],
    timeout: float | None,
    watched: socket.socket | None = None,
) -> bool:
    """Wait for the sockets; return whether the peer of ``watched`` has closed its end."""
    if not hasattr(select, "poll"):
        select.select(reads, writes, [], timeout)
        return False
    masks: dict[int, int] = {} if watched is None else {watched.fileno(): 0}
    for sock in reads:
        masks[sock.fileno()] = select.POLLIN
    for sock in writes:
        masks[sock.fileno()] = masks.get(sock.fileno(), 0) | select.POLLOUT
    poll = select.poll()
    for descriptor, mask in masks.items():
        poll.register(descriptor, mask)
    ready = poll.poll(None if timeout is None else 1000 * timeout)
    return watched is not None and any(
        descriptor == watched.fileno() and event & select.POLLHUP for descriptor, event in ready
    )
