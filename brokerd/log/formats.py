"""One event as one line: for people, for programs, for the journal; never two, and never somebody else's.

What a client sent may stand in a field: a topic, a name it made up, an operation that does not exist. Nothing in it
ends a line, moves a cursor, turns the direction of text or looks like another field: whatever can't be printed is
escaped. Source of the journal's form: systemd, "Native Journal Protocol"; of ``<N>``: sd-daemon(3).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import structlog

__all__ = ["PRIORITIES", "Entry", "Form", "console", "journal_entry", "json_line", "prefixed"]

#: An event with its fields: ``timestamp``, ``level`` and ``event`` are always there, and text.
Entry: TypeAlias = Mapping[str, Any]
#: Returns the bytes that stand for an event; their end is the event's end.
Form: TypeAlias = Callable[[Entry], bytes]

#: What the journal calls our levels (syslog(3)).
PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3}
_OUR_OWN: Final = ("timestamp", "level", "event")
#: Text that needs no quotes: nothing in it could be taken for the end of a field.
_PLAIN: Final = re.compile(r"[!#-<>-\[\]-~]+")
#: Bytes of one journal entry, and of its longest field; a datagram much longer is not taken by every system.
_LARGEST_ENTRY: Final = 100_000
_LARGEST_FIELD: Final = 32_000


class _Escaped:
    """Text as Python would write it, for a renderer that prints text as it is."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return repr(self._text)


def console(*, colors: bool) -> Form:
    """Return the form for a terminal, in columns."""
    renderer = structlog.dev.ConsoleRenderer(colors=colors)

    def form(entry: Entry) -> bytes:
        safe = {
            key: _Escaped(value) if isinstance(value, str) and not value.isprintable() else value
            for key, value in entry.items()
        }
        return _line(str(renderer(None, "", safe)))

    return form


def json_line(entry: Entry) -> bytes:
    """Return the event as one JSON object, in ASCII."""
    return _line(json.dumps(entry, default=repr))


def prefixed(entry: Entry) -> bytes:
    """Return the event as plain text with its priority in front, as systemd reads it from a standard error."""
    return _line(f"<{PRIORITIES[entry['level']]}>{_message(entry)}")


def journal_entry(entry: Entry) -> bytes:
    """Return the event as an entry of the journal: MESSAGE for people, and a field BROKERD_... for each of ours."""
    known = {
        "PRIORITY": str(PRIORITIES[entry["level"]]),
        "SYSLOG_IDENTIFIER": "brokerd",
        "MESSAGE": _message(entry)[:_LARGEST_FIELD],
        "BROKERD_EVENT": entry["event"],
    }
    more = {
        "BROKERD_" + re.sub(r"[^A-Z0-9_]", "_", key.upper())[:50]: _bare(value)[:_LARGEST_FIELD]
        for key, value in entry.items()
        if key not in _OUR_OWN
    }
    lines = [f"{key}={value}\n".encode() for key, value in (*known.items(), *more.items())]
    while sum(map(len, lines)) > _LARGEST_ENTRY:
        # MESSAGE has them too, from the beginning.
        lines.pop()
    return b"".join(lines)


def _message(entry: Entry) -> str:
    fields = (f" {key}={_quoted(value)}" for key, value in entry.items() if key not in _OUR_OWN)
    return str(entry["event"]) + "".join(fields)


def _quoted(value: Any) -> str:
    """Return a value for a place where a blank ends it."""
    return value if isinstance(value, str) and _PLAIN.fullmatch(value) else json.dumps(value, default=repr)


def _bare(value: Any) -> str:
    """Return a value for a place of its own, where only a line's end ends it."""
    if isinstance(value, str):
        return value if value.isprintable() else json.dumps(value)[1:-1]
    return json.dumps(value, default=repr)


def _line(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace") + b"\n"
