"""Storing: which frames a mailbox accepts, and when a sender waits for room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from brokerd.config.values import WhenFull
from brokerd.core.mailboxes.commits import Outcome
from brokerd.core.mailboxes.journal import Stored
from brokerd.core.routing_result import RoutingResult
from brokerd.core.sink import KEY_SIZE
from brokerd.core.stored_message import Message, delivery_frame
from brokerd_client.wire.envelope import (
    MAX_DELAY,
    MAX_KEY_SIZE,
    MAX_STORED_TTL,
    Envelope,
    ErrorCode,
    Kind,
    is_delay,
    is_key,
    is_stored_ttl,
)
from brokerd_client.wire.layout import (
    EXTENSION_FLAG,
    EXTENSION_LENGTH,
    HEADER,
    ID,
    RECEIPT_FLAG,
    SEQ,
)

if TYPE_CHECKING:
    from brokerd.core.held_senders import HeldSenders
    from brokerd.core.mailboxes.clock import Clock
    from brokerd.core.mailboxes.commits import Commits
    from brokerd.core.mailboxes.mailbox import Mailbox
    from brokerd.core.mailboxes.store_calls import StoreCalls
    from brokerd.core.replies import Replies
    from brokerd.core.session import Session
    from brokerd.core.status import Status

__all__ = ["Storing", "extension_error"]

#: Most held senders released each time that a mailbox has room.
_RELEASED: Final = 32
#: Bytes of the length before a frame.
_PREFIX: Final = 4


class Storing:
    """Accepts frames for mailboxes, or refuses them."""

    def __init__(
        self,
        status: Status,
        replies: Replies,
        held: HeldSenders,
        commits: Commits,
        calls: StoreCalls,
        clock: Clock,
    ) -> None:
        self._status = status
        self._replies = replies
        self._held = held
        self._commits = commits
        self._calls = calls
        self._clock = clock
        #: Mailboxes that senders wait for.
        self._waited_for: dict[Mailbox, None] = {}
        #: Mailboxes whose senders wait because the disk is behind.
        self._behind: dict[Mailbox, None] = {}

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

        Args:
            frame: Its body.
            outcome: The outcome of an event that other hosts are to store, too.
        """
        refusal = self._refusal(mailboxes, envelope, frame)
        if refusal is not None and outcome is None:
            return self._replies.refuse_frame(source, envelope, *refusal)
        if refusal is not None and outcome is not None:
            outcome.fail(*refusal, [mailbox.name for mailbox in mailboxes])
            for _ in mailboxes:
                self._commits.answer(outcome)
            return RoutingResult.CONSUMED
        key = self._key_of(source, envelope)
        size = _size(source, envelope, frame)
        full = [
            mailbox
            for mailbox in mailboxes
            if self._commits.is_behind or not mailbox.has_room(size, key is not None)
        ]
        for mailbox in full:
            if self._hold(source, mailbox, now):
                return RoutingResult.BLOCKED
        if not full and _may_be_collected(mailboxes, envelope):
            self._collect(source, mailboxes[0], envelope, frame)
            return RoutingResult.CONSUMED
        if outcome is None:
            source.uncommitted += 1
            outcome = Outcome(
                source,
                envelope.id,
                is_event=envelope.kind is Kind.EVENT,
                receipt=bool(envelope.flags & RECEIPT_FLAG),
                missing=len(mailboxes),
            )
        for mailbox in mailboxes:
            if mailbox not in full:
                self._accept(source, mailbox, envelope, frame, key, outcome)
        for mailbox in full:
            self._refuse_full(mailbox, key, outcome)
        return RoutingResult.CONSUMED

    def _refusal(
        self, mailboxes: Sequence[Mailbox], envelope: Envelope, frame: memoryview
    ) -> tuple[ErrorCode, str] | None:
        """Return why a frame may not be stored, or None."""
        if self._commits.failure:
            reason = f"the store of the mailboxes has failed: {self._commits.failure}"
            return ErrorCode.STORE_FAILED, reason
        if envelope.extension is not None:
            error = extension_error(envelope.extension)
            if error:
                return ErrorCode.UNSUPPORTED, error
        payload = _payload_size(envelope, frame)
        for mailbox in mailboxes:
            config = mailbox.config
            assert config is not None, "an orphaned mailbox is not sent to"
            if payload > config.max_message:
                reason = (
                    f"the payload has {payload} bytes; the mailbox of {mailbox.name} takes at"
                    f" most {config.max_message}"
                )
                return ErrorCode.TOO_LARGE, reason
        return None

    def _key_of(self, source: Session, envelope: Envelope) -> tuple[str, str] | None:
        if envelope.extension is None or "key" not in envelope.extension:
            return None
        return source.client.name, envelope.extension["key"]

    def _hold(self, source: Session, mailbox: Mailbox, now: float) -> bool:
        """Hold a sender until a full mailbox has room, if it may wait."""
        config = mailbox.config
        assert config is not None
        may_wait = config.when_full is WhenFull.WAIT or self._commits.is_behind
        if not may_wait or (source.consumer is not None and source.consumer.held):
            return False
        if source.hold_deadline is None:
            source.hold_deadline = now + self._status.limits.wait_timeout
        if source.hold_deadline <= now:
            return False
        mailbox.waiting[source] = None
        self._waited_for[mailbox] = None
        if self._commits.is_behind:
            self._behind[mailbox] = None
        reason = "the mailbox it sends to is full"
        self._replies.log_events.note("client.held", source, mailbox.name, reason=reason)
        self._held.add(source, source, source.hold_deadline)
        return True

    def release(self, mailbox: Mailbox) -> None:
        """Release senders that wait for room in a mailbox; they try again."""
        left = _RELEASED
        while mailbox.waiting and left:
            session = next(iter(mailbox.waiting))
            del mailbox.waiting[session]
            # Some were released for another reason, and do not count.
            if session.held_by is session:
                self._held.release(session)
                left -= 1
        if not mailbox.waiting:
            self._waited_for.pop(mailbox, None)

    def forget(self, session: Session) -> None:
        """Forget a sender whose connection has ended."""
        for mailbox in self._waited_for if session.held_by is session else ():
            mailbox.waiting.pop(session, None)

    def release_behind(self) -> None:
        """Release the senders that waited because the disk was behind."""
        behind, self._behind = self._behind, {}
        for mailbox in behind:
            self.release(mailbox)
            if mailbox.waiting:
                self._behind[mailbox] = None

    def _collect(
        self, source: Session, mailbox: Mailbox, envelope: Envelope, frame: memoryview
    ) -> None:
        """Append a message to those that a mailbox collects.

        The routing loop appends further ones by itself, until they are taken.
        """
        config = mailbox.config
        assert config is not None
        if not mailbox.has_place(_size(source, envelope, frame)):
            self._commits.collect(mailbox)
        self._commits.open(
            mailbox, config.messages, config.size - mailbox.keys * KEY_SIZE, config.max_message
        )
        receipt = bool(envelope.flags & RECEIPT_FLAG)
        delivery = delivery_frame(source.sender_header, envelope, frame, mailbox.next_seq)
        mailbox.append(source, ID.pack(envelope.id), delivery, receipt=receipt)
        if envelope.extension is not None:
            mailbox.mark(source, envelope.extension.get("key"), envelope.extension.get("ttl"))

    def _refuse_full(self, mailbox: Mailbox, key: tuple[str, str] | None, outcome: Outcome) -> None:
        """Refuse a message to a full mailbox, unless it is a duplicate."""
        config = mailbox.config
        assert config is not None
        reason = (
            "too many messages wait for the disk"
            if self._commits.is_behind
            else f"the mailbox of {mailbox.name} is full: {mailbox.messages} messages,"
            f" {mailbox.size} bytes, {mailbox.keys} keys of {KEY_SIZE} bytes"
            f" (clients.{mailbox.name}.mailbox has messages: {config.messages},"
            f" size: {config.size})"
        )

        def answer(known: bool = False) -> None:
            if not known:
                outcome.fail(ErrorCode.FULL, reason, (mailbox.name,))
            self._commits.answer(outcome)

        if key is None:
            answer()
        else:
            self._calls.look_up_key(mailbox.name, key, answer)

    def _accept(
        self,
        source: Session,
        mailbox: Mailbox,
        envelope: Envelope,
        frame: memoryview,
        key: tuple[str, str] | None,
        outcome: Outcome,
    ) -> None:
        """Give a message the next seq of the mailbox, and add it to the open batch."""
        config = mailbox.config
        assert config is not None
        extension: Mapping[str, Any] = envelope.extension or {}
        wall = self._clock.wall
        ttls = [ttl for ttl in (extension.get("ttl"), config.ttl) if ttl is not None]
        delay = extension.get("delay", 0)
        seq = mailbox.next_seq
        message = Message(
            seq,
            delivery_frame(source.sender_header, envelope, frame, seq),
            wall,
            wall + min(ttls) if ttls else None,
            wall + delay if delay else None,
        )
        mailbox.next_seq += 1
        mailbox.messages += 1
        mailbox.uncommitted += 1
        mailbox.size += message.size
        mailbox.keys += key is not None
        stored = Stored(message.size, wall, message.expires_at, message.due_at, key)
        self._commits.append(mailbox, message, stored, outcome)


