"""Delivery of a frame to one connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from brokerd.config.values import WhenFull
from brokerd.core.cluster.remote_outbox import RemoteOutbox
from brokerd.core.error_codes import BACK, code_of
from brokerd.core.flight import WaitingRequest
from brokerd.core.large_frame import LargeFrame, MappedFrame, joined
from brokerd.core.outbox import FrameOutbox, Queued
from brokerd.core.room import Room
from brokerd.core.routing_result import RoutingResult
from brokerd_client.wire.envelope import (
    BROKER,
    HEADER,
    Envelope,
    ErrorCode,
    Kind,
    split,
    split_address,
)
from brokerd_client.wire.framing import frame_prefix
from brokerd_client.wire.layout import RECEIPT_FLAG

if TYPE_CHECKING:
    from brokerd.core.cluster.remote_sessions import RemoteSessions
    from brokerd.core.exchange import Client, Exchange
    from brokerd.core.held_senders import HeldSenders
    from brokerd.core.in_flight import InFlight
    from brokerd.core.mailboxes.mailboxes import Mailboxes
    from brokerd.core.replies import Replies
    from brokerd.core.reports import Reports
    from brokerd.core.requests import DeliveredRequest, Requests
    from brokerd.core.returning import Returning
    from brokerd.core.session import Session
    from brokerd.core.status import Status
    from brokerd.core.turn import Turn
    from brokerd.core.write_buffer import RouteEntry

__all__ = ["Delivery", "deadline_of", "frame_head"]

#: Most frames dropped per turn to make room for a newer frame (``drop_oldest``).
_DROPPED: Final = 256
#: The kinds that `send_to` is about.
_SENT: Final = frozenset({Kind.MESSAGE, Kind.REQUEST})
#: Frames dropped per frame that is charged to the sender's turn budget.
_DROPS: Final = 2


class Delivery:
    """Delivers frames to their recipients, or refuses them.

    remote: the sessions that stand for clients of other hosts; None without a cluster.
    """

    def __init__(
        self,
        exchange: Exchange,
        status: Status,
        turn: Turn,
        requests: Requests,
        replies: Replies,
        held: HeldSenders,
        in_flight: InFlight,
        reports: Reports,
        returning: Returning,
        mailboxes: Mailboxes,
    ) -> None:
        self._exchange = exchange
        self._status = status
        self._turn = turn
        self._requests = requests
        self._replies = replies
        self._held = held
        self._in_flight = in_flight
        self._reports = reports
        self._returning = returning
        self._mailboxes = mailboxes
        self.remote: RemoteSessions | None = None

    def is_stored(self, envelope: Envelope) -> bool:
        """Return whether a frame is to be stored in a mailbox, here or at its home.

        These are messages to the plain name of a client with a mailbox, and events that
        a mailbox subscribes to.
        """
        if envelope.kind is Kind.EVENT:
            return bool(self._mailboxes.subscribed(envelope.topic))
        if envelope.kind is not Kind.MESSAGE:
            return False
        client = self._exchange.resolve(envelope.name)
        return client is not None and (client.mailbox is not None or bool(client.config.home))

    def is_denied(self, source: Session, envelope: Envelope) -> bool:
        """Return whether a client may not send a message or request to its recipient."""
        if envelope.kind not in _SENT or envelope.name == BROKER:
            return False
        return source.client.policy.sending(split_address(envelope.name)[0]) is None

    def send(
        self, source: Session, envelope: Envelope, frame: memoryview, now: float
    ) -> RoutingResult:
        """Deliver one frame to the connection that its name stands for."""
        refuse_frame = self._replies.refuse_frame
        name, instance = split_address(envelope.name)
        message_id, kind = envelope.id, envelope.kind
        request: DeliveredRequest | None = None
        if kind is Kind.REPLY or kind is Kind.ERROR:
            request = source.incoming_requests.get((envelope.name, message_id))
            if request is None:
                return self._deny_answer(source, envelope)
            if kind is Kind.ERROR and code_of(frame[split(frame)[1] :]) == BACK:
                if self.remote is not None:
                    self.remote.reach(source.client)
                self._in_flight.give_back(request)
                if envelope.flags & RECEIPT_FLAG:
                    self._replies.confirm(source, message_id)
                return RoutingResult.CONSUMED
        elif source.client.policy.sending(name) is None:
            message = f"{source.client.name} may not send to {name}"
            return refuse_frame(source, envelope, ErrorCode.DENIED, message, field="send_to")
        client = self._exchange.resolve(name)
        if client is None:
            return refuse_frame(
                source, envelope, ErrorCode.NO_SUCH_CLIENT, f"unknown client {name}"
            )
        if (self._status.draining or source.parting) and request is None and not source.mute:
            return refuse_frame(
                source, envelope, ErrorCode.SHUTTING_DOWN, "the broker is shutting down"
            )
        if kind is Kind.MESSAGE and not instance and client.mailbox is not None:
            if not source.mute:
                # The routing loop may deliver requests to it.
                source.recipients.add(client)
                source.routes[envelope.name.encode()] = client
            return self._mailboxes.store(source, (client.mailbox,), envelope, frame, now)
        is_for_home = kind is Kind.MESSAGE and not instance and bool(client.config.home)
        if kind is Kind.REQUEST and client.flight is not None and not source.mute:
            return self._send_request(source, client, envelope, frame, now)
        target: Session | None
        if self.remote is not None and len(client.remotes) != len(client.hosts):
            self.remote.reach(client)
        if request is not None:
            target = request.requester
        else:
            target = client.sessions.get(envelope.name) if instance else client.pick()
        if is_for_home:
            target = None if self.remote is None else self.remote.home_of(source, client)
            if target is None:
                message = f"host {client.config.home}, which keeps the mailbox of {name}, is away"
                return refuse_frame(source, envelope, ErrorCode.OFFLINE, message)
        elif self.remote is not None and request is None:
            target = self.remote.reachable(source, target, client, envelope.name)
        if target is None:
            return self._await_or_refuse(source, envelope, now)
        remainder = frame[HEADER.size + len(envelope.name) :]
        size = 4 + HEADER.size + len(header_for(source, target)) + len(remainder)
        # The ttl of a stored message counts from storing.
        deadline = None if is_for_home else deadline_of(source, envelope)
        if target.host and size > self._largest_remote():
            return self._refuse_too_large(source, envelope, target)
        room = self.find_room(source, target, size, now, deadline)
        if room is Room.NONE:
            message = (
                f"{target.address} does not read; its queue of {target.outbox.limit} bytes is full"
            )
            return refuse_frame(source, envelope, ErrorCode.FULL, message, target.address)
        if room is not Room.OK:
            return room.result
        self._deliver(source, target, envelope, remainder, size, deadline)
        if request is not None:
            self._requests.end(request)
            if source.client in self._requests.freed:
                self._in_flight.dispatch(source.client)
        if request is None and not source.mute:
            self._remember_route(source, envelope, target)
        return RoutingResult.CONSUMED

    def _send_request(
        self, source: Session, client: Client, envelope: Envelope, frame: memoryview, now: float
    ) -> RoutingResult:
        """Deliver a request to a connection with room in flight, or let it wait for one."""
        refuse_frame = self._replies.refuse_frame
        flight = client.track()
        if self.remote is not None and len(client.remotes) != len(client.hosts):
            self.remote.reach(client)
        pinned = client.sessions.get(envelope.name) if "/" in envelope.name else None
        elsewhere: Session | None = None
        if self.remote is not None and pinned is None and "/" in envelope.name:
            elsewhere = self.remote.reachable(source, None, client, envelope.name)
        may_leave = bool(client.remotes) and not source.host
        if not (client.sessions or may_leave) or (
            "/" in envelope.name and pinned is None and elsewhere is None
        ):
            may_return = source.host and client.is_pool and "/" not in envelope.name
            if may_return and not self._returning.awaits(client.name, now):
                return self._return(source, envelope)
            return self._await_or_refuse(source, envelope, now)
        remainder = frame[HEADER.size + len(envelope.name) :]
        size = 4 + HEADER.size + len(source.sender_header) + len(remainder)
        deadline = deadline_of(source, envelope)
        target: Session | None
        if elsewhere is not None:
            # Its host knows how many requests it has.
            target = elsewhere
        elif pinned is not None:
            may_go = flight.has_room(pinned) and not flight.waits_for(pinned)
            target = pinned if may_go else None
        else:
            target = None if flight.waits_for_any else flight.pick()
            if target is not None and target.host and source.host:
                # A frame passes from one host to another once.
                target = None
        if target is not None:
            size = 4 + HEADER.size + len(header_for(source, target)) + len(remainder)
            if target.host and size > self._largest_remote():
                return self._refuse_too_large(source, envelope, target)
        if target is None:
            room = self._find_room_to_wait(source, pinned, client, size, now, deadline)
        else:
            room = self.find_room(source, target, size, now, deadline)
        if room is Room.NONE:
            reason = (
                f"{target.address} does not read; its queue of {target.outbox.limit} bytes is full"
                if target is not None
                else f"all requests in flight are taken, and {flight.size} bytes of requests wait;"
                f" the queue has {client.config.queue} (clients.{client.name}.in_flight)"
            )
            name = envelope.name if target is None else target.address
            return refuse_frame(source, envelope, ErrorCode.FULL, reason, name)
        if room is not Room.OK:
            return room.result
        if target is not None:
            self._deliver(source, target, envelope, remainder, size, deadline)
            if "/" not in envelope.name:
                self._remember_route(source, envelope, target)
            return RoutingResult.CONSUMED
        queued = Queued(
            bytes(joined(frame_head(source, envelope, size), remainder)),
            receipt=bool(envelope.flags & RECEIPT_FLAG),
            pinned=pinned is not None,
            sender=source,
            deadline=deadline,
        )
        source.recipients.add(client)
        self._in_flight.wait(
            client, WaitingRequest(source, envelope.id, envelope.name, queued), pinned
        )
        self._requests.note_room(client)
        if queued.receipt:
            self._replies.confirm(source, envelope.id)
        self._limit_requests(source)
        return RoutingResult.CONSUMED

    def _return(self, source: Session, envelope: Envelope) -> RoutingResult:
        """Return a request to a pool to its requester's host, which finds another member."""
        if envelope.flags & RECEIPT_FLAG:
            self._replies.confirm(source, envelope.id)
        self._replies.give_back(source, envelope.id, envelope.name)
        return RoutingResult.CONSUMED

    def _await_or_refuse(self, source: Session, envelope: Envelope, now: float) -> RoutingResult:
        """Hold the sender if its recipient is to come back after a restart, else refuse.

        An address of one connection does not come back.
        """
        name = envelope.name
        if self._returning.awaits(name, now) and not source.mute:
            deadline = deadline_of(source, envelope)
            until = self._returning.until
            self._returning.add(name, source)
            self._held.hold_for_return(
                source, name, until if deadline is None else min(deadline, until)
            )
            return RoutingResult.BLOCKED
        return self._replies.refuse_frame(
            source, envelope, ErrorCode.OFFLINE, f"{name} is not connected"
        )

    def _remember_route(self, source: Session, envelope: Envelope, target: Session) -> None:
        """Cache where a recipient is reached, for the routing loop."""
        entry: RouteEntry = target.client
        if target.host and "/" in envelope.name:
            # Its outbox has to know the address.
            return
        is_elsewhere = bool(target.client.config.home) and target.client.mailbox is None
        if is_elsewhere and "/" not in envelope.name:
            if envelope.kind is not Kind.MESSAGE:
                # The entry of the name stands for its mailbox.
                return
            entry = target.own_route()
        if "/" in envelope.name:
            entry = target.own_route()
        source.routes[envelope.name.encode()] = entry

    def _find_room_to_wait(
        self,
        source: Session,
        pinned: Session | None,
        client: Client,
        size: int,
        now: float,
        deadline: float | None,
    ) -> Room:
        """Return whether a request may wait for room in flight; apply ``when_full``."""
        flight = client.track()
        limit = client.config.queue
        if not flight.size or flight.size + size <= limit:
            return Room.OK
        when_full = client.config.when_full
        if when_full is WhenFull.WAIT and not flight.stalled:
            holder = pinned or next(iter((client.sessions or client.remotes).values()))
            if source.hold_deadline is None:
                source.hold_deadline = now + self._held.hold_at_most(holder, now)
            if source.hold_deadline > now:
                until = (
                    source.hold_deadline
                    if deadline is None
                    else min(deadline, source.hold_deadline)
                )
                flight.holds_senders = True
                self._held.hold(source, holder, until)
                return Room.HELD
            flight.stalled = True
        elif when_full is WhenFull.DROP_OLDEST:
            dropped = 0
            while flight.size + size > limit and dropped < _DROPPED:
                oldest = flight.oldest()
                if oldest is None:
                    break
                reason = f"{client.name} is busy; the request was dropped for a newer one"
                self._in_flight.fail(oldest, ErrorCode.FULL, reason)
                dropped += 1
            self._turn.charge(dropped // _DROPS)
            return Room.OK if not flight.size or flight.size + size <= limit else Room.LATER
        return Room.NONE

    def _refuse_too_large(
        self, source: Session, envelope: Envelope, target: Session
    ) -> RoutingResult:
        """Refuse a frame that is too large for the link to its recipient's host."""
        assert self.remote is not None, "a target at another host needs a cluster"
        message = (
            f"{target.address} is at host {target.host}, and a message to another host has at"
            f" most {self._largest_remote()} bytes with its header (NATS' max_payload is"
            f" {self.remote.max_payload})"
        )
        return self._replies.refuse_frame(source, envelope, ErrorCode.TOO_LARGE, message)

    def _largest_remote(self) -> int:
        """Return the bytes that a frame for another host may have."""
        assert self.remote is not None, "a target at another host needs a cluster"
        return self.remote.largest_frame

    def _deny_answer(self, source: Session, envelope: Envelope) -> RoutingResult:
        """Refuse an answer to a request that is not pending, even an ERROR."""
        if source.host and self.remote is not None:
            self.remote.forget_revoked(source, envelope.name, envelope.id)
        message = f"{envelope.name} has no pending request {envelope.id} to {source.address}"
        self._replies.refuse(source, envelope.id, ErrorCode.DENIED, message, envelope.name)
        return RoutingResult.CONSUMED

    def _deliver(
        self,
        source: Session,
        target: Session,
        envelope: Envelope,
        remainder: memoryview,
        size: int,
        deadline: float | None,
    ) -> None:
        """Put a frame into the target's outbox, which has room for its ``size`` bytes.

        remainder: the frame behind its header and its recipient's name.
        """
        outbox = target.outbox
        # Of a frame for another host, the other host sends the RECEIPT.
        wants_receipt = bool(envelope.flags & RECEIPT_FLAG) and not target.host
        head = frame_head(source, envelope, size, target)
        pinned = "/" in envelope.name
        is_request = envelope.kind is Kind.REQUEST
        kept: bytes | memoryview | None = None
        if is_request and target.client.is_pool:
            # Another member gets a request that this one returns.
            kept = joined(head, remainder)
        if isinstance(outbox, FrameOutbox):
            is_answer = envelope.kind in (Kind.REPLY, Kind.ERROR)
            outbox.put(
                Queued(
                    kept or joined(head, remainder),
                    receipt=wants_receipt,
                    pinned=pinned,
                    sender=source,
                    kept=is_answer,
                    deadline=deadline,
                )
            )
        else:
            if kept is not None or isinstance(remainder.obj, (LargeFrame, MappedFrame)):
                outbox.append(kept or joined(head, remainder))
            else:
                outbox.content += head
                outbox.content += remainder
                outbox.frames += 1
                outbox.size += size
            # No other connection can get an answer, pinned or not.
            may_move = envelope.kind is Kind.MESSAGE or is_request
            outbox.mark(size, deadline, pinned=pinned and may_move)
        if pinned and isinstance(outbox, RemoteOutbox):
            outbox.address_last(size, envelope.name)
        self._replies.touch(target)
        source.recipients.add(target.client)
        if is_request and not source.mute:
            self._requests.expect(source, target, envelope.id, deadline, kept, pinned)
            self._limit_requests(source)
        if wants_receipt:
            self._replies.confirm(source, envelope.id)

    def find_room(
        self,
        source: Session,
        target: Session,
        size: int,
        now: float,
        deadline: float | None = None,
        *,
        may_hold: bool = True,
    ) -> Room:
        """Reserve room for a frame in the target's outbox; make room if that is full.

        may_hold: False where ``wait`` means the same as ``refuse``.
        """
        outbox = target.outbox
        if outbox.reserve(size):
            return Room.OK
        if not outbox.blocked:
            self._replies.touch(target)
            return Room.UNWRITTEN
        return self._make_room(source, target, size, now, deadline, may_hold=may_hold)

    def _make_room(
        self,
        source: Session,
        target: Session,
        size: int,
        now: float,
        deadline: float | None,
        *,
        may_hold: bool,
    ) -> Room:
        """Apply the target's ``when_full``."""
        when_full = target.client.config.when_full
        outbox = target.outbox
        if not target.slow:
            target.slow = True
            reason = f"queue of {outbox.limit} bytes is full: {outbox.waiting} bytes wait"
            self._replies.log_events.note("client.slow", target, source.address, when_full, reason)
        if when_full is WhenFull.WAIT and may_hold and not outbox.stalled and not target.closing:
            if source.hold_deadline is None:
                source.hold_deadline = now + self._held.hold_at_most(target, now)
            if source.hold_deadline > now:
                until = (
                    source.hold_deadline
                    if deadline is None
                    else min(deadline, source.hold_deadline)
                )
                self._held.hold(source, target, until)
                return Room.HELD
            outbox.stalled = True
        elif when_full is WhenFull.DROP_OLDEST and isinstance(outbox, FrameOutbox):
            dropped = outbox.drop_oldest(size, _DROPPED)
            for queued in dropped or ():
                self._reports.report_dropped(target, queued)
            if dropped is not None:
                self._turn.charge(len(dropped) // _DROPS)
                return Room.OK if outbox.has_made_room(size) else Room.LATER
        elif when_full is WhenFull.DISCONNECT and not target.host:
            self._replies.close(target, "queue is full and the client does not read", cut=True)
        return Room.NONE

    def _limit_requests(self, requester: Session) -> None:
        """End the oldest pending request, if there are too many: they use memory."""
        config = requester.client.config
        pending = requester.outgoing_count + requester.waiting_count
        if pending <= config.requests:
            return
        message = (
            f"more than {config.requests} requests are pending; this was the oldest"
            f" (clients.{config.name}.requests)"
        )
        if not requester.outgoing_requests:
            oldest = next(iter(requester.waiting_requests.values()))[0]
            self._in_flight.fail(oldest, ErrorCode.EXPIRED, message)
            return
        request = next(iter(requester.outgoing_requests.values()))[0]
        responder = request.responder
        self._requests.end(request)
        self._replies.refuse(requester, request.id, ErrorCode.EXPIRED, message, responder.address)
        if responder.outbox.waiting and not responder.host:
            # Its frame may be among those.
            responder.revoked.add((requester.address, request.id))
        self._replies.revoke(
            responder, requester, request.id, ErrorCode.EXPIRED, "the requester has too many"
        )


def deadline_of(source: Session, envelope: Envelope) -> float | None:
    """Return when the ttl of the frame being handled is over; None without a ttl."""
    if envelope.extension is None or "ttl" not in envelope.extension:
        return None
    return float(source.arrived + envelope.extension["ttl"])


def header_for(source: Session, target: Session) -> bytes:
    """Return the sender as it is written into a frame for this target."""
    return source.identity if target.host else source.sender_header


def frame_head(
    source: Session, envelope: Envelope, size: int, target: Session | None = None
) -> bytes:
    """Return the new head of a frame: its length, header and sender's address.

    The rest of the frame is passed on untouched. A frame for another host keeps the flag
    RECEIPT.
    """
    is_remote = target is not None and bool(target.host)
    sender = source.identity if is_remote else source.sender_header
    header = HEADER.pack(
        envelope.kind,
        envelope.flags if is_remote else envelope.flags & ~RECEIPT_FLAG,
        envelope.codec,
        len(sender),
        envelope.id,
    )
    return b"".join((frame_prefix(size - 4), header, sender))
