"""What an operator may want to know of: noted by the core, which does not log, and taken by the network layer.

Noting costs what one look into a dict costs. The same thing noted again before it is taken is counted, not
kept twice, and what is kept is bounded: a flood makes numbers grow, never memory. The routing loop notes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from brokerd.core.session import Session

__all__ = ["MOST", "LogEvent", "LogEvents"]

#: Different happenings kept at once; from then on the other side of one is left out.
MOST: Final = 256


class LogEvent(NamedTuple):
    """Something that happened, once or several times.

    event: as in the log. session: whose doing it was, or whose queue. other: the name, address or topic at the
    other side, "" where there is none, or where too many were noted. code, reason: why, for programs and for
    people; the reason is that of the first time. times: how often.
    """

    event: str
    session: Session
    other: str
    code: str
    reason: str
    times: int


class LogEvents:
    """Everything noted since it was last taken, oldest first."""

    __slots__ = ("_noted",)

    def __init__(self) -> None:
        #: For each: the reason given first, and how often.
        self._noted: dict[tuple[str, Session, str, str], tuple[str, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._noted)

    def note(self, event: str, session: Session, other: str = "", code: str = "", reason: str = "") -> None:
        """Note that something happened, or that it happened again."""
        noted = self._noted
        key = (event, session, other, code)
        if key not in noted and len(noted) >= MOST:
            key = (event, session, "", code)
        first, count = noted.get(key, (reason, 0))
        noted[key] = (first, count + 1)

    def take(self) -> list[LogEvent]:
        """Return everything noted, and forget it."""
        noted, self._noted = self._noted, {}
        return [
            LogEvent(event, session, other, code, reason, count)
            for (event, session, other, code), (reason, count) in noted.items()
        ]
