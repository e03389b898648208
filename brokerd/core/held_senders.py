"""Held senders: sessions that are not read from, because a queue is full."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

from brokerd.core.allowance import Allowance
from brokerd.core.routing_result import RoutingResult

if TYPE_CHECKING:
    from brokerd.core.replies import Replies
    from brokerd.core.requests import Requests
    from brokerd.core.session import Session
    from brokerd.core.status import Status

__all__ = ["HeldSenders"]

#: Most held senders released per turn: the server reads from each of them in that turn.
_RELEASED: Final = 128
_FOREVER: Final = float("inf")


class HeldSenders:
    """All sessions that are held, and those that may be read from again.

    deadlines: the held sessions, each with the time at which it is released at the
        latest.
    released: sessions that may be read from again.
    """

    def __init__(self, status: Status, replies: Replies, requests: Requests) -> None:
        self._status = status
        self._requests = requests
        self._replies = replies
        self.deadlines: dict[Session, float] = {}
        self.released: list[Session] = []
        #: By recipient that has room again: its held senders still to be released, in
        #: turns.
        self._releasing: dict[Session, list[Session]] = {}
        #: Those recipients whose held senders are all released once more after that.
        self._release_again: set[Session] = set()

    @property
    def has_deferred_work(self) -> bool:
        """Whether senders are still to be released."""
        return bool(self._releasing)

    @property
    def next_deadline(self) -> float | None:
        """When ``release_due`` has something to do; None if no session is held."""
        return min(self.deadlines.values()) if self.deadlines else None

    def hold_at_most(self, target: Session, now: float) -> float:
        """Return the seconds for which a full recipient may hold one more sender."""
        if target.allowance is None:
            target.allowance = Allowance(at=now)
        limit = self._status.limits.wait_timeout
        return target.allowance.begin(now, limit, holds=bool(target.waiters))

    def hold(self, source: Session, target: Session, deadline: float) -> None:
        """Hold a sender until the target has room, at most until ``deadline``."""
        reason = (
            "it does not read the broker's answers"
            if target is source
            else "the queue it sends to is full"
        )
        self._replies.log_events.note("client.held", source, target.address, reason=reason)
        self.add(source, target, deadline)

    def add(self, source: Session, target: Session, deadline: float) -> None:
        """Record a sender as held, without a log event."""
        source.held_by = target
        target.waiters[source] = None
        self.deadlines[source] = deadline

    def hold_for_return(self, source: Session, name: str, deadline: float) -> None:
        """Hold a sender until a client is back that was online before a restart."""
        reason = "the client was online before the restart, and is not back yet"
        self._replies.log_events.note("client.held", source, name, reason=reason)
        self.add(source, source, deadline)

    def pass_to(self, target: Session, senders: list[Session]) -> None:
        """Make a client that is back the holder of its senders, to release them in turns."""
        for sender in senders:
            # It may have left, or may be held for another reason meanwhile.
            if sender.open and sender.held_by is sender:
                del sender.waiters[sender]
                sender.held_by = target
                target.waiters[sender] = None

    def wait_until_read(self, source: Session) -> RoutingResult:
        """Hold a client that does not read the broker's answers."""
        if not source.outbox.blocked:
            return RoutingResult.FLUSH
        self.hold(source, source, _FOREVER)
        return RoutingResult.BLOCKED

    def wait_for_answer(self, source: Session) -> RoutingResult:
        """Hold a session until its operation with a long answer has been answered."""
        self.add(source, source, _FOREVER)
        return RoutingResult.BLOCKED

    def release(self, session: Session) -> None:
        """Release a session if it is held, so that it is read from again."""
        if session.held_by is not None:
            del self.deadlines[session], session.held_by.waiters[session]
            session.held_by = None
            self.released.append(session)

    def take_released(self) -> list[Session]:
        """Remove and return the sessions that may be read from again."""
        sessions = self.released.copy()
        self.released.clear()
        return sessions

    def release_due(self, now: float) -> None:
        """Release the senders whose deadline is over; their messages are then refused."""
        due = (session for session, deadline in self.deadlines.items() if deadline <= now)
        for session in list(itertools.islice(due, _RELEASED)):
            holder = session.held_by
            assert holder is not None
            is_over = session.hold_deadline is not None and session.hold_deadline <= now
            # A sender that waits for a mailbox is held by itself.
            if is_over and holder is not session:
                holder.outbox.stalled = True
            self.release(session)
            if not holder.waiters and holder.allowance is not None:
                holder.allowance.end(now)

    def release_if_room(self, session: Session, now: float) -> None:
        """Release the session's held senders if at least half of its queue is free.

        It is called when the system has taken bytes of the session's outbox.
        """
        if session.slow and not session.outbox.waiting:
            session.slow = False
            self._replies.log_events.note(
                "client.recovered", session, reason="queue is empty again"
            )
        if session.outbox.waiting <= session.outbox.limit // 2:
            allowance = session.allowance
            if allowance is not None and (allowance.holding or session.outbox.stalled):
                allowance.end(now)
                allowance.earn(self._status.limits.wait_timeout)
            session.outbox.stalled = False
            self._requests.note_room(session.client)
            # A message to a pool's name may go to any member, so the senders that other
            # members hold try again too.
            for member in session.client.sessions.values():
                self.release_waiters(member)
            if session.host:
                self.release_waiters(session)

    def release_waiters(self, target: Session) -> None:
        """Release the senders that a session holds, the longest held first."""
        if target in self._releasing:
            self._release_again.add(target)
        elif target.waiters:
            self._release_some(target, sorted(target.waiters, key=_held_since)[::-1])

    def release_first(self, source: Session, target: Session) -> None:
        """Release a held sender in a later turn, before those added earlier."""
        self._releasing.setdefault(target, []).insert(0, source)

    def _release_some(self, target: Session, order: list[Session]) -> None:
        """Release senders from the end of ``order``; run_deferred releases the rest."""
        for _ in range(min(_RELEASED, len(order))):
            sender = order.pop()
            if sender.held_by is target:
                self.release(sender)
        if order:
            self._releasing[target] = order

    def run_deferred(self) -> None:
        """Release some more senders of one recipient, if senders wait for that."""
        if not self._releasing:
            return
        target, order = next(iter(self._releasing.items()))
        del self._releasing[target]
        if _has_room(target):
            self._release_some(target, order)
            if target in self._releasing:
                return
            if target in self._release_again:
                self._release_again.discard(target)
                self.release_waiters(target)
        else:
            # These senders are released when half of the queue is free.
            self._release_again.discard(target)


def _has_room(target: Session) -> bool:
    """Return whether the senders that a session holds may try again."""
    outbox = target.outbox
    return (
        not target.open
        or target.retired
        or not outbox.blocked
        or outbox.waiting <= outbox.limit // 2
    )


def _held_since(session: Session) -> float:
    """Return the sort key of held sessions: when their waiting frame arrived."""
    return session.arrived if session.charged else float("inf")
