"""Exceptions at any bytecode of the direct API: the next message is the right one, or
the connection refuses.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.interruption import (
    RETURN,
    Interrupt,
    in_own_thread,
    interrupted_at,
    random_signals,
)

from brokerd_client.connection import Client, Connection, Listener, Pipe, stream, wait
from brokerd_client.connection.handshaking import PendingHandshake, SocketPeer
from brokerd_client.errors import AuthenticationError
from brokerd_client.wire.handshake import as_listener

if sys.platform == "win32":
    pytest.skip("signals and Unix sockets", allow_module_level=True)

#: An exception between two bytecodes may leave a socket to the garbage collector, or
#: come in a destructor.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

TIMEOUT_S = 30
KEY = b"the key"


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read gives a few bytes at most."""
    monkeypatch.setattr(stream, "_read", lambda handle, size: os.read(handle, min(size, 3)))
    monkeypatch.setattr(
        stream, "_read_into", lambda handle, places: os.readv(handle, (places[0][:9000],))
    )


def body_of(number: int, size: int) -> bytes:
    return number.to_bytes(4, "big") + bytes([number % 251]) * size


def receive_into(connection: Connection) -> bytes:
    buffer = bytearray(40_000)
    return bytes(buffer[: connection.recv_bytes_into(buffer)])


def free_for_other_threads(connection: Connection) -> bool:
    """Whether a thread that interrupted nothing could send and receive."""
    free_locks = []

    def look() -> None:
        for lock in (connection._send_lock, connection._receive_lock):
            if lock.acquire(blocking=False):
                lock.release()
                free_locks.append(True)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(TIMEOUT_S)
    return len(free_locks) == 2


def check_receive_goes_on(receive: Callable[[Connection], object], size: int) -> int:
    """Interrupt a receive at its first bytecode, its second, ...; return after how many
    it was through.
    """
    # The first tracing of a process in Python 3.12 sees no bytecodes.
    interrupted_at(0, lambda: wait([], 0))
    for bytecode in itertools.count():
        sock, peer = socket.socketpair()
        with sock, Connection(peer.detach()) as connection:
            bodies = [body_of(number, size) for number in (1, 2, 3)]
            sock.sendall(b"".join(len(body).to_bytes(4, "big") + body for body in bodies))
            first_body = receive(connection)
            assert first_body == bodies[0]
            result: list[object] = []

            def call(connection: Connection = connection, result: list[object] = result) -> None:
                result.append(receive(connection))

            interrupted = interrupted_at(bytecode, call)
            assert free_for_other_threads(connection)
            received = [*result]
            if interrupted == RETURN:
                received.append(bodies[1])
            while len(received) < 2:
                assert connection.poll(0), f"bytecode {bytecode}: a message is gone"
                assert wait([connection], 0) == [connection]
                received.append(connection.recv_bytes())
            assert received == bodies[1:], f"bytecode {bytecode}"
            if not interrupted:
                return bytecode
    raise AssertionError


@pytest.mark.parametrize("size", [0, 100, 20_000])
@pytest.mark.parametrize(
    "receive", [Connection.recv_bytes, receive_into], ids=["recv_bytes", "recv_bytes_into"]
)
@in_own_thread
def test_receive_interrupted_at_any_bytecode_returns_same_message_next(
    receive: Callable[[Connection], object], size: int
) -> None:
    """No byte read is lost, wherever the exception comes: the next call returns the
    message of the interrupted one.
    """
    assert check_receive_goes_on(receive, size) > 50


@pytest.mark.parametrize("size", [0, 20])
@pytest.mark.parametrize(
    "receive", [Connection.recv_bytes, receive_into], ids=["recv_bytes", "recv_bytes_into"]
)
@pytest.mark.usefixtures("in_pieces")
@in_own_thread
def test_receive_in_pieces_interrupted_at_any_bytecode_returns_same_message_next(
    receive: Callable[[Connection], object], size: int
) -> None:
    """As above, where length and body come in several reads."""
    assert check_receive_goes_on(receive, size) > 50


