"""Named pipes as far as they are no matter of Windows: the bridge to a socket,
listening, a broker that serves one.
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
    """Every thread of a bridge has ended when the test has."""
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

    def aside(self, function: Callable[..., object], *arguments: object) -> threading.Thread:
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
def test_a_message_becomes_a_frame(bridged: Bridged, size: int) -> None:
    """The socket gives the message's length and its bytes, and the next frame right
    behind it.
    """
    body = os.urandom(size)
    writing = bridged.aside(lambda: [bridged.peer.write(each) for each in (body, b"next")])
    assert bridged.read(4 + size) == prefixed(body)
    assert bridged.read(8) == prefixed(b"next")
    writing.join(TIMEOUT_S)


@pytest.mark.parametrize("size", SIZES)
def test_a_frame_becomes_a_message(bridged: Bridged, size: int) -> None:
    """The peer gets a frame as one message, whatever its size, and the next one as
    another.
    """
    body = os.urandom(size)
    writing = bridged.aside(bridged.sock.sendall, prefixed(body) + prefixed(b"next"))
    assert bridged.peer.message() == body
    assert bridged.peer.message() == b"next"
    writing.join(TIMEOUT_S)


def test_a_frame_in_single_bytes_is_one_message(bridged: Bridged) -> None:
    """A message is written when its frame is whole, not before."""
    bridged.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    for byte in prefixed(b"in small pieces"):
        bridged.sock.sendall(bytes([byte]))
    assert bridged.peer.message() == b"in small pieces"


def test_a_message_is_not_collected(bridged: Bridged) -> None:
    """Its length is on the socket at once, and no more of it is taken from the pipe
    than the socket has room for.
    """
    size = 64 * 2**20
    writing = bridged.aside(_write_until_closed, bridged.peer, size)
    assert struct.unpack("!i", bridged.read(4)) == (size,)
    assert bridged.pipe.taken < 4 * 2**20
    bridged.sock.close()
    bridged.pipe.wait_until_closed()
    writing.join(TIMEOUT_S)


def _write_until_closed(pipe: FakePipe, size: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        pipe.write(bytes(size))


def test_both_directions_at_once(bridged: Bridged) -> None:
    """Neither direction waits for the other, also when both are full."""
    count, body = 50, os.urandom(100_000)
    work = [
        bridged.aside(lambda: [bridged.sock.sendall(prefixed(body)) for _ in range(count)]),
        bridged.aside(lambda: [bridged.peer.write(body) for _ in range(count)]),
    ]
    got: list[bytes] = []
    work.append(bridged.aside(lambda: got.extend(bridged.peer.message() for _ in range(count))))
    assert bridged.read(count * (4 + len(body))) == prefixed(body) * count
    for each in work:
        each.join(TIMEOUT_S)
    assert got == [body] * count


def test_what_the_peer_sent_before_it_closed_arrives(bridged: Bridged) -> None:
    """The socket gives everything, and then its end."""
    bridged.peer.write(b"one")
    bridged.peer.write(b"two")
    bridged.peer.close()
    assert bridged.read(14) == prefixed(b"one") + prefixed(b"two")
    assert bridged.sock.recv(1) == b""


def test_what_the_peer_sent_arrives_although_it_can_be_told_nothing_more(bridged: Bridged) -> None:
    """A write that fails because the peer is gone does not cut off what it said before."""
    bridged.peer.write(b"last words")
    bridged.peer.close()
    for _ in range(50):
        bridged.sock.sendall(prefixed(b"too late"))
    assert bridged.read(14) == prefixed(b"last words")
    assert bridged.sock.recv(1) == b""


def test_what_was_written_before_the_shutdown_arrives(bridged: Bridged) -> None:
    """After the writing side is shut down the peer gets everything and the end; then
    the socket ends too.
    """
    bodies = [os.urandom(50_000) for _ in range(20)]
    got: list[bytes] = []
    reading = bridged.aside(lambda: got.extend(_messages(bridged.peer)))
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


def test_what_was_written_before_the_close_arrives(bridged: Bridged) -> None:
    """Closing the socket does not take back what the bridge has been given."""
    bridged.sock.sendall(prefixed(b"x" * 20_000) + prefixed(b"last"))
    bridged.sock.close()
    assert list(_messages(bridged.peer)) == [b"x" * 20_000, b"last"]


def test_a_peer_that_takes_nothing_is_waited_for_a_while(
    bridged: Bridged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the close, and its time, the bridge lets go, though the peer has not read."""
    monkeypatch.setattr(brokerd_client._common.pipe_bridge, "LINGER_S", 0.05)
    bridged.sock.sendall(prefixed(bytes(100_000)))
    bridged.sock.close()
    bridged.pipe.wait_until_closed()
    assert not bridged.peer.closed


