"""Pending requests: which session waits for the answer of which other session."""

from __future__ import annotations

from typing import TYPE_CHECKING

from brokerd.core.deadlines import Deadlines

if TYPE_CHECKING:
    from brokerd.core.session import Session

__all__ = ["Requests"]


class Requests:
    """The requests without an answer; each is recorded in both of its sessions.

    deadlines: of the requests with a ttl, by (requester, message id, responder's
        address).
    """

    def __init__(self) -> None:
        self.deadlines: Deadlines[tuple[Session, int, str]] = Deadlines()

    def expect(
        self, requester: Session, responder: Session, message_id: int, deadline: float | None
    ) -> None:
        """Record a request that has been queued for its responder.

        deadline: when its ttl is over; None without a ttl.
        """
        key = message_id, responder.address
        if requester.expiring:
            self._forget_deadline(requester, key)
        responder.incoming_requests[(requester.address, message_id)] = requester
        requester.outgoing_requests[key] = responder
        if deadline is not None:
            requester.expiring[key] = deadline
            self.deadlines.add(deadline, (requester, *key))

    def end(self, requester: Session, message_id: int, responder: Session) -> None:
        """Forget the pending request of one session to another.

        Each is compared by identity, because a new session may have its address by now.
        """
        if requester.outgoing_requests.get((message_id, responder.address)) is responder:
            del requester.outgoing_requests[(message_id, responder.address)]
            if requester.expiring:
                self._forget_deadline(requester, (message_id, responder.address))
        if responder.incoming_requests.get((requester.address, message_id)) is requester:
            del responder.incoming_requests[(requester.address, message_id)]

    def end_all(self, requester: Session) -> None:
        """Forget all pending requests of a session that ends."""
        # A client that is removed and configured again may have two connections for a
        # moment. Only the requests of this one are ended.
        for (message_id, _), responder in requester.outgoing_requests.items():
            if responder.incoming_requests.get((requester.address, message_id)) is requester:
                del responder.incoming_requests[(requester.address, message_id)]
        requester.outgoing_requests.clear()
        for key, deadline in requester.expiring.items():
            self.deadlines.discard(deadline, (requester, *key))
        requester.expiring.clear()

    def _forget_deadline(self, requester: Session, key: tuple[int, str]) -> None:
        deadline = requester.expiring.pop(key, None)
        if deadline is not None:
            self.deadlines.discard(deadline, (requester, *key))
