"""Fan-out of events, published by clients and by the broker, to their subscribers.

The rules are from docs/protocol.md, "Topics".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, cast

from brokerd.core.delivery import Delivery, deadline_of, frame_head
from brokerd.core.large_frame import joined
from brokerd.core.outbox import FrameOutbox, Queued, StreamOutbox
from brokerd.core.room import Room
from brokerd.core.routing_result import RoutingResult
from brokerd.core.session import Session
from brokerd.core.topics import Matches, Topics
from brokerd_client.errors import InvalidName
from brokerd_client.wire.envelope import (
    BROKER,
    HEADER,
    CodecId,
    Envelope,
    ErrorCode,
    Kind,
    check_topic,
    encode,
)
from brokerd_client.wire.framing import frame as make_frame
from brokerd_client.wire.layout import RECEIPT_FLAG

if TYPE_CHECKING:
    from brokerd.core.deferred import Deferred
    from brokerd.core.exchange import Client
    from brokerd.core.replies import Replies
    from brokerd.core.status import Status
    from brokerd.core.turn import Turn

__all__ = [
    "Announcement",
    "Events",
    "Spread",
    "recipients",
]

#: Most outboxes in the fan-out cache of one publisher, summed over its topics.
_REMEMBERED_OUTBOXES: Final = 16_384
#: Outboxes that a topic counts for in that sum at least, however few it has.
_SMALL_FANOUT: Final = 16
#: Nodes of the subscription tree searched per frame charged to the turn budget.
_NODES: Final = 64
#: Subscribers handled per frame charged to the turn budget, for a client's event.
_MATCHES: Final = 32
#: Subscribers handled per step, for an event of the broker's own.
_STEP: Final = 16
#: Group members examined per event before the best of them is taken, if it has room.
_LOOKED_AT: Final = 256


class Spread:
    """An event on its way to its subscribers.

    Attributes:
        matches: All subscribers.
        remaining: The subscribers still to be served; None for a step that serves none
            of them.
        served: The subscribers that have been chosen.
        waiting: The subscriber to try again.
        deadline: When its ttl is over, or None.
        frame: The whole frame, once it is built.
    """

    __slots__ = ("deadline", "frame", "matches", "remaining", "served", "waiting")

    def __init__(
        self,
        matches: Matches[Session],
        remaining: Iterator[Session | None],
        served: dict[Session, None],
        deadline: float | None,
    ) -> None:
        self.matches = matches
        self.remaining = remaining
        self.served = served
        self.deadline = deadline
        self.waiting: Session | None = None
        self.frame: bytes | memoryview | None = None


class Announcement:
    """An event of the broker's own that is to be published.

    Attributes:
        about: A client name, or None; subscribers that may not send to that client are
            skipped.
        client, online, since: The presence that is visible once the event is published.
        served: The subscribers that have received it.
    """

    __slots__ = ("_events", "about", "client", "online", "payload", "served", "since", "topic")

    def __init__(self, events: Events, topic: str, payload: str, about: str | None = None) -> None:
        self._events = events
        self.topic = topic
        self.payload = payload
        self.about = about
        self.client: Client | None = None
        self.online = False
        self.since = 0.0
        self.served: dict[Session, None] = {}

    def begin(self) -> Iterator[None]:
        """Send the event to its subscribers, to some of them in each step."""
        return self._events.publish_in_steps(self)


class Events:
    """Publishes the events of clients, and the broker's own."""

    def __init__(
        self,
        topics: Topics[Session],
        status: Status,
        turn: Turn,
        replies: Replies,
        delivery: Delivery,
        deferred: Deferred,
    ) -> None:
        self._topics = topics
        self._status = status
        self._turn = turn
        self._replies = replies
        self._delivery = delivery
        self._deferred = deferred

    def publish(
        self, source: Session, envelope: Envelope, frame: memoryview, now: float
    ) -> RoutingResult:
        """Check an event, find its subscribers, and deliver it to the first of them."""
        if envelope.name:
            return self._replies.malformed(
                source, envelope.id, "an EVENT must not name a recipient"
            )
        try:
            check_topic(envelope.topic)
        except InvalidName as error:
            return self._replies.malformed(source, envelope.id, str(error))
        if source.client.policy.publishing(envelope.topic) is None:
            message = f"{source.client.name} may not publish on {envelope.topic}"
            return self._replies.refuse_frame(source, envelope, ErrorCode.DENIED, message)
        if (self._status.draining or source.parting) and not source.mute:
            return self._replies.refuse_frame(
                source, envelope, ErrorCode.SHUTTING_DOWN, "the broker is shutting down"
            )
        matches = self._find(source, envelope.topic)
        if matches is None:
            return RoutingResult.YIELD
        size = 4 + HEADER.size + len(source.sender_header) + len(frame) - HEADER.size
        served = source.reached_by_event if source.reached_by_event is not None else {}
        source.spread = Spread(
            matches, choose(matches, size, None, served), served, deadline_of(source, envelope)
        )
        return self.go_on_publishing(source, envelope, frame, now)

    def go_on_publishing(
        self, source: Session, envelope: Envelope, frame: memoryview, now: float
    ) -> RoutingResult:
        """Deliver an event to its next subscribers. YIELD, FLUSH: some remain."""
        spread = source.spread
        assert spread is not None
        if spread.frame is None:
            body = frame[HEADER.size :]
            head = frame_head(
                source, envelope, 4 + HEADER.size + len(source.sender_header) + len(body)
            )
            # ``joined`` may write into the received frame. A frame that may be handed over
            # again must not change.
            is_small = len(spread.matches) <= _MATCHES
            spread.frame = joined(head, body) if is_small else b"".join((head, body))
        for count, target in enumerate(itertools.chain((spread.waiting,), spread.remaining), 1):
            if target is not None and target.open and not target.retired:
                room = self._give(source, target, spread, now)
                if room is not Room.OK and room is not Room.NONE:
                    spread.waiting = target
                    source.reached_by_event = spread.served
                    return room.result
            spread.waiting = None
            if count % _MATCHES == 0 and self._turn.budget >= 0:
                if self._turn.budget == 0:
                    source.reached_by_event = spread.served
                    return RoutingResult.YIELD
                self._turn.charge(1)
        source.spread = source.reached_by_event = None
        if envelope.flags & RECEIPT_FLAG:
            self._replies.confirm(source, envelope.id)
        elif source.client.meter is None and not source.mute:
            self._remember_fanout(source, envelope.topic, spread.matches)
        return RoutingResult.CONSUMED

    def _give(self, source: Session, target: Session, spread: Spread, now: float) -> Room:
        """Put an event into a subscriber's outbox if there is room; drop it if there is
        none.
        """
        frame, outbox = spread.frame, target.outbox
        assert frame is not None
        room = self._delivery.find_room(source, target, len(frame), now, may_hold=False)
        if room is Room.NONE:
            reason = "the queue of the subscriber is full"
            self._replies.drop(target, source.address, "full", reason)
        if room is not Room.OK:
            return room
        if isinstance(outbox, FrameOutbox):
            outbox.put(Queued(frame, deadline=spread.deadline))
        elif spread.deadline is not None:
            outbox.append_timed(Queued(frame, deadline=spread.deadline))
        else:
            outbox.append(frame)
        self._replies.touch(target)
        return Room.OK

    def _find(self, source: Session, topic: str) -> Matches[Session] | None:
        """Return the subscribers to ``topic``; None if the turn ends before that."""
        if self._turn.budget < 0:
            return self._topics.find(topic)
        matches, visited = self._topics.search(topic, source, (self._turn.budget + 1) * _NODES)
        self._turn.charge(visited // _NODES)
        return matches

    def _remember_fanout(self, source: Session, topic: str, matches: Matches[Session]) -> None:
        """Cache a topic's fan-out for the routing loop, unless it has groups."""
        if not matches.everyone or matches.groups or self._topics.known(topic) is not matches:
            return
        if matches.fanout is None:
            # All publishers share one tuple. A thousand publishers on a thousand topics
            # would have a million otherwise.
            outboxes = tuple(target.outbox for target in matches.everyone)
            matches.fanout = (
                outboxes if all(isinstance(outbox, StreamOutbox) for outbox in outboxes) else ()
            )
        fanout = cast("tuple[StreamOutbox, ...]", matches.fanout)
        if fanout:
            if (len(source.fanouts) + 1) * max(len(fanout), _SMALL_FANOUT) > _REMEMBERED_OUTBOXES:
                source.fanouts.clear()
                source.widest = 0
            source.fanouts[topic.encode()] = fanout
            source.widest = max(source.widest, len(fanout))

    def announce(self, topic: str, payload: str) -> None:
        """Publish an event of the broker's own, in turns if it has many subscribers."""
        self._deferred.add(Announcement(self, topic, payload))

    def announce_presence(self, change: str, client: Client, now_wall: float) -> None:
        """Publish a client's presence to the subscribers that may send to it.

        change: ``online`` or ``offline``.
        """
        payload = f'{{"name": "{client.name}", "since": {now_wall}}}'
        event = Announcement(self, f"$broker.{change}.{client.name}", payload, client.name)
        event.client, event.online, event.since = client, client.online, now_wall
        self._deferred.add(event)

    def publish_in_steps(self, event: Announcement) -> Iterator[None]:
        """Send an event to its subscribers, to some of them in each step."""
        if event.client is not None:
            event.client.shown_online, event.client.shown_since = event.online, event.since
            if self._status.changes is not None:
                self._status.changes.note_client(event.client)
        envelope = Envelope(
            Kind.EVENT, 0, BROKER, event.payload.encode(), codec=CodecId.JSON, topic=event.topic
        )
        frame = make_frame(encode(envelope))
        for target in recipients(self._topics, event.topic, len(frame), event.about, event.served):
            if target is None:
                yield
            elif target.open and not target.retired:
                self._send_own(target, frame)

    def _send_own(self, target: Session, frame: bytes) -> None:
        if target.outbox.blocked and not target.outbox.reserve(len(frame), self._replies.reserve):
            # The subscriber must not miss an event, and does not read. A closed connection,
            # which it notices, is better than a gap, which it does not.
            self._replies.close(
                target, "it subscribed to events of the broker and does not read them", cut=True
            )
        else:
            self._replies.pass_on(target, frame)


def recipients(
    topics: Topics[Session],
    topic: str,
    size: int,
    about: str | None = None,
    served: dict[Session, None] | None = None,
) -> Iterator[Session | None]:
    """Yield the sessions that get an event of the broker's own on ``topic``.

    It yields None after each portion of work.

    Args:
        about: A client name, or None; sessions that may not send to that client are
            skipped.
        served: The sessions that have the event; the sessions yielded are added.
    """
    # The search needs an owner; an event of the broker has no connection to own it.
    owner = object()
    while True:
        matches, _ = topics.search(topic, owner, _NODES)
        if matches is not None:
            break
        yield None
    for count, target in enumerate(
        choose(matches, size, about, {} if served is None else served), 1
    ):
        if target is not None:
            yield target
        if count % _STEP == 0:
            yield None


def choose(
    matches: Matches[Session], size: int, about: str | None, served: dict[Session, None]
) -> Iterator[Session | None]:
    """Yield the sessions that get an event of ``size`` bytes.

    These are all subscribers without a group, and one member of each group. The member
    is one that gets the event anyway, else one with room for it, else the least loaded.
    None stands for work that found no session.

    Args:
        about, served: As for ``recipients``.
    """
    for target in matches.everyone:
        if target not in served and (
            about is None or target.client.policy.sending(about) is not None
        ):
            served[target] = None
            yield target
        else:
            yield None
    if not matches.groups:
        return
    # The turn advances per event, not per group. With an even number of groups, the
    # same members would always come first otherwise.
    matches.turn += 1
    turn = matches.turn
    for group, members in matches.groups.items():
        if not served.keys().isdisjoint(members):
            yield None
            continue
        chosen, examined = _member(matches, group, turn, size, about)
        for _ in range(examined // _STEP):
            yield None
        if chosen is not None:
            served[chosen] = None
        yield chosen


def _member(
    matches: Matches[Session], group: str, turn: int, size: int, about: str | None
) -> tuple[Session | None, int]:
    """Return (the member of a group that gets the event, or None; members examined)."""
    ordered = matches.members_of(group)
    start = turn % len(ordered)
    lightest, least_load = None, (True, True, 0)
    examined = 0
    for member in itertools.chain(
        itertools.islice(ordered, start, None), itertools.islice(ordered, start)
    ):
        examined += 1
        if member in matches.left or not member.open:
            continue
        if about is not None and member.client.policy.sending(about) is None:
            continue
        outbox = member.outbox
        waiting = outbox.waiting
        load = (outbox.blocked and waiting + size > outbox.limit, outbox.blocked, waiting)
        if lightest is None or load < least_load:
            lightest, least_load = member, load
            if not waiting:
                break
        if examined >= _LOOKED_AT and not least_load[0]:
            # In a large group, a member that has room is good enough.
            break
    return lightest, examined
