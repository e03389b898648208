"""Log levels by area, which an administrator can change while the broker runs.

The first word of an event is its area.
"""

from __future__ import annotations

import time
from typing import Any, Final

import structlog
from structlog.typing import EventDict, WrappedLogger

from brokerd.config import units
from brokerd.config.model import Log as Settings
from brokerd.config.model import LogAreas
from brokerd.config.values import LogLevel

__all__ = ["AreaLevels", "LevelRefused"]

_AREAS: Final = tuple(LogAreas.model_fields)
#: The levels in order; structlog's method of that name logs at a level.
_ORDER: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}


class LevelRefused(Exception):
    """A level can't be changed as requested; the message says what is wrong and what is
    right.
    """


class AreaLevels:
    """The level of each area, and the structlog processor that drops events below it.

    settings: the section ``log``.
    """

    def __init__(self, settings: Settings) -> None:
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Use the levels in other settings; levels changed at run time are reset."""
        areas = {area: getattr(settings.areas, area) or settings.level for area in _AREAS}
        self._configured: dict[str, LogLevel] = areas
        self._default = settings.level
        #: By area: the level set at run time, and until when on the monotonic clock.
        self._changed: dict[str, tuple[LogLevel, float | None]] = {}

    def __call__(self, logger: WrappedLogger, method_name: str, event_dict: EventDict) -> EventDict:
        """Return the event; raise DropEvent if the level of its area is higher."""
        area = event_dict["event"].partition(".")[0]
        if _ORDER[method_name] < _ORDER[self._level_of(area)]:
            raise structlog.DropEvent
        return event_dict

    def _level_of(self, area: str) -> LogLevel:
        changed = self._changed.get(area)
        if changed is not None:
            level, until = changed
            if until is None or time.monotonic() < until:
                return level
            del self._changed[area]
        return self._configured.get(area, self._default)

    def levels(self) -> dict[str, dict[str, Any]]:
        """Return the state of each area, for administrators.

        Returns:
            For each area, its ``level`` and whether it was ``changed`` at run time.
            A change that ends by itself has the ``seconds`` left.
        """
        found: dict[str, dict[str, Any]] = {}
        for area in _AREAS:
            level = self._level_of(area)
            changed = self._changed.get(area)
            found[area] = {"level": level.value, "changed": changed is not None}
            if changed is not None and changed[1] is not None:
                found[area]["seconds"] = round(changed[1] - time.monotonic(), 1)
        return found

    def change(self, area: object, level: object, for_: object = None) -> dict[str, Any]:
        """Set the level of one area or of all, until the next reload or for a time.

        Args:
            area: An area, or ``all``.
            level: A level, or ``default`` for the level in the configuration.
            for_: A duration as in the configuration, or None for no end.

        Returns:
            The change as fields for the log.

        Raises:
            LevelRefused: An argument is not valid; nothing has changed.
        """
        areas = list(_AREAS) if area == "all" else [area] if isinstance(area, str) else []
        if not set(areas) <= set(_AREAS) or not areas:
            raise LevelRefused(f"the area is not valid (give all, or one of {', '.join(_AREAS)})")
        if level != "default" and level not in tuple(LogLevel):
            raise LevelRefused(f"the level is not valid (give {', '.join(LogLevel)}, or default)")
        try:
            seconds = None if for_ is None else units.duration(for_)
        except ValueError as error:
            raise LevelRefused(str(error)) from None
        if level == "default" and seconds is not None:
            raise LevelRefused("a configured level has no end (give a level, or no time)")
        until = None if seconds is None else time.monotonic() + seconds
        for each in areas:
            if level == "default":
                self._changed.pop(each, None)
            else:
                self._changed[each] = (LogLevel(str(level)), until)
        time_s = {} if seconds is None else {"for_s": seconds}
        return {"area": area, "to": str(level), **time_s}
