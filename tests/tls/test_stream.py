"""TLS connections that end in the middle of a record, and the bytes kept for a peer
that does not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.interruption import RETURN, in_own_thread, interrupted_at
from support.tls.authority import Issued

from brokerd_client.address import Address
from brokerd_client.aio.tls_transport import Encrypting, dial_tls
from brokerd_client.aio.transport import Resolver, Transport
from brokerd_client.blocking.tls_transport import TlsTransport
from brokerd_client.errors import TlsError
from brokerd_client.tls.engine import Engine
from brokerd_client.tls.stream import TlsStream

#: The bytecodes that end a call. No handler of the call covers them, and the interpreter
#: looks for no signals there.
AT_THE_RETURN = (RETURN, "LOAD_FAST", "LOAD_FAST_BORROW")


class Answering:
    """An engine whose peer asks for answers, for example by key updates, and sends
    nothing else.
    """

    more = ended = False

    def read_into(self, view: memoryview) -> int:
        """Return no payload."""
        return 0

    def output(self) -> bytes:
        """Return another answer each time."""
        return bytes(32 * 1024)


class Breaking:
    """A socket that takes a number of bytes, and then fails as reset."""

    def __init__(self, sock: socket.socket, left: int) -> None:
        self._sock = sock
        self._left = left

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def send(self, data: bytes) -> int:
        if not self._left:
            raise ConnectionResetError(errno.ECONNRESET, "gone")
        sent = self._sock.send(data[: self._left])
        self._left -= sent
        return sent


@pytest.fixture
def ends(server: Issued, trusting: ssl.SSLContext) -> Iterator[tuple[TlsStream, TlsStream]]:
    """Both ends of one channel: the listener's, the client's."""
    with both_ends(server, trusting) as ends:
        yield ends


@contextlib.contextmanager
def both_ends(server: Issued, trusting: ssl.SSLContext) -> Iterator[tuple[TlsStream, TlsStream]]:
    """Yield both ends of one channel: the listener's, the client's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.certificate, server.key)
    # As in a listener: then no bytes are unread when a test closes an end.
    context.num_tickets = 0
    sockets = socket.socketpair()
    for sock in sockets:
        sock.setblocking(False)
    listener = TlsStream(sockets[0], context, end_point=b"-")
    client = TlsStream(sockets[1], trusting, hostname="127.0.0.1")
    for _ in range(20):
        # Each side goes as far as it can.
        if [listener.handshake(), client.handshake()] == [True, True]:
            break
    yield listener, client
    for sock in sockets:
        sock.close()


