"""Setup before large imports: open the standard descriptors and hold signals.

Otherwise a closed standard descriptor would be reused for a socket or a file. A print
would then write into it, and libuv ends the process when it closes one. A signal that
arrives before its handler exists would end the process. It is held until
:mod:`brokerd.daemon.process` handles it, or until :mod:`brokerd.cli.main` finds that
another command runs.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Final

__all__ = [
    "HELD",
    "brokerctl",
    "brokerd",
    "hold_signals",
    "open_standard_descriptors",
    "release_signals",
]

#: Signals that a running broker handles, and that would end a process without a
#: handler.
HELD: Final = tuple(
    getattr(signal, name)
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, "pthread_sigmask")
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
    """Open the null device at each of the descriptors 0, 1 and 2 that is closed."""
    if os.name != "posix":
        return
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            # The system assigns the lowest free number, which is this one.
            opened = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(opened, True)
            if getattr(sys, name) is None:
                setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def hold_signals() -> None:
    """Block the signals in HELD until ``release_signals``."""
    if HELD:
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def release_signals() -> None:
    """Unblock the held signals, and deliver those that are pending."""
    if HELD:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
