"""State that is copied before the handover: queued frames of pools, subscriptions, idle
sessions.

The old process copies them in blocks while it serves. The new process checks them and
creates objects from them meanwhile. Frames that have left a queue since then are left
out. Frames that have been added since then are captured with the rest. So little is
left to do while nothing is served. A frame is identified by its number in its queue,
because frames leave a queue at the front only. Source of the form: FORMAT of
:mod:`brokerd.upgrade.channel`.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterator
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from brokerd.core.outbox import FrameOutbox, Queued
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
#: Stands for the number of the sender in a frame without a sender.
_NOBODY: Final = -1

#: The state of an idle session that is captured and may change. Its subscriptions
#: change only with a message or by becoming fewer.
_STATE: Final = attrgetter(
    "client",
    "address",
    "number",
    "closed_number",
    "messages_in",
    "bytes_in",
    "errors_in",
    "bytes_to_skip",
    "charged",
    "held_by",
    "hold_deadline",
    "closing",
    "slow",
    "allowance",
    "goaway",
    "reached_by_event",
    "outbox",
    "outbox.frames",
    "outbox.size",
    "outbox.limit",
    "outbox.blocked",
    "outbox.stalled",
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
    "expiring",
    "reached_by_event",
    "outbox.waiting",
    "outbox.blocked",
    "outbox.stalled",
)
_SHOWN: Final = attrgetter("changed_at", "shown_online", "shown_since", "turn", "meter")

#: Facts, and the bytes that belong to them.
Block: TypeAlias = "tuple[dict[str, Any], list[bytes]]"


def flags_of(queued: Queued) -> int:
    """Return the flags of a frame: all that is stored besides its sender and deadline."""
    sender = queued.sender
    # Of a sender that has gone, only this fact is ever used.
    orphaned = queued.orphaned or (sender is not None and not sender.open)
    return (
        queued.receipt * RECEIPT | queued.pinned * PINNED | orphaned * ORPHANED | queued.kept * KEPT
    )


def _state(session: Session) -> tuple[object, ...]:
    return *_STATE(session), len(session.subscriptions), len(session.recipients)


class Copier:
    """A copy of a broker's state in progress: its blocks, and the record of copied
    parts.

    few: fewer frames or subscriptions of one session than this are captured with the
    rest. subscriptions: the copied subscriptions of each session, which may have ended
    since.
    """

    def __init__(self, broker: Broker, few: int = _FEW) -> None:
        self._broker = broker
        self._few = few
        self.subscriptions: dict[Session, set[tuple[str, str | None]]] = {}
        #: By session: how many messages it had sent when copying its subscriptions
        #: began.
        self._unchanged: dict[Session, int] = {}
        #: By queue: the number after that of the last copied frame.
        self._copied_to: dict[FrameOutbox, int] = {}
        #: The idle sessions that have been copied, and their clients, with their state
        #: then.
        self._idle: dict[Session, tuple[object, ...]] = {}
        self._clients: dict[Client, tuple[object, ...]] = {}

    def is_idle(self, session: Session) -> bool:
        """Return whether the session has nothing queued and nothing in progress."""
        return session.open and session.reached_by_event is None and not any(_BUSY(session))

    def note_idle(self, session: Session) -> None:
        """Record that an idle session is copied as it is now, with its client and
        subscriptions.
        """
        self._idle[session] = _state(session)
        self._clients[session.client] = _SHOWN(session.client)
        if session.subscriptions or session in self.subscriptions:
            self.subscriptions[session] = set(session.subscriptions)

    def forget_idle(self, session: Session) -> None:
        """Record that the session's connection is no longer as it was when it was
        copied.
        """
        self._idle.pop(session, None)

    def is_as_copied(self, session: Session) -> bool:
        """Return whether the session has been copied and has not changed since then."""
        state = self._idle.get(session)
        if (
            state is None
            or session.incoming_requests
            or session.outgoing_requests
            or session.expiring
        ):
            return False
        return state == _state(session) and session.open and not session.outbox.waiting

    def is_shown_as_copied(self, client: Client) -> bool | None:
        """Return whether the client is unchanged since it was copied; None if it was
        not copied.
        """
        shown = self._clients.get(client)
        return None if shown is None else client.meter is None and shown == _SHOWN(client)

    def blocks(self, now: float) -> Iterator[Block]:
        """Yield the state that has not been copied yet; it may change between two
        blocks.

        now: the approximate time.
        """
        for session in list(self._broker.exchange.sessions()):
            yield from self._subscriptions_of(session)
            yield from self._queue_of(session, now)

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
        many = len(session.subscriptions) - len(copied) >= self._few
        if many and not copied:
            self._unchanged[session] = session.messages_in
        # The difference of two sets with 250,000 elements takes as long as a frame may
        # take.
        rest = iter(
            list(session.subscriptions - copied if copied else session.subscriptions)
            if many
            else []
        )
        while session.open and (block := list(islice(rest, _SUBSCRIPTIONS))):
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


def _block(session: Session, first: int, frames: list[Queued], now: float) -> Block:
    sizes = array("Q", [len(queued.frame) for queued in frames])
    flags = bytes([flags_of(queued) for queued in frames])
    senders = array(
        "q", [_NOBODY if queued.sender is None else queued.sender.number for queued in frames]
    )
    deadlines = array(
        "d", [math.inf if queued.deadline is None else queued.deadline - now for queued in frames]
    )
    facts = {"session": session.number, "first": first, "frames": len(frames)}
    index = [sizes.tobytes(), flags, senders.tobytes(), deadlines.tobytes()]
    return facts, [*index, b"".join([queued.frame for queued in frames])]


class CopiedQueue:
    """The copied frames of one queue.

    plain: the frames. first, end: the number of the first frame, and that after the
    last. size, timed: the bytes of the frames, and how many of the frames have a ttl.
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
            gone = self.plain.popleft()
            self.size -= len(gone.frame)
            self.timed -= gone.deadline is not None