def test_tls_stream_unread_answers_are_bounded(trusting: ssl.SSLContext) -> None:
    """A peer that makes TLS answer again and again and does not read is disconnected.
    Few bytes are kept until then.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(bytes(65536))
        stream = TlsStream(ours, trusting, hostname="localhost")
        stream.engine = Answering()  # type: ignore[assignment]
        for _ in range(3):
            with pytest.raises(BlockingIOError):
                stream.recv_into(memoryview(bytearray(1024)))
        with pytest.raises(TlsError, match="does not read the answers"):
            stream.recv_into(memoryview(bytearray(1024)))


def test_tls_stream_received_bytes_are_read_after_failed_write(
    ends: tuple[TlsStream, TlsStream],
) -> None:
    """The last bytes of a peer that has disconnected with unread bytes are read, and
    then its end.
    """
    ours, theirs = ends
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(bytes(32768))
    assert ours.unsent
    theirs.send(b"the last")
    theirs.close()
    assert ours.recv(100) == b"the last"
    with contextlib.suppress(ConnectionResetError):
        assert ours.recv(100) == b""


def test_tls_stream_bytes_sent_before_reset_count_as_sent(
    ends: tuple[TlsStream, TlsStream],
) -> None:
    """The bytes that left may contain a whole message, which must not be returned as
    not sent. The next write fails.
    """
    ours, theirs = ends
    ours.raw = Breaking(ours.raw, 20_000)  # type: ignore[assignment]
    assert ours.send(b"m" * 32768) == 32768
    with pytest.raises(ConnectionResetError):
        ours.send(b"more")
    came = b""
    for _ in range(50):
        with contextlib.suppress(BlockingIOError):
            came += theirs.recv(32768)
    assert came == b"m" * 16384


def test_tls_transport_bytes_written_before_reset_count_as_written(
    ends: tuple[TlsStream, TlsStream],
) -> None:
    """The rest waits, and an attempt to write it fails."""
    ours, _ = ends
    channel = TlsTransport(
        Address("AF_INET", host="127.0.0.1", port=1, tls=True), ssl.create_default_context()
    )
    try:
        channel._stream = ours
        ours.raw = Breaking(ours.raw, 40_000)  # type: ignore[assignment]
        assert channel.write(bytes(100_000)) == 65536
        assert len(channel.backlog) == 100_000 - 65536
        with pytest.raises(ConnectionResetError):
            channel.flush()
    finally:
        channel.close()


def test_tls_stream_small_read_allocates_no_large_buffer(ends: tuple[TlsStream, TlsStream]) -> None:
    """Decrypted bytes go through an existing buffer, whatever size is asked for."""
    ours, theirs = ends
    theirs.send(b"first")
    assert ours.recv(65536) == b"first"
    theirs.send(b"second")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        assert ours.recv(65536) == b"second"
        # The size of a system read is half of this.
        assert tracemalloc.get_traced_memory()[1] - before < 48 * 1024
    finally:
        tracemalloc.stop()


def test_tls_stream_flood_of_small_records_keeps_reads_small(
    ends: tuple[TlsStream, TlsStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that sends records of single bytes is read in small pieces. Reads that find no
    bytes do not change that.
    """
    ours, theirs = ends
    flood = b""
    while len(flood) < 3 * 32768:
        theirs.engine.write(b"x")
        flood += theirs.engine.output()
    fed: list[int] = []
    feed = Engine.feed
    monkeypatch.setattr(
        Engine, "feed", lambda self, data: (fed.append(len(data)), feed(self, data))[1]
    )
    for start in range(0, len(flood), 32768):
        theirs.raw.sendall(flood[start : start + 32768])
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.recv(65536)
    assert max(fed) == 4096


@pytest.mark.parametrize("size", [1, 30, 1000])
@pytest.mark.parametrize("end", ["close", "shutdown"])
def test_tls_stream_cut_within_record_is_end(
    ends: tuple[TlsStream, TlsStream], size: int, end: str
) -> None:
    """Whatever part of a record is missing, none of it is read. The end follows."""
    ours, theirs = ends
    theirs.send(b"whole")
    theirs.engine.write(b"x" * 1200)
    theirs.raw.send(theirs.engine.output()[:size])
    _end(theirs.raw, end)
    assert ours.recv(4096) == b"whole"
    assert ours.recv(4096) == b""
    # Every further read returns the end too.
    assert ours.recv(4096) == b""


def _end(sock: socket.socket, how: str) -> None:
    act: dict[str, Callable[[], None]] = {
        "close": sock.close,
        "shutdown": lambda: sock.shutdown(socket.SHUT_WR),
    }
    act[how]()


def test_tls_stream_write_after_peer_close_is_error(ends: tuple[TlsStream, TlsStream]) -> None:
    """The error does not speak of a failed handshake, which an earlier end of the
    connection would be.
    """
    ours, theirs = ends
    theirs.close()
    assert ours.recv(4096) == b""
    with pytest.raises(TlsError, match="the peer has closed the connection"):
        ours.engine.write(b"x")


def test_aio_tls_transport_write_after_peer_close_aborts(
    ends: tuple[TlsStream, TlsStream],
) -> None:
    """The caller learns of it as of any lost connection, and not by an error in the
    middle of a send.
    """

    class Raw:
        aborted = False

        def abort(self) -> None:
            self.aborted = True

    ours, theirs = ends
    theirs.close()
    assert ours.recv(4096) == b""
    raw = Raw()
    Encrypting(ours.engine, raw).write(b"x")  # type: ignore[arg-type]
    assert raw.aborted


