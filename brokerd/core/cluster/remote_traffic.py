"""The way of frames between the links to other hosts and the broker's sessions.

At the origin, frames leave the outboxes of remote sessions for a link. At the owner, the
frames of a batch pass through the routing loop as if their senders were connected here:
what the owner decides is what it decides for its own clients.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from brokerd.core import routing
from brokerd.core.cluster.admission import Admission
from brokerd.core.cluster.messages import bytes_of
from brokerd.core.cluster.remote_frames import as_sent, walk
from brokerd.core.cluster.remote_outbox import RemoteOutbox
from brokerd.core.cluster.remote_sessions import (
    EVENTS,
    RemoteHost,
    RemoteSessions,
    instance_suffix,
)
from brokerd.core.cluster.seam import HostFacts, Interest, Name, Run
from brokerd.core.cluster.stored_events import StoredEvents
from brokerd.core.error_codes import BACK
from brokerd.core.reports import mark_orphaned
from brokerd.core.routing_result import RoutingResult
from brokerd.core.slow_path import handle_slow_path
from brokerd_client.errors import MalformedEnvelope
from brokerd_client.wire.envelope import (
    BROKER,
    CodecId,
    Envelope,
    ErrorCode,
    Kind,
    encode,
    error_payload,
    is_ttl,
    split,
)
from brokerd_client.wire.framing import frame as make_frame
from brokerd_client.wire.layout import ACK_FLAG, HEADER, RECEIPT_FLAG

if TYPE_CHECKING:
    from brokerd.core.broker import Broker
    from brokerd.core.cluster.cluster import Cluster
    from brokerd.core.exchange import Client
    from brokerd.core.session import Session

Bytes: TypeAlias = bytes | bytearray | memoryview

__all__ = ["RemoteConnection", "RemoteTraffic", "join_cluster"]

#: Slow-path frames of one remote sender that are handled per turn.
_TURN: Final = 64
#: Seconds until the news that a pool is free or busy is announced: many changes make one.
_FREE_S: Final = 0.02
_NAME: Final = BROKER.encode()
#: Codes that only a request ends with; without a request, it has had its outcome.
_OF_REQUESTS: Final = (ErrorCode.ABANDONED, ErrorCode.CANCELLED, BACK)


def join_cluster(broker: Broker, host: str, clock: Callable[[], float]) -> RemoteTraffic:
    """Open the broker to clients of other hosts; return what the links to them use.

    Args:
        broker: The broker of this host.
        host: The name of this host.
        clock: Returns the time of ``now``.
    """
    sessions = RemoteSessions(broker.exchange, host)
    traffic = RemoteTraffic(broker, sessions, clock)
    broker.events.elsewhere = traffic.stored_events
    broker.instance_suffix = instance_suffix(host)
    broker.delivery.remote = broker.reports.remote = sessions
    broker.traffic = broker.operations.traffic = broker.channels.traffic = traffic
    broker.mailboxes.on_patterns = traffic.change_patterns
    traffic.note_patterns(broker.mailboxes.patterns())
    return traffic


class Arrival:
    """A batch that has arrived.

    left: Its portions that are not consumed yet, and RECEIPTs that are not written yet.
    """

    __slots__ = ("host", "left", "number")

    def __init__(self, host: str, number: int) -> None:
        self.host = host
        self.number = number
        self.left = 1


class Portion:
    """Frames of one sender in a batch, as its client has sent them.

    groups: for an event, the groups that it is for; None for other frames.
    waited: seconds of their ttl that were over when they arrived.
    """

    __slots__ = ("arrival", "data", "groups", "position", "waited")

    def __init__(
        self,
        arrival: Arrival,
        data: bytearray,
        waited: float,
        groups: tuple[str, ...] | None = None,
    ) -> None:
        self.arrival = arrival
        arrival.left += 1
        self.data = data
        self.position = 0
        self.waited = waited
        self.groups = groups


class RemoteConnection:
    """The place of a connection in a session that stands for a client elsewhere.

    Attributes:
        session: The session.
        target: What its frames are for, as the other host reads it.
        number: That of the session in the order of all attaches and detaches.
        portions: Frames from there that are not consumed yet.
        groups: The groups that the event being handled is for.
        yields: Whether it waits for its next turn.
        is_over: Whether its client's connection has ended, and only these frames are left.
    """

    __slots__ = (
        "_traffic",
        "groups",
        "host",
        "is_over",
        "number",
        "portions",
        "session",
        "target",
        "yields",
    )

    #: It never waits for a socket.
    writing = False

    def __init__(self, traffic: RemoteTraffic, host: str, target: str, number: int) -> None:
        self._traffic = traffic
        self.number = number
        self.host = host
        self.target = target
        self.session: Session
        self.portions: deque[Portion] = deque()
        self.groups: tuple[str, ...] | None = None
        self.yields = self.is_over = False

    def write(self) -> None:
        """Offer the outbox to the link."""
        self._traffic.offer(self.session)

    def resume(self) -> None:
        """Handle the frames that were kept while the sender was held."""
        self._traffic.go_on(self.session)

    def add_reason(self) -> None:
        """Do nothing: the client does not learn why its remote session ends."""

    def close_soon(self) -> None:
        """Go on: the other host alone closes its clients' connections."""
        self._traffic.offer(self.session)

    def lost(self, reason: str) -> None:
        """Go on, for the same reason."""
        self._traffic.offer(self.session)

    def is_gone(self) -> str | None:
        """Return why its client has left; that is not known here."""
        return None


