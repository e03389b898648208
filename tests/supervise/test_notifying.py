"""The notifications of a real daemon to a service manager: NOTIFY_SOCKET is the test's
own.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.raw_client import Raw
from support.service_manager import Manager

from brokerd.daemon import systemd as supervise
from brokerd.daemon.systemd import Supervisor

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "SIGSTOP"), reason="service managers of this kind run on Linux only"
)


def test_systemd_ready_is_sent_when_broker_accepts_connections(socket_dir: Path) -> None:
    """READY=1 comes when connecting works, with a line of counts."""
    with Manager(socket_dir / "notify") as manager, manager.start(socket_dir) as broker:
        ready = manager.next()
        assert ready["READY"] == "1"
        assert ready["STATUS"] == "0 connections, 0 handshakes under way, 0 messages"
        with broker.login("alice") as alice:
            alice.ping()


def test_systemd_abstract_notify_socket_is_used() -> None:
    """NOTIFY_SOCKET may begin with @."""
    with Manager(f"@brokerd-test-{os.getpid()}-{time.monotonic_ns()}") as manager:
        supervisor = Supervisor.from_environ({"NOTIFY_SOCKET": manager.address}, 1)
        assert supervisor.notify(MAINPID=4711, STATUS="two\nlines")
        assert manager.next() == {"MAINPID": "4711", "STATUS": "two lines"}


def test_systemd_status_follows_counts(socket_dir: Path) -> None:
    """The status follows the connections and messages; it is not sent again while they
    stay the same.
    """
    program = "import brokerd.daemon.systemd\nbrokerd.daemon.systemd._STATUS_EVERY = 0.05\n"
    with (
        Manager(socket_dir / "notify") as manager,
        manager.start(socket_dir, first=program) as broker,
        broker.login("alice") as alice,
        Raw(broker.address),
    ):
        alice.ping()
        message = manager.wait(
            lambda message: message["STATUS"] == "1 connections, 1 handshakes under way, 1 messages"
        )
        assert message.keys() == {"STATUS"}
        broker.signal()
        manager.wait("STOPPING")
        statuses = [each["STATUS"] for each in manager.received]
        assert all(before != after for before, after in pairwise(statuses)), statuses


def test_systemd_reload_sends_reloading_with_time_and_ready(socket_dir: Path) -> None:
    """Type=notify-reload waits for RELOADING=1 with the monotonic clock, then READY=1."""
    with Manager(socket_dir / "notify") as manager, manager.start(socket_dir) as broker:
        manager.wait("READY")
        began = time.monotonic_ns() // 1000
        broker.signal(signal.SIGHUP)
        reloading = manager.wait("RELOADING")
        assert began <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        assert manager.next()["READY"] == "1"
        assert broker.events("daemon.reloaded") or broker.wait("daemon.reloaded")


def test_systemd_refused_reload_sends_ready_with_reason(socket_dir: Path) -> None:
    """Otherwise the manager would wait without end. The old configuration stays in
    force, and the status gives the mistake.
    """
    with Manager(socket_dir / "notify") as manager, manager.start(socket_dir) as broker:
        manager.wait("READY")
        broker.config.write_text("listen: []\n")
        broker.signal(signal.SIGHUP)
        manager.wait("RELOADING")
        ready = manager.next()
        assert ready["READY"] == "1"
        assert "the old configuration stays" in ready["STATUS"]
        assert "is an empty list" in ready["STATUS"]


def test_systemd_stop_sends_stopping_with_extended_timeout(socket_dir: Path) -> None:
    """STOPPING=1 comes with more time than the drain may take."""
    with (
        Manager(socket_dir / "notify") as manager,
        manager.start(socket_dir, limits={"drain_timeout": "100s"}) as broker,
    ):
        manager.wait("READY")
        broker.signal()
        stopping = manager.next()
        assert stopping["STOPPING"] == "1"
        assert int(stopping["EXTEND_TIMEOUT_USEC"]) >= 100_000_000
        assert broker.exit_status() == 0


def test_watchdog_is_fed_unless_process_is_stopped(socket_dir: Path) -> None:
    """Keep-alive messages arrive regularly, stop while the process is stopped, and
    resume when it continues.
    """
    with (
        Manager(socket_dir / "notify") as manager,
        manager.start(socket_dir, environ={"WATCHDOG_USEC": "400000"}) as broker,
    ):
        for _ in range(4):
            manager.wait("WATCHDOG")
        broker.signal(signal.SIGSTOP)
        try:
            os.waitid(os.P_PID, broker.popen.pid, os.WSTOPPED)
            # For longer than the manager would wait.
            assert manager.is_silent_for(1.0)
        finally:
            broker.signal(signal.SIGCONT)
        manager.wait("WATCHDOG")


def test_watchdog_is_fed_every_half_of_its_period(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As sd_watchdog_enabled(3) advises: every half of WATCHDOG_USEC, from the first
    message on.
    """
    periods: list[float] = []

    async def feed() -> None:
        enough = asyncio.Event()
        loop = asyncio.get_running_loop()
        call_later = loop.call_later

        def noted(delay: float, act: Any, *given: Any, **more: Any) -> asyncio.TimerHandle:
            if delay == 1.5:
                periods.append(delay)
                delay = 0.0
                if len(periods) == 4:
                    enough.set()
            return call_later(delay, act, *given, **more)

        monkeypatch.setattr(loop, "call_later", noted)
        supervisor = Supervisor("@nobody-there", 3.0)
        supervisor.ready(str)
        await asyncio.wait_for(enough.wait(), 30)
        supervisor.close()

    asyncio.run(feed())
    assert periods[:4] == [1.5] * 4


