"""Batches of changes on their way to the disk, and the senders that wait for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from brokerd.core.mailboxes.journal import (
    Alike,
    Append,
    Batch,
    Change,
    Committed,
    Failed,
    FailureKind,
    Record,
    Remove,
    Revive,
    State,
    Stored,
)
from brokerd.core.stored_message import Message
from brokerd_client.wire.envelope import ErrorCode
from brokerd_client.wire.layout import ACK_FLAG, ID

if TYPE_CHECKING:
    from brokerd.core.mailboxes.clock import Clock
    from brokerd.core.mailboxes.journal import Journal
    from brokerd.core.mailboxes.mailbox import Mailbox
    from brokerd.core.replies import Replies
    from brokerd.core.session import Session
    from brokerd.core.sink import Portion

__all__ = ["Changed", "Commits", "ImportOutcome", "Outcome"]

#: Most bytes of messages that are given to the store and not known to be on disk.
_UNCOMMITTED: Final = 64 * 1024 * 1024
#: Batches given to the store at once: one that it writes, and the next. All others become
#: one batch meanwhile, unless that has more bytes than this.
_AT_ONCE: Final = 2
_LARGE: Final = 128 * 1024

_FULL: Final = "the disk of the mailboxes is full"
_IN_DOUBT: Final = "the store failed while it wrote the message"
_FAILED: Final = "the store of the mailboxes has failed"


#: How bad a failure to store a message is, from the worst; all others are alike.
_BADNESS: Final = {ErrorCode.IN_DOUBT: 0, ErrorCode.STORE_FAILED: 1, ErrorCode.FULL: 2}


class Outcome:
    """The outcome of one frame, which one or several mailboxes are to store.

    Attributes:
        session: Its sender.
        id: Its id.
        is_event: Whether it is an event.
        receipt: Whether the sender asked for a RECEIPT.
        missing: Mailboxes, and other hosts with mailboxes, whose answer is missing.
        error: The code of the worst failure, or None; and its reason.
        names: The mailboxes that are known not to have stored it.
    """

    __slots__ = ("error", "id", "is_event", "missing", "names", "reason", "receipt", "session")

    def __init__(
        self, session: Session, message_id: int, *, is_event: bool, receipt: bool, missing: int
    ) -> None:
        self.session = session
        self.id = message_id
        self.is_event = is_event
        self.receipt = receipt
        self.missing = missing
        self.error: ErrorCode | None = None
        self.reason = ""
        self.names: list[str] = []

    def fail(self, code: ErrorCode, reason: str, names: Sequence[str] = ()) -> None:
        """Note that mailboxes did not store it, or may not have.

        Of several failures, the sender learns of the worst one: doubt, then a store that
        has failed, then a full mailbox.
        """
        if self.error is None or _BADNESS.get(code, 3) < _BADNESS.get(self.error, 3):
            self.error, self.reason = code, reason
        self.names += names


class ImportOutcome(Outcome):
    """The outcome of an import of several messages.

    imported, known, expired: how many were stored, and how many were left out, because
        their key is known or their ttl is over.
    """

    __slots__ = ("expired", "imported", "known")

    def __init__(self, session: Session, message_id: int, missing: int, expired: int) -> None:
        super().__init__(session, message_id, is_event=False, receipt=False, missing=missing)
        self.imported = missing
        self.known = 0
        self.expired = expired

    def note_duplicate(self) -> None:
        """Count a message that was left out because its key is known."""
        self.imported -= 1
        self.known += 1

    def reply(self) -> dict[str, Any]:
        """Return the REPLY to the operation."""
        return {"imported": self.imported, "known": self.known, "expired": self.expired}


class Changed(NamedTuple):
    """A message whose new state is on its way to the disk.

    state: None for a dead letter that was revived with a new seq.
    """

    mailbox: Mailbox
    message: Message
    state: State | None


class _Single(NamedTuple):
    """A new message with an outcome of its own."""

    mailbox: Mailbox
    message: Message
    outcome: Outcome
    has_key: bool


class _Collected(NamedTuple):
    """New messages that a mailbox has collected, and whose they are."""

    mailbox: Mailbox
    append: Append
    messages: Alike
    portions: list[Portion]


class _Pending:
    """The parts of one batch that are not on disk.

    Attributes:
        appended: The new messages, in order.
        changed: Messages with a new state.
        confirmed: ACKs with the flag RECEIPT: session and seq.
        size: Bytes of the new messages.
    """

    __slots__ = ("appended", "changed", "confirmed", "number", "size")

    def __init__(self, number: int) -> None:
        self.number = number
        self.appended: list[_Single | _Collected] = []
        self.changed: list[Changed] = []
        self.confirmed: list[tuple[Session, int]] = []
        self.size = 0


class _OpenAppend:
    """New messages of one mailbox that are not in a batch yet."""

    __slots__ = ("first_seq", "frames", "messages")

    def __init__(self, first_seq: int) -> None:
        self.first_seq = first_seq
        self.frames: list[bytes] = []
        self.messages: list[Stored] = []


class Commits:
    """The open batch, and the batches that the store has not answered.

    Attributes:
        accepted: Messages accepted so far, also duplicates.
        failure: The I/O error after which nothing is stored, or "".
        is_paused: Whether nothing new may be written, because an upgrade waits until
            everything is on disk.
    """

    def __init__(self, replies: Replies, clock: Clock) -> None:
        self._replies = replies
        self._clock = clock
        self.accepted = 0
        self.failure = ""
        self.is_paused = False
        self._number = 0
        self._in_flight: deque[_Pending] = deque()
        self._uncommitted = 0
        self._open = _Pending(0)
        self._appends: dict[str, _OpenAppend] = {}
        self._removed: dict[str, list[int]] = {}
        self._records: list[Record | tuple[str, _OpenAppend]] = []
        #: Mailboxes to which the routing loop may append, and those of them that have
        #: collected messages.
        self._opened: dict[Mailbox, None] = {}
        self._collecting: dict[Mailbox, None] = {}

    def __len__(self) -> int:
        """Return the number of batches that are not on disk."""
        return len(self._in_flight) + self.has_batch

    @property
    def has_batch(self) -> bool:
        """Whether ``flush`` has something to do."""
        return bool(self._records or self._removed or self._open.confirmed or self._collecting)

    @property
    def wants_flush(self) -> bool:
        """Whether ``flush`` is to be called now."""
        if not self.has_batch:
            return False
        if self.failure or self._open.size >= _LARGE:
            return True
        # No client waits until a message is removed.
        is_urgent = self._records or self._open.confirmed or self._collecting
        return len(self._in_flight) < (_AT_ONCE if is_urgent else 1)

    @property
    def is_behind(self) -> bool:
        """Whether too many bytes wait for the disk to accept more."""
        return self._uncommitted >= _UNCOMMITTED

    # Records

    def append(self, mailbox: Mailbox, message: Message, stored: Stored, outcome: Outcome) -> None:
        """Add a new message, which has the mailbox's next seq."""
        self.collect(mailbox)
        self.accepted += 1
        opened = self._appends.get(mailbox.name)
        if opened is None or opened.first_seq + len(opened.messages) != message.seq:
            opened = self._appends[mailbox.name] = _OpenAppend(message.seq)
            self._records.append((mailbox.name, opened))
        opened.frames.append(message.frame)
        opened.messages.append(stored)
        self._open.appended.append(_Single(mailbox, message, outcome, stored.key is not None))
        self._open.size += message.size
        self._uncommitted += message.size

    def open(self, mailbox: Mailbox, messages: int, size: int, largest: int) -> None:
        """Allow a mailbox to collect messages, which become a part of the open batch.

        The limits are those of ``Sink.open``.
        """
        self._opened[mailbox] = None
        mailbox.collecting = self._collecting
        mailbox.open(messages, size, largest)

    def collect(self, mailbox: Mailbox) -> None:
        """Add what a mailbox has collected to the open batch; let it collect no more."""
        self._opened.pop(mailbox, None)
        mailbox.close()
        if mailbox in self._collecting:
            self._take(mailbox)

    def _take(self, mailbox: Mailbox) -> None:
        """Add what a mailbox has collected to the open batch."""
        taken = mailbox.take_collected()
        stored_at = self._clock.wall
        ttl = None if mailbox.config is None else mailbox.config.ttl
        messages = Alike(
            taken.sizes,
            stored_at,
            None if ttl is None else stored_at + ttl,
            taken.own_keys,
            {
                at: stored_at + (own if ttl is None else min(own, ttl))
                for at, own in taken.own_ttls.items()
            },
        )
        append = Append(mailbox.name, taken.first_seq, taken.frames, messages)
        self._records.append(append)
        self._open.appended.append(_Collected(mailbox, append, messages, taken.portions))
        self._open.size += len(taken.frames)
        self._uncommitted += len(taken.frames)
        self.accepted += len(messages)

    def collect_all(self) -> None:
        """Add what all mailboxes have collected to the open batch; let none collect more."""
        for mailbox in list(self._opened):
            self.collect(mailbox)

    def remove(self, mailbox: Mailbox, seqs: Iterable[int]) -> None:
        """Remove messages from the disk."""
        self._removed.setdefault(mailbox.name, []).extend(seqs)

    def change(self, mailbox: Mailbox, message: Message, change: Change) -> None:
        """Write a message's new state; ``committed`` returns it then."""
        self._records.append(change)
        self._open.changed.append(Changed(mailbox, message, change.state))

    def revive(self, revive: Revive, mailbox: Mailbox, message: Message) -> None:
        """Make a dead letter ready under a new seq; ``committed`` returns it then."""
        self.collect(mailbox)
        self._records.append(revive)
        self._open.changed.append(Changed(mailbox, message, None))

    def confirm(self, session: Session, seq: int) -> None:
        """Send a RECEIPT of an ACK once the open batch is on disk."""
        session.uncommitted += 1
        self._open.confirmed.append((session, seq))

    def flush(self, journal: Journal) -> None:
        """Give the open batch to the store; refuse all of it after a failure."""
        if self.failure:
            self._refuse_open(self.failure)
            return
        self._take_all()
        if not (self._records or self._removed):
            # What these ACKs say is not written.
            self._confirm(self._open)
            self._open.confirmed.clear()
            return
        self._number += 1
        pending, self._open = self._open, _Pending(0)
        pending.number = self._number
        # Removed messages first, because they make room.
        records: list[Record] = [
            Remove(name, ranges_of(seqs)) for name, seqs in self._removed.items()
        ]
        records += [
            record
            if isinstance(record, Append) or not isinstance(record[1], _OpenAppend)
            else Append(
                record[0],
                record[1].first_seq,
                b"".join(record[1].frames),
                tuple(record[1].messages),
            )
            for record in self._records
        ]
        self._appends, self._removed, self._records = {}, {}, []
        self._in_flight.append(pending)
        journal.commit(Batch(self._number, tuple(records)))

    def _take_all(self) -> None:
        """Add what all mailboxes have collected to the open batch.

        A mailbox that has collected something goes on: its next message needs no slow path.
        """
        for mailbox in list(self._opened):
            if mailbox in self._collecting:
                self._take(mailbox)
            else:
                self.collect(mailbox)
        if self.is_behind:
            self.collect_all()

    # Answers

    def committed(
        self, answer: Committed
    ) -> tuple[list[tuple[Mailbox, Message | Append]], list[Changed]]:
        """Tell the senders of a batch that is on disk.

        Returns its new messages without duplicates, and the messages with a new state.
        """
        pending = self._pop(answer.number)
        duplicates = set(answer.duplicates)
        stored: list[tuple[Mailbox, Message | Append]] = []
        for new in pending.appended:
            if isinstance(new, _Collected):
                self._confirm_collected(new)
                if duplicates and new.messages.keys:
                    stored += self._without(duplicates, new)
                else:
                    stored.append((new.mailbox, new.append))
                continue
            mailbox, message, outcome, has_key = new
            mailbox.uncommitted -= 1
            if (mailbox.name, message.seq) in duplicates:
                self._take_back(mailbox, message, has_key=has_key)
                if isinstance(outcome, ImportOutcome):
                    outcome.note_duplicate()
            else:
                stored.append((mailbox, message))
            self.answer(outcome)
        self._confirm(pending)
        return stored, pending.changed

    def failed(self, answer: Failed) -> list[Changed]:
        """Tell the senders of a batch that was not written.

        Returns the messages with a new state that was written all the same.
        """
        pending = self._pop(answer.number)
        is_full = answer.kind is FailureKind.FULL
        if not is_full:
            self.failure = self.failure or answer.text or "I/O error"
        for new in pending.appended:
            if isinstance(new, _Collected):
                code = ErrorCode.FULL if is_full else ErrorCode.IN_DOUBT
                why = _FULL if is_full else _IN_DOUBT
                self._refuse_collected(new, code, f"{why}: {answer.text}")
                continue
            mailbox, message, outcome, has_key = new
            mailbox.uncommitted -= 1
            self._take_back(mailbox, message, has_key=has_key)
            if is_full:
                outcome.fail(ErrorCode.FULL, f"{_FULL}: {answer.text}", (mailbox.name,))
            else:
                outcome.fail(ErrorCode.IN_DOUBT, f"{_IN_DOUBT}: {answer.text}")
            self.answer(outcome)
        if is_full:
            self._confirm(pending)
            return pending.changed
        self._refuse_acks(pending, answer.text)
        self._refuse_open(answer.text)
        return []

    def _pop(self, number: int) -> _Pending:
        pending = self._in_flight.popleft()
        assert pending.number == number, "the store answers in order"
        self._uncommitted -= pending.size
        return pending

    def _take_back(self, mailbox: Mailbox, message: Message, *, has_key: bool) -> None:
        """Forget a new message that is not on disk."""
        mailbox.messages -= 1
        mailbox.size -= message.size
        mailbox.keys -= has_key

    def _refuse_open(self, reason: str) -> None:
        """Refuse everything in the open batch, which is never written."""
        self.collect_all()
        pending, self._open = self._open, _Pending(0)
        self._appends, self._removed, self._records = {}, {}, []
        self._uncommitted -= pending.size
        for new in pending.appended:
            if isinstance(new, _Collected):
                self._refuse_collected(new, ErrorCode.STORE_FAILED, f"{_FAILED}: {reason}")
                continue
            mailbox, message, outcome, has_key = new
            mailbox.uncommitted -= 1
            self._take_back(mailbox, message, has_key=has_key)
            outcome.fail(ErrorCode.STORE_FAILED, f"{_FAILED}: {reason}")
            self.answer(outcome)
        self._refuse_acks(pending, reason)

    def _confirm_collected(self, collected: _Collected) -> None:
        """Tell the senders of collected messages that they are on disk."""
        collected.mailbox.uncommitted -= len(collected.append.messages)
        for portion in collected.portions:
            portion.session.uncommitted -= len(portion)
            if portion.receipt:
                self._replies.confirm_all(portion.session, portion.ids)

    def _without(
        self, duplicates: AbstractSet[tuple[str, int]], collected: _Collected
    ) -> Iterator[tuple[Mailbox, Message]]:
        """Yield the collected messages that are not duplicates, and forget the others."""
        mailbox, append, messages, _ = collected
        for at, (frame, stored) in enumerate(zip(append.split(), messages, strict=True)):
            seq = append.first_seq + at
            message = Message(seq, frame, stored.stored_at, stored.expires_at)
            if (mailbox.name, seq) in duplicates:
                self._take_back(mailbox, message, has_key=True)
            else:
                yield mailbox, message

    def _refuse_collected(self, collected: _Collected, code: ErrorCode, reason: str) -> None:
        """Forget collected messages that are not on disk, and tell their senders."""
        mailbox, append, messages, portions = collected
        mailbox.uncommitted -= len(append.messages)
        mailbox.messages -= len(append.messages)
        mailbox.size -= len(append.frames)
        mailbox.keys -= len(messages.keys)
        name = mailbox.name if code is ErrorCode.FULL else ""
        for portion in portions:
            portion.session.uncommitted -= len(portion)
            for (message_id,) in ID.iter_unpack(portion.ids) if portion.session.open else ():
                self._replies.refuse(portion.session, message_id, code, reason, name)

    def answer(self, outcome: Outcome) -> None:
        """Note one mailbox's answer; send the outcome once all have answered."""
        outcome.missing -= 1
        if not outcome.missing:
            outcome.session.uncommitted -= 1
            self.tell(outcome)

    def tell(self, outcome: Outcome) -> None:
        """Send a sender the outcome of a frame."""
        session = outcome.session
        if not session.open:
            return
        # The host of the sender tells answers to events by this flag.
        flags = ACK_FLAG if outcome.is_event and session.host else 0
        if outcome.error is not None:
            names = () if outcome.error is ErrorCode.IN_DOUBT else tuple(outcome.names)
            self._replies.refuse(
                session,
                outcome.id,
                outcome.error,
                outcome.reason,
                names[0] if names else "",
                field="mailbox" if outcome.error is ErrorCode.FULL else "",
                flags=flags,
                names=names if outcome.is_event else (),
            )
        elif outcome.receipt:
            self._replies.confirm(session, outcome.id, flags)
        elif isinstance(outcome, ImportOutcome):
            self._replies.reply(session, outcome.id, outcome.reply())

    def _confirm(self, pending: _Pending) -> None:
        for session, seq in pending.confirmed:
            session.uncommitted -= 1
            self._replies.confirm(session, seq, ACK_FLAG)

    def _refuse_acks(self, pending: _Pending, reason: str) -> None:
        why = f"{_FAILED}: {reason}"
        for session, seq in pending.confirmed:
            session.uncommitted -= 1
            self._replies.refuse(session, seq, ErrorCode.STORE_FAILED, why, flags=ACK_FLAG)


def ranges_of(seqs: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return seqs as inclusive ranges, in order."""
    seqs = sorted(seqs)
    if seqs and seqs[-1] - seqs[0] == len(seqs) - 1:
        return ((seqs[0], seqs[-1]),)
    ranges: list[tuple[int, int]] = []
    first = last = 0
    for seq in seqs:
        if ranges and seq == last + 1:
            ranges[-1] = (first, seq)
        else:
            first = seq
            ranges.append((seq, seq))
        last = seq
    return tuple(ranges)