@pytest.mark.usefixtures("in_pieces")
@in_own_thread
def test_receive_interrupted_again_and_again_goes_on() -> None:
    """One message, every receive of which is interrupted a bytecode later than the one
    before, arrives whole.
    """
    sock, peer = socket.socketpair()
    with sock, Connection(peer.detach()) as connection:
        sent = 0
        for bytecode in range(400):
            while sent < bytecode + 2:
                sent += 1
                sock.sendall(b"\0\0\0\x18" + body_of(sent, 20))
            result: list[bytes] = []

            def call(result: list[bytes] = result) -> None:
                result.append(connection.recv_bytes())

            for again in range(bytecode % 7):
                if result:
                    break
                if interrupted_at(bytecode + 13 * again, call) == RETURN:
                    # The caller never sees what was returned.
                    result.append(body_of(bytecode + 1, 20))
            if not result:
                call()
            assert result == [body_of(bytecode + 1, 20)]


@in_own_thread
def test_recv_interrupted_at_any_bytecode_never_unpickles_from_the_middle() -> None:
    """The object of an interrupted recv comes next, or is gone whole; the one behind it
    is right.
    """
    for bytecode in itertools.count():
        one, other = Pipe()
        with one, other:
            for number in range(3):
                one.send({"number": number})
            interrupted = interrupted_at(bytecode, other.recv)
            assert free_for_other_threads(other)
            received = []
            while other.poll(0):
                received.append(other.recv()["number"])
            assert received in ([0, 1, 2], [1, 2])
            if not interrupted:
                break
    assert bytecode > 50


def check_send_is_whole_or_nothing(send: Callable[[Connection, bytes], object], size: int) -> int:
    """Interrupt a send at every bytecode: what its peer hears are whole messages, in
    order, and then the end.
    """
    for bytecode in itertools.count():
        one, other = Pipe()
        with other:
            with one:
                one.send_bytes(b"before")
                interrupted = interrupted_at(bytecode, lambda one=one: send(one, body_of(1, size)))  # type: ignore[misc]
                assert free_for_other_threads(one)
                with contextlib.suppress(OSError):
                    one.send_bytes(b"behind")
            received = []
            with contextlib.suppress(EOFError):
                while True:
                    received.append(other.recv_bytes())
            messages = [body for body in received if body not in (b"before", b"behind")]
            assert received[0] == b"before"
            assert len(messages) <= 1
            assert all(body_of(1, size) in body for body in messages)
            if not interrupted:
                assert received[-1] == b"behind"
                return bytecode
    raise AssertionError


@pytest.mark.parametrize("size", [0, 100, 20_000])
@pytest.mark.parametrize("send", [Connection.send_bytes, Connection.send])
@in_own_thread
def test_send_interrupted_at_any_bytecode_sends_whole_or_nothing(
    send: Callable[[Connection, bytes], object], size: int
) -> None:
    """A peer never takes the next message for the rest of an interrupted one."""
    assert check_send_is_whole_or_nothing(send, size) > 50


def test_send_interrupted_half_way_refuses_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """With half a message at the peer, send refuses, and `writable` says so."""

    def write(handle: int, data: bytes) -> int:
        raise Interrupt

    def write_both(handle: int, prefix: bytes, body: memoryview) -> int:
        return os.write(handle, bytes(prefix) + bytes(body[:1000]))

    one, other = Pipe()
    with one, other:
        monkeypatch.setattr(stream, "_write_both", write_both)
        monkeypatch.setattr(stream, "_write", write)
        with pytest.raises(Interrupt):
            one.send_bytes(bytes(100_000))
        monkeypatch.undo()
        assert not one.writable
        with pytest.raises(OSError, match="cut off"):
            one.send_bytes(b"more")


