"""One connection that has opened its client's mailbox, and the messages that it holds."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections import deque

    from brokerd.core.mailboxes.mailbox import Mailbox
    from brokerd.core.session import Session
    from brokerd.core.stored_message import Message

__all__ = ["Consumer"]


class Consumer:
    """A connection that receives the messages of a mailbox.

    Attributes:
        window, window_bytes: Most messages that it holds, and most bytes of these.
        held: The messages that were delivered and not acknowledged, by seq, in the
            order of delivery.
        held_bytes: Bytes of their frames.
        alone: Whether it holds a message that is delivered alone.
        acknowledged: Messages that the routing loop has removed from ``held`` because of
            an ACK, and that are counted as held until they are collected.
        collecting: Where the routing loop notes that there are some; None if it is to leave
            each ACK to the slow path.
    """

    __slots__ = (
        "acknowledged",
        "alone",
        "collecting",
        "held",
        "held_bytes",
        "mailbox",
        "session",
        "window",
        "window_bytes",
    )

    def __init__(self, session: Session, mailbox: Mailbox, window: int, window_bytes: int) -> None:
        self.session = session
        self.mailbox = mailbox
        self.window = window
        self.window_bytes = window_bytes
        self.held: dict[int, Message] = {}
        self.held_bytes = 0
        self.alone = False
        self.acknowledged: list[Message] = []
        self.collecting: dict[Consumer, None] | None = None

    @property
    def has_room(self) -> bool:
        """Whether it may hold one more message, if that is short enough."""
        return (
            len(self.held) < self.window
            and (not self.held or self.held_bytes < self.window_bytes)
            and not self.alone
            and not (self.session.retired or self.session.goaway_sent)
        )

    def fits(self, size: int) -> bool:
        """Return whether the bytes of one more message are within the window."""
        return not self.held or self.held_bytes + size <= self.window_bytes

    def hold(self, message: Message, now: float) -> None:
        """Record a message as delivered."""
        message.held_since = now
        self.held[message.seq] = message
        self.held_bytes += message.size

    def first_of(
        self, ready: deque[Message], most: int, stop: float, most_bytes: int, now_wall: float
    ) -> tuple[list[Message], int]:
        """Return the first messages that it may receive together, and their bytes.

        Args:
            ready: Messages in order.
            most: Most messages.
            stop: Only messages with lower seqs are returned.
            most_bytes: Most bytes, also of what it holds.
            now_wall: Messages whose ttl is over then are not returned.
        """
        messages: list[Message] = []
        size = 0
        left = min(most_bytes, self.window_bytes - self.held_bytes)
        for message in islice(ready, min(most, self.window - len(self.held))):
            size += message.size
            if (
                size > left
                or message.seq >= stop
                or message.avoid is self.session
                or (message.expires_at is not None and message.expires_at <= now_wall)
            ):
                size -= message.size
                break
            messages.append(message)
        return messages, size

    def hold_all(self, messages: list[Message], size: int, now: float) -> None:
        """Record messages as delivered; size: their bytes."""
        held, all_held = self.held, self.mailbox.held
        for message in messages:
            message.held_since = now
            held[message.seq] = message
            all_held[message.seq] = self
        self.held_bytes += size

    def take_acknowledged(self) -> tuple[list[Message], list[int], int]:
        """Give up the collected messages; return them, their seqs, and their bytes."""
        messages, self.acknowledged = self.acknowledged, []
        seqs: list[int] = []
        size = 0
        all_held = self.mailbox.held
        for message in messages:
            seqs.append(message.seq)
            size += message.size
            del all_held[message.seq]
        self.held_bytes -= size
        if messages:
            self.alone = False
        return messages, seqs, size

    def acknowledge(self, seq: int) -> bool:
        """Collect a plain ACK; return False if the slow path is to see it."""
        if self.collecting is None or seq not in self.held:
            return False
        self.collecting[self] = None
        self.acknowledged.append(self.held.pop(seq))
        return True

    def drop(self, seq: int) -> Message:
        """Remove a held message, and return it."""
        message = self.held.pop(seq)
        self.held_bytes -= message.size
        # A message that is delivered alone was the only one.
        self.alone = False
        return message
