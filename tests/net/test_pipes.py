"""Named pipes without Windows: the bridge to a socket, the listener, and a broker that
serves a pipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.fake_pipe import TIMEOUT_S, FakePipe, FakePipeServer, PipeRaw, fake_pipes
from support.keys import key_of
from support.raw_client import (
    ERROR,
    FAILURE,
    MESSAGE,
    RECEIPT,
    REPLY,
    REQUEST,
    WANT_RECEIPT,
    Rejected,
    login,
    packed,
    prefixed,
)
from support.running_daemon import RunningDaemon, configuration, running_daemon

import brokerd_client._common.pipe_bridge
from brokerd.config.model import Config
from brokerd.net.connection import connection as connection
from brokerd.net.listen import acceptor
from brokerd.net.listen import listener as listening
from brokerd.net.listen.named_pipes import PipeListener, open_pipe
from brokerd_client._common.pipe_bridge import BridgedSocket, bridge
from brokerd_client.address import Address

PIPE = Address("AF_PIPE", path=r"\\.\pipe\brokerd-test")
SIZES = [0, 1, 12, 4095, 4096, 4097, 65536, 100_000, 5 * 2**20]


def threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("named pipe")]


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Check that every thread of a bridge has ended when the test has."""
    yield
    for each in threads():
        each.join(TIMEOUT_S)
    assert threads() == []


class Bridged:
    """A bridge between a socket and a pipe, whose far end is ``peer``."""

    def __init__(self) -> None:
        self.pipe, self.peer = fake_pipes()
        self.sock = bridge(self.pipe)
        self.sock.settimeout(TIMEOUT_S)

    def read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self.sock.recv(min(size - len(data), 1 << 20))
            assert piece, f"closed after {len(data)} of {size} bytes"
            data += piece
        return bytes(data)

    def in_thread(self, function: Callable[..., object], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=function, args=arguments)
        thread.start()
        return thread


@pytest.fixture
def bridged() -> Iterator[Bridged]:
    made = Bridged()
    yield made
    made.sock.close()
    if not made.peer.closed:
        made.peer.close()
    made.pipe.wait_until_closed()


# The bridge


@pytest.mark.parametrize("size", SIZES)
def test_pipe_bridge_message_becomes_frame(bridged: Bridged, size: int) -> None:
    """The socket gives the message's length and bytes, and the next frame right after
    it.
    """
    body = os.urandom(size)
    writing = bridged.in_thread(lambda: [bridged.peer.write(each) for each in (body, b"next")])
    assert bridged.read(4 + size) == prefixed(body)
    assert bridged.read(8) == prefixed(b"next")
    writing.join(TIMEOUT_S)


@pytest.mark.parametrize("size", SIZES)
def test_pipe_bridge_frame_becomes_message(bridged: Bridged, size: int) -> None:
    """The peer gets a frame of any size as one message, and the next frame as another."""
    body = os.urandom(size)
    writing = bridged.in_thread(bridged.sock.sendall, prefixed(body) + prefixed(b"next"))
    assert bridged.peer.message() == body
    assert bridged.peer.message() == b"next"
    writing.join(TIMEOUT_S)


def test_pipe_bridge_frame_in_single_bytes_becomes_one_message(bridged: Bridged) -> None:
    """A message is written when its frame is complete, not before."""
    bridged.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    for byte in prefixed(b"in small pieces"):
        bridged.sock.sendall(bytes([byte]))
    assert bridged.peer.message() == b"in small pieces"


def test_pipe_bridge_message_is_not_buffered(bridged: Bridged) -> None:
    """The socket gives its length at once. The bridge takes no more of it from the pipe
    than the socket has room for.
    """
    size = 64 * 2**20
    writing = bridged.in_thread(_write_until_closed, bridged.peer, size)
    assert struct.unpack("!i", bridged.read(4)) == (size,)
    assert bridged.pipe.taken < 4 * 2**20
    bridged.sock.close()
    bridged.pipe.wait_until_closed()
    writing.join(TIMEOUT_S)


