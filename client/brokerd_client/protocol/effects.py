"""The effects of one call of a dialog, for its face to pass on. No I/O."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from brokerd_client.connection_event import ConnectionEvent
from brokerd_client.errors import BrokerdError
from brokerd_client.message import Message

__all__ = ["Effects"]

M = TypeVar("M", bound=Message)


class Effects(Generic[M]):
    """The effects of one call of a dialog, for the face to pass on.

    Attributes:
        messages: MESSAGE and REQUEST frames, in order; ``size`` is about their bytes on
            the wire.
        stored: Messages and events from the mailbox, in order.
        outcomes: (waiter, Message | dict | Receipt | BrokerdError) for waiting calls.
        cancelled: Requests received earlier whose requesters do not wait any more.
        events: (sink, Message or Presence) for subscriptions and watches.
        ended: (sink, error) for subscriptions and watches that have ended.
        undelivered: Failures of sends without a waiting call.
        unreadable: One error for each skipped frame.
        warnings: Sentences for the log.
        changes: Of the state of the connection.
        broken: Set when the connection has to be closed; the face then calls
            ``Dialog.lost`` with it.
    """

    __slots__ = (
        "broken",
        "cancelled",
        "changes",
        "ended",
        "events",
        "messages",
        "outcomes",
        "size",
        "stored",
        "undelivered",
        "unreadable",
        "warnings",
    )

    def __init__(self) -> None:
        self.messages: list[M] = []
        self.stored: list[M] = []
        self.size = 0
        self.outcomes: list[tuple[Any, Any]] = []
        self.cancelled: list[M] = []
        self.events: list[tuple[Any, Any]] = []
        self.ended: list[tuple[Any, BrokerdError]] = []
        self.undelivered: list[BrokerdError] = []
        self.unreadable: list[BrokerdError] = []
        self.warnings: list[str] = []
        self.changes: list[ConnectionEvent] = []
        self.broken: BrokerdError | None = None

    @property
    def has_reports(self) -> bool:
        """Whether there is more than outcomes, messages and events."""
        return bool(
            self.changes
            or self.undelivered
            or self.unreadable
            or self.warnings
            or self.ended
            or self.broken
        )
