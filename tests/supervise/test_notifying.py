"""What a service manager is told of a real daemon, and when: NOTIFY_SOCKET is the
test's own.
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


def test_it_is_ready_when_it_can_be_connected_to(socket_dir: Path) -> None:
    """READY=1 comes when connecting works, with a line of counts."""
    with Manager(socket_dir / "notify") as manager, manager.start(socket_dir) as broker:
        ready = manager.next()
        assert ready["READY"] == "1"
        assert ready["STATUS"] == "0 connections, 0 handshakes under way, 0 messages"
        with broker.login("alice") as alice:
            alice.ping()


def test_an_abstract_address_is_told_too() -> None:
    """NOTIFY_SOCKET may begin with @."""
    with Manager(f"@brokerd-test-{os.getpid()}-{time.monotonic_ns()}") as manager:
        supervisor = Supervisor.from_environ({"NOTIFY_SOCKET": manager.address}, 1)
        assert supervisor.notify(MAINPID=4711, STATUS="two\nlines")
        assert manager.next() == {"MAINPID": "4711", "STATUS": "two lines"}


def test_the_counts_are_kept_up_to_date(socket_dir: Path) -> None:
    """The status follows the connections and messages, and says nothing while they
    stay.
    """
    often = "import brokerd.daemon.systemd\nbrokerd.daemon.systemd._STATUS_EVERY = 0.05\n"
    with (
        Manager(socket_dir / "notify") as manager,
        manager.start(socket_dir, first=often) as broker,
        broker.login("alice") as alice,
        Raw(broker.address),
    ):
        alice.ping()
        said = manager.wait(
            lambda said: said["STATUS"] == "1 connections, 1 handshakes under way, 1 messages"
        )
        assert said.keys() == {"STATUS"}
        broker.signal()
        manager.wait("STOPPING")
        texts = [each["STATUS"] for each in manager.heard]
        assert all(before != after for before, after in pairwise(texts)), texts


def test_a_reload_is_told_with_its_time(socket_dir: Path) -> None:
    """RELOADING=1 with the monotonic clock, then READY=1: what Type=notify-reload waits
    for.
    """
    with Manager(socket_dir / "notify") as manager, manager.start(socket_dir) as broker:
        manager.wait("READY")
        began = time.monotonic_ns() // 1000
        broker.signal(signal.SIGHUP)
        reloading = manager.wait("RELOADING")
        assert began <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        assert manager.next()["READY"] == "1"
        assert broker.events("daemon.reloaded") or broker.wait("daemon.reloaded")


def test_a_refused_reload_is_ready_again_and_says_why(socket_dir: Path) -> None:
    """A manager must not wait for ever: the old configuration serves on, and the status
    says what is wrong.
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


def test_a_stop_is_told_with_the_time_it_may_take(socket_dir: Path) -> None:
    """STOPPING=1 comes with more time than the drain may take, and nothing is said to
    be ready after it.
    """
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


def test_the_watchdog_is_fed_until_the_loop_stands_still(socket_dir: Path) -> None:
    """Signs of life come one after the other, none from a process that is stopped, and
    again when it goes on.
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


def test_signs_of_life_come_twice_in_the_time_that_is_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As sd_watchdog_enabled(3) advises: half of WATCHDOG_USEC, from the first one on."""
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


def test_a_handler_that_never_returns_starves_the_watchdog(socket_dir: Path) -> None:
    """It is the loop that feeds: a process that runs but whose loop stands still is not
    alive.
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
def test_a_watchdog_for_another_process_is_left_alone(
    environ: dict[str, str], watched: float | None
) -> None:
    """WATCHDOG_PID, where it is given, says whom WATCHDOG_USEC is for."""
    assert Supervisor.from_environ({"NOTIFY_SOCKET": "/there", **environ}, 7)._watchdog_s == watched


@pytest.mark.parametrize(
    "address", ["", "vsock:2:1234", "no/absolute/path", "/nobody/there", "@nobody-there"]
)
def test_nobody_to_tell_is_no_error(address: str) -> None:
    """Without a manager, or with one that is gone, telling returns False and that is
    all.
    """
    assert not Supervisor.from_environ({"NOTIFY_SOCKET": address}, 7).notify(READY=1)


@pytest.mark.timing
def test_a_manager_that_does_not_read_holds_up_nobody(socket_dir: Path) -> None:
    """Its queue is full: what is said waits a second at most, and is given up."""
    with Manager(socket_dir / "notify") as manager:
        supervisor = Supervisor(manager.address)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler, suppress(BlockingIOError):
            filler.setblocking(False)
            while True:
                filler.sendto(b"X=1", manager.address)
        began = time.monotonic()
        assert not supervisor.notify(READY=1)
        assert time.monotonic() - began < 10


def test_counts_do_not_take_the_place_of_draining(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it drains, the status says so until the end; signs of life go on."""
    monkeypatch.setattr(supervise, "_STATUS_EVERY", 0.01)
    counts = map(str, itertools.count())

    async def drain(manager: Manager) -> None:
        supervisor = Supervisor(manager.address, 0.02)
        supervisor.ready(lambda: next(counts))
        await asyncio.to_thread(manager.wait, "STATUS")
        supervisor.stopping(1.0)
        said = await asyncio.to_thread(manager.wait, "STOPPING")
        assert said["STATUS"].startswith("draining")
        for _ in range(3):
            assert await asyncio.to_thread(manager.next) == {"WATCHDOG": "1"}
        supervisor.close()

    with Manager(socket_dir / "notify") as manager:
        asyncio.run(drain(manager))


def test_what_keeps_it_from_starting_is_told(socket_dir: Path) -> None:
    """The manager's status says why, and the errno where the system gave one."""
    with (
        Manager(socket_dir / "notify") as manager,
        manager.start(socket_dir, listen=["/nobody/has/this/directory/s"]) as broker,
    ):
        said = manager.next()
        assert "can't listen at /nobody/has/this/directory/s" in said["STATUS"]
        assert said["ERRNO"] == "2"
        assert broker.exit_status() == 1


def test_a_bad_configuration_is_told(socket_dir: Path) -> None:
    """The first mistake is the status; the others are on standard error."""
    with (
        Manager(socket_dir / "notify") as manager,
        manager.start(socket_dir, {"alice": {"keys": []}}) as broker,
    ):
        assert "clients.alice" in manager.next()["STATUS"]
        assert broker.exit_status() == 78