@pytest.mark.parametrize(
    "garbage", [b"\xff\xff\xff\xf0", b"\xff\xff\xff\xff" + b"\xff" * 8, b"\x00\x00"]
)
def test_what_is_no_frame_ends_the_bridge(bridged: Bridged, garbage: bytes) -> None:
    """A length that no frame has, one that no pipe takes, or half of one at the end:
    the peer sees the end.
    """
    bridged.sock.sendall(prefixed(b"good") + garbage)
    bridged.sock.shutdown(socket.SHUT_WR)
    assert list(_messages(bridged.peer)) == [b"good"]
    assert bridged.sock.recv(1) == b""


def test_a_pipe_that_breaks_ends_the_bridge(bridged: Bridged) -> None:
    """An error of the system's in writing is the end of the connection, in both
    directions.
    """
    bridged.pipe.write_error = OSError(errno.ENOMEM, "no room")
    bridged.sock.sendall(prefixed(b"never arrives"))
    assert bridged.sock.recv(1) == b""
    assert list(_messages_after_end(bridged)) == []


def _messages_after_end(bridged: Bridged) -> Iterator[bytes]:
    bridged.sock.close()
    bridged.pipe.wait_until_closed()
    yield from _messages(bridged.peer)


@pytest.mark.parametrize("started", [0, 1])
def test_without_a_thread_there_is_no_bridge(monkeypatch: pytest.MonkeyPatch, started: int) -> None:
    """Where the system has no more threads that is an OSError, and the pipe is closed."""
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


def test_without_a_socket_there_is_no_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has no more sockets the pipe is closed."""
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
    assert select.select([listener.fileno()], [], [], TIMEOUT_S)[0], "nobody came"
    return listener.accept()


def test_connections_are_accepted_in_their_order(
    pipe_server: FakePipeServer, listener: PipeListener
) -> None:
    """More peers than the listener keeps may come at once; each has its own socket, and
    the pipe's name.
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


