"""The wait queue of the blocking client, in several threads."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from brokerd_client.blocking.gate import Gate
from brokerd_client.blocking.waiters import Waiters


class DisturbedGates(dict[Gate, None]):
    """Gates of which another one is added between ``iter`` and the first ``next``."""

    disturbances = 2

    def __iter__(self):  # type: ignore[no-untyped-def]
        gates = super().__iter__()
        if self.disturbances:
            self.disturbances -= 1
            self[Gate()] = None
        return gates


def test_waiters_gate_entered_during_wake_is_no_error() -> None:
    """A thread that comes to wait while another is woken disturbs neither."""
    waiters, first = Waiters(), Gate()
    waiters._gates = DisturbedGates()
    waiters.enter(first)

    waiters.wake(1)

    assert first.is_open
    assert len(waiters._gates) == DisturbedGates.disturbances


def test_waiters_signal_handlers_error_during_wake_is_raised() -> None:
    """A RuntimeError of a signal handler is not mistaken for that of the gates."""

    def handler() -> None:
        raise RuntimeError("from a handler")

    class Interrupted(dict[Gate, None]):
        def __iter__(self):  # type: ignore[no-untyped-def]
            handler()
            return super().__iter__()

    waiters = Waiters()
    waiters._gates = Interrupted({Gate(): None})

    with pytest.raises(RuntimeError, match="from a handler"):
        waiters.wake(1)


def test_waiters_threads_that_come_and_go_disturb_no_wake() -> None:
    """Threads enter and leave all the time, and the waking thread sees no error."""
    waiters = Waiters()
    ends_at = time.monotonic() + 0.3

    def come_and_go() -> None:
        while time.monotonic() < ends_at:
            own = Gate()
            waiters.enter(own)
            waiters.leave(own)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        while time.monotonic() < ends_at:
            waiters.wake(1)
    finally:
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
