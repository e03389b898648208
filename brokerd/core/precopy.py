"""State that is copied before the handover: queued frames, subscriptions, idle sessions.

The old process copies them in blocks while it serves. The new process checks them and
creates objects from them meanwhile. Frames that have left a queue since then are left
out. Frames that have been added since then are captured with the rest. So little is
left to do while nothing is served. Both frames and chunks leave at the front only. So a
frame is identified by its number in its queue, and a chunk by its place in its stream.
Source of the form: FORMAT of :mod:`brokerd.upgrade.channel`.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from brokerd.core.changes import Changes
from brokerd.core.outbox import FrameOutbox, Queued, StreamOutbox
from brokerd.core.session import Session
from brokerd.core.snapshot_check import FLAGS, BadSnapshot, check_block, check_frames

if TYPE_CHECKING:
    from brokerd.core.broker import Broker
    from brokerd.core.exchange import Client

__all__ = [
    "KEPT",
    "ORPHANED",
    "PINNED",
    "RECEIPT",
    "Block",
    "CopiedQueue",
    "Copier",
    "Copies",
    "flags_of",
    "is_as_at_start",
]

#: The flags of a frame, as bits.
RECEIPT: Final = 1
PINNED: Final = 2
ORPHANED: Final = 4
KEPT: Final = 8

#: Most frames, bytes and subscriptions per block; a block takes about a millisecond.
_FRAMES: Final = 1000
_BYTES: Final = 1024 * 1024
_SUBSCRIPTIONS: Final = 250
#: Default of ``few`` of Copier: the fewest frames or subscriptions per session that are
#: copied.
_FEW: Final = 100
#: Default of ``least`` of Copier: the fewest bytes of a stream that are copied.
_LEAST: Final = 256 * 1024
#: Stands for the number of the sender in a frame without a sender.
_NOBODY: Final = -1
_NONE: Final[frozenset[tuple[str, str | None]]] = frozenset()

#: The counters of a session. They change with every message.
_COUNTERS: Final = attrgetter(
    "messages_in", "bytes_in", "errors_in", "outbox.frames", "outbox.size"
)
#: The other state of an idle session that is captured and may change.
_STATE: Final = attrgetter(
    "client",
    "address",
    "number",
    "closed_number",
    "bytes_to_skip",
    "charged",
    "held_by",
    "hold_deadline",
    "closing",
    "slow",
    "allowance",
    "goaway",
    "cancels",
    "listens",
    "in_flight",
    "reached_by_event",
    "outbox",
    "outbox.limit",
    "outbox.blocked",
    "outbox.stalled",
    "retired",
)
#: The attributes that are all empty or false for an idle session.
_BUSY: Final = attrgetter(
    "bytes_to_skip",
    "charged",
    "held_by",
    "hold_deadline",
    "closing",
    "allowance",
    "incoming_requests",
    "outgoing_requests",
    "waiting_requests",
    "revoked",
    "reached_by_event",
    "outbox.waiting",
    "outbox.blocked",
    "outbox.stalled",
)
#: The state of a client that is captured and may change. ``turn`` is captured too, but a
#: pool may begin anywhere.
_SHOWN: Final = attrgetter("changed_at", "shown_online", "shown_since")

#: Facts, and the bytes that belong to them.
Block: TypeAlias = "tuple[dict[str, Any], Sequence[bytes | bytearray | memoryview]]"


def flags_of(queued: Queued) -> int:
    """Return the flags of a frame: all that is stored besides its sender and deadline."""
    sender = queued.sender
    # Of a sender that has gone, only this fact is ever used.
    orphaned = queued.orphaned or (sender is not None and not sender.open)
    return (
        queued.receipt * RECEIPT | queued.pinned * PINNED | orphaned * ORPHANED | queued.kept * KEPT
    )


def _state(session: Session) -> tuple[object, ...]:
    return *_STATE(session), len(session.recipients)


def _shown(client: Client) -> tuple[object, ...]:
    return *_SHOWN(client), client.meter, client.meter and client.meter.changes


def is_as_at_start(client: Client, started_at: float) -> bool:
    """Return whether a client is unused since the start, as most of ten thousand are."""
    return (
        client.changed_at == client.shown_since == started_at
        and not client.sessions
        and not client.shown_online
        and (client.meter is None or not client.meter.changes)
    )


class Copier:
    """A copy of a broker's state in progress: its blocks, and the record of copied
    parts.

    Args:
        few: Fewer frames or subscriptions of one session than this are captured with
            the rest.
        least: The same for the bytes of a stream.

    Attributes:
        subscriptions: The copied subscriptions of each session, which may have ended
            since.
        has_copied_start: Whether the start of the broker has been copied.
    """

    def __init__(self, broker: Broker, few: int = _FEW, least: int = _LEAST) -> None:
        self._broker = broker
        self._few = few
        self._least = least
        self.subscriptions: dict[Session, set[tuple[str, str | None]]] = {}
        self.has_copied_start = False
        #: By session: how many messages it had sent when copying its subscriptions
        #: began.
        self._unchanged: dict[Session, int] = {}
        #: By queue: the number after that of the last copied frame.
        self._copied_to: dict[FrameOutbox, int] = {}
        #: By stream: the place behind the last copied chunk.
        self._copied_up_to: dict[StreamOutbox, int] = {}
        #: The idle sessions that have been copied, with their state and counters then;
        #: and the clients that have been copied, with their state then.
        self._idle: dict[Session, tuple[tuple[object, ...], tuple[int, ...]]] = {}
        self._clients: dict[Client, tuple[object, ...]] = {}
        #: The last change of an incident that has been copied.
        self._incidents_to = 0
        #: The changes in the broker; None if it does not note them for this copier.
        self._changes: Changes | None = None

    def watch(self, sessions: Iterable[Session] | None = None) -> None:
        """Note all changes in the broker from now on, until ``end``.

        sessions: all open sessions, if they are not exactly those of the exchange.
        """
        exchange = self._broker.exchange
        self._changes = self._broker.status.changes = Changes(
            exchange.sessions() if sessions is None else sessions, exchange.clients.values()
        )

    def end(self) -> None:
        """Stop noting changes in the broker."""
        self._changes = self._broker.status.changes = None

    def take_incidents(self) -> list[list[Any]]:
        """Return the incidents that have changed since the last call."""
        incidents, since = self._broker.incidents, self._incidents_to
        self._incidents_to = incidents.last_change
        return incidents.changed_since(since)

    def changed_sessions(self) -> list[Session]:
        """Return the sessions that may differ from their copies, or have none, in the
        order in which they connected.
        """
        sessions = self._broker.exchange.sessions()
        changed = sessions if self._changes is None else self._changes.sessions
        return sorted(changed, key=attrgetter("number"))

    def changed_clients(self) -> list[Client]:
        """Return the clients that may differ from their copies, or have none."""
        clients = self._broker.exchange.clients
        if self._changes is None:
            return list(clients.values())
        return [client for client in self._changes.clients if clients.get(client.name) is client]

    def take_left(self) -> list[int]:
        """Return the numbers of the copied sessions that have left since the last
        call.
        """
        if self._changes is None:
            sessions = [session for session in self._idle if not session.open]
        else:
            sessions, self._changes.left = self._changes.left, []
        return [session.number for session in sessions if self._idle.pop(session, None) is not None]

    def is_idle(self, session: Session) -> bool:
        """Return whether the session has nothing queued and nothing in progress."""
        return session.open and session.reached_by_event is None and not any(_BUSY(session))

    def note_idle(self, session: Session) -> None:
        """Record that an idle session is copied as it is now, with its subscriptions."""
        self._idle[session] = _state(session), _COUNTERS(session)
        self.note_same(session)
        if session.subscriptions or session in self.subscriptions:
            self.subscriptions[session] = set(session.subscriptions)

    def note_counted(self, session: Session) -> None:
        """Record that the counters of a copied session are copied as they are now."""
        self._idle[session] = self._idle[session][0], _COUNTERS(session)
        self.note_same(session)

    def is_copied(self, session: Session) -> bool:
        """Return whether an open session has been copied, whatever has changed since."""
        return session.open and session in self._idle

    def note_same(self, session: Session) -> None:
        """Record that the session does not differ from its copy."""
        if self._changes is not None:
            self._changes.sessions.pop(session, None)

    def forget_idle(self, session: Session) -> None:
        """Record that the session's connection is no longer as it was when it was
        copied.
        """
        self._idle.pop(session, None)

    def is_as_copied(self, session: Session) -> bool:
        """Return whether the session has been copied and has not changed since then."""
        if self._changes is not None and session not in self._changes.sessions:
            return session in self._idle
        return self.counted(session) == ()

    def counted(self, session: Session) -> tuple[int, ...] | None:
        """Return the counters of a copied session in which nothing else has changed.

        Returns () if the counters are unchanged too. Returns None if the session is not
        copied, or has changed in another way.
        """
        copied = self._idle.get(session)
        if (
            copied is None
            or session.incoming_requests
            or session.outgoing_requests
            or session.waiting_requests
            or session.revoked
            or session.outbox.waiting
            or not session.open
            or copied[0] != _state(session)
        ):
            return None
        counters: tuple[int, ...] = _COUNTERS(session)
        subscriptions = self.subscriptions.get(session, _NONE)
        if len(subscriptions) != len(session.subscriptions) or (
            # Without a message from the session, its subscriptions only become fewer.
            counters[0] != copied[1][0] and subscriptions != session.subscriptions
        ):
            return None
        return () if counters == copied[1] else counters

    def note_client_copied(self, client: Client) -> None:
        """Record that a client is copied as it is now."""
        self._clients[client] = _shown(client)
        if self._changes is not None:
            self._changes.clients.pop(client, None)

    def is_client_as_copied(self, client: Client) -> bool:
        """Return whether the client is unchanged since it was copied, or since the
        start.
        """
        shown = self._clients.get(client)
        if shown is None:
            return is_as_at_start(client, self._broker.status.started_at)
        return shown == _shown(client)

    def blocks(self, now: float) -> Iterator[Block]:
        """Yield the state that has not been copied yet; it may change between two
        blocks.

        now: the approximate time.
        """
        for session in self.changed_sessions():
            # Checked here first, because most of ten thousand sessions have few.
            if len(session.subscriptions) >= self._few:
                yield from self._subscriptions_of(session)
            outbox = session.outbox
            if isinstance(outbox, FrameOutbox):
                if len(outbox.plain) >= self._few:
                    yield from self._queue_of(session, now)
            elif outbox.closed_bytes:
                yield from self._chunks_of(session)

    def changes(
        self, session: Session
    ) -> tuple[set[tuple[str, str | None]], set[tuple[str, str | None]]]:
        """Return the subscriptions not copied yet, and the copied subscriptions that
        have ended.
        """
        copied = self.subscriptions.get(session, set())
        if self._unchanged.get(session) == session.messages_in and len(copied) == len(
            session.subscriptions
        ):
            return set(), set()
        return session.subscriptions - copied, copied - session.subscriptions

    def copied(self, session: Session) -> tuple[int, int]:
        """Return the number of the queue's first frame, and how many copied frames
        begin there.
        """
        outbox = session.outbox
        assert isinstance(outbox, FrameOutbox)
        first = outbox.plain_gone
        return first, max(0, self._copied_to.get(outbox, 0) - first)

    def _subscriptions_of(self, session: Session) -> Iterator[Block]:
        copied = self.subscriptions.get(session, set())
        is_large = len(session.subscriptions) - len(copied) >= self._few
        if is_large and not copied:
            self._unchanged[session] = session.messages_in
        # The difference of two sets with 250,000 elements takes as long as a frame may
        # take.
        missing = iter(
            list(session.subscriptions - copied if copied else session.subscriptions)
            if is_large
            else []
        )
        while session.open and (block := list(islice(missing, _SUBSCRIPTIONS))):
            self.subscriptions.setdefault(session, copied).update(block)
            yield (
                {"session": session.number, "name": session.client.name, "subscriptions": block},
                [],
            )

    def _queue_of(self, session: Session, now: float) -> Iterator[Block]:
        while session.open and isinstance(session.outbox, FrameOutbox):
            outbox = session.outbox
            first = max(self._copied_to.get(outbox, 0), outbox.plain_gone)
            start = first - outbox.plain_gone
            if len(outbox.plain) - start < self._few:
                return
            frames: list[Queued] = []
            size = 0
            for queued in islice(outbox.plain, start, start + _FRAMES):
                frames.append(queued)
                size += len(queued.frame)
                if size >= _BYTES:
                    break
            self._copied_to[outbox] = first + len(frames)
            yield _block(session, first, frames, now)

    def copied_chunks(self, outbox: StreamOutbox) -> tuple[int, int]:
        """Return how many chunks of a stream have been copied and still wait, and their
        bytes.
        """
        end = self._copied_up_to.get(outbox, 0)
        count, place = 0, outbox.first_place
        for chunk in outbox.chunks()[:-1]:
            if place + len(chunk) > end:
                break
            count, place = count + 1, place + len(chunk)
        return count, place - outbox.first_place

    def _chunks_of(self, session: Session) -> Iterator[Block]:
        while session.open and isinstance(session.outbox, StreamOutbox):
            outbox = session.outbox
            count, size = self.copied_chunks(outbox)
            if outbox.closed_bytes - size < self._least:
                return
            place = outbox.first_place + size
            chunks: list[bytearray | memoryview] = []
            copied = 0
            for chunk in outbox.chunks()[count:-1]:
                chunks.append(chunk)
                copied += len(chunk)
                if copied >= _BYTES:
                    break
            self._copied_up_to[outbox] = place + copied
            facts = {
                "session": session.number,
                "place": place,
                "chunks": [len(chunk) for chunk in chunks],
            }
            yield facts, chunks


def _number(sender: Session | None) -> int:
    # A sender that left during an earlier upgrade may have no number: see Copies.session.
    # One at another host is found by its address.
    is_known = sender is not None and sender.open and not sender.host
    return sender.number if sender is not None and is_known else _NOBODY


def _block(session: Session, first: int, frames: list[Queued], now: float) -> Block:
    sizes = array("Q", [len(queued.frame) for queued in frames])
    flags = bytes([flags_of(queued) for queued in frames])
    senders = array("q", [_number(queued.sender) for queued in frames])
    deadlines = array(
        "d", [math.inf if queued.deadline is None else queued.deadline - now for queued in frames]
    )
    facts = {"session": session.number, "first": first, "frames": len(frames)}
    index = [sizes.tobytes(), flags, senders.tobytes(), deadlines.tobytes()]
    return facts, [*index, b"".join([queued.frame for queued in frames])]


class CopiedQueue:
    """The copied frames of one queue.

    Attributes:
        plain: The frames.
        first, end: The number of the first frame, and that after the last.
        size, timed: The bytes of the frames, and how many of the frames have a ttl.
    """

    def __init__(self, first: int) -> None:
        self.first = self.end = first
        self.plain: deque[Queued] = deque()
        self.size = self.timed = 0

    def add(self, frames: list[Queued], size: int, timed: int) -> None:
        """Append frames; size and timed are the sums over them."""
        self.plain.extend(frames)
        self.end += len(frames)
        self.size += size
        self.timed += timed

    def drop(self, count: int) -> None:
        """Remove the first ``count`` frames."""
        self.first += count
        for _ in range(count):
            queued = self.plain.popleft()
            self.size -= len(queued.frame)
            self.timed -= queued.deadline is not None


class Copies:
    """The copied state, checked and turned into objects, for a broker that is still
    empty.

    A session that is referred to before it is restored exists as an empty object.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._sessions: dict[int, Session] = {}
        self._queues: dict[int, CopiedQueue] = {}
        #: By session: the place of each copied chunk in the stream, and the chunk.
        self._streams: dict[int, list[tuple[int, bytearray]]] = {}
        self._subscriptions: dict[int, set[tuple[str, str | None]]] = {}
        #: The idle sessions that exist already, by number.
        self.made: dict[int, Session] = {}
        #: The facts of idle sessions and of their outboxes whose names are not known
        #: here, by number.
        self.unconfigured_sessions: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        #: The unknown names of clients that a session has reached, by its number.
        self.unknown_recipients: dict[int, list[str]] = {}
        #: The names of the copied clients, and the start of the broker, if copied.
        self.clients: set[str] = set()
        self.started_at: float | None = None
        #: The largest number of a copied session.
        self.latest = 0
        #: The numbers of the sessions discarded since ``take_discarded``.
        self._discarded: list[int] = []
        #: Pools to which sessions were added in another order than they connected in.
        self._unordered: set[Client] = set()

    def add(self, facts: dict[str, Any], body: memoryview, now: float) -> None:
        """Add one block. Raises BadSnapshot."""
        check_block(facts)
        if "frames" in facts:
            self._add_frames(facts, body, now)
        elif "chunks" in facts:
            self._add_chunks(facts, body)
        else:
            self._add_subscriptions(facts)

    def session(self, number: int) -> Session:
        """Return the session with that number, which may still be empty."""
        session = self._sessions.get(number)
        if session is None:
            session = self._sessions[number] = Session.__new__(Session)
            session.open = False
        return session

    def numbers(self) -> set[int]:
        """Return the numbers of the copied sessions."""
        return {*self.made, *self.unconfigured_sessions}

    def copied(self, number: int) -> Session:
        """Return the copied session with that number. Raises BadSnapshot."""
        session = self.made.get(number)
        if session is None and number not in self.unconfigured_sessions:
            raise BadSnapshot(f"the session with the number {number} was not copied")
        return session or self.session(number)

    def add_session(self, session: Session) -> None:
        """Add a restored session to its client. Raises BadSnapshot."""
        client = session.client
        occupant = client.sessions.get(session.address)
        if occupant is not None and occupant is not session:
            raise BadSnapshot("two open sessions have one address")
        if client.sessions and next(reversed(client.sessions.values())).number > session.number:
            self._unordered.add(client)
        if session.in_flight is not None:
            client.track()
        client.add(session)

    def put_in_order(self) -> None:
        """Order the sessions of each pool as they connected; the order matters most
        for pools.
        """
        for client in self._unordered:
            client.put_in_order()
        self._unordered.clear()

    def keep(self, session: Session, unknown: list[str]) -> None:
        """Record that an idle session exists. unknown: see ``unknown_recipients``."""
        number = session.number
        self.made[number] = session
        # From now on the session has its subscriptions.
        self._subscriptions.pop(number, None)
        self.unknown_recipients.pop(number, None)
        if unknown:
            self.unknown_recipients[number] = unknown

    def reopen(self, facts: dict[str, Any]) -> Session:
        """Return the session that these facts are about, to be filled (again)."""
        number = facts["number"]
        session = self.made.pop(number, None)
        if session is not None:
            self._subscriptions[number] = session.subscriptions
            # It gets another outbox, and is added again with that one.
            session.client.remove(session)
        self.unconfigured_sessions.pop(number, None)
        self.unknown_recipients.pop(number, None)
        return self.session(number)

    def count(self, number: int, counters: list[int]) -> None:
        """Set the counters of a copied session. Raises BadSnapshot."""
        session = self.made.get(number)
        if session is not None:
            session.messages_in, session.bytes_in, session.errors_in = counters[:3]
            session.outbox.frames, session.outbox.size = counters[3:]
        elif number in self.unconfigured_sessions:
            facts, outbox = self.unconfigured_sessions[number]
            facts["in"] = counters[:3]
            outbox["frames"], outbox["size"] = counters[3:]
        else:
            raise BadSnapshot(f"the session with the number {number} was not copied")

    def facts_of(self, number: int) -> dict[str, Any]:
        """Return what other facts are checked against, of a copied session.

        Raises BadSnapshot.
        """
        session = self.made.get(number)
        if session is not None:
            return {
                "number": number,
                "left_at": session.closed_number,
                "address": session.address,
                "configured": True,
            }
        if number in self.unconfigured_sessions:
            return self.unconfigured_sessions[number][0]
        raise BadSnapshot(f"the session with the number {number} was not copied")

    def discard(self, number: int) -> None:
        """Remove a copied session that has left."""
        self._discarded.append(number)
        self.unconfigured_sessions.pop(number, None)
        self.unknown_recipients.pop(number, None)
        session = self.made.pop(number, None)
        if session is not None:
            session.open = False
            session.client.remove(session)
            self._broker.topics.leave(session, session.subscriptions)
            session.subscriptions = set()
            session.connection = session.outbox.owner = None

    def take_discarded(self) -> list[int]:
        """Return the numbers of the sessions discarded since the last call."""
        discarded, self._discarded = self._discarded, []
        return discarded

    def discard_at(self, client: Client, address: str, number: int) -> None:
        """Remove the copied session that had an address before session ``number``."""
        occupant = client.sessions.get(address)
        if occupant is not None and occupant.number != number:
            self.discard(occupant.number)

    def take_queue(self, number: int, first: int, count: int) -> CopiedQueue:
        """Remove and return the ``count`` copied frames from ``first`` on.

        Raises BadSnapshot.
        """
        queue = self._queues.pop(number, None) or CopiedQueue(first)
        if not queue.first <= first <= first + count == queue.end:
            raise BadSnapshot(
                f"{count} frames of a queue are wanted from {first} on, and other ones were copied"
            )
        queue.drop(first - queue.first)
        return queue

    def take_chunks(self, number: int, first: int, size: int) -> list[bytearray]:
        """Remove and return the copied chunks from ``first`` on, of ``size`` bytes in all.

        Raises BadSnapshot.
        """
        copied = [each for each in self._streams.pop(number, []) if each[0] >= first]
        end = first
        for place, chunk in copied:
            if place != end:
                raise BadSnapshot("a part of a stream was not copied")
            end += len(chunk)
        if end != first + size:
            raise BadSnapshot(
                f"{size} bytes of a stream are wanted from {first} on, and other ones were copied"
            )
        return [chunk for _, chunk in copied]

    def take_subscriptions(
        self, number: int, session: Session, ended: list[tuple[str, str | None]]
    ) -> set[tuple[str, str | None]]:
        """End the copied subscriptions in ``ended``; remove and return the rest, in
        force.
        """
        subscriptions = self._subscriptions.pop(number, set())
        for pattern, group in ended:
            if (pattern, group) in subscriptions:
                subscriptions.discard((pattern, group))
                self._broker.topics.discard(pattern, session, group)
        return subscriptions

    def drop_rest(self) -> None:
        """Discard the copies of sessions that are gone by now."""
        for number, subscriptions in self._subscriptions.items():
            self._broker.topics.leave(self.session(number), subscriptions)
        self._subscriptions.clear()
        self._queues.clear()
        self._streams.clear()
        self._sessions.clear()
        self.made.clear()
        self.unconfigured_sessions.clear()
        self.unknown_recipients.clear()
        self.clients.clear()

    def change_subscriptions(self, facts: dict[str, Any]) -> set[tuple[str, str | None]]:
        """Apply the changes of an idle session's subscriptions; return those in force."""
        number = facts["session"]
        for pattern, group in facts["unsubscribed"]:
            if (pattern, group) in self._subscriptions.get(number, ()):
                self._subscriptions[number].discard((pattern, group))
                self._broker.topics.discard(pattern, self.session(number), group)
        if facts["subscriptions"]:
            self._add_subscriptions(facts)
        return self._subscriptions.get(number, set())

    def _add_subscriptions(self, facts: dict[str, Any]) -> None:
        number = facts["session"]
        client = self._broker.exchange.resolve(facts["name"])
        session = self.made.get(number)
        subscriptions = (
            self._subscriptions.setdefault(number, set())
            if session is None
            else session.subscriptions
        )
        for pattern, group in facts["subscriptions"]:
            if (
                client is not None
                and (pattern, group) not in subscriptions
                and client.policy.subscribing(pattern) is not None
            ):
                self._broker.topics.add(pattern, self.session(number), group)
                subscriptions.add((pattern, group))

    def _add_chunks(self, facts: dict[str, Any], body: memoryview) -> None:
        if sum(facts["chunks"]) != len(body):
            raise BadSnapshot("the chunks of a block are not as long as it says")
        place, position = facts["place"], 0
        stream = self._streams.setdefault(facts["session"], [])
        for size in facts["chunks"]:
            chunk = bytearray(body[position : position + size])
            check_frames(memoryview(chunk))
            stream.append((place + position, chunk))
            position += size

    def _add_frames(self, facts: dict[str, Any], body: memoryview, now: float) -> None:
        count, first = facts["frames"], facts["first"]
        if len(body) < 25 * count:
            raise BadSnapshot("a block of frames has no room for what is remembered of them")
        sizes, flags = array("Q", bytes(body[: 8 * count])), bytes(body[8 * count : 9 * count])
        senders = array("q", bytes(body[9 * count : 17 * count]))
        times = array("d", bytes(body[17 * count : 25 * count]))
        content = bytes(body[25 * count :])
        if sum(sizes) != len(content):
            raise BadSnapshot("the frames of a block are not as long as it says")
        queue = self._queues.get(facts["session"])
        if queue is None or queue.end != first:
            queue = self._queues[facts["session"]] = CopiedQueue(first)
        frames: list[Queued] = []
        timed = position = 0
        view = memoryview(content)
        for size, flag, sender, time_left in zip(sizes, flags, senders, times, strict=True):
            end = position + size
            check_frames(view[position:end], one=True)
            if flag & ~FLAGS or flag & KEPT or math.isnan(time_left):
                raise BadSnapshot("a frame of a block has flags or a time that it can't have")
            timed += time_left != math.inf
            frames.append(
                Queued(
                    content[position:end],
                    bool(flag & RECEIPT),
                    bool(flag & PINNED),
                    None if sender == _NOBODY or flag & ORPHANED else self.session(sender),
                    bool(flag & ORPHANED),
                    False,
                    None if time_left == math.inf else now + time_left,
                )
            )
            position = end
        queue.add(frames, len(content), timed)
