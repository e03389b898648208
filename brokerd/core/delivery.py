"""Delivery of a frame to one connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from brokerd.config.values import WhenFull
from brokerd.core.error_codes import BACK, code_of
from brokerd.core.flight import WaitingRequest
from brokerd.core.large_frame import LargeFrame, joined
from brokerd.core.outbox import FrameOutbox, Queued
from brokerd.core.room import Room
from brokerd.core.routing_result import RoutingResult
from brokerd_client.wire.envelope import (
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
    from brokerd.core.exchange import Client, Exchange
    from brokerd.core.held_senders import HeldSenders
    from brokerd.core.in_flight import InFlight
    from brokerd.core.replies import Replies
    from brokerd.core.reports import Reports
    from brokerd.core.requests import Requests
    from brokerd.core.session import Session
    from brokerd.core.status import Status
    from brokerd.core.turn import Turn

__all__ = ["Delivery", "deadline_of", "frame_head"]

#: Most frames dropped per turn to make room for a newer frame (``drop_oldest``).
_DROPPED: Final = 256
#: Frames dropped per frame that is charged to the sender's turn budget.
_DROPS: Final = 2


class Delivery:
    """Delivers frames to their recipients, or refuses them."""

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
    ) -> None:
        self._exchange = exchange
        self._status = status
        self._turn = turn
        self._requests = requests
        self._replies = replies
        self._held = held
        self._in_flight = in_flight
        self._reports = reports

    def send(
        self, source: Session, envelope: Envelope, frame: memoryview, now: float
    ) -> RoutingResult:
        """Deliver one frame to the connection that its name stands for."""
        refuse_frame = self._replies.refuse_frame
        name, instance = split_address(envelope.name)
        message_id, kind = envelope.id, envelope.kind
        requester: Session | None = None
        if kind is Kind.REPLY or kind is Kind.ERROR:
            requester = source.incoming_requests.get((envelope.name, message_id))
            if requester is None:
                return self._deny_answer(source, envelope)
            if kind is Kind.ERROR and code_of(frame[split(frame)[1] :]) == BACK:
                self._in_flight.give_back(source, requester, message_id)
                return RoutingResult.CONSUMED
        elif source.client.policy.sending(name) is None:
            return refuse_frame(
                source, envelope, ErrorCode.DENIED, f"{source.client.name} may not send to {name}"
            )
        client = self._exchange.resolve(name)
        if client is None:
            return refuse_frame(
                source, envelope, ErrorCode.NO_SUCH_CLIENT, f"unknown client {name}"
            )
        if (self._status.draining or source.parting) and requester is None and not source.mute:
            return refuse_frame(
                source, envelope, ErrorCode.SHUTTING_DOWN, "the broker is shutting down"
            )
        if kind is Kind.REQUEST and client.flight is not None and not source.mute:
            return self._send_request(source, client, envelope, frame, now)
        target = requester or (client.sessions.get(envelope.name) if instance else client.pick())
        if target is None:
            return refuse_frame(
                source, envelope, ErrorCode.OFFLINE, f"{envelope.name} is not connected"
            )
        remainder = frame[HEADER.size + len(envelope.name) :]
        size = 4 + HEADER.size + len(source.sender_header) + len(remainder)
        deadline = deadline_of(source, envelope)
        room = self.find_room(source, target, size, now, deadline)
        if room is Room.NONE:
            message = (
                f"{target.address} does not read; its queue of {target.outbox.limit} bytes is full"
            )
            return refuse_frame(source, envelope, ErrorCode.FULL, message, target.address)
        if room is not Room.OK:
            return room.result
        self._deliver(source, target, envelope, remainder, size, deadline)
        if requester is not None:
            self._requests.end(requester, message_id, source)
            if source.client in self._requests.freed:
                self._in_flight.dispatch(source.client)
        if (
            kind is Kind.MESSAGE
            and client.direct is target.outbox
            and not instance
            and source.client.meter is None
            and not source.mute
        ):
            source.routes[envelope.name.encode()] = client
        return RoutingResult.CONSUMED

    def _send_request(
        self, source: Session, client: Client, envelope: Envelope, frame: memoryview, now: float
    ) -> RoutingResult:
        """Deliver a request to a connection with room in flight, or let it wait for one."""
        refuse_frame = self._replies.refuse_frame
        flight = client.track()
        pinned = client.sessions.get(envelope.name) if "/" in envelope.name else None
        if not client.sessions or ("/" in envelope.name and pinned is None):
            return refuse_frame(
                source, envelope, ErrorCode.OFFLINE, f"{envelope.name} is not connected"
            )
        remainder = frame[HEADER.size + len(envelope.name) :]
        size = 4 + HEADER.size + len(source.sender_header) + len(remainder)
        deadline = deadline_of(source, envelope)
        target: Session | None
        if pinned is not None:
            target = pinned if flight.has_room(pinned) else None
        else:
            target = None if flight.waits_for_any else flight.pick()
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
            holder = pinned or next(iter(client.sessions.values()))
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

    def _deny_answer(self, source: Session, envelope: Envelope) -> RoutingResult:
        """Refuse an answer to a request that is not pending, even an ERROR."""
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
        wants_receipt = bool(envelope.flags & RECEIPT_FLAG)
        head = frame_head(source, envelope, size)
        queued: Queued | None = None
        if isinstance(outbox, FrameOutbox):
            pinned = "/" in envelope.name
            is_answer = envelope.kind in (Kind.REPLY, Kind.ERROR)
            queued = Queued(
                joined(head, remainder),
                receipt=wants_receipt,
                pinned=pinned,
                sender=source,
                kept=is_answer,
                deadline=deadline,
            )
            outbox.put(queued)
        elif deadline is not None:
            outbox.append_timed(
                Queued(
                    joined(head, remainder), receipt=wants_receipt, sender=source, deadline=deadline
                )
            )
        elif isinstance(remainder.obj, LargeFrame):
            outbox.append(joined(head, remainder))
        else:
            outbox.content += head
            outbox.content += remainder
            outbox.frames += 1
            outbox.size += size
        self._replies.touch(target)
        source.recipients.add(target.client)
        if envelope.kind is Kind.REQUEST and not source.mute:
            self._requests.expect(source, target, envelope.id, deadline, queued)
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
        elif when_full is WhenFull.DISCONNECT:
            self._replies.close(target, "queue is full and the client does not read", cut=True)
        return Room.NONE

    def _limit_requests(self, requester: Session) -> None:
        """End the oldest pending request, if there are too many: they use memory."""
        config = requester.client.config
        pending = len(requester.outgoing_requests) + requester.waiting_count
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
        (message_id, address), responder = next(iter(requester.outgoing_requests.items()))
        self._requests.end(requester, message_id, responder)
        self._replies.refuse(requester, message_id, ErrorCode.EXPIRED, message, address)
        self._replies.revoke(
            responder, requester, message_id, ErrorCode.EXPIRED, "the requester has too many"
        )


def deadline_of(source: Session, envelope: Envelope) -> float | None:
    """Return when the ttl of the frame being handled is over; None without a ttl."""
    if envelope.extension is None or "ttl" not in envelope.extension:
        return None
    return float(source.arrived + envelope.extension["ttl"])


def frame_head(source: Session, envelope: Envelope, size: int) -> bytes:
    """Return the new head of a frame: its length, header and sender's address.

    The rest of the frame is passed on untouched.
    """
    header = HEADER.pack(
        envelope.kind,
        envelope.flags & ~RECEIPT_FLAG,
        envelope.codec,
        len(source.sender_header),
        envelope.id,
    )
    return b"".join((frame_prefix(size - 4), header, source.sender_header))
