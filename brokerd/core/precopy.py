"""What can be handed over before the hand-over: frames that wait in pools, subscriptions, and idle sessions.

A process that is being replaced copies them in blocks while it serves, and the new one checks them and makes objects of
them meanwhile. What has left a queue since then is left out, and what has come since is captured with all the rest, so
that little is to be done while everything stands still. A frame is known by its number in its queue: they
leave it at the front only. Source of the form: FORMAT of :mod:`brokerd.upgrade.channel`.
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

__all__ = ["KEPT", "ORPHANED", "PINNED", "RECEIPT", "Block", "CopiedQueue", "Copier", "Copies", "flags_of"]

#: What is remembered of a frame, as bits.
RECEIPT: Final = 1
PINNED: Final = 2
ORPHANED: Final = 4
KEPT: Final = 8

#: Frames, bytes and subscriptions in a block: about a millisecond's work.
_FRAMES: Final = 1000
_BYTES: Final = 1024 * 1024
_SUBSCRIPTIONS: Final = 250
#: See Copier.
_FEW: Final = 100
_NOBODY: Final = -1

#: What is captured of an idle session and may change. A subscription changes with a message only, or is one fewer.
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
#: What an idle session has nothing of.
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

#: Facts, and bytes beside them.
Block: TypeAlias = "tuple[dict[str, Any], list[bytes]]"


def flags_of(queued: Queued) -> int:
    """Return what is remembered of a frame, but for its sender and its time."""
    sender = queued.sender
    # All that is ever asked of a sender that has gone is whether it is still there.
    orphaned = queued.orphaned or (sender is not None and not sender.open)
    return queued.receipt * RECEIPT | queued.pinned * PINNED | orphaned * ORPHANED | queued.kept * KEPT


def _state(session: Session) -> tuple[object, ...]:
    return *_STATE(session), len(session.subscriptions), len(session.recipients)


class Copier:
    """Copies what a broker holds, block by block; knows afterwards what has been copied.

    few: fewer frames or subscriptions of one session than this are captured with the rest.
    subscriptions: those copied of each session, which may have ended since.
    """

    def __init__(self, broker: Broker, few: int = _FEW) -> None:
        self._broker = broker
        self._few = few
        self.subscriptions: dict[Session, set[tuple[str, str | None]]] = {}
        #: Of each session: the messages that it had sent when its subscriptions began to be copied.
        self._unchanged: dict[Session, int] = {}
        #: Of each queue: the number behind the last frame that has been copied.
        self._copied_to: dict[FrameOutbox, int] = {}
        #: The idle sessions that have been copied, and their clients: what each was like then.
        self._idle: dict[Session, tuple[object, ...]] = {}
        self._clients: dict[Client, tuple[object, ...]] = {}

    def is_idle(self, session: Session) -> bool:
        """Return whether nothing waits for the session, and nothing of it is under way."""
        return session.open and session.reached_by_event is None and not any(_BUSY(session))

    def note_idle(self, session: Session) -> None:
        """Note that the session, which is idle, is copied as it is now, with its client and all its subscriptions."""
        self._idle[session] = _state(session)
        self._clients[session.client] = _SHOWN(session.client)
        if session.subscriptions or session in self.subscriptions:
            self.subscriptions[session] = set(session.subscriptions)

    def forget_idle(self, session: Session) -> None:
        """Take note that something about the session's connection is not as it was copied."""
        self._idle.pop(session, None)

    def is_as_copied(self, session: Session) -> bool:
        """Return whether the session has been copied, and is still what it was then."""
        state = self._idle.get(session)
        if state is None or session.incoming_requests or session.outgoing_requests or session.expiring:
            return False
        return state == _state(session) and session.open and not session.outbox.waiting

    def is_shown_as_copied(self, client: Client) -> bool | None:
        """Return whether the client is what it was when it was copied; None if it was not."""
        shown = self._clients.get(client)
        return None if shown is None else client.meter is None and shown == _SHOWN(client)

    def blocks(self, now: float) -> Iterator[Block]:
        """Yield what has not been copied yet; others may change everything between two blocks. now: about."""
        for session in list(self._broker.exchange.sessions()):
            yield from self._subscriptions_of(session)
            yield from self._queue_of(session, now)

    def changes(self, session: Session) -> tuple[set[tuple[str, str | None]], set[tuple[str, str | None]]]:
        """Return the subscriptions that have not been copied, and those copied that have ended."""
        copied = self.subscriptions.get(session, set())
        if self._unchanged.get(session) == session.messages_in and len(copied) == len(session.subscriptions):
            return set(), set()
        return session.subscriptions - copied, copied - session.subscriptions

    def copied(self, session: Session) -> tuple[int, int]:
        """Return the number of the first frame in the session's queue, and how many from there on are copied."""
        outbox = session.outbox
        assert isinstance(outbox, FrameOutbox)
        first = outbox.plain_gone
        return first, max(0, self._copied_to.get(outbox, 0) - first)

    def _subscriptions_of(self, session: Session) -> Iterator[Block]:
        copied = self.subscriptions.get(session, set())
        many = len(session.subscriptions) - len(copied) >= self._few
        if many and not copied:
            self._unchanged[session] = session.messages_in
        # A difference of a quarter of a million takes as long as a frame may take.
        rest = iter(list(session.subscriptions - copied if copied else session.subscriptions) if many else [])
        while session.open and (block := list(islice(rest, _SUBSCRIPTIONS))):
            self.subscriptions.setdefault(session, copied).update(block)
            yield {"session": session.number, "name": session.client.name, "subscriptions": block}, []

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
    senders = array("q", [_NOBODY if queued.sender is None else queued.sender.number for queued in frames])
    deadlines = array("d", [math.inf if queued.deadline is None else queued.deadline - now for queued in frames])
    facts = {"session": session.number, "first": first, "frames": len(frames)}
    index = [sizes.tobytes(), flags, senders.tobytes(), deadlines.tobytes()]
    return facts, [*index, b"".join([queued.frame for queued in frames])]


