"""Reports to senders of frames that were queued and did not reach their recipient.

A frame may be dropped for a newer one, or its ttl may be over. Its recipient's
connection may also end first.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from dataclasses import replace
from typing import TYPE_CHECKING

from brokerd.core.outbox import Queued, StreamOutbox
from brokerd_client.wire.envelope import BROKER, Envelope, ErrorCode, Kind, head, split
from brokerd_client.wire.layout import ACK_FLAG

if TYPE_CHECKING:
    from brokerd.core.cluster.remote_sessions import RemoteSessions
    from brokerd.core.exchange import Exchange
    from brokerd.core.in_flight import InFlight
    from brokerd.core.replies import Replies
    from brokerd.core.requests import DeliveredRequest, Requests
    from brokerd.core.session import Session
    from brokerd.core.undelivered import Unsent

__all__ = ["Reports", "mark_orphaned"]


class Reports:
    """The frames that closed sessions left, and reports of all undelivered frames.

    remote: the sessions that stand for clients of other hosts; None without a cluster.
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
        self.remote: RemoteSessions | None = None
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
        """Queue the frames of a closed session, and its requests, to be reported."""
        if unsent or session.incoming_requests or session.waiting_requests:
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
                request = next(iter(session.incoming_requests.values()))
                self._requests.end(request)
                self._replies.refuse(
                    request.requester,
                    request.id,
                    ErrorCode.ABANDONED,
                    f"{session.address} disconnected before it answered",
                    session.address,
                )
            elif session.waiting_requests:
                waiting = next(iter(session.waiting_requests.values()))[0]
                reason = "its requester has disconnected"
                self._in_flight.fail(waiting, ErrorCode.OFFLINE, reason)
            else:
                self._closed.popleft()
        return count

    def return_to_sender(self, session: Session, queued: Queued) -> None:
        """Pass a frame that was not taken to another pool member, or report it."""
        body = memoryview(queued.frame)[4:]
        # The extension was read when the frame arrived. Reading it again for every frame
        # would take too long.
        envelope = head(body)
        if envelope.kind is Kind.OPEN:
            # Its caller is told by the channels.
            return
        if envelope.name == BROKER:
            if envelope.kind is Kind.ERROR:
                self._count_unheard(bytes(body[split(body)[1] :]))
            return
        if envelope.kind in (Kind.MESSAGE, Kind.EVENT) and envelope.flags & ACK_FLAG:
            # It is still in its mailbox.
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
        request = self._request_in(queued, envelope, sender, session)
        if _is_over(queued, envelope, sender, request):
            return
        key = envelope.name, envelope.id
        if envelope.kind is Kind.REQUEST and key in session.revoked:
            # A later request with this id waits behind the one that was cancelled.
            session.revoked.discard(key)
            return
        if envelope.kind is Kind.REQUEST and sender is not None:
            if request is None:
                # A request without a record has had its outcome: it was cancelled.
                return
            self._requests.end(request)
            client = session.client
            if client.config.connections > 1 and client.sessions and not queued.pinned:
                returned["passed_on"] += 1
                self._in_flight.requeue(client, sender, envelope.id, queued)
                return
        other = None if queued.pinned or envelope.kind is Kind.REPLY else session.client.pick()
        if other is not None and other.host:
            # Its host has to know the sender, and a frame passes between hosts once. A
            # message may have had a receipt, behind which no doubt may follow.
            is_fit = envelope.kind is Kind.REQUEST and sender is not None and not sender.host
            queued = replace(queued, sender=sender)
            other = other if is_fit else None
        if other is not None and other.outbox.reserve(len(queued.frame)):
            if sender is None:
                queued = replace(queued, orphaned=True)
            other.outbox.put(queued)
            if queued.orphaned and isinstance(other.outbox, StreamOutbox):
                self._mark_passed_on(other.outbox, envelope.name)
            if envelope.kind is Kind.REQUEST and sender is not None and not sender.mute:
                # Its host may be lost, and with it the request.
                self._requests.expect(sender, other, envelope.id, queued.deadline)
            returned["passed_on"] += 1
            self._replies.touch(other)
        elif sender is not None:
            is_to_address = queued.pinned or envelope.kind is Kind.REPLY
            name = session.address if is_to_address else session.client.name
            returned["reported"] += 1
            message = f"{name} disconnected before it took the message"
            self._replies.refuse(sender, envelope.id, ErrorCode.OFFLINE, message, name)
        else:
            reason = "recipient and sender have disconnected"
            self._replies.lose(session, envelope.name, "offline", reason, envelope.id)

    def _mark_passed_on(self, outbox: StreamOutbox, name: str) -> None:
        """Mark a frame that was passed on, the last of this outbox, as orphaned.

        The mark is about all earlier frames with the sender's name, too: not if a later
        connection has that name by now.
        """
        if self._exchange.find(name) is None:
            outbox.sender_left(name.encode())

    def _count_unheard(self, payload: bytes) -> None:
        """Count a refusal that was not received. payload: the payload of the ERROR."""
        refusal = json.loads(payload)
        if refusal["name"] != BROKER:
            self.unheard[refusal["code"]] += 1

    def report_dropped(self, target: Session, queued: Queued) -> None:
        """Report a frame that was dropped for a newer one."""
        envelope = head(memoryview(queued.frame)[4:])
        self._replies.drop(
            target,
            envelope.name,
            "drop_oldest",
            "message dropped for a newer one",
            envelope.id,
        )
        sender = self._sender_of(queued, envelope.name)
        request = self._request_in(queued, envelope, sender, target)
        if _is_over(queued, envelope, sender, request):
            return
        if request is not None:
            self._requests.end(request)
        # A request without a record has had its outcome: it was cancelled.
        reported = queued.receipt if envelope.kind is not Kind.REQUEST else request is not None
        if sender is not None and reported:
            message = f"{target.address} does not read; the message was dropped for a newer one"
            self._replies.refuse(sender, envelope.id, ErrorCode.FULL, message, target.address)

    def report_expired(self, target: Session, queued: Queued) -> None:
        """Report a frame whose ttl was over before it was written to its recipient."""
        envelope = head(memoryview(queued.frame)[4:])
        sender = self._sender_of(queued, envelope.name)
        message = f"ttl was over before {target.address} had read the messages before this one"
        if envelope.kind is Kind.REQUEST and sender is not None:
            request = self._request_in(queued, envelope, sender, target)
            if request is not None and not _is_over(queued, envelope, sender, request):
                self.expire_request(request, message)
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
            self._replies.drop(target, envelope.name, ErrorCode.EXPIRED, message, envelope.id)
        else:
            self._replies.refuse(sender, envelope.id, ErrorCode.EXPIRED, message, target.address)

    def expire_request(self, request: DeliveredRequest, reason: str = "") -> None:
        """End a request whose ttl is over, and send its requester an ERROR."""
        requester, responder = request.requester, request.responder
        self._requests.end(request)
        message = reason or f"ttl was over before {responder.address} answered"
        self._replies.refuse(requester, request.id, ErrorCode.EXPIRED, message, responder.address)
        if not reason:
            # Its frame may have reached the responder.
            self._replies.revoke(
                responder, requester, request.id, ErrorCode.EXPIRED, "its ttl is over"
            )

    def _request_in(
        self, queued: Queued, envelope: Envelope, sender: Session | None, holder: Session
    ) -> DeliveredRequest | None:
        """Return the request in a frame that was queued for ``holder``, if it is not over."""
        if envelope.kind is not Kind.REQUEST or sender is None:
            return None
        return self._requests.find_unsent(sender, envelope.id, holder, queued.deadline)

    def _sender_of(self, queued: Queued, name: str) -> Session | None:
        """Return the session that a queued frame came from, or None if that has closed."""
        if queued.sender is not None:
            sender: Session = queued.sender
            return sender if sender.open and not sender.mute else None
        if queued.orphaned:
            return None
        # A frame for another host has its sender's identity.
        found = self._exchange.find(name) or self._exchange.identify(name)
        return self.remote.find(name) if found is None and self.remote is not None else found


def _is_over(
    queued: Queued, envelope: Envelope, sender: Session | None, request: DeliveredRequest | None
) -> bool:
    """Return whether a queued request's ttl has already been reported to its sender."""
    if queued.deadline is None or envelope.kind is not Kind.REQUEST or sender is None:
        return False
    return request is None or request.deadline != queued.deadline


def mark_orphaned(session: Session) -> None:
    """Mark this session's queued frames as orphaned.

    A new session with the same address then gets no errors for them.
    """
    for client in session.recipients:
        for recipient in client.sessions.values():
            if isinstance(recipient.outbox, StreamOutbox):
                recipient.outbox.sender_left(session.sender_header)
    session.recipients.clear()
