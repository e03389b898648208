"""Events: what is published, by clients and by the broker itself, and who gets it.

Functions of the broker (:mod:`brokerd.core.broker`). Source of the rules: docs/protocol.md, "Topics".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, cast

from brokerd.core.delivery import deadline_of, frame_head, make_room
from brokerd.core.large_frame import joined
from brokerd.core.outbox import FrameOutbox, Queued, StreamOutbox
from brokerd.core.routing_result import RoutingResult
from brokerd.core.session import Session
from brokerd.core.topics import Matches
from brokerd_client.errors import InvalidName
from brokerd_client.wire.envelope import BROKER, HEADER, Envelope, ErrorCode, Flag, Kind, check_topic, encode
from brokerd_client.wire.framing import frame as make_frame

if TYPE_CHECKING:
    from brokerd.core.broker import Broker
    from brokerd.core.exchange import Client

__all__ = ["Announcement", "Spread", "announce", "announce_presence", "go_on_publishing", "publish", "recipients"]

#: How many subscribers the routing loop remembers for one publisher, those of all its topics together. A topic
#: counts for some of them, however few it has.
_REMEMBERED_OUTBOXES: Final = 16_384
_SMALL_FANOUT: Final = 16
#: Nodes of the tree of subscriptions that are looked at in the time that a frame takes.
_NODES: Final = 64
#: Subscriptions that are gone through for an event in that time.
_MATCHES: Final = 32
#: Subscriptions that are gone through in one step of an event of the broker's own.
_STEP: Final = 16
#: Members of a group that are looked at for one that has room, before the best of them is taken.
_LOOKED_AT: Final = 256
_RECEIPT: Final = int(Flag.RECEIPT)


def publish(broker: Broker, source: Session, envelope: Envelope, frame: memoryview, now: float) -> RoutingResult:
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
    found = _find(broker, source, envelope.topic)
    if found is None:
        return RoutingResult.YIELD
    size = 4 + HEADER.size + len(source.sender_header) + len(frame) - HEADER.size
    done = source.reached_by_event if source.reached_by_event is not None else {}
    source.spread = Spread(found, choose(found, size, None, done), done, deadline_of(source, envelope))
    return go_on_publishing(broker, source, envelope, frame, now)


class Spread:
    """An event on its way to its subscribers.

    found: all of them. rest: those whose turn is still to come; None for one that is passed over.
    done: those whose turn has been. waiting: the one that it has stopped at. whole: the frame, once it is made.
    """

    __slots__ = ("deadline", "done", "found", "rest", "waiting", "whole")

    def __init__(
        self,
        found: Matches[Session],
        rest: Iterator[Session | None],
        done: dict[Session, None],
        deadline: float | None,
    ) -> None:
        self.found = found
        self.rest = rest
        self.done = done
        self.deadline = deadline
        self.waiting: Session | None = None
        self.whole: bytes | memoryview | None = None


def go_on_publishing(
    broker: Broker, source: Session, envelope: Envelope, frame: memoryview, now: float
) -> RoutingResult:
    """Give an event to the next of its subscribers; YIELD and FLUSH: there are more."""
    spread = source.spread
    assert spread is not None
    if spread.whole is None:
        rest = frame[HEADER.size :]
        head = frame_head(source, envelope, 4 + HEADER.size + len(source.sender_header) + len(rest))
        # A frame that is looked at again must stay as it is.
        at_once = len(spread.found) <= _MATCHES
        spread.whole = joined(head, rest) if at_once else b"".join((head, rest))
    for count, target in enumerate(itertools.chain((spread.waiting,), spread.rest), 1):
        if target is not None and target.open and not target.retired:
            result = _give(broker, source, target, spread, now)
            if result is not RoutingResult.CONSUMED:
                spread.waiting = target
                source.reached_by_event = spread.done
                return result
        spread.waiting = None
        if count % _MATCHES == 0 and broker.turn_budget >= 0:
            if broker.turn_budget == 0:
                source.reached_by_event = spread.done
                return RoutingResult.YIELD
            broker.charge(1)
    source.spread = source.reached_by_event = None
    if envelope.flags & _RECEIPT:
        broker.answer(source, Envelope(Kind.RECEIPT, envelope.id, BROKER))
    elif source.client.meter is None and not source.mute:
        _remember_fanout(broker, source, envelope.topic, spread.found)
    return RoutingResult.CONSUMED


def _give(broker: Broker, source: Session, target: Session, spread: Spread, now: float) -> RoutingResult:
    """Put an event into a subscriber's outbox, or leave that subscriber out. FLUSH, YIELD: it is to be tried again."""
    whole, outbox = spread.whole, target.outbox
    assert whole is not None
    if not outbox.reserve(len(whole)):
        if not outbox.blocked:
            broker.touch(target)
            return RoutingResult.FLUSH
        result = make_room(broker, source, target, len(whole), now, may_hold=False)
        if result is RoutingResult.CLOSE:
            broker.dropped += 1
            why = "an event it subscribed to: its queue is full"
            broker.log_events.note("message.dropped", target, source.address, "full", why)
            return RoutingResult.CONSUMED
        if result is not RoutingResult.CONSUMED:
            return result
    if isinstance(outbox, FrameOutbox):
        outbox.put(Queued(whole, deadline=spread.deadline))
    elif spread.deadline is not None:
        outbox.append_timed(Queued(whole, deadline=spread.deadline))
    else:
        outbox.append(whole)
    broker.touch(target)
    return RoutingResult.CONSUMED


