"""Events: what is published, by clients and by the broker itself, and who gets it.

Functions of the broker (:mod:`brokerd.core.broker`). Source of the rules: docs/protocol.md, "Topics".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from brokerd.core.delivery import deadline_of, frame_head, make_room
from brokerd.core.outbox import FrameOutbox, Queued, StreamOutbox
from brokerd.core.parcel import joined
from brokerd.core.session import Session
from brokerd.core.topics import Matches
from brokerd.core.verdict import Verdict
from brokerd_client.errors import InvalidName
from brokerd_client.wire.envelope import BROKER, HEADER, Envelope, ErrorCode, Flag, Kind, check_topic, encode
from brokerd_client.wire.framing import frame as make_frame

if TYPE_CHECKING:
    from brokerd.core.broker import Broker
    from brokerd.core.exchange import Client

__all__ = ["announce", "announce_presence", "publish", "recipients"]

#: How many subscribers the routing loop remembers for one publisher, those of all its topics together. A topic
#: counts for some of them, however few it has.
_REMEMBERED_OUTBOXES: Final = 16_384
_SMALL_FAN: Final = 16
#: Nodes of the tree of subscriptions that are looked at in the time that a frame takes.
_NODES: Final = 64
#: Subscriptions that are gone through for an event in that time.
_MATCHES: Final = 32
_RECEIPT: Final = int(Flag.RECEIPT)


def publish(broker: Broker, source: Session, envelope: Envelope, frame: memoryview, now: float) -> Verdict:
    if envelope.name:
        return broker.malformed(source, envelope.id, "an EVENT names no recipient")
    try:
        check_topic(envelope.topic)
    except InvalidName as error:
        return broker.malformed(source, envelope.id, str(error))
    if source.client.policy.publishing(envelope.topic) is None:
        message = f"{source.client.name} may not publish on {envelope.topic}"
        return broker.refuse_frame(source, envelope, ErrorCode.DENIED, message)
    if (broker.draining or source.parting) and not source.mute:
        return broker.refuse_frame(source, envelope, ErrorCode.SHUTTING_DOWN, "the broker is shutting down")
    rest = frame[HEADER.size :]
    size = 4 + HEADER.size + len(source.stamp) + len(rest)
    found = _find(broker, source, envelope.topic)
    if found is None:
        return Verdict.YIELD
    targets = _choose(found, size)
    full = [target for target in targets if not target.outbox.reserve(size)]
    for target in full:
        if not target.outbox.blocked:
            for each in full:
                broker.touch(each)
            return Verdict.FLUSH
    left_out: set[Session] = set()
    for target in full:
        verdict = make_room(broker, source, target, size, now)
        if verdict is Verdict.HOLD:
            return verdict
        if verdict is Verdict.CLOSE:
            left_out.add(target)
            why = "an event it subscribed to: its queue is full"
            broker.happenings.note("message.dropped", target, source.address, "full", why)
    broker.dropped += len(left_out)
    if targets:
        whole = joined(frame_head(source, envelope, size), rest)
        deadline = deadline_of(source, envelope)
        for target in targets:
            if target not in left_out:
                if isinstance(target.outbox, FrameOutbox):
                    target.outbox.put(Queued(whole, deadline=deadline))
                elif deadline is not None:
                    target.outbox.append_timed(Queued(whole, deadline=deadline))
                else:
                    target.outbox.append(whole)
                broker.touch(target)
    if envelope.flags & _RECEIPT:
        broker.answer(source, Envelope(Kind.RECEIPT, envelope.id, BROKER))
    elif source.client.meter is None and not source.mute:
        _remember_fan(broker, source, envelope.topic, targets)
    return Verdict.NEXT


def _find(broker: Broker, source: Session, topic: str) -> Matches[Session] | None:
    """Return who gets an event on ``topic``; None where the others have their turn before all of them are found."""
    if broker.patience < 0:
        return broker.topics.find(topic)
    found, looked_at = broker.topics.search(topic, source, (broker.patience + 1) * _NODES)
    broker.spend(looked_at // _NODES + (0 if found is None else len(found) // _MATCHES))
    return found


def _remember_fan(broker: Broker, source: Session, topic: str, targets: list[Session]) -> None:
    """Let the routing loop pass on the next event on this topic by itself, where nobody has to be chosen."""
    found = broker.topics.find(topic)
    if not targets or found.groups:
        return
    if found.fan is None:
        # One for all publishers: a thousand of them on a thousand topics would have a million otherwise.
        outboxes = tuple(target.outbox for target in targets)
        found.fan = outboxes if all(isinstance(outbox, StreamOutbox) for outbox in outboxes) else ()
    fan = cast("tuple[StreamOutbox, ...]", found.fan)
    if fan:
        if (len(source.fans) + 1) * max(len(fan), _SMALL_FAN) > _REMEMBERED_OUTBOXES:
            source.fans.clear()
        source.fans[topic.encode()] = fan


def announce_presence(broker: Broker, what: str, client: Client, now_wall: float) -> None:
    """Publish that a client came or went, to whoever may know of it."""
    payload = f'{{"name": "{client.name}", "since": {now_wall}}}'.encode()
    announce(broker, f"$broker.{what}.{client.name}", payload, about=client.name)


def announce(broker: Broker, topic: str, payload: bytes, about: str | None = None) -> None:
    """Publish an event of the broker's own. about: a client; who may not send to it is not told."""
    found = broker.topics.find(topic)
    if not (found.everyone or found.groups):
        return
    whole = make_frame(encode(Envelope(Kind.EVENT, 0, BROKER, payload, codec=2, topic=topic)))
    for target in _choose(found if about is None else _who_may_see(found, about), len(whole)):
        if target.outbox.blocked and not target.outbox.reserve(len(whole), broker.outcome_reserve):
            # It asked to miss nothing and does not read: an end it can see is better than a gap it can't.
            broker.close(target, "it asked for presence and does not read", cut=True)
            continue
        broker.pass_on(target, whole)