def test_send_whose_signal_handler_raises_oserror_refuses_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An OSError of a signal handler is not the system's refusal to write: the message
    may have left.
    """

    def write(handle: int, data: bytes) -> int:
        os.write(handle, data)
        raise InterruptedError(4, "from a handler")

    one, other = Pipe()
    with one, other:
        monkeypatch.setattr(stream, "_write", write)
        with pytest.raises(InterruptedError):
            one.send_bytes(b"left")
        assert not one.writable


@in_own_thread
def test_poll_interrupted_at_any_bytecode_takes_nothing() -> None:
    """poll and wait read no byte."""
    one, other = Pipe()
    with one, other:
        one.send_bytes(b"here")
        for bytecode in itertools.count():
            if not interrupted_at(bytecode, lambda: wait([other], 0) or other.poll(0)):
                break
        assert free_for_other_threads(other)
        assert other.recv_bytes() == b"here"


def test_message_kept_by_an_interrupted_receive_is_not_handed_over() -> None:
    """A child process could not know the part of a message that its parent has read."""
    sock, peer = socket.socketpair()
    with sock, Connection(peer.detach()) as connection:
        sock.sendall(b"\0\0\0\4ab")
        with random_signals(longest_s=1e-3) as armed:
            armed[0] = True
            with pytest.raises(Interrupt):
                connection.recv_bytes()
        with pytest.raises(OSError, match="middle of a message"):
            connection._check_between_messages()
        assert not connection.poll(0)
        sock.sendall(b"cd")
        assert connection.recv_bytes() == b"abcd"
        connection._check_between_messages()


# Signals at random.


@pytest.mark.skipif(
    sys.version_info < (3, 11),
    reason="Python 3.9 and 3.10 run signal handlers also between a call's return and its use",
)
@pytest.mark.parametrize("times", [150, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("into", [False, True], ids=["recv_bytes", "recv_bytes_into"])
def test_receive_interrupted_by_random_signals_loses_nothing(times: int, into: bool) -> None:
    """Of messages of all sizes each arrives once, in order, whatever signal handlers
    raise meanwhile.
    """
    one, other = Pipe()
    stop = threading.Event()

    def send_on() -> None:
        jitter = random.Random(7)
        with contextlib.suppress(OSError):
            for number in itertools.count():
                if stop.is_set():
                    break
                one.send_bytes(body_of(number, jitter.choice([0, 10, 1000, 30_000])))
        one.close()

    sender = threading.Thread(target=send_on)
    interrupts, expected = 0, 0
    jitter = random.Random(7)
    received: list[bytes] = []
    sizes: list[int] = []
    buffer = bytearray(40_000)
    ends_at = time.monotonic() + (TIMEOUT_S if times < 1000 else 300)
    with random_signals(longest_s=5e-4) as armed:
        sender.start()
        while interrupts < times or expected <= 10:
            assert time.monotonic() < ends_at
            try:
                armed[0] = True
                if into:
                    sizes.append(other.recv_bytes_into(buffer))
                else:
                    received.append(other.recv_bytes())
                armed[0] = False
            except Interrupt:
                interrupts += 1
            received += [bytes(buffer[: sizes.pop()]) for _ in range(len(sizes))]
            while received:
                assert received.pop(0) == body_of(expected, jitter.choice([0, 10, 1000, 30_000]))
                expected += 1
        stop.set()
    with contextlib.suppress(EOFError):
        while True:
            assert other.recv_bytes() == body_of(expected, jitter.choice([0, 10, 1000, 30_000]))
            expected += 1
    sender.join(TIMEOUT_S)
    other.close()


# Handshakes.


class Caller(threading.Thread):
    """A client that says hello and waits for the echo; ``outcome`` is how that ended."""

    def __init__(self, address: Any) -> None:
        super().__init__()
        self.address = address
        self.outcome = ""
        self.start()

    def run(self) -> None:
        try:
            with Client(self.address, authkey=KEY, timeout=TIMEOUT_S) as client:
                client.send_bytes(b"hello")
                self.outcome = client.recv_bytes().decode()
        except (EOFError, OSError, AuthenticationError) as error:
            self.outcome = type(error).__name__


def serve_until_over(listener: Listener, caller: Caller, accepted: list[Connection]) -> None:
    """Accept, if that is not done yet, and echo, until the caller is through."""
    while caller.is_alive():
        if not accepted:
            with contextlib.suppress(TimeoutError):
                accepted.append(listener.accept(0.02))
        for connection in accepted:
            connection.send_bytes(connection.recv_bytes())
            connection.close()
            caller.join(TIMEOUT_S)


def check_accept_at(bytecode: int, path: Path) -> tuple[str, str]:
    """Interrupt an accept; return what was interrupted, and how it ended for the peer."""
    accepted: list[Connection] = []
    with Listener(str(path), authkey=KEY) as listener:
        caller = Caller(listener.address)
        interrupted = interrupted_at(bytecode, lambda: accepted.append(listener.accept(TIMEOUT_S)))
        if interrupted != RETURN:
            serve_until_over(listener, caller, accepted)
        caller.join(TIMEOUT_S)
        assert caller.outcome in ("hello", "EOFError", "ConnectionResetError", "BrokenPipeError"), (
            bytecode
        )
        next_one = Caller(listener.address)
        serve_until_over(listener, next_one, [])
        assert next_one.outcome == "hello"
    return interrupted, caller.outcome


@pytest.mark.parametrize("step", [41, pytest.param(1, marks=pytest.mark.slow)])
@in_own_thread
def test_accept_interrupted_at_any_bytecode_accepts_or_hangs_up(step: int, tmp_path: Path) -> None:
    """A peer is accepted, now or by the next call, or sees the end of its connection;
    the listener goes on.
    """
    outcomes = []
    for bytecode in itertools.count(0, step):
        interrupted, outcome = check_accept_at(bytecode, tmp_path / "here")
        outcomes.append(outcome)
        if not interrupted:
            break
    assert outcomes[-1] == "hello"
    assert len(outcomes) > 1000 // step


@pytest.mark.parametrize("step", [41, pytest.param(1, marks=pytest.mark.slow)])
@in_own_thread
def test_client_interrupted_at_any_bytecode_hangs_up(step: int, tmp_path: Path) -> None:
    """A listener sees the end of a connection whose Client() was interrupted, and goes
    on.
    """
    with Listener(str(tmp_path / "here"), authkey=KEY, on_error="skip") as listener:
        for bytecode in itertools.count(0, step):
            seen: list[object] = []

            def accept(seen: list[object] = seen) -> None:
                try:
                    with listener.accept(TIMEOUT_S) as here:
                        seen.append(here.recv_bytes())
                except EOFError:
                    seen.append("end")

            server = threading.Thread(target=accept)
            server.start()
            clients: list[Connection] = []
            interrupted = interrupted_at(
                bytecode,
                lambda: clients.append(Client(listener.address, authkey=KEY)),  # noqa: B023
            )
            for connection in clients:
                connection.close()
            # Whatever became of it, the next one is served, by the same call or
            # another.
            while server.is_alive():
                with (
                    contextlib.suppress(OSError, EOFError),
                    Client(listener.address, authkey=KEY, timeout=0.5) as here,
                ):
                    here.send_bytes(b"next")
                server.join(0.05)
            assert seen in (["end"], [b"next"])
            if not interrupted:
                break
    assert bytecode > 1000


@in_own_thread
def test_handshake_interrupted_never_succeeds() -> None:
    """A generator that an exception has left ends as a finished one does: it must
    authenticate no peer.
    """
    near, peer = socket.socketpair()
    with peer:
        peer_stream = SocketPeer(near)
        for bytecode in range(0, 300, 7):
            pending_handshake = PendingHandshake(
                peer_stream, as_listener(bytes(40)), KEY, None, 0.0
            )
            peer.setblocking(False)
            if interrupted_at(bytecode, pending_handshake.advance):
                peer.sendall(b"\0\0\0\4what")
                with pytest.raises((AuthenticationError, OSError)):
                    pending_handshake.advance()
                with contextlib.suppress(BlockingIOError):
                    near.recv(10_000)
        peer_stream.close()
