"""Notifications to the service manager: ready, reloading, stopping, status and
watchdog.

Speaks sd_notify(3): one datagram of ``NAME=VALUE`` lines to ``$NOTIFY_SOCKET``. Without
that variable every call here does nothing. A manager that does not read never delays or
ends the broker. Sockets that the manager hands over are taken in
:mod:`brokerd.net.listen.socket_activation`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Final, Self

__all__ = ["Supervisor"]

#: Seconds between two checks whether the status line has changed.
_STATUS_EVERY: Final = 5.0
#: Seconds that a state (ready, stopping) waits for room in the manager's socket; a
#: watchdog message does not wait.
_SEND_TIMEOUT_S: Final = 1.0
#: Seconds that the process may take to end after the drain's own time is over.
_END_WITHIN: Final = 10.0


class Supervisor:
    """The broker's notifications to its service manager.

    notify_socket: a path, or ``@`` and an abstract name; "" for no manager. watchdog_s:
    seconds without a watchdog message after which the manager ends the broker; None for
    no limit.
    """

    def __init__(self, notify_socket: str = "", watchdog_s: float | None = None) -> None:
        self._address = "\0" + notify_socket[1:] if notify_socket.startswith("@") else notify_socket
        self._watchdog_s = watchdog_s
        self._status: Callable[[], str] = str
        self._reported = ""
        self._stopping = False
        self._timers: dict[str, asyncio.TimerHandle] = {}

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ, pid: int | None = None) -> Self:
        """Return the supervisor that NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID
        configure.

        pid: this process; a watchdog meant for another process is ignored.
        """
        address = environ.get("NOTIFY_SOCKET", "")
        if sys.platform == "win32" or not address.startswith(("/", "@")):
            # Other kinds of address, such as a virtual machine's vsock:, are for the
            # manager of a whole machine.
            return cls()
        watchdog_s: float | None = None
        # sd_watchdog_enabled(3): without WATCHDOG_PID it is meant for any process that
        # reads it.
        if environ.get("WATCHDOG_PID", str(pid or os.getpid())) == str(pid or os.getpid()):
            with contextlib.suppress(ValueError):
                watchdog_s = int(environ.get("WATCHDOG_USEC", "")) / 1e6 or None
        return cls(address, watchdog_s)

    def notify(self, **fields: object) -> bool:
        """Send fields of sd_notify(3), such as ``MAINPID=4711``; return whether they
        were sent.

        With ``NotifyAccess=main`` the manager accepts only messages from the main
        process. An old process therefore sends ``MAINPID`` itself, and the new process
        sends after that.
        """
        return self._send(fields, _SEND_TIMEOUT_S)

    def ready(self, status: Callable[[], str]) -> None:
        """Report that the broker serves, and begin sending its status and watchdog
        messages.

        status: returns a line for people; called every few seconds.
        """
        if self._stopping or not self._address:
            return
        self._status = status
        self._reported = status()
        self.notify(READY=1, STATUS=self._reported)
        self._every(_STATUS_EVERY, "status", self._tell_status)
        if self._watchdog_s is not None:
            # After an upgrade, the manager still counts from the old process's last message.
            self._tell_alive()
            self._every(self._watchdog_s / 2, "watchdog", self._tell_alive)

    def reloading(self) -> None:
        """Report that a reload has begun; ``reloaded`` must follow."""
        if not self._stopping:
            self.notify(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000, STATUS="reloading")

    def reloaded(self, problem: str = "") -> None:
        """Report that the reload has ended.

        problem: why the old configuration stays, or "" after a successful reload.
        """
        # To count all messages takes milliseconds with very many connections.
        if self._address and not self._stopping:
            # Shown in the manager's status until the counts next change; the log keeps
            # it.
            self._reported = (
                f"reload refused, the old configuration stays: {problem}"
                if problem
                else self._status()
            )
            self.notify(READY=1, STATUS=self._reported)

    def stopping(self, drain_timeout_s: float) -> None:
        """Report that the broker drains, and how long that may take."""
        self._stopping = True
        self._forget("status")
        self.notify(
            STOPPING=1,
            STATUS="draining: writing what waits for clients",
            EXTEND_TIMEOUT_USEC=int((drain_timeout_s + _END_WITHIN) * 1e6),
        )

    def failed(self, reason: str, number: int | None = None) -> None:
        """Report why the broker could not start.

        number: the system's errno, if known.
        """
        # Error numbers of a name service are below 0, and are not errnos.
        self.notify(
            STATUS=reason, **({"ERRNO": number} if number is not None and number > 0 else {})
        )

    def close(self) -> None:
        """Stop the timed messages: the loop ends, or another process takes over."""
        for name in list(self._timers):
            self._forget(name)

    def _tell_status(self) -> None:
        status = self._status()
        if status != self._reported and self._send({"STATUS": status}, 0):
            self._reported = status

    def _tell_alive(self) -> None:
        # Only ever from a timer of the loop: a blocked loop must not reset the
        # watchdog.
        self._send({"WATCHDOG": 1}, 0)

    def _every(self, period_s: float, name: str, act: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()

        def again() -> None:
            self._timers[name] = loop.call_later(period_s, again)
            act()

        self._forget(name)
        self._timers[name] = loop.call_later(period_s, again)

    def _forget(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def _send(self, fields: Mapping[str, object], send_timeout_s: float) -> bool:
        if not self._address:
            return False
        lines = (f"{name}={' '.join(str(value).splitlines())}" for name, value in fields.items())
        try:
            # A new socket each time: the manager may have restarted and listen again at
            # the same address.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(send_timeout_s)
                sock.sendto("\n".join(lines).encode(), self._address)
        except OSError:
            return False
        return True