def recipients(broker: Broker, topic: str, size: int) -> list[Session]:
    """Return the sessions that get an event of the broker's own on ``topic``."""
    found = broker.topics.find(topic)
    return _choose(found, size) if found.everyone or found.groups else []


def _choose(found: Matches[Session], size: int) -> list[Session]:
    """Return who gets an event of ``size`` bytes: everyone, and one member of each group.

    That is a member that gets it anyway, or else one that has room for it, or else the least loaded.
    """
    if not found.groups:
        return list(found.everyone)

    def load(member: Session) -> tuple[bool, bool, int]:
        outbox = member.outbox
        return outbox.blocked and outbox.waiting + size > outbox.limit, outbox.blocked, outbox.waiting

    chosen = dict(found.everyone)
    # Once an event, not once a group: an even number of groups would leave the same members at the front.
    found.turn += 1
    for members in found.groups.values():
        if chosen.keys().isdisjoint(members):
            ordered = [member for member in members if member not in found.left]
            if ordered:
                start = found.turn % len(ordered)
                chosen[min(ordered[start:] + ordered[:start], key=load)] = 1
    return list(chosen)


def _who_may_see(found: Matches[Session], about: str) -> Matches[Session]:
    """Return those of the subscribers who may send to the client ``about``."""
    seen: Matches[Session] = Matches()
    # It comes and goes with the connections, so it can't be remembered with what was found.
    seen.turn = found.turn = found.turn + 1
    seen.left = found.left
    seen.everyone = {member: 1 for member in found.everyone if member.client.policy.sending(about) is not None}
    for group, members in found.groups.items():
        able = {member: 1 for member in members if member.client.policy.sending(about) is not None}
        if able:
            seen.groups[group] = able
    return seen
