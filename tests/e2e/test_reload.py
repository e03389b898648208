"""SIGHUP from outside: what is logged, and that no reload delays the end of the
process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from time import monotonic

import pytest
import yaml
from support.broker_process import TIMEOUT_S, BrokerProcess
from support.load.client_load import write_atomically
from support.raw_client import Raw

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc says what is open")


def test_reload_invalid_file_is_logged_and_keeps_clients(socket_dir: Path) -> None:
    """The log names each mistake, and connected clients stay."""
    with BrokerProcess(socket_dir) as broker, broker.login("alice") as alice:
        text = broker.config.read_text()
        write_atomically(broker.config, text + "nonsense: 1\n")
        broker.signal(signal.SIGHUP)
        (event,) = broker.wait("daemon.reload_refused")
        assert (event["reason"], event["cause"], event["level"]) == ("SIGHUP", "config", "warning")
        assert "unknown key 'nonsense'" in event["problems"][0]
        alice.ping()
        write_atomically(broker.config, text)
        broker.signal(signal.SIGHUP)
        (event,) = broker.wait("daemon.reloaded")
        assert (event["added"], event["changed"], event["disconnected"]) == ([], {}, [])
        alice.ping()


def wait_until_it_reads(broker: BrokerProcess, file: Path, alice: Raw) -> None:
    """Wait until the broker has the file open; it serves clients all the time."""
    deadline = monotonic() + TIMEOUT_S
    while str(file) not in descriptors(broker.popen.pid):
        assert monotonic() < deadline
        alice.ping()


def descriptors(pid: int) -> set[str]:
    """Return the paths of the process's open files."""
    found = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(str(each.readlink()))
    return found


@pytest.mark.timing
@linux
def test_reload_hanging_blocks_neither_messages_nor_stop(socket_dir: Path) -> None:
    """A disk that never answers delays neither messages nor SIGTERM. Signals that
    arrive meanwhile do not pile up.
    """
    with BrokerProcess(socket_dir) as broker, broker.login("alice") as alice:
        fifo = socket_dir / "hangs.yaml"
        os.mkfifo(fifo)
        writer = os.open(fifo, os.O_RDWR)
        whole = yaml.safe_load(broker.config.read_text())
        write_atomically(broker.config, yaml.safe_dump({**whole, "include": [fifo.name]}))
        broker.signal(signal.SIGHUP)
        wait_until_it_reads(broker, fifo, alice)
        for _ in range(5):
            broker.signal(signal.SIGHUP)
            alice.ping()
        began = monotonic()
        broker.signal(signal.SIGTERM)
        assert broker.exit_status() == 0
        assert monotonic() - began < 30
        os.close(writer)
        assert not broker.events("daemon.reloaded")
        assert "Traceback" not in "".join(broker.lines)


@linux
def test_reload_signals_during_reload_cause_one_more(socket_dir: Path) -> None:
    """Any number of signals during a reload cause one more reload, which reads the
    files as they are then.
    """
    with BrokerProcess(socket_dir) as broker, broker.login("alice") as alice:
        fifo = socket_dir / "slow.yaml"
        os.mkfifo(fifo)
        writer = os.open(fifo, os.O_RDWR)
        whole = yaml.safe_load(broker.config.read_text())
        write_atomically(broker.config, yaml.safe_dump({**whole, "include": [fifo.name]}))
        broker.signal(signal.SIGHUP)
        wait_until_it_reads(broker, fifo, alice)
        write_atomically(broker.config, yaml.safe_dump(whole))
        for _ in range(5):
            broker.signal(signal.SIGHUP)
            alice.ping()
        os.write(writer, b"clients: {carol: {key: c}}\n")
        os.close(writer)
        broker.wait("daemon.reloaded", 2)
        broker.signal(signal.SIGTERM)
        assert broker.exit_status() == 0
        assert [event["added"] for event in broker.events("daemon.reloaded")] == [["carol"], []]


def test_reload_key_in_place_of_path_is_not_logged(socket_dir: Path) -> None:
    """The refusal names the place in the configuration, but not the key."""
    key = "pV8k3Jz-0aQ_9dFhXw2mTtE7yLrUuNcB4sGiK1oZvIA"
    with BrokerProcess(socket_dir) as broker:
        broker.wait("daemon.started")
        good = broker.config.read_text()
        for number, field in enumerate(("key_file", "key_env", "key_credential"), 1):
            broker.config.write_text(
                good.replace("clients:", f"clients:\n  carol: {{{field}: {key}}}")
            )
            broker.signal(signal.SIGHUP)
            problems = broker.wait("daemon.reload_refused", number)[-1]["problems"]
            assert [f"clients.carol.{field}: " in each for each in problems] == [True]
        broker.signal()
        assert broker.exit_status() == 0
        assert key not in "".join(broker.lines)