def test_only_so_many_are_taken_unasked(
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


def test_a_system_without_room_is_told_and_waited_for(
    pipe_server: FakePipeServer, listener: PipeListener
) -> None:
    """accept() raises ENOBUFS, whatever the cause; afterwards the same peer is taken."""
    pipe_server.failures = [OSError(errno.EINVAL, "not now")]
    peer = pipe_server.dial()
    with pytest.raises(OSError, match="not now") as caught:
        accepted(listener)
    assert caught.value.errno == errno.ENOBUFS
    sock, _ = accepted(listener)
    sock.close()
    peer.close()


def test_closing_turns_away_who_was_not_accepted(
    pipe_server: FakePipeServer, listener: PipeListener
) -> None:
    """One that was accepted lives on; one that was taken and one that waits see the
    end.
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


def test_there_are_no_pipes_elsewhere() -> None:
    """Outside Windows listening at a pipe is an error that says so, for whoever gets
    past the configuration.
    """
    with pytest.raises(OSError, match="Windows only"):
        open_pipe(PIPE.path)
    entry = dataclasses.replace(configuration("127.0.0.1:0").listen[0], address=PIPE)
    with pytest.raises(listening.ListenError, match=r"can't listen at .*pipe.*Windows only"):
        listening.listen(entry)


def test_a_pipe_that_is_taken_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
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

    def __init__(self, running_daemon: RunningDaemon, doors: list[FakePipeServer]) -> None:
        self.running = running_daemon
        self._doors = doors

    @property
    def pipe_server(self) -> FakePipeServer:
        return self._doors[-1]

    def raw(self) -> PipeRaw:
        return PipeRaw(self.pipe_server.dial())

    def login(self, name: str) -> PipeRaw:
        """Return a connection of that client that the broker has let in."""
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
    doors: list[FakePipeServer] = []

    def open_fake(name: str) -> PipeListener:
        assert name == PIPE.path
        doors.append(FakePipeServer())
        return PipeListener(doors[-1], name)

    monkeypatch.setattr(listening, "open_pipe", open_fake)
    with running_daemon(piped(configuration("127.0.0.1:0", **more))) as running:
        assert running.address == PIPE
        yield Served(running, doors)


@pytest.fixture
def at_pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with served(monkeypatch) as running:
        yield running


@pytest.mark.parametrize("gathers", [True, False], ids=["sendmsg", "send"])
def test_clients_of_both_kinds_talk(
    at_pipe: Served, monkeypatch: pytest.MonkeyPatch, gathers: bool
) -> None:
    """Messages, large ones too, go between a pipe and a TCP socket, also where one
    piece is sent at a time.
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


def test_a_wrong_key_is_refused_at_a_pipe(at_pipe: Served) -> None:
    """The peer reads the refusal and the end, and the log names the pipe."""
    raw = at_pipe.raw()
    with pytest.raises(Rejected, match="FAILURE"):
        raw.log_in(b"wrong")
    raw.close()
    assert at_pipe.running.log.wait("client.refused")[0].fields["peer"] == PIPE.path


def test_a_long_message_before_the_handshake_ends_the_connection(at_pipe: Served) -> None:
    """256 bytes are the limit there too, and the rest of the message is not waited for."""
    raw = at_pipe.raw()
    raw.read_body()
    _write_until_closed(raw.pipe, 2**20)
    # The word of the failure may come too late: the bridge ends with the connection.
    assert raw.read_to_end() in (b"", FAILURE)
    raw.close()
    assert "not a handshake" in at_pipe.running.log.wait("client.refused")[0].fields["reason"]


def test_a_message_that_is_too_large_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is passed over, its sender hears too_large, and the connection lives on."""
    with (
        served(monkeypatch, limits={"max_message": "100KiB"}) as broker,
        broker.login("alice") as alice,
    ):
        alice.send(MESSAGE, "bob", bytes(10 * 2**20), message_id=9)
        refusal = alice.recv()
        assert (refusal.kind, refusal.code, refusal.id) == (ERROR, "too_large", 9)
        alice.ping()


def test_an_empty_message_is_malformed(at_pipe: Served) -> None:
    """A pipe can carry a message without a byte; the broker answers it as any other
    frame without a header.
    """
    with at_pipe.login("alice") as alice:
        alice.pipe.write(b"")
        assert alice.recv().code == "malformed"
        assert alice.is_closed()


def test_a_client_that_leaves_is_offline(at_pipe: Served) -> None:
    """Closing the pipe ends the session; what it sent before that is still routed."""
    with at_pipe.login("alice") as alice:
        bob = at_pipe.login("bob")
        for number in range(100):
            bob.send(MESSAGE, "alice", b"%d" % number)
        bob.close()
        assert [alice.recv().body for _ in range(100)] == [b"%d" % number for number in range(100)]
        gone = at_pipe.running.log.wait("client.disconnected")[0]
        assert gone.fields["reason"] == "connection closed by the client"
        alice.send(MESSAGE, "bob", b"?", message_id=1)
        assert alice.recv().code == "offline"


def test_what_is_queued_arrives_before_the_broker_stops(at_pipe: Served) -> None:
    """Draining waits until a pipe's peer, slow as it is, has everything that was taken
    for it.
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


def test_a_pipe_that_is_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that takes nothing holds up neither the stop nor, for longer than its
    time, the bridge.
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


def test_a_reload_closes_and_opens_a_pipe(at_pipe: Served) -> None:
    """A pipe taken out of the configuration takes nobody any more, its connections live
    on; put back, it is served.
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


def test_a_pipe_without_room_pauses(at_pipe: Served) -> None:
    """The log says so, and who came is served a moment later."""
    at_pipe.pipe_server.failures = [OSError(errno.ENOMEM, "no room")]
    with at_pipe.login("alice") as alice:
        alice.ping()
    paused = at_pipe.running.log.wait("listener.paused")[0]
    assert paused.fields == {"listener": PIPE.path, "reason": "no room"}


def test_no_more_are_accepted_than_the_loop_can_wait_for(
    at_pipe: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Further peers wait, and one is let in when another has left."""
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


def test_many_clients_at_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of a hundred comes at once, each is answered, and all are let go at the
    end.
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
