"""Requests in flight: those that wait go to the member that has room, in order.

The rules are in docs/protocol.md, "Requests in flight".
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from brokerd.core.cluster.remote_frames import as_received
from brokerd.core.flight import WaitingRequest
from brokerd_client.wire.envelope import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from brokerd.core.exchange import Client
    from brokerd.core.held_senders import HeldSenders
    from brokerd.core.outbox import Queued
    from brokerd.core.replies import Replies
    from brokerd.core.requests import DeliveredRequest, Requests
    from brokerd.core.session import Session

__all__ = ["InFlight"]

#: Most waiting requests that are delivered per call, and most that one frame cancels
#: per turn of its sender.
_DELIVERED: Final = 64
_CANCELLED: Final = 64


class InFlight:
    """Delivers requests that waited, and ends those that are cancelled or returned."""

    __slots__ = ("_held", "_orphaned", "_replies", "_requests", "_undeliverable")

    def __init__(self, requests: Requests, replies: Replies, held: HeldSenders) -> None:
        self._requests = requests
        self._replies = replies
        self._held = held
        #: Requests whose recipients have left, each row with the recipient's name.
        self._undeliverable: deque[tuple[OrderedDict[WaitingRequest, None], str]] = deque()
        #: Delivered requests whose requesters have left.
        self._orphaned: deque[DeliveredRequest] = deque()

    def __bool__(self) -> bool:
        """Return whether :meth:`run_deferred` has something to do."""
        return bool(self._requests.freed or self._undeliverable or self._orphaned)

    def run_deferred(self, count: int) -> None:
        """Deliver, report and revoke up to about ``count`` requests of each kind."""
        for client in list(self._requests.freed)[:count]:
            self.dispatch(client)
        while self._undeliverable and count > 0:
            row, name = self._undeliverable[0]
            if not row:
                self._undeliverable.popleft()
                continue
            count -= 1
            request = next(iter(row))
            if request.requester.host and request.requester.open and "/" not in request.to:
                self._return(request)
            else:
                self.fail(request, ErrorCode.OFFLINE, f"{name} is not connected any more")
        for _ in range(min(count, len(self._orphaned))):
            orphan = self._orphaned.popleft()
            holder, requester, message_id = orphan.responder, orphan.requester, orphan.id
            # A new session with the same address may have sent a request with this id.
            if holder.open and (requester.address, message_id) not in holder.incoming_requests:
                reason = "the requester has disconnected"
                self._replies.revoke(holder, requester, message_id, ErrorCode.CANCELLED, reason)

    def fail(self, request: WaitingRequest, code: ErrorCode, reason: str) -> None:
        """End a request that waits, and send its requester an ERROR."""
        self._requests.end_wait(request)
        requester = request.requester
        if requester.open:
            self._replies.refuse(requester, request.id, code, reason, request.to)
        else:
            self._replies.drop_own(requester, request.to, code, reason, request.id)

    def wait(
        self,
        client: Client,
        request: WaitingRequest,
        member: Session | None = None,
        *,
        first: bool = False,
    ) -> None:
        """Put a request into the row of those that wait for room in flight."""
        client.track().add(request, member, first=first)
        self._requests.wait(request)

    def dispatch(self, client: Client) -> None:
        """Deliver requests that wait to members with room, at most _DELIVERED of them."""
        self._requests.freed.pop(client, None)
        flight = client.track()
        delivered = 0
        crowded: set[Session] = set()
        for member in flight.pinned_members():
            while delivered < _DELIVERED and flight.has_room(member):
                request = flight.first_for(member)
                if request is None or not self._deliver(member, request):
                    break
                delivered += 1
        while delivered < _DELIVERED and flight.waits_for_any:
            picked = flight.pick()
            if picked is None or picked in crowded:
                break
            request = flight.first_for(picked)
            if request is None and picked.host:
                request = flight.first_of_hosts() if flight.returnable else None
                if request is None:
                    break
                flight.returnable -= 1
                delivered += 1
                self._return(request)
                continue
            if request is None:
                picked = flight.pick(without=picked)
                request = None if picked is None else flight.first_for(picked)
            if picked is None or request is None:
                break
            delivered += 1
            if not self._deliver(picked, request):
                crowded.add(picked)
        if delivered >= _DELIVERED:
            self._requests.note_room(client)
        if flight.holds_senders and flight.size <= client.config.queue // 2:
            flight.stalled = flight.holds_senders = False
            for member in client.sessions.values():
                self._held.release_waiters(member)

    def _deliver(self, member: Session, request: WaitingRequest) -> bool:
        """Deliver a request that waited; return whether its member's queue has room."""
        queued, requester = request.queued, request.requester
        if not requester.open:
            self.fail(request, ErrorCode.OFFLINE, "its requester has disconnected")
            return True
        if not member.outbox.reserve(len(queued.frame)):
            # If the member does not read, HeldSenders.release_if_room notes that it does.
            self._replies.touch(member)
            if not member.outbox.blocked:
                self._requests.note_room(member.client)
            return False
        self._requests.end_wait(request)
        member.outbox.put(queued)
        self._replies.touch(member)
        if not (requester.mute or requester.retired):
            self._requests.expect(
                requester, member, request.id, queued.deadline, queued.frame, queued.pinned
            )
        return True

    def _return(self, request: WaitingRequest) -> None:
        """Return a request that waits to its requester's host, which finds another member."""
        self._requests.end_wait(request)
        self._replies.give_back(request.requester, request.id, request.to)

    def requeue(self, client: Client, requester: Session, message_id: int, queued: Queued) -> None:
        """Queue a request that a member did not receive for another member."""
        # A frame from a stream does not name its session, which an upgrade has to know.
        queued = replace(queued, sender=requester)
        self.wait(client, WaitingRequest(requester, message_id, client.name, queued), first=True)
        self._requests.note_room(client)

    def give_back(self, request: DeliveredRequest) -> None:
        """Give a request that a member returned to another member of its pool.

        The request of a client at another host goes to another member here, or back to
        that host.
        """
        queued = request.queued()
        self._requests.end(request)
        member, requester, message_id = request.responder, request.requester, request.id
        client = member.client
        others = len(client.sessions) - (client.sessions.get(member.address) is member)
        if requester.host and (queued is None or (others < 1 and not queued.pinned)):
            self._replies.give_back(requester, message_id, client.name)
            return
        if not requester.host:
            others += len(client.remotes) - (client.remotes.get(member.host) is member)
        if queued is None or queued.pinned or others < 1:
            reason = f"{member.address} returned it before it began, and it can go nowhere else"
            name = member.address if queued is None or queued.pinned else client.name
            self._replies.refuse(requester, message_id, ErrorCode.OFFLINE, reason, name)
            return
        if member.host:
            queued.frame = as_received(queued.frame, requester.sender_header)
        waiting = WaitingRequest(requester, message_id, client.name, queued, member)
        self.wait(client, waiting, first=True)
        self.dispatch(client)

    def cancel(self, requester: Session, message_id: int) -> bool:
        """End requests of a session with that id, and tell the connections that hold them.

        Returns whether all of them have ended; else it has to be called again.
        """
        waiting = requester.waiting_requests.get(message_id, [])
        for request in waiting[:_CANCELLED]:
            self.fail(request, ErrorCode.CANCELLED, "it was cancelled before it was delivered")
        if waiting:
            return False
        delivered = requester.outgoing_requests.get(message_id, ())
        for each in delivered[:_CANCELLED]:
            holder = each.responder
            self._requests.end(each)
            self._replies.refuse(
                requester,
                message_id,
                ErrorCode.CANCELLED,
                f"it was cancelled before {holder.address} answered",
                holder.address,
            )
            if holder.host:
                # ``revoke`` notes it until the other host has answered.
                pass
            elif holder.outbox.waiting:
                holder.revoked.add((requester.address, message_id))
            else:
                holder.revoked.clear()
            self._replies.revoke(
                holder, requester, message_id, ErrorCode.CANCELLED, "the requester cancelled it"
            )
        return len(delivered) <= _CANCELLED

    def cancel_all(self, requester: Session) -> None:
        """End the delivered requests of a session that ends; their holders are told later.

        An upgrade may come first: those holders only learn that nothing awaits the answer.
        """
        self._orphaned.extend(
            request for request in self._requests.end_all(requester) if request.responder.cancels
        )

    def expire(self, request: WaitingRequest) -> None:
        """End a request whose ttl was over while it waited."""
        self.fail(
            request, ErrorCode.EXPIRED, f"its ttl was over before {request.to} had room for it"
        )

    def leave(self, session: Session) -> None:
        """Note that a session has left its client: report what waited for it alone."""
        client = session.client
        flight = client.flight
        if flight is None:
            return
        pinned = flight.take_pinned(session)
        if pinned:
            self._undeliverable.append((pinned, session.address))
        if client.sessions or not flight.waits_for_any:
            return
        if not client.remotes:
            self._undeliverable.extend((row, client.name) for row in flight.take_shared())
        elif of_hosts := flight.take_of_hosts():
            self._undeliverable.append((of_hosts, client.name))

    def waiting(self) -> Iterator[tuple[WaitingRequest, str]]:
        """Yield the requests whose recipients have left, each with its recipient."""
        for row, name in self._undeliverable:
            for request in row:
                yield request, name

    def add_undeliverable(self, request: WaitingRequest, name: str) -> None:
        """Report a request later whose recipient has left. name: the recipient."""
        request.row[request] = None
        self._undeliverable.append((request.row, name))
        self._requests.wait(request)

    def set_limit(self, session: Session, limit: int) -> None:
        """Set a connection's own limit of requests in flight."""
        session.in_flight = limit
        flight = session.client.track()
        if not session.retired:
            flight.update(session)
        self._requests.note_room(session.client)
