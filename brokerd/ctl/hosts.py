"""`brokerctl hosts`: the hosts of the cluster, as the broker that is asked sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import click

from brokerd.ctl.command import DEFAULT_TIMEOUT_S, Access, connecting
from brokerd.ctl.output import as_bytes, note, print_json, print_table, printable, since
from brokerd.ctl.seconds import Seconds

__all__ = ["COMMANDS"]

_HEAD: Final = (
    "host",
    "state",
    "since",
    "names",
    "round trip",
    "in flight",
    "in doubt",
    "refused",
    "version",
    "clients",
    "last error",
)


@click.command()
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
def hosts(access: Access, as_json: bool, timeout: float) -> None:
    """List the other hosts of the cluster, and how this host reaches them.

    The column `clients` is a digest of the host's section `clients`; it says `differ`
    where that is not the section of this host.
    """
    with access.connect(timeout=timeout) as client:
        answer = client.control("hosts", timeout=timeout)
    if as_json:
        print_json(answer)
        return
    for line in _about_here(answer):
        note(printable(line))
    rows = [_row(each, answer.get("digest", "")) for each in answer["hosts"]]
    print_table(_HEAD, rows, right=_HEAD[3:8])


def _about_here(answer: Mapping[str, Any]) -> Iterator[str]:
    if answer["host"] is None:
        yield "this broker is in no cluster (cluster: in its configuration)"
        return
    yield f"this is host {answer['host']}, clients {answer['digest']}"
    if answer["conflict"]:
        yield f"not joined: {answer['conflict']}"
    elif not answer["nats"]["connected"]:
        yield "NATS is away: no other host can be reached"


def _row(host: Mapping[str, Any], digest: str) -> tuple[str, ...]:
    round_trip = host["round_trip_ms"]
    return (
        host["name"],
        host["state"],
        since(host["since"]),
        str(host["names"]),
        "" if round_trip is None else f"{round_trip:g} ms",
        as_bytes(host["in_flight"]),
        str(host["in_doubt"]),
        str(host["refused"]),
        printable(host["version"]),
        host["digest"] if host["digest"] == digest else f"{printable(host['digest'])} differ",
        printable(host["last_error"] or ""),
    )


COMMANDS: Final = (hosts,)
