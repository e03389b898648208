"""The broker's whole state as plain values and bytes: captured and restored.

A new process takes over with it from an old process. It contains names, counters,
subscriptions, unanswered requests, held senders and every queued byte. Nothing here
touches a connection or makes a decision. The captured facts fit into JSON. The bytes
are in ``pieces``, in the order in which ``restore`` takes them.

The rules are those of a reload: restoring under another configuration does what
:meth:`Broker.reconfigure` would. The form is FORMAT of :mod:`brokerd.upgrade.channel`;
a change here needs a change there.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import inf
from typing import Any, Final, NamedTuple, TypeAlias

from brokerd.config.values import ClientConfig, RateConfig, Source, WhenConnected, WhenFull
from brokerd.core.allowance import Allowance
from brokerd.core.broker import Broker
from brokerd.core.cluster import hand_over as cluster_hand_over
from brokerd.core.deferred import Job
from brokerd.core.events import Announcement
from brokerd.core.exchange import Client
from brokerd.core.flight import WaitingRequest
from brokerd.core.mailboxes import snapshot as mailboxes_snapshot
from brokerd.core.operations import Question
from brokerd.core.outbox import FrameOutbox, Queued, StreamOutbox
from brokerd.core.precopy import KEPT, ORPHANED, PINNED, RECEIPT, Copier, Copies, flags_of
from brokerd.core.requests import DeliveredRequest
from brokerd.core.session import Session
from brokerd.core.snapshot_check import (
    BadSnapshot,
    check,
    check_clients,
    check_frames,
    check_idle,
    marked_places,
)
from brokerd.core.undelivered import Unsent

__all__ = [
    "BadSnapshot",
    "Facts",
    "Pieces",
    "Restored",
    "Snapshot",
    "adapt",
    "capture",
    "capture_clients",
    "capture_idle",
    "restore",
    "restore_clients",
    "restore_idle",
]

Facts: TypeAlias = dict[str, Any]

#: Clients per block: a millisecond's work.
_CLIENTS: Final = 500
#: What is left, in seconds, to a request without a ttl among others with its id that have
#: one.
_NEVER: Final = 2.0**33


class Snapshot:
    """Facts, and the bytes that belong to them.

    sessions: the open sessions that the facts contain whole, in the same order. All other
    sessions were copied before, and at most their counters have changed.
    position: that of the session that asked for the capture, if any.
    """

    def __init__(self) -> None:
        self.sessions: list[Session] = []
        self.position: int | None = None
        self.facts: Facts = {}
        self.pieces: list[bytes | bytearray | memoryview] = []


class Restored(NamedTuple):
    """The restored sessions.

    Attributes:
        sessions: Those in the facts, by position.
        unconfigured_sessions: Those that were copied, and whose names are not
            configured.
    """

    sessions: list[Session]
    unconfigured_sessions: list[Session]


class Pieces:
    """The bytes of a snapshot, returned in the order in which they were captured."""

    def __init__(self, body: bytes | bytearray | memoryview) -> None:
        self._rest = memoryview(body)

    def take(self, size: int) -> memoryview:
        """Return the next ``size`` bytes. Raises BadSnapshot if fewer are left."""
        if not 0 <= size <= len(self._rest):
            raise BadSnapshot(f"{size} bytes are wanted where {len(self._rest)} are left")
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece

    def __len__(self) -> int:
        return len(self._rest)


# Capture


class _Index(dict[Session, int]):
    """The positions of the sessions in the facts.

    A session that was copied gets a position when it is first referred to.
    """

    def __init__(self, sessions: Iterable[Session], copier: Copier) -> None:
        super().__init__((session, position) for position, session in enumerate(sessions))
        self._copier = copier
        self.copied: list[int] = []

    def __missing__(self, session: Session) -> int:
        if not self._copier.is_copied(session):
            raise KeyError(session)
        self[session] = position = len(self)
        self.copied.append(session.number)
        return position

    def __contains__(self, session: object) -> bool:
        return super().__contains__(session) or (
            isinstance(session, Session) and self._copier.is_copied(session)
        )


def capture(
    broker: Broker,
    sessions: Iterable[Session],
    now: float,
    copier: Copier | None = None,
    asker: Session | None = None,
) -> Snapshot:
    """Return a snapshot of the broker, which is not changed.

    All decisions must have been carried out: the broker has no touched or released
    sessions and no admin commands left.

    Args:
        broker: the broker to capture.
        sessions: all open sessions that may differ from their copies or have none, in
            the order in which they connected.
        now: as for ``handle``; times are captured in seconds relative to it.
        copier: state that it has copied is left out.
        asker: the session that asked for the capture, if any.
    """
    settled = not (broker.touched or broker.held.released or broker.operations.admin_commands)
    assert settled, "what is decided is carried out first"
    snapshot = Snapshot()
    copier = copier or Copier(broker)
    leaving = broker.reports.closed_sessions()
    captured, counts = snapshot.sessions, []
    for session in sessions:
        counters = copier.counted(session)
        if counters is None:
            captured.append(session)
        elif counters:
            counts.append([session.number, *counters])
    index = _Index([*captured, *(session for session, _ in leaving)], copier)
    indexed_sessions = list(index)
    facts: Facts = {
        "started_at": broker.status.started_at,
        "upgrades": broker.status.upgrades,
        "next_number": broker.take_number(),
        "dropped": broker.replies.dropped,
        "refused": dict(broker.replies.refused),
        "totals": dict(broker.status.totals),
        "given_back": dict(broker.replies.returned),
        "deferred": [_job(job, index) for job in broker.deferred.jobs if not _is_void(job)],
        "clients": {
            client.name: _client(client, now)
            for client in copier.changed_clients()
            if not copier.is_client_as_copied(client)
        },
        "sessions": [_session(broker, session, index, now, copier) for session in indexed_sessions],
        "outboxes": [_outbox(session, index, snapshot, now, copier) for session in captured],
        "counts": counts,
        "gone": copier.take_left(),
        "held": [
            [
                index[session],
                index[_holder(session)],
                None if deadline == float("inf") else deadline - now,
            ]
            for session, deadline in broker.held.deadlines.items()
            if not (session.host or _holder(session).host)
        ],
        "leaving": [
            [index[session], _queue(queue, index, snapshot), _timed(queue, now)]
            for session, queue in leaving
        ],
        "cluster": None
        if broker.traffic is None
        else cluster_hand_over.capture(broker.traffic, index, snapshot.pieces, now),
        "waiting": _waiting(broker, index, snapshot, now),
        "retained": [
            [
                index[session],
                request.requester.address,
                request.id,
                *_frame(queued, index, snapshot, now),
            ]
            for session in captured
            for request, queued in _kept_requests(session)
        ],
        "mailboxes": mailboxes_snapshot.capture(broker.mailboxes, index, snapshot.pieces),
        "incidents": copier.take_incidents(),
        "taps": [[index[session], *values] for session, values in broker.taps.capture()],
        "returning": [broker.returning.names(), broker.returning.until - now],
    }
    if asker is not None:
        snapshot.position = index[asker]
    facts["sessions"] += index.copied
    snapshot.facts = facts
    return snapshot


def capture_idle(broker: Broker, session: Session, now: float, copier: Copier) -> Facts | None:
    """Return the facts of an idle session, to copy early; None if it is busy or copied
    already.
    """
    if copier.is_as_copied(session) or not copier.is_idle(session):
        return None
    if broker.exchange.resolve(session.client.name) is not session.client or session.retired:
        return None
    client = session.client
    facts = {
        "session": _session(broker, session, {}, now, copier),
        "outbox": _outbox(session, {}, Snapshot(), now, Copier(broker)),
        "client": None if copier.is_client_as_copied(client) else _client(client, now),
    }
    copier.note_idle(session)
    copier.note_client_copied(client)
    return facts


def capture_clients(broker: Broker, now: float, copier: Copier) -> Iterator[Facts]:
    """Yield the facts of changed clients in blocks; they may change between two blocks."""
    changed = iter(copier.changed_clients())
    while clients := list(itertools.islice(changed, _CLIENTS)):
        facts = {
            client.name: _client(client, now)
            for client in clients
            if not copier.is_client_as_copied(client)
        }
        for client in clients:
            copier.note_client_copied(client)
        if facts or not copier.has_copied_start:
            copier.has_copied_start = True
            yield {"started_at": broker.status.started_at, "clients": facts}


def _is_void(job: Job) -> bool:
    return isinstance(job, Question) and not job.source.open


def _job(job: Job, index: Mapping[Session, int]) -> Facts:
    if isinstance(job, Question):
        return {"question": [index[job.source], job.id, job.op], "news": None}
    assert isinstance(job, Announcement)
    presence = None if job.client is None else [job.client.name, job.online, job.since]
    recipients = [index[session] for session in job.served if session.open]
    return {"question": None, "news": [job.topic, job.payload, job.about, presence, recipients]}


def _holder(session: Session) -> Session:
    assert session.held_by is not None
    return session.held_by


def _client(client: Client, now: float) -> Facts:
    rate = client.config.rate
    return {
        "changed_at": client.changed_at,
        "shown": [client.shown_online, client.shown_since],
        "turn": client.turn,
        "rate": [rate.messages, rate.bytes],
        "levels": client.meter and client.meter.levels(now),
    }


def _kept_requests(session: Session) -> Iterator[tuple[DeliveredRequest, Queued]]:
    """Yield the requests to a session whose frames are kept, with these.

    Of several requests with one id, all are yielded, the oldest first, or none.
    """
    requests = session.incoming_requests.values()
    lost = {
        request.key[:2] for request in requests if request.kept is None or request.requester.host
    }
    for request in sorted(requests, key=lambda request: request.key[2:]):
        queued = request.queued()
        if queued is not None and request.key[:2] not in lost:
            yield request, queued


def _session(
    broker: Broker, session: Session, index: Mapping[Session, int], now: float, copier: Copier
) -> Facts:
    added, ended = copier.changes(session)
    client = broker.exchange.resolve(session.client.name)
    requests = [
        request
        for same_id in session.outgoing_requests.values()
        for request in same_id
        if request.responder in index
    ]
    # Of several requests with one id and responder, all have a row, or none.
    timed = {
        (request.id, request.responder.address)
        for request in requests
        if request.deadline is not None
    }
    return {
        "name": session.client.name,
        "instance": session.instance,
        "address": session.address,
        # A retired session has left its client, whose name may belong to another one.
        "configured": client is session.client and not session.retired,
        "peer": session.peer,
        "since": session.since,
        "number": session.number,
        "left_at": session.closed_number,
        "skip": session.bytes_to_skip,
        "charged": session.charged,
        "waited_s": now - session.arrived if session.charged else 0.0,
        "hold_s": None if session.hold_deadline is None else session.hold_deadline - now,
        "closing": session.closing,
        "slow": session.slow,
        "allowance": session.allowance
        and [session.allowance.used, now - session.allowance.at, session.allowance.holding],
        "goaway": session.goaway,
        "cancels": session.cancels,
        "listens": session.listens,
        "in_flight": session.in_flight,
        "revoked": [[address, message_id] for address, message_id in session.revoked],
        "in": [session.messages_in, session.bytes_in, session.errors_in],
        "subscriptions": sorted(([pattern, group] for pattern, group in added), key=str),
        "unsubscribed": [[pattern, group] for pattern, group in ended],
        "reached": sorted(client.name for client in session.recipients),
        # Two sessions may have had one address for a moment. A session that is gone may
        # then still be listed.
        "owed": [
            [request.requester.address, request.id, index[request.requester]]
            for request in session.incoming_requests.values()
            if request.requester in index
        ],
        "asked": [
            [request.id, request.responder.address, index[request.responder]]
            for request in requests
        ],
        "reached_by_event": None
        if session.reached_by_event is None
        else [index[recipient] for recipient in session.reached_by_event if recipient.open],
        "expiring": [
            [
                request.id,
                request.responder.address,
                _NEVER if request.deadline is None else request.deadline - now,
            ]
            for request in requests
            if (request.id, request.responder.address) in timed
        ],
    }


def _outbox(
    session: Session, index: Mapping[Session, int], snapshot: Snapshot, now: float, copier: Copier
) -> Facts:
    outbox = session.outbox
    facts: Facts = {
        "frames": outbox.frames,
        "size": outbox.size,
        "limit": outbox.limit,
        "blocked": outbox.blocked,
        "stalled": outbox.stalled,
        "begun": outbox.begun,
    }
    if isinstance(outbox, FrameOutbox):
        first, copied = copier.copied(session)
        if copied:
            begun, kept = outbox.begun_frame, outbox.kept()
            queue = [] if begun is None else [begun]
            queue += [queued for _, queued in kept]
            queue += itertools.islice(outbox.plain, copied, None)
            facts["copied"] = [first, copied, [precede for precede, _ in kept]]
        else:
            queue = outbox.queue()
            facts["copied"] = None
        facts["queue"] = _queue(queue, index, snapshot)
        facts["timed"] = _timed(queue, now)
    else:
        count, size = copier.copied_chunks(outbox)
        chunks = outbox.chunks()[count:]
        snapshot.pieces += chunks
        facts["copied"] = [outbox.first_place, size] if count else None
        facts["chunks"] = [len(chunk) for chunk in chunks]
        facts["marks"] = [
            [start, end, None if deadline == inf else deadline - now, pinned]
            for start, end, deadline, pinned in outbox.marked_frames()
        ]
        facts["left"] = [
            [sender_header.decode(), end] for sender_header, end in outbox.left().items()
        ]
    return facts


def _queue(
    queue: Iterable[Queued], index: Mapping[Session, int], snapshot: Snapshot
) -> list[list[Any]]:
    """Return [size, flags, sender] of each frame; append the frames to the snapshot's
    bytes.
    """
    items: list[list[Any]] = []
    frames = []
    for queued in queue:
        items.append([len(queued.frame), *_told_of(queued, index)])
        frames.append(queued.frame)
    snapshot.pieces.append(b"".join(frames))
    return items


def _timed(queue: Iterable[Queued], now: float) -> list[list[Any]]:
    """Return [position, seconds left] of each frame with a ttl."""
    return [
        [position, queued.deadline - now]
        for position, queued in enumerate(queue)
        if queued.deadline is not None
    ]


def _frame(
    queued: Queued, index: Mapping[Session, int], snapshot: Snapshot, now: float
) -> list[Any]:
    """Return [size, flags, sender, seconds left] of a frame; append it to the bytes."""
    snapshot.pieces.append(bytes(queued.frame))
    left = None if queued.deadline is None else queued.deadline - now
    return [len(queued.frame), *_told_of(queued, index), left]


def _waiting(
    broker: Broker, index: Mapping[Session, int], snapshot: Snapshot, now: float
) -> list[list[Any]]:
    """Return [name, member, recipient, id, frame...] of each request that waits.

    Requests whose requester has left are not in it.
    """
    rows = [
        (client.name, member, request)
        for client in broker.exchange.clients.values()
        if client.flight
        for request, member in client.flight.waiting()
    ]
    rows += [(name, None, request) for request, name in broker.in_flight.waiting()]
    return [
        [
            name.partition("/")[0],
            None if member is None or not member.open else index[member],
            request.to,
            request.id,
            *_frame(request.queued, index, snapshot, now),
        ]
        for name, member, request in rows
        if request.requester.open and not request.requester.host
    ]


def _told_of(queued: Queued, index: Mapping[Session, int]) -> tuple[int, int | None]:
    """Return the flags of a frame, and the index of its sender."""
    flags, sender = flags_of(queued), queued.sender
    # A sender at another host is found by its address.
    is_named = flags & ORPHANED or sender is None or sender.host
    return flags, None if is_named else index[sender]


# Restore


def restore(
    broker: Broker, facts: Facts, pieces: Pieces, now: float, copies: Copies | None = None
) -> Restored:
    """Fill a new broker with the state of another broker; return the sessions.

    Sessions that were not copied before have no connection yet. A session whose name is
    no longer configured is not in the exchange. It has to be closed, unless it was
    being closed already.

    copies: the state that was copied before the handover. Raises BadSnapshot for facts
    that ``capture`` did not write; the broker is then unusable.
    """
    copies = copies or Copies(broker)
    check(facts, copies.facts_of)
    if copies.latest >= facts["next_number"]:
        raise BadSnapshot("a copied session came after all that have come")
    sessions, to_fill = _take_sessions(facts, copies)
    unconfigured_sessions = [copies.session(number) for number in copies.unconfigured_sessions]
    to_fill += [
        (copies.session(number), *parts) for number, parts in copies.unconfigured_sessions.items()
    ]
    broker.status.upgrades = facts["upgrades"] + 1
    broker.continue_order(facts["next_number"])
    broker.replies.dropped = facts["dropped"]
    broker.replies.refused = Counter(facts["refused"])
    broker.status.totals = Counter(facts["totals"])
    broker.replies.returned = Counter(facts["given_back"])
    _start_clients(broker, facts["started_at"], copies)
    for name, client_facts in facts["clients"].items():
        _restore_client(broker.exchange.resolve(name), client_facts, now)
    # Clients whose names are not configured, any more or for this connection.
    unconfigured = _Unknown()
    for session, session_facts, outbox in to_fill:
        configured = (
            broker.exchange.resolve(session_facts["name"]) if session_facts["configured"] else None
        )
        client = unconfigured.client(session_facts) if configured is None else configured
        _restore_session(session, client, session_facts, now).open = outbox is not None
    for number, names in copies.unknown_recipients.items():
        copies.made[number].recipients.update(unconfigured.named(names))
    for session, session_facts, _ in to_fill:
        _restore_requests(broker, session, session_facts, sessions, now)
    for session, session_facts, _ in to_fill:
        _restore_dialogs(broker, session, session_facts, sessions)
        session.recipients = _reached(broker, session_facts)
        session.recipients.update(unconfigured.named(session_facts["reached"]))
    opened = [
        (session, session_facts, outbox)
        for session, session_facts, outbox in to_fill
        if outbox is not None
    ]
    for session, _, outbox in opened:
        _restore_outbox(session, outbox, sessions, pieces, now, copies)
        if (
            not session.outbox.waiting
            and broker.exchange.resolve(session.client.name) is session.client
        ):
            session.renew_outbox()
    for session, session_facts, _ in opened:
        copies.add_session(session)
        _restore_subscriptions(broker, session, session_facts, copies)
    copies.put_in_order()
    for job_facts in facts["deferred"]:
        _restore_job(broker, job_facts, sessions)
    for source, target, time_left in facts["held"]:
        # The sender may have been about to be released together with other senders.
        broker.held.release_first(sessions[source], sessions[target])
        until = float("inf") if time_left is None else now + time_left
        broker.held.add(sessions[source], sessions[target], until)
    for position, items, timed in facts["leaving"]:
        queue = _restore_queue(items, sessions, pieces, timed, now)
        broker.reports.add(sessions[position], Unsent(iter(queue), len(items)))
    if facts.get("cluster") is not None:
        content = pieces.take(facts["cluster"]["size"])
        try:
            cluster_hand_over.restore(broker, facts["cluster"], content, sessions, now)
        except (ValueError, KeyError) as error:
            raise BadSnapshot(
                f"the facts of the cluster contradict each other: {error!r}"
            ) from error
    for waiting_facts in facts["waiting"]:
        _restore_waiting(broker, waiting_facts, sessions, pieces, now)
    for position, address, message_id, *frame in facts["retained"]:
        responder = sessions[position]
        request = responder.incoming_requests[address, message_id]
        queued = _restore_frame(frame, sessions, pieces, now)
        broker.requests.end(request)
        broker.requests.expect(
            request.requester, responder, message_id, queued.deadline, queued.frame, queued.pinned
        )
    if facts.get("mailboxes") is not None:
        broker.mailboxes.clock.set(now, broker.mailboxes.clock.wall)
        mailboxes_snapshot.restore(broker.mailboxes, facts["mailboxes"], sessions, pieces.take)
    # Older formats do not have these.
    broker.incidents.restore(facts.get("incidents", ()))
    for position, *values in facts.get("taps", ()):
        broker.taps.restore(sessions[position], values)
    names, left_s = facts.get("returning", ((), 0.0))
    broker.returning.begin(names, now + left_s)
    if broker.traffic is not None:
        broker.traffic.take_over()
    copies.drop_rest()
    return Restored(sessions, unconfigured_sessions)


def _take_sessions(
    facts: Facts, copies: Copies
) -> tuple[list[Session], list[tuple[Session, Facts, Facts | None]]]:
    """Return the sessions in the facts, by position; and those that are to be filled,
    each with its facts and those of its outbox, if it is open.
    """
    entries, first_left = facts["sessions"], len(facts["outboxes"])
    leaving = [
        entry["number"] for entry in entries[first_left : first_left + len(facts["leaving"])]
    ]
    for number in (*facts["gone"], *leaving):
        copies.discard(number)
    for number, *counters in facts["counts"]:
        copies.count(number, counters)
    sessions: list[Session] = []
    to_fill: list[tuple[Session, Facts, Facts | None]] = []
    for position, entry in enumerate(entries):
        if type(entry) is int:
            sessions.append(copies.copied(entry))
        else:
            sessions.append(copies.reopen(entry))
            outbox = facts["outboxes"][position] if position < first_left else None
            to_fill.append((sessions[-1], entry, outbox))
    return sessions, to_fill


def adapt(facts: Facts, copies: Copies) -> None:
    """Add to facts of the formats 2 and 3 what they lack.

    There, the facts list every session that is open, and no request waits.
    """
    facts["waiting"], facts["retained"] = [], []
    entries = facts.get("sessions")
    numbers = [
        entry.get("number") if type(entry) is dict else entry
        for entry in (entries if type(entries) is list else ())
    ]
    present = {entry for entry in numbers if type(entry) is int}
    facts["gone"] = sorted(copies.numbers() - present)
    facts["counts"] = []


class _Unknown:
    """The clients of open sessions whose names are not configured, any more or for
    these sessions.
    """

    def __init__(self) -> None:
        #: By name, and how many earlier sessions had the same address.
        self._clients: dict[tuple[str, int], Client] = {}
        self._addresses: Counter[str] = Counter()
        self._named: dict[str, list[Client]] = {}

    def client(self, facts: Facts) -> Client:
        """Return the client of one more session."""
        name, address = facts["name"], facts["address"]
        former = (name, self._addresses[address])
        self._addresses[address] += 1
        client = self._clients.get(former)
        if client is None:
            client = self._clients[former] = Client(_former(name), facts["since"])
            self._named.setdefault(name, []).append(client)
        return client

    def named(self, names: Iterable[str]) -> list[Client]:
        """Return all clients of these names."""
        if not self._named:
            return []
        return [client for name in names for client in self._named.get(name, ())]


def _start_clients(broker: Broker, started_at: float, copies: Copies) -> None:
    """Set all clients that were not copied to the state of the start."""
    broker.status.started_at = started_at
    if copies.started_at != started_at:
        copies.started_at = started_at
        for client in broker.exchange.clients.values():
            if client.name not in copies.clients:
                client.changed_at = client.shown_since = started_at


def restore_clients(broker: Broker, facts: Facts, now: float, copies: Copies) -> None:
    """Restore the clients in a block of ``capture_clients``. Raises BadSnapshot."""
    check_clients(facts)
    _start_clients(broker, facts["started_at"], copies)
    for name, client_facts in facts["clients"].items():
        copies.clients.add(name)
        _restore_client(broker.exchange.resolve(name), client_facts, now)


def _restore_requests(
    broker: Broker, session: Session, facts: Facts, sessions: list[Session], now: float
) -> None:
    """Restore the requests that a session has asked."""
    left: dict[tuple[int, str], list[float]] = {}
    for message_id, address, left_s in facts["expiring"]:
        left.setdefault((message_id, address), []).append(left_s)
    for message_id, address, responder in facts["asked"]:
        rest = left.get((message_id, address))
        deadline = now + rest.pop(0) if rest else None
        request = DeliveredRequest(session, sessions[responder], message_id, deadline)
        broker.requests.add(request)
        if deadline is not None:
            broker.requests.deadlines.add(deadline, request)


def _restore_dialogs(
    broker: Broker, session: Session, facts: Facts, sessions: list[Session]
) -> None:
    """Restore the order of the requests to a session, and how far its event has got."""
    incoming: dict[tuple[int, Session], list[DeliveredRequest]] = {}
    for request in session.incoming_requests.values():
        incoming.setdefault((request.id, request.requester), []).append(request)
    session.incoming_requests = {}
    for _, message_id, asker in facts["owed"]:
        same_id = incoming.get((message_id, sessions[asker]))
        if same_id:
            request = same_id.pop(0)
        else:
            # Two sessions had one address for a moment; the other session sent this request.
            request = DeliveredRequest(sessions[asker], session, message_id, None)
            if request.key in session.incoming_requests:
                broker.requests.use_again(request)
        session.incoming_requests[request.key] = request
    if facts["reached_by_event"] is not None:
        session.reached_by_event = dict.fromkeys(
            sessions[other] for other in facts["reached_by_event"]
        )


def _restore_subscriptions(broker: Broker, session: Session, facts: Facts, copies: Copies) -> None:
    ended = [(pattern, group) for pattern, group in facts["unsubscribed"]]
    session.subscriptions = copies.take_subscriptions(session.number, session, ended)
    if not facts["configured"]:
        broker.topics.leave(session, session.subscriptions)
        session.subscriptions = set()
    for pattern, group in facts["subscriptions"]:
        if session.client.policy.subscribing(pattern) is not None:
            broker.topics.add(pattern, session, group)
            session.subscriptions.add((pattern, group))


def restore_idle(broker: Broker, facts: Facts, now: float, copies: Copies) -> Session | None:
    """Restore an idle session from the facts of ``capture_idle``.

    Returns the session, or None if its name is unknown here. Raises BadSnapshot.
    """
    check_idle(facts)
    session_facts, outbox = facts["session"], facts["outbox"]
    number, name = session_facts["number"], session_facts["name"]
    client = broker.exchange.resolve(name)
    copies.latest = max(copies.latest, number, session_facts["left_at"])
    if facts["client"] is not None:
        copies.clients.add(name)
        _restore_client(client, facts["client"], now)
    if client is None:
        copies.unconfigured_sessions[number] = session_facts, outbox
        return None
    copies.discard_at(client, session_facts["address"], number)
    session = _restore_session(copies.reopen(session_facts), client, session_facts, now)
    _restore_outbox(session, outbox, [], Pieces(b""), now, copies)
    session.renew_outbox()
    session.recipients = _reached(broker, session_facts)
    session.subscriptions = copies.change_subscriptions(
        {
            "session": number,
            "name": name,
            "subscriptions": [
                (pattern, group) for pattern, group in session_facts["subscriptions"]
            ],
            "unsubscribed": session_facts["unsubscribed"],
        }
    )
    copies.add_session(session)
    unknown_names = [
        name for name in session_facts["reached"] if broker.exchange.resolve(name) is None
    ]
    copies.keep(session, unknown_names)
    return session


def _reached(broker: Broker, facts: Facts) -> set[Client]:
    """Return the clients that a session has reached and whose names are known here."""
    return {
        client for client in map(broker.exchange.resolve, facts["reached"]) if client is not None
    }


def _restore_client(client: Client | None, facts: Facts, now: float) -> None:
    if client is None:
        return
    client.changed_at = facts["changed_at"]
    client.shown_online, client.shown_since = facts["shown"]
    client.turn = facts["turn"]
    rate = client.config.rate
    if client.meter is not None and facts["rate"] == [rate.messages, rate.bytes]:
        client.meter.fill_to(facts["levels"], now)


def _restore_job(broker: Broker, facts: Facts, sessions: list[Session]) -> None:
    if facts["question"] is not None:
        source, message_id, op = facts["question"]
        broker.operations.asking.add(sessions[source])
        broker.deferred.jobs.append(Question(broker.operations, sessions[source], message_id, op))
        return
    topic, payload, about, presence, recipients = facts["news"]
    announcement = Announcement(broker.events, topic, payload, about)
    announcement.served = dict.fromkeys(sessions[other] for other in recipients)
    if presence is not None:
        announcement.client, announcement.online, announcement.since = (
            broker.exchange.resolve(presence[0]),
            presence[1],
            presence[2],
        )
    broker.deferred.jobs.append(announcement)


def _restore_session(session: Session, client: Client, facts: Facts, now: float) -> Session:
    Session.__init__(session, client, facts["instance"], peer=facts["peer"], since=facts["since"])
    # The name may have become a pool, or ceased to be a pool. The connection keeps its
    # address.
    session.address = facts["address"]
    session.sender_header = session.address.encode()
    session.number = facts["number"]
    session.closed_number = facts["left_at"]
    session.bytes_to_skip = facts["skip"]
    session.charged = facts["charged"]
    session.arrived = now - facts["waited_s"]
    session.hold_deadline = None if facts["hold_s"] is None else now + facts["hold_s"]
    session.closing = facts["closing"]
    session.slow = facts["slow"]
    if facts["allowance"] is not None:
        used, since, holding = facts["allowance"]
        session.allowance = Allowance(used, now - since, holding=holding)
    session.goaway = facts["goaway"]
    # Some older formats do not have these.
    session.listens = facts.get("listens", False)
    session.cancels = facts.get("cancels", False)
    session.in_flight = facts.get("in_flight")
    session.revoked = {(address, message_id) for address, message_id in facts.get("revoked", ())}
    session.messages_in, session.bytes_in, session.errors_in = facts["in"]
    return session


def _restore_outbox(
    session: Session,
    facts: Facts,
    sessions: list[Session],
    pieces: Pieces,
    now: float,
    copies: Copies,
) -> None:
    outbox: StreamOutbox | FrameOutbox
    # A session whose name is gone keeps the limit that its connection had.
    limit = session.client.config.queue or facts["limit"]
    if "queue" in facts:
        outbox = FrameOutbox(limit)
        queue = _restore_queue(facts["queue"], sessions, pieces, facts["timed"], now)
        begun = facts["begun"]
        if facts["copied"] is None:
            outbox.refill(queue, begun)
        else:
            first, count, places = facts["copied"]
            copied = copies.take_queue(session.number, first, count)
            outbox.refill(queue[: int(begun > 0)], begun)
            outbox.refill_plain(copied.plain, copied.size, copied.timed)
            remaining = queue[int(begun > 0) :]
            outbox.refill_kept(zip(places, remaining, strict=False))
            outbox.refill(remaining[len(places) :], 0)
    else:
        outbox = StreamOutbox(limit)
        left = {sender_header.encode(): end for sender_header, end in facts["left"]}
        chunks = [pieces.take(size) for size in facts["chunks"]]
        for chunk in chunks:
            check_frames(chunk)
        former: list[bytearray] = []
        if facts.get("copied") is not None:
            former = copies.take_chunks(session.number, *facts["copied"])
            if facts["begun"] >= len(former[0]):
                raise BadSnapshot("more of a stream was begun than its first chunk")
        marks = [
            (start, end, inf if rest is None else now + rest, pinned)
            for start, end, rest, pinned in marked_places(facts)
        ]
        outbox.refill([*former, *map(bytearray, chunks)], facts["begun"], left, marks)
    outbox.owner = session
    outbox.frames, outbox.size = facts["frames"], facts["size"]
    outbox.blocked, outbox.stalled = facts["blocked"], facts["stalled"]
    session.outbox = outbox


def _restore_frame(facts: list[Any], sessions: list[Session], pieces: Pieces, now: float) -> Queued:
    """Return a frame that was captured by itself."""
    size, flags, sender, left = facts
    frame = pieces.take(size)
    check_frames(frame, one=True)
    queued = _known(frame, flags, sender, sessions)
    return queued if left is None else replace(queued, deadline=now + left)


def _restore_waiting(
    broker: Broker, facts: list[Any], sessions: list[Session], pieces: Pieces, now: float
) -> None:
    """Restore a request that waits for a connection with room in flight."""
    name, member, to, message_id, *frame = facts
    queued = _restore_frame(frame, sessions, pieces, now)
    request = WaitingRequest(queued.sender, message_id, to, queued)
    client = broker.exchange.resolve(name)
    member_session = sessions[member] if queued.pinned and member is not None else None
    if (
        client is None
        or not (client.sessions or client.hosts)
        or (
            queued.pinned
            and (
                member_session is None
                or client.sessions.get(member_session.address) is not member_session
            )
        )
    ):
        broker.in_flight.add_undeliverable(request, to)
        return
    broker.in_flight.wait(client, request, member_session)
    broker.requests.note_room(client)


def _restore_queue(
    items: list[list[Any]],
    sessions: list[Session],
    pieces: Pieces,
    timed: list[list[Any]],
    now: float,
) -> list[Queued]:
    frames = [pieces.take(size) for size, _, _ in items]
    for frame in frames:
        check_frames(frame, one=True)
    queue = [
        _known(frame, flags, sender, sessions)
        for frame, (_, flags, sender) in zip(frames, items, strict=True)
    ]
    for position, left in timed:
        queue[position] = replace(queue[position], deadline=now + left)
    return queue


def _known(frame: memoryview, flags: int, sender: int | None, sessions: list[Session]) -> Queued:
    """Return a frame with its sender and flags."""
    return Queued(
        bytes(frame),
        receipt=bool(flags & RECEIPT),
        pinned=bool(flags & PINNED),
        sender=None if sender is None else sessions[sender],
        orphaned=bool(flags & ORPHANED),
        kept=bool(flags & KEPT),
    )


def _former(name: str) -> ClientConfig:
    """Return the entry of a name that is not configured any more.

    Its sessions may do nothing, and keep their outboxes.
    """
    return ClientConfig(
        name=name,
        keys=(),
        connections=1,
        send_to=(),
        publish=(),
        subscribe=(),
        queue=0,
        subscriptions=0,
        requests=1,
        when_full=WhenFull.REFUSE,
        when_connected=WhenConnected.REFUSE,
        rate=RateConfig(None, None),
        allow_md5=False,
        peer_uid=None,
        admin=False,
        source=Source("", 0),
    )
