"""The broker: which sessions join, what becomes of each frame, and work that is deferred.

The routing loop (:mod:`brokerd.core.routing`) passes ordinary messages on by itself.
It hands every other frame to :meth:`Broker.handle`, one at a time. No message is
dropped silently: one that cannot be delivered comes back to its sender as an ERROR
(docs/protocol.md, "Outcomes").

The broker is composed of parts, each of which uses only the parts before it: exchange,
topics, requests, replies, held senders, requests in flight, reports, mailboxes, delivery,
events, goaway, channels, operations.
No part calls the broker, so a frame enters it once.

The network layer finds its work in seven places:

- ``touched``: sessions with bytes to write, or to be closed;
- ``held.released``: sessions that may be read from again;
- ``channels.refusals`` and ``channels.closing``: channels that end;
- ``operations.admin_commands``: commands of an administrator for the daemon;
- ``replies.log_events``: events to write to the log;
- ``next_deadline``: when :meth:`Broker.tick` is due;
- ``has_deferred_work``: whether :meth:`Broker.run_deferred` has something to do.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from brokerd.config.values import ClientConfig, Rule, WhenConnected
from brokerd.core.channels import Channels
from brokerd.core.deferred import Deferred
from brokerd.core.delivery import Delivery
from brokerd.core.error_codes import is_cancel
from brokerd.core.events import Events
from brokerd.core.exchange import Client, Exchange
from brokerd.core.flight import WaitingRequest
from brokerd.core.goaway import Goaway
from brokerd.core.held_senders import HeldSenders
from brokerd.core.in_flight import InFlight
from brokerd.core.incidents import Incidents
from brokerd.core.mailboxes.mailboxes import Mailboxes
from brokerd.core.operations import AdminCommand, Operations
from brokerd.core.replies import Replies
from brokerd.core.reports import Reports, mark_orphaned
from brokerd.core.requests import Requests, Timed
from brokerd.core.returning import Returning
from brokerd.core.revocation import Revocation
from brokerd.core.routing_result import RoutingResult
from brokerd.core.session import Session
from brokerd.core.status import CoreLimits, Status
from brokerd.core.taps import ROOM, TOPIC, Taps
from brokerd.core.topics import Topics
from brokerd.core.turn import Turn
from brokerd_client.errors import ExtensionTooDeep, MalformedEnvelope
from brokerd_client.wire.envelope import (
    BROKER,
    MAX_TTL,
    CodecId,
    Envelope,
    ErrorCode,
    Kind,
    head,
    is_address,
    is_ttl,
    split,
)
from brokerd_client.wire.layout import ACK_FLAG, HEADER, RECEIPT_FLAG, REQUEST_KIND

if TYPE_CHECKING:
    from brokerd.core.cluster.remote_traffic import RemoteTraffic

__all__ = ["AdminCommand", "Broker", "CoreLimits", "RoutingResult"]

#: Most steps of deferred jobs per call of run_deferred: a few milliseconds' work.
_STEPS: Final = 64
#: Most messages past their ttl that are reported per call.
_EXPIRED: Final = 256
#: Most clients reconfigured per turn of a reload: some milliseconds' work.
_RECONFIGURED: Final = 256


#: The kinds of the frames that make a connection a channel.
_CHANNEL_KINDS: Final = (Kind.OPEN, Kind.JOIN)
#: The recipient of an operation, and where its payload begins.
_BROKER: Final = BROKER.encode()
_OPERATION: Final = HEADER.size + len(_BROKER)
# Until Python 3.12, reading a member of an enumeration takes as long as ten attributes.
_CONSUMED: Final = RoutingResult.CONSUMED
_CLOSE: Final = RoutingResult.CLOSE
_REQUEST: Final = Kind.REQUEST


class Broker:
    """All routing decisions and session state, without sockets or clocks."""

    def __init__(
        self,
        clients: Iterable[ClientConfig] = (),
        *,
        limits: CoreLimits | None = None,
        version: str = "",
        routing: str = "python",
        now_wall: float = 0.0,
    ) -> None:
        self.status = Status(limits or CoreLimits(), version, routing, started_at=now_wall)
        self.turn = Turn()
        self.exchange = Exchange(clients, now_wall)
        self.topics: Topics[Session] = Topics()
        self.revocation = Revocation(self.topics, self._on_forbidden)
        #: The broker's own events, and questions with long answers, in order.
        self.deferred = Deferred()
        self.requests = Requests()
        self.taps = Taps(self.exchange)
        self.replies = Replies(self.requests, self.taps)
        self.incidents = Incidents(self.exchange)
        self.held = HeldSenders(self.status, self.replies, self.requests)
        self.in_flight = InFlight(self.requests, self.replies, self.held)
        self.reports = Reports(self.exchange, self.replies, self.requests, self.in_flight)
        self.returning = Returning()
        self.mailboxes = Mailboxes(self.exchange, self.status, self.replies, self.held, now_wall)
        self.delivery = Delivery(
            self.exchange,
            self.status,
            self.turn,
            self.requests,
            self.replies,
            self.held,
            self.in_flight,
            self.reports,
            self.returning,
            self.mailboxes,
        )
        self.events = Events(
            self.topics,
            self.status,
            self.turn,
            self.replies,
            self.mailboxes,
            self.delivery,
            self.deferred,
        )
        self.goaway = Goaway(
            self.exchange,
            self.topics,
            self.status,
            self.requests,
            self.replies,
            self.held,
            self.in_flight,
            self.reports,
        )
        self.channels = Channels(self.exchange, self.status, self.replies)
        self.operations = Operations(
            self.exchange,
            self.topics,
            self.status,
            self.turn,
            self.replies,
            self.held,
            self.in_flight,
            self.deferred,
            self.goaway,
            self.incidents,
            self.taps,
            self.channels,
            self.mailboxes,
        )
        #: The traffic with other hosts; None without a cluster. It joins by itself.
        self.traffic: RemoteTraffic | None = None
        #: How the instance of each new connection ends; it names this host, in a cluster.
        self.instance_suffix = ""
        #: The same list as ``replies.touched``, for the routing loop.
        self.touched = self.replies.touched
        #: Open sessions whose names were released before their output was written.
        self._released: set[Session] = set()
        #: Numbers every attach and detach, in order.
        self._order = itertools.count(1)

    # Joining and leaving

    def place_for(self, name: str) -> tuple[bool, Session | None]:
        """Return (whether a connection may join as ``name``, the session replaced)."""
        client = self.exchange.clients.get(name)
        if client is None or self.status.draining:
            return False, None
        if len(client.sessions) < client.config.connections:
            return True, None
        if client.config.when_connected is WhenConnected.REFUSE:
            return False, None
        return True, next(iter(client.sessions.values()))

    def attach(
        self, name: str, instance: str, *, peer: str, now_wall: float, connection: object = None
    ) -> Session:
        """Return the session of a connection that has just authenticated as ``name``.

        instance: the new, unique part of its address within a pool, ``[0-9a-z]{1,16}``.
        """
        client = self.exchange.clients.get(name)
        assert client is not None, "place_for said there is room"
        session = Session(client, instance, peer=peer, since=now_wall, connection=connection)
        session.number = next(self._order)
        if self.status.changes is not None:
            self.status.changes.note(session)
        if self.traffic is not None:
            self.traffic.displace(session.address)
        first = not client.online
        client.add(session)
        self.requests.note_room(client)
        if self.returning:
            self.held.pass_to(session, self.returning.come_back(name))
        for member in client.sessions.values():
            self.held.release_waiters(member)
        if first:
            self.status.presence_changes += 1
            client.changed_at = now_wall
            self.events.announce_presence("online", client, now_wall)
        if self.traffic is not None:
            self.traffic.announce_name(client)
        return session

    def note_presence(
        self, client: Client, host: str, since: float | None, now_wall: float
    ) -> None:
        """Note since when a client is online at another host; None for offline."""
        was_online = client.online
        client.note_host(host, since)
        if client.online != was_online:
            self.status.presence_changes += 1
            client.changed_at = now_wall if since is None else since
            change = "online" if client.online else "offline"
            self.events.announce_presence(change, client, client.changed_at)

    def take_number(self) -> int:
        """Return the next number in the order of all attaches and detaches."""
        return next(self._order)

    def continue_order(self, number: int) -> None:
        """Continue that order with ``number``, as another process has left it."""
        self._order = itertools.count(number)

    def detach(self, session: Session, now_wall: float) -> None:
        """Remove a closed connection's session; run_deferred reports its messages."""
        if not session.open:
            return
        # First: the parts ask a session whether it is open, and the reports ask when it
        # closed. The steps between the first and the last may come in any order.
        session.open = False
        session.closed_number = next(self._order)
        if self.status.changes is not None:
            self.status.changes.note_left(session)
        # Most sessions leave nothing behind, and need few of these calls.
        if session.consumer is not None or session.held_by is not None:
            self.mailboxes.leave(session)
        self._remove_from_lists(session)
        if session.held_by is not None:
            self.held.release(session)
        self.held.release_waiters(session)
        if session.outgoing_requests:
            self.in_flight.cancel_all(session)
        if session.incoming_requests:
            self.requests.forget_kept(session)
        if session.incoming_requests or session.waiting_requests or session.outbox.waiting:
            self.reports.add(session, session.outbox.take_unsent())
        if session.recipients:
            mark_orphaned(session)
        self._drop_references(session)
        if session.host:
            return
        self._add_to_totals(session)
        if session in self._released:
            self._released.discard(session)
            return
        # Last: only now it is known whether its client is offline, and the event goes to
        # its first subscribers at once.
        self._note_left(session.client, now_wall)

    def release_name(self, session: Session, now_wall: float) -> None:
        """Send nothing more to a session that closes and still has output to write.

        Its name is free at once: its client may connect again meanwhile. Without this, a
        client whose key was removed would receive messages behind the closing ERROR.
        """
        if session.retired or not session.open:
            return
        self.mailboxes.leave(session)
        if self.traffic is not None:
            for pattern, group in session.subscriptions:
                self.traffic.unsubscribed(pattern, group)
        self.goaway.mute(session)
        mark_orphaned(session)
        self._released.add(session)
        self._note_left(session.client, now_wall)

    def _note_left(self, client: Client, now_wall: float) -> None:
        """Announce that a client is offline, if a session that left was its last one."""
        if self.exchange.clients.get(client.name, client) is not client:
            # An older entry with the name of a client that has connections of its own.
            return
        if not client.online:
            self.status.presence_changes += 1
            client.changed_at = now_wall
            self.events.announce_presence("offline", client, now_wall)
        if self.traffic is not None:
            self.traffic.announce_name(client)

    def _remove_from_lists(self, session: Session) -> None:
        """Remove a session from its client, its topics, and the lists of waiting sessions."""
        self.goaway.finishing.pop(session, None)
        self.operations.asking.discard(session)
        if self.taps.all:
            self.taps.stop(session)
        self.channels.leave(session)
        # A retired session has been removed from its client before.
        if session.host:
            if session.route is not None:
                session.route.direct = None
            self.in_flight.leave(session)
        elif not session.retired:
            session.client.remove(session)
            self.in_flight.leave(session)
        if self.traffic is not None and not session.host:
            for pattern, group in session.subscriptions:
                self.traffic.unsubscribed(pattern, group)
        self.topics.leave(session, session.subscriptions)
        session.subscriptions.clear()
        self.topics.abandon(session)

    def _drop_references(self, session: Session) -> None:
        """Break the reference cycles of a closed session."""
        # Without these cycles, a session is freed as soon as its messages are reported.
        # Otherwise thousands of them would wait for the garbage collector.
        session.marks = None
        session.routes.clear()
        session.spread = session.reached_by_event = None
        session.connection = session.outbox.owner = None

    def _add_to_totals(self, session: Session) -> None:
        totals = self.status.totals
        totals["messages_in"] += session.messages_in
        totals["bytes_in"] += session.bytes_in
        totals["messages_out"] += session.messages_out
        totals["bytes_out"] += session.bytes_out

    # Work of later turns

    @property
    def has_deferred_work(self) -> bool:
        """Whether closed sessions or new rules left work for :meth:`run_deferred`."""
        return (
            bool(self.reports)
            or bool(self.in_flight)
            or bool(self.deferred.jobs)
            or (bool(self.mailboxes.boxes) and self.mailboxes.has_work)
            or self.held.has_deferred_work
            or bool(self.revocation)
            or not self.topics.is_tidy
            or (self.traffic is not None and self.traffic.has_work)
        )

    def run_deferred(self, count: int) -> None:
        """Report up to ``count`` messages of closed sessions; remove subscriptions.

        Subscriptions that new rules forbid are removed too.

        There can be hundreds of thousands. Handling all of them at once would delay
        every other client.
        """
        count = self.reports.run_deferred(count)
        self.in_flight.run_deferred(_STEPS)
        self.topics.tidy(count)
        self.revocation.run_deferred(count)
        self.deferred.run_deferred(_STEPS)
        self.held.run_deferred()
        self.mailboxes.run()
        if self.traffic is not None:
            self.traffic.run()

    @property
    def next_deadline(self) -> float | None:
        """When :meth:`tick` is due, on the clock of ``now``; None without deadlines."""
        # Asked for each connection: parts that have none are not called.
        deadlines = [self.requests.deadlines.next, self.channels.next_deadline]
        if self.held.deadlines:
            deadlines.append(self.held.next_deadline)
        if self.mailboxes.boxes:
            deadlines.append(self.mailboxes.timers.next)
        if self.traffic is not None:
            deadlines.append(self.traffic.next_deadline)
        first = None
        for each in deadlines:
            if each is not None and (first is None or each < first):
                first = each
        return first

    def tick(self, now: float) -> None:
        """Release senders held for the longest time; end requests past their ttl, and OPENs.

        The message that a sender was held for is then refused. Each call ends a limited
        number of requests; the rest follow in further calls.
        """
        self.held.release_due(now)
        self.channels.expire(now)
        self.mailboxes.tick(now)
        if self.traffic is not None:
            self.traffic.tick(now)
        due: Timed
        for due in self.requests.deadlines.due(now, _EXPIRED):
            if isinstance(due, WaitingRequest):
                self.in_flight.expire(due)
            else:
                self.reports.expire_request(due)

    def expire(self, session: Session, now: float) -> None:
        """Remove expired frames from the front of an outbox, and tell their senders.

        It is called before the outbox is written. Each call removes a limited number of
        frames; the rest follow in further calls.
        """
        for queued in session.outbox.take_expired(now, _EXPIRED):
            self.reports.report_expired(session, queued)

    def send_copies(self) -> None:
        """Send the copies of taps to the connections that watch, if they read."""
        for session, tap in list(self.taps.all.items()):
            if not session.client.policy.admin:
                self.taps.stop(session)
            elif tap.copies and session.outbox.waiting <= ROOM:
                event = Envelope(Kind.EVENT, 0, BROKER, tap.take(), codec=CodecId.JSON, topic=TOPIC)
                self.replies.answer(session, event)

    # A new configuration

    def reconfigure(
        self,
        clients: Mapping[str, ClientConfig],
        limits: CoreLimits,
        now_wall: float,
        changed_names: Iterable[str] | None = None,
    ) -> list[Session]:
        """Apply a new configuration; return the sessions of removed clients.

        The caller closes those sessions. A subscription that its client's new rules
        forbid receives nothing from now on; run_deferred ends it.

        changed_names: the names in ``clients`` that are new or whose entry changed, if
        known.
            Comparing a hundred thousand entries takes half a second.
        """
        turns = self.reconfiguring(clients, limits, now_wall, changed_names)
        while True:
            try:
                next(turns)
            except StopIteration as end:
                closed: list[Session] = end.value
                return closed

    def reconfiguring(
        self,
        clients: Mapping[str, ClientConfig],
        limits: CoreLimits,
        now_wall: float,
        changed_names: Iterable[str] | None = None,
        removed_names: Iterable[str] | None = None,
    ) -> Generator[None, None, list[Session]]:
        """Apply a new configuration in turns; return the sessions of removed clients.

        It yields after each group of clients, which are removed, or whose new entries are
        in force by then.

        removed_names: the names that are not in ``clients`` any more, if known.
        """
        self.status.limits = limits
        if removed_names is None:
            removed_names = self.exchange.clients.keys() - clients.keys()
        removed: list[Session] = []
        for group in self._groups(removed_names):
            for name in group:
                removed += self._remove_client(name, now_wall)
            yield
        for group in self._groups(clients if changed_names is None else changed_names):
            for name in group:
                self._reconfigure_client(clients[name], now_wall)
            yield
        self.status.generation += 1
        self.topics.forget()
        self.channels.check_rules()
        self.events.announce("$broker.reloaded", "{}")
        return removed

    def _groups(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Yield the names in groups, each of which is reconfigured in one turn."""
        remaining = iter(names)
        while group := list(itertools.islice(remaining, _RECONFIGURED)):
            self.status.generation += 1
            # A remembered outbox may be replaced by one of another kind.
            self.topics.forget()
            yield group

    def _reconfigure_client(self, config: ClientConfig, now_wall: float) -> None:
        client = self.exchange.clients.get(config.name)
        if client is None:
            client = self.exchange.clients[config.name] = Client(config, now_wall)
            self.mailboxes.configure(client)
            if self.traffic is not None:
                self.traffic.add_client(client, now_wall)
                self.traffic.stored_events.configure(client)
        elif client.config != config:
            narrower = not _patterns(client.config.subscribe) <= _patterns(config.subscribe)
            if config.subscribe != client.config.subscribe:
                for session in client.sessions.values():
                    self.revocation.finish(session)
            client.reconfigure(config)
            self.mailboxes.configure(client)
            if self.traffic is not None:
                self.traffic.stored_events.configure(client)
            self.requests.note_room(client)
            for session in client.sessions.values():
                self._judge_again(session)
            for session in client.sessions.values() if narrower else ():
                self.revocation.begin(session)

    def _judge_again(self, session: Session) -> None:
        """Release senders so that their frames are judged by new rules and quotas.

        These are the senders that the session holds, and the session itself.
        """
        if session.outbox.waiting <= session.outbox.limit // 2:
            session.outbox.stalled = False
        self.held.release_waiters(session)
        if session.held_by is not None:
            self.held.release_waiters(session.held_by)

    def _remove_client(self, name: str, now_wall: float) -> Iterable[Session]:
        """Remove a client that is not configured any more; return its sessions."""
        self.mailboxes.remove(name)
        client = self.exchange.clients.pop(name)
        if self.traffic is not None:
            self.traffic.remove_client(client, now_wall)
        return client.sessions.values()

    def drain(self) -> None:
        """Begin a graceful shutdown: refuse new messages, send the goaway notices."""
        for _ in self.goaway.drain_in_steps():
            pass

    def _on_forbidden(self, session: Session, pattern: str, group: str | None) -> None:
        if self.status.changes is not None:
            self.status.changes.note(session)
        if self.traffic is not None:
            self.traffic.unsubscribed(pattern, group)
        reason = "the new rules of the client do not allow the subscription"
        self.replies.log_events.note("client.unsubscribed", session, pattern, group or "", reason)

    # One frame

    def handle(self, source: Session, frame: memoryview, now: float) -> RoutingResult:
        """Handle one whole frame, and return what the routing loop does with it.

        frame: its body. What is kept of it is copied, except where it is a large frame.
        """
        if self.replies.reads_nothing(source):
            return self.held.wait_until_read(source)
        too_deep = ""
        kind, flags, _, name_size, message_id = HEADER.unpack_from(frame)
        if (
            kind == REQUEST_KIND
            and not flags
            and name_size == len(_BROKER)
            and frame[HEADER.size : _OPERATION] == _BROKER
        ):
            # The shortcut for a frame in which nothing can be wrong.
            if not (source.charged or self._charge(source, len(frame), now)):
                return self._refuse_rate(source, Envelope(_REQUEST, message_id, BROKER))
            result = self._operate(source, message_id, frame[_OPERATION:])
            if result is _CONSUMED:
                source.charged = False
                source.hold_deadline = None
            return result
        try:
            envelope, payload_start = split(frame, from_client=True)
        except ExtensionTooDeep as error:
            envelope, payload_start, too_deep = head(frame), len(frame), str(error)
        except MalformedEnvelope as error:
            return self.replies.malformed(source, error.message_id, str(error))
        if envelope.kind in _CHANNEL_KINDS and not (source.messages_in or source.outbox.blocked):
            return self._leave_for_channel(source)
        # The rate of ACKs is not limited: they make room.
        is_free = envelope.kind is Kind.ACK and source.client.mailbox is not None
        if not (source.charged or self._charge(source, len(frame), now, is_free=is_free)):
            return self._refuse_rate(source, envelope)
        if too_deep:
            result = self.replies.refuse_frame(source, envelope, ErrorCode.UNSUPPORTED, too_deep)
        else:
            result = self._dispatch(source, envelope, frame, payload_start, now)
        if result is _CONSUMED or result is _CLOSE:
            source.charged = False
            source.hold_deadline = None
        return result

    def _charge(self, source: Session, size: int, now: float, *, is_free: bool = False) -> bool:
        """Count a frame of ``size`` bytes that has arrived; return whether its client's
        rate allows it.

        is_free: whether that rate does not matter.
        """
        source.messages_in += 1
        source.bytes_in += size
        source.arrived = now
        meter = source.client.meter
        # The rate of a client of another host is limited there.
        source.charged = meter is None or bool(source.host) or is_free or meter.allows(size, now)
        return source.charged

    def _refuse_rate(self, source: Session, envelope: Envelope) -> RoutingResult:
        message = "the client sends more than its configured rate"
        return self.replies.refuse_frame(source, envelope, ErrorCode.RATE_LIMITED, message)

    def _leave_for_channel(self, source: Session) -> RoutingResult:
        """Leave a connection to the network layer, once its outbox is written."""
        if source.outbox.waiting:
            self.replies.touch(source)
            return RoutingResult.FLUSH
        return RoutingResult.CHANNEL

    def too_large(
        self, source: Session, kind: int, message_id: int, name: str, size: int
    ) -> RoutingResult:
        """Refuse an oversized frame. CONSUMED: skip it. size: its payload bytes."""
        if self.replies.reads_nothing(source):
            return self.held.wait_until_read(source)
        message = (
            f"the payload has {size} bytes; at most {self.status.limits.max_message} are allowed"
        )
        self.replies.fail_request(source, kind, name, message_id, ErrorCode.TOO_LARGE, message)
        self.replies.refuse(source, message_id, ErrorCode.TOO_LARGE, message, name)
        return RoutingResult.CONSUMED

    def _dispatch(
        self,
        source: Session,
        envelope: Envelope,
        frame: memoryview,
        payload_start: int,
        now: float,
    ) -> RoutingResult:
        if envelope.kind is Kind.ACK and source.client.mailbox is not None:
            return self.mailboxes.acknowledge(source, envelope, frame[payload_start:], now)
        if envelope.flags & ACK_FLAG or envelope.kind in (Kind.RECEIPT, Kind.ACK):
            if envelope.kind is Kind.ACK:
                message = "a client without a mailbox sends no ACK"
                self.replies.refuse(
                    source, envelope.id, ErrorCode.UNSUPPORTED, message, BROKER, flags=ACK_FLAG
                )
                return RoutingResult.CONSUMED
            message = "a client sends no RECEIPT, and the flag ACK only on an ACK"
            return self.replies.refuse_frame(source, envelope, ErrorCode.UNSUPPORTED, message)
        if envelope.kind in _CHANNEL_KINDS:
            message = "OPEN and JOIN are valid only as the first frame of a connection"
            return self.replies.refuse_frame(source, envelope, ErrorCode.UNSUPPORTED, message)
        if source.spread is not None:
            return self.events.go_on_publishing(source, envelope, frame, now)
        if envelope.extension is not None:
            # The ttl of a stored message counts from storing. A client does not learn
            # anything about a name that it may not send to.
            is_judged_later = self.delivery.is_stored(envelope) or self.delivery.is_denied(
                source, envelope
            )
            refusal = None if is_judged_later else self._refusal(source, envelope, now)
            if refusal is not None:
                return self.replies.refuse_frame(source, envelope, *refusal)
        if envelope.name == BROKER and envelope.kind is not Kind.EVENT:
            return self._to_broker(source, envelope, frame[payload_start:])
        if envelope.kind is Kind.ERROR and not envelope.name:
            self.channels.refuse(source, envelope, bytes(frame[payload_start:]))
            return RoutingResult.CONSUMED
        if envelope.kind is Kind.EVENT:
            return self.events.publish(source, envelope, frame, now)
        if not is_address(envelope.name):
            return self.replies.malformed(
                source, envelope.id, f"{envelope.name!r} is not a valid client address"
            )
        if envelope.name.startswith("$"):
            return self.replies.refuse_frame(
                source, envelope, ErrorCode.NO_SUCH_CLIENT, f"unknown recipient {envelope.name}"
            )
        return self.delivery.send(source, envelope, frame, now)

    def _refusal(
        self, source: Session, envelope: Envelope, now: float
    ) -> tuple[ErrorCode, str] | None:
        """Return why the extension of a frame that is not stored is refused, or None."""
        extension: Mapping[str, Any] = envelope.extension or {}
        if envelope.kind is Kind.MESSAGE and ("key" in extension or "delay" in extension):
            key = "key" if "key" in extension else "delay"
            name = envelope.name
            if not name.startswith("$") and self.exchange.resolve(name.partition("/")[0]) is None:
                return ErrorCode.NO_SUCH_CLIENT, f"unknown client {name}"
            return (
                ErrorCode.UNSUPPORTED,
                f"{name} has no mailbox, and {key} is only for messages to a mailbox",
            )
        if "ttl" not in extension:
            return None
        ttl = extension["ttl"]
        if not is_ttl(ttl):
            return ErrorCode.UNSUPPORTED, f"ttl is not a number of seconds up to {MAX_TTL}"
        return (
            (ErrorCode.EXPIRED, f"ttl of {ttl} s is over") if now - source.arrived >= ttl else None
        )

    def _to_broker(self, source: Session, envelope: Envelope, payload: memoryview) -> RoutingResult:
        if envelope.kind is Kind.ERROR and is_cancel(payload):
            if not self.in_flight.cancel(source, envelope.id):
                return RoutingResult.YIELD
            if envelope.flags & RECEIPT_FLAG:
                self.replies.confirm(source, envelope.id)
            return RoutingResult.CONSUMED
        if envelope.kind is not Kind.REQUEST:
            return self.replies.refuse_frame(
                source, envelope, ErrorCode.UNSUPPORTED, "the broker accepts only requests"
            )
        return self._operate(source, envelope.id, payload, envelope.flags)

    def _operate(
        self, source: Session, message_id: int, payload: memoryview, flags: int = 0
    ) -> RoutingResult:
        """Carry out an operation, of which only the payload is left to be checked."""
        self.mailboxes.clock.advance(source.arrived)
        self.mailboxes.acknowledging.collect_all()
        if source in self.operations.asking:
            return self.held.wait_for_answer(source)
        if flags & RECEIPT_FLAG:
            self.replies.confirm(source, message_id)
        self.operations.serve(source, message_id, payload)
        return _CONSUMED


def _patterns(rules: Iterable[Rule]) -> set[str]:
    return {rule.pattern for rule in rules}
