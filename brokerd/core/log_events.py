"""Log events: noted by the core, which does not log, and taken by the network layer.

Noting an event costs one dict lookup. An event that is noted again before it is taken
is counted, not kept twice. The number of events kept is bounded, so a flood increases
counts, never memory. The routing loop notes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from brokerd.core.session import Session

__all__ = ["MOST", "LogEvent", "LogEvents"]

#: Most different events kept at once. Beyond that, events that differ only in ``other``
#: are counted together, without it.
MOST: Final = 256


class LogEvent(NamedTuple):
    """An event for the log that happened once or several times.

    Attributes:
        event: Its name in the log.
        session: The session that caused it, or whose queue it is about.
        other: The name, address or topic at the other side. It is "" if there is none,
            or if too many events were noted.
        code: The reason for programs.
        reason: The reason for people, as it was noted first.
        times: The number of times that it happened.
    """

    event: str
    session: Session
    other: str
    code: str
    reason: str
    times: int


class LogEvents:
    """The events noted since the last ``take``, oldest first."""

    __slots__ = ("_noted",)

    def __init__(self) -> None:
        #: For each event: the reason noted first, and the number of times.
        self._noted: dict[tuple[str, Session, str, str], tuple[str, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._noted)

    def note(
        self, event: str, session: Session, other: str = "", code: str = "", reason: str = ""
    ) -> None:
        """Note an event, or count it if it is noted already."""
        counts = self._noted
        key = (event, session, other, code)
        if key not in counts and len(counts) >= MOST:
            key = (event, session, "", code)
        first, count = counts.get(key, (reason, 0))
        counts[key] = (first, count + 1)

    def take(self) -> list[LogEvent]:
        """Remove and return all noted events."""
        counts, self._noted = self._noted, {}
        return [
            LogEvent(event, session, other, code, reason, count)
            for (event, session, other, code), (reason, count) in counts.items()
        ]