class CopiedQueue:
    """The copied end of one queue.

    plain: the frames. first, end: the number of the first one, and that behind the last one.
    size, timed: their bytes, and how many of them have a ttl.
    """

    def __init__(self, first: int) -> None:
        self.first = self.end = first
        self.plain: deque[Queued] = deque()
        self.size = self.timed = 0

    def add(self, frames: list[Queued], size: int, timed: int) -> None:
        """Append frames, with the sums over them."""
        self.plain.extend(frames)
        self.end += len(frames)
        self.size += size
        self.timed += timed

    def drop(self, count: int) -> None:
        """Forget the first frames."""
        self.first += count
        for _ in range(count):
            gone = self.plain.popleft()
            self.size -= len(gone.frame)
            self.timed -= gone.deadline is not None


class Copies:
    """What was copied, checked and made objects of, for a broker that is still empty.

    Sessions that are spoken of before they are restored are there without anything in them.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._sessions: dict[int, Session] = {}
        self._queues: dict[int, CopiedQueue] = {}
        self._subscriptions: dict[int, set[tuple[str, str | None]]] = {}
        #: The facts of idle sessions and of their outboxes, by the session's number; the names of copied clients.
        self.idle: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        self.clients: set[str] = set()
        #: The numbers of the idle sessions that are made already, as their names are known here.
        self.made: set[int] = set()

    def add(self, facts: dict[str, Any], body: memoryview, now: float) -> None:
        """Take in one block. Raises BadSnapshot."""
        check_block(facts)
        if "frames" in facts:
            self._add_frames(facts, body, now)
        else:
            self._add_subscriptions(facts)

    def session(self, number: int) -> Session:
        """Return the session of that number, which may have nothing in it yet."""
        found = self._sessions.get(number)
        if found is None:
            found = self._sessions[number] = Session.__new__(Session)
            found.open = False
        return found

    def take_session(self, number: int) -> Session:
        """Return the session of that number, to be filled."""
        return self._sessions.pop(number, None) or Session.__new__(Session)

    def take_queue(self, number: int, first: int, count: int) -> CopiedQueue:
        """Return the copied frames with the numbers from ``first`` on. Raises BadSnapshot."""
        queue = self._queues.pop(number, None) or CopiedQueue(first)
        if not queue.first <= first <= first + count == queue.end:
            raise BadSnapshot(f"{count} frames of a queue are wanted from {first} on, and other ones were copied")
        queue.drop(first - queue.first)
        return queue

    def take_subscriptions(
        self, number: int, session: Session, ended: list[tuple[str, str | None]]
    ) -> set[tuple[str, str | None]]:
        """Return the copied subscriptions of a session but for those that have ended; they are in force."""
        kept = self._subscriptions.pop(number, set())
        for pattern, group in ended:
            if (pattern, group) in kept:
                kept.discard((pattern, group))
                self._broker.topics.discard(pattern, session, group)
        return kept

    def drop_rest(self) -> None:
        """Forget what was copied of sessions that are gone by now."""
        for number, subscriptions in self._subscriptions.items():
            self._broker.topics.leave(self.session(number), subscriptions)
        self._subscriptions.clear()
        self._queues.clear()
        self._sessions.clear()
        self.idle.clear()
        self.made.clear()
        self.clients.clear()

    def change_subscriptions(self, facts: dict[str, Any]) -> set[tuple[str, str | None]]:
        """Put the subscriptions of an idle session in force, and end those that have ended; return those in force."""
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
            if client is not None and (pattern, group) not in there and client.policy.subscribing(pattern) is not None:
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
