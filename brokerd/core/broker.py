"""The broker's decisions: which sessions join, where each frame goes, and its outcome.

The routing loop (:mod:`brokerd.core.routing`) passes ordinary messages on by itself.
It hands every other frame to :meth:`Broker.handle`, one at a time. No message is
dropped silently: one that cannot be delivered comes back to its sender as an ERROR
(docs/protocol.md, "Outcomes").

The network layer finds its work in six attributes:

- ``touched``: sessions with bytes to write, or to be closed;
- ``released``: sessions that may be read from again;
- ``admin_commands``: commands of an administrator that the daemon carries out;
- ``log_events``: events to write to the log;
- ``next_deadline``: when :meth:`Broker.tick` is due;
- ``has_deferred_work``: whether :meth:`Broker.run_deferred` has something to do.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from brokerd.config.values import ClientConfig, Rule, WhenConnected
from brokerd.core.allowance import Allowance
from brokerd.core.deadlines import Deadlines
from brokerd.core.deferred import Deferred
from brokerd.core.delivery import (
    end_request,
    expire_request,
    forget_requests,
    mark_orphaned,
    return_to_sender,
    send,
    tell_expired,
)
from brokerd.core.events import announce, announce_presence, go_on_publishing, publish
from brokerd.core.exchange import Client, Exchange
from brokerd.core.goaway import drain_in_steps, has_finished, retire
from brokerd.core.log_events import LogEvents
from brokerd.core.operations import reply_to, serve
from brokerd.core.revocation import Revocation
from brokerd.core.routing_result import RoutingResult
from brokerd.core.session import Session
from brokerd.core.topics import Topics
from brokerd.core.undelivered import Unsent
from brokerd_client.errors import ExtensionTooDeep, MalformedEnvelope
from brokerd_client.wire.envelope import (
    BROKER,
    MAX_TTL,
    Envelope,
    ErrorCode,
    Kind,
    encode,
    error_payload,
    head,
    is_address,
    is_ttl,
    split,
)
from brokerd_client.wire.framing import frame as make_frame
from brokerd_client.wire.layout import ACK_FLAG, RECEIPT_FLAG

__all__ = ["OUTCOME_RESERVE", "AdminCommand", "Broker", "CoreLimits", "RoutingResult"]

#: Bytes of the broker's own answers that may wait for one client beyond its queue
#: quota. A client with more waiting than that is not read from.
OUTCOME_RESERVE: Final = 256 * 1024

#: Most held senders released per turn: the server reads from each of them in that turn.
_RELEASED: Final = 128
#: Most steps of deferred jobs per call of run_deferred: a few milliseconds' work.
_STEPS: Final = 64
#: Most messages past their ttl that are reported per call.
_EXPIRED: Final = 256
#: Most clients reconfigured per turn of a reload: some milliseconds' work.
_RECONFIGURED: Final = 256
#: Kinds that answer a request.
_ANSWERS: Final = (Kind.REPLY, Kind.ERROR)


@dataclass(frozen=True, slots=True)
class CoreLimits:
    """The core's ``limits:``. max_message: payload bytes. wait_timeout: seconds."""

    max_message: int = 16 * 1024 * 1024
    wait_timeout: float = 30.0


