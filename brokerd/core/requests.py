"""Requests without an answer: which session waits for the answer of which other session."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from brokerd.core.deadlines import Deadlines
from brokerd.core.undelivered import Queued

if TYPE_CHECKING:
    from brokerd.core.exchange import Client
    from brokerd.core.flight import WaitingRequest
    from brokerd.core.session import Session

__all__ = ["DeliveredRequest", "RequestKey", "Requests", "Timed"]

#: The address of the requester, the id, and a number where an older request has both.
RequestKey: TypeAlias = "tuple[str, int] | tuple[str, int, int]"
#: What a deadline belongs to.
Timed: TypeAlias = "DeliveredRequest | WaitingRequest"


class DeliveredRequest:
    """A request that has been queued for its responder and has no outcome yet.

    Attributes:
        requester, responder: Its two sessions.
        id: Its id.
        key: Its key among the requests to its responder.
        deadline: When its ttl is over; None without a ttl.
        kept: Its frame, which another member of the pool can get, or None.
        pinned: Whether that frame was sent to this member's own address.
    """

    __slots__ = ("deadline", "id", "kept", "key", "pinned", "requester", "responder")

    def __init__(
        self, requester: Session, responder: Session, message_id: int, deadline: float | None
    ) -> None:
        self.requester = requester
        self.responder = responder
        self.id = message_id
        self.key: RequestKey = (requester.address, message_id)
        self.deadline = deadline
        self.kept: bytes | memoryview | None = None
        self.pinned = False

    def queued(self) -> Queued | None:
        """Return its kept frame with its delivery information, or None."""
        if self.kept is None:
            return None
        return Queued(self.kept, pinned=self.pinned, sender=self.requester, deadline=self.deadline)


class Requests:
    """The requests without an answer; each is recorded in both of its sessions.

    deadlines: of the requests with a ttl.
    repeats: how often an id was used again before the request with it was over.
    freed: clients for which requests wait, and one of whose members may have room.
    """

    __slots__ = ("deadlines", "freed", "repeats")

    def __init__(self) -> None:
        self.deadlines = Deadlines()
        self.freed: dict[Client, None] = {}
        self.repeats = 0

    def find_unsent(
        self, requester: Session, message_id: int, responder: Session, deadline: float | None
    ) -> DeliveredRequest | None:
        """Return the request in a frame that its responder has not been sent, or None.

        Of several with one id and deadline, it is the newest: those before it were sent.
        Without one of that deadline, it is the newest of all.
        """
        newest = None
        # Each is compared by identity, because a new session may have its address by now.
        for request in reversed(requester.outgoing_requests.get(message_id, ())):
            if request.responder is responder:
                if request.deadline == deadline:
                    return request
                newest = newest or request
        return newest

    def expect(
        self,
        requester: Session,
        responder: Session,
        message_id: int,
        deadline: float | None,
        frame: bytes | memoryview | None = None,
        pinned: bool = False,
    ) -> None:
        """Record a request that has been queued for its responder.

        Args:
            deadline: When its ttl is over; None without a ttl.
            frame: Its frame, to keep for another member of a pool.
            pinned: Whether it was sent to this member's own address.
        """
        request = DeliveredRequest(requester, responder, message_id, deadline)
        self.add(request)
        if deadline is not None:
            self.deadlines.add(deadline, request)
        flight = responder.client.flight
        if flight is not None:
            if (
                frame is not None
                and responder.client.is_pool
                and flight.retained + len(frame) <= responder.client.config.queue
            ):
                request.kept = frame
                request.pinned = pinned
                flight.retained += len(frame)
            flight.update(responder)

    def add(self, request: DeliveredRequest) -> None:
        """Record a request in both of its sessions.

        Of several requests with one id, the oldest has the key by which answers are looked
        up.
        """
        requester, incoming = request.requester, request.responder.incoming_requests
        # Each step looks its key up once: most requests have an id of their own.
        earlier = incoming.setdefault(request.key, request)
        if earlier is not request:
            if earlier.requester is requester:
                self.use_again(request)
            else:
                # An older session with the same address, which is about to end.
                self._release(earlier)
            incoming[request.key] = request
        alone = (request,)
        same_id = requester.outgoing_requests.setdefault(request.id, alone)
        if same_id is not alone:
            requester.outgoing_requests[request.id] = (*same_id, request)
        requester.outgoing_count += 1

    def use_again(self, request: DeliveredRequest) -> None:
        """Give a request a key of its own: its id is that of an older request."""
        self.repeats += 1
        request.key = (request.requester.address, request.id, self.repeats)

    def end(self, request: DeliveredRequest) -> None:
        """Forget a request that was delivered."""
        self._forget(request)
        responder = request.responder
        flight = responder.client.flight
        if flight is not None and (
            responder.client.remotes.get(responder.host) is responder
            if responder.host
            else responder.client.sessions.get(responder.address) is responder
        ):
            flight.update(responder)
            self.note_room(responder.client)

    def end_all(self, requester: Session) -> list[DeliveredRequest]:
        """Forget all delivered requests of a session that ends, and return them."""
        requests = [each for same_id in requester.outgoing_requests.values() for each in same_id]
        for request in requests:
            self.end(request)
        return requests

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

    def forget_kept(self, responder: Session) -> None:
        """Forget the kept frames of the requests to a session that ends."""
        for request in responder.incoming_requests.values():
            self._release(request)

    def _forget(self, request: DeliveredRequest) -> None:
        """Remove a request from both of its sessions."""
        requester, responder = request.requester, request.responder
        same_id = requester.outgoing_requests.get(request.id, ())
        if len(same_id) == 1 and same_id[0] is request:
            del requester.outgoing_requests[request.id]
            requester.outgoing_count -= 1
        elif request in same_id:
            at = same_id.index(request)
            requester.outgoing_requests[request.id] = same_id[:at] + same_id[at + 1 :]
            requester.outgoing_count -= 1
        # A client that is removed and configured again may have two connections with one
        # address for a moment: the later request has replaced this one.
        incoming = responder.incoming_requests
        found = incoming.pop(request.key, request)
        if found is not request:
            incoming[request.key] = found
        elif len(same_id) > 1 and len(request.key) == 2:
            self._promote(request, incoming)
        if request.deadline is not None:
            self.deadlines.discard(request.deadline, request)
        self._release(request)

    def _promote(
        self, ended: DeliveredRequest, incoming: dict[RequestKey, DeliveredRequest]
    ) -> None:
        """Move the oldest request that is left with the id to the key of the one that ended."""
        for request in ended.requester.outgoing_requests.get(ended.id, ()):
            if incoming.get(request.key) is request:
                del incoming[request.key]
                request.key = ended.key
                incoming[request.key] = request
                return

    def _release(self, request: DeliveredRequest) -> None:
        """Forget the kept frame of a delivered request."""
        flight = request.responder.client.flight
        if request.kept is not None and flight is not None:
            flight.retained -= len(request.kept)
        request.kept = None
