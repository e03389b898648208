"""`brokerctl top`: every connection, live: its rates, what waits for it, and who is slow. Asks the broker, no more.

The broker counts; rates are differences between two answers, divided by the time between them.
"""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import click
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from brokerd.ctl.command import Access, connecting
from brokerd.ctl.output import as_bytes, console, print_json, print_table
from brokerd.ctl.status import ended_by_ctrl_c

__all__ = ["COMMANDS", "ORDERS", "Rates", "Row"]

_COUNTERS: Final = ("messages_in", "bytes_in", "messages_out", "bytes_out")


@dataclass(frozen=True, slots=True)
class Row:
    """One connection at one moment. rates: per second, by the name of the counter."""

    address: str
    peer: str
    waiting_bytes: int
    queue: int
    slow: bool
    held: bool
    errors: int
    rates: Mapping[str, float]

    @property
    def state(self) -> str:
        """What is the matter with it, if anything."""
        return "slow" if self.slow else "held" if self.held else ""

    def as_object(self) -> dict[str, Any]:
        """Return the row as `--json` shows it."""
        return {
            "address": self.address,
            "peer": self.peer,
            "waiting_bytes": self.waiting_bytes,
            "queue": self.queue,
            "slow": self.slow,
            "held": self.held,
            "errors": self.errors,
            **{f"{counter}_per_second": round(rate, 3) for counter, rate in self.rates.items()},
        }


#: What the rows can be sorted by: the key to press, and what comes first.
ORDERS: Final[dict[str, tuple[str, Callable[[Row], Any]]]] = {
    "waiting": ("w", lambda row: (-row.waiting_bytes, row.address)),
    "in": ("i", lambda row: (-row.rates["messages_in"], row.address)),
    "out": ("o", lambda row: (-row.rates["messages_out"], row.address)),
    "bytes": ("b", lambda row: (-row.rates["bytes_in"] - row.rates["bytes_out"], row.address)),
    "errors": ("e", lambda row: (-row.errors, row.address)),
    "name": ("n", lambda row: row.address),
}


@dataclass(slots=True)
class Rates:
    """Turns counters into rates. Knows only the last answer; a connection it has not seen before has no rate."""

    _seen: dict[tuple[str, Any], tuple[float, Mapping[str, Any]]] = field(default_factory=dict)

    def rows(self, connections: Sequence[Mapping[str, Any]], now: float) -> list[Row]:
        """Return a row for each connection in an answer that came at ``now``, in seconds of any clock."""
        rows = []
        seen = {}
        for connection in connections:
            # A connection that came back under the same address counts from 0 again.
            identity = (connection["address"], connection["since"])
            seen[identity] = (now, connection)
            then, before = self._seen.get(identity, (now, connection))
            elapsed = now - then
            rates = {
                counter: (connection[counter] - before[counter]) / elapsed if elapsed > 0 else 0.0
                for counter in _COUNTERS
            }
            rows.append(
                Row(
                    connection["address"],
                    connection["peer"],
                    connection["waiting_bytes"],
                    connection["queue"],
                    connection["slow"],
                    connection["held"],
                    connection["errors"],
                    rates,
                )
            )
        self._seen = seen
        return rows


@click.command()
@click.option("--sort", "order", type=click.Choice(list(ORDERS)), default="waiting", show_default=True)
@click.option("--interval", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Seconds.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many looks.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a look, one a line.")
@connecting
@click.pass_obj
def top(access: Access, order: str, interval: float, count: int | None, as_json: bool) -> None:
    """Watch every connection: its rates, the bytes that wait for it, and who is slow.

    slow: it reads less than is sent to it. held: it is not read from, because it sends to one that is slow.
    On a terminal, a key changes the order: w waiting, i in, o out, b bytes, e errors, n name; q ends it.
    """
    rates = Rates()
    with ended_by_ctrl_c(count is None), access.connect() as client:
        looks = _looks(client, rates, interval)
        if as_json or not console.is_terminal:
            # The first look has nothing to compare with.
            next(looks)
            time.sleep(interval)
            for number, (stats, rows) in enumerate(looks, start=1):
                rows.sort(key=ORDERS[order][1])
                if as_json:
                    print_json({"stats": stats, "connections": [row.as_object() for row in rows]})
                else:
                    print_table(_COLUMNS, map(_cells, rows))
                if number == (count or 1) and (count or not as_json):
                    return
                time.sleep(interval)
        _live(looks, order, interval, count)


def _looks(client: Any, rates: Rates, interval: float) -> Iterator[tuple[dict[str, Any], list[Row]]]:
    while True:
        stats = client.control("stats")
        connections = client.control("connections")["connections"]
        yield stats, rates.rows(connections, time.monotonic())


def _live(looks: Iterator[tuple[dict[str, Any], list[Row]]], order: str, interval: float, count: int | None) -> None:
    keys = {key: name for name, (key, _) in ORDERS.items()}
    with _single_keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        for number, (stats, rows) in enumerate(looks, start=1):
            until = time.monotonic() + interval
            while True:
                live.update(_screen(stats, sorted(rows, key=ORDERS[order][1]), order), refresh=True)
                key = pressed(max(0.0, until - time.monotonic()))
                if key == "q":
                    return
                if key is None:
                    break
                order = keys.get(key, order)
            if number == count:
                return


@contextmanager
def _single_keys() -> Iterator[Callable[[float], str | None]]:
    """Let keys be read without Enter; gives a function that waits some seconds for one."""
    try:
        import termios
        import tty

        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
        tty.setcbreak(descriptor)
    except (ImportError, OSError, ValueError):
        # No terminal to read from, or none of this kind: only Ctrl-C ends it.
        yield lambda seconds: time.sleep(seconds)
        return

    def pressed(seconds: float) -> str | None:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        return sys.stdin.read(1) if ready else None

    try:
        yield pressed
    finally:
        with suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


_COLUMNS: Final = ("address", "from", "in/s", "out/s", "bytes in/s", "bytes out/s", "waiting", "of", "errors", "")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.address,
        row.peer,
        f"{row.rates['messages_in']:.0f}",
        f"{row.rates['messages_out']:.0f}",
        as_bytes(row.rates["bytes_in"]),
        as_bytes(row.rates["bytes_out"]),
        as_bytes(row.waiting_bytes),
        as_bytes(row.queue),
        str(row.errors),
        row.state,
    )


def _screen(stats: Mapping[str, Any], rows: Sequence[Row], order: str) -> Group:
    table = Table(expand=True)
    for number, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if 1 < number < len(_COLUMNS) - 1 else "left", no_wrap=True)
    for row in rows[: max(1, console.height - 7)]:
        style = "bold red" if row.slow else "yellow" if row.held else ""
        table.add_row(*(Text(cell) for cell in _cells(row)), style=style)
    heading = Text(
        f"brokerd {stats['version']}, {stats['online']} of {stats['clients']} clients online, "
        f"{stats['connections']} connections, {as_bytes(stats['waiting_bytes'])} waiting"
        + (", draining" if stats["draining"] else ""),
        style="bold",
    )
    keys = "  ".join(f"{key} {name}" for name, (key, _) in ORDERS.items())
    return Group(heading, table, Text(f"sorted by {order}.  {keys}  q quit", style="dim"))


COMMANDS: Final = (top,)
