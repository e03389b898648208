"""Goaway: the last steps of a session that the broker is about to close.

The session receives a notice, finishes, and then receives nothing more. The rules are
from docs/protocol.md, "Going away".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Final, TypeAlias

from brokerd.core.events import recipients
from brokerd_client.wire.envelope import (
    BROKER,
    CodecId,
    Envelope,
    ErrorCode,
    Kind,
    encode,
    error_payload,
)
from brokerd_client.wire.framing import frame as make_frame

if TYPE_CHECKING:
    from brokerd.core.exchange import Exchange
    from brokerd.core.held_senders import HeldSenders
    from brokerd.core.in_flight import InFlight
    from brokerd.core.outbox import Outbox
    from brokerd.core.replies import Replies
    from brokerd.core.reports import Reports
    from brokerd.core.requests import DeliveredRequest, Requests
    from brokerd.core.session import Session
    from brokerd.core.status import Status
    from brokerd.core.topics import Topics

__all__ = [
    "DRAINING",
    "Goaway",
    "Marks",
    "add_reason",
    "mark",
    "reason_frame",
]

#: The topic of the event that announces the end of the connection.
DRAINING: Final = "$broker.draining"
_EVENT: Final = make_frame(
    encode(Envelope(Kind.EVENT, 0, BROKER, b"{}", codec=CodecId.JSON, topic=DRAINING))
)

#: Sessions for which a session's frames may wait, each with its outbox and a number of
#: bytes. Once the outbox has written that many bytes in all, none of those frames waits
#: there.
Marks: TypeAlias = "list[tuple[Session, Outbox, int]]"


class Goaway:
    """Ends sessions gracefully, one or all of them.

    finishing: sessions that wait for the reply to ``finished``.
    """

    def __init__(
        self,
        exchange: Exchange,
        topics: Topics[Session],
        status: Status,
        requests: Requests,
        replies: Replies,
        held: HeldSenders,
        in_flight: InFlight,
        reports: Reports,
    ) -> None:
        self._exchange = exchange
        self._topics = topics
        self._status = status
        self._requests = requests
        self._replies = replies
        self._held = held
        self._in_flight = in_flight
        self._reports = reports
        self.finishing: dict[Session, None] = {}

    def drain_in_steps(self) -> Iterator[None]:
        """Begin a drain: refuse new messages, send the notices, and release held senders.

        It yields after each step.
        """
        if self._status.draining:
            return
        self._status.draining = True
        self._status.generation += 1
        self._topics.forget()
        for recipient in recipients(self._topics, DRAINING, len(_EVENT)):
            if recipient is not None and recipient.open:
                self.tell(recipient)
            yield
        for session in [session for session in self._exchange.sessions() if session.goaway]:
            if session.open:
                self.tell(session)
            yield
        # The message of a sender that was held for a full queue is refused now.
        for session in list(self._held.deadlines):
            self._held.release(session)
            yield

    def tell(self, session: Session) -> None:
        """Send a session the goaway notice, once."""
        if not session.goaway_sent:
            session.goaway_sent = True
            self._replies.pass_on(session, _EVENT)

    def part(self, session: Session) -> None:
        """Refuse a session's new messages and send the notice, if it asked for one."""
        session.parting = session.goaway
        if session.goaway:
            self.tell(session)

    def retire(self, session: Session) -> None:
        """Stop all deliveries to a session: no name, topic or pending request finds it."""
        if session.retired or not session.open:
            return
        session.retired = True
        if self._status.changes is not None:
            self._status.changes.note(session)
        session.client.remove(session)
        self._in_flight.leave(session)
        self._topics.leave(session, session.subscriptions)
        session.subscriptions.clear()
        self._topics.abandon(session)
        self._in_flight.cancel_all(session)
        self._held.release_waiters(session)

    def mute(self, session: Session) -> None:
        """Send a session nothing more.

        Its further frames are delivered where possible, else counted as lost.
        """
        self.retire(session)
        session.mute = True

    def end_requests(self, session: Session) -> None:
        """Report a session's requests without an outcome, because the broker stops now.

        Only a report to a session that can receive it counts as reported.
        """
        for same_id in list(session.waiting_requests.values()):
            for request in same_id.copy():
                self._replies.returned["reported"] += not session.mute
                reason = f"the broker stopped before {request.to} had room for the request"
                self._in_flight.fail(request, ErrorCode.OFFLINE, reason)
        for delivered in self._requests.end_all(session):
            address = delivered.responder.address
            reason = f"the broker stopped before {address} answered"
            self._replies.refuse(session, delivered.id, ErrorCode.ABANDONED, reason, address)

    def has_finished(self, session: Session) -> bool:
        """Return whether every frame of a session has been written or reported.

        It has not finished while another client still waits for its answer. A client that
        has sent ``finished`` itself does not wait.
        """
        if (
            session.waiting_requests
            or session.uncommitted
            or _owes(session.incoming_requests.values())
        ):
            return False
        flight = session.client.flight
        if flight and session.in_flight != 0 and len(session.client.sessions) <= 1:
            # Requests wait for this member, the last one of its client.
            return False
        marks = session.marks
        if marks is None or not all(other.open for other, _, _ in marks):
            # Frames that waited for a closed connection are being reported, or wait for
            # another connection of the same client.
            if self._reports:
                return False
            marks = None
        if marks is None or (not marks and session.marked_at != session.messages_in):
            marks = mark(session)
            session.marked_at = session.messages_in
        session.marks = [mark for mark in marks if _is_waiting(*mark)]
        return not session.marks

    def answer_finished(self, session: Session) -> bool:
        """Answer ``finished`` if the session has finished; return whether it has."""
        assert session.finishing is not None
        if not self.has_finished(session):
            return False
        del self.finishing[session]
        # A frame delivered from now on might arrive after the client has closed.
        self.retire(session)
        self._replies.reply(session, session.finishing, {})
        session.finished = True
        return True


def add_reason(session: Session, code: ErrorCode, reason: str) -> None:
    """Append the ERROR with the id 0 that says why the broker closes the connection."""
    # Nothing is delivered after the reply to ``finished``.
    if session.open and not (session.mute or session.finished):
        session.outbox.append(reason_frame(code, reason))


@lru_cache(maxsize=64)
def reason_frame(code: ErrorCode, reason: str) -> bytes:
    """Return the ERROR frame that says why a client's connection ends."""
    # The ERROR names the broker itself: if the client does not read it, no message is
    # lost.
    payload = error_payload(code, reason, BROKER)
    return make_frame(encode(Envelope(Kind.ERROR, 0, BROKER, payload, codec=CodecId.JSON)))


def mark(session: Session) -> Marks:
    """Return the outboxes with frames of this session, and how far they must write."""
    return [
        (other, other.outbox, other.outbox.size)
        for client in session.recipients
        for other in client.sessions.values()
        if other is not session and other.outbox.waiting
    ]


def _is_waiting(session: Session, outbox: Outbox, size: int) -> bool:
    return session.outbox is outbox and outbox.size - outbox.waiting < size


def _owes(requests: Iterable[DeliveredRequest]) -> bool:
    return any(
        request.requester.open
        and not request.requester.retired
        and request.requester.finishing is None
        for request in requests
    )
