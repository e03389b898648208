"""Signals held from the first moment of the process.

A signal that arrives before its handler exists would end the process. It is held until
:mod:`brokerd.daemon.process` handles it, or until :mod:`brokerd.cli.main` finds that
another command runs.
"""

from __future__ import annotations

import signal
from typing import Final

__all__ = ["HELD", "hold_signals", "release_signals"]

#: Signals that a running broker handles, and that would end a process without a
#: handler.
HELD: Final = tuple(
    getattr(signal, name)
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, "pthread_sigmask")
)


def hold_signals() -> None:
    """Block the signals in HELD until ``release_signals``."""
    if HELD:
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def release_signals() -> None:
    """Unblock the held signals, and deliver those that are pending."""
    if HELD:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
