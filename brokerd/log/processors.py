"""structlog processors of the log: header fields, escaping, journal fields, audit.

A processor takes an event as a dict and returns it for the next processor, as
structlog's documentation describes. The last processor of a format is its renderer, in
:mod:`brokerd.log.formats`. Source of the journal's fields: systemd, "Native Journal
Protocol" and systemd.journal-fields(7).
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

from structlog import DropEvent
from structlog.typing import EventDict, WrappedLogger

__all__ = [
    "AUDITED",
    "HEADER_FIELDS",
    "PRIORITIES",
    "AuditBranch",
    "RawEvent",
    "add_header",
    "date_and_time",
    "escape_control_characters",
    "may_be_audited",
    "message",
    "to_journal_fields",
    "with_header",
]

#: An event before its header fields: the time in nanoseconds since the epoch, the level,
#: the event and its other fields. A sink's thread makes its line with less work than a
#: dict with all fields needs.
RawEvent: TypeAlias = tuple[int, str, str, dict[str, Any]]

#: The journal's priorities of our levels (syslog(3)).
PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
#: Fields that each event begins with; all are text.
HEADER_FIELDS: Final = ("timestamp", "level", "event")
#: Events that go to the audit file whatever the levels, besides all events of
#: _AUDITED_AREAS.
AUDITED: Final = frozenset(
    {
        "channel.opened",
        "channel.closed",
        "client.connected",
        "client.disconnected",
        "client.refused",
        "client.refused_more",
        "client.unsubscribed",
        "mailbox.changed",
        "mailbox.shown",
    }
)
_AUDITED_AREAS: Final = frozenset({"admin", "daemon", "key", "log"})
#: Text that needs no quotes: it has no character that could end a field.
_PLAIN: Final = re.compile(r"[!#-<>-\[\]-~]+")
#: Most characters of one field in a journal entry.
_LONGEST_FIELD: Final = 32_000


def add_header(logger: WrappedLogger, method_name: str, event_dict: EventDict) -> EventDict:
    """Return the event with its header fields in front of the fields of the call."""
    # structlog's TimeStamper and add_log_level would take several times as long, and would
    # put their fields behind.
    timestamp = _timestamp(time.time_ns())
    if "timestamp" in event_dict:
        # It is in its place, and so are the other header fields.
        event_dict["timestamp"] = timestamp
        return event_dict
    return {
        "timestamp": timestamp,
        "level": method_name,
        "event": event_dict.pop("event"),
        **event_dict,
    }


def with_header(raw: RawEvent) -> EventDict:
    """Return a raw event with its header fields in front of the others."""
    time_ns, level, event, fields = raw
    return {"timestamp": _timestamp(time_ns), "level": level, "event": event, **fields}


def _timestamp(time_ns: int) -> str:
    """Return the time in UTC, to the microsecond."""
    seconds, microseconds = divmod(time_ns // 1000, 1_000_000)
    return f"{date_and_time(seconds)}.{microseconds:06}Z"


@functools.lru_cache(maxsize=1)
def date_and_time(seconds: int) -> str:
    """Return the date and time of a whole second since the epoch, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().removesuffix("+00:00")


class _Escaped:
    """Text that a renderer prints escaped, as its Python literal."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return repr(self._text)


def escape_control_characters(
    logger: WrappedLogger, method_name: str, event_dict: EventDict
) -> EventDict:
    """Return the event so that text in it can't end a line or control a terminal."""
    return {
        key: _Escaped(value) if isinstance(value, str) and not value.isprintable() else value
        for key, value in event_dict.items()
    }


def to_journal_fields(logger: WrappedLogger, method_name: str, event_dict: EventDict) -> EventDict:
    """Return the journal's fields of an event.

    They are MESSAGE for people, and a field BROKERD_... for each field of the event.
    """
    header = {
        "PRIORITY": str(PRIORITIES[event_dict["level"]]),
        "SYSLOG_IDENTIFIER": "brokerd",
        "MESSAGE": message(event_dict)[:_LONGEST_FIELD],
        "BROKERD_EVENT": event_dict["event"],
    }
    more = {
        "BROKERD_" + re.sub(r"[^A-Z0-9_]", "_", key.upper())[:50]: _bare(value)[:_LONGEST_FIELD]
        for key, value in event_dict.items()
        if key not in HEADER_FIELDS
    }
    return {**header, **more}


def message(event_dict: EventDict) -> str:
    """Return the event and its fields as text, ``EVENT KEY=VALUE ...``."""
    fields = (
        f" {key}={_quoted(value)}" for key, value in event_dict.items() if key not in HEADER_FIELDS
    )
    return str(event_dict["event"]) + "".join(fields)


def _quoted(value: Any) -> str:
    """Return a value for a place where a space ends it."""
    return (
        value
        if isinstance(value, str) and _PLAIN.fullmatch(value)
        else json.dumps(value, default=repr)
    )


def _bare(value: Any) -> str:
    """Return a value for a place of its own, where only a line end ends it."""
    if isinstance(value, str):
        return value if value.isprintable() else json.dumps(value)[1:-1]
    return json.dumps(value, default=repr)


class AuditBranch:
    """The processor that copies audited events to a file, whatever the levels.

    Args:
        admit: Returns whether a method's event is at or above its level.
        put: Takes each event.
    """

    def __init__(self, admit: Callable[[str, str], bool], put: Callable[[EventDict], None]) -> None:
        self._admit = admit
        self._put = put

    def __call__(self, logger: WrappedLogger, method_name: str, event_dict: EventDict) -> EventDict:
        """Copy an audited event to the file; raise DropEvent if it is below its level."""
        if _is_audited(method_name, event_dict):
            self._put(event_dict)
        if not self._admit(method_name, event_dict["event"]):
            raise DropEvent
        return event_dict


def may_be_audited(event: str) -> bool:
    """Return whether an event goes to the audit file, at least with some fields."""
    return (
        event in AUDITED or event.partition(".")[0] in _AUDITED_AREAS or event == "message.refused"
    )


def _is_audited(method_name: str, event_dict: EventDict) -> bool:
    """Return whether the event goes to the audit file.

    It does if it shows which clients connected or were refused, what administrators
    did, or what changed.
    """
    event = event_dict["event"]
    if method_name == "debug" or event == "daemon.bug":
        return False
    if event == "message.refused":
        return event_dict.get("to") == "$broker" and event_dict.get("code") == "denied"
    return may_be_audited(event)