def _find(broker: Broker, source: Session, topic: str) -> Matches[Session] | None:
    """Return who gets an event on ``topic``; None where the others have their turn before all of them are found."""
    if broker.turn_budget < 0:
        return broker.topics.find(topic)
    found, looked_at = broker.topics.search(topic, source, (broker.turn_budget + 1) * _NODES)
    broker.charge(looked_at // _NODES)
    return found


def _remember_fanout(broker: Broker, source: Session, topic: str, found: Matches[Session]) -> None:
    """Let the routing loop pass on the next event on this topic by itself, where nobody has to be chosen."""
    if not found.everyone or found.groups or broker.topics.known(topic) is not found:
        return
    if found.fanout is None:
        # One for all publishers: a thousand of them on a thousand topics would have a million otherwise.
        outboxes = tuple(target.outbox for target in found.everyone)
        found.fanout = outboxes if all(isinstance(outbox, StreamOutbox) for outbox in outboxes) else ()
    fanout = cast("tuple[StreamOutbox, ...]", found.fanout)
    if fanout:
        if (len(source.fanouts) + 1) * max(len(fanout), _SMALL_FANOUT) > _REMEMBERED_OUTBOXES:
            source.fanouts.clear()
            source.widest = 0
        source.fanouts[topic.encode()] = fanout
        source.widest = max(source.widest, len(fanout))


class Announcement:
    """An event of the broker's own that is to be told.

    about: a client; a subscriber that may not send to it is not told. client, online, since: presence that is seen from
    now on. done: those that have been told.
    """

    __slots__ = ("about", "client", "done", "online", "payload", "since", "topic")

    def __init__(self, topic: str, payload: str, about: str | None = None) -> None:
        self.topic = topic
        self.payload = payload
        self.about = about
        self.client: Client | None = None
        self.online = False
        self.since = 0.0
        self.done: dict[Session, None] = {}

    def begin(self, broker: Broker) -> Iterator[None]:
        """Tell the subscribers, some of them in each step."""
        if self.client is not None:
            self.client.shown_online, self.client.shown_since = self.online, self.since
        event = Envelope(Kind.EVENT, 0, BROKER, self.payload.encode(), codec=2, topic=self.topic)
        whole = make_frame(encode(event))
        for target in recipients(broker, self.topic, len(whole), self.about, self.done):
            if target is None:
                yield
            elif target.open and not target.retired:
                _tell(broker, target, whole)


def announce_presence(broker: Broker, what: str, client: Client, now_wall: float) -> None:
    """Publish that a client came or went, to whoever may know of it."""
    payload = f'{{"name": "{client.name}", "since": {now_wall}}}'
    news = Announcement(f"$broker.{what}.{client.name}", payload, client.name)
    news.client, news.online, news.since = client, client.online, now_wall
    broker.deferred.add(news)


def announce(broker: Broker, topic: str, payload: str) -> None:
    """Publish an event of the broker's own, in turns where it has very many subscribers."""
    broker.deferred.add(Announcement(topic, payload))


def _tell(broker: Broker, target: Session, whole: bytes) -> None:
    if target.outbox.blocked and not target.outbox.reserve(len(whole), broker.outcome_reserve):
        # It asked to miss nothing and does not read: an end it can see is better than a gap it can't.
        broker.close(target, "it asked for presence and does not read", cut=True)
    else:
        broker.pass_on(target, whole)


def recipients(
    broker: Broker, topic: str, size: int, about: str | None = None, done: dict[Session, None] | None = None
) -> Iterator[Session | None]:
    """Yield the sessions that get an event of the broker's own on ``topic``, and None after some work each time.

    about: a client; a session that may not send to it is passed over. done: those that have it; more are added.
    """
    # Whose search it is; it has nothing to do with a connection.
    owner = object()
    while True:
        found, _ = broker.topics.search(topic, owner, _NODES)
        if found is not None:
            break
        yield None
    for count, target in enumerate(choose(found, size, about, {} if done is None else done), 1):
        if target is not None:
            yield target
        if count % _STEP == 0:
            yield None


def choose(
    found: Matches[Session], size: int, about: str | None, done: dict[Session, None]
) -> Iterator[Session | None]:
    """Yield the sessions that get an event of ``size`` bytes: everyone, and one member of each group.

    That is a member that gets it anyway, or else one that has room for it, or else the least loaded.
    None stands for work that has brought no session. about, done: as for ``recipients``.
    """
    for target in found.everyone:
        if target not in done and (about is None or target.client.policy.sending(about) is not None):
            done[target] = None
            yield target
        else:
            yield None
    if not found.groups:
        return
    # Once an event, not once a group: an even number of groups would leave the same members at the front.
    found.turn += 1
    turn = found.turn
    for group, members in found.groups.items():
        if not done.keys().isdisjoint(members):
            yield None
            continue
        chosen, looked_at = _member(found, group, turn, size, about)
        for _ in range(looked_at // _STEP):
            yield None
        if chosen is not None:
            done[chosen] = None
        yield chosen


def _member(found: Matches[Session], group: str, turn: int, size: int, about: str | None) -> tuple[Session | None, int]:
    """Return (the member of a group whose turn it is, or None; how many were looked at)."""
    ordered = found.members_of(group)
    start = turn % len(ordered)
    best, least = None, (True, True, 0)
    looked_at = 0
    for member in itertools.chain(itertools.islice(ordered, start, None), itertools.islice(ordered, start)):
        looked_at += 1
        if member in found.left or not member.open:
            continue
        if about is not None and member.client.policy.sending(about) is None:
            continue
        outbox = member.outbox
        waiting = outbox.waiting
        load = (outbox.blocked and waiting + size > outbox.limit, outbox.blocked, waiting)
        if best is None or load < least:
            best, least = member, load
            if not waiting:
                break
        if looked_at >= _LOOKED_AT and not least[0]:
            # In a large group one that has room will do.
            break
    return best, looked_at
