"""A broker as a process of its own, which can be killed and started again at the same
address.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

TIMEOUT_S = 60


class RestartableBroker:
    """The daemon as a process, with the address and keys for its clients."""

    def __init__(self, home: Path, names: Iterable[str], options: str = "") -> None:
        self.address = str(home / "sock")
        self._file = home / "brokerd.yaml"
        entries = "".join(f"  {name}: {{key: {self.key(name)}, {options}}}\n" for name in names)
        self._file.write_text(f"listen: [{self.address}]\nclients:\n{entries}")
        self._file.chmod(0o600)
        self._running: subprocess.Popen[bytes] | None = None

    @staticmethod
    def key(name: str) -> str:
        return f"the-key-of-{name}"

    def start(self) -> None:
        """Start the broker; return when it accepts connections."""
        command = [
            sys.executable,
            "-c",
            "from brokerd.cli.main import main; main()",
            "--config",
            str(self._file),
        ]
        self._running = subprocess.Popen(
            command, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        assert self._running.stderr is not None
        line = self._running.stderr.readline()
        assert b"daemon.started" in line, line
        # The rest of the log is not needed, and must not fill the pipe.
        self._drain = subprocess.Popen(
            ["cat"], stdin=self._running.stderr, stdout=subprocess.DEVNULL
        )
        self._running.stderr.close()

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Kill the broker; return its exit status."""
        assert self._running is not None
        self._running.send_signal(number)
        status = self._running.wait(TIMEOUT_S)
        self._drain.wait(TIMEOUT_S)
        self._running = None
        return status

    def close(self) -> None:
        if self._running is not None:
            self.kill()


@contextmanager
def restartable_broker(
    home: Path, names: Iterable[str], options: str = ""
) -> Iterator[RestartableBroker]:
    """Run the daemon until the block ends."""
    broker = RestartableBroker(home, names, options)
    try:
        broker.start()
        yield broker
    finally:
        broker.close()
