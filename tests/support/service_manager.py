"""A service manager, played by the test: it receives the daemon's notifications, and
hands over sockets.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from support.broker_process import BrokerProcess

TIMEOUT_S = 30.0
#: Puts the sockets where sd_listen_fds(3) looks for them, as the manager does between
#: fork and exec.
PROGRAM = """
import fcntl, os, sys
from pathlib import Path
given = [int(fd) for fd in os.environ.pop("TEST_FDS", "").split()]
for number, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in given]):
    os.dup2(fd, 3 + number)
    os.close(fd)
if given:
    os.environ["LISTEN_PID"] = str(os.getpid())
from brokerd.daemon.process import run
sys.exit(run(Path(sys.argv[1])))
"""


class Manager:
    """The other end of NOTIFY_SOCKET.

    Args:
        address: The value of that variable: a path, or ``@`` and an abstract name.
    """

    def __init__(self, address: Path | str) -> None:
        self.address = str(address)
        self.received: list[dict[str, str]] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind("\0" + self.address[1:] if self.address.startswith("@") else self.address)
        self._sock.settimeout(TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._sock.close()

    def next(self) -> dict[str, str]:
        """Return the next notification, its fields by name."""
        text = self._sock.recv(65536).decode()
        self.received.append(dict(line.split("=", 1) for line in text.split("\n")))
        return self.received[-1]

    def wait(self, condition: Callable[[dict[str, str]], object] | str) -> dict[str, str]:
        """Return the next notification that has this field, or that meets this
        condition.
        """
        while True:
            message = self.next()
            if condition in message if isinstance(condition, str) else condition(message):
                return message

    def is_silent_for(self, seconds: float) -> bool:
        """Return whether no notification arrives for ``seconds`` from now on; earlier
        ones are discarded.
        """
        try:
            self._sock.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    self.next()
            self._sock.settimeout(seconds)
            self.next()
        except TimeoutError:
            return True
        finally:
            self._sock.settimeout(TIMEOUT_S)
        return False

    def start(
        self,
        directory: Path,
        *given: Any,
        sockets: Iterable[socket.socket] = (),
        names: str | None = None,
        environ: dict[str, str] | None = None,
        first: str = "",
        **how: Any,
    ) -> BrokerProcess:
        """Run a daemon that notifies this manager.

        Args:
            sockets: Sockets to hand over to the daemon.
            names: The names of the sockets, joined by colons.
            first: Python code that the daemon's process runs first.
        """
        fds = [sock.fileno() for sock in sockets]
        variables = {"NOTIFY_SOCKET": self.address, **(environ or {})}
        if fds:
            variables |= {"TEST_FDS": " ".join(map(str, fds)), "LISTEN_FDS": str(len(fds))}
        if names is not None:
            variables["LISTEN_FDNAMES"] = names
        return BrokerProcess(
            directory, *given, program=first + PROGRAM, pass_fds=fds, environ=variables, **how
        )