def _write_until_closed(pipe: FakePipe, size: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        pipe.write(bytes(size))


def test_pipe_bridge_directions_do_not_wait_for_each_other(bridged: Bridged) -> None:
    """This holds when both directions are full, too."""
    count, body = 50, os.urandom(100_000)
    work = [
        bridged.in_thread(lambda: [bridged.sock.sendall(prefixed(body)) for _ in range(count)]),
        bridged.in_thread(lambda: [bridged.peer.write(body) for _ in range(count)]),
    ]
    got: list[bytes] = []
    work.append(bridged.in_thread(lambda: got.extend(bridged.peer.message() for _ in range(count))))
    assert bridged.read(count * (4 + len(body))) == prefixed(body) * count
    for each in work:
        each.join(TIMEOUT_S)
    assert got == [body] * count


def test_pipe_bridge_messages_before_peer_close_are_delivered(bridged: Bridged) -> None:
    """The socket gives all of them, and then its end."""
    bridged.peer.write(b"one")
    bridged.peer.write(b"two")
    bridged.peer.close()
    assert bridged.read(14) == prefixed(b"one") + prefixed(b"two")
    assert bridged.sock.recv(1) == b""


def test_pipe_bridge_failed_write_does_not_discard_received_message(bridged: Bridged) -> None:
    """A write that fails because the peer has closed leaves the peer's last message
    readable.
    """
    bridged.peer.write(b"last words")
    bridged.peer.close()
    for _ in range(50):
        bridged.sock.sendall(prefixed(b"too late"))
    assert bridged.read(14) == prefixed(b"last words")
    assert bridged.sock.recv(1) == b""


def test_pipe_bridge_frames_before_shutdown_are_delivered(bridged: Bridged) -> None:
    """After the shutdown of the writing side the peer gets all frames and the end. Then
    the socket ends too.
    """
    bodies = [os.urandom(50_000) for _ in range(20)]
    got: list[bytes] = []
    reading = bridged.in_thread(lambda: got.extend(_messages(bridged.peer)))
    for each in bodies:
        bridged.sock.sendall(prefixed(each))
    bridged.sock.shutdown(socket.SHUT_WR)
    assert bridged.sock.recv(1) == b""
    bridged.pipe.wait_until_closed()
    reading.join(TIMEOUT_S)
    assert got == bodies


def _messages(pipe: FakePipe) -> Iterator[bytes]:
    with contextlib.suppress(EOFError):
        while True:
            yield pipe.message()


def test_pipe_bridge_frames_before_close_are_delivered(bridged: Bridged) -> None:
    """Closing the socket does not discard the frames that the bridge has been given."""
    bridged.sock.sendall(prefixed(b"x" * 20_000) + prefixed(b"last"))
    bridged.sock.close()
    assert list(_messages(bridged.peer)) == [b"x" * 20_000, b"last"]


def test_pipe_bridge_peer_that_does_not_read_is_closed_after_linger(
    bridged: Bridged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bridge closes the pipe LINGER_S after the socket's close, although the peer
    has not read.
    """
    monkeypatch.setattr(brokerd_client._common.pipe_bridge, "LINGER_S", 0.05)
    bridged.sock.sendall(prefixed(bytes(100_000)))
    bridged.sock.close()
    bridged.pipe.wait_until_closed()
    assert not bridged.peer.closed


@pytest.mark.parametrize(
    "garbage", [b"\xff\xff\xff\xf0", b"\xff\xff\xff\xff" + b"\xff" * 8, b"\x00\x00"]
)
def test_pipe_bridge_invalid_frame_closes_pipe(bridged: Bridged, garbage: bytes) -> None:
    """The length is impossible, or more than a pipe takes, or incomplete at the end.
    The peer sees the end.
    """
    bridged.sock.sendall(prefixed(b"good") + garbage)
    bridged.sock.shutdown(socket.SHUT_WR)
    assert list(_messages(bridged.peer)) == [b"good"]
    assert bridged.sock.recv(1) == b""


def test_pipe_bridge_write_error_closes_both_directions(bridged: Bridged) -> None:
    """A system error on a write ends the connection in both directions."""
    bridged.pipe.write_error = OSError(errno.ENOMEM, "no room")
    bridged.sock.sendall(prefixed(b"never arrives"))
    assert bridged.sock.recv(1) == b""
    assert list(_messages_after_end(bridged)) == []


def _messages_after_end(bridged: Bridged) -> Iterator[bytes]:
    bridged.sock.close()
    bridged.pipe.wait_until_closed()
    yield from _messages(bridged.peer)


@pytest.mark.parametrize("started", [0, 1])
def test_pipe_bridge_without_free_thread_is_error(
    monkeypatch: pytest.MonkeyPatch, started: int
) -> None:
    """If the system has no more threads, the caller gets an OSError and the pipe is
    closed.
    """
    pipe, _ = fake_pipes()
    start = threading.Thread.start
    left = [None] * started

    def limited(thread: threading.Thread) -> None:
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(OSError, match="can't start new thread"):
        bridge(pipe)
    pipe.wait_until_closed()


def test_pipe_bridge_without_free_socket_is_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the system has no more sockets, the pipe is closed."""
    pipe, _ = fake_pipes()

    def none_left() -> None:
        raise OSError(errno.EMFILE, "no more")

    monkeypatch.setattr(socket, "socketpair", none_left)
    with pytest.raises(OSError, match="no more"):
        bridge(pipe)
    assert pipe.closed


# Listening


@pytest.fixture
def pipe_server() -> FakePipeServer:
    return FakePipeServer()


@pytest.fixture
def listener(pipe_server: FakePipeServer) -> Iterator[PipeListener]:
    made = PipeListener(pipe_server, PIPE.path)
    yield made
    made.close()


def accepted(listener: PipeListener) -> tuple[BridgedSocket, str]:
    assert select.select([listener.fileno()], [], [], TIMEOUT_S)[0], "no peer connected"
    return listener.accept()


def test_pipe_listener_connections_are_accepted_in_order(
    pipe_server: FakePipeServer, listener: PipeListener
) -> None:
    """More peers than the listener keeps may connect at once. Each has its own socket,
    and the pipe's name.
    """
    peers = [pipe_server.dial() for _ in range(150)]
    for number, peer in enumerate(peers):
        sock, name = accepted(listener)
        assert name == PIPE.path
        peer.write(b"%d" % number)
        sock.settimeout(TIMEOUT_S)
        assert sock.recv(100) == prefixed(b"%d" % number)
        sock.close()
        peer.close()
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_pipe_listener_takes_bounded_number_before_accept(
    pipe_server: FakePipeServer, listener: PipeListener
) -> None:
    """Further peers wait in the system until the server has accepted some."""
    peers = [pipe_server.dial() for _ in range(100)]
    pipe_server.wait_until_taken(65)
    assert len(pipe_server.taken) == 65
    for _ in peers:
        accepted(listener)[0].close()
    for each in peers:
        each.close()


def test_pipe_listener_system_error_is_enobufs_and_retried(
    pipe_server: FakePipeServer, listener: PipeListener
) -> None:
    """For any cause accept() raises ENOBUFS. The same peer is accepted afterwards."""
    pipe_server.failures = [OSError(errno.EINVAL, "not now")]
    peer = pipe_server.dial()
    with pytest.raises(OSError, match="not now") as caught:
        accepted(listener)
    assert caught.value.errno == errno.ENOBUFS
    sock, _ = accepted(listener)
    sock.close()
    peer.close()


def test_pipe_listener_closed_disconnects_peers_not_accepted(
    pipe_server: FakePipeServer, listener: PipeListener
) -> None:
    """An accepted peer keeps its connection. A peer that was taken and one that waits
    see the end.
    """
    inside = pipe_server.dial()
    sock, _ = accepted(listener)
    waiting = [pipe_server.dial() for _ in range(80)]
    pipe_server.wait_until_taken(66)
    listener.close()
    listener.close()
    assert pipe_server.closed
    for each in waiting:
        with pytest.raises(EOFError):
            each.message()
        each.close()
    inside.write(b"still here")
    sock.settimeout(TIMEOUT_S)
    assert sock.recv(100) == prefixed(b"still here")
    sock.close()
    inside.close()


def test_pipe_listener_outside_windows_is_error() -> None:
    """The error says so, also to a caller that bypasses the configuration."""
    with pytest.raises(OSError, match="Windows only"):
        open_pipe(PIPE.path)
    entry = dataclasses.replace(configuration("127.0.0.1:0").listen[0], address=PIPE)
    with pytest.raises(listening.ListenError, match=r"can't listen at .*pipe.*Windows only"):
        listening.listen(entry)


def test_pipe_listener_name_in_use_is_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows says "access denied" for a name in use."""

    def denied(name: str) -> PipeListener:
        raise PermissionError(errno.EACCES, "Access denied.")

    monkeypatch.setattr(listening, "open_pipe", denied)
    entry = dataclasses.replace(configuration("127.0.0.1:0").listen[0], address=PIPE)
    with pytest.raises(listening.ListenError, match="another program listens there"):
        listening.listen(entry)


# A broker that serves a pipe


def piped(config: Config) -> Config:
    """Return the configuration with a pipe listener in front of its own."""
    return dataclasses.replace(
        config, listen=(dataclasses.replace(config.listen[0], address=PIPE), *config.listen)
    )


class Served:
    """A broker that listens at a pipe and at a TCP port."""

    def __init__(self, running_daemon: RunningDaemon, pipe_servers: list[FakePipeServer]) -> None:
        self.running = running_daemon
        self._pipe_servers = pipe_servers

    @property
    def pipe_server(self) -> FakePipeServer:
        return self._pipe_servers[-1]

    def raw(self) -> PipeRaw:
        return PipeRaw(self.pipe_server.dial())

    def login(self, name: str) -> PipeRaw:
        """Return an accepted connection of a client."""
        raw = self.raw()
        try:
            raw.log_in(key_of(name))
            raw.ping()
        except BaseException:
            raw.close()
            raise
        return raw


@contextlib.contextmanager
def served(monkeypatch: pytest.MonkeyPatch, **more: Any) -> Iterator[Served]:
    pipe_servers: list[FakePipeServer] = []

    def open_fake(name: str) -> PipeListener:
        assert name == PIPE.path
        pipe_servers.append(FakePipeServer())
        return PipeListener(pipe_servers[-1], name)

    monkeypatch.setattr(listening, "open_pipe", open_fake)
    with running_daemon(piped(configuration("127.0.0.1:0", **more))) as running:
        assert running.address == PIPE
        yield Served(running, pipe_servers)


@pytest.fixture
def at_pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with served(monkeypatch) as running:
        yield running


@pytest.mark.parametrize("gathers", [True, False], ids=["sendmsg", "send"])
def test_pipe_client_and_tcp_client_exchange_messages(
    at_pipe: Served, monkeypatch: pytest.MonkeyPatch, gathers: bool
) -> None:
    """Messages, large ones too, pass between a pipe and a TCP socket. They also do
    where one piece is sent at a time.
    """
    if not gathers:
        monkeypatch.setattr(connection, "_sendmsg", None)
    big = os.urandom(5 * 2**20)
    with at_pipe.login("alice") as alice, login(at_pipe.running.addresses[1], key_of("bob")) as bob:
        bob.ping()
        for body in (b"hello", big, b"behind it"):
            writing = threading.Thread(target=alice.send, args=(MESSAGE, "bob", body))
            writing.start()
            assert bob.recv().body == body
            writing.join(TIMEOUT_S)
            bob.send(MESSAGE, "alice", body)
            assert alice.recv().body == body
        alice.send(REQUEST, "bob", b"?", message_id=3)
        assert bob.recv().kind == REQUEST
        bob.send(REPLY, "alice", b"!", message_id=3)
        assert alice.recv().body == b"!"
    connected = {
        each.fields["name"]: each.fields for each in at_pipe.running.log.wait("client.connected", 2)
    }
    assert connected["alice"]["peer"] == connected["alice"]["listener"] == PIPE.path
    assert connected["bob"]["peer"].startswith("127.0.0.1:")


def test_pipe_handshake_wrong_key_is_refused(at_pipe: Served) -> None:
    """The peer reads the refusal and the end, and the log names the pipe."""
    raw = at_pipe.raw()
    with pytest.raises(Rejected, match="FAILURE"):
        raw.log_in(b"wrong")
    raw.close()
    assert at_pipe.running.log.wait("client.refused")[0].fields["peer"] == PIPE.path


def test_pipe_handshake_frame_over_256_bytes_closes_connection(at_pipe: Served) -> None:
    """The limit of 256 bytes holds for pipes too, and the rest of the message is not
    waited for.
    """
    raw = at_pipe.raw()
    raw.read_body()
    _write_until_closed(raw.pipe, 2**20)
    # The failure may come too late: the bridge ends with the connection.
    assert raw.read_to_end() in (b"", FAILURE)
    raw.close()
    assert "not a handshake" in at_pipe.running.log.wait("client.refused")[0].fields["reason"]


def test_pipe_message_over_max_message_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is skipped, its sender gets too_large, and the connection stays."""
    with (
        served(monkeypatch, limits={"max_message": "100KiB"}) as broker,
        broker.login("alice") as alice,
    ):
        alice.send(MESSAGE, "bob", bytes(10 * 2**20), message_id=9)
        refusal = alice.recv()
        assert (refusal.kind, refusal.code, refusal.id) == (ERROR, "too_large", 9)
        alice.ping()


def test_pipe_message_without_bytes_is_malformed(at_pipe: Served) -> None:
    """A pipe can carry a message without a byte. The broker answers it like any frame
    without a header.
    """
    with at_pipe.login("alice") as alice:
        alice.pipe.write(b"")
        assert alice.recv().code == "malformed"
        assert alice.is_closed()


def test_pipe_client_closed_is_offline(at_pipe: Served) -> None:
    """Closing the pipe ends the session. Messages sent before that are still routed."""
    with at_pipe.login("alice") as alice:
        bob = at_pipe.login("bob")
        for number in range(100):
            bob.send(MESSAGE, "alice", b"%d" % number)
        bob.close()
        assert [alice.recv().body for _ in range(100)] == [b"%d" % number for number in range(100)]
        disconnected = at_pipe.running.log.wait("client.disconnected")[0]
        assert disconnected.fields["reason"] == "connection closed by the client"
        alice.send(MESSAGE, "bob", b"?", message_id=1)
        assert alice.recv().code == "offline"


def test_drain_queued_messages_are_delivered_over_pipe(at_pipe: Served) -> None:
    """The drain waits until a slow peer of a pipe has everything that was accepted for
    it.
    """
    with at_pipe.login("alice") as alice, at_pipe.login("bob") as bob:
        for number in range(40):
            alice.send(MESSAGE, "bob", bytes(100_000), message_id=number, flags=WANT_RECEIPT)
            assert alice.recv().kind == RECEIPT
        at_pipe.running.stop_soon()
        at_pipe.running.log.wait("daemon.stopping")
        assert [bob.recv().id for _ in range(40)] == list(range(40))
        assert bob.is_closed("shutting_down")
        assert alice.is_closed("shutting_down")
        assert at_pipe.running.log.wait("daemon.stopped")[0].fields["cut_off"] == 0


def test_drain_pipe_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that reads nothing delays the stop no longer than the timeout, and the
    bridge no longer than LINGER_S.
    """
    monkeypatch.setattr(brokerd_client._common.pipe_bridge, "LINGER_S", 0.05)
    with (
        served(monkeypatch, limits={"drain_timeout": "0.2s"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob"),
    ):
        for number in range(40):
            alice.send(MESSAGE, "bob", bytes(100_000), message_id=number, flags=WANT_RECEIPT)
            assert alice.recv().kind == RECEIPT
        broker.running.stop_soon()
        assert broker.running.log.wait("daemon.stopped")[0].fields["cut_off"] == 1
        for pipe in broker.pipe_server.taken:
            pipe.wait_until_closed()


def test_reload_closes_and_opens_pipe_listener(at_pipe: Served) -> None:
    """A pipe removed from the configuration accepts no connections, and its open ones
    stay. Put back, it is served.
    """
    daemon = at_pipe.running.daemon
    with_pipe = daemon.config
    first = at_pipe.pipe_server
    with at_pipe.login("alice") as alice:
        without = dataclasses.replace(with_pipe, listen=with_pipe.listen[1:])
        at_pipe.running.call(lambda: daemon.apply(without, "test"))
        assert first.closed
        assert [each.family for each in at_pipe.running.addresses] == ["AF_INET"]
        alice.ping()
        at_pipe.running.call(lambda: daemon.apply(with_pipe, "test"))
        assert at_pipe.pipe_server is not first
        with at_pipe.login("bob") as bob:
            bob.send(MESSAGE, "alice", b"new")
            assert alice.recv().body == b"new"


def test_pipe_listener_system_error_is_logged_as_paused(at_pipe: Served) -> None:
    """The log says so, and the peer is accepted a moment later."""
    at_pipe.pipe_server.failures = [OSError(errno.ENOMEM, "no room")]
    with at_pipe.login("alice") as alice:
        alice.ping()
    paused = at_pipe.running.log.wait("listener.paused")[0]
    assert paused.fields == {"listener": PIPE.path, "reason": "no room"}


def test_pipe_listener_at_socket_limit_of_event_loop_pauses(
    at_pipe: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Further peers wait, and one is accepted when another has disconnected."""
    monkeypatch.setattr(acceptor, "_MOST_SOCKETS", 2)
    alice, bob = at_pipe.login("alice"), at_pipe.login("bob")
    third = at_pipe.raw()
    at_pipe.running.log.wait("listener.paused", 3)
    assert len(at_pipe.running.log.named("client.connected")) == 2
    alice.close()
    third.log_in(key_of("carol"))
    third.send(MESSAGE, "bob", b"in at last")
    assert bob.recv().body == b"in at last"
    bob.close()
    third.close()


def test_pipe_hundred_clients_are_served_and_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of a hundred connects at once, each request gets a reply, and all
    connections close at the end.
    """
    with served(
        monkeypatch, clients={"crowd": {"connections": 100}}, limits={"handshakes": 200}
    ) as broker:
        everyone = [broker.raw() for _ in range(100)]
        for each in everyone:
            each.log_in(key_of("crowd"))
        for each in everyone:
            each.write(packed(REQUEST, "$broker", b'{"op": "ping"}', message_id=1, codec=2))
        for each in everyone:
            assert each.recv().kind == REPLY
        broker.running.stop_soon()
        for each in everyone:
            assert each.is_closed("shutting_down")
            each.close()
        assert broker.running.log.wait("daemon.stopped")[0].fields["cut_off"] == 0
