"""The links and remote sessions for a new process, as facts and bytes.

The other hosts send nothing meanwhile: see ``Cluster.hold``. Frames that wait in outboxes
go over with their link, which sends them first. The broker's answers to frames go over as
outcomes that are not confirmed. So sessions that stand for clients of other hosts have no
bytes of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any, TypeAlias

from brokerd.core.cluster.blob import Blob
from brokerd.core.cluster.messages import VERSION
from brokerd.core.cluster.remote_frames import walk
from brokerd.core.cluster.remote_traffic import Arrival, Portion
from brokerd.core.flight import WaitingRequest
from brokerd.core.requests import DeliveredRequest
from brokerd.core.undelivered import Queued
from brokerd_client.wire.envelope import ErrorCode, Kind
from brokerd_client.wire.layout import ACK_FLAG

if TYPE_CHECKING:
    from brokerd.core.broker import Broker
    from brokerd.core.cluster.link import Link
    from brokerd.core.cluster.remote_sessions import RemoteHost
    from brokerd.core.cluster.remote_traffic import RemoteTraffic
    from brokerd.core.session import Session

__all__ = ["capture", "restore"]

Facts: TypeAlias = dict[str, Any]


def capture(
    traffic: RemoteTraffic, index: Mapping[Session, int], pieces: list[Any], now: float
) -> Facts:
    """Return the facts of all links and remote sessions.

    Args:
        traffic: The traffic with other hosts, whose cluster is held.
        index: The positions of the sessions in the snapshot.
        pieces: The bytes of the snapshot; one piece is added.
        now: A time of the event loop's clock.
    """
    blob, cluster = Blob(), traffic.cluster
    for link in cluster.links.values():
        link.keep_outcomes()
        link.unsent.extend(traffic.take_all(link.host))
    facts = {
        "host": traffic.host,
        "version": VERSION,
        **cluster.capture(blob),
        "suspended": traffic.sessions.is_suspended,
        "remotes": [
            _host(traffic, host, index, blob, now) for host in traffic.sessions.hosts.values()
        ],
        "events": traffic.stored_events.capture(index),
    }
    piece = blob.joined()
    facts["size"] = len(piece)
    pieces.append(piece)
    return facts


def _left(deadline: float | None, now: float) -> float | None:
    return None if deadline is None else deadline - now


def _host(
    traffic: RemoteTraffic, host: RemoteHost, index: Mapping[Session, int], blob: Blob, now: float
) -> Facts:
    return {
        "name": host.name,
        "revoked": [
            [name, [list(key) for key in target.revoked]]
            for name, target in host.targets.items()
            if target.revoked
        ],
        "asked": [
            [index[request.requester], request.id, name, _left(request.deadline, now)]
            for name, requests in host.requests.items()
            for request in requests.values()
            if request.requester.open
        ],
        "held": [
            [index[source], holder.connection.target, traffic.held_for(source, now)]
            for holder in host.sessions()
            for source in holder.waiters
        ],
        "senders": [_sender(sender, index, blob, now) for sender in host.senders.values()],
    }


def _sender(sender: Session, index: Mapping[Session, int], blob: Blob, now: float) -> Facts:
    waited = now - sender.arrived if sender.charged else 0.0
    return {
        "identity": sender.connection.target,
        "over": sender.connection.is_over,
        "reached": [client.name for client in sender.recipients],
        "hold_s": _left(sender.hold_deadline, now),
        "portions": [
            [
                portion.arrival.number,
                portion.waited + waited,
                portion.groups,
                blob.put(memoryview(portion.data)[portion.position :]),
            ]
            for portion in sender.connection.portions
        ],
        "asked": [
            [
                request.id,
                index[request.responder],
                _left(request.deadline, now),
                None if request.kept is None else blob.put(request.kept),
                request.pinned,
            ]
            for same_id in sender.outgoing_requests.values()
            for request in same_id
            if request.responder.open
        ],
        "waiting": [
            [
                request.to,
                request.id,
                _left(request.queued.deadline, now),
                blob.put(request.queued.frame),
                request.queued.pinned,
            ]
            for same_id in sender.waiting_requests.values()
            for request in same_id
        ],
    }


def restore(
    broker: Broker, facts: Facts, content: memoryview, sessions: Sequence[Session], now: float
) -> None:
    """Go on with the links and remote sessions of another process.

    Args:
        broker: The new broker.
        facts: What ``capture`` returned.
        content: Its bytes.
        sessions: The sessions by their positions in the snapshot.
        now: A time of the event loop's clock.

    Raises ValueError or KeyError for facts that contradict each other.
    """
    traffic = broker.traffic
    if traffic is None or facts["host"] != traffic.host or facts["version"] != VERSION:
        for host in facts["remotes"]:
            for position, message_id, name, _ in host["asked"]:
                _abandon(broker, sessions[position], message_id, name)
            for position, _, _ in host["held"]:
                _release(broker, sessions[position])
        return
    blob = Blob(content)
    traffic.sessions.is_suspended = bool(facts["suspended"])
    links = traffic.cluster.restore(facts, blob, now)
    for link in links:
        if link.is_up:
            traffic.host_up(link.facts, link.changed_at)
            _announced(broker, traffic, link)
    arrivals = {
        (link.host, number): Arrival(link.host, number)
        for link in links
        for number in link.received.pending
    }
    for host_facts in facts["remotes"]:
        host = traffic.sessions.hosts[host_facts["name"]]
        for sender_facts in host_facts["senders"]:
            _restore_sender(traffic, broker, host, sender_facts, sessions, arrivals, blob, now)
        for name, keys in host_facts["revoked"]:
            client = broker.exchange.resolve(name)
            if client is not None:
                revoked = {(str(address), int(number)) for address, number in keys}
                host.target(client).revoked = revoked
        _restore_asked(traffic, broker, host, host_facts, sessions, now)
    for arrival in arrivals.values():
        traffic.count_down(arrival)
    traffic.stored_events.restore(facts["events"], sessions)


def _announced(broker: Broker, traffic: RemoteTraffic, link: Link) -> None:
    """Take over what a host has announced; no presence changes by that."""
    host = traffic.sessions.hosts[link.host]
    for name in link.directory.names.values():
        host.names[name.name] = name
        client = broker.exchange.resolve(name.name)
        if client is not None and name.connections:
            client.note_host(host.name, name.since)
    traffic.interests_changed(link.host, list(link.directory.interests.values()))


def _restore_sender(
    traffic: RemoteTraffic,
    broker: Broker,
    host: RemoteHost,
    facts: Facts,
    sessions: Sequence[Session],
    arrivals: Mapping[tuple[str, int], Arrival],
    blob: Blob,
    now: float,
) -> None:
    name, _, instance = str(facts["identity"]).partition("/")
    client = broker.exchange.resolve(name)
    sender = None if client is None else host.add_sender(client, instance)
    for number, waited, groups, size in facts["portions"]:
        data = bytearray(blob.take(size))
        arrival = arrivals[host.name, number]
        if sender is not None:
            of = None if groups is None else tuple(map(str, groups))
            sender.connection.portions.append(Portion(arrival, data, float(waited), of))
        else:
            for _, _, kind, _, recipient, message_id in walk(data):
                flags = ACK_FLAG if kind == Kind.EVENT else 0
                traffic.refuse_unknown(
                    host, facts["identity"], message_id, recipient.decode(), flags=flags
                )
    for message_id, position, left, size, pinned in facts["asked"]:
        kept = None if size is None else blob.take(size)
        responder = sessions[position]
        deadline = None if left is None else now + left
        if sender is not None:
            broker.requests.expect(sender, responder, message_id, deadline, kept, bool(pinned))
        else:
            traffic.refuse_unknown(host, facts["identity"], message_id, responder.client.name)
    for to, message_id, left, size, pinned in facts["waiting"]:
        frame, target = blob.take(size), broker.exchange.resolve(str(to).partition("/")[0])
        if sender is None:
            traffic.refuse_unknown(host, facts["identity"], message_id, str(to))
            continue
        deadline = None if left is None else now + left
        queued = Queued(frame, pinned=bool(pinned), sender=sender, deadline=deadline)
        request = WaitingRequest(sender, message_id, str(to), queued)
        member = None if target is None else target.sessions.get(str(to))
        if target is None or not target.sessions or (pinned and member is None):
            broker.in_flight.add_undeliverable(request, str(to))
        else:
            broker.in_flight.wait(target, request, member if pinned else None)
            broker.requests.note_room(target)
    if sender is not None:
        sender.hold_deadline = None if facts["hold_s"] is None else now + facts["hold_s"]
        sender.recipients = set(filter(None, map(broker.exchange.resolve, facts["reached"])))
        sender.connection.is_over = bool(facts["over"])
        traffic.route_later(sender)


def _restore_asked(
    traffic: RemoteTraffic,
    broker: Broker,
    host: RemoteHost,
    facts: Facts,
    sessions: Sequence[Session],
    now: float,
) -> None:
    """Restore the requests of clients here to clients of a host, and senders held by it."""
    for position, message_id, name, left in facts["asked"]:
        client = broker.exchange.resolve(name)
        if client is None:
            _abandon(broker, sessions[position], message_id, name)
            continue
        traffic.sessions.reach(client)
        deadline = None if left is None else now + left
        request = DeliveredRequest(sessions[position], host.target(client), message_id, deadline)
        broker.requests.add(request)
        if deadline is not None:
            broker.requests.deadlines.add(deadline, request)
    for position, name, left in facts["held"]:
        client = broker.exchange.resolve(name)
        holder = host.find(name) if client is None else host.target(client)
        if holder is not None:
            broker.held.add(sessions[position], holder, inf if left is None else now + left)
            host.touched[holder] = None
        else:
            _release(broker, sessions[position])


def _abandon(broker: Broker, requester: Session, message_id: int, name: str) -> None:
    """Report a request whose answer can't come any more."""
    reason = "the broker was replaced by one that does not know the recipient's host"
    broker.replies.refuse(requester, message_id, ErrorCode.ABANDONED, reason, name)


def _release(broker: Broker, sender: Session) -> None:
    """Release a sender whose holder was a session of another host, which is gone."""
    broker.held.add(sender, sender, inf)
    broker.held.release(sender)
