"""Delivery of a frame to one connection, and its return when that connection ends.

These are functions of the broker (:mod:`brokerd.core.broker`), which calls them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from brokerd.config.values import WhenFull
from brokerd.core.large_frame import LargeFrame, joined
from brokerd.core.outbox import FrameOutbox, Queued, StreamOutbox
from brokerd.core.room import Room
from brokerd.core.routing_result import RoutingResult
from brokerd.core.session import Session
from brokerd_client.wire.envelope import (
    BROKER,
    HEADER,
    Envelope,
    ErrorCode,
    Kind,
    head,
    split,
    split_address,
)
from brokerd_client.wire.framing import frame_prefix
from brokerd_client.wire.layout import RECEIPT_FLAG

if TYPE_CHECKING:
    from brokerd.core.broker import Broker

__all__ = [
    "deadline_of",
    "end_request",
    "expire_request",
    "find_room",
    "forget_requests",
    "frame_head",
    "mark_orphaned",
    "return_to_sender",
    "send",
    "tell_expired",
]

#: Most frames dropped per turn to make room for a newer frame (``drop_oldest``).
_DROPPED: Final = 256
#: Frames dropped per frame that is charged to the sender's turn budget.
_DROPS: Final = 2


def send(
    broker: Broker, source: Session, envelope: Envelope, frame: memoryview, now: float
) -> RoutingResult:
    name, instance = split_address(envelope.name)
    message_id, kind = envelope.id, envelope.kind
    answered: Session | None = None
    if kind is Kind.REPLY or kind is Kind.ERROR:
        answered = source.incoming_requests.get((envelope.name, message_id))
        if answered is None:
            return _deny_answer(broker, source, envelope)
    elif source.client.policy.sending(name) is None:
        return broker.refuse_frame(
            source, envelope, ErrorCode.DENIED, f"{source.client.name} may not send to {name}"
        )
    client = broker.exchange.resolve(name)
    if client is None:
        return broker.refuse_frame(
            source, envelope, ErrorCode.NO_SUCH_CLIENT, f"there is no client {name}"
        )
    if (broker.draining or source.parting) and answered is None and not source.mute:
        return broker.refuse_frame(
            source, envelope, ErrorCode.SHUTTING_DOWN, "the broker is shutting down"
        )
    target = answered or (client.sessions.get(envelope.name) if instance else client.pick())
    if target is None:
        return broker.refuse_frame(
            source, envelope, ErrorCode.OFFLINE, f"{envelope.name} is not connected"
        )
    rest = frame[HEADER.size + len(envelope.name) :]
    size = 4 + HEADER.size + len(source.sender_header) + len(rest)
    deadline = deadline_of(source, envelope)
    room = find_room(broker, source, target, size, now, deadline)
    if room is Room.NONE:
        message = (
            f"{target.address} does not read; its queue of {target.outbox.limit} bytes is full"
        )
        return broker.refuse_frame(source, envelope, ErrorCode.FULL, message, target.address)
    if room is not Room.OK:
        return room.result
    _deliver(broker, source, target, envelope, rest, size, deadline)
    if answered is not None:
        end_request(broker, answered, message_id, source)
    if (
        kind is Kind.MESSAGE
        and client.direct is target.outbox
        and not instance
        and source.client.meter is None
        and not source.mute
    ):
        source.routes[envelope.name.encode()] = client
    return RoutingResult.CONSUMED


def _deny_answer(broker: Broker, source: Session, envelope: Envelope) -> RoutingResult:
    """Refuse an answer to a request that is not pending, even an ERROR."""
    message = f"{envelope.name} has no request {envelope.id} to {source.address} outstanding"
    broker.refuse(source, envelope.id, ErrorCode.DENIED, message, envelope.name)
    return RoutingResult.CONSUMED


def _deliver(
    broker: Broker,
    source: Session,
    target: Session,
    envelope: Envelope,
    rest: memoryview,
    size: int,
    deadline: float | None,
) -> None:
    """Put a frame into the target's outbox, which has room for its ``size`` bytes.

    rest: the frame behind its header and its recipient's name.
    """
    outbox = target.outbox
    wants_receipt = bool(envelope.flags & RECEIPT_FLAG)
    head = frame_head(source, envelope, size)
    if isinstance(outbox, FrameOutbox):
        pinned = "/" in envelope.name
        kept = envelope.kind in (Kind.REPLY, Kind.ERROR)
        whole = joined(head, rest)
        outbox.put(
            Queued(
                whole,
                receipt=wants_receipt,
                pinned=pinned,
                sender=source,
                kept=kept,
                deadline=deadline,
            )
        )
    elif deadline is not None:
        outbox.append_timed(
            Queued(joined(head, rest), receipt=wants_receipt, sender=source, deadline=deadline)
        )
    elif isinstance(rest.obj, LargeFrame):
        outbox.append(joined(head, rest))
    else:
        outbox.content += head
        outbox.content += rest
        outbox.frames += 1
        outbox.size += size
    broker.touch(target)
    source.recipients.add(target.client)
    if envelope.kind is Kind.REQUEST and not source.mute:
        _expect_answer(broker, source, target, envelope.id, deadline)
        if len(source.outgoing_requests) > source.client.config.requests:
            _give_up_oldest(broker, source)
    if wants_receipt:
        broker.answer(source, Envelope(Kind.RECEIPT, envelope.id, BROKER))


def deadline_of(source: Session, envelope: Envelope) -> float | None:
    """Return when the ttl of the frame being handled is over; None without a ttl."""
    if envelope.extension is None or "ttl" not in envelope.extension:
        return None
    return float(source.arrived + envelope.extension["ttl"])


def find_room(
    broker: Broker,
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
        broker.touch(target)
        return Room.UNWRITTEN
    return _make_room(broker, source, target, size, now, deadline, may_hold=may_hold)


def _make_room(
    broker: Broker,
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
        why = f"{outbox.waiting} bytes wait for it; its queue of {outbox.limit} is full"
        broker.log_events.note("client.slow", target, source.address, when_full, why)
    if when_full is WhenFull.WAIT and may_hold and not outbox.stalled and not target.closing:
        if source.hold_deadline is None:
            source.hold_deadline = now + broker.may_hold_for(target, now)
        if source.hold_deadline > now:
            until = (
                source.hold_deadline if deadline is None else min(deadline, source.hold_deadline)
            )
            broker.hold(source, target, until)
            return Room.HELD
        outbox.stalled = True
    elif when_full is WhenFull.DROP_OLDEST and isinstance(outbox, FrameOutbox):
        dropped = outbox.drop_oldest(size, _DROPPED)
        for queued in dropped or ():
            _tell_dropped(broker, target, queued)
        if dropped is not None:
            broker.charge(len(dropped) // _DROPS)
            return Room.OK if outbox.has_made_room(size) else Room.LATER
    elif when_full is WhenFull.DISCONNECT:
        broker.close(target, "its queue is full and it does not read", cut=True)
    return Room.NONE


def _tell_dropped(broker: Broker, target: Session, queued: Queued) -> None:
    envelope = head(memoryview(queued.frame)[4:])
    broker.dropped += 1
    broker.log_events.note(
        "message.dropped", target, envelope.name, "drop_oldest", "it made room for a newer one"
    )
    sender = _sender_of(broker, queued, envelope.name)
    if _is_over(queued, envelope, sender, target):
        return
    if envelope.kind is Kind.REQUEST and sender is not None:
        end_request(broker, sender, envelope.id, target)
    if sender is not None and (queued.receipt or envelope.kind is Kind.REQUEST):
        message = f"{target.address} does not read; the message made room for a newer one"
        broker.refuse(sender, envelope.id, ErrorCode.FULL, message, target.address)


def tell_expired(broker: Broker, target: Session, queued: Queued) -> None:
    """Report a frame whose ttl was over before it was written to its recipient."""
    envelope = head(memoryview(queued.frame)[4:])
    sender = _sender_of(broker, queued, envelope.name)
    message = f"its ttl was over before {target.address} had read what waited before it"
    if envelope.kind is Kind.REQUEST and sender is not None:
        if not _is_over(queued, envelope, sender, target):
            expire_request(broker, sender, envelope.id, target.address, message)
        return
    if envelope.kind is Kind.REPLY or envelope.kind is Kind.ERROR:
        # The target is the requester: it receives this ERROR instead of the answer.
        broker.refuse(
            target,
            envelope.id,
            ErrorCode.EXPIRED,
            f"the answer of {envelope.name}: {message}",
            envelope.name,
        )
    if sender is None or envelope.kind in (Kind.EVENT, Kind.ERROR):
        broker.dropped += 1
        broker.log_events.note("message.dropped", target, envelope.name, ErrorCode.EXPIRED, message)
    else:
        broker.refuse(sender, envelope.id, ErrorCode.EXPIRED, message, target.address)


def _is_over(queued: Queued, envelope: Envelope, sender: Session | None, holder: Session) -> bool:
    """Return whether a queued request's ttl has already been reported to its sender."""
    if queued.deadline is None or envelope.kind is not Kind.REQUEST or sender is None:
        return False
    return sender.expiring.get((envelope.id, holder.address)) != queued.deadline


