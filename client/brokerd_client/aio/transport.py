"""The transport of an asyncio client: one connection, from connecting to its end.

A part of the asyncio face. It reports events to its client and does not interpret the
bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, cast

from brokerd_client._common.keepalive import DEFAULT_S, LOOKS, TCP, Silence, has_ended, keep_alive
from brokerd_client._common.lookup import Candidate, Lookup, numeric
from brokerd_client._common.pipe_bridge import BridgedSocket, dial_pipe
from brokerd_client.address import Address, validate_family

if TYPE_CHECKING:
    from brokerd_client.aio.base import BaseClient

__all__ = ["Resolver", "Transport", "dial"]

#: Most bytes per read. The buffer for them exists once: the event loop would allocate 256
#: KiB for each read, which the system maps and unmaps.
_PIECE: Final = 64 * 1024
#: Seconds until a listener whose queue of new connections is full is tried again.
_CROWDED_S: Final = 0.01


class Transport(asyncio.BufferedProtocol):
    """A connection that reports its events to its client.

    Methods called by the event loop raise no exception of any type. The loop would only
    log it, and the client would look alive. An exception ends the connection instead.
    """

    asyncio_transport: asyncio.Transport

    def __init__(self, client: BaseClient) -> None:
        self._client = client
        self._buffer = memoryview(bytearray(_PIECE))
        #: Done when the connection is closed and its resources are freed.
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.paused = False
        self.reading = True
        #: Whether the peer is known to send no more bytes; its last bytes may be
        #: unread.
        self.ended = False
        #: Bytes passed to the transport that it may not have written yet.
        self.unwritten = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio.BufferedProtocol: the connection is made."""
        self.asyncio_transport = cast("asyncio.Transport", transport)
        try:
            self._made()
        except BaseException as error:  # noqa: BLE001 - a bug, or an exit, which _on_bug raises again
            self._on_bug(error)

    def _made(self) -> None:
        self.prepare()
        self._client._on_open(self)

    def _on_bug(self, error: BaseException) -> None:
        self._client._on_bug(self, error)

    def has_ended(self) -> bool:
        """Return, without reading, whether the peer sends no more bytes.

        False if the system does not tell.
        """
        sock = self.asyncio_transport.get_extra_info("socket")
        if sock is not None and not self.asyncio_transport.is_closing():
            self.ended = has_ended(sock)
        return self.ended

    def abort(self) -> None:
        """Close the connection at once."""
        self.asyncio_transport.abort()

    @property
    def bindings(self) -> Mapping[str, bytes]:
        """The channel bindings of the key: none without TLS."""
        return {}

    def prepare(self) -> None:
        """Set up the transport."""
        transport = self.asyncio_transport
        # With this limit, "paused" means exactly that some bytes are not written yet.
        transport.set_write_buffer_limits(high=0)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in TCP:
            # A peer whose machine is gone never closes the connection. Reading reports
            # a peer that has closed it already.
            with contextlib.suppress(OSError):
                keep_alive(sock, DEFAULT_S)
            self._check_peer(sock, Silence())

    def _check_peer(self, sock: object, silence: Silence) -> None:
        """Check at intervals whether the peer still answers; if not, report the loss."""
        loop = self.closed.get_loop()
        if self.closed.done():
            return
        try:
            remaining_s = silence.remaining_s(sock, loop.time(), DEFAULT_S)
            if remaining_s <= 0:
                self._read_out()
                self._client._on_lost(self, OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
            else:
                self._timer = loop.call_later(
                    min(DEFAULT_S / LOOKS, remaining_s), self._check_peer, sock, silence
                )
        except BaseException as error:  # noqa: BLE001 - a bug, or an exit, which _on_bug raises again
            self._on_bug(error)

    def get_buffer(self, sizehint: int) -> memoryview:
        """asyncio.BufferedProtocol: return where the next bytes go."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """asyncio.BufferedProtocol: bytes have arrived in the buffer."""
        # The same as data_received, without the call.
        try:
            self._received(self._buffer[:nbytes].tobytes())
        except BaseException as error:  # noqa: BLE001 - a bug, or an exit, which _on_bug raises again
            self._on_bug(error)

    def data_received(self, data: bytes) -> None:
        """Handle bytes that have arrived."""
        try:
            self._received(data)
        except BaseException as error:  # noqa: BLE001 - a bug, or an exit, which _on_bug raises again
            self._on_bug(error)

    def _received(self, data: bytes) -> None:
        self._client._on_data(self, data)

    def pause_writing(self) -> None:
        """asyncio.BufferedProtocol: some bytes are not written yet."""
        self.paused = True
        self._note_writable()

    def resume_writing(self) -> None:
        """asyncio.BufferedProtocol: all bytes are written."""
        self.paused = False
        self._note_writable()

    def _note_writable(self) -> None:
        try:
            self._client._on_writable(self)
        except BaseException as error:  # noqa: BLE001 - a bug, or an exit, which _on_bug raises again
            self._on_bug(error)

    def eof_received(self) -> None:
        """asyncio.BufferedProtocol: the peer sends no more bytes.

        The connection is aborted: a close would wait for a peer that is gone to read.
        """
        self.asyncio_transport.abort()

    def _read_out(self) -> None:
        """Read the input that has arrived; the event loops drop it when a write fails."""
        sock = self.asyncio_transport.get_extra_info("socket")
        if sock is None:
            return
        pieces: list[bytes] = []
        with (
            contextlib.suppress(OSError),
            socket.fromfd(sock.fileno(), sock.family, sock.type) as copy,
        ):
            copy.setblocking(False)
            while piece := copy.recv(_PIECE):
                pieces.append(piece)
        if pieces:
            self.data_received(b"".join(pieces))

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio.BufferedProtocol: the connection is closed or lost."""
        try:
            if isinstance(error, OSError):
                self._read_out()
        finally:
            if not self.closed.done():
                self.closed.set_result(None)
            if self._timer is not None:
                self._timer.cancel()
            try:
                self._client._on_lost(self, error)
            except BaseException as bug:  # noqa: BLE001 - a bug, or an exit, which _on_bug raises again
                self._on_bug(bug)


class Resolver:
    """The look-up of host names for one client, in a separate thread.

    It does not use the event loop's executor: a look-up can't be cancelled, and
    asyncio.run waits for the executor's threads. If a look-up outlasts an attempt to
    connect, the next attempt uses it. So there is one thread at most.
    """

    def __init__(self) -> None:
        self._lookup: Lookup | None = None
        self._looked_up: tuple[str, int] | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def find(self, host: str, port: int) -> list[Candidate]:
        """Return the host's addresses; an address needs no look-up. Raises OSError."""
        addresses = numeric(host, port)
        if addresses is not None:
            return addresses
        loop = asyncio.get_running_loop()
        lookup = self._lookup
        if lookup is None or self._looked_up != (host, port):
            lookup = self._lookup = Lookup(host, port, lambda: self._notify(loop))
            self._looked_up = host, port
        while not lookup.done:
            # An earlier look-up, of another address, may wake this one too.
            self._waiter = waiter = loop.create_future()
            await waiter
        self._lookup = None
        return lookup.result()

    def _notify(self, loop: asyncio.AbstractEventLoop) -> None:
        # A loop that is closed has no waiting task.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def dial(
    address: Address, protocol: Callable[[], Transport], resolver: Resolver | None = None
) -> None:
    """Connect to the address.

    Raises OSError, or AddressError if this machine does not support the address's
    family.
    """
    loop = asyncio.get_running_loop()
    validate_family(address.family)
    if address.family == "AF_PIPE":
        while (pipe := _try_pipe(address.path)) is None:  # noqa: ASYNC110 - a pipe reports nothing
            await asyncio.sleep(_CROWDED_S)
        try:
            await loop.create_connection(protocol, sock=pipe)
        except BaseException:
            pipe.close()
            raise
    elif address.family == "AF_UNIX":
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.setblocking(False)
            # The event loops mistake "the queue of new connections is full" for "in
            # progress".
            while not _try_socket(sock, address.path):  # noqa: ASYNC110 - nothing reports room
                await asyncio.sleep(_CROWDED_S)
            await loop.create_unix_connection(protocol, sock=sock)
        except BaseException:
            sock.close()
            raise
    else:
        error = OSError(f"{address.host} has no address")
        for family, sockaddr in await (resolver or Resolver()).find(address.host, address.port):
            host, port = cast("tuple[str, int]", sockaddr[:2])
            try:
                await loop.create_connection(protocol, host, port, family=family)
            except OSError as failed:
                error = failed
            else:
                return
        raise error


def _try_pipe(name: str) -> BridgedSocket | None:
    try:
        return dial_pipe(name)
    except BlockingIOError:
        return None


def _try_socket(sock: socket.socket, path: str) -> bool:
    try:
        sock.connect(path)
    except BlockingIOError:
        return False
    return True
