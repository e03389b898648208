"""Signals where the event loop can't handle them, as on Windows. Other systems are
tested with real daemons.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from brokerd.daemon.process import _signals_go_to


class LoopWithoutSignals(asyncio.SelectorEventLoop):
    """An event loop that does not support signals."""

    def add_signal_handler(self, sig: int, callback: Callable[..., Any], *args: Any) -> None:
        raise NotImplementedError


def _put(received: asyncio.Queue[tuple[str, str]], action: str, name: str) -> None:
    received.put_nowait((action, name))


@pytest.mark.parametrize(
    ("number", "heard_by"),
    [("SIGTERM", "end"), ("SIGINT", "end"), ("SIGHUP", "reload"), ("SIGUSR2", "upgrade")],
)
def test_signal_wakes_event_loop_without_signal_support(number: str, heard_by: str) -> None:
    """The idle loop calls the signal's function. Other signals are ignored, and every
    handler is restored in the end.
    """
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]

    async def main() -> list[tuple[str, str]]:
        received: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        acts = [partial(_put, received, action) for action in ("end", "reload", "upgrade")]
        with _signals_go_to(*acts):
            handler = signal.signal(signal.SIGUSR1, lambda *_: None)
            loop = asyncio.get_running_loop()
            loop.call_soon(os.kill, os.getpid(), signal.SIGUSR1)
            loop.call_soon(os.kill, os.getpid(), signal.Signals[number])
            first = await asyncio.wait_for(received.get(), 30)
            signal.signal(signal.SIGUSR1, handler)
            return [first, *iter(lambda: None if received.empty() else received.get_nowait(), None)]

    with asyncio.Runner(loop_factory=LoopWithoutSignals) as runner:
        assert runner.run(main()) == [(heard_by, number)]
    assert [
        signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    ] == before
    assert signal.set_wakeup_fd(-1) == -1