def expire_request(
    broker: Broker, requester: Session, message_id: int, address: str, why: str = ""
) -> None:
    """End a request whose ttl is over, and send its requester an ERROR."""
    responder = requester.outgoing_requests.get((message_id, address))
    if responder is not None:
        end_request(broker, requester, message_id, responder)
        message = why or f"its ttl was over before {address} answered"
        broker.refuse(requester, message_id, ErrorCode.EXPIRED, message, address)


def _expect_answer(
    broker: Broker, requester: Session, responder: Session, message_id: int, deadline: float | None
) -> None:
    key = message_id, responder.address
    if requester.expiring:
        _forget_deadline(broker, requester, key)
    responder.incoming_requests[(requester.address, message_id)] = requester
    requester.outgoing_requests[key] = responder
    if deadline is not None:
        requester.expiring[key] = deadline
        broker.deadlines.add(deadline, (requester, *key))


def forget_requests(broker: Broker, requester: Session) -> None:
    """End all pending requests of a session that ends."""
    # A client that is removed and configured again may have two connections for a
    # moment. Only the requests of this one are ended.
    for (message_id, _), responder in requester.outgoing_requests.items():
        if responder.incoming_requests.get((requester.address, message_id)) is requester:
            del responder.incoming_requests[(requester.address, message_id)]
    requester.outgoing_requests.clear()
    for key, deadline in requester.expiring.items():
        broker.deadlines.discard(deadline, (requester, *key))
    requester.expiring.clear()


