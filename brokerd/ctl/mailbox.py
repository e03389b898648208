"""`brokerctl mailbox`: list mailboxes, look at their messages, kick, drop, purge, copy."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, Final

import click

import brokerd_client
from brokerd.ctl.command import DEFAULT_TIMEOUT_S, Access, connecting
from brokerd.ctl.names import complete_name
from brokerd.ctl.output import as_bytes, print_json, print_table, printable
from brokerd.ctl.seconds import Seconds
from brokerd.ctl.status import Failure, Status

__all__ = ["COMMANDS"]

_STATES: Final = ("ready", "held", "delayed", "dead")
_LIST: Final = ("name", "ready", "held", "delayed", "dead", "size", "oldest", "consumers")
_SHOW: Final = ("seq", "sender", "attempts", "size", "reason", "payload")
#: Characters of a payload in the table.
_SHOWN: Final = 60
#: Messages per answer of an export.
_PAGE: Final = 100
#: Bytes of messages per operation of an import, unless one message has more.
_IMPORTED: Final = 96 * 1024

_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_timeout = click.option(
    "--timeout",
    type=Seconds(min=0),
    default=DEFAULT_TIMEOUT_S,
    show_default=True,
    help="Time limit in seconds.",
)
_box = click.argument("box", metavar="NAME", shell_complete=complete_name)


@click.group()
@connecting
def mailbox() -> None:
    """List mailboxes, and look after the messages in them.

    A client may do so with its own mailbox, and an administrator with every mailbox.
    """


@mailbox.command("list")
@_as_json
@connecting
@click.pass_obj
def list_mailboxes(access: Access, as_json: bool) -> None:
    """List mailboxes, the messages in them, and what their connections hold."""
    with access.connect() as client:
        mailboxes = client.control("mailboxes")["mailboxes"]
    if as_json:
        print_json(mailboxes)
    else:
        print_table(_LIST, map(_entry, mailboxes), right=_LIST[1:-1])


def _entry(box: Mapping[str, Any]) -> tuple[str, ...]:
    consumers = [
        f"{each['address']} holds {each['held']} of {each['window']}"
        + ("" if each["oldest"] is None else f", the oldest for {_age(each['oldest'])}")
        for each in box["connections"]
    ]
    return (
        box["name"] + (" (orphaned)" if box["orphaned"] else ""),
        *(str(box[count]) for count in ("ready", "held", "delayed", "dead")),
        as_bytes(box["bytes"]),
        "" if box["oldest"] is None else _age(box["oldest"]),
        "; ".join(consumers),
    )


def _age(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


@mailbox.command()
@_box
@click.option("--state", type=click.Choice(_STATES), default="ready", show_default=True)
@click.option("--after", type=click.IntRange(min=0), default=0, help="Only later messages: a seq.")
@click.option("--limit", type=click.IntRange(1, _PAGE), default=20, show_default=True)
@click.option("--full", is_flag=True, help="Show payloads as a whole, not only 4 KiB of each.")
@_as_json
@_timeout
@connecting
@click.pass_obj
def show(
    access: Access,
    box: str,
    state: str,
    after: int,
    limit: int,
    full: bool,
    as_json: bool,
    timeout: float,
) -> None:
    """Show messages without receiving them.

    Payloads of another client's mailbox are shown to administrators with `admin: payload`.
    """
    with access.connect(timeout=timeout) as client:
        messages = client.control(
            "mailbox_show",
            timeout=timeout,
            name=box,
            state=state,
            after=after,
            limit=limit,
            full=full,
        )["messages"]
    if as_json:
        print_json(messages)
    else:
        print_table(_SHOW, map(_message, messages), right=("seq", "attempts", "size"))


def _message(message: Mapping[str, Any]) -> tuple[str, ...]:
    payload = printable(message.get("payload", ""))
    return (
        str(message["seq"]),
        printable(message["sender"]),
        str(message["attempts"]),
        as_bytes(message.get("size", 0)),
        printable(message["reason"]),
        payload if len(payload) <= _SHOWN else payload[:_SHOWN] + "...",
    )


@mailbox.command()
@_box
@click.argument("seq", type=click.IntRange(min=1), required=False)
@click.option("--all", "everything", is_flag=True, help="Every dead letter.")
@_as_json
@_timeout
@connecting
@click.pass_obj
def kick(
    access: Access, box: str, seq: int | None, everything: bool, as_json: bool, timeout: float
) -> None:
    """Deliver a dead letter again, as a new message at the end of the mailbox."""
    if (seq is None) != everything:
        raise Failure(Status.USAGE, "give the seq of a dead letter, or --all")
    which: dict[str, Any] = {"all": True} if everything else {"seq": seq}
    with access.connect(timeout=timeout) as client:
        answer = client.control("mailbox_kick", timeout=timeout, name=box, **which)
    if as_json:
        print_json(answer)
        return
    click.echo(f"kicked {answer['kicked']}")
    if answer.get("damaged"):
        click.echo(f"damaged, and so not kicked: {answer['damaged']}", err=True)


@mailbox.command()
@_box
@click.argument("seq", type=click.IntRange(min=1))
@_as_json
@_timeout
@connecting
@click.pass_obj
def drop(access: Access, box: str, seq: int, as_json: bool, timeout: float) -> None:
    """Delete one message, whatever its state is."""
    with access.connect(timeout=timeout) as client:
        answer = client.control("mailbox_drop", timeout=timeout, name=box, seq=seq)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"dropped {seq}")


@mailbox.command()
@_box
@click.option("--state", type=click.Choice(_STATES), help="Only messages of this state.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_as_json
@_timeout
@connecting
@click.pass_obj
def purge(
    access: Access, box: str, state: str | None, yes: bool, as_json: bool, timeout: float
) -> None:
    """Delete all messages, or those of one state; held ones only with --state held.

    It also removes a mailbox that is not configured any more.
    """
    if not yes:
        what = "all messages" if state is None else f"all {state} messages"
        click.confirm(f"Delete {what} in the mailbox of {box}?", abort=True, err=True)
    which = {} if state is None else {"state": state}
    with access.connect(timeout=timeout) as client:
        answer = client.control("mailbox_purge", timeout=timeout, name=box, **which)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"purged {answer['purged']}")


@mailbox.command("export")
@_box
@_timeout
@connecting
@click.pass_obj
def export(access: Access, box: str, timeout: float) -> None:
    """Print every message as a line of JSON, with its sender, state, key, attempts and
    whole payload, in order.
    """
    with access.connect(timeout=timeout) as client:
        for message in _pages(client, box, timeout):
            if "payload" not in message:
                raise Failure(
                    Status.REFUSED,
                    "the broker shows payloads of others' mailboxes only with admin: payload",
                )
            print_json({"mailbox": box, **message})


def _pages(client: brokerd_client.Client, box: str, timeout: float) -> Iterator[dict[str, Any]]:
    after = 0
    while True:
        messages = client.control(
            "mailbox_show",
            timeout=timeout,
            name=box,
            state="all",
            after=after,
            limit=_PAGE,
            full=True,
        )["messages"]
        yield from messages
        if not messages:
            return
        after = messages[-1]["seq"]


@mailbox.command("import")
@_box
@click.argument("file", type=click.File("r", encoding="utf-8"), default="-")
@_as_json
@_timeout
@connecting
@click.pass_obj
def import_(access: Access, box: str, file: IO[str], as_json: bool, timeout: float) -> None:
    """Store the messages of an export, which is read from FILE or standard input.

    They keep their senders, states, keys and attempts, and get new seqs. An import can be
    repeated within the time for which the broker remembers keys. Messages whose ttl is
    over are left out, and so are damaged ones. Only administrators may import.
    """
    stored = known = expired = damaged = 0
    with access.connect(timeout=timeout) as client:
        for messages in _groups(_lines(file)):
            whole = [message for message in messages if "codec" in message]
            damaged += len(messages) - len(whole)
            if whole:
                answer = client.control("mailbox_import", timeout=timeout, name=box, messages=whole)
                stored += answer["imported"]
                known += answer["known"]
                expired += answer["expired"]
    if as_json:
        print_json({"imported": stored, "known": known, "expired": expired, "damaged": damaged})
        return
    click.echo(f"stored {stored}")
    sys.stdout.flush()
    for count, why in (
        (known, "their keys are known: they have been stored within store.dedup"),
        (expired, "their ttl is over"),
        (damaged, "they are damaged"),
    ):
        if count:
            click.echo(f"left out {count}: {why}", err=True)


def _lines(file: IO[str]) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each message of an export, with its bytes."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            message = json.loads(line)
            message["mark"] = _mark(message)
            if len(line) > _IMPORTED and message.get("encoding") == "text":
                # As JSON, a text of control characters is six times as long.
                text: str = message["payload"]
                message["payload"] = base64.b64encode(text.encode()).decode()
                message["encoding"] = "base64"
        except (ValueError, KeyError, TypeError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise Failure(
                Status.USAGE, f"line {number} is not a message of an export: {why}"
            ) from error
        yield message, len(line)


def _mark(message: Mapping[str, Any]) -> str:
    """Return what tells a message from all others, for one without a key."""
    origin = [message[field] for field in ("mailbox", "seq", "stored_at")]
    return hashlib.sha256(json.dumps(origin).encode()).hexdigest()


def _groups(messages: Iterable[tuple[dict[str, Any], int]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages in groups, one for each operation."""
    group: list[dict[str, Any]] = []
    total = 0
    for message, size in messages:
        if group and (len(group) >= _PAGE or total + size > _IMPORTED):
            yield group
            group, total = [], 0
        group.append(message)
        total += size
    if group:
        yield group


COMMANDS: Final = (mailbox,)