class RemoteTraffic:
    """Implements the seam (:class:`brokerd.core.cluster.seam.Remotes`).

    Attributes:
        cluster: The links; set before the first call.
        host: The name of this host.
        admission: Decides which host admits a name.
        stored_events: The events that mailboxes at other hosts store.
        write_touched: Writes the touched outboxes of this broker; the network layer sets it.
    """

    def __init__(
        self, broker: Broker, sessions: RemoteSessions, clock: Callable[[], float]
    ) -> None:
        self._broker = broker
        self._sessions = sessions
        self._clock = clock
        self.cluster: Cluster
        self.host = sessions.host
        self.admission = Admission(
            broker.exchange,
            broker.replies,
            sessions.host,
            lambda host, body: self.cluster.tell(host, body),
            lambda: self.cluster.settings.remote_timeout,
        )
        self.stored_events = StoredEvents(broker.exchange, sessions, broker.mailboxes.commits)
        self.write_touched: Callable[[], None] = lambda: None
        #: Senders whose frames are handled further in a later turn.
        self._yielding: list[Session] = []
        #: By sender with messages that are being stored: the batches that they came in.
        self._storing: dict[Session, list[Arrival]] = {}
        #: Outcomes for hosts that are lost, until the link takes them.
        self._left_outcomes: dict[str, list[Run]] = {}
        #: Clients whose pools have become free or busy, and when that is announced.
        self._changed: dict[Client, None] = {}
        self._announced_at: float | None = None
        #: How often each pattern is subscribed here, with its group or "".
        self._subscribed: Counter[tuple[str, str]] = Counter()

    # Another process

    @property
    def sessions(self) -> RemoteSessions:
        """The sessions that stand for clients of other hosts."""
        return self._sessions

    def take_all(self, host: str) -> Iterator[Run]:
        """Remove and yield all frames for a host; senders that are held stay held."""
        remote = self._sessions.hosts.get(host)
        for session in () if remote is None else list(remote.touched):
            outbox, now = session.outbox, self._clock()
            while outbox.waiting and isinstance(outbox, RemoteOutbox):
                self._broker.expire(session, now)
                yield from outbox.take(sys.maxsize, session.connection.target, now)

    def held_for(self, source: Session, now: float) -> float | None:
        """Return for how many more seconds a sender may be held; None without a limit."""
        deadline = self._broker.held.deadlines[source]
        return None if deadline == math.inf else deadline - now

    def route_later(self, sender: Session) -> None:
        """Handle the frames of a sender in the next turn."""
        if sender.connection.portions:
            sender.connection.yields = True
            self._yielding.append(sender)

    def take_over(self) -> None:
        """Count what clients here have subscribed to, and watch their pools."""
        for client in self._broker.exchange.clients.values():
            if client.flight is not None:
                client.flight.on_free_or_busy = self._note_free_or_busy
                self._sessions.reach(client)
                self._broker.requests.note_room(client)
            for session in client.sessions.values():
                for pattern, group in session.subscriptions:
                    if not pattern.startswith("$"):
                        self._subscribed[pattern, group or ""] += 1

    # Work of later turns

    @property
    def has_work(self) -> bool:
        """Whether :meth:`run` has something to do."""
        return bool(self._yielding) or (
            bool(self._storing) and any(not each.uncommitted for each in self._storing)
        )

    def run(self) -> None:
        """Handle frames of senders that have had their turn before."""
        yielding, self._yielding = self._yielding, []
        for session in yielding:
            if session.open:
                session.connection.yields = False
                self._route(session)
        for session in [each for each in self._storing if not each.uncommitted]:
            for arrival in self._storing.pop(session):
                self.count_down(arrival)
            if session.open and session.connection.is_over:
                self._end_sender(self._sessions.hosts[session.host], session, session.since)

    # At the origin

    def offer(self, session: Session) -> None:
        """Note that a session has frames or answers for its host."""
        host = self._sessions.hosts.get(session.host)
        # The other host alone closes connections there.
        session.closing, session.cut, session.closing_code = "", False, None
        if host is None:
            return
        if session.answers is not None:
            session.answers.touched = False
            if session.answers.content or session.answers.pieces():
                host.answering[session] = None
        outbox = session.outbox
        if outbox.waiting:
            host.touched[session] = None
        self.cluster.touch(session.host)
        if outbox.waiting * 2 > outbox.limit:
            self.cluster.pull(session.host, self._clock())
            # What the link has no room for waits as for a client that does not read.
            outbox.blocked = bool(outbox.waiting)

    def take_frames(self, host: str, room: int) -> Sequence[Run]:
        """Remove and return frames for a host, in the order of each outbox."""
        remote = self._sessions.hosts.get(host)
        if remote is None or not remote.touched:
            return ()
        runs: list[Run] = []
        now = self._clock()
        for session in list(remote.touched):
            outbox = session.outbox
            if outbox.timed:
                waiting = outbox.waiting
                self._broker.expire(session, now)
                if outbox.waiting != waiting:
                    self.cluster.needs_settling = True
            if room > 0 and isinstance(outbox, RemoteOutbox):
                taken = outbox.take(room, session.connection.target, now)
                room -= bytes_of(taken)
                runs += taken
            outbox.blocked = bool(outbox.waiting)
            if not outbox.blocked:
                remote.touched.pop(session, None)
            if session.waiters:
                self._broker.held.release_if_room(session, now)
                self.cluster.needs_settling = True
        return runs

    def conclude(self, host: str, runs: Sequence[Run], now: float) -> None:
        """Pass RECEIPTs and ERRORs of the owner's broker to their senders."""
        self.cluster.needs_settling = True
        for target, frames, _ in runs:
            sender = self._broker.exchange.identify(target)
            for start, end, kind, flags, _, message_id in walk(frames):
                refusal = None
                if kind == Kind.ERROR:
                    refusal = json.loads(bytes(frames[start + HEADER.size + len(_NAME) : end]))
                if flags & ACK_FLAG:
                    # The rules of the two hosts differ if no answer to an event is expected.
                    if not self.stored_events.answer(host, target, message_id, refusal) and refusal:
                        self._broker.reports.unheard[str(refusal.get("code"))] += 1
                elif refusal is not None and not self._end_request(
                    host, sender, target, message_id, refusal
                ):
                    continue
                elif sender is not None:
                    self._broker.replies.pass_on(sender, bytes(frames[start - 4 : end]))

    def _end_request(
        self,
        host: str,
        sender: Session | None,
        identity: str,
        message_id: int,
        refusal: dict[str, Any],
    ) -> bool:
        """End the request that an owner's ERROR is about, if any.

        Return whether its sender gets the ERROR: not if the request has had an outcome.
        """
        broker = self._broker
        code, name = str(refusal.get("code")), str(refusal.get("name")).partition("/")[0]
        if sender is not None:
            for request in sender.outgoing_requests.get(message_id, ()):
                if request.responder.host == host and request.responder.client.name == name:
                    break
            else:
                request = None
            if request is not None and code == BACK:
                self._sessions.reach(request.responder.client)
                broker.in_flight.give_back(request)
                return False
            if request is not None:
                broker.requests.end(request)
            if request is None:
                is_revoked = self._is_revoked(host, identity, message_id, name)
                if is_revoked or code in _OF_REQUESTS:
                    return False
            broker.replies.refused[code] += 1
            sender.errors_in += 1
            return True
        self._is_revoked(host, identity, message_id, name)
        broker.reports.unheard[code] += 1
        return False

    def _is_revoked(self, host: str, identity: str, message_id: int, name: str) -> bool:
        """Return whether the request had an outcome here before the owner's last word."""
        remote = self._sessions.hosts.get(host)
        target = None if remote is None else remote.targets.get(name)
        key = identity, message_id
        if target is None or key not in target.revoked:
            return False
        target.revoked.discard(key)
        return True

    def fail(
        self,
        host: str,
        target: str,
        frame: memoryview,
        code: ErrorCode,
        reason: str,
        now: float,
    ) -> None:
        """Report a frame that was not accepted, or of which that is not known."""
        self.cluster.needs_settling = True
        broker = self._broker
        ((_, _, kind, flags, sender_header, message_id),) = walk(frame)
        identity = sender_header.decode()
        name = target.partition("/")[0]
        sender = broker.exchange.identify(identity)
        if kind == Kind.EVENT:
            if flags & RECEIPT_FLAG:
                self.stored_events.fail(host, identity, message_id, code, reason)
            elif code is ErrorCode.TOO_LARGE and host in self._sessions.hosts:
                subscriber = self._sessions.hosts[host].subscriber
                broker.replies.drop(subscriber, identity, code, reason, message_id)
            return
        if flags & ACK_FLAG:
            return
        if kind == Kind.REPLY or kind == Kind.ERROR:
            self._fail_answer(host, target, message_id, identity, reason)
        if kind == Kind.REQUEST:
            if not self._end_outgoing(host, sender, message_id, name):
                self._is_revoked(host, identity, message_id, name)
                return
        elif kind == Kind.ERROR and not flags & RECEIPT_FLAG:
            broker.replies.dropped += 1
            return
        if sender is None:
            broker.replies.returned["lost"] += 1
            return
        broker.replies.refuse(
            sender, message_id, code, reason, target if kind == Kind.REPLY else name
        )

    def _end_outgoing(self, host: str, sender: Session | None, message_id: int, name: str) -> bool:
        """End a request to a client of a host; return False if it had its outcome."""
        if sender is not None:
            for request in sender.outgoing_requests.get(message_id, ()):
                if request.responder.host == host and request.responder.client.name == name:
                    self._broker.requests.end(request)
                    return True
        return False

    def _fail_answer(
        self, host: str, requester: str, message_id: int, answerer: str, reason: str
    ) -> None:
        """Tell a requester at a host that the answer to its request is lost."""
        remote = self._sessions.hosts.get(host)
        session = None if remote is None else remote.senders.get(requester)
        if session is not None and session.open:
            message = f"the answer of {answerer.partition('/')[0]} is lost: {reason}"
            self._broker.replies.refuse(
                session, message_id, ErrorCode.ABANDONED, message, answerer.partition("/")[0]
            )

    # At the owner

    def deliver(self, host: str, batch: int, runs: Sequence[Run], now: float) -> None:
        """Pass the frames of a batch through the routing loop, each for its sender."""
        remote = self._sessions.hosts.get(host)
        arrival = Arrival(host, batch)
        if remote is not None:
            try:
                self._deliver_runs(remote, arrival, runs)
            except ValueError as error:
                # The rest of the batch can't be read; its host hears no outcome of it.
                reason = f"a batch that can't be read: {error}"
                self.cluster.needs_settling = True
                self._broker.replies.drop(remote.subscriber, host, ErrorCode.MALFORMED, reason)
        self.count_down(arrival)

    def _deliver_runs(self, remote: RemoteHost, arrival: Arrival, runs: Sequence[Run]) -> None:
        buffers: dict[bytes, bytearray] = {}
        waited = 0.0
        for target, frames, ttl_ms in runs:
            waited_before, waited = waited, _waited(frames, ttl_ms) if ttl_ms else 0.0
            if waited != waited_before:
                self._deliver_sorted(remote, arrival, buffers, waited_before)
            if target[:1] == EVENTS:
                self._deliver_events(remote, arrival, target, frames, waited)
            else:
                self._sort(target, frames, buffers)
        self._deliver_sorted(remote, arrival, buffers, waited)

    def _deliver_sorted(
        self, remote: RemoteHost, arrival: Arrival, buffers: dict[bytes, bytearray], waited: float
    ) -> None:
        """Deliver the frames in the buffers of their senders, and clear these."""
        for sender, sent in buffers.items():
            self._deliver_from(remote, arrival, sender.decode("ascii", "replace"), sent, waited)
        buffers.clear()

    def _sort(self, target: str, frames: Bytes, buffers: dict[bytes, bytearray]) -> None:
        """Sort the frames for a target by their senders, in the form that these sent."""
        recipient = target.encode()
        if "/" in target:
            session = self._broker.exchange.identify(target)
            if session is not None:
                recipient = session.sender_header
        position, end = 0, len(frames)
        while position < end:
            position = routing.sort_frames(frames, position, recipient, buffers)
            if position < end:
                # A requester's host has ended a request.
                _, stop, _, _, sender, message_id = next(walk(frames[position:]))
                buffers.setdefault(sender, bytearray()).extend(_cancel(message_id))
                position += stop

    def _deliver_from(
        self,
        remote: RemoteHost,
        arrival: Arrival,
        identity: str,
        frames: bytearray,
        waited: float,
    ) -> None:
        """Deliver the frames of one sender."""
        session = self._sessions.sender_of(remote, identity)
        if session is None:
            for _, _, _, _, name, message_id in walk(frames):
                self.refuse_unknown(remote, identity, message_id, name.decode("ascii", "replace"))
            return
        if len(remote.by_name[session.client.name]) > session.client.config.connections:
            self._end_earlier(remote, session)
        session.connection.portions.append(Portion(arrival, frames, waited))
        self._begin(session)

    def _deliver_events(
        self, remote: RemoteHost, arrival: Arrival, target: str, frames: Bytes, waited: float
    ) -> None:
        """Deliver events of several senders to the subscribers here."""
        groups = tuple(filter(None, target[1:].split(",")))
        publishers: dict[Session, None] = {}
        for start, end, _, _, sender, message_id in walk(frames):
            identity = sender.decode("ascii", "replace")
            session = self._sessions.sender_of(remote, identity, publishes=True)
            if session is None:
                self.refuse_unknown(remote, identity, message_id, "", flags=ACK_FLAG)
                continue
            portion = self._portion(session, arrival, groups, waited)
            portion.data += as_sent(frames, start, end, b"")
            publishers[session] = None
        for session in publishers:
            self._begin(session)

    def _begin(self, session: Session) -> None:
        """Route the portions of a sender, unless earlier ones wait."""
        if session.held_by is None and not session.connection.yields:
            self._route(session)

    def _portion(
        self, session: Session, arrival: Arrival, groups: tuple[str, ...], waited: float
    ) -> Portion:
        """Return where to add an event of a sender."""
        portions: deque[Portion] = session.connection.portions
        if portions:
            last = portions[-1]
            if last.arrival is arrival and (last.groups, last.waited) == (groups, waited):
                return last
        portions.append(Portion(arrival, bytearray(), waited, groups))
        return portions[-1]

    def count_down(self, arrival: Arrival) -> None:
        """Note that one more frame or portion of a batch is consumed."""
        arrival.left -= 1
        if not arrival.left:
            self.cluster.done(arrival.host, arrival.number)

    def go_on(self, session: Session) -> None:
        """Handle the frames of a sender that is not held any more."""
        if session.open and not session.connection.yields:
            self._route(session)

    def _route(self, session: Session) -> None:
        """Pass the frames of a sender through the routing loop, as far as they can go."""
        broker, connection = self._broker, session.connection
        portions: deque[Portion] = connection.portions
        while portions:
            portion = portions[0]
            feed = routing.feed if portion.groups is None else handle_slow_path
            connection.groups = portion.groups
            view = memoryview(portion.data)
            end = len(view)
            # So their ttl began when their host got them.
            now = self._clock() - portion.waited
            broker.turn.budget = _TURN
            result = RoutingResult.CONSUMED
            while portion.position < end:
                portion.position, result = feed(broker, session, view, portion.position, end, now)
                if result is RoutingResult.FLUSH:
                    self.write_touched()
                elif result is RoutingResult.BLOCKED or result is RoutingResult.YIELD:
                    break
            if broker.turn.budget != _TURN:
                # Frames have left the routing loop.
                self.cluster.needs_settling = True
            broker.turn.budget = -1
            if result is RoutingResult.YIELD:
                connection.yields = True
                self._yielding.append(session)
            if portion.position < end:
                return
            portions.popleft()
            if session.uncommitted:
                # The outcomes of messages that are being stored come with the commit.
                self._storing.setdefault(session, []).append(portion.arrival)
            else:
                self.count_down(portion.arrival)
        if connection.is_over:
            self._end_sender(self._sessions.hosts[session.host], session, session.since)

    def refuse_unknown(
        self, remote: RemoteHost, identity: str, message_id: int, target: str, *, flags: int = 0
    ) -> None:
        """Refuse a frame whose sender is not configured here, or is not of that host."""
        self.cluster.needs_settling = True
        reason = f"host {self._sessions.host} knows no client {identity} at host {remote.name}"
        self._refuse(remote, identity, message_id, target, ErrorCode.DENIED, reason, flags=flags)

    def _refuse(
        self,
        remote: RemoteHost,
        identity: str,
        message_id: int,
        target: str,
        code: ErrorCode,
        reason: str,
        *,
        flags: int = 0,
    ) -> None:
        """Send an ERROR to a sender that has no session here.

        flags: ACK for the answer to an event.
        """
        self._broker.replies.refused[code] += 1
        self._broker.replies.log_events.note(
            "message.refused", remote.subscriber, target, code, reason
        )
        payload = error_payload(code, reason, target)
        refusal = Envelope(Kind.ERROR, message_id, BROKER, payload, codec=CodecId.JSON, flags=flags)
        remote.refusals.append(Run(identity, make_frame(encode(refusal))))
        self.cluster.touch(remote.name)

    def take_outcomes(self, host: str) -> Sequence[Run]:
        """Remove and return the broker's own answers to the frames of a host."""
        if self._broker.touched:
            # The answers to frames that have been handled in this turn are among them.
            self.write_touched()
        remote = self._sessions.hosts.get(host)
        runs = self._left_outcomes.pop(host, [])
        if remote is None:
            return runs
        if remote.refusals:
            runs += remote.refusals
            remote.refusals.clear()
        while remote.answering:
            session = next(iter(remote.answering))
            del remote.answering[session]
            runs += self._answers_of(session)
        return runs

    def _answers_of(self, session: Session) -> Iterator[Run]:
        """Remove and yield the broker's own answers to one sender."""
        answers = session.answers
        assert answers is not None
        while pieces := answers.pieces():
            frames = bytes(pieces[0])
            pieces.clear()
            answers.sent(len(frames))
            yield Run(session.connection.target, frames)

    # Hosts and what they announce

    def host_up(self, facts: HostFacts, now_wall: float) -> None:
        """Begin with a host."""
        if facts.host not in self._sessions.hosts:
            self._sessions.hosts[facts.host] = RemoteHost(facts.host, now_wall, self._connect)
        self._sessions.hosts[facts.host].addresses = facts.addresses

    def _connect(self, host: str, target: str) -> RemoteConnection:
        return RemoteConnection(self, host, target, self._broker.take_number())

    def host_down(self, host: str, reason: str, now_wall: float) -> None:
        """End the remote sessions, names and interests of a host."""
        remote = self._sessions.hosts.get(host)
        if remote is None:
            return
        for target in remote.targets.values():
            target.client.remove_remote(host)
        for session in list(remote.touched):
            self._fail_waiting(session, reason)
        remote.touched.clear()
        for sender in remote.senders.values():
            self._refuse_portions(remote, sender, ErrorCode.OFFLINE, "the hosts lost each other")
        self._left_outcomes[host] = [*self.take_outcomes(host)]
        del self._sessions.hosts[host]
        if self._sessions.is_suspended:
            # They are not in the tree.
            remote.subscriber.subscriptions.clear()
        for sender in remote.senders.values():
            # Its target reports them, once.
            sender.incoming_requests = {}
            self._forget_stored(sender)
        for session in remote.sessions():
            self._broker.detach(session, now_wall)
        for name in remote.names:
            client = self._broker.exchange.resolve(name)
            if client is not None and host in client.hosts:
                self._broker.note_presence(client, host, None, now_wall)

    def _forget_stored(self, sender: Session) -> None:
        """Forget the batches of a sender that ends while its messages are being stored.

        Their outcomes have no way back. So their host learns that they are in doubt.
        """
        for arrival in self._storing.pop(sender, ()):
            self.cluster.forget(arrival.host, arrival.number)

    def _refuse_portions(
        self, remote: RemoteHost, session: Session, code: ErrorCode, reason: str
    ) -> None:
        """Refuse the frames of a sender that were not handled."""
        portions: deque[Portion] = session.connection.portions
        while portions:
            portion = portions.popleft()
            rest = memoryview(portion.data)[portion.position :]
            for _, _, kind, flags, name, message_id in walk(rest):
                is_event = kind == Kind.EVENT
                if name != _NAME and (not is_event or flags & RECEIPT_FLAG):
                    self._refuse(
                        remote,
                        session.identity.decode(),
                        message_id,
                        name.decode(),
                        code,
                        reason,
                        flags=ACK_FLAG if is_event else 0,
                    )
            self.count_down(portion.arrival)

    def suspend(self, reason: str) -> None:
        """Refuse frames for other hosts until ``resume_hosts``."""
        self._sessions.is_suspended = True
        for host in self._sessions.hosts.values():
            for pattern, group in host.subscriber.subscriptions:
                # Events are not kept until NATS is back.
                self._broker.topics.discard(pattern, host.subscriber, group)
            for target in host.targets.values():
                target.client.remove_remote(host.name)
                target.own_route().direct = None
            for session in host.touched:
                self._fail_waiting(session, reason)
            host.touched.clear()

    def _fail_waiting(self, session: Session, reason: str) -> None:
        """Refuse the frames in an outbox as ``offline``, and release the held senders."""
        outbox, now = session.outbox, self._clock()
        assert isinstance(outbox, RemoteOutbox), "a remote session has one"
        for target, frames, _ in outbox.take(sys.maxsize, session.connection.target, now):
            for start, end, *_ in walk(frames):
                frame = memoryview(frames)[start - 4 : end]
                self.fail(session.host, target, frame, ErrorCode.OFFLINE, reason, now)
        outbox.blocked = False
        self._broker.held.release_if_room(session, now)

    def resume(self) -> None:
        """Accept frames for other hosts again."""
        self._sessions.is_suspended = False
        self._sessions.largest_frame = self.cluster.largest_frame
        self._sessions.max_payload = self.cluster.max_payload
        for host in self._sessions.hosts.values():
            for pattern, group in host.subscriber.subscriptions:
                self._broker.topics.add(pattern, host.subscriber, group)
            for target in host.targets.values():
                target.own_route().direct = target.outbox
                if host.name in target.client.hosts and host.name not in target.client.remotes:
                    target.client.add_remote(target)

    def names_changed(self, host: str, names: Sequence[Name], now_wall: float) -> None:
        """Take over new states of names at a host."""
        remote = self._sessions.hosts.get(host)
        if remote is None:
            return
        for name in names:
            if name.is_gone:
                remote.names.pop(name.name, None)
            else:
                remote.names[name.name] = name
            client = self._broker.exchange.resolve(name.name)
            if client is not None:
                self._apply_name(remote, client, name, now_wall)

    def _apply_name(self, remote: RemoteHost, client: Client, name: Name, now_wall: float) -> None:
        """Make a client reachable at a host, or unreachable."""
        since = name.since if name.connections else None
        if since is not None:
            remote.note_free(client)
        self._broker.note_presence(client, remote.name, since, now_wall)
        if since is not None and client.sessions:
            self.admission.note_other(client, remote.name, since)
        if since is not None and (client.flight or client.remotes):
            # Requests may wait for it.
            self._sessions.reach(client)
            self._broker.requests.note_room(client)
            if client.flight is not None:
                is_wanted = name.free and client.flight.waits_for_any
                client.flight.returnable = name.connections if is_wanted else 0
        if since is None:
            for sender in list(remote.by_name.get(client.name, ())):
                self._end_sender(remote, sender, now_wall)
        if since is None and remote.name in client.remotes:
            client.remove_remote(remote.name)
            self._broker.in_flight.leave(remote.target(client))

    def _end_earlier(self, remote: RemoteHost, session: Session) -> None:
        """End earlier senders of a client, if it can't have as many connections."""
        same_name = remote.by_name[session.client.name]
        surplus = len(same_name) - session.client.config.connections
        for earlier in same_name[: min(surplus, same_name.index(session))]:
            self._end_sender(remote, earlier, session.since)

    def _end_sender(self, remote: RemoteHost, sender: Session, now_wall: float) -> None:
        """End a sender whose connection has ended, once its frames have their outcomes."""
        if sender.connection.portions or sender.uncommitted:
            sender.connection.is_over = True
            return
        # The link takes the answers that are there.
        self._left_outcomes.setdefault(remote.name, []).extend(self._answers_of(sender))
        self.cluster.touch(remote.name)
        remote.remove_sender(sender)
        self._broker.detach(sender, now_wall)

    def displace(self, address: str) -> None:
        """Mark what a sender at another host has sent: its address is a connection's here now.

        That connection then hears nothing about it. The other host may be gone already.
        """
        sender = self._sessions.find(address)
        if sender is not None:
            mark_orphaned(sender)

    def add_client(self, client: Client, now_wall: float) -> None:
        """Take over what hosts have announced of a client that is configured now."""
        for remote in self._sessions.hosts.values():
            name = remote.names.get(client.name)
            if name is not None:
                self._apply_name(remote, client, name, now_wall)

    def remove_client(self, client: Client, now_wall: float) -> None:
        """End the remote sessions of a client that is not configured any more."""
        self.stored_events.remove(client)
        for remote in self._sessions.hosts.values():
            client.remove_remote(remote.name)
            target = remote.targets.pop(client.name, None)
            senders = list(remote.by_name.get(client.name, ()))
            for session in senders if target is None else (target, *senders):
                reason = f"host {self._sessions.host} knows no client {client.name} any more"
                self._refuse_portions(remote, session, ErrorCode.DENIED, reason)
                if session is target:
                    remote.touched.pop(session, None)
                else:
                    remote.remove_sender(session)
                self._broker.detach(session, now_wall)

    def interests_changed(self, host: str, interests: Sequence[Interest]) -> None:
        """Take over new states of interests of a host."""
        remote = self._sessions.hosts.get(host)
        if remote is None:
            return
        subscriber, topics = remote.subscriber, self._broker.topics
        for interest in interests:
            group = interest.group or None
            key = interest.pattern, group
            if interest.on and not interest.pattern.startswith("$"):
                if not self._sessions.is_suspended:
                    topics.add(interest.pattern, subscriber, group)
                subscriber.subscriptions.add(key)
            elif key in subscriber.subscriptions:
                topics.discard(interest.pattern, subscriber, group)
                subscriber.subscriptions.discard(key)

    def told(self, host: str, body: dict[str, Any], now: float) -> None:
        """Take a question or an answer about a name that may have one connection."""
        self.admission.told(host, body)

    def show_hosts(self) -> dict[str, Any]:
        """Return what is known of this host and of all others, for operators."""
        cluster = self.cluster
        return {
            "host": self.host,
            "boot_id": cluster.settings.boot_id,
            "digest": cluster.settings.digest,
            "conflict": cluster.conflict,
            "nats": {"connected": cluster.is_connected, "max_payload": cluster.max_payload},
            "hosts": [{"name": each["host"], **each} for each in cluster.hosts(self._clock())],
        }

    def addresses_of(self, host: str) -> tuple[str, ...]:
        """Return where clients can connect to a host; () if that is not known."""
        remote = self._sessions.hosts.get(host)
        return () if remote is None else remote.addresses

    # What this host announces

    def own_names(self) -> Iterator[Name]:
        """Yield the names with connections here."""
        for client in self._broker.exchange.clients.values():
            if client.sessions or client.mailbox is not None:
                yield self._name(client)

    def announce_name(self, client: Client) -> None:
        """Announce how many connections a client has here."""
        if client.flight is not None:
            client.flight.on_free_or_busy = self._note_free_or_busy
        self.cluster.announce(self._name(client))

    def _note_free_or_busy(self, client: Client) -> None:
        """Note that a pool has become free or busy; it is announced in a moment."""
        self._changed[client] = None
        if self._announced_at is None:
            self._announced_at = self._clock() + _FREE_S

    @property
    def next_deadline(self) -> float | None:
        """When :meth:`tick` is due; None if nothing is to be announced."""
        return self._announced_at

    def tick(self, now: float) -> None:
        """Announce the pools that have become free or busy."""
        if self._announced_at is not None and self._announced_at <= now:
            self._announced_at = None
            changed, self._changed = self._changed, {}
            for client in changed:
                self.cluster.announce(self._name(client))

    def _name(self, client: Client) -> Name:
        oldest = next(iter(client.sessions.values()), None)
        since = client.changed_at if oldest is None else oldest.since
        free = client.flight is None or client.flight.has_free_member
        return Name(client.name, len(client.sessions), since, free, client.mailbox is not None)

    def own_interests(self) -> Iterator[Interest]:
        """Yield the patterns that clients here have subscribed."""
        for pattern, group in self._subscribed:
            yield Interest(pattern, group)

    def subscribed(self, pattern: str, group: str | None) -> None:
        """Note a subscription of a client here; announce the first with its pattern."""
        key = pattern, group or ""
        if not pattern.startswith("$"):
            self._subscribed[key] += 1
            if self._subscribed[key] == 1:
                self.cluster.announce_interest(Interest(*key))

    def note_patterns(self, patterns: Iterable[str]) -> None:
        """Note the patterns of the mailboxes here, before the links are there."""
        self._subscribed.update((pattern, "") for pattern in patterns)

    def change_patterns(self, before: tuple[str, ...], after: tuple[str, ...]) -> None:
        """Note that a mailbox here stores events on other topics."""
        for pattern in after:
            self.subscribed(pattern, None)
        for pattern in before:
            self.unsubscribed(pattern, None)

    def unsubscribed(self, pattern: str, group: str | None) -> None:
        """Note the end of a subscription; announce the end of the last."""
        key = pattern, group or ""
        if key in self._subscribed:
            self._subscribed[key] -= 1
            if not self._subscribed[key]:
                del self._subscribed[key]
                self.cluster.announce_interest(Interest(*key, on=False))


def _waited(frames: Bytes, ttl_ms: int) -> float:
    """Return the seconds of a run's ttl that are over. ttl_ms: what is left of it."""
    start, end, *_ = next(walk(frames))
    # A frame that can't be read is the routing loop's.
    with contextlib.suppress(MalformedEnvelope):
        extension = split(memoryview(frames)[start:end])[0].extension or {}
        if is_ttl(extension.get("ttl")):
            return max(0.0, float(extension["ttl"]) - ttl_ms / 1000)
    return 0.0


def _cancel(message_id: int) -> bytes:
    """Return the frame by which a requester cancels a request."""
    payload = error_payload(ErrorCode.CANCELLED, "the requester's host ended it", BROKER)
    return make_frame(encode(Envelope(Kind.ERROR, message_id, BROKER, payload, codec=CodecId.JSON)))