def _forget_deadline(broker: Broker, requester: Session, key: tuple[int, str]) -> None:
    deadline = requester.expiring.pop(key, None)
    if deadline is not None:
        broker.deadlines.discard(deadline, (requester, *key))


def end_request(broker: Broker, requester: Session, message_id: int, responder: Session) -> None:
    """Forget the pending request of one connection to another.

    Each is compared by identity, because a new connection may have its address by now.
    """
    if requester.outgoing_requests.get((message_id, responder.address)) is responder:
        del requester.outgoing_requests[(message_id, responder.address)]
        if requester.expiring:
            _forget_deadline(broker, requester, (message_id, responder.address))
    if responder.incoming_requests.get((requester.address, message_id)) is requester:
        del responder.incoming_requests[(requester.address, message_id)]


def _give_up_oldest(broker: Broker, requester: Session) -> None:
    """End the oldest pending request, so that requests use bounded memory."""
    (message_id, address), responder = next(iter(requester.outgoing_requests.items()))
    end_request(broker, requester, message_id, responder)
    config = requester.client.config
    message = (
        f"more than {config.requests} requests unanswered; this was the oldest"
        f" (clients.{config.name}.requests)"
    )
    broker.refuse(requester, message_id, ErrorCode.EXPIRED, message, address)


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


def mark_orphaned(session: Session) -> None:
    """Mark this session's queued frames as orphaned.

    A new session with the same address then gets no errors for them.
    """
    for client in session.recipients:
        for each in client.sessions.values():
            if isinstance(each.outbox, StreamOutbox):
                each.outbox.sender_left(session.sender_header)
    session.recipients.clear()


def _sender_of(broker: Broker, queued: Queued, name: str) -> Session | None:
    """Return the session that a queued frame came from, or None if that has closed."""
    if queued.sender is not None:
        sender: Session = queued.sender
        return sender if sender.open and not sender.mute else None
    return None if queued.orphaned else broker.exchange.find(name)


def return_to_sender(broker: Broker, session: Session, queued: Queued) -> None:
    """Pass a frame that was not taken to another pool member, or report it."""
    body = memoryview(queued.frame)[4:]
    # The extension was read when the frame arrived. Reading it again for every frame
    # would take too long.
    envelope = head(body)
    if envelope.name == BROKER:
        if envelope.kind is Kind.ERROR:
            _count_unheard(broker, bytes(body[split(body)[1] :]))
        return
    if envelope.kind not in (Kind.MESSAGE, Kind.REQUEST, Kind.REPLY):
        broker.returned["lost"] += 1
        return
    sender = _sender_of(broker, queued, envelope.name)
    if sender is not None and sender.number > session.closed_number:
        # The sender joined after this session closed: the frame is from an earlier
        # connection with the same address.
        sender = None
    if _is_over(queued, envelope, sender, session):
        return
    other = None if queued.pinned or envelope.kind is Kind.REPLY else session.client.pick()
    moves = (
        other is not None
        and isinstance(other.outbox, FrameOutbox)
        and other.outbox.reserve(len(queued.frame))
    )
    if envelope.kind is Kind.REQUEST and sender is not None:
        end_request(broker, sender, envelope.id, session)
    if moves:
        assert other is not None
        assert isinstance(other.outbox, FrameOutbox)
        other.outbox.put(queued)
        broker.returned["passed_on"] += 1
        broker.touch(other)
        if envelope.kind is Kind.REQUEST and sender is not None:
            _expect_answer(broker, sender, other, envelope.id, queued.deadline)
    elif sender is not None:
        to = session.address if queued.pinned else session.client.name
        broker.returned["reported"] += 1
        broker.refuse(
            sender,
            envelope.id,
            ErrorCode.OFFLINE,
            f"{to} disconnected before it took the message",
            to,
        )
    else:
        broker.dropped += 1
        broker.returned["lost"] += 1
        why = "neither its recipient nor its sender is there any more"
        broker.log_events.note("message.dropped", session, envelope.name, "offline", why)


def _count_unheard(broker: Broker, payload: bytes) -> None:
    """Count a refusal that was not received. payload: the payload of the ERROR."""
    said = json.loads(payload)
    if said["name"] != BROKER:
        broker.unheard[said["code"]] += 1