def test_watchdog_is_fed_as_soon_as_process_serves(socket_dir: Path) -> None:
    """After an upgrade, the manager still counts from the last message of the old
    process.
    """

    async def serve(manager: Manager) -> None:
        supervisor = Supervisor(manager.address, 3600.0)
        supervisor.ready(str)
        supervisor.close()

    with Manager(socket_dir / "notify") as manager:
        asyncio.run(serve(manager))
        assert manager.next()["READY"] == "1"
        assert manager.next() == {"WATCHDOG": "1"}


def test_watchdog_with_blocked_event_loop_is_not_fed(socket_dir: Path) -> None:
    """The event loop feeds the watchdog: a process whose loop is blocked does not count
    as alive.
    """
    stuck = """
import signal
from brokerd.daemon import Daemon
def forever(self, reason):
    self.log.warning("stuck")
    while True:
        pass
Daemon.reload_soon = forever
"""
    with (
        Manager(socket_dir / "notify") as manager,
        manager.start(socket_dir, first=stuck, environ={"WATCHDOG_USEC": "200000"}) as broker,
    ):
        manager.wait("WATCHDOG")
        broker.signal(signal.SIGHUP)
        broker.wait("stuck")
        assert manager.is_silent_for(1.0)


@pytest.mark.parametrize(
    ("environ", "watched"),
    [
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "7"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_watchdog_for_other_process_is_ignored(
    environ: dict[str, str], watched: float | None
) -> None:
    """WATCHDOG_PID, if it is set, names the process that WATCHDOG_USEC is for."""
    assert Supervisor.from_environ({"NOTIFY_SOCKET": "/there", **environ}, 7)._watchdog_s == watched


@pytest.mark.parametrize(
    "address", ["", "vsock:2:1234", "no/absolute/path", "/nobody/there", "@nobody-there"]
)
def test_systemd_without_manager_notify_returns_false(address: str) -> None:
    """Without a manager, or with one that has ended, notify() returns False and raises
    nothing.
    """
    assert not Supervisor.from_environ({"NOTIFY_SOCKET": address}, 7).notify(READY=1)


@pytest.mark.timing
def test_systemd_manager_that_does_not_read_blocks_briefly(socket_dir: Path) -> None:
    """Its queue is full: the message waits a second at most, and is then discarded."""
    with Manager(socket_dir / "notify") as manager:
        supervisor = Supervisor(manager.address)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler, suppress(BlockingIOError):
            filler.setblocking(False)
            while True:
                filler.sendto(b"X=1", manager.address)
        began = time.monotonic()
        assert not supervisor.notify(READY=1)
        assert time.monotonic() - began < 10


def test_systemd_status_during_drain_stays_draining(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During a drain the status stays "draining" until the end; the watchdog is still
    fed.
    """
    monkeypatch.setattr(supervise, "_STATUS_EVERY", 0.01)
    counts = map(str, itertools.count())

    async def drain(manager: Manager) -> None:
        supervisor = Supervisor(manager.address, 0.02)
        supervisor.ready(lambda: next(counts))
        await asyncio.to_thread(manager.wait, "STATUS")
        supervisor.stopping(1.0)
        message = await asyncio.to_thread(manager.wait, "STOPPING")
        assert message["STATUS"].startswith("draining")
        for _ in range(3):
            assert await asyncio.to_thread(manager.next) == {"WATCHDOG": "1"}
        supervisor.close()

    with Manager(socket_dir / "notify") as manager:
        asyncio.run(drain(manager))


def test_systemd_failed_start_sends_status_and_errno(socket_dir: Path) -> None:
    """The manager's status gives the reason, and the errno if the system gave one."""
    with (
        Manager(socket_dir / "notify") as manager,
        manager.start(socket_dir, listen=["/nobody/has/this/directory/s"]) as broker,
    ):
        message = manager.next()
        assert "can't listen at /nobody/has/this/directory/s" in message["STATUS"]
        assert message["ERRNO"] == "2"
        assert broker.exit_status() == 1


def test_systemd_invalid_configuration_sends_status(socket_dir: Path) -> None:
    """The first mistake is the status; the others are on standard error."""
    with (
        Manager(socket_dir / "notify") as manager,
        manager.start(socket_dir, {"alice": {"keys": []}}) as broker,
    ):
        assert "clients.alice" in manager.next()["STATUS"]
        assert broker.exit_status() == 78
