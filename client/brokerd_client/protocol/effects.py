"""What happened in a dialog while it took something in, for its face to pass on. No I/O."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from brokerd_client.errors import BrokerdError
from brokerd_client.message import Message

__all__ = ["Effects"]

M = TypeVar("M", bound=Message)


class Effects(Generic[M]):
    """What happened, for the face to pass on.

    messages: MESSAGE and REQUEST frames, in order; ``size`` is their bytes on the wire, about.
    outcomes: (waiter, Message | dict | Receipt | BrokerdError) for who waits.
    events: (sink, Message or Presence) for subscriptions and watches. ended: (sink, why) for those that are over.
    undelivered: failures of sends that nobody waits for.
    unreadable: why a frame was skipped, one error each. warnings: sentences for the log.
    broken: set when the connection has to be closed; ``Dialog.lost`` is then called with it.
    """

    __slots__ = (
        "broken",
        "ended",
        "events",
        "messages",
        "outcomes",
        "size",
        "undelivered",
        "unreadable",
        "warnings",
    )

    def __init__(self) -> None:
        self.messages: list[M] = []
        self.size = 0
        self.outcomes: list[tuple[Any, Any]] = []
        self.events: list[tuple[Any, Any]] = []
        self.ended: list[tuple[Any, BrokerdError]] = []
        self.undelivered: list[BrokerdError] = []
        self.unreadable: list[BrokerdError] = []
        self.warnings: list[str] = []
        self.broken: BrokerdError | None = None
