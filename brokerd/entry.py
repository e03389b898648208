"""What the commands do before they import anything large: open standard descriptors, and hold signals.

A standard descriptor that is closed would become that of a socket or a file, into which somebody's print goes; and
libuv ends the process when it closes one. A signal that arrives before its handler is there would end the process: it
waits until :mod:`brokerd.daemon.process` takes it, or until :mod:`brokerd.cli.main` finds that another command runs.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Final

__all__ = ["HELD", "brokerctl", "brokerd", "hold_signals", "open_standard_descriptors", "release_signals"]

#: Signals that mean something to a running broker, and would end a process that has no handler yet.
HELD: Final = tuple(
    getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, "pthread_sigmask")
)


def brokerd() -> None:
    """Run the command ``brokerd``."""
    open_standard_descriptors()
    hold_signals()
    from brokerd.cli.main import main

    main(prog_name="brokerd")


def brokerctl() -> None:
    """Run the command ``brokerctl``."""
    open_standard_descriptors()
    from brokerd.ctl import main

    main()


def open_standard_descriptors() -> None:
    """Open each of the descriptors 0, 1 and 2 that is closed on the null device."""
    if os.name != "posix":
        return
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest number that is free, and so this one.
            opened = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(opened, True)
            if getattr(sys, name) is None:
                setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def hold_signals() -> None:
    """Have the signals in HELD wait until ``release_signals``."""
    if HELD:
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def release_signals() -> None:
    """Take the signals that wait, and those to come."""
    if HELD:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
