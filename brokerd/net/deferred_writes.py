"""Writes the outboxes of many recipients in later turns of the event loop.

A write costs as much as some hundred short messages in the routing loop. A sender with
much input for a thousand recipients brings each of them a few messages with every read.
So the recipients' outboxes are written in turn, a part of them after each read. Every
outbox has collected the messages of many reads when its turn comes. Between two parts the
event loop serves the other clients, which do not wait for a thousand writes.
"""

from __future__ import annotations

import sys
from collections import deque
from typing import TYPE_CHECKING, Final

from brokerd.core import routing

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from brokerd.core.broker import Broker
    from brokerd.core.session import Session

__all__ = ["DeferredWrites"]

#: Recipients of one read from which on their outboxes are written in later turns. The
#: Python routing loop takes so long for a read that recipients do not wait for another.
_MANY: Final = 32 if routing.NAME == "compiled" else sys.maxsize
#: Bytes in an outbox that are worth a write of their own.
_PLENTY: Final = 64 * 1024
#: Outboxes written in one turn: one of _TURNS of those that wait, and at least _FEWEST.
_TURNS: Final = 64
_FEWEST: Final = 4


class DeferredWrites:
    """The sessions whose outboxes are written in later turns, in order.

    write: writes the touched outboxes of the broker.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, broker: Broker, write: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._touched = broker.touched
        self._status = broker.status
        self._write = write
        self._waiting: deque[Session] = deque()
        self._scheduled = False

    def defer(self) -> None:
        """Leave the touched outboxes for later turns, if they are many with few bytes each.

        Call it after a read of one sender's input that was so large that more is waiting.
        """
        touched, waiting = self._touched, self._waiting
        if waiting and waiting[0].outbox.waiting >= _PLENTY:
            # To wait for more bytes would only take them out of the processor's cache.
            self.take_back()
        elif (
            touched
            and (waiting or len(touched) >= _MANY)
            and touched[-1].outbox.waiting < _PLENTY
            # A changed outbox is noted when it is written.
            and self._status.changes is None
        ):
            waiting.extend(touched)
            touched.clear()
            if not self._scheduled:
                self._scheduled = True
                self._loop.call_soon(self._write_some)

    def take_back(self) -> None:
        """Count all these outboxes as touched again, to be written in this turn."""
        if self._waiting:
            self._touched.extend(self._waiting)
            self._waiting.clear()

    def _write_some(self) -> None:
        waiting = self._waiting
        for _ in range(min(max(len(waiting) // _TURNS, _FEWEST), len(waiting))):
            self._touched.append(waiting.popleft())
        self._scheduled = bool(waiting)
        if self._scheduled:
            self._loop.call_soon(self._write_some)
        self._write()
