"""The formats of log events: one line in each, whatever text a client has sent."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest

from brokerd.log.formats import JOURNAL, JSON, PREFIXED, Format, console, render, renderer
from brokerd.log.processors import RawEvent, with_header

#: What ends lines, moves cursors, turns text around, or looks like a field.
HOSTILE = [
    "two\nlines",
    "\r\x1b[2K\x1b[31mgone",
    "nul\x00bell\x07del\x7f",
    "line\u2028paragraph\u2029next\x85",
    "right\u202eto left\u2066\u200f",
    "lone \ud800 surrogate",
    'a="b" level=error event=daemon.killed',
    "\x1b[2J",
    "back\\slash 'quotes\" \t tab",
    "<0>emergency",
    "x" * 200_000,
]
FORMS = {
    "json": JSON,
    "console": console(colors=False),
    "colours": console(colors=True),
    "prefixed": PREFIXED,
}


def entry(**fields: Any) -> Mapping[str, Any]:
    return {
        "timestamp": "2026-01-01T00:00:00Z",
        "level": "warning",
        "event": "message.refused",
        **fields,
    }


def rendered(form: Format, event: Mapping[str, Any]) -> bytes:
    """Return the bytes that a format makes of an event."""
    return render(form, event)


def is_harmless(text: str, colors: bool = False) -> bool:
    """Return whether the text has only printable characters, besides colours."""
    if colors:
        text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return text.isprintable()


@pytest.mark.parametrize("form", [*FORMS, "journal"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"name": "alice", "peer": "127.0.0.1:1"},
        {"count": 1, "reason": None, "reasons": {"a": 2}},
        {"%s": "%d", 'a"b': "\n\u2028\ud800"},
        {"timestamp": "2026", "name": "alice"},
    ],
    ids=str,
)
def test_log_line_of_raw_event_is_that_of_its_dict(form: str, fields: dict[str, Any]) -> None:
    """An event that was queued without its header fields has the same line."""
    chosen = {**FORMS, "journal": JOURNAL}[form]
    raw: RawEvent = (1_700_000_000_042_999_000, "info", "client.con%nected", fields)

    line = rendered(chosen, with_header(raw))

    assert render(chosen, raw) == line
    assert renderer(chosen)(raw) == renderer(chosen)(raw) == line


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("place", ["value", "list", "key", "nested"])
def test_log_line_with_hostile_text_is_one_printable_line(form: str, text: str, place: str) -> None:
    """Every character of the line is printable, wherever the text occurs; only the
    log's own colours are escapes.
    """
    value = {
        "value": text,
        "list": [text],
        "key": {text: 1},
        "nested": [{"to": (text, {"x": text})}],
    }[place]

    line = rendered(FORMS[form], entry(to=value, reason="none")).decode()

    assert line.endswith("\n")
    assert is_harmless(line[:-1], form == "colours")


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_log_json_is_read_back_unchanged(text: str) -> None:
    """A program reads back exactly what was logged."""
    assert json.loads(rendered(JSON, entry(to=text))) == {**entry(to=text)}


def test_log_json_of_other_values_is_as_json_writes_them() -> None:
    """Numbers, lists and mappings are JSON too, whatever the keys."""
    event = entry(
        **{"count": 3, "of": None, "seconds": 0.5, "is_late": True, 'a "key"': "ä", "%s": "%d"}
    )
    event = {**event, "reasons": {"full": 2}, "names": ["a", "b"]}
    assert rendered(JSON, event) == json.dumps(event).encode() + b"\n"


def test_log_console_with_colours_escapes_control_sequences() -> None:
    """A client's escape sequence is shown, not sent to the terminal."""
    line = rendered(console(colors=True), entry(to="\x1b[31mred")).decode()

    assert "\\x1b[31mred" in line


@pytest.mark.parametrize("form", ["console", "prefixed"])
def test_log_line_with_field_like_text_quotes_it(form: str) -> None:
    """A text that looks like more fields is put in quotes."""
    line = rendered(FORMS[form], entry(to='bob level=error event="daemon.killed"')).decode()

    assert re.search(r"""to=(["']).*daemon\.killed.*\1""", line)


def fields_of(data: bytes) -> dict[str, str]:
    """Return the fields of a journal entry, as journald reads them. No field may be in
    the form with a length.
    """
    lines = data.decode().split("\n")
    assert lines.pop() == ""
    fields = dict(line.split("=", 1) for line in lines)
    assert len(fields) == len(lines), "no field is there twice"
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]*", name) for name in fields)
    return fields


@pytest.mark.parametrize(
    ("level", "priority"), [("debug", "7"), ("info", "6"), ("warning", "4"), ("error", "3")]
)
def test_log_journal_entry_has_priority_message_and_fields(level: str, priority: str) -> None:
    """A level becomes a priority, the event a readable message, and each field one of
    the entry's.
    """
    event = {**entry(name="alice", to="bob", count=3, reason="no way"), "level": level}

    assert fields_of(rendered(JOURNAL, event)) == {
        "PRIORITY": priority,
        "SYSLOG_IDENTIFIER": "brokerd",
        "MESSAGE": 'message.refused name=alice to=bob count=3 reason="no way"',
        "BROKERD_EVENT": "message.refused",
        "BROKERD_NAME": "alice",
        "BROKERD_TO": "bob",
        "BROKERD_COUNT": "3",
        "BROKERD_REASON": "no way",
    }


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_log_journal_fields_can_not_be_forged(text: str) -> None:
    """The fields are the expected ones, printable and not too long, whatever a value
    contains.
    """
    fields = fields_of(rendered(JOURNAL, entry(to=text, more=[text])))

    assert set(fields) == {
        "PRIORITY",
        "SYSLOG_IDENTIFIER",
        "MESSAGE",
        "BROKERD_EVENT",
        "BROKERD_TO",
        "BROKERD_MORE",
    }
    assert all(value.isprintable() for value in fields.values())
    assert fields["PRIORITY"] == "4"


def test_log_journal_entry_fits_into_datagram() -> None:
    """However many long fields there are, an entry is not larger than a datagram, and
    keeps its message.
    """
    data = rendered(JOURNAL, entry(**{f"field{number}": "y" * 40_000 for number in range(20)}))

    assert len(data) <= 100_000
    assert fields_of(data)["MESSAGE"].startswith("message.refused field0=yyy")


@pytest.mark.parametrize(
    ("level", "priority"), [("debug", "7"), ("info", "6"), ("warning", "4"), ("error", "3")]
)
def test_log_prefix_is_priority(level: str, priority: str) -> None:
    """Where only text can be written, systemd reads the priority before the text."""
    line = rendered(PREFIXED, {**entry(name="alice"), "level": level})

    assert line == f"<{priority}>message.refused name=alice\n".encode()


@pytest.mark.parametrize("form", [*FORMS.values(), JOURNAL])
def test_log_value_without_json_form_is_shown_as_text(form: Format) -> None:
    """A field of a type that no format knows does not end the daemon."""
    assert b"Path" in rendered(form, entry(what=__import__("pathlib").PurePosixPath("x")))
