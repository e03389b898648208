"""What is asked of TCP so that a peer that is gone without a word is found, and what is made of its answers."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from collections.abc import Iterator

import pytest

from brokerd.net.link import tune
from brokerd_client.keepalive import Silence, keep_alive

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="options and struct tcp_info as on Linux")


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    """One end of a TCP connection whose other end lives."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        yield near


def options(sock: socket.socket) -> tuple[int, ...]:
    names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    return tuple(sock.getsockopt(socket.IPPROTO_TCP, name) for name in names)


@linux
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 7, 30, 60, 3600, 0.5, 29.9, 10**7])
def test_an_idle_peer_has_about_the_limit_to_answer(connection: socket.socket, limit: float) -> None:
    """Asked after half of the time, a few times; with whole seconds, and the system's own bounds."""
    tune(connection, limit)
    idle, every, count = options(connection)
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    in_all = idle + every * count
    assert limit * 0.8 - 1 <= in_all <= max(2, limit) or limit == 10**7
    assert not connection.getblocking()


@linux
def test_zero_leaves_it_to_the_system(connection: socket.socket) -> None:
    """Nothing is set."""
    before = options(connection)
    tune(connection, 0)
    assert options(connection) == before
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


def test_other_sockets_are_left_alone() -> None:
    """A Unix socket knows by itself when its other end is gone."""
    near, far = socket.socketpair()
    with near, far:
        keep_alive(near, 30)
        assert near.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
        assert Silence().lasts(near, 5.0) == 0


class Told:
    """A socket of which the system says what a test wants."""

    family = socket.AF_INET

    def __init__(self) -> None:
        self.repeats = self.probes = self.quiet_ms = 0

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        if self.quiet_ms < 0:
            raise OSError("closed")
        return struct.pack("=xxBB4x48xI", self.repeats, self.probes, self.quiet_ms)[:size]


@linux
def test_silence_counts_from_when_it_is_first_seen() -> None:
    """However long the connection was idle before; an answer ends it, and so does the end of the connection."""
    sock, silence = Told(), Silence()
    sock.quiet_ms = 3_600_000
    assert silence.lasts(sock, 100.0) == 0
    sock.repeats = 1
    assert silence.lasts(sock, 101.0) == 0
    sock.repeats, sock.quiet_ms = 5, 3_609_000
    assert silence.lasts(sock, 110.0) == 9
    sock.repeats, sock.quiet_ms = 0, 10
    assert silence.lasts(sock, 111.0) == 0
    sock.probes, sock.quiet_ms = 2, 4_000
    assert silence.lasts(sock, 115.0) == 0
    sock.quiet_ms = 3_000
    assert silence.lasts(sock, 120.0) == 3
    sock.quiet_ms = -1
    assert silence.lasts(sock, 130.0) == 0


@linux
def test_the_system_says_nothing_of_a_peer_that_does_not_read(connection: socket.socket) -> None:
    """Its buffers are full and it lives: no silence, by the real struct tcp_info."""
    connection.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            connection.send(bytes(1 << 20))
    silence = Silence()
    silence.lasts(connection, 0.0)
    assert silence.lasts(connection, 100.0) < 5
