"""TLS when its connection ends in the middle of something, and what is kept for a peer
that does not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.interruption import RETURN, interrupted_at
from support.tls.authority import Issued

from brokerd_client.address import Address
from brokerd_client.aio.tls_transport import _Encrypting, dial_tls
from brokerd_client.aio.transport import Resolver, Transport
from brokerd_client.blocking.tls_transport import TlsTransport
from brokerd_client.errors import TlsError
from brokerd_client.tls.engine import Engine
from brokerd_client.tls.stream import TlsStream

#: The bytecodes that end a call. No handler of the call covers them, and the interpreter
#: looks for no signals there.
AT_THE_RETURN = (RETURN, "LOAD_FAST", "LOAD_FAST_BORROW")


class Answering:
    """An engine whose peer asks it for answers, as it may by updates of its keys, and
    sends nothing else.
    """

    more = ended = False

    def read_into(self, view: memoryview) -> int:
        """Nothing for anybody."""
        return 0

    def output(self) -> bytes:
        """An answer, each time."""
        return bytes(32 * 1024)


class Breaking:
    """A socket that takes so many bytes, and then says that the connection is gone."""

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
    """Make both ends of one channel: the listener's, the client's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.certificate, server.key)
    # As a listener has it: nothing is unread then where a test closes an end.
    context.num_tickets = 0
    sockets = socket.socketpair()
    for sock in sockets:
        sock.setblocking(False)
    listener = TlsStream(sockets[0], context, end_point=b"-")
    client = TlsStream(sockets[1], trusting, hostname="127.0.0.1")
    for _ in range(20):
        # Each as far as it gets.
        if [listener.handshake(), client.handshake()] == [True, True]:
            break
    yield listener, client
    for sock in sockets:
        sock.close()


def test_answers_that_nobody_reads_are_bounded(trusting: ssl.SSLContext) -> None:
    """A peer that has TLS answer again and again and does not read is given up; little
    is kept until then.
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


def test_what_came_counts_though_nothing_can_be_written_any_more(
    ends: tuple[TlsStream, TlsStream],
) -> None:
    """Last bytes of a peer that is gone with unread ones are read, and then its end."""
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


def test_what_was_sent_before_the_connection_broke_counts_as_sent(
    ends: tuple[TlsStream, TlsStream],
) -> None:
    """A whole message may be in what has left: it must not be given back as not sent.
    The next write fails.
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


def test_a_channel_tells_how_much_went_before_it_broke(ends: tuple[TlsStream, TlsStream]) -> None:
    """What was written before counts as written; the rest waits, and trying it fails."""
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


def test_a_small_read_takes_no_large_buffer(ends: tuple[TlsStream, TlsStream]) -> None:
    """What is decrypted goes through a buffer that is there already, however much is
    asked for.
    """
    ours, theirs = ends
    theirs.send(b"first")
    assert ours.recv(65536) == b"first"
    theirs.send(b"second")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        assert ours.recv(65536) == b"second"
        # What the system is asked for is half as much.
        assert tracemalloc.get_traced_memory()[1] - before < 48 * 1024
    finally:
        tracemalloc.stop()


def test_a_read_of_nothing_does_not_make_up_for_a_flood(
    ends: tuple[TlsStream, TlsStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sends records of single bytes is read in sips, however often the system has
    had no more of them.
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
def test_a_cut_inside_a_record_ends_it(
    ends: tuple[TlsStream, TlsStream], size: int, end: str
) -> None:
    """Whatever part of a record is missing, nothing of it is read, and then there is
    the end.
    """
    ours, theirs = ends
    theirs.send(b"whole")
    theirs.engine.write(b"x" * 1200)
    theirs.raw.send(theirs.engine.output()[:size])
    _end(theirs.raw, end)
    assert ours.recv(4096) == b"whole"
    assert ours.recv(4096) == b""
    # And again, if somebody asks.
    assert ours.recv(4096) == b""


def _end(sock: socket.socket, how: str) -> None:
    act: dict[str, Callable[[], None]] = {
        "close": sock.close,
        "shutdown": lambda: sock.shutdown(socket.SHUT_WR),
    }
    act[how]()


def test_a_write_after_the_end_says_what_happened(ends: tuple[TlsStream, TlsStream]) -> None:
    """It is no failed handshake, which the end of a connection before it would be."""
    ours, theirs = ends
    theirs.close()
    assert ours.recv(4096) == b""
    with pytest.raises(TlsError, match="the peer has closed the connection"):
        ours.engine.write(b"x")


def test_an_asyncio_write_after_the_end_ends_the_connection(
    ends: tuple[TlsStream, TlsStream],
) -> None:
    """Whoever writes hears of it as of any connection that is gone, not by an error in
    the middle of a send.
    """

    class Raw:
        aborted = False

        def abort(self) -> None:
            self.aborted = True

    ours, theirs = ends
    theirs.close()
    assert ours.recv(4096) == b""
    raw = Raw()
    _Encrypting(ours.engine, raw).write(b"x")  # type: ignore[arg-type]
    assert raw.aborted


def test_broken_tls_is_an_end_though_the_peer_takes_nothing(
    server: Issued, trusting: ssl.SSLContext
) -> None:
    """What somebody has altered on the way ends an asyncio connection at once, and not
    when all is written.
    """

    class Told:
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
        told = Told()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            shaken = asyncio.create_task(asyncio.to_thread(shake_hands, listener))
            await dial_tls(
                Address("AF_INET", *listener.getsockname(), tls=True), trusting, told, Resolver()
            )
            peer = await shaken
            await told.opened.wait()
            with socket.socket(fileno=peer.detach()) as bare:
                bare.send(b"\x17\x03\x03\x00\x20" + bytes(32))
                assert isinstance(await asyncio.wait_for(told.lost, 10), TlsError)

    asyncio.run(main())


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("read", ["recv", "recv_into"])
def test_read_of_tls_interrupted_at_any_bytecode_never_skips_bytes(
    server: Issued, trusting: ssl.SSLContext, read: str, step: int
) -> None:
    """The next read begins where the interrupted one did, or fails: never behind bytes
    that no caller has seen.
    """
    buffer = bytearray(1000)

    def receive(stream: TlsStream) -> bytes:
        if read == "recv":
            return stream.recv(1000)
        return bytes(buffer[: stream.recv_into(memoryview(buffer))])

    torn = 0
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


def test_write_of_tls_interrupted_at_any_bytecode_is_never_repeated(
    server: Issued, trusting: ssl.SSLContext
) -> None:
    """A caller that does not know whether a write was taken can't write on behind it."""
    for bytecode in range(1000):
        with both_ends(server, trusting) as (listener, client):
            interrupted = interrupted_at(bytecode, lambda: client.send(b"first"))
            with contextlib.suppress(TlsError):
                client.send(b"second")
            with contextlib.suppress(OSError):
                client.flush()
            heard = b""
            # A record that was lost spoils what follows, and the peer's TLS says so.
            with contextlib.suppress(BlockingIOError, TlsError):
                while True:
                    heard += listener.recv(1000)
            assert (
                heard in (b"", b"first", b"second")
                or not interrupted
                or interrupted in AT_THE_RETURN
            ), bytecode
            if not interrupted:
                assert heard == b"firstsecond"
                break
    assert bytecode > 50
