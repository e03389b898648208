"""Log events: noted by the core, which does not log, and taken by the network layer.

Noting an event costs one dict lookup. An event that is noted again before it is taken
is counted, not kept twice. The number of events kept is bounded, so a flood increases
counts, never memory. The routing loop notes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from brokerd.core.session import Session

__all__ = ["MOST", "LogEvent", "LogEvents"]

#: Most different events kept at once. Beyond that, events that differ only in ``other``
#: are counted together, without it.
MOST: Final = 256
#: Most message ids kept per event.
_IDS: Final = 16


class LogEvent(NamedTuple):
    """An event for the log that happened once or several times.

    Attributes:
        event: Its name in the log.
        session: The session that caused it, or whose queue it is about; None for an
            event of a mailbox.
        other: The name, address, topic or mailbox at the other side. It is "" if there is
            none, or if too many events were noted.
        code: The reason for programs.
        reason: The reason for people, as it was noted first.
        times: The number of times that it happened.
        field: The rules that decided, by their name in the client's entry; ``mailbox`` of
            the recipient's entry; or "".
        ids: The ids of the first messages that it happened to.
    """

    event: str
    session: Session | None
    other: str
    code: str
    reason: str
    times: int
    field: str = ""
    ids: Sequence[int] = ()


class _Noted:
    """Counts one event until it is taken."""

    __slots__ = ("field", "ids", "reason", "times")

    def __init__(self, reason: str, field: str) -> None:
        self.reason = reason
        self.field = field
        self.times = 0
        self.ids: list[int] = []


class LogEvents:
    """The events noted since the last ``take``, oldest first."""

    __slots__ = ("_noted",)

    def __init__(self) -> None:
        self._noted: dict[tuple[str, Session | None, str, str], _Noted] = {}

    def __bool__(self) -> bool:
        return bool(self._noted)

    def note(
        self,
        event: str,
        session: Session | None,
        other: str = "",
        code: str = "",
        reason: str = "",
        *,
        field: str = "",
        message_id: int | None = None,
    ) -> None:
        """Note an event, or count it if it is noted already."""
        counts = self._noted
        key = (event, session, other, code)
        noted = counts.get(key)
        if noted is None and len(counts) >= MOST:
            key = (event, session, "", code)
            noted = counts.get(key)
        if noted is None:
            noted = counts[key] = _Noted(reason, field)
        noted.times += 1
        if message_id is not None and len(noted.ids) < _IDS:
            noted.ids.append(message_id)

    def take(self) -> list[LogEvent]:
        """Remove and return all noted events."""
        counts, self._noted = self._noted, {}
        return [
            LogEvent(*key, noted.reason, noted.times, noted.field, noted.ids)
            for key, noted in counts.items()
        ]
