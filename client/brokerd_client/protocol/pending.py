"""The pending table: sends whose outcome is still to come. No I/O.

Each sender chooses its own ids. A REPLY that can't be delivered comes back as an ERROR
with the id of another client's request. So an answer counts only if its id fits *and*
its sender, or the recipient that it is about.
"""

from __future__ import annotations

import heapq
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from brokerd_client.errors import TimedOut
from brokerd_client.protocol.subscription_table import SubscriptionEntry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

__all__ = ["Deadline", "Pending", "PendingTable", "Purpose", "within"]

#: Deadlines of finished sends that may stay in the heap before it is rebuilt.
_STALE: Final = 64


class Deadline(float):
    """A time, in seconds on the clock of the face, and the timeout that it ends.

    Attributes:
        timeout_s: Seconds from the begin of the call until then.
    """

    __slots__ = ("timeout_s",)

    timeout_s: float

    @classmethod
    def after(cls, timeout_s: float, now: float) -> Self:
        """Return the deadline of a call that begins now."""
        deadline = cls(now + timeout_s)
        deadline.timeout_s = timeout_s
        return deadline


def within(deadline: float | None) -> str:
    """Return the words for how long a call has waited, as far as its deadline tells."""
    return f"within {deadline.timeout_s:g} s" if isinstance(deadline, Deadline) else "in time"


class Purpose(Enum):
    """The purpose of a pending call: the kind of answer that it expects."""

    RECEIPT = "a send or a publication that asked for a receipt"
    REQUEST = "a request to another client"
    CONTROL = "an operation of the broker, for the caller"
    SUBSCRIBE = "a subscription, for the caller"
    WATCH = "the list of clients that begins a watch, for the caller"
    WHOAMI = "the introduction of the client, right after the handshake"
    RESUBSCRIBE = "a subscription, made again on a new connection or for a watch"
    RESYNC = "the list of clients, on a new connection"
    GOAWAY = "the notice before the broker closes the connection"
    FINISHED = "the confirmation that all earlier sends are written or reported"
    LISTEN = "the begin of listening for channels, for the caller"
    RELISTEN = "the same on a new connection"
    MAILBOX = "the opening of the client's mailbox"
    PARTED = "the confirmation that all earlier sends are handled, before the client leaves"
    FORGET = "an operation whose answer is not needed"


class Pending:
    """A send that waits for its outcome.

    Attributes:
        to: The recipient, "" for a publication.
        about: The topic or name it concerns, or "".
        end: The position in this connection's sent bytes where the frame ends.
        is_sorted: Whether the table has looked at the deadline.
        waiter: An object of the face's; None if no caller waits.
        entry, sink: The subscription that the call makes.
        limit_s: The timeout of the caller in seconds, if it is the request's ttl.
    """

    __slots__ = (
        "about",
        "deadline",
        "end",
        "entry",
        "id",
        "is_sorted",
        "limit_s",
        "purpose",
        "sink",
        "to",
        "waiter",
    )

    def __init__(
        self,
        message_id: int,
        purpose: Purpose,
        to: str,
        end: int,
        waiter: Any,
        deadline: float | None,
        about: str = "",
        entry: SubscriptionEntry | None = None,
        sink: Any = None,
    ) -> None:
        self.id = message_id
        self.purpose = purpose
        self.to = to
        self.end = end
        self.waiter = waiter
        self.deadline = deadline
        self.about = about
        self.entry = entry
        self.sink = sink
        self.limit_s: float | None = None
        self.is_sorted = False

    def timed_out(self) -> TimedOut:
        """Return the error for a caller whose time is over."""
        limit = within(self.deadline) if self.limit_s is None else f"within {self.limit_s:g} s"
        return TimedOut(f"no answer from {self.to or self.about} to {self.id} {limit}")

    def answered_by(self, sender: str) -> bool:
        """Return whether a REPLY or ERROR from ``sender`` can answer this call.

        A request to a pool is answered by one of the pool's members.
        """
        return sender == self.to or (
            sender.startswith(self.to) and sender[len(self.to) : len(self.to) + 1] == "/"
        )

    def concerned_by(self, name: str, names: Sequence[str] = ()) -> bool:
        """Return whether the broker's ERROR about ``name`` is about this send.

        names: the mailboxes that did not store an event.
        """
        return (
            not name
            or name == self.about
            or (not self.to and name in names)
            or name.partition("/")[0] == self.to.partition("/")[0]
        )


class PendingTable(dict[int, Pending]):
    """The pending sends by their ids, in the order of their begin.

    A deadline is looked at when the earliest is asked for. Most calls have ended by then.
    """

    __slots__ = ("_deadlines",)

    def __init__(self) -> None:
        super().__init__()
        self._deadlines: list[tuple[float, int]] = []

    def add(self, pending: Pending) -> None:
        """Add a call to the table."""
        pending.is_sorted = False
        self[pending.id] = pending

    def of(self, waiter: object) -> list[Pending]:
        """Return the calls of the waiter."""
        return [pending for pending in self.values() if pending.waiter is waiter]

    def take_all(self) -> list[Pending]:
        """Remove and return all calls."""
        pending_calls = list(self.values())
        self.clear()
        self._deadlines.clear()
        return pending_calls

    def deadline(self) -> float | None:
        """Return the earliest deadline, or None."""
        self._sort()
        while self._deadlines and self._deadlines[0][1] not in self:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def _sort(self) -> None:
        """Add the deadlines of the calls that were added since the last time."""
        if len(self._deadlines) > _STALE + 2 * len(self):
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self]
            heapq.heapify(self._deadlines)
        for pending in reversed(self.values()):
            if pending.is_sorted:
                break
            pending.is_sorted = True
            if pending.deadline is not None:
                heapq.heappush(self._deadlines, (pending.deadline, pending.id))

    def overdue(self, now: float) -> list[Pending]:
        """Remove and return the calls whose deadline has passed."""
        pending_calls = []
        while (earliest := self.deadline()) is not None and earliest <= now:
            pending_calls.append(self.pop(heapq.heappop(self._deadlines)[1]))
        return pending_calls
