"""A recipient that is not a connection, to which the routing loop appends frames.

The frames that arrive until :meth:`Sink.take_collected` are one unit: they are given away
together, and their senders get the outcome together.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

__all__ = ["KEY_SIZE", "Portion", "Sink", "Taken"]

#: Most messages, and most bytes of frames, that are collected before ``take_collected``.
MESSAGES: Final = 1024
BYTES: Final = 256 << 10
#: Bytes of ``size`` that one deduplication key uses.
KEY_SIZE: Final = 128


class Portion:
    """Consecutive messages of one sender.

    Attributes:
        session: The sender.
        receipt: Whether it asked for their RECEIPTs.
        ids: Their ids, 8 bytes each, as they stand in a frame.
    """

    __slots__ = ("ids", "receipt", "session")

    def __init__(self, session: Any, *, receipt: bool) -> None:
        self.session = session
        self.receipt = receipt
        self.ids = bytearray()

    def __len__(self) -> int:
        return len(self.ids) // 8


class Taken(NamedTuple):
    """The messages that a sink has collected.

    Attributes:
        first_seq: The seq of the first message; the others follow without gaps.
        frames: The frames, one behind the other.
        sizes: Bytes of each frame, 4 bytes each, little-endian.
        portions: Whose messages they are, in order.
        own_keys: The sender and the key of each message that has one, by position.
        own_ttls: The ttl of each message that has one, in seconds, by position.
    """

    first_seq: int
    frames: bytes
    sizes: bytes
    portions: list[Portion]
    own_keys: dict[int, tuple[str, str]]
    own_ttls: dict[int, float]


class Sink:
    """A recipient that collects messages, and gives each the next seq.

    It is closed at first. The routing loop then leaves the next message to the slow path,
    which opens it if messages are accepted.

    Attributes:
        messages, size: Messages and bytes in the recipient, also the collected ones.
        keys: Deduplication keys that the recipient remembers, also those of the collected
            messages.
        uncommitted: Those of them that have no outcome yet.
        next_seq: The seq of the next message.
        first_seq: The seq of the first collected message.
        collecting: Those of all sinks that have collected messages; it is among them from
            the first message until ``take_collected``.
        most_messages, most_size: Limits of ``messages`` and ``size``; 0 while closed. Each
            key that is collected makes ``most_size`` smaller.
        largest: Most bytes of a payload.
        content: The collected frames.
        sizes: Bytes of each, 4 bytes each, little-endian.
        portions: Whose messages they are, in order.
        own_keys, own_ttls: As in ``Taken``.
    """

    __slots__ = (
        "collecting",
        "content",
        "first_seq",
        "keys",
        "largest",
        "messages",
        "most_messages",
        "most_size",
        "next_seq",
        "own_keys",
        "own_ttls",
        "portions",
        "size",
        "sizes",
        "uncommitted",
    )

    def __init__(self) -> None:
        self.collecting: dict[Any, None] = {}
        self.messages = self.size = self.uncommitted = self.keys = 0
        self.next_seq = self.first_seq = 1
        self.most_messages = self.most_size = self.largest = 0
        self.content = bytearray()
        self.sizes = bytearray()
        self.portions: list[Portion] = []
        self.own_keys: dict[int, tuple[str, str]] = {}
        self.own_ttls: dict[int, float] = {}

    def open(self, most_messages: int, most_size: int, largest: int) -> None:
        """Allow the routing loop to append messages within these limits."""
        self.most_messages = most_messages
        self.most_size = most_size
        self.largest = largest

    def close(self) -> None:
        """Leave further messages to the slow path."""
        self.open(0, 0, 0)

    def begin(self) -> None:
        """Note that the next message is the first of those that are collected."""
        self.first_seq = self.next_seq
        self.collecting[self] = None

    def has_place(self, size: int) -> bool:
        """Return whether one more frame may be collected before ``take_collected``."""
        return not self.sizes or (
            len(self.sizes) < 4 * MESSAGES and len(self.content) + size <= BYTES
        )

    def portion(self, session: Any, receipt: bool) -> Portion:
        """Return the portion that the next message belongs to."""
        if self.portions:
            last = self.portions[-1]
            if last.session is session and last.receipt == receipt:
                return last
        last = Portion(session, receipt=receipt)
        self.portions.append(last)
        return last

    def append(self, session: Any, message_id: bytes, frame: bytes, *, receipt: bool) -> None:
        """Append one message, whose frame has the next seq."""
        if not self.sizes:
            self.begin()
        self.portion(session, receipt).ids.extend(message_id)
        self.content += frame
        self.sizes += len(frame).to_bytes(4, "little")
        self.next_seq += 1
        self.messages += 1
        self.uncommitted += 1
        self.size += len(frame)
        session.uncommitted += 1

    def mark(self, session: Any, key: str | None, ttl: float | None) -> None:
        """Note the key and the ttl of the message that was just appended."""
        position = len(self.sizes) // 4 - 1
        if key is not None:
            self.own_keys[position] = session.client.name, key
            self.keys += 1
            self.most_size -= KEY_SIZE
        if ttl is not None:
            self.own_ttls[position] = ttl

    def take_collected(self) -> Taken:
        """Remove and return what was collected."""
        self.collecting.pop(self, None)
        taken = Taken(
            self.first_seq,
            bytes(self.content),
            bytes(self.sizes),
            self.portions,
            self.own_keys,
            self.own_ttls,
        )
        self.content, self.sizes, self.portions = bytearray(), bytearray(), []
        self.own_keys, self.own_ttls = {}, {}
        return taken
