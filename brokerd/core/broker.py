"""The broker's decisions: who joins and leaves, where a frame goes, and what becomes of it.

The routing loop (:mod:`brokerd.core.routing`) passes ordinary messages on by itself and hands everything
else to :meth:`Broker.handle`, one frame at a time. Nothing is dropped in silence: what can't be
delivered comes back to its sender as an ERROR (docs/protocol.md, "Outcomes").

What is to be done by the network layer lies in four places: ``touched`` (sessions with bytes to write, or
to be closed), ``released`` (sessions that may be read from again), ``orders`` (what an administrator
asked of the daemon) and ``next_deadline``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from brokerd.config.values import ClientConfig, WhenConnected, WhenFull
from brokerd.core.exchange import Client, Exchange
from brokerd.core.outbox import FrameOutbox, Queued, StreamOutbox
from brokerd.core.service import serve
from brokerd.core.session import Session
from brokerd.core.topics import Matches, Topics
from brokerd.core.verdict import Verdict
from brokerd_client.errors import InvalidName, MalformedEnvelope
from brokerd_client.wire.envelope import (
    BROKER,
    HEADER,
    Envelope,
    ErrorCode,
    Flag,
    Kind,
    check_topic,
    encode,
    error_payload,
    is_address,
    split,
    split_address,
)
from brokerd_client.wire.framing import frame as make_frame
from brokerd_client.wire.framing import frame_prefix

__all__ = ["OUTCOME_RESERVE", "Broker", "Limits", "Order", "Verdict"]

#: Bytes by which the broker's own answers may exceed a client's queue before it is not read from any more.
OUTCOME_RESERVE: Final = 256 * 1024

#: Topics of one publisher whose subscribers the routing loop remembers.
_REMEMBERED_FANS: Final = 4096

_RECEIPT: Final = int(Flag.RECEIPT)
_ACK: Final = int(Flag.ACK)


@dataclass(frozen=True, slots=True)
class Limits:
    """The core's share of ``limits:``. max_message: payload bytes. wait_timeout: seconds."""

    max_message: int = 16 * 1024 * 1024
    wait_timeout: float = 30.0


@dataclass(frozen=True, slots=True)
class Order:
    """Something an administrator asked that only the daemon can do: ``reload`` or ``drain``."""

    op: str
    source: Session
    id: int
    arguments: dict[str, object] = field(default_factory=dict)