@dataclass(frozen=True, slots=True)
class AdminCommand:
    """An admin operation for the daemon, such as ``reload`` or ``log_level``."""

    op: str
    source: Session
    id: int
    arguments: dict[str, object] = field(default_factory=dict)


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
        self.exchange = Exchange(clients, now_wall)
        self.topics: Topics[Session] = Topics()
        self.revocation = Revocation(self.topics, self._on_forbidden)
        self.limits = limits or CoreLimits()
        self.version = version
        self.routing = routing
        self.started_at = now_wall
        #: A route cache made under another generation is stale.
        self.generation = 1
        self.draining = False
        #: Live upgrades so far: processes that served before this one without a stop.
        self.upgrades = 0
        self.touched: list[Session] = []
        self.released: list[Session] = []
        self.admin_commands: list[AdminCommand] = []
        self.log_events = LogEvents()
        self.refused: Counter[str] = Counter()
        self.dropped = 0
        #: Messages left by closed sessions: ``reported`` to their senders,
        #: ``passed_on`` to other pool members, or ``lost``.
        self.returned: Counter[str] = Counter()
        #: Refusals by error code that the message's sender did not receive: its
        #: connection ended while they waited in its outbox.
        self.unheard: Counter[str] = Counter()
        #: Sessions that wait for the reply to ``finished``: see
        #: :meth:`answer_finished`.
        self.finishing: dict[Session, None] = {}
        #: Slow-path frames that the current sender may still have handled in this turn;
        #: negative for no limit. A slow-path frame takes a thousand times as long as
        #: one that stays in the routing loop. See charge.
        self.turn_budget = -1
        self.totals: Counter[str] = Counter()
        #: The broker's own events, and questions with long answers, in order; and the
        #: sessions that asked those questions.
        self.deferred = Deferred(self)
        self.asking: set[Session] = set()
        #: By recipient that has room again: its held senders still to be released, in
        #: turns.
        self.releasing: dict[Session, list[Session]] = {}
        #: Those recipients whose held senders are all released once more after that.
        self.release_again: set[Session] = set()
        #: Requests with a ttl and no outcome yet: (requester, message id, responder's
        #: address).
        self.deadlines: Deadlines[tuple[Session, int, str]] = Deadlines()
        self._held: dict[Session, float] = {}
        #: Numbers every attach and detach, in order.
        self._order = itertools.count(1)
        #: Closed sessions, each with the frames of its outbox that the system did not
        #: take.
        self._leaving: deque[tuple[Session, Unsent]] = deque()

    # Joining and leaving

    def place_for(self, name: str) -> tuple[bool, Session | None]:
        """Return (whether a connection may join as ``name``, the session replaced)."""
        client = self.exchange.resolve(name)
        if client is None or self.draining:
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
        session.number = next(self._order)
        first = not client.online
        client.add(session)
        for member in client.sessions.values():
            self.release_waiters(member)
        if first:
            client.changed_at = now_wall
            announce_presence(self, "online", client, now_wall)
        return session

    def detach(self, session: Session, now_wall: float) -> None:
        """Remove a closed connection's session; run_deferred reports its messages."""
        if not session.open:
            return
        session.open = False
        session.closed_number = next(self._order)
        client = session.client
        self.finishing.pop(session, None)
        self.asking.discard(session)
        session.marks = None
        if not session.retired:
            client.remove(session)
        self.topics.leave(session, session.subscriptions)
        session.subscriptions.clear()
        self.topics.abandon(session)
        self.release(session)
        self.release_waiters(session)
        forget_requests(self, session)
        self._leaving.append((session, session.outbox.take_unsent()))
        session.routes.clear()
        session.fanouts.clear()
        session.spread = session.reached_by_event = None
        mark_orphaned(session)
        # Without these reference cycles, a session is freed as soon as its messages are
        # reported. Otherwise thousands of them would wait for the garbage collector.
        session.connection = session.outbox.owner = None
        self._count(session)
        if not client.online:
            client.changed_at = now_wall
            announce_presence(self, "offline", client, now_wall)

    @property
    def has_deferred_work(self) -> bool:
        """Whether closed sessions or new rules left work for :meth:`run_deferred`."""
        left = self.deferred or self.releasing or self.revocation
        return self.owes_answers or bool(left) or not self.topics.is_tidy

    @property
    def owes_answers(self) -> bool:
        """Whether messages to closed sessions are still to be reported."""
        return bool(self._leaving)

    @property
    def deferred_reports(self) -> int:
        """The number of messages to closed sessions that are still to be reported."""
        return sum(len(queue) for _, queue in self._leaving)

    def run_deferred(self, count: int) -> None:
        """Report up to ``count`` messages of closed sessions; remove subscriptions.

        Subscriptions that new rules forbid are removed too.

        There can be hundreds of thousands. Handling all of them at once would delay
        every other client.
        """
        while self._leaving and count > 0:
            session, queue = self._leaving[0]
            count -= 1
            queued = queue.pop()
            if queued is not None:
                return_to_sender(self, session, queued)
            elif session.incoming_requests:
                # Requests that the session received and did not answer, the oldest
                # first. Requests that it did not receive have been returned above.
                (_, message_id), requester = next(iter(session.incoming_requests.items()))
                end_request(self, requester, message_id, session)
                message = f"{session.address} disconnected before it answered"
                self.refuse(requester, message_id, ErrorCode.ABANDONED, message, session.address)
            else:
                self._leaving.popleft()
        self.topics.tidy(count)
        self.revocation.run_deferred(count)
        self.deferred.run_deferred(_STEPS)
        if self.releasing:
            self._go_on_releasing()

    def _count(self, session: Session) -> None:
        for counter in ("messages_in", "bytes_in", "messages_out", "bytes_out"):
            self.totals[counter] += getattr(session, counter)

    # Called by the network layer

    def charge(self, count: int) -> None:
        """Charge ``count`` more frames to the current sender's budget for this turn."""
        if self.turn_budget > 0:
            self.turn_budget = max(0, self.turn_budget - count)

    def touch(self, session: Session) -> None:
        """List the session in ``touched``, to have it written to or closed."""
        if not session.outbox.touched:
            session.outbox.touched = True
            self.touched.append(session)

    def close(
        self, session: Session, why: str, *, cut: bool = False, code: ErrorCode | None = None
    ) -> None:
        """Mark the session to be closed once its outbox is written.

        cut: close it at once, whether its outbox is written or not.
        code: the code of an ERROR with the id 0 that its client receives last.
        """
        if not session.closing:
            session.closing_code = code
        session.closing = session.closing or why
        session.cut = session.cut or cut
        self.touch(session)

    def may_hold_for(self, target: Session, now: float) -> float:
        """Return the seconds for which a full recipient may hold one more sender."""
        if target.allowance is None:
            target.allowance = Allowance(at=now)
        return target.allowance.begin(now, self.limits.wait_timeout, holds=bool(target.waiters))

    def drained(self, session: Session, now: float) -> None:
        """Release the session's held senders if at least half of its queue is free.

        It is called when the system has taken bytes of the session's outbox.
        """
        if session.slow and not session.outbox.waiting:
            session.slow = False
            self.log_events.note(
                "client.recovered", session, reason="it has read everything that waited for it"
            )
        if session.outbox.waiting <= session.outbox.limit // 2:
            allowance = session.allowance
            if allowance is not None and (allowance.holding or session.outbox.stalled):
                allowance.end(now)
                allowance.earn(self.limits.wait_timeout)
            session.outbox.stalled = False
            # A message to a pool's name may go to any member, so the senders that other
            # members hold try again too.
            for member in session.client.sessions.values():
                self.release_waiters(member)

    def order(
        self, op: str, source: Session, message_id: int, arguments: dict[str, object]
    ) -> None:
        """Queue an admin command for the daemon, which answers it."""
        self.admin_commands.append(AdminCommand(op, source, message_id, arguments))

    def reconfigure(
        self,
        clients: Mapping[str, ClientConfig],
        limits: CoreLimits,
        now_wall: float,
        differing: Iterable[str] | None = None,
    ) -> list[Session]:
        """Apply a new configuration; return the sessions of removed clients.

        The caller closes those sessions. A subscription that its client's new rules
        forbid receives nothing from now on; run_deferred ends it.

        differing: the names in ``clients`` that are new or whose entry changed, if
        known.
            Comparing a hundred thousand entries takes half a second.
        """
        turns = self.reconfiguring(clients, limits, now_wall, differing)
        while True:
            try:
                next(turns)
            except StopIteration as end:
                gone: list[Session] = end.value
                return gone

    def reconfiguring(
        self,
        clients: Mapping[str, ClientConfig],
        limits: CoreLimits,
        now_wall: float,
        differing: Iterable[str] | None = None,
    ) -> Generator[None, None, list[Session]]:
        """Apply a new configuration in turns; return the sessions of removed clients.

        It yields after each group of clients, whose new entries are in force by then.
        """
        self.limits = limits
        known = self.exchange.clients
        gone = [
            session
            for name in known.keys() - clients.keys()
            for session in known.pop(name).sessions.values()
        ]
        names = iter(clients if differing is None else differing)
        while some := list(itertools.islice(names, _RECONFIGURED)):
            self.generation += 1
            # A remembered outbox may be replaced by one of another kind.
            self.topics.forget()
            for name in some:
                self._reconfigure_client(clients[name], now_wall)
            yield
        self.generation += 1
        self.topics.forget()
        announce(self, "$broker.reloaded", "{}")
        return gone

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
            for session in client.sessions.values() if narrower else ():
                self.revocation.begin(session)

    def _on_forbidden(self, session: Session, pattern: str, group: str | None) -> None:
        why = "its new rules do not allow the subscription"
        self.log_events.note("client.unsubscribed", session, pattern, group or "", why)

    def drain(self) -> None:
        """Begin a graceful shutdown: refuse new messages, send the goaway notices."""
        for _ in drain_in_steps(self):
            pass

    def answer_finished(self, session: Session) -> bool:
        """Answer ``finished`` if the session has finished; return whether it has."""
        assert session.finishing is not None
        if not has_finished(self, session):
            return False
        del self.finishing[session]
        # A frame delivered from now on might arrive after the client has closed.
        retire(self, session)
        reply_to(self, session, session.finishing, {})
        session.finished = True
        return True

    @property
    def outcome_reserve(self) -> int:
        """Bytes of the broker's answers that may wait for a client beyond its queue."""
        return OUTCOME_RESERVE

    @property
    def holds_somebody(self) -> bool:
        """Whether any session is held."""
        return bool(self._held)

    @property
    def has_deadlines(self) -> bool:
        """Whether :meth:`tick` will have something to do."""
        return bool(self._held) or bool(self.deadlines)

    @property
    def next_deadline(self) -> float | None:
        """When :meth:`tick` is due, on the clock of ``now``; None without deadlines."""
        held, outgoing_requests = min(self._held.values(), default=None), self.deadlines.next
        return (
            outgoing_requests
            if held is None
            else held
            if outgoing_requests is None
            else min(held, outgoing_requests)
        )

    def tick(self, now: float) -> None:
        """Release senders held for the longest time; end requests past their ttl.

        The message that a sender was held for is then refused. Each call ends a limited
        number of requests; the rest follow in further calls.
        """
        due = (session for session, deadline in self._held.items() if deadline <= now)
        for session in list(itertools.islice(due, _RELEASED)):
            holder = session.held_by
            assert holder is not None
            if session.hold_deadline is not None and session.hold_deadline <= now:
                holder.outbox.stalled = True
            self.release(session)
            if not holder.waiters and holder.allowance is not None:
                holder.allowance.end(now)
        for requester, message_id, address in self.deadlines.due(now, _EXPIRED):
            expire_request(self, requester, message_id, address)

    def expire(self, session: Session, now: float) -> None:
        """Remove expired frames from the front of an outbox, and tell their senders.

        It is called before the outbox is written. Each call removes a limited number of
        frames; the rest follow in further calls.
        """
        for queued in session.outbox.take_expired(now, _EXPIRED):
            tell_expired(self, session, queued)

    def hold(self, source: Session, target: Session, deadline: float) -> None:
        """Hold a sender until the target has room, at most until ``deadline``."""
        why = (
            "it does not read the broker's answers"
            if target is source
            else "the queue it sends to is full"
        )
        self.log_events.note("client.held", source, target.address, reason=why)
        source.held_by = target
        target.waiters[source] = None
        self._held[source] = deadline

    def held(self) -> list[Session]:
        """Return the sessions that are held."""
        return list(self._held)

    def release(self, session: Session) -> None:
        """Release a session if it is held, so that it is read from again."""
        if session.held_by is not None:
            del self._held[session], session.held_by.waiters[session]
            session.held_by = None
            self.released.append(session)

    def release_waiters(self, target: Session) -> None:
        """Release the senders that a session holds, the longest held first."""
        if target in self.releasing:
            self.release_again.add(target)
        else:
            self.release_some(target, sorted(target.waiters, key=_held_since)[::-1])

    def release_some(self, target: Session, order: list[Session]) -> None:
        """Release senders from the end of ``order``; run_deferred releases the rest."""
        for _ in range(min(_RELEASED, len(order))):
            sender = order.pop()
            if sender.held_by is target:
                self.release(sender)
        if order:
            self.releasing[target] = order

    def _go_on_releasing(self) -> None:
        target, order = next(iter(self.releasing.items()))
        del self.releasing[target]
        if _has_room(target):
            self.release_some(target, order)
            if target in self.releasing:
                return
            if target in self.release_again:
                self.release_again.discard(target)
                self.release_waiters(target)
        else:
            # These senders are released when half of the queue is free.
            self.release_again.discard(target)

    # One frame

    def handle(self, source: Session, frame: memoryview, now: float) -> RoutingResult:
        """Handle one whole frame, and return what the routing loop does with it.

        frame: its body. What is kept of it is copied, except where it is a large frame.
        """
        if self._reads_nothing(source):
            return self._until_it_reads(source)
        too_deep = ""
        try:
            envelope, _ = split(frame)
        except ExtensionTooDeep as error:
            envelope, too_deep = head(frame), str(error)
        except MalformedEnvelope as error:
            return self.malformed(source, error.id, str(error))
        if not source.charged:
            source.messages_in += 1
            source.bytes_in += len(frame)
            source.charged = True
            source.arrived = now
            meter = source.client.meter
            if meter is not None and not meter.allows(len(frame), now):
                source.charged = False
                return self.refuse_frame(
                    source, envelope, ErrorCode.RATE_LIMITED, "more than the configured rate"
                )
        if too_deep:
            result = self.refuse_frame(source, envelope, ErrorCode.UNSUPPORTED, too_deep)
        else:
            result = self._dispatch(source, envelope, frame, now)
        if result is RoutingResult.CONSUMED or result is RoutingResult.CLOSE:
            source.charged = False
            source.hold_deadline = None
        return result

    def _reads_nothing(self, source: Session) -> bool:
        """Return whether more waits for a client than queue and reserve allow."""
        return source.outbox.waiting > source.outbox.limit + self.outcome_reserve

    def _until_it_reads(self, source: Session) -> RoutingResult:
        if not source.outbox.blocked:
            return RoutingResult.FLUSH
        self.hold(source, source, float("inf"))
        return RoutingResult.BLOCKED

    def _dispatch(
        self, source: Session, envelope: Envelope, frame: memoryview, now: float
    ) -> RoutingResult:
        if envelope.flags & ACK_FLAG or envelope.kind in (Kind.RECEIPT, Kind.ACK):
            message = "nothing sent here is stored, so nothing can be acknowledged"
            return self.refuse_frame(source, envelope, ErrorCode.UNSUPPORTED, message)
        if source.spread is not None:
            return go_on_publishing(self, source, envelope, frame, now)
        refusal = self._expiry(source, envelope, now)
        if refusal is not None:
            return self.refuse_frame(source, envelope, *refusal)
        if envelope.kind is Kind.EVENT:
            return publish(self, source, envelope, frame, now)
        if not is_address(envelope.name):
            return self.malformed(source, envelope.id, f"{envelope.name!r} is no client name")
        if envelope.name.startswith("$"):
            return self._to_broker(source, envelope, frame)
        return send(self, source, envelope, frame, now)

    def _expiry(
        self, source: Session, envelope: Envelope, now: float
    ) -> tuple[ErrorCode, str] | None:
        if envelope.extension is None or "ttl" not in envelope.extension:
            return None
        ttl = envelope.extension["ttl"]
        if not is_ttl(ttl):
            return ErrorCode.UNSUPPORTED, f"ttl is not a number of seconds up to {MAX_TTL}"
        return (
            (ErrorCode.EXPIRED, f"its ttl of {ttl} s is over")
            if now - source.arrived >= ttl
            else None
        )

    def _to_broker(self, source: Session, envelope: Envelope, frame: memoryview) -> RoutingResult:
        if envelope.name != BROKER:
            return self.refuse_frame(
                source, envelope, ErrorCode.NO_SUCH_CLIENT, f"there is no {envelope.name}"
            )
        if envelope.kind is not Kind.REQUEST:
            return self.refuse_frame(
                source, envelope, ErrorCode.UNSUPPORTED, "the broker takes requests only"
            )
        if source in self.asking:
            return self._wait_for_answer(source)
        if envelope.flags & RECEIPT_FLAG:
            self.answer(source, Envelope(Kind.RECEIPT, envelope.id, BROKER))
        serve(self, source, envelope, bytes(frame[split(frame)[1] :]))
        return RoutingResult.CONSUMED

    def _wait_for_answer(self, source: Session) -> RoutingResult:
        """Hold a session until its operation with a long answer has been answered."""
        source.held_by = source
        source.waiters[source] = None
        self._held[source] = float("inf")
        return RoutingResult.BLOCKED

    def pass_on(self, target: Session, whole: bytes) -> None:
        target.outbox.append(whole)
        self.touch(target)

    # Answers

    def answer(self, source: Session, envelope: Envelope) -> None:
        """Send the broker's own frame to a session."""
        if source.open and not source.mute:
            self.pass_on(source, make_frame(encode(envelope)))

    def refuse(
        self, source: Session, message_id: int, code: ErrorCode, message: str, name: str = ""
    ) -> None:
        """Send an ERROR to a session. name: the recipient that it is about."""
        if source.mute:
            self._lose(source, code, message, name)
            return
        self.refused[code] += 1
        source.errors_in += 1
        self.log_events.note("message.refused", source, name, code, message)
        self.answer(
            source,
            Envelope(Kind.ERROR, message_id, BROKER, error_payload(code, message, name), codec=2),
        )

    def _lose(self, source: Session, code: ErrorCode, message: str, name: str) -> None:
        """Count a message that cannot be delivered, and whose sender cannot be told."""
        if name != BROKER:
            self.dropped += 1
            self.returned["lost"] += 1
            self.log_events.note("message.dropped", source, name, code, message)

    def malformed(self, source: Session, message_id: int, message: str) -> RoutingResult:
        """Refuse a malformed frame; close its connection once the ERROR is written."""
        self.refuse(source, message_id, ErrorCode.MALFORMED, message)
        self.close(source, "malformed")
        return RoutingResult.CLOSE

    def too_large(
        self, source: Session, kind: int, message_id: int, name: str, size: int
    ) -> RoutingResult:
        """Refuse an oversized frame. CONSUMED: skip it. size: its payload bytes."""
        if self._reads_nothing(source):
            return self._until_it_reads(source)
        message = f"{size} bytes; at most {self.limits.max_message} are taken"
        if kind in _ANSWERS:
            self._fail_request(source, name, message_id, ErrorCode.TOO_LARGE, message)
        self.refuse(source, message_id, ErrorCode.TOO_LARGE, message, name)
        return RoutingResult.CONSUMED

    def refuse_frame(
        self,
        source: Session,
        envelope: Envelope,
        code: ErrorCode,
        message: str,
        name: str | None = None,
    ) -> RoutingResult:
        """Send the sender of a frame an ERROR about it.

        An ERROR frame that cannot be delivered is not answered by another ERROR, unless
        its sender asked for a receipt. The requester that waits for a refused answer
        receives an ERROR as well.
        """
        if envelope.kind in _ANSWERS:
            self._fail_request(source, envelope.name, envelope.id, code, message)
        if envelope.kind is Kind.ERROR and not envelope.flags & RECEIPT_FLAG:
            self.dropped += 1
            self.log_events.note(
                "message.dropped", source, envelope.name, code, f"an ERROR for it: {message}"
            )
        else:
            self.refuse(source, envelope.id, code, message, envelope.name if name is None else name)
        return RoutingResult.CONSUMED

    def _fail_request(
        self, answerer: Session, requester: str, message_id: int, code: ErrorCode, message: str
    ) -> None:
        """End the request whose answer was refused, and send its requester an ERROR."""
        session = answerer.incoming_requests.get((requester, message_id))
        if session is not None:
            end_request(self, session, message_id, answerer)
            why = f"the answer of {answerer.address} was refused: {message}"
            self.refuse(session, message_id, code, why, answerer.address)


def _patterns(rules: Iterable[Rule]) -> set[str]:
    return {rule.pattern for rule in rules}


def _has_room(target: Session) -> bool:
    """Return whether the senders that a session holds may try again."""
    outbox = target.outbox
    return (
        not target.open
        or target.retired
        or not outbox.blocked
        or outbox.waiting <= outbox.limit // 2
    )


def _held_since(session: Session) -> float:
    """Return the sort key of held sessions: when their waiting frame arrived."""
    return session.arrived if session.charged else float("inf")
