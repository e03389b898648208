"""Feeding: which connection gets which message of a mailbox, and when.

Messages are delivered in the order of their seqs, to the connections that have room, in
turns. A message with a failed attempt is delivered alone: to a connection that holds
nothing else of this mailbox. If none holds nothing, the one that holds the fewest gets
no more until it is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from brokerd.core.mailboxes.store_calls import last_seq_of, messages_of
from brokerd.core.stored_message import joined_frames, sender_of
from brokerd_client.wire.envelope import ErrorCode

if TYPE_CHECKING:
    from brokerd.core.consumer import Consumer
    from brokerd.core.exchange import Exchange
    from brokerd.core.mailboxes.clock import Clock
    from brokerd.core.mailboxes.commits import Commits
    from brokerd.core.mailboxes.journal import Rows
    from brokerd.core.mailboxes.mailbox import Mailbox
    from brokerd.core.mailboxes.store_calls import StoreCalls
    from brokerd.core.mailboxes.storing import Storing
    from brokerd.core.mailboxes.timers import Timers
    from brokerd.core.replies import Replies
    from brokerd.core.session import Session
    from brokerd.core.status import Status
    from brokerd.core.stored_message import Message

__all__ = ["Feeding"]

#: Most messages of a mailbox read back at once: as many as the store keeps together, and a
#: short run before them; and most bytes of these.
_RUN: Final = 1280
_RUN_BYTES: Final = 512 * 1024
#: Most bytes of messages that are put into an outbox at once.
_DELIVERED_BYTES: Final = 64 * 1024


class Feeding:
    """Delivers the ready messages of all mailboxes.

    hungry: mailboxes that may have something to deliver.
    delivered, expired: messages so far.
    """

    def __init__(
        self,
        exchange: Exchange,
        status: Status,
        replies: Replies,
        commits: Commits,
        calls: StoreCalls,
        clock: Clock,
        timers: Timers,
        storing: Storing,
    ) -> None:
        self._timers = timers
        self._exchange = exchange
        self._status = status
        self._replies = replies
        self._taps = replies.taps
        self._commits = commits
        self._calls = calls
        self._clock = clock
        self._storing = storing
        self.hungry: dict[Mailbox, None] = {}
        #: Consumers whose outbox had no room, and had not been offered to the system.
        self._unwritten: list[Consumer] = []
        self.delivered = self.expired = 0

    @property
    def has_work(self) -> bool:
        """Whether ``feed`` may have something to deliver."""
        return bool(self.hungry or self._unwritten)

    def feed(self, count: int) -> None:
        """Deliver up to ``count`` messages; the rest follow in further calls."""
        unwritten, self._unwritten = self._unwritten, []
        for consumer in unwritten:
            self.note_room(consumer)
        while self.hungry and count > 0:
            mailbox = next(iter(self.hungry))
            del self.hungry[mailbox]
            count = self._feed(mailbox, count)

    def note_room(self, consumer: Consumer) -> None:
        """Note that a consumer may have room for one more message."""
        mailbox = consumer.mailbox
        if mailbox.consumers.get(consumer.session) is not consumer:
            return
        if consumer.has_room and (consumer is not mailbox.reserved or not consumer.held):
            mailbox.free[consumer] = None
            self.hungry[mailbox] = None

    def _feed(self, mailbox: Mailbox, count: int) -> int:
        """Deliver messages of one mailbox; return how many more may be delivered."""
        if self._status.draining or self._commits.failure or self._commits.is_paused:
            return count
        # What was just returned comes first, once that is on disk.
        stop = mailbox.stop
        while count > 0:
            run = self._deliver_run(mailbox, stop, count)
            if run:
                count -= run
                continue
            suspect = mailbox.first_suspect()
            if suspect is not None and suspect.seq > stop:
                break
            if suspect is None:
                self._end_reservation(mailbox)
            elif self._remove_if_expired(mailbox, suspect) or self._give_alone(mailbox, suspect):
                count -= 1
                continue
            message = mailbox.first()
            if message is None or message.seq > stop:
                break
            if not self._remove_if_expired(mailbox, message):
                consumer = self._next(mailbox, message)
                if consumer is None:
                    break
                mailbox.take(message)
                self._deliver(consumer, message)
            count -= 1
        else:
            self.hungry[mailbox] = None
        self.read_runs(mailbox)
        return count

    def read_runs(self, mailbox: Mailbox) -> None:
        """Read further messages from the disk, if some are wanted."""
        if self._commits.failure or self._commits.is_paused:
            return
        run = mailbox.run
        if mailbox.wants_run and mailbox.consumers:
            mailbox.reading = True
            self._calls.read(
                mailbox.name,
                "ready",
                (0.0, mailbox.loaded_to),
                _RUN,
                _RUN_BYTES,
                lambda rows: self._load(mailbox, run, rows),
            )
        if mailbox.wants_delayed(self._clock.wall):
            mailbox.reading_delayed = True
            self._calls.read(
                mailbox.name,
                "delayed",
                mailbox.delayed_to,
                _RUN,
                _RUN_BYTES,
                lambda rows: self._load_delayed(mailbox, run, rows),
            )
        elif mailbox.unloaded_delayed:
            # As long as memory was short, they had no timer.
            self._timers.schedule(mailbox)

    def _load(self, mailbox: Mailbox, run: int, rows: Rows) -> None:
        if run != mailbox.run:
            return
        mailbox.load(messages_of(rows), last_seq_of(rows))
        self.hungry[mailbox] = None

    def _load_delayed(self, mailbox: Mailbox, run: int, rows: Rows) -> None:
        if run != mailbox.run:
            return
        mailbox.load_delayed(messages_of(rows), is_end=not rows)
        self.wake(mailbox)

    def wake(self, mailbox: Mailbox) -> None:
        """Make the delayed messages ready that are due."""
        if mailbox.wake(self._clock.wall):
            self.hungry[mailbox] = None
        self.read_runs(mailbox)
        self._timers.schedule(mailbox)

    # One message

    def _next(self, mailbox: Mailbox, message: Message) -> Consumer | None:
        """Return the consumer that gets a message, or None if none has room."""
        free = mailbox.free
        avoided = message.avoid
        while free:
            consumer = next(iter(free))
            del free[consumer]
            if not (
                consumer.has_room
                and consumer.fits(message.size)
                and consumer is not mailbox.reserved
                and self._has_room(consumer, message.size)
            ):
                continue
            if consumer.session is avoided and free:
                # Another member is preferred, if it has room.
                avoided = None
                free[consumer] = None
                continue
            return consumer
        return None

    def _deliver_run(self, mailbox: Mailbox, stop: float, count: int) -> int:
        """Deliver the first ready messages to the next consumer; return how many.

        While other consumers have room, too, it gets at most half of its share. So in the
        end all of them have about the same number. Returns 0 where each message needs a
        look of its own.

        Args:
            mailbox: Their mailbox.
            stop: Only messages with lower seqs are delivered.
            count: Most messages.
        """
        if not mailbox.free or mailbox.suspects:
            return 0
        if len(mailbox.free) > 1:
            count = min(count, len(mailbox.ready) // (2 * len(mailbox.free)))
        consumer = next(iter(mailbox.free))
        outbox = consumer.session.outbox
        if not (consumer.has_room and outbox.is_stream) or consumer is mailbox.reserved:
            return 0
        messages, size = consumer.first_of(
            mailbox.ready, count, stop, _DELIVERED_BYTES, self._clock.wall
        )
        if not messages or not self._has_room(consumer, size):
            return 0
        mailbox.take_run(len(messages), size)
        del mailbox.free[consumer]
        outbox.append(joined_frames(messages))
        outbox.frames += len(messages) - 1
        self._replies.touch(consumer.session)
        consumer.hold_all(messages, size, self._clock.now)
        if consumer.has_room:
            mailbox.free[consumer] = None
        self.delivered += len(messages)
        for message in messages if self._taps.active else ():
            self._taps.note_stored(message.frame, consumer.session.address, "delivered")
        if mailbox.has_timeout:
            self._timers.schedule(mailbox)
        return len(messages)

    def _give_alone(self, mailbox: Mailbox, message: Message) -> bool:
        """Deliver a message with a failed attempt, if a consumer holds nothing else."""
        idle = [consumer for consumer in mailbox.free if not consumer.held and consumer.has_room]
        idle.sort(key=lambda consumer: consumer.session is message.avoid)
        for consumer in idle:
            del mailbox.free[consumer]
            if self._has_room(consumer, message.size):
                mailbox.take(message)
                if mailbox.reserved is consumer:
                    mailbox.reserved = None
                consumer.alone = True
                self._deliver(consumer, message)
                return True
        if mailbox.reserved is None:
            busy = [
                consumer
                for consumer in mailbox.consumers.values()
                if consumer.held and not consumer.alone and not consumer.session.retired
            ]
            if busy:
                mailbox.reserved = min(busy, key=lambda consumer: len(consumer.held))
                mailbox.free.pop(mailbox.reserved, None)
        return False

    def _end_reservation(self, mailbox: Mailbox) -> None:
        """Feed the reserved consumer again: no message is to be delivered alone."""
        consumer, mailbox.reserved = mailbox.reserved, None
        if consumer is not None:
            self.note_room(consumer)

    def _has_room(self, consumer: Consumer, size: int) -> bool:
        """Return whether a consumer's outbox has room; else it is tried again later."""
        outbox = consumer.session.outbox
        if consumer.session.closing:
            return False
        if outbox.reserve(size):
            return True
        if not outbox.blocked:
            self._replies.touch(consumer.session)
            self._unwritten.append(consumer)
        return False

    def _deliver(self, consumer: Consumer, message: Message) -> None:
        """Put a message into a consumer's outbox, which has room for it."""
        self._replies.pass_on(consumer.session, message.delivery())
        if self._taps.active:
            self._taps.note_stored(message.frame, consumer.session.address, "delivered")
        consumer.hold(message, self._clock.now)
        consumer.mailbox.held[message.seq] = consumer
        self.delivered += 1
        if consumer.mailbox.has_timeout:
            self._timers.schedule(consumer.mailbox)
        if consumer.has_room:
            consumer.mailbox.free[consumer] = None

    def _remove_if_expired(self, mailbox: Mailbox, message: Message) -> bool:
        """Remove a ready message if its ttl is over; return whether it was."""
        if not message.has_expired(self._clock.wall):
            return False
        mailbox.take(message)
        self.expire(mailbox, message)
        return True

    def expire(self, mailbox: Mailbox, message: Message) -> None:
        """Delete a message whose ttl is over, and tell its sender."""
        self.expired += 1
        self.delete(mailbox, message)
        address, message_id = sender_of(message.frame)
        sender = self._sender_of(address, message.stored_at)
        reason = f"ttl was over before {mailbox.name} processed the message"
        if sender is None:
            self._replies.log_events.note(
                "mailbox.expired", None, mailbox.name, address, reason, message_id=message_id
            )
            if self._taps.active:
                self._taps.note_stored(message.frame, mailbox.name, "expired")
        else:
            self._replies.refuse(
                sender, message_id, ErrorCode.EXPIRED, reason, mailbox.name, seq=message.seq
            )

    def delete(self, mailbox: Mailbox, message: Message) -> None:
        """Delete a message that is in no list any more."""
        self.delete_all(mailbox, (message.seq,), message.size)

    def delete_all(self, mailbox: Mailbox, seqs: Sequence[int], size: int) -> None:
        """Delete messages that are in no list any more; size: their bytes."""
        self._commits.remove(mailbox, seqs)
        mailbox.messages -= len(seqs)
        mailbox.size -= size
        if mailbox.waiting:
            self._storing.release(mailbox)

    def _sender_of(self, address: str, stored_at: float) -> Session | None:
        """Return the connection that sent a message, if it is still open."""
        session = self._exchange.find(address)
        return session if session is not None and session.since <= stored_at else None
