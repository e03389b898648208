"""The broker: which sessions join, what becomes of each frame, and work that is deferred.

The routing loop (:mod:`brokerd.core.routing`) passes ordinary messages on by itself.
It hands every other frame to :meth:`Broker.handle`, one at a time. No message is
dropped silently: one that cannot be delivered comes back to its sender as an ERROR
(docs/protocol.md, "Outcomes").

The broker is composed of parts, each of which uses only the parts before it: exchange,
topics, requests, replies, held senders, requests in flight, reports, delivery, events,
goaway, operations.
No part calls the broker, so a frame enters it once.

The network layer finds its work in six places:

- ``touched``: sessions with bytes to write, or to be closed;
- ``held.released``: sessions that may be read from again;
- ``operations.admin_commands``: commands of an administrator for the daemon;
- ``replies.log_events``: events to write to the log;
- ``next_deadline``: when :meth:`Broker.tick` is due;
- ``has_deferred_work``: whether :meth:`Broker.run_deferred` has something to do.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Mapping
from typing import Final

from brokerd.config.values import ClientConfig, Rule, WhenConnected
from brokerd.core.deferred import Deferred
from brokerd.core.delivery import Delivery
from brokerd.core.error_codes import is_cancel
from brokerd.core.events import Events
from brokerd.core.exchange import Client, Exchange
from brokerd.core.flight import WaitingRequest
from brokerd.core.goaway import Goaway
from brokerd.core.held_senders import HeldSenders
from brokerd.core.in_flight import InFlight
from brokerd.core.operations import AdminCommand, Operations
from brokerd.core.replies import Replies
from brokerd.core.reports import Reports, mark_orphaned
from brokerd.core.requests import Requests
from brokerd.core.revocation import Revocation
from brokerd.core.routing_result import RoutingResult
from brokerd.core.session import Session
from brokerd.core.status import CoreLimits, Status
from brokerd.core.topics import Topics
from brokerd.core.turn import Turn
from brokerd_client.errors import ExtensionTooDeep, MalformedEnvelope
from brokerd_client.wire.envelope import (
    BROKER,
    MAX_TTL,
    Envelope,
    ErrorCode,
    Kind,
    head,
    is_address,
    is_ttl,
    split,
)
from brokerd_client.wire.layout import ACK_FLAG, RECEIPT_FLAG

__all__ = ["AdminCommand", "Broker", "CoreLimits", "RoutingResult"]

#: Most steps of deferred jobs per call of run_deferred: a few milliseconds' work.
_STEPS: Final = 64
#: Most messages past their ttl that are reported per call.
_EXPIRED: Final = 256
#: Most clients reconfigured per turn of a reload: some milliseconds' work.
_RECONFIGURED: Final = 256


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
        self.replies = Replies(self.requests)
        self.held = HeldSenders(self.status, self.replies, self.requests)
        self.in_flight = InFlight(self.requests, self.replies, self.held)
        self.reports = Reports(self.exchange, self.replies, self.requests, self.in_flight)
        self.delivery = Delivery(
            self.exchange,
            self.status,
            self.turn,
            self.requests,
            self.replies,
            self.held,
            self.in_flight,
            self.reports,
        )
        self.events = Events(
            self.topics, self.status, self.turn, self.replies, self.delivery, self.deferred
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
        )
        #: The same list as ``replies.touched``, for the routing loop.
        self.touched = self.replies.touched
        #: Numbers every attach and detach, in order.
        self._order = itertools.count(1)

    # Joining and leaving

    def place_for(self, name: str) -> tuple[bool, Session | None]:
        """Return (whether a connection may join as ``name``, the session replaced)."""
        client = self.exchange.resolve(name)
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
        client = self.exchange.resolve(name)
        assert client is not None, "place_for said there is room"
        session = Session(client, instance, peer=peer, since=now_wall, connection=connection)
        session.number = self.take_number()
        if self.status.changes is not None:
            self.status.changes.note(session)
        first = not client.online
        client.add(session)
        self.requests.note_room(client)
        for member in client.sessions.values():
            self.held.release_waiters(member)
        if first:
            client.changed_at = now_wall
            self.events.announce_presence("online", client, now_wall)
        return session

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
        session.closed_number = self.take_number()
        if self.status.changes is not None:
            self.status.changes.note_left(session)
        self._remove_from_lists(session)
        self.held.release(session)
        self.held.release_waiters(session)
        self.requests.end_all(session)
        self.requests.forget_retained(session)
        self.reports.add(session, session.outbox.take_unsent())
        mark_orphaned(session)
        self._drop_references(session)
        self._add_to_totals(session)
        # Last: only now it is known whether its client is offline, and the event goes to
        # its first subscribers at once.
        client = session.client
        if not client.online:
            client.changed_at = now_wall
            self.events.announce_presence("offline", client, now_wall)

    def _remove_from_lists(self, session: Session) -> None:
        """Remove a session from its client, its topics, and the lists of waiting sessions."""
        self.goaway.finishing.pop(session, None)
        self.operations.asking.discard(session)
        # A retired session has been removed from its client before.
        if not session.retired:
            session.client.remove(session)
            self.in_flight.leave(session)
        self.topics.leave(session, session.subscriptions)
        session.subscriptions.clear()
        self.topics.abandon(session)

    def _drop_references(self, session: Session) -> None:
        """Break the reference cycles of a closed session."""
        # Without these cycles, a session is freed as soon as its messages are reported.
        # Otherwise thousands of them would wait for the garbage collector.
        session.marks = None
        session.routes.clear()
        session.fanouts.clear()
        session.spread = session.reached_by_event = None
        session.connection = session.outbox.owner = None

    def _add_to_totals(self, session: Session) -> None:
        for counter in ("messages_in", "bytes_in", "messages_out", "bytes_out"):
            self.status.totals[counter] += getattr(session, counter)

    # Work of later turns

    @property
    def has_deferred_work(self) -> bool:
        """Whether closed sessions or new rules left work for :meth:`run_deferred`."""
        return (
            bool(self.reports)
            or bool(self.in_flight)
            or bool(self.deferred)
            or self.held.has_deferred_work
            or bool(self.revocation)
            or not self.topics.is_tidy
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

    @property
    def has_deadlines(self) -> bool:
        """Whether :meth:`tick` will have something to do."""
        return bool(self.held) or bool(self.requests.deadlines)

    @property
    def next_deadline(self) -> float | None:
        """When :meth:`tick` is due, on the clock of ``now``; None without deadlines."""
        held, requests = self.held.next_deadline, self.requests.deadlines.next
        if held is None or requests is None:
            return requests if held is None else held
        return min(held, requests)

    def tick(self, now: float) -> None:
        """Release senders held for the longest time; end requests past their ttl.

        The message that a sender was held for is then refused. Each call ends a limited
        number of requests; the rest follow in further calls.
        """
        self.held.release_due(now)
        for due in self.requests.deadlines.due(now, _EXPIRED):
            if isinstance(due, WaitingRequest):
                self.in_flight.expire(due)
            else:
                self.reports.expire_request(*due)

    def expire(self, session: Session, now: float) -> None:
        """Remove expired frames from the front of an outbox, and tell their senders.

        It is called before the outbox is written. Each call removes a limited number of
        frames; the rest follow in further calls.
        """
        for queued in session.outbox.take_expired(now, _EXPIRED):
            self.reports.report_expired(session, queued)

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
    ) -> Generator[None, None, list[Session]]:
        """Apply a new configuration in turns; return the sessions of removed clients.

        It yields after each group of clients, whose new entries are in force by then.
        """
        self.status.limits = limits
        current = self.exchange.clients
        removed = [
            session
            for name in current.keys() - clients.keys()
            for session in current.pop(name).sessions.values()
        ]
        names = iter(clients if changed_names is None else changed_names)
        while group := list(itertools.islice(names, _RECONFIGURED)):
            self.status.generation += 1
            # A remembered outbox may be replaced by one of another kind.
            self.topics.forget()
            for name in group:
                self._reconfigure_client(clients[name], now_wall)
            yield
        self.status.generation += 1
        self.topics.forget()
        self.events.announce("$broker.reloaded", "{}")
        return removed

    def _reconfigure_client(self, config: ClientConfig, now_wall: float) -> None:
        client = self.exchange.clients.get(config.name)
        if client is None:
            self.exchange.clients[config.name] = Client(config, now_wall)
        elif client.config != config:
            narrower = not _patterns(client.config.subscribe) <= _patterns(config.subscribe)
            if config.subscribe != client.config.subscribe:
                for session in client.sessions.values():
                    self.revocation.finish(session)
            client.reconfigure(config)
            self.requests.note_room(client)
            for session in client.sessions.values() if narrower else ():
                self.revocation.begin(session)

    def drain(self) -> None:
        """Begin a graceful shutdown: refuse new messages, send the goaway notices."""
        for _ in self.goaway.drain_in_steps():
            pass

    def _on_forbidden(self, session: Session, pattern: str, group: str | None) -> None:
        if self.status.changes is not None:
            self.status.changes.note(session)
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
        try:
            envelope, _ = split(frame)
        except ExtensionTooDeep as error:
            envelope, too_deep = head(frame), str(error)
        except MalformedEnvelope as error:
            return self.replies.malformed(source, error.message_id, str(error))
        if not source.charged:
            source.messages_in += 1
            source.bytes_in += len(frame)
            source.charged = True
            source.arrived = now
            meter = source.client.meter
            if meter is not None and not meter.allows(len(frame), now):
                source.charged = False
                return self.replies.refuse_frame(
                    source,
                    envelope,
                    ErrorCode.RATE_LIMITED,
                    "the client sends more than its configured rate",
                )
        if too_deep:
            result = self.replies.refuse_frame(source, envelope, ErrorCode.UNSUPPORTED, too_deep)
        else:
            result = self._dispatch(source, envelope, frame, now)
        if result is RoutingResult.CONSUMED or result is RoutingResult.CLOSE:
            source.charged = False
            source.hold_deadline = None
        return result

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
        self, source: Session, envelope: Envelope, frame: memoryview, now: float
    ) -> RoutingResult:
        if envelope.flags & ACK_FLAG or envelope.kind in (Kind.RECEIPT, Kind.ACK):
            message = "this broker stores no messages, so it takes no ACK and no RECEIPT"
            return self.replies.refuse_frame(source, envelope, ErrorCode.UNSUPPORTED, message)
        if source.spread is not None:
            return self.events.go_on_publishing(source, envelope, frame, now)
        refusal = self._expiry(source, envelope, now)
        if refusal is not None:
            return self.replies.refuse_frame(source, envelope, *refusal)
        if envelope.kind is Kind.EVENT:
            return self.events.publish(source, envelope, frame, now)
        if not is_address(envelope.name):
            return self.replies.malformed(
                source, envelope.id, f"{envelope.name!r} is not a valid client address"
            )
        if envelope.name.startswith("$"):
            return self._to_broker(source, envelope, frame)
        return self.delivery.send(source, envelope, frame, now)

    def _expiry(
        self, source: Session, envelope: Envelope, now: float
    ) -> tuple[ErrorCode, str] | None:
        if envelope.extension is None or "ttl" not in envelope.extension:
            return None
        ttl = envelope.extension["ttl"]
        if not is_ttl(ttl):
            return ErrorCode.UNSUPPORTED, f"ttl is not a number of seconds up to {MAX_TTL}"
        return (
            (ErrorCode.EXPIRED, f"ttl of {ttl} s is over") if now - source.arrived >= ttl else None
        )

    def _to_broker(self, source: Session, envelope: Envelope, frame: memoryview) -> RoutingResult:
        if envelope.name != BROKER:
            return self.replies.refuse_frame(
                source, envelope, ErrorCode.NO_SUCH_CLIENT, f"unknown recipient {envelope.name}"
            )
        if envelope.kind is Kind.ERROR and is_cancel(frame[split(frame)[1] :]):
            if not self.in_flight.cancel(source, envelope.id):
                return RoutingResult.YIELD
            if envelope.flags & RECEIPT_FLAG:
                self.replies.confirm(source, envelope.id)
            return RoutingResult.CONSUMED
        if envelope.kind is not Kind.REQUEST:
            return self.replies.refuse_frame(
                source, envelope, ErrorCode.UNSUPPORTED, "the broker accepts only requests"
            )
        if source in self.operations.asking:
            return self.held.wait_for_answer(source)
        if envelope.flags & RECEIPT_FLAG:
            self.replies.confirm(source, envelope.id)
        self.operations.serve(source, envelope, bytes(frame[split(frame)[1] :]))
        return RoutingResult.CONSUMED


def _patterns(rules: Iterable[Rule]) -> set[str]:
    return {rule.pattern for rule in rules}
