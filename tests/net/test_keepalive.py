"""The socket options by which TCP finds a peer that has vanished, and how its state is
read.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.keys import key_of
from support.raw_client import login
from support.running_daemon import RunningDaemon, configuration, running_daemon

from brokerd.config.model import Config
from brokerd.net.connection import liveness as liveness
from brokerd.net.server import Server
from brokerd_client._common.keepalive import Silence, keep_alive, leave_to_system

linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="options and struct tcp_info as on Linux"
)
#: Seconds before the first probe, with a limit of 40 s.
IDLE_OF_40_S = 17
RTO_MAX_MS = 44


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
def test_keepalive_idle_peer_has_most_of_limit_to_answer(
    connection: socket.socket, limit: float
) -> None:
    """The first probe is sent within half of the time, and a few follow. They
    are over within the limit, though the system's long timers are late by an eighth.
    """
    keep_alive(connection, limit)
    idle, every, count = options(connection)
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    late = sum(seconds / 8 for seconds in (idle, *[every] * count) if seconds > 1)
    in_all = idle + every * count + late
    assert limit * 0.8 - 1 <= in_all <= max(2, limit) or limit == 10**7
    assert idle <= max(1, limit / 2)


@linux
@pytest.mark.parametrize(
    ("limit", "pause_ms"), [(1, 1000), (36, 16_000), (3600, 120_000)], ids=["1", "36", "3600"]
)
def test_keepalive_bounds_pauses_between_questions(
    connection: socket.socket, limit: float, pause_ms: int
) -> None:
    """A peer that has not read for long is asked within the limit as well, where the
    system has this option; without a limit as the system does by default.
    """
    try:
        before = connection.getsockopt(socket.IPPROTO_TCP, RTO_MAX_MS)
    except OSError:
        pytest.skip("needs TCP_RTO_MAX_MS")
    keep_alive(connection, limit)
    assert connection.getsockopt(socket.IPPROTO_TCP, RTO_MAX_MS) == pause_ms
    leave_to_system(connection)
    assert connection.getsockopt(socket.IPPROTO_TCP, RTO_MAX_MS) == before


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
        assert Silence().remaining_s(near, 5.0, 30) == math.inf


def kept_alive(broker: RunningDaemon) -> list[tuple[int, int]]:
    """Return for each connection whether keepalive is on, and the idle time before the
    first probe, after a round.
    """

    def look() -> list[tuple[int, int]]:
        server_of(broker).context.liveness._begin()
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
def test_keepalive_system_is_told_in_first_round() -> None:
    """Not when a connection begins: many have ended by then. A round comes by itself."""
    config = configuration("127.0.0.1:0", limits={"keepalive": 1})
    with running_daemon(config) as broker, broker.login("alice") as alice:
        alice.ping()
        (connection,) = broker.call(lambda: server_of(broker).connections)
        deadline = time.monotonic() + 30
        while not connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
            assert time.monotonic() < deadline
            time.sleep(0.01)


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
            assert {idle for _, idle in kept_alive(broker)} == {IDLE_OF_40_S}


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
        assert kept_alive(broker) == [(1, IDLE_OF_40_S)] * 3


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
        self.repeats = self.probes = self.in_flight = self.quiet_ms = 0

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        if self.quiet_ms < 0:
            raise OSError("closed")
        return struct.pack(
            "=xxBB4x16xI28xI", self.repeats, self.probes, self.in_flight, self.quiet_ms
        )[:size]


@linux
def test_keepalive_silence_counts_from_last_answer() -> None:
    """Once bytes or probes are unanswered, and two of their repeats. An answer ends the
    silence, and so does the end of the connection.
    """
    sock, silence = FakeSocket(), Silence()
    sock.quiet_ms = 3_000
    assert silence.remaining_s(sock, 100.0, 8) == math.inf
    sock.in_flight, sock.quiet_ms = 1, 4_000
    assert silence.remaining_s(sock, 101.0, 8) == math.inf
    sock.repeats, sock.quiet_ms = 1, 5_000
    assert silence.remaining_s(sock, 102.0, 8) == math.inf
    sock.repeats, sock.quiet_ms = 2, 6_000
    assert silence.remaining_s(sock, 103.0, 8) == 2
    sock.repeats, sock.probes = 1, 1
    assert silence.remaining_s(sock, 103.0, 8) == 2
    sock.quiet_ms = 8_000
    assert silence.remaining_s(sock, 105.0, 8) == 0
    sock.repeats, sock.probes, sock.quiet_ms = 0, 0, 10
    assert silence.remaining_s(sock, 106.0, 8) == math.inf
    sock.quiet_ms = -1
    assert silence.remaining_s(sock, 107.0, 8) == math.inf


@linux
def test_keepalive_silence_gives_time_to_first_bytes_after_long_idleness() -> None:
    """As on a connection without probes until now: its peer was silent, but was not
    asked.
    """
    sock, silence = FakeSocket(), Silence()
    sock.in_flight, sock.quiet_ms = 1, 3_600_000
    assert silence.remaining_s(sock, 100.0, 8) == math.inf
    sock.repeats = 2
    assert silence.remaining_s(sock, 100.5, 8) == 1.5
    assert silence.remaining_s(sock, 102.0, 8) == 0
    sock.repeats = sock.in_flight = 0
    assert silence.remaining_s(sock, 103.0, 8) == math.inf
    sock.repeats = 2
    assert silence.remaining_s(sock, 110.0, 8) == 2


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
    silence.remaining_s(connection, 0.0, 5)
    assert silence.remaining_s(connection, 100.0, 5) > 0


@linux
def test_keepalive_check_of_acknowledged_connection_makes_no_system_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection is checked again once something is written to it, until its peer has
    acknowledged that.
    """
    checked: list[str] = []
    unread = 1

    def unacknowledged(sock: socket.socket) -> int:
        checked.append("state")
        return unread

    monkeypatch.setattr(liveness, "unacknowledged", unacknowledged)
    monkeypatch.setattr(liveness, "_SHORTEST_PAUSE_S", 3600.0)
    with (
        running_daemon(configuration("127.0.0.1:0")) as broker,
        broker.login("alice") as alice,
    ):

        def checks() -> int:
            checked.clear()
            broker.call(server_of(broker).context.liveness._begin)
            return len(checked)

        alice.ping()
        assert [checks(), checks()] == [1, 1]
        unread = 0
        assert [checks(), checks(), checks()] == [1, 0, 0]
        alice.ping()
        assert [checks(), checks()] == [1, 0]


@linux
def test_keepalive_silent_peer_is_disconnected_when_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not only at the next round, which may come a quarter of the limit later."""
    remaining_s = [0.01, 0.0]
    monkeypatch.setattr(Silence, "remaining_s", lambda *given: remaining_s.pop(0))
    monkeypatch.setattr(liveness, "unacknowledged", lambda sock: 1)
    monkeypatch.setattr(liveness, "_SHORTEST_PAUSE_S", 3600.0)
    with (
        running_daemon(configuration("127.0.0.1:0")) as broker,
        broker.login("alice") as alice,
    ):
        broker.call(server_of(broker).context.liveness._begin)
        assert alice.is_closed()
    assert remaining_s == []