class Broker:
    """Everything between the sockets."""

    def __init__(
        self,
        clients: Iterable[ClientConfig] = (),
        *,
        limits: Limits | None = None,
        version: str = "",
        routing: str = "python",
        now_wall: float = 0.0,
    ) -> None:
        self.exchange = Exchange(clients, now_wall)
        self.topics: Topics[Session] = Topics()
        self.limits = limits or Limits()
        self.version = version
        self.routing = routing
        self.started_at = now_wall
        #: Route caches made before this number changed are stale.
        self.generation = 1
        self.draining = False
        self.touched: list[Session] = []
        self.released: list[Session] = []
        self.orders: list[Order] = []
        self.refused: Counter[str] = Counter()
        self.dropped = 0
        self.totals: Counter[str] = Counter()
        self._held: dict[Session, float] = {}

    # Joining and leaving

    def place_for(self, name: str) -> tuple[bool, Session | None]:
        """Return (whether one more connection of ``name`` may join, which session has to leave for it)."""
        client = self.exchange.resolve(name)
        if client is None or self.draining:
            return False, None
        if len(client.sessions) < client.config.connections:
            return True, None
        if client.config.when_connected is WhenConnected.REFUSE:
            return False, None
        return True, next(iter(client.sessions.values()))

    def attach(self, name: str, instance: str, *, peer: str, now_wall: float, link: object = None) -> Session:
        """Return the session of a connection that has just authenticated as ``name``.

        instance: a fresh name for it within a pool, ``[0-9a-z]{1,16}``.
        """
        client = self.exchange.resolve(name)
        assert client is not None, "place_for said there is room"
        session = Session(client, instance, peer=peer, since=now_wall, link=link)
        first = not client.online
        client.add(session)
        for member in client.sessions.values():
            self._release_waiters(member)
        if first:
            client.changed_at = now_wall
            self._announce("online", client, now_wall)
        return session

    def detach(self, session: Session, now_wall: float) -> None:
        """Forget a session whose connection is gone, and answer for everything it still had to do."""
        if not session.open:
            return
        session.open = False
        client = session.client
        client.remove(session)
        for pattern, group in session.subscriptions:
            self.topics.discard(pattern, session, group)
        session.subscriptions.clear()
        self._release(session)
        self._release_waiters(session)
        # A name removed and configured again may have two connections for a moment: only its own are ended.
        for (id, _), responder in session.asked.items():
            if responder.owed.get((session.address, id)) is session:
                del responder.owed[(session.address, id)]
        session.asked.clear()
        for queued in session.outbox.take_unsent():
            self._give_back(session, queued)
        for (_, id), requester in session.owed.items():
            requester.asked.pop((id, session.address), None)
            message = f"{session.address} disconnected before it answered"
            self.refuse(requester, id, ErrorCode.OFFLINE, message, session.address)
        session.owed.clear()
        session.routes.clear()
        self._leave_behind(session)
        self._count(session)
        if not client.online:
            client.changed_at = now_wall
            self._announce("offline", client, now_wall)

    def _count(self, session: Session) -> None:
        for counter in ("messages_in", "bytes_in", "messages_out", "bytes_out"):
            self.totals[counter] += getattr(session, counter)

    def _leave_behind(self, session: Session) -> None:
        """Have nobody who comes later under the same address hear what becomes of this session's messages."""
        for client in session.reached:
            for each in client.sessions.values():
                if isinstance(each.outbox, StreamOutbox):
                    each.outbox.sender_left(session.stamp)
        session.reached.clear()

    def _sender_of(self, queued: Queued, name: str) -> Session | None:
        """Return the session that a waiting frame came from, or None when that is gone."""
        if queued.sender is not None:
            sender: Session = queued.sender
            return sender if sender.open else None
        return None if queued.orphaned else self.exchange.find(name)

    def _give_back(self, session: Session, queued: Queued) -> None:
        """Find another way for a frame that its recipient did not take, or tell its sender."""
        body = memoryview(queued.frame)[4:]
        envelope, _ = split(body)
        if envelope.kind not in (Kind.MESSAGE, Kind.REQUEST, Kind.REPLY) or envelope.name == BROKER:
            return
        sender = self._sender_of(queued, envelope.name)
        if envelope.kind is Kind.REQUEST and sender is not None:
            session.owed.pop((envelope.name, envelope.id), None)
            sender.asked.pop((envelope.id, session.address), None)
        other = None if queued.pinned or envelope.kind is Kind.REPLY else session.client.pick()
        if other is not None and isinstance(other.outbox, FrameOutbox) and other.outbox.reserve(len(queued.frame)):
            other.outbox.put(queued)
            self.touch(other)
            if envelope.kind is Kind.REQUEST and sender is not None:
                self._expect_answer(sender, other, envelope.id)
        elif sender is not None:
            to = session.address if queued.pinned else session.client.name
            self.refuse(sender, envelope.id, ErrorCode.OFFLINE, f"{to} disconnected before it took the message", to)
        else:
            self.dropped += 1

    # What the network layer asks

    def touch(self, session: Session) -> None:
        """Have the session's outbox written, or the session closed."""
        if not session.outbox.touched:
            session.outbox.touched = True
            self.touched.append(session)

    def close(self, session: Session, why: str, *, cut: bool = False) -> None:
        """Have the session closed once its outbox is written. cut: at once, written or not."""
        session.closing = session.closing or why
        session.cut = session.cut or cut
        self.touch(session)

    def drained(self, session: Session) -> None:
        """Say that the system took bytes of the session's outbox: who waits for room may try again."""
        if session.outbox.waiting <= session.outbox.limit // 2:
            # What was sent to a pool's name may go to any of its members.
            for member in session.client.sessions.values():
                self._release_waiters(member)

    def order(self, op: str, source: Session, id: int, arguments: dict[str, object]) -> None:
        """Pass on to the daemon what only it can do; it answers with reply_to or refuse."""
        self.orders.append(Order(op, source, id, arguments))

    def reconfigure(self, clients: Mapping[str, ClientConfig], limits: Limits, now_wall: float) -> list[Session]:
        """Take over a new configuration; return the sessions whose names are gone, for the caller to close.

        A subscription that its client's new rules do not allow ends.
        """
        self.limits = limits
        self.generation += 1
        known = self.exchange.clients
        gone = [session for name in known.keys() - clients.keys() for session in known.pop(name).sessions.values()]
        for name, config in clients.items():
            client = known.get(name)
            if client is None:
                known[name] = Client(config, now_wall)
            elif client.config != config:
                client.reconfigure(config)
                for session in client.sessions.values():
                    self._drop_forbidden(session)
        self.announce("$broker.reloaded", b"{}")
        return gone

    def _drop_forbidden(self, session: Session) -> None:
        for pattern, group in list(session.subscriptions):
            if session.client.policy.subscribing(pattern) is None:
                self.topics.discard(pattern, session, group)
                session.subscriptions.discard((pattern, group))

    def drain(self) -> None:
        """Take no new message from now on, and tell those who listen."""
        if not self.draining:
            self.draining = True
            self.generation += 1
            self.announce("$broker.draining", b"{}")
            # Who was held for room hears now that it is too late.
            for session in list(self._held):
                self._release(session)

    @property
    def holds_somebody(self) -> bool:
        """Whether any session is held."""
        return bool(self._held)

    @property
    def next_deadline(self) -> float | None:
        """When :meth:`tick` has something to do, in the time of ``now``; None while nobody is held."""
        return min(self._held.values(), default=None)

    def tick(self, now: float) -> None:
        """Release who has been held for as long as may be; the message it was held for is then refused."""
        for session in [session for session, deadline in self._held.items() if deadline <= now]:
            assert session.held_by is not None
            session.held_by.outbox.stalled = True
            self._release(session)

    def _hold(self, source: Session, target: Session, deadline: float) -> Verdict:
        source.held_by = target
        target.waiters[source] = None
        self._held[source] = deadline
        return Verdict.HOLD

    def _release(self, session: Session) -> None:
        if session.held_by is not None:
            del self._held[session], session.held_by.waiters[session]
            session.held_by = None
            self.released.append(session)

    def _release_waiters(self, target: Session) -> None:
        for sender in sorted(target.waiters, key=_held_since):
            self._release(sender)

    # One frame

    def handle(self, source: Session, frame: memoryview, now: float) -> Verdict:
        """Decide about one whole frame. frame: its body; it is only looked at, and copied where it is kept."""
        if self._reads_nothing(source):
            return self._until_it_reads(source)
        try:
            envelope, _ = split(frame)
        except MalformedEnvelope as error:
            return self.malformed(source, error.id, str(error))
        if not source.charged:
            source.messages_in += 1
            source.bytes_in += len(frame)
            source.charged = True
            meter = source.client.meter
            if meter is not None and not meter.allows(len(frame), now):
                source.charged = False
                return self._refused(source, envelope, ErrorCode.RATE_LIMITED, "more than the configured rate")
        verdict = self._dispatch(source, envelope, frame, now)
        if verdict is Verdict.NEXT or verdict is Verdict.CLOSE:
            source.charged = False
            source.hold_deadline = None
        return verdict

    def _reads_nothing(self, source: Session) -> bool:
        """Return whether so many outcomes of its messages wait that it may not send more of them."""
        return source.outbox.waiting > source.outbox.limit + OUTCOME_RESERVE

    def _until_it_reads(self, source: Session) -> Verdict:
        return self._hold(source, source, float("inf")) if source.outbox.blocked else Verdict.FLUSH

    def _dispatch(self, source: Session, envelope: Envelope, frame: memoryview, now: float) -> Verdict:
        if envelope.flags & _ACK or envelope.kind in (Kind.RECEIPT, Kind.ACK):
            message = "nothing sent here is stored, so nothing can be acknowledged"
            return self._refused(source, envelope, ErrorCode.UNSUPPORTED, message)
        refusal = self._expiry(source, envelope, now)
        if refusal is not None:
            return self._refused(source, envelope, *refusal)
        if envelope.kind is Kind.EVENT:
            return self._publish(source, envelope, frame, now)
        if not is_address(envelope.name):
            return self.malformed(source, envelope.id, f"{envelope.name!r} is no client name")
        if envelope.name.startswith("$"):
            return self._to_broker(source, envelope, frame)
        return self._send(source, envelope, frame, now)

    def _expiry(self, source: Session, envelope: Envelope, now: float) -> tuple[ErrorCode, str] | None:
        if envelope.extension is None or "ttl" not in envelope.extension:
            return None
        ttl = envelope.extension["ttl"]
        if isinstance(ttl, bool) or not isinstance(ttl, (int, float)):
            return ErrorCode.UNSUPPORTED, "ttl is a number of seconds"
        waited = 0.0 if source.hold_deadline is None else now - (source.hold_deadline - self.limits.wait_timeout)
        return (ErrorCode.EXPIRED, f"its ttl of {ttl} s is over") if waited >= ttl else None

    def _to_broker(self, source: Session, envelope: Envelope, frame: memoryview) -> Verdict:
        if envelope.name != BROKER:
            return self._refused(source, envelope, ErrorCode.NO_SUCH_CLIENT, f"there is no {envelope.name}")
        if envelope.kind is not Kind.REQUEST:
            return self._refused(source, envelope, ErrorCode.UNSUPPORTED, "the broker takes requests only")
        if envelope.flags & _RECEIPT:
            self.answer(source, Envelope(Kind.RECEIPT, envelope.id, BROKER))
        serve(self, source, envelope, bytes(frame[split(frame)[1] :]))
        return Verdict.NEXT

    def _send(self, source: Session, envelope: Envelope, frame: memoryview, now: float) -> Verdict:
        name, instance = split_address(envelope.name)
        id, kind = envelope.id, envelope.kind
        answered = source.owed.get((envelope.name, id)) if kind in (Kind.REPLY, Kind.ERROR) else None
        if answered is None and source.client.policy.sending(name) is None:
            return self._refused(source, envelope, ErrorCode.DENIED, f"{source.client.name} may not send to {name}")
        client = self.exchange.resolve(name)
        if client is None:
            return self._refused(source, envelope, ErrorCode.NO_SUCH_CLIENT, f"there is no client {name}")
        if self.draining and answered is None:
            return self._refused(source, envelope, ErrorCode.SHUTTING_DOWN, "the broker is shutting down")
        target = answered or (client.sessions.get(envelope.name) if instance else client.pick())
        if target is None:
            return self._refused(source, envelope, ErrorCode.OFFLINE, f"{envelope.name} is not connected")
        verdict = self._deliver(source, target, envelope, frame, now)
        if verdict is Verdict.CLOSE:
            message = f"{target.address} does not read; its queue of {target.outbox.limit} bytes is full"
            return self._refused(source, envelope, ErrorCode.FULL, message, target.address)
        if verdict is not Verdict.NEXT:
            return verdict
        if answered is not None:
            del source.owed[(envelope.name, id)]
            answered.asked.pop((id, source.address), None)
        if kind is Kind.MESSAGE and client.direct is target.outbox and not instance and source.client.meter is None:
            source.routes[envelope.name.encode()] = client
        return Verdict.NEXT

    def _deliver(self, source: Session, target: Session, envelope: Envelope, frame: memoryview, now: float) -> Verdict:
        """Put a frame into the target's outbox, or do what its ``when_full`` says. CLOSE: there is no room."""
        rest = frame[HEADER.size + len(envelope.name) :]
        size = 4 + HEADER.size + len(source.stamp) + len(rest)
        outbox = target.outbox
        if not outbox.reserve(size):
            if not outbox.blocked:
                self.touch(target)
                return Verdict.FLUSH
            verdict = self._make_room(source, target, size, now)
            if verdict is not Verdict.NEXT:
                return verdict
        wants_receipt = bool(envelope.flags & _RECEIPT)
        head = _head(source, envelope, size)
        if isinstance(outbox, FrameOutbox):
            pinned = "/" in envelope.name
            kept = envelope.kind in (Kind.REPLY, Kind.ERROR)
            whole = b"".join((head, rest))
            outbox.put(Queued(whole, receipt=wants_receipt, pinned=pinned, sender=source, kept=kept))
        else:
            outbox.tail += head
            outbox.tail += rest
            outbox.frames += 1
            outbox.size += size
        self.touch(target)
        source.reached.add(target.client)
        if envelope.kind is Kind.REQUEST:
            self._expect_answer(source, target, envelope.id)
        if wants_receipt:
            self.answer(source, Envelope(Kind.RECEIPT, envelope.id, BROKER))
        return Verdict.NEXT

    def _make_room(self, source: Session, target: Session, size: int, now: float) -> Verdict:
        """Do what ``when_full`` says. NEXT: there is room. HOLD: the source is held. CLOSE: there is none."""
        when_full = target.client.config.when_full
        outbox = target.outbox
        if when_full is WhenFull.WAIT and not outbox.stalled and not target.closing:
            if source.hold_deadline is None:
                source.hold_deadline = now + self.limits.wait_timeout
            if source.hold_deadline > now:
                return self._hold(source, target, source.hold_deadline)
            outbox.stalled = True
        elif when_full is WhenFull.DROP_OLDEST and isinstance(outbox, FrameOutbox):
            dropped = outbox.drop_oldest(size)
            for queued in dropped or ():
                self._tell_dropped(target, queued)
            if dropped is not None:
                return Verdict.NEXT
        elif when_full is WhenFull.DISCONNECT:
            self.close(target, "its queue is full and it does not read", cut=True)
        return Verdict.CLOSE

    def _tell_dropped(self, target: Session, queued: Queued) -> None:
        envelope, _ = split(memoryview(queued.frame)[4:])
        self.dropped += 1
        sender = self._sender_of(queued, envelope.name)
        if envelope.kind is Kind.REQUEST and sender is not None:
            target.owed.pop((envelope.name, envelope.id), None)
            sender.asked.pop((envelope.id, target.address), None)
        if sender is not None and (queued.receipt or envelope.kind is Kind.REQUEST):
            message = f"{target.address} does not read; the message made room for a newer one"
            self.refuse(sender, envelope.id, ErrorCode.FULL, message, target.address)

    def _expect_answer(self, requester: Session, responder: Session, id: int) -> None:
        responder.owed[(requester.address, id)] = requester
        requester.asked[(id, responder.address)] = responder

    # Events

    def _publish(self, source: Session, envelope: Envelope, frame: memoryview, now: float) -> Verdict:
        if envelope.name:
            return self.malformed(source, envelope.id, "an EVENT names no recipient")
        try:
            check_topic(envelope.topic)
        except InvalidName as error:
            return self.malformed(source, envelope.id, str(error))
        if source.client.policy.publishing(envelope.topic) is None:
            message = f"{source.client.name} may not publish on {envelope.topic}"
            return self._refused(source, envelope, ErrorCode.DENIED, message)
        if self.draining:
            return self._refused(source, envelope, ErrorCode.SHUTTING_DOWN, "the broker is shutting down")
        rest = frame[HEADER.size :]
        size = 4 + HEADER.size + len(source.stamp) + len(rest)
        targets = _choose(self.topics.find(envelope.topic), size)
        full = [target for target in targets if not target.outbox.reserve(size)]
        for target in full:
            if not target.outbox.blocked:
                for each in full:
                    self.touch(each)
                return Verdict.FLUSH
        left_out: set[Session] = set()
        for target in full:
            verdict = self._make_room(source, target, size, now)
            if verdict is Verdict.HOLD:
                return verdict
            if verdict is Verdict.CLOSE:
                left_out.add(target)
        self.dropped += len(left_out)
        if targets:
            whole = b"".join((_head(source, envelope, size), rest))
            for target in targets:
                if target not in left_out:
                    if isinstance(target.outbox, FrameOutbox):
                        target.outbox.put(Queued(whole))
                    else:
                        target.outbox.append(whole)
                    self.touch(target)
        if envelope.flags & _RECEIPT:
            self.answer(source, Envelope(Kind.RECEIPT, envelope.id, BROKER))
        elif source.client.meter is None:
            self._remember_fan(source, envelope.topic, targets)
        return Verdict.NEXT

    def _remember_fan(self, source: Session, topic: str, targets: list[Session]) -> None:
        """Let the routing loop pass on the next event on this topic by itself, where nobody has to be chosen."""
        outboxes = tuple(target.outbox for target in targets)
        plain = all(isinstance(outbox, StreamOutbox) for outbox in outboxes)
        if outboxes and plain and not self.topics.find(topic).groups:
            if len(source.fans) >= _REMEMBERED_FANS:
                source.fans.clear()
            source.fans[topic.encode()] = outboxes

    def _pass_on(self, target: Session, whole: bytes) -> None:
        target.outbox.append(whole)
        self.touch(target)

    def _announce(self, what: str, client: Client, now_wall: float) -> None:
        """Publish that a client came or went, to whoever may know of it."""
        payload = f'{{"name": "{client.name}", "since": {now_wall}}}'.encode()
        self.announce(f"$broker.{what}.{client.name}", payload, about=client.name)

    def announce(self, topic: str, payload: bytes, about: str | None = None) -> None:
        """Publish an event of the broker's own. about: a client; who may not send to it is not told."""
        whole = make_frame(encode(Envelope(Kind.EVENT, 0, BROKER, payload, codec=2, topic=topic)))
        found = self.topics.find(topic)
        for target in _choose(found if about is None else _who_may_see(found, about), len(whole)):
            if target.outbox.blocked and not target.outbox.reserve(len(whole), OUTCOME_RESERVE):
                # It asked to miss nothing and does not read: an end it can see is better than a gap it can't.
                self.close(target, "it asked for presence and does not read", cut=True)
                continue
            self._pass_on(target, whole)

    # Answers

    def answer(self, source: Session, envelope: Envelope) -> None:
        """Send the broker's own frame to a session."""
        if source.open:
            self._pass_on(source, make_frame(encode(envelope)))

    def refuse(self, source: Session, id: int, code: ErrorCode, message: str, name: str = "") -> None:
        """Send an ERROR. name: the recipient it is about."""
        self.refused[code] += 1
        source.errors_in += 1
        self.answer(source, Envelope(Kind.ERROR, id, BROKER, error_payload(code, message, name), codec=2))

    def malformed(self, source: Session, id: int, message: str) -> Verdict:
        """Answer a malformed frame; the connection ends once the answer is written."""
        self.refuse(source, id, ErrorCode.MALFORMED, message)
        self.close(source, "malformed")
        return Verdict.CLOSE

    def too_large(self, source: Session, id: int, name: str, size: int) -> Verdict:
        """Answer an oversized frame; with NEXT it is to be passed over. size: payload bytes it announced."""
        if self._reads_nothing(source):
            return self._until_it_reads(source)
        message = f"{size} bytes; at most {self.limits.max_message} are taken"
        self.refuse(source, id, ErrorCode.TOO_LARGE, message, name)
        return Verdict.NEXT

    def _refused(
        self, source: Session, envelope: Envelope, code: ErrorCode, message: str, name: str | None = None
    ) -> Verdict:
        """Send an ERROR about a frame. An ERROR that can't be delivered is not answered by another."""
        if envelope.kind is Kind.ERROR and not envelope.flags & _RECEIPT:
            self.dropped += 1
        else:
            self.refuse(source, envelope.id, code, message, envelope.name if name is None else name)
        return Verdict.NEXT


