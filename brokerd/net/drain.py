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

from brokerd.net.graceful_close import Parting, Turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from brokerd.core.session import Session
    from brokerd.net.context import Context

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
    """One drain of a server.

    timeout_s: seconds until connections that do not read are cut off.
    stop_accepting: closes every listening socket, and refuses all pending connections.
    drain_channels: passes on what channels have buffered, and ends them.
    cut_off: closes everything at once, and returns how many connections had bytes on
        their way.
    """

    def __init__(
        self,
        context: Context,
        timeout_s: float,
        *,
        stop_accepting: Callable[[], None],
        drain_channels: Callable[[], None],
        cut_off: Callable[[], int],
    ) -> None:
        self._stop_accepting = stop_accepting
        self._drain_channels = drain_channels
        self._cut_off_all = cut_off
        self._broker = context.broker
        self._loop = context.loop
        self._settle = context.settlement.settle
        self._connections = context.connections
        self._connections.linger_s = timeout_s
        self._connections.on_leaving = self._on_leaving
        context.settlement.has_turns = False
        self._deadline = self._loop.time() + timeout_s
        self._before = self._broker.replies.returned.copy()
        self._parting = Parting(context, lambda connection: True, "the broker is shutting down")
        self._turns = Turns(self._loop)
        #: For each session with a filled outbox: the number of frames that wait, and of
        #: frames that the system had taken.
        self._waited: dict[Session, tuple[int, int]] = {}
        self._flushed = 0

    async def run(self) -> Drained:
        """Close every connection gracefully; return the result."""
        broker, connections = self._broker, self._connections
        self._stop_accepting()
        self._drain_channels()
        for _ in broker.goaway.drain_in_steps():
            self._settle()
            await self._turns.yield_if_due()
        self._settle()
        for connection in list(connections.established):
            outbox = connection.session.outbox
            if outbox.waiting and not connection.closed:
                unsent = outbox.unsent
                self._waited[connection.session] = (unsent, outbox.frames - unsent)
                await self._turns.yield_if_due()
        await self._flush()
        slow = await self._cut_off()
        await self._tell()
        for connection in list(connections.established):
            if not connection.closed:
                slow += bool(connection.session.outbox.waiting)
                self._parting.count_unread(connection)
                connection.lost("the broker stopped")
                await self._turns.yield_if_due()
        cut_off = slow + self._cut_off_all()
        returned = broker.replies.returned - self._before
        # An error that its sender has not read has reported nothing.
        reported = max(0, returned["reported"] - broker.reports.unheard["offline"])
        lost = (
            returned["lost"]
            + broker.reports.unheard.total()
            + len(broker.reports)
            + self._parting.counted
        )
        return Drained(cut_off, self._flushed, reported, lost)

    def _on_leaving(self, session: Session) -> None:
        """Count the waiting frames that were written to a session that is about to end."""
        unsent, written = self._waited.pop(session, (0, 0))
        if unsent:
            outbox = session.outbox
            self._flushed += min(unsent, outbox.frames - outbox.unsent - written)

    async def _flush(self) -> None:
        """Wait until every client has read its messages and left, or the time is over."""
        while True:
            pause = await self._parting.look(self._deadline)
            left = self._deadline - self._loop.time()
            if left <= 0 or await self._is_empty_within(min(pause, left)):
                return

    async def _is_empty_within(self, seconds: float) -> bool:
        """Wait for the end of all connections; return whether all have ended."""
        connections = self._connections
        connections.empty.clear()
        if not connections.is_empty:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(connections.empty.wait(), seconds)
        return connections.is_empty

    async def _cut_off(self) -> int:
        """Close the connections that have unwritten output; return how many those were."""
        count = 0
        until = self._deadline + _TELL
        for connection in list(self._connections.established):
            if connection.session.outbox.waiting and not connection.closed:
                if self._loop.time() >= until:
                    break
                count += 1
                self._parting.count_unread(connection)
                connection.lost("client did not read within limits.drain_timeout")
                await self._turns.yield_if_due()
        return count

    async def _tell(self) -> None:
        """Report undelivered messages and unanswered requests to their senders, and close
        the senders' connections.
        """
        broker = self._broker
        until = self._loop.time() + _TELL
        while broker.reports and self._loop.time() < until:
            broker.run_deferred(_SLICE)
            self._settle()
            await asyncio.sleep(0)
        for connection in list(self._connections.established):
            if self._loop.time() >= until:
                break
            broker.goaway.end_requests(connection.session)
            await self._turns.yield_if_due()
        for session in list(broker.goaway.finishing):
            broker.goaway.answer_finished(session)
        await self._parting.end(until)
        self._settle()
        await self._is_empty_within(_WRITE)
