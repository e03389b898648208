"""Signals held from the first moment of the process.

A signal that arrives before its handler exists would end the process. It is held until
:mod:`brokerd.daemon.process` handles it, or until :mod:`brokerd.cli.main` finds that
another command runs.

This module runs before all other modules of brokerd. It therefore imports nothing but
the compiled part of :mod:`signal`, whose enumerations take milliseconds to import.
"""

import _signal  # type: ignore[import-not-found,unused-ignore]

__all__ = ["HELD", "hold_signals", "release_signals"]

#: Signals that a running broker handles, and that would end a process without a
#: handler.
HELD: tuple[int, ...] = tuple(
    getattr(_signal, name)
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(_signal, "pthread_sigmask")
)


def hold_signals() -> None:
    """Block the signals in HELD until ``release_signals``.

    Signals that the parent process has set to be ignored are blocked too. They stay
    pending until the broker's handlers are installed.
    """
    if HELD:
        _signal.pthread_sigmask(_signal.SIG_BLOCK, HELD)


def release_signals() -> None:
    """Unblock the held signals, and deliver those that are pending."""
    if HELD:
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, HELD)
