"""Runs `brokerctl` against a real broker: in this process if that is enough, else in a
process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from brokerd.ctl.command import brokerctl
from brokerd.testing import RunningBroker, broker

__all__ = ["broker"]

TIMEOUT_S = 30
#: The command, as the interpreter that runs the tests starts it. A test run in the
#: background may ignore Ctrl-C, and whatever it starts inherits that.
_START = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from brokerd.ctl"
    " import main; main()"
)
BROKERCTL = [sys.executable, "-c", _START]


class Ctl:
    """`brokerctl` at one broker."""

    def __init__(self, broker: RunningBroker, folder: Path) -> None:
        self.broker = broker
        self._folder = folder

    def key_file(self, name: str) -> Path:
        """Return a file with the client's key; a new name becomes a client."""
        path = self._folder / name
        # One line end of either kind is cut from the file, and a key of random bytes
        # may end with half of one.
        path.write_bytes(self.broker.key(name) + b"\r\n")
        return path

    def access(self, name: str) -> list[str]:
        """Return the options that make `brokerctl` that client."""
        return [
            "--address",
            self.broker.address,
            "--name",
            name,
            "--key-file",
            str(self.key_file(name)),
        ]

    def __call__(self, name: str, *arguments: str, stdin: bytes | str | None = None) -> Result:
        """Run it as that client to its end."""
        return CliRunner().invoke(brokerctl, [*self.access(name), *arguments], input=stdin)

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start it as that client in a process of its own."""
        return subprocess.Popen(
            [*BROKERCTL, *self.access(name), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )

    def wait_online(self, watcher: Any, name: str) -> None:
        """Wait until the broker publishes that the client is connected."""
        with watcher.watch_presence() as feed:
            while True:
                presence = feed.recv(timeout=TIMEOUT_S)
                if (presence.name, presence.online) == (name, True):
                    return


@pytest.fixture
def ctl(broker: RunningBroker, tmp_path: Path) -> Ctl:
    """Return `brokerctl` for a new broker."""
    return Ctl(broker, tmp_path)


@pytest.fixture
def begin() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start processes, and kill those left at the end."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=TIMEOUT_S)
