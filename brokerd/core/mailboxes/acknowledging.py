"""Acknowledging: what becomes of a message after a connection has received it."""

from __future__ import annotations

import json
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from brokerd.core.mailboxes.journal import Change, State, is_text
from brokerd.core.stored_message import MAX_ATTEMPT, sender_of
from brokerd_client.wire.envelope import BROKER, MAX_DELAY, CodecId, Envelope, ErrorCode, is_delay
from brokerd_client.wire.layout import ACK_FLAG, RECEIPT_FLAG

if TYPE_CHECKING:
    from collections.abc import Iterable

    from brokerd.core.consumer import Consumer
    from brokerd.core.mailboxes.clock import Clock
    from brokerd.core.mailboxes.commits import Commits
    from brokerd.core.mailboxes.feeding import Feeding
    from brokerd.core.mailboxes.mailbox import Mailbox
    from brokerd.core.mailboxes.timers import Timers
    from brokerd.core.replies import Replies
    from brokerd.core.session import Session
    from brokerd.core.stored_message import Message

__all__ = ["Acknowledging"]

#: Seconds before a message that was returned is delivered again, at least.
_REST: Final = 0.1
#: Longest time between two attempts, in seconds. A message that finds no room among the
#: dead letters is tried again after that time.
_LONGEST: Final = 60.0
#: Most bytes of the payload of an ACK, and most characters of a reason that are kept.
_PAYLOAD: Final = 64 * 1024
_REASON: Final = 1000

#: Messages that are returned in one turn: some milliseconds' work.
_RETURNED: Final = 500

_VERBS: Final = ("done", "back", "failed", "dead")
_decode: Final = json.JSONDecoder().decode


