"""The daemon in a Windows Python under wine: served at a named pipe and at a port, and
stopped by its signals.
"""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.system.windows import HERE, ROOT, Windows, install_dependencies, passed, windows

RUN_TIMEOUT_S = 200
PATIENCE_S = 30

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Windows]:
    """A Windows Python that can import the daemon."""
    with windows(tmp_path_factory.mktemp("wine") / "prefix") as made:
        made.add_path(install_dependencies(made), ROOT, ROOT / "client")
        yield made


def test_windows_daemon_serves_pipes_and_sockets(system: Windows, tmp_path: Path) -> None:
    """Every case of windows_daemon.py passes in a Windows Python."""
    names = re.findall(r"^@case\ndef (\w+)", (HERE / "windows_daemon.py").read_text(), re.MULTILINE)
    output = system.run(HERE / "windows_daemon.py", tmp_path, timeout_s=RUN_TIMEOUT_S)
    assert passed(output) == set(names)
    assert len(names) > 10


@pytest.mark.parametrize("presses", [1, 2])
def test_windows_daemon_is_stopped_by_ctrl_c(system: Windows, tmp_path: Path, presses: int) -> None:
    """Ctrl-C in its console drains an idle daemon, which waits for sockets only; its
    exit status is 0.

    With a client that reads nothing, a second Ctrl-C ends it at once, with 1.
    """
    (tmp_path / "key").write_text("k\n")
    config = tmp_path / "brokerd.yaml"
    daemon = client = None
    config.write_text(
        "listen: ['\\\\.\\pipe\\brokerd-ctrl-c', '127.0.0.1:0']\n"
        "clients: {alice: {key_file: key, allow_md5: true}}\n"
        "limits: {drain_timeout: 500s}\n"
        "log: {format: json}\n"
    )
    terminal, console = pty.openpty()
    environment = {**system.environment, "TERM": "xterm"}
    try:
        daemon = subprocess.Popen(
            [
                sys.executable,
                "-c",
                IN_TERMINAL,
                *system.command("-m", "brokerd.cli.main", "--config", config),
            ],
            env=environment,
            stdin=console,
            stdout=console,
            stderr=console,
            start_new_session=True,
        )
        os.close(console)
        screen = Screen(terminal)
        screen.wait_for("daemon.started")
        if presses == 2:
            client = subprocess.Popen(
                system.command("-c", NOT_READING),
                env=system.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            assert client.stdout is not None
            assert client.stdout.readline().split() == [b"full"]
        os.write(terminal, b"\x03")
        screen.wait_for("SIGINT")
        if presses == 2:
            os.write(terminal, b"\x03")
            screen.wait_for("daemon.killed")
        else:
            screen.wait_for("daemon.stopped")
        screen.read_to_end()
        assert daemon.wait(PATIENCE_S) == presses - 1
    finally:
        os.close(terminal)
        for process in (daemon, client):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait(PATIENCE_S)
            if process is not None and process.stdin is not None:
                process.stdin.close()
            if process is not None and process.stdout is not None:
                process.stdout.close()


#: Makes standard input the terminal that controls the process: what Ctrl-C is typed
#: into.
IN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""

#: Sends to itself and reads nothing of it.
NOT_READING = r"""
import struct, sys
from multiprocessing.connection import Client
connection = Client(r"\\.\pipe\brokerd-ctrl-c", authkey=b"k")
for _ in range(40):
    connection.send_bytes(struct.pack("!BBBBQ", 1, 0, 0, 5, 0) + b"alice" + bytes(100_000))
print("full", flush=True)
sys.stdin.read()
"""


class Screen:
    """The output of a program to its terminal."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self.text = ""

    def wait_for(self, word: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        # The console breaks words at the edge of the screen and moves about between
        # them.
        while word not in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\s", "", self.text):
            assert time.monotonic() < deadline, self.text
            assert self._read(), self.text

    def read_to_end(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self._read():
            assert time.monotonic() < deadline, self.text

    def _read(self) -> bool:
        if not select.select([self._terminal], [], [], PATIENCE_S)[0]:
            return False
        try:
            data = os.read(self._terminal, 65536)
        except OSError:
            # On Linux this means that no process has the other end any more.
            return False
        self.text += data.decode(errors="replace")
        return bool(data)
