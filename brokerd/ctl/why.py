"""`brokerctl why`: the last refusals, drops and disconnects of a client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import click

from brokerd.ctl.command import DEFAULT_TIMEOUT_S, Access, connecting
from brokerd.ctl.names import complete_name
from brokerd.ctl.output import as_bytes, print_json, print_table, printable, since
from brokerd.ctl.seconds import Seconds

__all__ = ["COMMANDS"]

_COLUMNS: Final = ("last", "event", "from", "to", "code", "count", "ids", "reason", "rule", "where")


@click.command()
@click.argument("about", metavar="[NAME]", required=False, shell_complete=complete_name)
@click.option(
    "--from",
    "sender",
    metavar="SENDER",
    shell_complete=complete_name,
    help="Only messages from this client.",
)
@click.option("--id", "message_id", type=click.IntRange(min=0), help="Only messages with this id.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--timeout",
    type=Seconds(min=0),
    default=DEFAULT_TIMEOUT_S,
    show_default=True,
    help="Time limit in seconds.",
)
@connecting
@click.pass_obj
def why(
    access: Access,
    about: str | None,
    sender: str | None,
    message_id: int | None,
    as_json: bool,
    timeout: float,
) -> None:
    """Show why a client did not get a message, or could not send one.

    As in `why bob`, or `why bob --from alice`. It prints whether the client is online,
    and its last refusals, drops, disconnects and undelivered messages, the newest
    first. Each has its code, its reason, and the rule of the configuration that
    decided. Of a client with a mailbox, it prints what waits there, and the last dead
    letters. Only administrators may ask about other clients than their own.
    """
    wanted = {"name": about, "from": sender, "id": message_id}
    arguments = {key: value for key, value in wanted.items() if value is not None}
    with access.connect(timeout=timeout) as client:
        answer = client.control("why", timeout=timeout, **arguments)
    if as_json:
        print_json(answer)
        return
    for line in _state_lines(answer):
        click.echo(line)
    if answer["incidents"]:
        print_table(_COLUMNS, map(_cells, answer["incidents"]), right=("count",))
    else:
        click.echo("no refusals, drops or disconnects are known that match")


def _state_lines(answer: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line about the client, and one for each connection that does not flow."""
    state = "online" if answer["online"] else "offline"
    yield f"{answer['name']} is {state} since {since(answer['since'])}"
    for connection in answer["connections"]:
        address = connection["address"]
        if connection["slow"]:
            waiting = f"{as_bytes(connection['waiting_bytes'])} of {as_bytes(connection['queue'])}"
            holds = connection["holds"]
            yield f"{address} does not read: {waiting} wait, and {holds} senders are held"
        if connection["held_by"] is not None:
            yield f"{address} is held, because {connection['held_by']} does not read"
    if "mailbox" in answer:
        yield from _mailbox_lines(answer["mailbox"])


def _mailbox_lines(box: Mapping[str, Any]) -> Iterator[str]:
    """Yield what waits in a client's mailbox, and what its connections hold."""
    counts = ", ".join(f"{box[state]} {state}" for state in ("ready", "held", "delayed", "dead"))
    yield f"its mailbox has {counts}"
    if box["ready"] and not box["connections"]:
        yield "no connection has opened the mailbox"
    for each in box["connections"]:
        if each["held"]:
            seconds = f"{each['oldest']:.0f} s"
            full = ": its window is full" if each["held"] >= each["window"] else ""
            yield (
                f"{each['address']} holds {each['held']} of {each['window']}, the oldest for"
                f" {seconds}{full}"
            )


def _cells(incident: Mapping[str, Any]) -> tuple[str, ...]:
    ids = [str(each) for each in incident["ids"]]
    return (
        since(incident["last"]),
        incident["event"],
        printable(incident["sender"] or ""),
        printable(incident["recipient"] or ""),
        incident["code"] or "",
        str(incident["count"]),
        " ".join(ids[:3]) + (" ..." if len(ids) > 3 else ""),
        printable(incident["reason"]),
        printable(incident["rule"] or ""),
        printable(incident["where"] or ""),
    )


COMMANDS: Final = (why,)
