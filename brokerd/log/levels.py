"""Log levels by area, which an administrator can change while the broker runs.

The first word of an event is its area. The levels filter events before structlog's
processors: a method of the logger returns early, as those of structlog's filtering
bound loggers do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import structlog
from structlog import DropEvent
from structlog.typing import EventDict, FilteringBoundLogger

from brokerd.config import units
from brokerd.config.model import Log as Settings
from brokerd.config.model import LogAreas
from brokerd.config.values import LogLevel
from brokerd.log.processors import add_header

__all__ = ["AreaLevels", "LevelRefused", "make_area_bound_logger"]

_AREAS: Final = tuple(LogAreas.model_fields)
#: The levels in order; structlog's method of that name logs at a level.
_ORDER: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}


class LevelRefused(Exception):
    """A level can't be changed as requested; the message says what is wrong and what is
    right.
    """


class AreaLevels:
    """The level of each area, and the filter of events below it.

    settings: the section ``log``.
    """

    def __init__(self, settings: Settings) -> None:
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Use the levels in other settings; levels changed at run time are reset."""
        areas = {area: getattr(settings.areas, area) or settings.level for area in _AREAS}
        self._configured: dict[str, LogLevel] = areas
        self._default = settings.level
        #: By area: the place of the configured level in _ORDER.
        self._least = {area: _ORDER[level] for area, level in areas.items()}
        #: By area: the level set at run time, and until when on the monotonic clock.
        self._changed: dict[str, tuple[LogLevel, float | None]] = {}

    def admit(self, method_name: str, event: str) -> bool:
        """Return whether an event is at or above the level of its area."""
        area = event.partition(".")[0]
        if self._changed or area not in self._least:
            return _ORDER[method_name] >= _ORDER[self._level_of(area)]
        return _ORDER[method_name] >= self._least[area]

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
        states: dict[str, dict[str, Any]] = {}
        for area in _AREAS:
            level = self._level_of(area)
            changed = self._changed.get(area)
            states[area] = {"level": level.value, "changed": changed is not None}
            if changed is not None and changed[1] is not None:
                states[area]["seconds"] = round(changed[1] - time.monotonic(), 1)
        return states

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
        for name in areas:
            if level == "default":
                self._changed.pop(name, None)
            else:
                self._changed[name] = (LogLevel(str(level)), until)
        time_s = {} if seconds is None else {"for_s": seconds}
        return {"area": area, "to": str(level), **time_s}


def make_area_bound_logger(admit: Callable[[str, str], bool]) -> type[FilteringBoundLogger]:
    """Return a structlog wrapper class whose level methods return early.

    admit: returns whether a method's event is logged; the arguments are the name of the
    method and the event.
    """
    base = structlog.make_filtering_bound_logger("debug")
    methods: dict[str, Any] = {name: _method(name, admit) for name in _ORDER}
    return type("AreaBoundLogger", (base,), methods)


def _method(name: str, admit: Callable[[str, str], bool]) -> Callable[..., Any]:
    def method(self: Any, event: str, **fields: Any) -> None:
        if not admit(name, event):
            return
        processors = self._processors
        if len(processors) == 1 and processors[0] is add_header:
            # Most events need nothing more before they are queued. The sink's thread does
            # the rest.
            if self._context:
                fields = {**self._context, **fields}
            self._logger.sink.put((time.time_ns(), name, event, fields))
            return
        # The same as structlog's _proxy_to_logger, without four calls and two more dicts.
        # The header fields come first: see add_header.
        event_dict: EventDict = {
            "timestamp": "",
            "level": name,
            "event": event,
            **self._context,
            **fields,
        }
        try:
            for processor in processors:
                event_dict = processor(self._logger, name, event_dict)
        except DropEvent:
            return
        self._logger.sink.put(event_dict)

    method.__name__ = name
    return method