def test_aio_tls_transport_altered_record_ends_connection_at_once(
    server: Issued, trusting: ssl.SSLContext
) -> None:
    """Bytes altered on the way end an asyncio connection at once, and not after all
    pending bytes are written.
    """

    class Owner:
        def __init__(self) -> None:
            self.opened, self.lost = asyncio.Event(), asyncio.get_running_loop().create_future()

        def _on_open(self, connection: Transport) -> None:
            connection.asyncio_transport.write(bytes(50_000_000))
            self.opened.set()

        def _on_data(self, connection: Transport, data: bytes) -> None: ...

        def _on_writable(self, connection: Transport) -> None: ...

        def _on_lost(self, connection: Transport, error: Exception | None) -> None:
            self.lost.set_result(error)

    def shake_hands(listener: socket.socket) -> ssl.SSLSocket:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(server.certificate, server.key)
        return context.wrap_socket(listener.accept()[0], server_side=True)

    async def main() -> None:
        owner = Owner()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            shaken = asyncio.create_task(asyncio.to_thread(shake_hands, listener))
            await dial_tls(
                Address("AF_INET", *listener.getsockname(), tls=True), trusting, owner, Resolver()
            )
            peer = await shaken
            await owner.opened.wait()
            with socket.socket(fileno=peer.detach()) as bare:
                bare.send(b"\x17\x03\x03\x00\x20" + bytes(32))
                assert isinstance(await asyncio.wait_for(owner.lost, 10), TlsError)

    asyncio.run(main())


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("read", ["recv", "recv_into"])
@in_own_thread
def test_tls_stream_read_interrupted_at_any_bytecode_skips_no_bytes(
    server: Issued, trusting: ssl.SSLContext, read: str, step: int
) -> None:
    """The next read begins where the interrupted one did, or fails. It never begins
    behind bytes that no caller has seen.
    """
    buffer = bytearray(1000)

    def receive(stream: TlsStream) -> bytes:
        if read == "recv":
            return stream.recv(1000)
        return bytes(buffer[: stream.recv_into(memoryview(buffer))])

    torn = 0
    with both_ends(server, trusting) as (listener, client):
        listener.send(b"first")
        # The first tracing of a process in Python 3.12 sees no bytecodes.
        interrupted_at(sys.maxsize, lambda: receive(client))
    for bytecode in range(0, 1000, step):
        with both_ends(server, trusting) as (listener, client):
            listener.send(b"first")
            interrupted = interrupted_at(bytecode, lambda: receive(client))
            if not interrupted:
                break
            listener.send(b"second")
            try:
                assert receive(client) == b"firstsecond" or interrupted in AT_THE_RETURN, bytecode
            except TlsError:
                torn += 1
    assert bytecode > step * torn > 50


@in_own_thread
def test_tls_stream_write_interrupted_at_any_bytecode_is_not_repeated(
    server: Issued, trusting: ssl.SSLContext
) -> None:
    """A caller that does not know whether a write was accepted can't continue to write
    behind it.
    """
    with both_ends(server, trusting) as (_, client):
        # The first tracing of a process in Python 3.12 sees no bytecodes.
        interrupted_at(sys.maxsize, lambda: client.send(b"first"))
    for bytecode in range(1000):
        with both_ends(server, trusting) as (listener, client):
            interrupted = interrupted_at(bytecode, lambda: client.send(b"first"))
            with contextlib.suppress(TlsError):
                client.send(b"second")
            with contextlib.suppress(OSError):
                client.flush()
            received = b""
            # A lost record invalidates the following ones, and the peer's TLS fails.
            with contextlib.suppress(BlockingIOError, TlsError):
                while True:
                    received += listener.recv(1000)
            assert (
                received in (b"", b"first", b"second")
                or not interrupted
                or interrupted in AT_THE_RETURN
            ), bytecode
            if not interrupted:
                assert received == b"firstsecond"
                break
    assert bytecode > 50