class Acknowledging:
    """Carries out the ACKs of connections, and returns what a connection held.

    acknowledged, failed, dead: messages so far.
    leaving: connections that get nothing more and hold messages yet, each with the reason
        for which these count as failed attempts, or "".
    """

    def __init__(
        self,
        replies: Replies,
        commits: Commits,
        clock: Clock,
        timers: Timers,
        feeding: Feeding,
    ) -> None:
        self._timers = timers
        self._replies = replies
        self._taps = replies.taps
        self._commits = commits
        self._clock = clock
        self._feeding = feeding
        self.acknowledged = self.failed = self.dead = 0
        self.leaving: deque[tuple[Consumer, str]] = deque()
        #: Consumers for which the routing loop has collected plain ACKs.
        self._collecting: dict[Consumer, None] = {}

    @property
    def has_collected(self) -> bool:
        """Whether ``collect_all`` has something to do."""
        return bool(self._collecting)

    def collect_all(self) -> None:
        """Delete the messages whose ACKs the routing loop has collected."""
        for consumer in list(self._collecting):
            self.collect(consumer)

    def collect(self, consumer: Consumer) -> None:
        """Delete the messages that the routing loop has collected for one consumer."""
        if consumer not in self._collecting:
            return
        del self._collecting[consumer]
        messages, seqs, size = consumer.take_acknowledged()
        self.acknowledged += len(messages)
        for message in messages if self._taps.active else ():
            self._taps.note_stored(message.frame, consumer.mailbox.name, "acknowledged")
        self._feeding.delete_all(consumer.mailbox, seqs, size)
        self._feeding.note_room(consumer)

    @staticmethod
    def stop_collecting(mailboxes: Iterable[Mailbox]) -> None:
        """Leave each further ACK to the slow path, which holds or refuses it."""
        for mailbox in mailboxes:
            for consumer in mailbox.consumers.values():
                consumer.collecting = None

    def acknowledge(self, source: Session, envelope: Envelope, payload: memoryview) -> None:
        """Carry out one ACK frame, or refuse it."""
        consumer, seq = source.consumer, envelope.id
        if consumer is not None:
            self.collect(consumer)
        is_cumulative = bool(envelope.flags & ACK_FLAG)
        verb = _read(envelope, payload)
        if isinstance(verb, str):
            self._refuse(source, seq, ErrorCode.UNSUPPORTED, verb)
            return
        seqs: list[int] = []
        if consumer is not None and is_cumulative:
            seqs = [held for held in consumer.held if held <= seq]
        elif consumer is not None and seq in consumer.held:
            seqs = [seq]
        if consumer is None or not seqs:
            reason = f"this connection holds no message {seq}"
            self._refuse(source, seq, ErrorCode.EXPIRED, reason)
            return
        if self._commits.failure:
            reason = f"the store of the mailboxes has failed: {self._commits.failure}"
            self._refuse(source, seq, ErrorCode.STORE_FAILED, reason)
            return
        for each in seqs:
            self._carry_out(consumer, each, verb)
        self._feeding.note_room(consumer)
        if envelope.flags & RECEIPT_FLAG:
            self._commits.confirm(source, seq)
        # The ACKs of each turn are collected until its decisions are carried out.
        consumer.collecting = self._collecting

    def _refuse(self, source: Session, seq: int, code: ErrorCode, reason: str) -> None:
        self._replies.refuse(source, seq, code, reason, BROKER, flags=ACK_FLAG)

    def _carry_out(self, consumer: Consumer, seq: int, verb: dict[str, Any]) -> None:
        """Carry out one verb for a held message."""
        mailbox = consumer.mailbox
        message = self.take_back(consumer, seq)
        name, delay, reason = verb["verb"], verb.get("delay", 0), verb.get("reason", "")
        if name == "done":
            if self._taps.active:
                self._taps.note_stored(message.frame, mailbox.name, "acknowledged")
            self.acknowledged += 1
            self._feeding.delete(mailbox, message)
        elif name == "back":
            if self._taps.active:
                self._taps.note_stored(message.frame, mailbox.name, "returned")
            message.avoid = consumer.session
            self.put_back(mailbox, message, max(delay, _REST), lasts=delay > _REST)
        elif name == "failed":
            message.avoid = consumer.session
            self.fail(mailbox, message, consumer.session.address, reason, delay)
        else:
            self._bury(mailbox, message, consumer.session.address, reason or "dead", reason)

    def take_back(self, consumer: Consumer, seq: int) -> Message:
        """Remove a message from those that a connection holds."""
        del consumer.mailbox.held[seq]
        return consumer.drop(seq)

    def put_back(
        self, mailbox: Mailbox, message: Message, delay: float = 0.0, *, lasts: bool = False
    ) -> None:
        """Return a message to its position; no attempt is counted.

        Args:
            mailbox: The mailbox.
            message: The message, which is in no list.
            delay: Seconds until it is ready.
            lasts: Whether the delay survives a restart.
        """
        if self._commits.failure:
            return
        if message.has_expired(self._clock.wall) and not self._commits.is_paused:
            self._feeding.expire(mailbox, message)
        elif lasts:
            self._change(mailbox, message, "delayed", self._clock.wall + delay)
        elif delay:
            mailbox.rest(message, self._clock.wall + delay)
            self._timers.schedule(mailbox)
        else:
            mailbox.put(message)
            self._feeding.hungry[mailbox] = None

    def fail(
        self, mailbox: Mailbox, message: Message, address: str, error: str, delay: float = 0.0
    ) -> None:
        """Count a failed attempt, and return the message or make a dead letter of it.

        Args:
            mailbox: The mailbox.
            message: The message, which is in no list.
            address: The connection that held it.
            error: What it said, or why its connection ended.
            delay: Seconds until the next attempt, at least.
        """
        if self._commits.failure:
            return
        self.failed += 1
        if self._taps.active:
            self._taps.note_stored(message.frame, mailbox.name, "failed", error)
        if message.has_expired(self._clock.wall):
            self._feeding.expire(mailbox, message)
            return
        message.attempts = min(message.attempts + 1, MAX_ATTEMPT)
        config = mailbox.config
        if config is not None and message.attempts >= config.attempts:
            count = message.attempts
            reason = f"{count} attempt{'' if count == 1 else 's'} failed"
            self._bury(mailbox, message, address, f"{reason}: {error}" if error else reason, error)
            return
        wait = max(delay, backoff(message.attempts))
        state: State = "delayed" if wait else "ready"
        due_at = self._clock.wall + wait if wait else None
        self._change(mailbox, message, state, due_at, error=error, consumer=address)

    def _bury(
        self, mailbox: Mailbox, message: Message, address: str, reason: str, error: str
    ) -> None:
        """Make a dead letter of a message, if there is room for one more."""
        if not mailbox.has_room_for_dead(message.size):
            if not mailbox.is_warned:
                mailbox.is_warned = True
                self._replies.log_events.note(
                    "mailbox.dead_full",
                    None,
                    mailbox.name,
                    reason=f"{mailbox.dead} dead letters, {mailbox.dead_size} bytes: further"
                    " messages that fail stay in the mailbox and are tried every minute",
                )
            due_at = self._clock.wall + _LONGEST
            self._change(mailbox, message, "delayed", due_at, reason, error, address)
            return
        self.dead += 1
        mailbox.dead += 1
        mailbox.dead_size += message.size
        sender, message_id = sender_of(message.frame)
        self._replies.log_events.note(
            "mailbox.dead",
            None,
            mailbox.name,
            sender,
            f"{address}: {reason}",
            message_id=message_id,
        )
        if self._taps.active:
            self._taps.note_stored(message.frame, mailbox.name, "dead", reason)
        self._change(mailbox, message, "dead", None, reason, error, address)

    def _change(
        self,
        mailbox: Mailbox,
        message: Message,
        state: State,
        due_at: float | None,
        reason: str = "",
        error: str = "",
        consumer: str = "",
    ) -> None:
        """Write a message's new state, and keep it apart until that is on disk."""
        message.due_at = due_at
        message.is_timed = state == "delayed"
        mailbox.park(message, state)
        self._commits.change(
            mailbox,
            message,
            Change(
                mailbox.name,
                message.seq,
                state,
                message.attempts,
                due_at,
                reason,
                error,
                consumer,
                self._clock.wall,
            ),
        )

    def time_out(self, mailbox: Mailbox) -> None:
        """Return the messages that were held for longer than ``ack_timeout``."""
        config = mailbox.config
        if config is None or config.ack_timeout is None:
            return
        for consumer in list(mailbox.consumers.values()):
            for seq, message in list(consumer.held.items()):
                if message.held_since + config.ack_timeout > self._clock.now:
                    break
                reason = f"{consumer.session.address} held it for {config.ack_timeout:g} s"
                self._replies.log_events.note(
                    "mailbox.ack_timeout", consumer.session, mailbox.name, reason=reason
                )
                message.avoid = consumer.session
                self.put_back(mailbox, self.take_back(consumer, seq))
            self._feeding.note_room(consumer)

    def return_all(self, consumer: Consumer, why: str = "") -> None:
        """Return everything that a connection holds which gets nothing more.

        Of very many messages, the rest follows in later turns: see ``return_some``.

        why: the reason for which each counts as a failed attempt; "" if none counts.
        """
        self.collect(consumer)
        if consumer.held:
            consumer.held = dict(sorted(consumer.held.items()))
            consumer.mailbox.leaving[consumer] = None
            self.leaving.append((consumer, why))
            self.return_some()

    def return_some(self, count: float = _RETURNED) -> None:
        """Return up to ``count`` messages of connections that get nothing more."""
        while self.leaving and count > 0:
            consumer, why = self.leaving[0]
            mailbox, address = consumer.mailbox, consumer.session.address
            seqs = list(consumer.held)[: int(min(count, len(consumer.held)))]
            for seq in seqs:
                message = self.take_back(consumer, seq)
                if why:
                    self.fail(mailbox, message, address, why)
                else:
                    self.put_back(mailbox, message)
            count -= len(seqs)
            self._feeding.hungry[mailbox] = None
            if not consumer.held:
                self.leaving.popleft()
                del mailbox.leaving[consumer]


