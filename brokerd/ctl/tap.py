"""`brokerctl tap`: live copies of what passes through the broker."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import click

import brokerd_client
from brokerd.ctl.command import DEFAULT_TIMEOUT_S, Access, connecting
from brokerd.ctl.names import complete_name
from brokerd.ctl.output import note, print_json, printable
from brokerd.ctl.status import ended_by_ctrl_c

__all__ = ["COMMANDS"]

#: Events of the broker about itself, the copies among them.
_TOPICS: Final = "$broker.*"
_COPIES: Final = "$broker.tap"
_UPGRADED: Final = "$broker.upgraded"


@click.command()
@click.argument("pattern", shell_complete=complete_name)
@click.option(
    "--payload", is_flag=True, help="Show payloads of clients with tap: payload, the first KiB."
)
@click.option("--count", type=click.IntRange(min=1), help="Exit after this number of copies.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line.")
@connecting
@click.pass_obj
def tap(access: Access, pattern: str, payload: bool, count: int | None, as_json: bool) -> None:
    """Watch live what passes: copies of messages from, to or on what PATTERN matches.

    PATTERN is a client's name or a shell-style pattern of names, such as 'worker-*'; or
    a topic pattern, such as 'jobs.>'. '*' matches every client, and so every message.

    Each line has the time, sender, recipient or topic, kind, payload size, and outcome:
    accepted, or the code of the error. The kind outcome stands for a message that was
    accepted before: it has failed since, or it is in a mailbox. There it is stored,
    delivered to a connection, acknowledged, failed, returned, expired or dead. Watching
    never slows the traffic: copies that come too fast are dropped, and counted. Only
    administrators may watch, and the audit has a line about it.
    """
    left = count
    with ended_by_ctrl_c(count is None), access.connect() as client:
        missed = (0, 0)
        for batch in _batches(client, pattern, payload):
            for copy in batch["copies"][:left]:
                _print_copy(copy, as_json)
            if left is not None:
                left -= len(batch["copies"])
                if left <= 0:
                    return
            if (batch["dropped"], batch["unseen"]) != missed:
                missed = batch["dropped"], batch["unseen"]
                _print_missed(*missed, as_json=as_json)
            sys.stdout.flush()


def _batches(
    client: brokerd_client.Client, pattern: str, payload: bool
) -> Iterator[Mapping[str, Any]]:
    """Yield the copies as the broker sends them."""

    def ask() -> None:
        client.control("tap", timeout=DEFAULT_TIMEOUT_S, pattern=pattern, payload=payload)

    with client.subscribe(_TOPICS) as feed:
        ask()
        note(f"watching {pattern}; Ctrl-C ends it")
        for event in feed:
            if event.topic == _COPIES:
                yield event.payload
            elif event.topic == _UPGRADED:
                # The new process does not know of the tap.
                ask()


def _print_copy(copy: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(copy)
        return
    parts = [
        time.strftime("%H:%M:%S"),
        copy["sender"],
        copy["topic"] or copy["recipient"] or "",
        copy["kind"],
        str(copy["size"]),
        copy["outcome"] + (f" as {copy['seq']}" if copy["outcome"] == "stored" else ""),
    ]
    shown = copy.get("payload", copy.get("base64", copy.get("reason")))
    click.echo("\t".join(map(printable, [*parts, shown] if shown is not None else parts)))


def _print_missed(dropped: int, unseen: int, *, as_json: bool) -> None:
    """Tell how many copies were lost so far, on standard error unless for scripts."""
    if as_json:
        print_json({"dropped": dropped, "unseen": unseen})
    else:
        click.echo(
            f"brokerctl: so far {dropped} copies were dropped, and {unseen} messages passed"
            " too fast to be looked at",
            err=True,
        )


COMMANDS: Final = (tap,)
