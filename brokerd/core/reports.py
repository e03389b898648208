"""Reports to senders of frames that were queued and did not reach their recipient.

A frame may be dropped for a newer one, or its ttl may be over. Its recipient's
connection may also end first.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from typing import TYPE_CHECKING

from brokerd.core.outbox import FrameOutbox, Queued, StreamOutbox
from brokerd_client.wire.envelope import BROKER, Envelope, ErrorCode, Kind, head, split

if TYPE_CHECKING:
    from brokerd.core.exchange import Exchange
    from brokerd.core.in_flight import InFlight
    from brokerd.core.replies import Replies
    from brokerd.core.requests import Requests
    from brokerd.core.session import Session
    from brokerd.core.undelivered import Unsent

__all__ = ["Reports", "mark_orphaned"]


class Reports:
    """The frames that closed sessions left, and reports of all undelivered frames.

    unheard: refusals by error code that the message's sender did not receive: its
        connection ended while they waited in its outbox.
    """

    def __init__(
        self, exchange: Exchange, replies: Replies, requests: Requests, in_flight: InFlight
    ) -> None:
        self._exchange = exchange
        self._replies = replies
        self._requests = requests
        self._in_flight = in_flight
        self.unheard: Counter[str] = Counter()
        #: Closed sessions, each with the frames of its outbox that the system did not
        #: take.
        self._closed: deque[tuple[Session, Unsent]] = deque()

    def __bool__(self) -> bool:
        """Return whether messages to closed sessions are still to be reported."""
        return bool(self._closed)

    def __len__(self) -> int:
        """Return the number of those messages."""
        return sum(len(queue) for _, queue in self._closed)

    def add(self, session: Session, unsent: Unsent) -> None:
        """Queue the frames of a closed session to be reported."""
        self._closed.append((session, unsent))

    def closed_sessions(self) -> list[tuple[Session, Unsent]]:
        """Return the closed sessions and their frames, in the order of closing."""
        return list(self._closed)

    def run_deferred(self, count: int) -> int:
        """Report up to ``count`` messages; return how many more may be reported."""
        while self._closed and count > 0:
            session, queue = self._closed[0]
            count -= 1
            queued = queue.pop()
            if queued is not None:
                self.return_to_sender(session, queued)
            elif session.incoming_requests:
                # Requests that the session received and did not answer, the oldest
                # first. Requests that it did not receive have been returned above.
                (_, message_id), requester = next(iter(session.incoming_requests.items()))
                self._requests.end(requester, message_id, session)
                self._replies.refuse(
                    requester,
                    message_id,
                    ErrorCode.ABANDONED,
                    f"{session.address} disconnected before it answered",
                    session.address,
                )
            elif session.waiting_requests:
                request = next(iter(session.waiting_requests.values()))[0]
                reason = "its requester has disconnected"
                self._in_flight.fail(request, ErrorCode.OFFLINE, reason)
            else:
                self._closed.popleft()
        return count

    def return_to_sender(self, session: Session, queued: Queued) -> None:
        """Pass a frame that was not taken to another pool member, or report it."""
        body = memoryview(queued.frame)[4:]
        # The extension was read when the frame arrived. Reading it again for every frame
        # would take too long.
        envelope = head(body)
        if envelope.name == BROKER:
            if envelope.kind is Kind.ERROR:
                self._count_unheard(bytes(body[split(body)[1] :]))
            return
        returned = self._replies.returned
        if envelope.kind not in (Kind.MESSAGE, Kind.REQUEST, Kind.REPLY):
            returned["lost"] += 1
            return
        sender = self._sender_of(queued, envelope.name)
        if sender is not None and sender.number > session.closed_number:
            # The sender joined after this session closed: the frame is from an earlier
            # connection with the same address.
            sender = None
        if (
            _is_over(queued, envelope, sender, session)
            or (envelope.name, envelope.id) in session.revoked
        ):
            return
        if envelope.kind is Kind.REQUEST and sender is not None:
            self._requests.end(sender, envelope.id, session)
            client = session.client
            if client.config.connections > 1 and client.sessions and not queued.pinned:
                returned["passed_on"] += 1
                self._in_flight.requeue(client, sender, envelope.id, queued)
                return
        other = None if queued.pinned or envelope.kind is Kind.REPLY else session.client.pick()
        has_room = (
            other is not None
            and isinstance(other.outbox, FrameOutbox)
            and other.outbox.reserve(len(queued.frame))
        )
        if has_room:
            assert other is not None
            assert isinstance(other.outbox, FrameOutbox)
            other.outbox.put(queued)
            returned["passed_on"] += 1
            self._replies.touch(other)
        elif sender is not None:
            name = session.address if queued.pinned else session.client.name
            returned["reported"] += 1
            message = f"{name} disconnected before it took the message"
            self._replies.refuse(sender, envelope.id, ErrorCode.OFFLINE, message, name)
        else:
            reason = "recipient and sender have disconnected"
            self._replies.lose(session, envelope.name, "offline", reason)

    def _count_unheard(self, payload: bytes) -> None:
        """Count a refusal that was not received. payload: the payload of the ERROR."""
        refusal = json.loads(payload)
        if refusal["name"] != BROKER:
            self.unheard[refusal["code"]] += 1

    def report_dropped(self, target: Session, queued: Queued) -> None:
        """Report a frame that was dropped for a newer one."""
        envelope = head(memoryview(queued.frame)[4:])
        self._replies.drop(target, envelope.name, "drop_oldest", "message dropped for a newer one")
        sender = self._sender_of(queued, envelope.name)
        if _is_over(queued, envelope, sender, target):
            return
        if envelope.kind is Kind.REQUEST and sender is not None:
            self._requests.end(sender, envelope.id, target)
        if sender is not None and (queued.receipt or envelope.kind is Kind.REQUEST):
            message = f"{target.address} does not read; the message was dropped for a newer one"
            self._replies.refuse(sender, envelope.id, ErrorCode.FULL, message, target.address)

    def report_expired(self, target: Session, queued: Queued) -> None:
        """Report a frame whose ttl was over before it was written to its recipient."""
        envelope = head(memoryview(queued.frame)[4:])
        sender = self._sender_of(queued, envelope.name)
        message = f"ttl was over before {target.address} had read the messages before this one"
        if envelope.kind is Kind.REQUEST and sender is not None:
            if not _is_over(queued, envelope, sender, target):
                self.expire_request(sender, envelope.id, target.address, message)
            return
        if envelope.kind is Kind.REPLY or envelope.kind is Kind.ERROR:
            # The target is the requester: it receives this ERROR instead of the answer.
            self._replies.refuse(
                target,
                envelope.id,
                ErrorCode.EXPIRED,
                f"the answer of {envelope.name}: {message}",
                envelope.name,
            )
        if sender is None or envelope.kind in (Kind.EVENT, Kind.ERROR):
            self._replies.drop(target, envelope.name, ErrorCode.EXPIRED, message)
        else:
            self._replies.refuse(sender, envelope.id, ErrorCode.EXPIRED, message, target.address)

    def expire_request(
        self, requester: Session, message_id: int, address: str, reason: str = ""
    ) -> None:
        """End a request whose ttl is over, and send its requester an ERROR."""
        responder = requester.outgoing_requests.get((message_id, address))
        if responder is not None:
            self._requests.end(requester, message_id, responder)
            message = reason or f"ttl was over before {address} answered"
            self._replies.refuse(requester, message_id, ErrorCode.EXPIRED, message, address)
            if not reason:
                # Its frame may have reached the responder.
                self._replies.revoke(
                    responder, requester, message_id, ErrorCode.EXPIRED, "its ttl is over"
                )

    def _sender_of(self, queued: Queued, name: str) -> Session | None:
        """Return the session that a queued frame came from, or None if that has closed."""
        if queued.sender is not None:
            sender: Session = queued.sender
            return sender if sender.open and not sender.mute else None
        return None if queued.orphaned else self._exchange.find(name)


def _is_over(queued: Queued, envelope: Envelope, sender: Session | None, holder: Session) -> bool:
    """Return whether a queued request's ttl has already been reported to its sender."""
    if queued.deadline is None or envelope.kind is not Kind.REQUEST or sender is None:
        return False
    return sender.expiring.get((envelope.id, holder.address)) != queued.deadline


def mark_orphaned(session: Session) -> None:
    """Mark this session's queued frames as orphaned.

    A new session with the same address then gets no errors for them.
    """
    for client in session.recipients:
        for recipient in client.sessions.values():
            if isinstance(recipient.outbox, StreamOutbox):
                recipient.outbox.sender_left(session.sender_header)
    session.recipients.clear()
