"""The drain of a broker: waiting messages are delivered, or reported to their senders.

Clients that asked for a goaway notice get it. They leave when all that they have sent
is written or reported. Other clients get a half-close when nothing is owed to them any
more (:mod:`brokerd.net.graceful_close`). The drain lasts as long as
``limits.drain_timeout`` allows. A client that has not read by then is cut off. Its
senders are told of as many messages as a fraction of a second allows. All of this is
done in turns with the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final, NamedTuple

from brokerd.core.goaway import drain_in_steps
from brokerd.net.graceful_close import Parting, Turns

if TYPE_CHECKING:
    from brokerd.core.session import Session
    from brokerd.net.server import Server

__all__ = ["Drained", "Draining"]

#: Seconds beyond the timeout: _TELL to report undelivered messages to their senders,
#: and _WRITE to write those reports.
_TELL: Final = 0.4
_WRITE: Final = 0.2
#: Messages reported between two checks of the clock: some milliseconds' work.
_SLICE: Final = 256


class Drained(NamedTuple):
    """The result of a drain.

    cut_off: connections that had bytes on their way.
    flushed: messages that waited and were written.
    reported: messages that came back to their senders.
    lost: messages that neither arrived nor came back.
    """

    cut_off: int
    flushed: int
    reported: int
    lost: int


class Draining:
    """One drain of a server."""

    def __init__(self, server: Server, timeout_s: float) -> None:
        self._server = server
        self._broker = server.broker
        self._loop = server.loop
        self._deadline = self._loop.time() + timeout_s
        self._before = self._broker.returned.copy()
        self._parting = Parting(server, lambda connection: True, "the broker is shutting down")
        self._turns = Turns(self._loop)
        #: For each session with a filled outbox: the number of frames that wait, and of
        #: frames that the system had taken.
        self._waited: dict[Session, tuple[int, int]] = {}
        self._flushed = 0

    async def run(self) -> Drained:
        """Close every connection gracefully; return the result."""
        server, broker = self._server, self._broker
        server.stop_accepting()
        for _ in drain_in_steps(broker):
            server.settle()
            await self._turns.yield_if_due()
        server.settle()
        for connection in list(server.connections):
            outbox = connection.session.outbox
            if outbox.waiting and not connection.closed:
                unsent = outbox.unsent
                self._waited[connection.session] = (unsent, outbox.frames - unsent)
                await self._turns.yield_if_due()
        await self._flush()
        slow = await self._cut_off()
        await self._tell()
        for connection in list(server.connections):
            if not connection.closed:
                slow += bool(connection.session.outbox.waiting)
                self._parting.count_unread(connection)
                connection.lost("the broker stopped")
                await self._turns.yield_if_due()
        cut_off = slow + server.cut_off()
        returned = broker.returned - self._before
        # An error that its sender has not read has reported nothing.
        reported = max(0, returned["reported"] - broker.unheard["offline"])
        lost = (
            returned["lost"]
            + broker.unheard.total()
            + broker.deferred_reports
            + self._parting.counted
        )
        return Drained(cut_off, self._flushed, reported, lost)

    def on_leaving(self, session: Session) -> None:
        """Count the waiting frames that were written to a session that is about to end."""
        unsent, taken = self._waited.pop(session, (0, 0))
        if unsent:
            outbox = session.outbox
            self._flushed += min(unsent, outbox.frames - outbox.unsent - taken)

    async def _flush(self) -> None:
        """Wait until every client has read its messages and left, or the time is over."""
        while True:
            pause = await self._parting.look(self._deadline)
            left = self._deadline - self._loop.time()
            if left <= 0 or await self._is_empty_within(min(pause, left)):
                return

    async def _is_empty_within(self, seconds: float) -> bool:
        """Wait for the end of all connections; return whether all have ended."""
        server = self._server
        server.empty.clear()
        if server.connections or server.is_lingering:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(server.empty.wait(), seconds)
        return not (server.connections or server.is_lingering)

    async def _cut_off(self) -> int:
        """Close the connections that have unwritten output; return how many those were."""
        count = 0
        until = self._deadline + _TELL
        for connection in list(self._server.connections):
            if connection.session.outbox.waiting and not connection.closed:
                if self._loop.time() >= until:
                    break
                count += 1
                self._parting.count_unread(connection)
                connection.lost("it did not read within limits.drain_timeout")
                await self._turns.yield_if_due()
        return count

    async def _tell(self) -> None:
        """Report undelivered messages to their senders, and close the senders'
        connections.
        """
        broker, server = self._broker, self._server
        until = self._loop.time() + _TELL
        while broker.owes_answers and self._loop.time() < until:
            broker.run_deferred(_SLICE)
            server.settle()
            await asyncio.sleep(0)
        for session in list(broker.finishing):
            broker.answer_finished(session)
        await self._parting.end(until)
        server.settle()
        await self._is_empty_within(_WRITE)
