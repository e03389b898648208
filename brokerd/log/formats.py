"""Formats of the log: each event becomes one line, for people, for programs or for the
journal.

A field may contain text that a client sent: a topic, a made-up name, an unknown
operation. That text can't end a line, move a cursor, change the direction of text or
look like another field. Characters that can't be printed are escaped.

A format is a chain of structlog processors. Its last processor, the renderer, returns
the event as text or, for the journal, as bytes. Source of the journal's form: systemd,
"Native Journal Protocol"; of ``<N>``: sd-daemon(3).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from json.encoder import encode_basestring_ascii as _in_quotes
from typing import Any, Final, TypeAlias

from structlog.dev import ConsoleRenderer, plain_traceback
from structlog.processors import JSONRenderer
from structlog.typing import EventDict, Processor, WrappedLogger

from brokerd.log.processors import (
    PRIORITIES,
    escape_control_characters,
    message,
    to_journal_fields,
)

__all__ = ["JOURNAL", "JSON", "PREFIXED", "Format", "console", "render"]

#: The processors after the header fields have been added.
Format: TypeAlias = tuple[Processor, ...]

#: Most bytes of one journal entry; some systems refuse a much longer datagram.
_LARGEST_ENTRY: Final = 100_000


def render_prefixed(logger: WrappedLogger, method_name: str, event_dict: EventDict) -> str:
    """Return the event as text with its priority in front, as systemd reads a standard
    error.
    """
    return f"<{PRIORITIES[event_dict['level']]}>{message(event_dict)}"


def render_journal_entry(logger: WrappedLogger, method_name: str, event_dict: EventDict) -> bytes:
    """Return the journal's fields as an entry in its protocol."""
    lines = [f"{key}={value}\n".encode() for key, value in event_dict.items()]
    while sum(map(len, lines)) > _LARGEST_ENTRY:
        # MESSAGE contains these fields too, from the beginning.
        lines.pop()
    return b"".join(lines)


# json.dumps would make an encoder for each event: a fifth of the time for a line.
_encoder: Final = json.JSONEncoder(default=repr)


def _dumps(event_dict: EventDict, **_: object) -> str:
    # Most fields are text. To encode these alone takes a quarter of the time.
    values = event_dict.values()
    try:
        encoded = tuple(map(_in_quotes, values))
    except TypeError:
        encoded = tuple(
            _in_quotes(value) if isinstance(value, str) else _encoder.encode(value)
            for value in values
        )
    return _template(tuple(event_dict)) % encoded


@functools.lru_cache(maxsize=256)
def _template(keys: tuple[str, ...]) -> str:
    """Return the JSON object of fields with these names, with ``%s`` for each value."""
    names = (_in_quotes(key).replace("%", "%%") for key in keys)
    return f"{{{', '.join(f'{name}: %s' for name in names)}}}"


#: One JSON object, in ASCII.
JSON: Final[Format] = (JSONRenderer(_dumps),)
PREFIXED: Final[Format] = (render_prefixed,)
JOURNAL: Final[Format] = (to_journal_fields, render_journal_entry)


def console(*, colors: bool) -> Format:
    """Return the format for a terminal, in columns."""
    renderer = ConsoleRenderer(colors=colors, exception_formatter=plain_traceback)
    return (escape_control_characters, renderer)


def render(form: Format, event: Mapping[str, Any]) -> bytes:
    """Return the bytes for a sink of an event that has its header fields."""
    rendered: Any = event
    for processor in form:
        rendered = processor(None, event["level"], rendered)
    if isinstance(rendered, bytes):
        return rendered
    line: str = rendered
    return line.encode("utf-8", "backslashreplace") + b"\n"