def _held_since(session: Session) -> float:
    """Return what sorts held sessions by how long their frame has waited, the longest first."""
    return float("inf") if session.hold_deadline is None else session.hold_deadline


def _head(source: Session, envelope: Envelope, size: int) -> bytes:
    """Return what precedes the untouched rest of a frame passed on: length, header, the sender's name."""
    header = HEADER.pack(envelope.kind, envelope.flags & ~_RECEIPT, envelope.codec, len(source.stamp), envelope.id)
    return b"".join((frame_prefix(size - 4), header, source.stamp))


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
        if not any(member in chosen for member in members):
            ordered = list(members)
            start = found.turn % len(ordered)
            chosen[min(ordered[start:] + ordered[:start], key=load)] = None
    return list(chosen)


def _who_may_see(found: Matches[Session], about: str) -> Matches[Session]:
    """Return those of the subscribers who may send to the client ``about``."""
    seen: Matches[Session] = Matches()
    # It comes and goes with the connections, so it can't be remembered with what was found.
    seen.turn = found.turn = found.turn + 1
    seen.everyone = {member: None for member in found.everyone if member.client.policy.sending(about) is not None}
    for group, members in found.groups.items():
        able = {member: None for member in members if member.client.policy.sending(about) is not None}
        if able:
            seen.groups[group] = able
    return seen
