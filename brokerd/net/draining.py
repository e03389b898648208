"""The end of a broker that was told to stop: what waits is delivered, or its senders are told that it was not.

First everything that has arrived already is answered. Then each client takes what waits for it, for as long as
``limits.drain_timeout`` allows; whoever has nothing to wait for is let go at once, and whoever sent something that
still waits for another stays, to hear what becomes of it. Who has not read by then is cut off, and its senders are
told: of as much as can be told in a fraction of a second, however much it is.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from brokerd.core.exchange import Client
    from brokerd.core.session import Session
    from brokerd.net.link import Link
    from brokerd.net.server import Server

__all__ = ["Drained", "Draining"]

#: Seconds beyond the timeout in which senders are told what was not delivered, and in which that is written.
_TELL: Final = 0.4
_WRITE: Final = 0.2
#: Messages answered for between two looks at the clock: some milliseconds' work.
_SLICE: Final = 256
#: Seconds between two looks at who need not wait any more, at least.
_LOOK_AGAIN: Final = 0.02
#: The share of the time in which what has arrived already is answered, and what is read of each connection for that.
_CATCH_UP: Final = 0.5
_READS: Final = 16
#: Seconds of work after which others have their turn.
_TURN: Final = 0.01


class Drained(NamedTuple):
    """How it went.

    cut_off: connections that had bytes on their way. flushed: messages that waited and were written.
    reported: those that came back to their senders. lost: those that neither arrived nor came back.
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
        self._timeout_s = timeout_s
        self._deadline = self._loop.time() + timeout_s
        self._before = self._broker.given_back.copy()
        #: Of sessions for which something waits: how many frames do, and how many the system had taken.
        self._waited: dict[Session, tuple[int, int]] = {}
        self._flushed = 0

    async def run(self) -> Drained:
        """Let go of every connection; return how it went."""
        server, broker = self._server, self._broker
        server.stop_accepting()
        server.patience = -1
        broker.drain()
        server.settle()
        await self._catch_up()
        for link in server.links:
            outbox = link.session.outbox
            if outbox.waiting:
                unsent = outbox.unsent
                self._waited[link.session] = (unsent, outbox.frames - unsent)
        await self._flush()
        slow = [link for link in server.links if link.session.outbox.waiting]
        for link in slow:
            link.lost("it did not read within limits.drain_timeout")
        await self._tell()
        cut_off = len(slow) + server.cut_off()
        given_back = broker.given_back - self._before
        return Drained(cut_off, self._flushed, given_back["reported"], given_back["lost"] + broker.arrears)

    def on_leaving(self, session: Session) -> None:
        """Count what a session that is about to end has been written of what waited for it."""
        unsent, taken = self._waited.pop(session, (0, 0))
        if unsent:
            outbox = session.outbox
            self._flushed += min(unsent, outbox.frames - outbox.unsent - taken)

    async def _catch_up(self) -> None:
        """Answer what has arrived: it comes too late."""
        until = self._loop.time() + self._timeout_s * _CATCH_UP
        turn = self._loop.time() + _TURN
        for link in list(self._server.links):
            for _ in range(_READS):
                if not link.advance():
                    break
                self._server.settle()
                now = self._loop.time()
                if now >= until:
                    return
                if now >= turn:
                    await asyncio.sleep(0)
                    turn = self._loop.time() + _TURN

    async def _flush(self) -> None:
        """Wait until everybody has taken what waits, or the time is over."""
        pause = _LOOK_AGAIN
        while True:
            began = self._loop.time()
            self._let_go()
            # With a great many clients the looking takes its time, and the writing is to have more of it.
            pause = max(_LOOK_AGAIN, 10 * (self._loop.time() - began))
            left = self._deadline - self._loop.time()
            if left <= 0 or await self._is_empty_within(min(pause, left)):
                return

    def _let_go(self) -> None:
        """Close who need not stay; who is closed takes first what waits for it."""
        links = [link for link in self._server.links if not link.session.closing]
        waiting: set[Client] = {link.session.client for link in self._server.links if link.session.outbox.waiting}
        for link in links:
            if not _waits_for_others(link, waiting):
                self._close(link)
        self._server.settle()

    def _close(self, link: Link) -> None:
        self._broker.close(link.session, "the broker is shutting down")

    async def _is_empty_within(self, seconds: float) -> bool:
        """Wait for the end of all connections; return whether it came."""
        server = self._server
        server.empty.clear()
        if server.links or server.is_seeing_off:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(server.empty.wait(), seconds)
        return not (server.links or server.is_seeing_off)

    async def _tell(self) -> None:
        """Tell the senders of what could not be delivered, and let them go."""
        until = self._loop.time() + _TELL
        while self._broker.owes_answers and self._loop.time() < until:
            self._broker.work_off(_SLICE)
            self._server.settle()
            await asyncio.sleep(0)
        for link in self._server.links:
            self._close(link)
        self._server.settle()
        await self._is_empty_within(_WRITE)


def _waits_for_others(link: Link, waiting: set[Client]) -> bool:
    """Return whether something it sent may still come back to this client."""
    session = link.session
    return any(client in waiting for client in session.reached if client is not session.client)
