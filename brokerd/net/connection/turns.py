"""Senders with more input than one turn of theirs: which of them is next, and when."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio

    from brokerd.net.connection.connection import Connection

__all__ = ["Turns"]

#: Seconds after which further senders wait for the next turn of the event loop. Most turns
#: take longer: then it is one at a time.
_SLICE_S: Final = 0.00002


class Turns:
    """Gives waiting connections their turns, in order, and few per turn of the event loop.

    In between, the event loop serves the connections that have little to send: they do
    not wait until each busy sender has had its turn.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: dict[Connection, None] = {}
        self._scheduled = False

    def add(self, connection: Connection) -> None:
        """Add a connection behind those that wait already."""
        self._waiting[connection] = None
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = False
        end = time.monotonic() + _SLICE_S
        for _ in range(len(self._waiting)):
            connection = next(iter(self._waiting))
            del self._waiting[connection]
            connection.take_turn()
            if time.monotonic() >= end:
                break
        if self._waiting:
            self._schedule()
