"""Descriptors or disk space run out, or the clock is set. The broker's clients do not
notice.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from support.broker_process import BrokerProcess
from support.load.client_load import write_atomically
from support.outages.traffic import RECIPIENTS, SENDERS, Traffic
from support.raw_client import Raw
from support.waiting import until

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs what Linux has")

NAMES = (*SENDERS, *RECIPIENTS, "late")
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


def test_listener_without_descriptors_pauses_and_serves_connected(socket_dir: Path) -> None:
    """Accepting pauses while no descriptor is free, and then resumes. Connected clients
    are served all the time.
    """

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

    limits = {"handshakes": 100, "handshake_timeout": "60s"}
    with BrokerProcess(socket_dir, NAMES, preexec=few, limits=limits) as broker:
        broker.wait("daemon.started")
        with Traffic(socket_dir, str(broker.socket)) as traffic:
            connections = [Raw(broker.address) for _ in range(60)]
            broker.wait("listener.paused")
            traffic.goes_on()
            for each in connections:
                each.close()
            with broker.login("late") as late:
                late.ping()
            disconnected = [
                event["name"]
                for event in broker.events("client.disconnected")
                if event["name"] != "late"
            ]
            account = traffic.finish("EMFILE: no descriptors are left, and then there are")
    assert disconnected == []
    assert (account.refused, account.in_doubt) == (0, 0)
    account.record("accepting paused and resumed; no connection ended")


def test_log_and_audit_on_full_disk_delay_no_client(socket_dir: Path) -> None:
    """Every line fails with ENOSPC: no client waits for the log, and the broker goes
    on.
    """
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with BrokerProcess(socket_dir, NAMES, stderr=full, log={"audit": "/dev/full"}) as broker:
            until(broker.socket.exists, "it does not start")
            with Traffic(socket_dir, str(broker.socket)) as traffic:
                for _ in range(20):
                    Raw(broker.address).close()
                traffic.goes_on()
                account = traffic.finish("ENOSPC where the log and the audit go")
            broker.signal()
            assert broker.exit_status() == 0
    finally:
        os.close(full)
    assert (account.refused, account.in_doubt) == (0, 0)
    account.record("no connection ended; SIGTERM ends it with status 0")


@pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime (apt-get install libfaketime)")
def test_clock_set_forward_and_back_disconnects_no_client(socket_dir: Path) -> None:
    """A year forward, two years back: deadlines do not move, no client is disconnected,
    new clients are accepted.
    """
    clock = socket_dir / "clock"
    clock.write_text("+0")
    environ = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with BrokerProcess(socket_dir, NAMES, environ=environ, limits={"wait_timeout": "5s"}) as broker:
        broker.wait("daemon.started")
        with Traffic(socket_dir, str(broker.socket)) as traffic:
            for number, (offset, years) in enumerate(
                (("+31536000", 1), ("-31536000", -1), ("+0", 0)), 1
            ):
                # As an editor does: a file that is cut and written would be read empty.
                write_atomically(clock, offset)
                with broker.login("late") as late:
                    late.ping()
                stamp = broker.wait("client.connected", len(NAMES) - 1 + number)[-1]["timestamp"]
                off = datetime.fromisoformat(stamp).timestamp() - time.time()
                assert abs(off - years * 31536000) < 3600, stamp
                traffic.goes_on()
            disconnected = [
                event["name"]
                for event in broker.events("client.disconnected")
                if event["name"] != "late"
            ]
            account = traffic.finish("the clock is set a year forward, two back, and right again")
        assert not broker.events("daemon.bug")
    assert disconnected == []
    assert (account.refused, account.in_doubt) == (0, 0)
    account.record("no connection ended; new clients were accepted each time")


def test_reload_with_slow_disk_delays_no_client(socket_dir: Path) -> None:
    """The reload waits for a file that does not come; the clients do not."""
    with BrokerProcess(socket_dir, NAMES) as broker:
        broker.wait("daemon.started")
        with Traffic(socket_dir, str(broker.socket)) as traffic:
            fifo = socket_dir / "slow.yaml"
            os.mkfifo(fifo)
            writer = os.open(fifo, os.O_RDWR)
            whole = yaml.safe_load(broker.config.read_text())
            write_atomically(broker.config, yaml.safe_dump({**whole, "include": [fifo.name]}))
            broker.signal(signal.SIGHUP)
            until(lambda: _reads(broker.popen.pid, fifo), "it does not read the file")
            traffic.goes_on(more=100)
            assert not broker.events("daemon.reloaded")
            os.write(writer, b"clients: {new: {key: a key for a new client}}\n")
            os.close(writer)
            assert broker.wait("daemon.reloaded")[0]["added"] == ["new"]
            traffic.goes_on()
            account = traffic.finish("a disk that does not answer during a reload")
    assert (account.refused, account.in_doubt) == (0, 0)
    account.record("no connection ended; the reload succeeded when the file came")


def _reads(pid: int, file: Path) -> bool:
    return any(os.path.realpath(each) == str(file) for each in Path(f"/proc/{pid}/fd").iterdir())
