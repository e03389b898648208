"""The socket options by which TCP finds a peer that has vanished, and how its state is
read.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.keys import key_of
from support.raw_client import login
from support.running_daemon import RunningDaemon, configuration, running_daemon

from brokerd.config.model import Config
from brokerd.net.connection import liveness as liveness
from brokerd.net.server import Server
from brokerd_client._common.keepalive import Silence, keep_alive

linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="options and struct tcp_info as on Linux"
)


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    """One end of a TCP connection whose other end is alive."""
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
def test_keepalive_idle_peer_has_about_limit_to_answer(
    connection: socket.socket, limit: float
) -> None:
    """The first probe is sent after half of the time, and a few follow. Times are whole
    seconds, within the system's own bounds.
    """
    keep_alive(connection, limit)
    idle, every, count = options(connection)
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    in_all = idle + every * count
    assert limit * 0.8 - 1 <= in_all <= max(2, limit) or limit == 10**7


@linux
def test_keepalive_zero_sets_no_socket_option(connection: socket.socket) -> None:
    """The system's own settings remain."""
    before = options(connection)
    keep_alive(connection, 0)
    assert options(connection) == before
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


def test_keepalive_unix_socket_is_unchanged() -> None:
    """A Unix socket learns of the end of its peer without probes."""
    near, far = socket.socketpair()
    with near, far:
        keep_alive(near, 30)
        assert near.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
        assert Silence().lasts(near, 5.0) == 0


def kept_alive(broker: RunningDaemon) -> list[tuple[int, int]]:
    """Return for each connection whether keepalive is on, and the idle time before the
    first probe.
    """

    def look() -> list[tuple[int, int]]:
        socks = [connection.sock for connection in server_of(broker).connections]
        return [
            (each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), options(each)[0])
            for each in socks
            if each.family == socket.AF_INET
        ]

    return broker.call(look)


def server_of(broker: RunningDaemon) -> Server:
    server = broker.daemon._server
    assert server is not None
    return server


@linux
@pytest.mark.parametrize(("before", "after"), [(0, 40), (3600, 40), (40, 0)])
def test_keepalive_changed_by_reload_applies_to_open_connections(
    socket_dir: Path, before: int, after: int
) -> None:
    """Each TCP connection gets the probes of the new limit, or none. A Unix socket has
    no such option.
    """

    def limited(keepalive: int) -> Config:
        return configuration(
            ["127.0.0.1:0", str(socket_dir / "s")], limits={"keepalive": keepalive}
        )

    with (
        running_daemon(limited(before)) as broker,
        broker.login("alice"),
        login(broker.addresses[1], key_of("bob"), b"bob"),
        broker.login("carol") as carol,
    ):
        assert {on for on, _ in kept_alive(broker)} == {int(before > 0)}
        broker.call(lambda: broker.daemon.apply(limited(after), "test"))
        # The reply comes at least a turn of the loop later.
        carol.ping()
        assert {on for on, _ in kept_alive(broker)} == {int(after > 0)}
        if after:
            assert {idle for _, idle in kept_alive(broker)} == {after // 2}


@linux
def test_keepalive_changed_by_reload_is_applied_in_slices(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With any number of connections each turn of the loop handles some. In the end
    none was left out.
    """
    monkeypatch.setattr(liveness, "_SLICE", 1)

    def limited(keepalive: int) -> Config:
        return configuration("127.0.0.1:0", limits={"keepalive": keepalive})

    with (
        running_daemon(limited(0)) as broker,
        broker.login("alice"),
        broker.login("bob"),
        broker.login("carol") as carol,
    ):
        broker.call(lambda: broker.daemon.apply(limited(40), "test"))
        for _ in range(4):
            carol.ping()
        assert kept_alive(broker) == [(1, 20)] * 3


@linux
def test_keepalive_zero_keeps_setting_of_listening_socket() -> None:
    """A service manager that listens for the broker may switch the probes on
    (KeepAlive=yes). A limit of 0 leaves them on.
    """
    with running_daemon(configuration("127.0.0.1:0", limits={"keepalive": 0})) as broker:
        (listening,) = server_of(broker).listening
        broker.call(lambda: listening.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1))
        with broker.login("alice") as alice:
            alice.ping()
            assert [on for on, _ in kept_alive(broker)] == [1]


@linux
def test_keepalive_zero_sets_no_timer() -> None:
    """An idle broker does not wake up for the check. With a limit it does."""

    def limited(keepalive: int) -> Config:
        return configuration("127.0.0.1:0", limits={"keepalive": keepalive})

    with running_daemon(limited(0)) as broker, broker.login("alice"):
        liveness = server_of(broker).context.liveness
        assert broker.call(lambda: liveness._timer) is None
        for limit in (40, 0):
            broker.call(lambda limit=limit: broker.daemon.apply(limited(limit), "test"))  # type: ignore[misc]
            assert broker.call(lambda: liveness._timer is not None) is bool(limit)


class FakeSocket:
    """A socket whose TCP state is set by the test."""

    family = socket.AF_INET

    def __init__(self) -> None:
        self.repeats = self.probes = self.quiet_ms = 0

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        if self.quiet_ms < 0:
            raise OSError("closed")
        return struct.pack("=xxBB4x48xI", self.repeats, self.probes, self.quiet_ms)[:size]


@linux
def test_keepalive_silence_counts_from_first_observation() -> None:
    """The time that the connection was idle before does not count. An answer ends the
    silence, and so does the end of the connection.
    """
    sock, silence = FakeSocket(), Silence()
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
def test_keepalive_peer_that_does_not_read_is_not_silent(connection: socket.socket) -> None:
    """Its buffers are full and its system answers, so that the real struct tcp_info
    reports no silence.
    """
    connection.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            connection.send(bytes(1 << 20))
    silence = Silence()
    silence.lasts(connection, 0.0)
    assert silence.lasts(connection, 100.0) < 5
