"""Pending requests: which session waits for the answer of which other session."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from brokerd.core.deadlines import Deadlines

if TYPE_CHECKING:
    from brokerd.core.exchange import Client
    from brokerd.core.flight import WaitingRequest
    from brokerd.core.session import Session
    from brokerd.core.undelivered import Queued

__all__ = ["Requests"]

#: What a deadline belongs to: (requester, message id, responder's address) of a
#: delivered request, or a request that waits.
Timed: TypeAlias = "tuple[Session, int, str] | WaitingRequest"


class Requests:
    """The requests without an answer; each is recorded in both of its sessions.

    deadlines: of the requests with a ttl.
    freed: clients for which requests wait, and one of whose members may have room.
    """

    def __init__(self) -> None:
        self.deadlines: Deadlines[Timed] = Deadlines()
        self.freed: dict[Client, None] = {}

    def expect(
        self,
        requester: Session,
        responder: Session,
        message_id: int,
        deadline: float | None,
        queued: Queued | None = None,
    ) -> None:
        """Record a request that has been queued for its responder.

        deadline: when its ttl is over; None without a ttl. queued: its frame, to keep
        for another member of the pool.
        """
        key = message_id, responder.address
        if requester.expiring:
            self._forget_deadline(requester, key)
        incoming_key = requester.address, message_id
        self._release(responder, incoming_key)
        responder.incoming_requests[incoming_key] = requester
        requester.outgoing_requests[key] = responder
        addresses = requester.addresses_asked.get(message_id, ())
        if responder.address not in addresses:
            requester.addresses_asked[message_id] = (*addresses, responder.address)
        if deadline is not None:
            requester.expiring[key] = deadline
            self.deadlines.add(deadline, (requester, *key))
        client = responder.client
        if client.flight is not None:
            if (
                queued is not None
                and client.config.connections > 1
                and client.flight.retained + len(queued.frame) <= client.config.queue
            ):
                responder.retained[incoming_key] = queued
                client.flight.retained += len(queued.frame)
            client.flight.update(responder)

    def end(self, requester: Session, message_id: int, responder: Session) -> None:
        """Forget the pending request of one session to another.

        Each is compared by identity, because a new session may have its address by now.
        """
        key = message_id, responder.address
        if requester.outgoing_requests.get(key) is responder:
            del requester.outgoing_requests[key]
            self._forget_address(requester, *key)
            if requester.expiring:
                self._forget_deadline(requester, key)
        incoming_key = requester.address, message_id
        if responder.incoming_requests.get(incoming_key) is requester:
            del responder.incoming_requests[incoming_key]
            self._free(responder, incoming_key)

    def end_all(self, requester: Session) -> None:
        """Forget all delivered requests of a session that ends."""
        # A client that is removed and configured again may have two connections for a
        # moment. Only the requests of this one are ended.
        for (message_id, _), responder in requester.outgoing_requests.items():
            incoming_key = requester.address, message_id
            if responder.incoming_requests.get(incoming_key) is requester:
                del responder.incoming_requests[incoming_key]
                self._free(responder, incoming_key)
        requester.outgoing_requests.clear()
        requester.addresses_asked.clear()
        for key, deadline in requester.expiring.items():
            self.deadlines.discard(deadline, (requester, *key))
        requester.expiring.clear()

    def wait(self, request: WaitingRequest) -> None:
        """Record a request that waits for a member with room."""
        request.requester.waiting_requests.setdefault(request.id, []).append(request)
        request.requester.waiting_count += 1
        if request.queued.deadline is not None:
            self.deadlines.add(request.queued.deadline, request)

    def end_wait(self, request: WaitingRequest) -> None:
        """Forget a request that waited."""
        waiting = request.requester.waiting_requests
        same_id = waiting[request.id]
        same_id.remove(request)
        request.requester.waiting_count -= 1
        if not same_id:
            del waiting[request.id]
        if request.queued.deadline is not None:
            self.deadlines.discard(request.queued.deadline, request)
        if request.flight is not None:
            request.flight.discard(request)
            request.flight = None
        else:
            request.row.pop(request, None)

    def note_room(self, client: Client) -> None:
        """Note that a member of a client may have room for a request that waits."""
        if client.flight:
            self.freed[client] = None

    def forget_retained(self, responder: Session) -> None:
        """Forget the kept frames of a session that ends."""
        flight = responder.client.flight
        if flight is not None:
            flight.retained -= sum(len(queued.frame) for queued in responder.retained.values())
        responder.retained.clear()

    def _free(self, responder: Session, incoming_key: tuple[str, int]) -> None:
        self._release(responder, incoming_key)
        client = responder.client
        if client.flight is not None and client.sessions.get(responder.address) is responder:
            client.flight.update(responder)
            self.note_room(client)

    def _release(self, responder: Session, incoming_key: tuple[str, int]) -> None:
        """Forget the kept frame of a delivered request."""
        queued = responder.retained.pop(incoming_key, None)
        if queued is not None and responder.client.flight is not None:
            responder.client.flight.retained -= len(queued.frame)

    def _forget_address(self, requester: Session, message_id: int, address: str) -> None:
        addresses = requester.addresses_asked.get(message_id, ())
        if len(addresses) > 1:
            requester.addresses_asked[message_id] = tuple(
                other for other in addresses if other != address
            )
        else:
            requester.addresses_asked.pop(message_id, None)

    def _forget_deadline(self, requester: Session, key: tuple[int, str]) -> None:
        deadline = requester.expiring.pop(key, None)
        if deadline is not None:
            self.deadlines.discard(deadline, (requester, *key))
