"""The daemon as a process: its configuration file, signals, exit status, and every byte
that it writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Self

import yaml
from support.keys import key_of
from support.raw_client import Raw, login

from brokerd_client.address import Address, parse

TIMEOUT_S = 30.0
PROGRAM = (
    "import sys; from pathlib import Path; from brokerd.daemon.process import run;"
    " sys.exit(run(Path(sys.argv[1])))"
)


class BrokerProcess:
    """A running daemon.

    Args:
        directory: Holds its configuration, keys and socket.
    """

    def __init__(
        self,
        directory: Path,
        clients: Mapping[str, Any] | Iterable[str] = ("alice", "bob"),
        *,
        listen: Iterable[Any] = (),
        preexec: Any = None,
        stderr: int = subprocess.PIPE,
        program: str = PROGRAM,
        prefix: Iterable[str] = (),
        environ: Mapping[str, str] | None = None,
        pass_fds: Iterable[int] = (),
        **more: Any,
    ) -> None:
        self.directory = directory
        self.socket = directory / "brokerd.sock"
        entries = clients if isinstance(clients, Mapping) else dict.fromkeys(clients)
        whole: dict[str, Any] = {"listen": [str(self.socket), *listen], "clients": {}, **more}
        for name, entry in entries.items():
            given = dict(entry or {})
            if not given.keys() & {"key", "keys", "peer_uid"}:
                (directory / f"{name}.key").write_bytes(key_of(name))
                (directory / f"{name}.key").chmod(0o600)
                given["key_file"] = f"{name}.key"
            whole["clients"][name] = given
        self.config = directory / "brokerd.yaml"
        self.config.write_text(yaml.safe_dump(whole))
        self.config.chmod(0o600)
        self.lines: list[str] = []
        self.popen = subprocess.Popen(
            [*prefix, sys.executable, "-c", program, str(self.config)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            preexec_fn=preexec,
            pass_fds=list(pass_fds),
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environ or {})},
        )
        self._news = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(stream,), daemon=True)
            for stream in (self.popen.stdout, self.popen.stderr)
            if stream is not None
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                with self._news:
                    self.lines.append(line)
                    self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(TIMEOUT_S)
        for pid in self.successors():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for reader in self._readers:
            reader.join(TIMEOUT_S)

    def successors(self) -> list[int]:
        """Return the running processes that were started to take its place, oldest
        first.
        """
        return [
            event["pid"] for event in self.events("daemon.upgrading") if self._is_ours(event["pid"])
        ]

    def _is_ours(self, pid: int) -> bool:
        # A process id that was reused belongs to another process.
        with contextlib.suppress(OSError):
            return os.fsencode(self.config) in Path(f"/proc/{pid}/cmdline").read_bytes()
        return False

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the events of this name that were logged so far."""
        events = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
        return [event for event in events if event["event"] == name]

    def wait(self, name: str, count: int = 1) -> list[dict[str, Any]]:
        """Return the events of this name when there are ``count``."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.events(name)) >= count, TIMEOUT_S), (
                self.lines
            )
        return self.events(name)

    @property
    def address(self) -> Address:
        return Address("AF_UNIX", path=str(self.socket))

    def addresses(self) -> list[Address]:
        """Return the addresses at which it listens."""
        return [parse(each) for each in self.wait("daemon.started")[0]["listeners"]]

    def login(self, name: str, address: Address | None = None) -> Raw:
        self.wait("daemon.started")
        return login(address or self.address, key_of(name), name.encode())

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.popen.send_signal(number)

    def exit_status(self) -> int:
        """Wait for the end; return the exit status when all output is in ``lines``."""
        status = self.popen.wait(TIMEOUT_S)
        for reader in self._readers:
            reader.join(TIMEOUT_S)
        return status