def extension_error(extension: Mapping[str, Any]) -> str:
    """Return which value of a stored message's extension is out of range, or ""."""
    if "key" in extension and not is_key(extension["key"]):
        return f"key is not a text of 1 to {MAX_KEY_SIZE} bytes"
    if "delay" in extension and not is_delay(extension["delay"]):
        return f"delay is not a number of seconds from 0 to {MAX_DELAY}"
    if "ttl" in extension and not is_stored_ttl(extension["ttl"]):
        return f"ttl is not a number of seconds above 0, up to {MAX_STORED_TTL}"
    return ""


def _may_be_collected(mailboxes: Sequence[Mailbox], envelope: Envelope) -> bool:
    """Return whether a message is for one mailbox, without a delay."""
    return (
        len(mailboxes) == 1
        and envelope.kind is Kind.MESSAGE
        and not (envelope.extension and envelope.extension.get("delay"))
    )


def _size(source: Session, envelope: Envelope, frame: memoryview) -> int:
    """Return the bytes of the frame that delivers a frame."""
    return _PREFIX + len(frame) - len(envelope.name) + len(source.sender_header) + SEQ.size


def _payload_size(envelope: Envelope, frame: memoryview) -> int:
    """Return the bytes of a frame's payload."""
    position = HEADER.size + len(envelope.name)
    if envelope.kind is Kind.EVENT:
        position += 1 + frame[position]
    if envelope.flags & EXTENSION_FLAG:
        position += EXTENSION_LENGTH.size + int(EXTENSION_LENGTH.unpack_from(frame, position)[0])
    return len(frame) - position
