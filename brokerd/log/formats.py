"""Formats of the log: each event becomes one line, for people, for programs or for the
journal.

A field may contain text that a client sent: a topic, a made-up name, an unknown
operation. That text can't end a line, move a cursor, change the direction of text or
look like another field. Characters that can't be printed are escaped. Source of the
journal's form: systemd, "Native Journal Protocol"; of ``<N>``: sd-daemon(3).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import structlog

__all__ = ["PRIORITIES", "Entry", "Form", "console", "journal_entry", "json_line", "prefixed"]

#: An event with its fields: ``timestamp``, ``level`` and ``event`` are always present,
#: as text.
Entry: TypeAlias = Mapping[str, Any]
#: Returns the bytes of an event; where they end, the event ends.
Form: TypeAlias = Callable[[Entry], bytes]

#: The journal's priorities of our levels (syslog(3)).
PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3}
_OUR_OWN: Final = ("timestamp", "level", "event")
#: Text that needs no quotes: it has no character that could end a field.
_PLAIN: Final = re.compile(r"[!#-<>-\[\]-~]+")
#: Most bytes of one journal entry, and of its longest field; some systems refuse a much
#: longer datagram.
_LARGEST_ENTRY: Final = 100_000
_LARGEST_FIELD: Final = 32_000


class _Escaped:
    """Text that a renderer prints escaped, as its Python literal."""

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
    """Return the event as text with its priority in front, as systemd reads a standard
    error.
    """
    return _line(f"<{PRIORITIES[entry['level']]}>{_message(entry)}")


def journal_entry(entry: Entry) -> bytes:
    """Return the event as an entry of the journal.

    It has MESSAGE for people, and a field BROKERD_... for each field of the event.
    """
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
        # MESSAGE contains these fields too, from the beginning.
        lines.pop()
    return b"".join(lines)


def _message(entry: Entry) -> str:
    fields = (f" {key}={_quoted(value)}" for key, value in entry.items() if key not in _OUR_OWN)
    return str(entry["event"]) + "".join(fields)


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


def _line(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace") + b"\n"
