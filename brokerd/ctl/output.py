"""Output of `brokerctl`: JSON on request, tables on a terminal, plain lines in a pipe.

A payload comes from another client. On a terminal, its control characters are escaped:
otherwise it could move the cursor, change the title or do worse.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from brokerd_client.errors import UndecodablePayload
from brokerd_client.message import Message
from brokerd_client.wire.envelope import CodecId

__all__ = [
    "as_bytes",
    "console",
    "message_object",
    "note",
    "print_json",
    "print_message",
    "print_payload",
    "print_table",
    "print_values",
    "printable",
    "since",
]

#: Prints tables, and knows whether the output is a terminal.
console = Console(highlight=False)


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print one JSON document on one line, and flush it.

    Characters that control a terminal are written as JSON escapes.
    """
    text = json.dumps(value, ensure_ascii=False)
    if not text.isprintable():
        # These characters occur only in strings. json.dumps escapes only the control
        # characters of ASCII.
        text = "".join(
            character if character.isprintable() else json.dumps(character)[1:-1]
            for character in text
        )
    click.echo(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Print a note that is not a result, on standard error, and only on a terminal."""
    if sys.stderr.isatty():
        click.echo(text, err=True)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()
) -> None:
    """Print a table on a terminal, or tab-separated lines without a heading elsewhere.

    right: the right-aligned columns, which hold numbers.
    """
    if not console.is_terminal:
        for row in rows:
            click.echo("\t".join(row))
        return
    table = Table()
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    for row in rows:
        table.add_row(*(Text(field) for field in row))
    console.print(table)


def print_values(values: Mapping[str, str]) -> None:
    """Print names and values, as a table or as lines."""
    print_table(("", ""), values.items())


def printable(text: str) -> str:
    """Return the text with all terminal and editor controls escaped, also line ends."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def payload_text(message: Message) -> str | None:
    """Return the payload as text, or None if it is not text."""
    try:
        return message.text()
    except UndecodablePayload:
        return None


def message_object(message: Message) -> dict[str, Any]:
    """Return a message as `--json` shows it.

    ``payload`` is the JSON value, or the text. ``base64`` holds bytes that are neither.
    """
    shown: dict[str, Any] = {
        "kind": message.kind.name.lower(),
        "sender": message.sender,
        "id": message.id,
    }
    if message.seq:
        shown |= {"seq": message.seq, "attempt": message.attempt}
    if message.topic:
        shown["topic"] = message.topic
    if message.extension is not None:
        shown["extension"] = dict(message.extension)
    try:
        shown["payload"] = message.payload if message.codec == CodecId.JSON else message.text()
    except UndecodablePayload:
        shown["base64"] = base64.b64encode(message.body).decode()
    return shown


def print_message(message: Message, *, as_json: bool, raw: bool) -> None:
    """Print a received message: a JSON object, its bare bytes, or a line with its
    sender.
    """
    if as_json:
        print_json(message_object(message))
    elif raw:
        print_payload(message, raw=True)
    else:
        text = payload_text(message)
        shown = (
            printable(text)
            if text is not None
            else f"({len(message.body)} bytes that are not text)"
        )
        origin = f"{message.sender} {message.topic}" if message.topic else message.sender
        if console.is_terminal:
            console.print(
                Text.assemble((printable(origin), "bold cyan"), " ", shown), soft_wrap=True
            )
        else:
            click.echo(f"{printable(origin)}\t{shown}")
        sys.stdout.flush()


def print_payload(message: Message, *, raw: bool) -> None:
    """Print a payload as unchanged bytes, or as text with a line end.

    On a terminal, control characters are escaped.
    """
    text = None if raw else payload_text(message)
    if text is None and not raw and console.is_terminal:
        console.print(f"({len(message.body)} bytes that are not text; --raw writes them)")
    elif text is None:
        sys.stdout.flush()
        sys.stdout.buffer.write(message.body)
        sys.stdout.buffer.flush()
    else:
        click.echo("\n".join(map(printable, text.split("\n"))) if console.is_terminal else text)


def as_bytes(count: float) -> str:
    """Return a number of bytes in readable form."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def since(moment: float | None) -> str:
    """Return a Unix time as local time, or "" if it is not known."""
    return "" if moment is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