def backoff(attempts: int) -> float:
    """Return the seconds to wait after the failed attempt of this number: 0, 1, 2, 4 ... 60."""
    return 0.0 if attempts <= 1 else min(_LONGEST, 2.0 ** min(attempts - 2, 6))


def _read(envelope: Envelope, payload: memoryview) -> dict[str, Any] | str:
    """Return what an ACK says, or what is wrong with it."""
    verb: Any = {"verb": "done"}
    if envelope.name:
        return "an ACK has an empty name"
    if len(payload):
        verb = _decoded(envelope, payload)
    if (
        not isinstance(verb, dict)
        or verb.get("verb") not in _VERBS
        or not verb.keys() <= {"verb", "delay", "reason"}
        or not is_delay(verb.get("delay", 0))
        or not is_text(verb.get("reason", ""))
    ):
        return (
            'the payload of an ACK is empty, or JSON such as {"verb": "failed", "delay": 5,'
            f' "reason": "text"}}, codec 2; verb is one of {", ".join(_VERBS)}; delay is at'
            f" most {MAX_DELAY} s"
        )
    if envelope.flags & ACK_FLAG and verb["verb"] != "done":
        return "the flag ACK, for all messages up to this one, is for the verb done only"
    if "reason" in verb:
        verb["reason"] = verb["reason"][:_REASON]
    return dict(verb)


def _decoded(envelope: Envelope, payload: memoryview) -> object:
    if envelope.codec != CodecId.JSON or len(payload) > _PAYLOAD:
        return None
    try:
        return _decode(str(payload, "utf-8"))
    except (ValueError, RecursionError):
        return None
