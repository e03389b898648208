"""Carries out what the core has decided: writes, closes, resumes, and sets its timer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from brokerd.log.minute_counts import MinuteCounts
from brokerd.net.core_events import report
from brokerd.net.deferred_writes import DeferredWrites
from brokerd.net.graceful_close import Finishing

if TYPE_CHECKING:
    import asyncio

    from brokerd.core.broker import AdminCommand, Broker
    from brokerd.core.cluster.cluster import Cluster
    from brokerd.core.session import Session
    from brokerd.log.rate_limit import LogRateLimiter
    from brokerd.net.connection.connection import Connection

__all__ = ["Settlement"]

#: Sessions closed in one turn of the event loop: some milliseconds' work.
_CLOSES: Final = 64
#: Messages of ended sessions reported to their senders in one turn of the event loop: a
#: millisecond's work.
_DEFERRED_PER_TURN: Final = 64
#: Bytes of a read that suggest that more are waiting.
_PLENTY: Final = 64 * 1024


class Settlement:
    """Carries out the decisions of one broker.

    on_admin_command: executes a command that an administrator sent.
    wall: returns the time of day in seconds since the epoch.
    on_channels: refuses and closes channels, as the core has decided.
    cluster: the links to other hosts; None without a cluster.
    on_outgoing: publishes what the links have for other hosts.
    has_more: there may be more to carry out than bytes to write.
    has_turns: at most _CLOSES sessions are closed in one turn of the event loop. A drain
        closes all of them, because it takes turns itself.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        broker: Broker,
        log_limiter: LogRateLimiter,
        on_admin_command: Callable[[AdminCommand], None],
        *,
        wall: Callable[[], float],
    ) -> None:
        self._loop = loop
        self._broker = broker
        self._log_limiter = log_limiter
        self._refusals = MinuteCounts(loop, log_limiter.log)
        self._on_admin_command = on_admin_command
        self._wall = wall
        self.on_channels: Callable[[], None] = lambda: None
        self.cluster: Cluster | None = None
        self.on_outgoing: Callable[[], None] = lambda: None
        self.has_more = False
        self.has_turns = True
        self._settling = False
        self._running_deferred = False
        self._tick: asyncio.TimerHandle | None = None
        #: The time of that timer, in seconds of the event loop. uvloop's handle does
        #: not know it once the time has passed.
        self._tick_at = 0.0
        #: Number of sessions closed in this turn of the event loop, and the sessions to
        #: be closed in later turns.
        self._closes = 0
        self._closing_on = False
        self._put_off: deque[Session] = deque()
        self._deferred_writes = DeferredWrites(loop, broker, self.settle_read)
        self._finishing = Finishing(loop, broker, self.settle)
        # A message may be stored, or an operation answered, before anything is settled.
        self._set_clock()

    @property
    def is_closing(self) -> bool:
        """Whether sessions were closed in this turn, or wait for a later one."""
        return self._closing_on or bool(self._put_off)

    def write_touched(self) -> None:
        """Write every outbox that has new bytes, and close sessions that are to be
        closed.
        """
        self._deferred_writes.take_back()
        self._write_touched()

    def _write_touched(self) -> None:
        """Do so, except for the outboxes that are written in later turns."""
        touched, changes = self._broker.touched, self._broker.status.changes
        while touched:
            session = touched.pop()
            session.outbox.touched = False
            connection: Connection = session.connection
            if not session.open:
                continue
            if changes is not None:
                changes.note(session)
            if session.closing:
                if not self._may_close(session):
                    continue
                connection.add_reason()
            if session.cut:
                connection.lost(session.closing)
            elif not (session.outbox.blocked and connection.writing):
                connection.write()
            elif session.closing:
                connection.close_soon()

    def _may_close(self, session: Session) -> bool:
        """Return whether a session may be closed in this turn of the event loop.

        Otherwise it is postponed to a later turn. A reload or an operator may end ten
        thousand sessions at once.
        """
        if not self.has_turns:
            return True
        if not self._closing_on:
            self._closing_on = True
            self._loop.call_soon(self._close_on)
        if self._closes < _CLOSES:
            self._closes += 1
            return True
        self._put_off.append(session)
        return False

    def _close_on(self) -> None:
        """Close some of the postponed sessions."""
        self._closing_on = False
        self._closes = 0
        for _ in range(min(_CLOSES, len(self._put_off))):
            session = self._put_off.popleft()
            if session.open:
                self._broker.replies.touch(session)
        if self._put_off:
            self._closing_on = True
            self._loop.call_soon(self._close_on)
        self.settle()

    def settle_read(self, size: int = 0) -> None:
        """Carry out the core's decisions about the frames of one read.

        Frames that stayed in the routing loop leave bytes to write, and deadlines. To
        look for anything else would take as long as to route a short message. After a
        large read, the outboxes of many recipients may be written in later turns.

        size: the bytes of the read.
        """
        broker = self._broker
        if size >= _PLENTY:
            self._deferred_writes.defer()
        if self.has_more or self._settling or broker.held.released:
            self.settle()
            return
        self._settling = True
        try:
            self._write_touched()
        finally:
            self._settling = False
        if self.has_more or broker.held.released or broker.replies.log_events:
            # A write has ended a connection, or frames had expired.
            self.settle()
        else:
            due = broker.requests.deadlines.next
            if due is not None and (self._tick is None or due < self._tick_at):
                self._set_timer()
            if self.cluster is not None:
                self._publish(self.cluster)

    def _publish(self, cluster: Cluster) -> None:
        """Publish what there is for other hosts.

        Local traffic leaves nothing, and pays for nothing more than to look.
        """
        if cluster.has_outgoing:
            self.on_outgoing()

    def settle(self) -> None:
        """Carry out the core's decisions: write, close, resume, run commands, set the
        timer.

        A write may end a connection, whose end calls this again. The inner call returns
        at once: the outer call continues until no decision is left.
        """
        if self._settling:
            self.has_more = True
            return
        self._settling = True
        broker = self._broker
        if broker.taps.active:
            broker.send_copies()
        try:
            if broker.mailboxes.is_active:
                self._tend_mailboxes()
            self._deferred_writes.take_back()
            while broker.touched or broker.held.released:
                self._write_touched()
                for session in broker.held.take_released():
                    if session.open:
                        session.connection.resume()
                if broker.taps.active:
                    # Of frames that have passed since: no later turn may follow soon.
                    broker.send_copies()
        finally:
            self._settling = False
        self.has_more = False
        if broker.replies.log_events:
            log_events = broker.replies.log_events.take()
            broker.incidents.add(log_events, self._wall())
            report(log_events, self._log_limiter, self._refusals)
        if broker.channels.refusals or broker.channels.closing:
            self.on_channels()
        while broker.operations.admin_commands:
            self._on_admin_command(broker.operations.admin_commands.pop(0))
        if broker.has_deferred_work and not self._running_deferred:
            self._running_deferred = True
            self._loop.call_soon(self._run_deferred)
        self._set_timer()
        if broker.goaway.finishing:
            self._finishing.look_soon()
        if self.cluster is not None:
            self._publish(self.cluster)

    def _tend_mailboxes(self) -> None:
        """Deliver some messages, and give the changes of this turn to the store."""
        mailboxes = self._broker.mailboxes
        self._set_clock()
        if mailboxes.has_work:
            mailboxes.run()

    def _set_clock(self) -> None:
        self._broker.mailboxes.clock.set(self._loop.time(), self._wall())

    def _run_deferred(self) -> None:
        """Do some of the deferred work of ended sessions, and the rest in the next
        turns.
        """
        self._running_deferred = False
        self._broker.run_deferred(_DEFERRED_PER_TURN)
        self.settle()

    def _set_timer(self) -> None:
        deadline = self._broker.next_deadline
        # A timer that turns out to be early is kept: most requests are answered long before
        # their ttl is over, and setting it again for each of them would cost more.
        if self._tick is not None and deadline is not None and deadline < self._tick_at:
            self._tick.cancel()
            self._tick = None
        if self._tick is None and deadline is not None and deadline != float("inf"):
            self._tick_at = deadline
            self._tick = self._loop.call_at(deadline, self._on_tick)

    def _on_tick(self) -> None:
        self._tick = None
        self._broker.tick(self._loop.time())
        self.settle()

    def close(self) -> None:
        """Cancel the timers, and log the refusals that were only counted so far."""
        self._finishing.close()
        self._refusals.close()
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