class Copies:
    """The copied state, checked and turned into objects, for a broker that is still
    empty.

    A session that is referred to before it is restored exists as an empty object.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._sessions: dict[int, Session] = {}
        self._queues: dict[int, CopiedQueue] = {}
        self._subscriptions: dict[int, set[tuple[str, str | None]]] = {}
        #: The facts of idle sessions and of their outboxes, by the session's number;
        #: and the names of the copied clients.
        self.idle: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        self.clients: set[str] = set()
        #: The numbers of the idle sessions that exist already, as their names are known
        #: here.
        self.made: set[int] = set()

    def add(self, facts: dict[str, Any], body: memoryview, now: float) -> None:
        """Add one block. Raises BadSnapshot."""
        check_block(facts)
        if "frames" in facts:
            self._add_frames(facts, body, now)
        else:
            self._add_subscriptions(facts)

    def session(self, number: int) -> Session:
        """Return the session with that number, which may still be empty."""
        found = self._sessions.get(number)
        if found is None:
            found = self._sessions[number] = Session.__new__(Session)
            found.open = False
        return found

    def take_session(self, number: int) -> Session:
        """Remove and return the session with that number, to be filled."""
        return self._sessions.pop(number, None) or Session.__new__(Session)

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

    def take_subscriptions(
        self, number: int, session: Session, ended: list[tuple[str, str | None]]
    ) -> set[tuple[str, str | None]]:
        """End the copied subscriptions in ``ended``; remove and return the rest, in
        force.
        """
        kept = self._subscriptions.pop(number, set())
        for pattern, group in ended:
            if (pattern, group) in kept:
                kept.discard((pattern, group))
                self._broker.topics.discard(pattern, session, group)
        return kept

    def drop_rest(self) -> None:
        """Discard the copies of sessions that are gone by now."""
        for number, subscriptions in self._subscriptions.items():
            self._broker.topics.leave(self.session(number), subscriptions)
        self._subscriptions.clear()
        self._queues.clear()
        self._sessions.clear()
        self.idle.clear()
        self.made.clear()
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
        there = self._subscriptions.setdefault(number, set())
        for pattern, group in facts["subscriptions"]:
            if (
                client is not None
                and (pattern, group) not in there
                and client.policy.subscribing(pattern) is not None
            ):
                self._broker.topics.add(pattern, self.session(number), group)
                there.add((pattern, group))

    def _add_frames(self, facts: dict[str, Any], body: memoryview, now: float) -> None:
        count, first = facts["frames"], facts["first"]
        if len(body) < 25 * count:
            raise BadSnapshot("a block of frames has no room for what is remembered of them")
        sizes, flags = array("Q", bytes(body[: 8 * count])), bytes(body[8 * count : 9 * count])
        senders = array("q", bytes(body[9 * count : 17 * count]))
        lefts = array("d", bytes(body[17 * count : 25 * count]))
        rest = bytes(body[25 * count :])
        if sum(sizes) != len(rest):
            raise BadSnapshot("the frames of a block are not as long as it says")
        queue = self._queues.get(facts["session"])
        if queue is None or queue.end != first:
            queue = self._queues[facts["session"]] = CopiedQueue(first)
        frames: list[Queued] = []
        timed = position = 0
        view = memoryview(rest)
        for size, flag, sender, left in zip(sizes, flags, senders, lefts, strict=True):
            end = position + size
            check_frames(view[position:end], one=True)
            if flag & ~FLAGS or flag & KEPT or math.isnan(left):
                raise BadSnapshot("a frame of a block has flags or a time that it can't have")
            timed += left != math.inf
            frames.append(
                Queued(
                    rest[position:end],
                    bool(flag & RECEIPT),
                    bool(flag & PINNED),
                    None if sender == _NOBODY or flag & ORPHANED else self.session(sender),
                    bool(flag & ORPHANED),
                    False,
                    None if left == math.inf else now + left,
                )
            )
            position = end
        queue.add(frames, len(rest), timed)
