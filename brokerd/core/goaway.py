"""Goaway: the last steps of a session that the broker is about to close.

The session receives a notice, finishes, and then receives nothing more. These are
functions of the broker (:mod:`brokerd.core.broker`). The rules are from
docs/protocol.md, "Going away".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Final, TypeAlias

from brokerd.core.delivery import forget_requests
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
    from brokerd.core.broker import Broker
    from brokerd.core.outbox import Outbox
    from brokerd.core.session import Session

__all__ = [
    "DRAINING",
    "Marks",
    "add_reason",
    "drain_in_steps",
    "has_finished",
    "mark",
    "mute",
    "part",
    "reason_frame",
    "retire",
    "tell",
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


def drain_in_steps(broker: Broker) -> Iterator[None]:
    """Begin a drain: refuse new messages, send the notices, and release held senders.

    It yields after each step.
    """
    if broker.draining:
        return
    broker.draining = True
    broker.generation += 1
    for recipient in recipients(broker, DRAINING, len(_EVENT)):
        if recipient is not None and recipient.open:
            tell(broker, recipient)
        yield
    for session in [session for session in broker.exchange.sessions() if session.goaway]:
        if session.open:
            tell(broker, session)
        yield
    # The message of a sender that was held for a full queue is refused now.
    for session in broker.held():
        broker.release(session)
        yield


def tell(broker: Broker, session: Session) -> None:
    """Send a session the goaway notice, once."""
    if not session.told:
        session.told = True
        broker.pass_on(session, _EVENT)


def add_reason(session: Session, code: ErrorCode, why: str) -> None:
    """Append the ERROR with the id 0 that says why the broker closes the connection."""
    # Nothing is delivered after the reply to ``finished``.
    if session.open and not (session.mute or session.finished):
        session.outbox.append(reason_frame(code, why))


@lru_cache(maxsize=64)
def reason_frame(code: ErrorCode, why: str) -> bytes:
    """Return the ERROR frame that says why a client's connection ends."""
    # The ERROR names the broker itself: if the client does not read it, no message is
    # lost.
    payload = error_payload(code, why, BROKER)
    return make_frame(encode(Envelope(Kind.ERROR, 0, BROKER, payload, codec=CodecId.JSON)))


def part(broker: Broker, session: Session) -> None:
    """Refuse a session's new messages and send the notice, if it asked for one."""
    session.parting = session.goaway
    if session.goaway:
        tell(broker, session)


def retire(broker: Broker, session: Session) -> None:
    """Stop all deliveries to a session: no name, topic or pending request finds it."""
    if session.retired or not session.open:
        return
    session.retired = True
    session.client.remove(session)
    broker.topics.leave(session, session.subscriptions)
    session.subscriptions.clear()
    broker.topics.abandon(session)
    forget_requests(broker, session)
    broker.release_waiters(session)


def mute(broker: Broker, session: Session) -> None:
    """Send a session nothing more.

    Its further frames are delivered where possible, else counted as lost.
    """
    retire(broker, session)
    session.mute = True


def mark(session: Session) -> Marks:
    """Return the outboxes with frames of this session, and how far they must write."""
    return [
        (other, other.outbox, other.outbox.size)
        for client in session.recipients
        for other in client.sessions.values()
        if other is not session and other.outbox.waiting
    ]


def has_finished(broker: Broker, session: Session) -> bool:
    """Return whether every frame of a session has been written or reported.

    It has not finished while another client still waits for its answer. A client that
    has sent ``finished`` itself does not wait.
    """
    if _owes(session.incoming_requests.values()):
        return False
    marks = session.marks
    if marks is None or not all(other.open for other, _, _ in marks):
        # Frames that waited for a closed connection are being reported, or wait for
        # another connection of the same client.
        if broker.owes_answers:
            return False
        marks = None
    if marks is None or (not marks and session.marked_at != session.messages_in):
        marks = mark(session)
        session.marked_at = session.messages_in
    session.marks = [each for each in marks if _is_waiting(*each)]
    return not session.marks


def _is_waiting(session: Session, outbox: Outbox, size: int) -> bool:
    return session.outbox is outbox and outbox.size - outbox.waiting < size


def _owes(requesters: Iterable[Session]) -> bool:
    return any(each.open and not each.retired and each.finishing is None for each in requesters)
