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
from collections.abc import Callable, Collection, Mapping
from json.encoder import encode_basestring_ascii as _in_quotes
from typing import Any, Final, TypeAlias

from structlog.dev import ConsoleRenderer, plain_traceback
from structlog.processors import JSONRenderer
from structlog.typing import EventDict, Processor, WrappedLogger

from brokerd.log.processors import (
    HEADER_FIELDS,
    PRIORITIES,
    RawEvent,
    date_and_time,
    escape_control_characters,
    message,
    to_journal_fields,
    with_header,
)

__all__ = ["JOURNAL", "JSON", "PREFIXED", "Format", "console", "render", "renderer"]

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


#: JSON lines by their level, event and names of fields, and most that are kept.
_templates: Final[dict[tuple[str, ...], str]] = {}
_MOST_TEMPLATES: Final = 256

# json.dumps would make an encoder for each event: a fifth of the time for a line.
_encoder: Final = json.JSONEncoder(default=repr)


def _dumps(event_dict: EventDict, **_: object) -> str:
    return _template(tuple(event_dict)) % _encoded(event_dict.values())


def _encoded(values: Collection[Any]) -> tuple[str, ...]:
    """Return each value as JSON."""
    # Most fields are text. To encode these alone takes a quarter of the time.
    try:
        return tuple(map(_in_quotes, values))
    except TypeError:
        return tuple(
            _in_quotes(value) if isinstance(value, str) else _encoder.encode(value)
            for value in values
        )


@functools.lru_cache(maxsize=256)
def _template(keys: tuple[str, ...]) -> str:
    """Return the JSON object of fields with these names, with ``%s`` for each value."""
    return f"{{{', '.join(f'{_text(key)}: %s' for key in keys)}}}"


def _render_json(event: Mapping[str, Any] | RawEvent) -> bytes:
    """Return the line of an event in the format JSON."""
    if not isinstance(event, tuple):
        return _line(JSON, event)
    # The same line as with a dict of all fields, in less time.
    time_ns, level, name, fields = event
    key = (level, name, *fields)
    template = _templates.get(key)
    if template is None:
        template = _keep_template(*key)
    if not template:
        return _line(JSON, with_header(event))
    microseconds = time_ns // 1000
    date = date_and_time(microseconds // 1_000_000)
    try:
        line = template % (date, microseconds % 1_000_000, *map(_in_quotes, fields.values()))
    except TypeError:
        line = template % (date, microseconds % 1_000_000, *_encoded(fields.values()))
    return line.encode("ascii")


def _keep_template(level: str, event: str, *keys: str) -> str:
    """Return the line of an event with these fields, and keep it for the next one.

    It has places for the time and for each value. It is "" if a field replaces one of
    the header.
    """
    template = ""
    if set(keys).isdisjoint(HEADER_FIELDS):
        header = f'{{"timestamp": "%s.%06dZ", "level": {_text(level)}, "event": {_text(event)}'
        template = f"{header}{''.join(f', {_text(key)}: %s' for key in keys)}}}\n"
    if len(_templates) == _MOST_TEMPLATES:
        _templates.clear()
    _templates[level, event, *keys] = template
    return template


def _text(text: str) -> str:
    """Return text as JSON, for a template."""
    return _in_quotes(text).replace("%", "%%")


#: One JSON object, in ASCII.
JSON: Final[Format] = (JSONRenderer(_dumps),)
PREFIXED: Final[Format] = (render_prefixed,)
JOURNAL: Final[Format] = (to_journal_fields, render_journal_entry)


def console(*, colors: bool) -> Format:
    """Return the format for a terminal, in columns."""
    renderer = ConsoleRenderer(colors=colors, exception_formatter=plain_traceback)
    return (escape_control_characters, renderer)


def render(form: Format, event: Mapping[str, Any] | RawEvent) -> bytes:
    """Return the bytes for a sink of an event, which has its header fields or is raw."""
    if not isinstance(event, tuple):
        return _line(form, event)
    return _render_json(event) if form is JSON else _line(form, with_header(event))


def renderer(form: Format) -> Callable[[Mapping[str, Any] | RawEvent], bytes]:
    """Return :func:`render` for one format."""
    return _render_json if form is JSON else functools.partial(render, form)


def _line(form: Format, event: Mapping[str, Any]) -> bytes:
    """Return the bytes that a format makes of an event with its header fields."""
    rendered: Any = event
    for processor in form:
        rendered = processor(None, event["level"], rendered)
    if isinstance(rendered, bytes):
        return rendered
    line: str = rendered
    return line.encode("utf-8", "backslashreplace") + b"\n"
