"""Fan-out of events, published by clients and by the broker, to their subscribers.

The rules are from docs/protocol.md, "Topics".
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from brokerd.core.cluster.remote_outbox import RemoteOutbox
from brokerd.core.delivery import Delivery, deadline_of, frame_head
from brokerd.core.groups import choose_host, choose_member
from brokerd.core.large_frame import joined
from brokerd.core.mailboxes.commits import Outcome
from brokerd.core.mailboxes.storing import extension_error
from brokerd.core.outbox import Queued
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
from brokerd_client.wire.layout import ACK_FLAG, RECEIPT_FLAG

if TYPE_CHECKING:
    from brokerd.core.cluster.stored_events import Home, StoredEvents
    from brokerd.core.deferred import Deferred
    from brokerd.core.exchange import Client
    from brokerd.core.mailboxes.mailboxes import Mailboxes
    from brokerd.core.replies import Replies
    from brokerd.core.status import Status
    from brokerd.core.turn import Turn
    from brokerd.core.write_buffer import WriteBuffer

__all__ = [
    "Announcement",
    "Events",
    "Spread",
    "recipients",
]

#: Nodes of the subscription tree searched per frame charged to the turn budget.
_NODES: Final = 64
#: Subscribers handled per frame charged to the turn budget, for a client's event.
_MATCHES: Final = 32
#: Subscribers handled per step, for an event of the broker's own.
_STEP: Final = 16


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
        is_stored: Whether a mailbox stores it, whose answer is the outcome.
        hosts: The sessions of other hosts that get a copy, with the groups that it is for.
        homes: By such a session: the mailboxes there that store it.
        outcome: The outcome that these homes' answers are a part of; None without them.
    """

    __slots__ = (
        "deadline",
        "frame",
        "homes",
        "hosts",
        "is_stored",
        "matches",
        "outcome",
        "remaining",
        "served",
        "waiting",
    )

    def __init__(
        self,
        matches: Matches,
        remaining: Iterator[Session | None],
        served: dict[Session, None],
        deadline: float | None,
        hosts: dict[Session, list[str]] | None,
    ) -> None:
        self.hosts = hosts
        self.matches = matches
        self.remaining = remaining
        self.served = served
        self.deadline = deadline
        self.waiting: Session | None = None
        self.frame: bytes | memoryview | None = None
        self.is_stored = False
        self.homes: dict[Session, Home] = {}
        self.outcome: Outcome | None = None


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
        mailboxes: Mailboxes,
        delivery: Delivery,
        deferred: Deferred,
    ) -> None:
        self._topics = topics
        self._status = status
        self._turn = turn
        self._replies = replies
        self._mailboxes = mailboxes
        self._delivery = delivery
        self._deferred = deferred
        #: The mailboxes of other hosts that store events; None without a cluster.
        self.elsewhere: StoredEvents | None = None

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
            return self._replies.refuse_frame(
                source, envelope, ErrorCode.DENIED, message, field="publish"
            )
        if (self._status.draining or source.parting) and not source.mute:
            return self._replies.refuse_frame(
                source, envelope, ErrorCode.SHUTTING_DOWN, "the broker is shutting down"
            )
        stored_in = self._mailboxes.subscribed(envelope.topic)
        if stored_in and envelope.extension is not None:
            refusal = extension_error(envelope.extension)
            if refusal:
                return self._replies.refuse_frame(source, envelope, ErrorCode.UNSUPPORTED, refusal)
        matches = self._find(source, envelope.topic)
        if matches is None:
            return RoutingResult.YIELD
        size = 4 + HEADER.size + len(source.sender_header) + len(frame) - HEADER.size
        served = source.reached_by_event if source.reached_by_event is not None else {}
        owners = () if self.elsewhere is None else self.elsewhere.clients_of(envelope.topic)
        homes: dict[Session, Home] = {}
        outcome: Outcome | None = None
        if self.elsewhere is not None and owners and not source.host:
            outcome = Outcome(
                source,
                envelope.id,
                is_event=True,
                receipt=bool(envelope.flags & RECEIPT_FLAG),
                # The last answer is the end of the fan-out.
                missing=1 + len(stored_in),
            )
            room = self._find_homes(source, self.elsewhere.homes(owners), homes, size, now, outcome)
            if room is not Room.OK:
                return room.result
        if stored_in:
            result = self._mailboxes.store(source, stored_in, envelope, frame, now, outcome)
            if result is not RoutingResult.CONSUMED:
                return result
        if outcome is not None:
            source.uncommitted += 1
        # A client with a stored copy gets no other.
        for mailbox in stored_in:
            served.update(dict.fromkeys(mailbox.sessions))
        for client in owners:
            served.update(dict.fromkeys(client.sessions.values()))
        # An event passes from one host to another once.
        hosts: dict[Session, list[str]] | None = None
        if not source.host:
            hosts = {session: [] for session in homes}
        only = source.connection.groups if source.host else None
        source.spread = Spread(
            matches,
            choose(matches, size, None, served, hosts, only),
            served,
            deadline_of(source, envelope),
            hosts,
        )
        source.spread.is_stored = bool(stored_in) or outcome is not None
        source.spread.homes, source.spread.outcome = homes, outcome
        return self.go_on_publishing(source, envelope, frame, now)

    def _find_homes(
        self,
        source: Session,
        found: Iterable[Home],
        homes: dict[Session, Home],
        size: int,
        now: float,
        outcome: Outcome,
    ) -> Room:
        """Add the homes that can get an event to ``homes``, and all others to its outcome.

        Return another value than OK if the event has to be tried again.
        """
        for home in found:
            message = ""
            assert self.elsewhere is not None
            session = home.session
            if session is None:
                code = ErrorCode.OFFLINE
                message = f"host {home.host}, which keeps mailboxes that store the event, is away"
            elif size + len(source.identity) > self.elsewhere.largest:
                code = ErrorCode.TOO_LARGE
                message = (
                    f"an event to another host has at most {self.elsewhere.largest} bytes with its"
                    " header (NATS' max_payload)"
                )
            else:
                code = ErrorCode.FULL
                room = self._delivery.find_room(source, session, size, now)
                if room is Room.NONE:
                    message = f"too many events wait for host {home.host}"
                elif room is not Room.OK:
                    return room
            if message or session is None:
                outcome.fail(code, message, home.names)
            else:
                homes[session] = home
                outcome.missing += 1
        return Room.OK

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
            is_small = spread.matches.size <= _MATCHES
            spread.frame = joined(head, body) if is_small else b"".join((head, body))
        for count, target in enumerate(itertools.chain((spread.waiting,), spread.remaining), 1):
            if target is not None and target.open and not target.retired:
                home = spread.homes.pop(target, None)
                if home is not None:
                    self._send_home(source, target, home, envelope, spread)
                    room = Room.OK
                else:
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
        if spread.outcome is not None:
            for home in spread.homes.values():
                # The host was lost during the fan-out.
                spread.outcome.fail(ErrorCode.OFFLINE, f"host {home.host} is away", home.names)
                self._mailboxes.commits.answer(spread.outcome)
            self._mailboxes.commits.answer(spread.outcome)
        elif envelope.flags & RECEIPT_FLAG and not spread.is_stored:
            self._replies.confirm(source, envelope.id, ACK_FLAG if source.host else 0)
        return RoutingResult.CONSUMED

    def _send_home(
        self, source: Session, target: Session, home: Home, envelope: Envelope, spread: Spread
    ) -> None:
        """Put an event into the outbox of a host with mailboxes that store it.

        The host answers each. Their ttl counts from storing.
        """
        assert spread.frame is not None
        assert spread.outcome is not None
        assert self.elsewhere is not None
        rest = memoryview(spread.frame)[4 + HEADER.size + len(source.sender_header) :]
        size = 4 + HEADER.size + len(source.identity) + len(rest)
        answered = replace(envelope, flags=envelope.flags | RECEIPT_FLAG)
        target.outbox.put(Queued(b"".join((frame_head(source, answered, size, target), rest))))
        groups = spread.hosts.get(target) if spread.hosts else None
        if groups and isinstance(target.outbox, RemoteOutbox):
            target.outbox.address_last(size, f">{','.join(groups)}")
        self.elsewhere.expect(home, spread.outcome)
        self._replies.touch(target)

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
        outbox.put(Queued(frame, deadline=spread.deadline))
        groups = spread.hosts.get(target) if spread.hosts else None
        if groups and isinstance(outbox, RemoteOutbox):
            outbox.address_last(len(frame), f">{','.join(groups)}")
        self._replies.touch(target)
        return Room.OK

    def _find(self, source: Session, topic: str) -> Matches | None:
        """Return the subscribers to ``topic``; None if the turn ends before that."""
        if self._turn.budget < 0:
            return self._topics.find(topic)
        matches, visited = self._topics.search(topic, source, (self._turn.budget + 1) * _NODES)
        self._turn.charge(visited // _NODES)
        return matches

    def fanout(self, source: Session, topic: bytes) -> tuple[WriteBuffer, ...] | None:
        """Return the outboxes of a topic's subscribers, for the routing loop to write into.

        None: the slow path must handle the event, because it is to be refused or some
        recipient depends on the event. The compiled loop handles further events of the
        latter kind, once ``matches.fanout`` is there.
        """
        if source.needs_slow_path:
            return None
        if self._mailboxes.subscribes and self._mailboxes.subscribed(
            topic.decode(errors="replace")
        ):
            return None
        if self.elsewhere is not None and self.elsewhere.clients_of(topic.decode(errors="replace")):
            return None
        matches = self._topics.cache.topics.get(topic)
        if matches is None or not matches.permits(source.client.publish_rules):
            matches = self._admit(source, topic)
        if matches is None:
            return None
        if matches.fanout is None:
            # All publishers share one tuple. A thousand publishers on a thousand topics
            # would have a million otherwise.
            matches.fanout = tuple(target.outbox for target in matches.everyone)
            matches.is_plain = not matches.groups and all(
                outbox.is_stream for outbox in matches.fanout
            )
        if not matches.is_plain:
            return None
        if len(matches.fanout) > source.widest:
            # This turn of the sender ends; its later turns are shorter.
            source.widest = len(matches.fanout)
            self._turn.end()
            return None
        matches.used = True
        return matches.fanout

    def _admit(self, source: Session, topic: bytes) -> Matches | None:
        """Return the subscribers to a topic if the sender may publish on it now."""
        if self._status.draining or not self._turn.budget:
            return None
        self._turn.charge(1)
        try:
            name = check_topic(topic.decode())
        except (UnicodeDecodeError, InvalidName):
            return None
        if source.client.policy.publishing(name) is None:
            return None
        matches = self._find(source, name)
        if matches is not None:
            self._topics.cache.permit(matches, source.client.publish_rules)
        return matches

    def announce(self, topic: str, payload: str) -> None:
        """Publish an event of the broker's own, in turns if it has many subscribers."""
        self._deferred.add(Announcement(self, topic, payload))

    def announce_presence(self, change: str, client: Client, now_wall: float) -> None:
        """Publish a client's presence to the subscribers that may send to it.

        change: ``online`` or ``offline``.
        """
        if not (self._deferred.jobs or self._topics):
            # Without subscriptions and earlier events, there is nothing to deliver.
            self._show_presence(client, client.online, now_wall)
            return
        payload = f'{{"name": "{client.name}", "since": {now_wall}}}'
        event = Announcement(self, f"$broker.{change}.{client.name}", payload, client.name)
        event.client, event.online, event.since = client, client.online, now_wall
        self._deferred.add(event)

    def _show_presence(self, client: Client, online: bool, since: float) -> None:
        """Make a client's presence visible, because its event is published now."""
        client.shown_online, client.shown_since = online, since
        if self._status.changes is not None:
            self._status.changes.note_client(client)

    def publish_in_steps(self, event: Announcement) -> Iterator[None]:
        """Send an event to its subscribers, to some of them in each step."""
        if event.client is not None:
            self._show_presence(event.client, event.online, event.since)
        if not self._topics:
            return
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
    matches: Matches,
    size: int,
    about: str | None,
    served: dict[Session, None],
    hosts: dict[Session, list[str]] | None = None,
    only: Collection[str] | None = None,
) -> Iterator[Session | None]:
    """Yield the sessions that get an event of ``size`` bytes.

    These are all subscribers without a group, and one member of each group. The member
    is one that gets the event anyway, else one with room for it, else the least loaded.
    A group without a member here that has room is left to one other host. Each host gets
    one copy, last. None stands for work that found no session.

    Args:
        about, served: As for ``recipients``.
        hosts: The sessions of the hosts that get a copy are added, with their groups;
            None for an event that does not leave this host.
        only: The groups that the event is for; None for all.
    """
    for target in matches.everyone:
        if target.host:
            if hosts is not None:
                hosts[target] = []
            yield None
        elif target not in served and (
            about is None or target.client.policy.sending(about) is not None
        ):
            served[target] = None
            yield target
        else:
            yield None
    if not matches.groups:
        yield from hosts or ()
        return
    # The turn advances per event, not per group. With an even number of groups, the
    # same members would always come first otherwise.
    matches.turn += 1
    turn = matches.turn
    for group, members in matches.groups.items():
        if (only is not None and group not in only) or not served.keys().isdisjoint(members):
            yield None
            continue
        chosen, examined = choose_member(matches, group, turn, size, about)
        for _ in range(examined // _STEP):
            yield None
        if hosts is not None and matches.has_remote and not _has_room(chosen, size):
            host = choose_host(matches, group, turn)
            if host is not None:
                hosts.setdefault(host, []).append(group)
                chosen = None
        if chosen is not None:
            served[chosen] = None
        yield chosen
    yield from hosts or ()


def _has_room(member: Session | None, size: int) -> bool:
    """Return whether a member of a group can take an event."""
    if member is None:
        return False
    outbox = member.outbox
    return not outbox.blocked or outbox.waiting + size <= outbox.limit
