"""All mailboxes: the answers of their store, and the connections that open them.

No message is lost without a word: whatever becomes of a stored message is written to
the disk first. The rules are from docs/mailboxes.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf
from typing import TYPE_CHECKING, Any, Final

from brokerd.core.consumer import Consumer
from brokerd.core.mailboxes.acknowledging import Acknowledging
from brokerd.core.mailboxes.clock import Clock
from brokerd.core.mailboxes.commits import Changed, Commits, Outcome
from brokerd.core.mailboxes.feeding import Feeding
from brokerd.core.mailboxes.importing import Importing
from brokerd.core.mailboxes.inspection import Inspection
from brokerd.core.mailboxes.mailbox import Mailbox
from brokerd.core.mailboxes.store_calls import StoreCalls
from brokerd.core.mailboxes.storing import Storing
from brokerd.core.mailboxes.timers import Timers
from brokerd.core.routing_result import RoutingResult
from brokerd.core.sink import KEY_SIZE
from brokerd.core.stored_message import Message
from brokerd.core.topics import Topics

if TYPE_CHECKING:
    from brokerd.core.exchange import Client, Exchange
    from brokerd.core.held_senders import HeldSenders
    from brokerd.core.mailboxes.journal import (
        Buried,
        Committed,
        Contents,
        Failed,
        Journal,
        Rows,
    )
    from brokerd.core.replies import Replies
    from brokerd.core.session import Session
    from brokerd.core.status import Status
    from brokerd_client.wire.envelope import Envelope

__all__ = ["Mailboxes"]

#: Most messages delivered each time that the decisions of the core are carried out.
_FED: Final = 256
#: Most connections listed with one mailbox.
_LISTED: Final = 1000


def _ignore(before: tuple[str, ...], after: tuple[str, ...]) -> None:
    """Do nothing: without a cluster, no host has to know the patterns."""


class Mailboxes:
    """The mailboxes of a broker.

    Attributes:
        boxes: All mailboxes by name, also orphaned ones.
        dedup: Seconds for which a deduplication key is remembered; 0 without a store.
    """

    def __init__(
        self,
        exchange: Exchange,
        status: Status,
        replies: Replies,
        held: HeldSenders,
        now_wall: float,
    ) -> None:
        self.boxes: dict[str, Mailbox] = {}
        self.dedup = 0.0
        self.clock = Clock(now_wall)
        self.timers = Timers(self.clock)
        self.commits = Commits(replies, self.clock)
        self.calls = StoreCalls(self.commits)
        self.storing = Storing(status, replies, held, self.commits, self.calls, self.clock)
        self.feeding = Feeding(
            exchange,
            status,
            replies,
            self.commits,
            self.calls,
            self.clock,
            self.timers,
            self.storing,
        )
        self.acknowledging = Acknowledging(
            replies, self.commits, self.clock, self.timers, self.feeding
        )
        self.inspection = Inspection(
            self.commits, self.calls, self.storing, self.feeding, self.acknowledging
        )
        self.importing = Importing(replies, self.commits, self.clock)
        self._taps = replies.taps
        self._status = status
        self._held = held
        #: Senders that wait for the end of a pause.
        self._paused: dict[Session, None] = {}
        self._topics: Topics[Mailbox] = Topics()
        #: Called with the patterns that a mailbox had and has.
        self.on_patterns: Callable[[tuple[str, ...], tuple[str, ...]], None] = _ignore
        #: The patterns of each mailbox in ``_topics``.
        self._patterns: dict[Mailbox, tuple[str, ...]] = {}
        for client in exchange.clients.values():
            if client.config.mailbox is not None:
                self.configure(client)

    # Configuration

    def configure(self, client: Client) -> None:
        """Apply the entry of a client, which is new or has changed."""
        config = client.config.mailbox
        mailbox = self.boxes.get(client.name)
        if config is None:
            if mailbox is not None and mailbox.client is not None:
                self.remove(client.name)
            client.mailbox = client.sink = None
            return
        if mailbox is None:
            mailbox = self.box(client.name)
        mailbox.client = client
        client.mailbox = client.sink = mailbox
        self.commits.collect(mailbox)
        self._subscribe(mailbox, tuple(rule.pattern for rule in config.subscribe))
        self.storing.release(mailbox)
        self.timers.schedule(mailbox)

    def remove(self, name: str) -> None:
        """Make the mailbox of a name orphaned: its client or its entry was removed."""
        mailbox = self.boxes.get(name)
        if mailbox is None or mailbox.client is None:
            return
        for session in list(mailbox.consumers):
            self.close(session)
        mailbox.client.mailbox = mailbox.client.sink = None
        mailbox.client = None
        self._subscribe(mailbox, ())
        self.storing.release(mailbox)

    def _subscribe(self, mailbox: Mailbox, patterns: tuple[str, ...]) -> None:
        before = self._patterns.pop(mailbox, ())
        if patterns:
            self._patterns[mailbox] = patterns
        if before != patterns:
            self.on_patterns(before, patterns)
            for pattern in before:
                self._topics.discard(pattern, mailbox)
            for pattern in patterns:
                self._topics.add(pattern, mailbox)

    def patterns(self) -> Iterator[str]:
        """Yield the patterns of each mailbox."""
        for patterns in self._patterns.values():
            yield from patterns

    def subscribed(self, topic: str) -> Sequence[Mailbox]:
        """Return the mailboxes that store events on a topic."""
        return tuple(self._topics.find(topic).everyone) if self._patterns else ()

    @property
    def is_active(self) -> bool:
        """Whether the broker has a store."""
        return self.calls.journal is not None

    @property
    def subscribes(self) -> bool:
        """Whether any mailbox stores events."""
        return bool(self._patterns)

    @property
    def largest(self) -> int:
        """Bytes of the longest message that any mailbox takes."""
        configs = [mailbox.config for mailbox in self.boxes.values()]
        return max((config.max_message for config in configs if config is not None), default=0)

    # Frames

    def store(
        self,
        source: Session,
        mailboxes: Sequence[Mailbox],
        envelope: Envelope,
        frame: memoryview,
        now: float,
        outcome: Outcome | None = None,
    ) -> RoutingResult:
        """Store a frame in one or several mailboxes. BLOCKED: the sender waits for room.

        outcome: that of an event that other hosts are to store, too.
        """
        if self.commits.is_paused:
            return self._hold(source)
        self.clock.advance(now)
        return self.storing.store(source, mailboxes, envelope, frame, now, outcome)

    def acknowledge(
        self, source: Session, envelope: Envelope, payload: memoryview, now: float
    ) -> RoutingResult:
        """Carry out one ACK frame, or refuse it."""
        if self.commits.is_paused:
            return self._hold(source)
        self.clock.advance(now)
        self.acknowledging.acknowledge(source, envelope, payload)
        return RoutingResult.CONSUMED

    # Upgrades

    def pause(self) -> None:
        """Accept nothing new until ``resume``: its senders wait."""
        self.acknowledging.return_some(inf)
        self.commits.is_paused = True
        self.commits.collect_all()
        self.acknowledging.stop_collecting(self.boxes.values())

    def resume(self) -> None:
        """Accept messages and ACKs again: the upgrade has failed."""
        self.commits.is_paused = False
        paused, self._paused = self._paused, {}
        for session in paused:
            if session.held_by is session:
                self._held.release(session)
        for mailbox in self.boxes.values():
            self.feeding.hungry[mailbox] = None
            self.timers.schedule(mailbox)

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is on its way to the store or from it."""
        return not (self.commits or self.calls or self.acknowledging.leaving)

    def _hold(self, source: Session) -> RoutingResult:
        self._paused[source] = None
        self._held.add(source, source, inf)
        return RoutingResult.BLOCKED

    def box(self, name: str) -> Mailbox:
        """Return the mailbox of a name, which may be new."""
        mailbox = self.boxes.get(name)
        if mailbox is None:
            mailbox = self.boxes[name] = Mailbox(name)
        return mailbox

    # Connections

    def open(self, session: Session, window: int | None, window_bytes: int) -> dict[str, Any]:
        """Deliver messages to a connection, or change its limits; return the answer.

        Args:
            session: The connection, whose client has a mailbox.
            window: Most messages that it holds; None for the mailbox's own number.
            window_bytes: Most bytes of these.
        """
        mailbox = session.client.mailbox
        assert mailbox is not None
        config = mailbox.config
        assert config is not None
        consumer = session.consumer
        if consumer is None:
            consumer = Consumer(session, mailbox, 0, 0)
            session.consumer = mailbox.consumers[session] = consumer
        consumer.window = config.window if window is None else window
        consumer.window_bytes = min(window_bytes, session.client.config.queue)
        self.feeding.note_room(consumer)
        return {
            "window": consumer.window,
            "window_bytes": consumer.window_bytes,
            **self.counts(mailbox),
        }

    def close(self, session: Session, why: str = "") -> None:
        """Deliver nothing more to a connection, and return what it holds.

        why: the reason for which that counts as a failed attempt; "" if it does not.
        """
        consumer, session.consumer = session.consumer, None
        if consumer is None:
            return
        mailbox = consumer.mailbox
        del mailbox.consumers[session]
        mailbox.free.pop(consumer, None)
        if mailbox.reserved is consumer:
            mailbox.reserved = None
        self.acknowledging.return_all(consumer, why)
        self.feeding.hungry[mailbox] = None

    def leave(self, session: Session) -> None:
        """Return what a connection holds that has ended."""
        self.storing.forget(session)
        is_broker_s = (
            session.closing
            or self.commits.is_paused
            or session.goaway_sent
            or session.parting
            or session.mute
            or session.retired
            or self._status.draining
        )
        self.close(session, "" if is_broker_s else "the connection ended")

    def on_writable(self, session: Session) -> None:
        """Note that the system has taken bytes of a connection's outbox."""
        if session.consumer is not None:
            self.feeding.note_room(session.consumer)

    # Turns

    @property
    def has_work(self) -> bool:
        """Whether ``run`` has something to do."""
        return (
            self.feeding.has_work
            or self.acknowledging.has_collected
            or self.commits.wants_flush
            or bool(self.acknowledging.leaving)
        )

    def run(self, count: int = _FED) -> None:
        """Deliver up to ``count`` messages, and give the open batch to the store."""
        self.acknowledging.collect_all()
        self.acknowledging.return_some()
        self.feeding.feed(count)
        if self.commits.wants_flush:
            self.calls.flush()

    def tick(self, now: float) -> None:
        """Make messages ready that are due; return those that were held for too long."""
        self.clock.advance(now)
        for mailbox in self.timers.due():
            self.acknowledging.time_out(mailbox)
            self.feeding.wake(mailbox)

    # Answers of the store

    def opened(self, journal: Journal, contents: Iterable[Contents], dedup: float) -> None:
        """Begin to use a store. contents: what it has found on disk."""
        self.calls.journal = journal
        self.dedup = dedup
        for found in contents:
            mailbox = self.box(found.mailbox)
            mailbox.fill(found)
            self.timers.schedule(mailbox)

    def attached(self, journal: Journal) -> None:
        """Continue with the store of the former process."""
        self.calls.journal = journal
        for mailbox in self.boxes.values():
            for consumer in mailbox.consumers.values():
                self.feeding.note_room(consumer)
            self.feeding.wake(mailbox)

    def committed(self, answer: Committed) -> None:
        """Deliver the messages of a batch that is on disk, and tell their senders."""
        stored, changed = self.commits.committed(answer)
        self._forget_keys(answer.forgotten_keys)
        timed: dict[Mailbox, None] = {}
        for mailbox, new in stored:
            if self._taps.active:
                for frame in (new.frame,) if isinstance(new, Message) else new.split():
                    self._taps.note_stored(frame, mailbox.name, "stored")
            if isinstance(new, Message):
                mailbox.add(new)
                if new.due_at is not None:
                    timed[mailbox] = None
            else:
                mailbox.add_all(new)
            self.feeding.hungry[mailbox] = None
        self._place(changed)
        for mailbox in timed:
            self.feeding.wake(mailbox)
        self._release_behind()

    def failed(self, answer: Failed) -> None:
        """Tell the senders of a batch that was not written."""
        changed = self.commits.failed(answer)
        self._forget_keys(answer.forgotten_keys)
        self._place(changed)
        if self.commits.failure:
            self.fail(self.commits.failure)
        self._release_behind()

    def forgotten(self, keys: Iterable[tuple[str, int]]) -> None:
        """Note how many keys of each mailbox were forgotten."""
        self._forget_keys(keys)

    def fail(self, reason: str) -> None:
        """Store nothing more: the store has ended."""
        self.commits.failure = self.commits.failure or reason
        self.acknowledging.stop_collecting(self.boxes.values())
        for mailbox in self.boxes.values():
            self.storing.release(mailbox)

    def _place(self, changed: Iterable[Changed]) -> None:
        placed: dict[Mailbox, None] = {}
        for mailbox, message, state in changed:
            if state is None:
                mailbox.add(message)
            elif not mailbox.unpark(message.seq):
                continue
            elif state == "ready":
                mailbox.put_again(message)
            elif state == "delayed":
                mailbox.delay(message)
            placed[mailbox] = None
        for mailbox in placed:
            self.feeding.wake(mailbox)
            self.feeding.hungry[mailbox] = None

    def _release_behind(self) -> None:
        """Release the senders that waited only because the disk was behind."""
        if not self.commits.is_behind:
            self.storing.release_behind()

    def _forget_keys(self, forgotten: Iterable[tuple[str, int]]) -> None:
        for name, count in forgotten:
            mailbox = self.boxes[name]
            mailbox.keys -= count
            self.storing.release(mailbox)

    def buried(self, buried: Buried) -> None:
        """Note that damaged messages became dead letters."""
        self.boxes[buried.mailbox].bury(buried.messages)

    def rows(self, request: int, rows: Rows) -> None:
        """Carry on with messages that were read back."""
        self.calls.answer(request, rows)

    def key_looked_up(self, request: int, known: bool) -> None:
        """Carry on with the answer of ``look_up_key``."""
        self.calls.answer(request, known)

    def purged(self, request: int, count: int, size: int) -> None:
        """Carry on after messages were removed; their number and bytes."""
        self.calls.answer(request, count, size)

    # Facts

    def counts(self, mailbox: Mailbox) -> dict[str, Any]:
        """Return the counts of a mailbox, as its listing has them."""
        oldest = mailbox.oldest()
        return {
            "name": mailbox.name,
            **mailbox.counts(),
            "bytes": mailbox.size + mailbox.keys * KEY_SIZE,
            "oldest": None if oldest is None else max(0.0, self.clock.wall - oldest),
            "orphaned": mailbox.client is None,
        }

    def entry(self, mailbox: Mailbox) -> dict[str, Any]:
        """Return a mailbox for the listing: its counts, and its connections."""
        connections = [
            {
                "address": consumer.session.address,
                "held": len(consumer.held),
                "window": consumer.window,
                "oldest": max(0.0, self.clock.now - next(iter(consumer.held.values())).held_since)
                if consumer.held
                else None,
            }
            for consumer in list(mailbox.consumers.values())[:_LISTED]
        ]
        return {**self.counts(mailbox), "connections": connections}

    def listed(self, name: str | None) -> Iterator[Mailbox]:
        """Yield the mailbox of one client, or all mailboxes, also orphaned ones."""
        for mailbox in list(self.boxes.values()):
            if (name is None or mailbox.name == name) and (
                mailbox.client is not None or mailbox.messages
            ):
                yield mailbox
