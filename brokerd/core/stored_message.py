"""One message of a mailbox in memory, and its frame as a client receives it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from brokerd_client.wire.envelope import Envelope, Kind, head
from brokerd_client.wire.framing import frame_prefix
from brokerd_client.wire.layout import (
    ACK_FLAG,
    EVENT_KIND,
    FRAME_HEAD,
    HEADER,
    NAME_SIZE_OFFSET,
    RECEIPT_FLAG,
    SEQ,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from brokerd.core.mailboxes.journal import Row
    from brokerd.core.session import Session

__all__ = [
    "MAX_ATTEMPT",
    "DeadLetter",
    "Message",
    "delivery_frame",
    "joined_frames",
    "ready_messages",
    "sender_of",
    "seq_at",
    "split_frames",
    "tagged",
    "totals_of",
]

#: Largest attempt: it has 16 bits on the wire.
MAX_ATTEMPT: Final = 0xFFFF
#: Bytes before the body of a frame; the broker's deliveries are never longer than 2 GiB.
_PREFIX: Final = FRAME_HEAD.size - HEADER.size


class Message:
    """One message that the core has in memory.

    Attributes:
        seq: Its number in the mailbox.
        frame: Its frame with the seq and the attempt 1.
        size: Bytes of the frame.
        stored_at, expires_at: When it was stored, and when its ttl is over, or None;
            wall clock.
        due_at: When it is ready, if it is delayed; wall clock.
        attempts: Failed attempts that are known on disk.
        is_timed: Whether it is delayed on disk, although that time may be over.
        held_since: When it was delivered to its holder, on the clock of ``now``.
        avoid: The session that returned it last. It is delivered to another one if possible.
    """

    __slots__ = (
        "attempts",
        "avoid",
        "due_at",
        "expires_at",
        "frame",
        "held_since",
        "is_timed",
        "seq",
        "size",
        "stored_at",
    )

    #: Whether it is stored as a dead letter.
    is_dead = False

    def __init__(
        self,
        seq: int,
        frame: bytes,
        stored_at: float,
        expires_at: float | None = None,
        due_at: float | None = None,
        attempts: int = 0,
    ) -> None:
        self.seq = seq
        self.frame = frame
        self.size = len(frame)
        self.stored_at = stored_at
        self.expires_at = expires_at
        self.due_at = due_at
        self.attempts = attempts
        self.is_timed = due_at is not None
        self.held_since = 0.0
        self.avoid: Session | None = None

    @classmethod
    def from_row(cls, row: Row) -> Message:
        """Return a message that was read back."""
        return cls(
            row.seq,
            row.frame,
            row.stored.stored_at,
            row.stored.expires_at,
            row.due_at,
            row.attempts,
        )

    def has_expired(self, now_wall: float) -> bool:
        """Return whether its ttl is over."""
        return self.expires_at is not None and self.expires_at <= now_wall

    def delivery(self) -> bytes:
        """Return its frame with the number of the next attempt."""
        if not self.attempts:
            return self.frame
        return tagged(self.frame, self.seq, min(self.attempts + 1, MAX_ATTEMPT))

    def __lt__(self, other: Message) -> bool:
        return self.seq < other.seq


class DeadLetter(Message):
    """A message of an import that is a dead letter from the beginning."""

    __slots__ = ()

    is_dead = True


def ready_messages(
    seqs: list[int],
    frames: list[bytes],
    stored_at: list[float],
    expires_at: list[float | None],
) -> list[Message]:
    """Return messages that are simply ready, from the same field of each of them."""
    messages = []
    for at, seq in enumerate(seqs):
        # To call the class would take twice as long.
        message = Message.__new__(Message)
        message.seq = seq
        message.frame = frames[at]
        message.size = len(message.frame)
        message.stored_at = stored_at[at]
        message.expires_at = expires_at[at]
        message.due_at = None
        message.attempts = 0
        message.is_timed = False
        message.held_since = 0.0
        message.avoid = None
        messages.append(message)
    return messages


def split_frames(joined: bytes, start: int, sizes: Sequence[int]) -> list[bytes]:
    """Return frames that lie one behind the other in ``joined``, from ``start`` on."""
    frames = []
    data, total = joined, len(joined)
    at = start
    for size in sizes:
        end = at + size
        if end > total:
            raise ValueError("the frames are longer than what contains them")
        frames.append(data[at:end])
        at = end
    return frames


def joined_frames(messages: list[Message]) -> bytes:
    """Return the frames of messages, one behind the other."""
    frames = []
    for message in messages:
        frames.append(message.frame)  # noqa: PERF401 - only here it has its C type
    return b"".join(frames)


def totals_of(messages: list[Message]) -> tuple[int, int]:
    """Return the bytes of messages, and their failed attempts."""
    size = attempts = 0
    for message in messages:
        size += message.size
        attempts += message.attempts
    return size, attempts


def delivery_frame(sender: bytes, envelope: Envelope, frame: memoryview, seq: int) -> bytes:
    """Return the frame that delivers a stored frame.

    Args:
        sender: The sender's address.
        envelope: The envelope of the frame that the sender sent.
        frame: That frame's body.
        seq: Its number in the mailbox.
    """
    start = HEADER.size + len(envelope.name.encode())
    tag_at = start
    if envelope.kind is Kind.EVENT:
        tag_at += 1 + frame[start]
    size = HEADER.size + len(sender) + len(frame) - start + SEQ.size
    header = HEADER.pack(
        envelope.kind,
        (envelope.flags & ~RECEIPT_FLAG) | ACK_FLAG,
        envelope.codec,
        len(sender),
        envelope.id,
    )
    return b"".join(
        (
            frame_prefix(size),
            header,
            sender,
            frame[start:tag_at],
            SEQ.pack(seq, 1),
            frame[tag_at:],
        )
    )


def tagged(frame: bytes, seq: int, attempt: int) -> bytes:
    """Return the same delivery with another seq and attempt."""
    at = seq_at(frame)
    tag = SEQ.pack(seq, attempt)
    if frame[at : at + SEQ.size] == tag:
        return frame
    return b"".join((frame[:at], tag, frame[at + SEQ.size :]))


def sender_of(frame: bytes) -> tuple[str, int]:
    """Return the sender's address of a delivery, and the id that it chose."""
    envelope = head(memoryview(frame)[_PREFIX:])
    return envelope.name, envelope.id


def seq_at(frame: bytes) -> int:
    """Return where in a delivery the seq lies."""
    at = _PREFIX + HEADER.size + frame[_PREFIX + NAME_SIZE_OFFSET]
    return at + 1 + frame[at] if frame[_PREFIX] == EVENT_KIND else at
