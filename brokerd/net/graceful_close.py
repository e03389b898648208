"""Graceful close of connections: no message that a client has sent is lost without a
report.

A client that asked for a ``goaway`` notice gets it, finishes its output, and closes. A
stock client gets a half-close when nothing more is owed to it. Messages that it still
sends are delivered where possible, and counted otherwise. Source of the rules:
docs/protocol.md, "Going away".
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from brokerd_client.wire.envelope import ErrorCode

if TYPE_CHECKING:
    from brokerd.core.broker import Broker
    from brokerd.core.exchange import Client
    from brokerd.core.session import Session
    from brokerd.net.connection.connection import Connection
    from brokerd.net.context import Context

__all__ = ["Finishing", "Parting", "Turns"]

#: Seconds without new input after which a half-closed connection is closed.
_SILENCE: Final = 0.5
#: Most reads of one connection before its half-close, even if it sends on; one read per
#: look.
_READS: Final = 16
#: Seconds of work after which the event loop gets its turn.
_TURN: Final = 0.005
#: Shortest pause between two looks, in seconds, and the pause as a multiple of the time
#: that a look takes.
_LOOK_AGAIN: Final = 0.02
_COST: Final = 10
#: Most bytes that are read of one connection when the time is over, to count the
#: messages in them.
_MOST_COUNTED: Final = 16 * 1024 * 1024


class Turns:
    """Gives the event loop its turn during long work."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._until = loop.time() + _TURN

    async def yield_if_due(self) -> None:
        """Yield to the event loop, if enough work has been done since the last time."""
        if self._loop.time() >= self._until:
            await asyncio.sleep(0)
            self._until = self._loop.time() + _TURN


class Finishing:
    """Answers ``finished`` operations when their time comes; has a timer only while
    some wait.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, broker: Broker, settle: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._broker = broker
        self._settle = settle
        self._timer: asyncio.Handle | None = None
        self._left: list[Session] = []

    def look_soon(self) -> None:
        """Schedule a look for the next turn, unless a look is scheduled."""
        if self._timer is None:
            self._timer = self._loop.call_soon(self._look)

    def close(self) -> None:
        """Cancel the scheduled look."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        broker, loop = self._broker, self._loop
        self._timer = None
        began = loop.time()
        self._left = self._left or list(broker.goaway.finishing)
        while self._left and loop.time() < began + _TURN:
            session = self._left.pop()
            if session in broker.goaway.finishing:
                broker.goaway.answer_finished(session)
        if broker.goaway.finishing:
            pause = 0.0 if self._left else max(_LOOK_AGAIN, _COST * (loop.time() - began))
            self._timer = loop.call_later(pause, self._look)
        self._settle()


class Parting:
    """Ends some of a server's connections gracefully.

    concerns: returns whether a connection is among them.
    reason: the reason in the log.
    counted: messages that were neither routed nor reported, because the time was over.
    """

    def __init__(
        self, context: Context, concerns: Callable[[Connection], bool], reason: str
    ) -> None:
        self._context = context
        self._broker = context.broker
        self._concerns = concerns
        self._reason = reason
        self._turns = Turns(context.loop)
        #: Number of reads of each connection before its half-close.
        self._reads: dict[Connection, int] = {}
        #: For each connection that should close by itself: its progress at the last
        #: look, and the time since which that has not changed.
        self._still: dict[Connection, tuple[tuple[int, ...], float]] = {}
        #: Recipients of the stock clients that may still send. Clients that only
        #: receive are half-closed after their senders.
        self._fed: set[Client] | None = None
        self.counted = 0

    def connections(self) -> list[Connection]:
        """Return the connections that have not ended."""
        established = self._context.connections.established
        return [connection for connection in established if self._concerns(connection)]

    async def look(self, until: float) -> float:
        """Take the next step for each connection; return the seconds until the next
        look.

        until: when to stop, in the time of the event loop.
        """
        loop = self._context.loop
        began = loop.time()
        fed, self._fed = self._fed, set()
        for connection in self.connections():
            if loop.time() >= until:
                break
            if not connection.closed and not connection.session.closing:
                self._go_on(connection, fed)
                self._context.settlement.settle()
                await self._turns.yield_if_due()
        return max(_LOOK_AGAIN, _COST * (loop.time() - began))

    def _go_on(self, connection: Connection, fed: set[Client] | None) -> None:
        session = connection.session
        if session.goaway and not session.goaway_sent:
            self._broker.goaway.part(session)
        if session.mute:
            self._feed(session)
            if self._is_silent(connection):
                self._broker.replies.close(session, self._reason)
        elif session.goaway:
            # A well-behaved client closes by itself; a finished client that stays is
            # half-closed.
            connection.ending = self._reason
            if session.finished and self._is_silent(connection):
                connection.half_close(self._reason)
        else:
            self._feed(session)
            asks = bool(session.outgoing_requests) or session in self._broker.operations.asking
            ready = (
                not session.outbox.waiting
                and not asks
                and self._broker.goaway.has_finished(session)
            )
            last = not session.recipients and (fed is None or session.client in fed)
            if ready and not last and not self._reads_on(connection):
                connection.half_close(self._reason)

    def _feed(self, session: Session) -> None:
        assert self._fed is not None
        self._fed |= session.recipients

    def _reads_on(self, connection: Connection) -> bool:
        """Route input that has arrived; return whether the half-close has to wait for
        replies.
        """
        session = connection.session
        reads = self._reads.get(connection, 0)
        if reads < _READS and connection.advance():
            self._reads[connection] = reads + 1
            return True
        return connection.closed or bool(session.closing) or bool(session.outbox.waiting)

    def _is_silent(self, connection: Connection) -> bool:
        """Return whether this connection has had no new input for some time."""
        now = self._context.loop.time()
        progress, since = self._still.get(connection, ((), now))
        if progress != connection.progress or connection.session.held_by is not None:
            self._still[connection] = connection.progress, now
            return False
        return now - since >= _SILENCE and not connection.advance()

    async def end(self, until: float) -> None:
        """Close the remaining connections, as far as there is time.

        Waiting messages have been written by now, or are lost.

        Args:
            until: In the time of the event loop.
        """
        loop = self._context.loop
        for connection in self.connections():
            if loop.time() >= until:
                return
            if not connection.closed and not connection.session.closing:
                self.count_unread(connection)
                self._broker.replies.close(
                    connection.session, self._reason, code=ErrorCode.SHUTTING_DOWN
                )
                self._context.settlement.settle()
                await self._turns.yield_if_due()

    def count_unread(self, connection: Connection) -> None:
        """Count the messages that this connection has sent and that will not be routed."""
        self.counted += connection.unread_messages(_MOST_COUNTED)
