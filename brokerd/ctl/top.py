"""`brokerctl top`: a live table of all connections, with rates, queues and slow
consumers.

The broker is only asked for its counters. A rate is the difference between two answers,
divided by the time between them.
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
from brokerd.ctl.seconds import DAY_S, Seconds
from brokerd.ctl.status import ended_by_ctrl_c

__all__ = ["COMMANDS", "SORT_ORDERS", "Rates", "Row", "columns_in"]

_COUNTERS: Final = ("messages_in", "bytes_in", "messages_out", "bytes_out")


@dataclass(frozen=True, slots=True)
class Row:
    """One connection at one time. rates: per second, by the name of the counter."""

    address: str
    peer: str
    waiting_bytes: int
    queue: int
    slow: bool
    held: bool
    errors: int
    rates: Mapping[str, float]
    holds: int = 0
    held_by: str = ""
    mailbox_held: int = 0
    mailbox_window: int = 0

    @property
    def state(self) -> str:
        """The problem of the connection and its cause, if it has one."""
        if self.slow:
            return "slow: does not read" + (f", holds {self.holds}" if self.holds else "")
        if self.held and self.held_by == self.address:
            return "held: does not read answers"
        return f"held by {self.held_by or 'a full queue'}" if self.held else ""

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
            "holds": self.holds,
            "held_by": self.held_by or None,
            "mailbox_held": self.mailbox_held,
            "mailbox_window": self.mailbox_window,
            **{f"{counter}_per_second": round(rate, 3) for counter, rate in self.rates.items()},
        }


#: The sort orders of the rows: the key to press, and the sort key.
SORT_ORDERS: Final[dict[str, tuple[str, Callable[[Row], Any]]]] = {
    "waiting": ("w", lambda row: (-row.waiting_bytes, row.address)),
    "in": ("i", lambda row: (-row.rates["messages_in"], row.address)),
    "out": ("o", lambda row: (-row.rates["messages_out"], row.address)),
    "bytes": ("b", lambda row: (-row.rates["bytes_in"] - row.rates["bytes_out"], row.address)),
    "errors": ("e", lambda row: (-row.errors, row.address)),
    "name": ("n", lambda row: row.address),
}


@dataclass(slots=True)
class Rates:
    """Computes rates from counters and the previous answer; a new connection has no
    rate.
    """

    _seen: dict[tuple[str, Any], tuple[float, Mapping[str, Any]]] = field(default_factory=dict)

    def rows(self, connections: Sequence[Mapping[str, Any]], now: float) -> list[Row]:
        """Return a row for each connection in an answer.

        now: the time of the answer, in seconds of any clock.
        """
        rows = []
        seen = {}
        for connection in connections:
            # A client that reconnects under the same address is counted from 0 again.
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
                    # An older broker does not tell these.
                    connection.get("holds", 0),
                    connection.get("held_by") or "",
                    # Only of a connection that has opened its mailbox.
                    connection.get("mailbox_held", 0),
                    connection.get("mailbox_window", 0),
                )
            )
        self._seen = seen
        return rows


@click.command()
@click.option(
    "--sort", "order", type=click.Choice(list(SORT_ORDERS)), default="waiting", show_default=True
)
@click.option(
    "--interval", type=Seconds(min=0.1, max=DAY_S), default=1.0, show_default=True, help="Seconds."
)
@click.option("--count", type=click.IntRange(min=1), help="Exit after this number of updates.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object per update, one per line."
)
@connecting
@click.pass_obj
def top(access: Access, order: str, interval: float, count: int | None, as_json: bool) -> None:
    """Watch every connection: its rates, the bytes that wait for it, and its state.

    The state slow means that the client reads less than is sent to it, and holds that
    many senders. The state held means that the client is not read from, because it sends
    to the slow client named.

    The column mailbox has the stored messages that a connection holds, and its window.

    On a terminal, a key changes the order: w waiting, i in, o out, b bytes, e errors,
    n name; q quits.
    """
    rates = Rates()
    with ended_by_ctrl_c(count is None), access.connect() as client:
        looks = _looks(client, rates, interval)
        if as_json or not console.is_terminal:
            # The first answer has no previous one to compare with.
            next(looks)
            if not as_json:
                click.echo("\t".join(_COLUMNS))
            time.sleep(interval)
            for number, (stats, rows) in enumerate(looks, start=1):
                rows.sort(key=SORT_ORDERS[order][1])
                if as_json:
                    print_json({"stats": stats, "connections": [row.as_object() for row in rows]})
                else:
                    print_table(_COLUMNS, map(_cells, rows))
                if number == (count or 1) and (count or not as_json):
                    return
                time.sleep(interval)
        elif console.is_dumb_terminal:
            _scroll(looks, order, interval, count)
        else:
            _live(looks, order, interval, count)


def _looks(
    client: Any, rates: Rates, interval: float
) -> Iterator[tuple[dict[str, Any], list[Row]]]:
    while True:
        stats = client.control("stats")
        connections = client.control("connections")["connections"]
        yield stats, rates.rows(connections, time.monotonic())


def _scroll(
    looks: Iterator[tuple[dict[str, Any], list[Row]]],
    order: str,
    interval: float,
    count: int | None,
) -> None:
    """Print each table below the last one, with all rows.

    This is for a terminal that can't move its cursor, but can be scrolled.
    """
    for number, (stats, rows) in enumerate(looks, start=1):
        shown = _table(sorted(rows, key=SORT_ORDERS[order][1]), order, console.width)
        console.print(_heading(stats), shown, "", sep="\n", soft_wrap=True)
        if number == count:
            return
        time.sleep(interval)


def _live(
    looks: Iterator[tuple[dict[str, Any], list[Row]]],
    order: str,
    interval: float,
    count: int | None,
) -> None:
    keys = {key: name for name, (key, _) in SORT_ORDERS.items()}
    with _single_keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        for number, (stats, rows) in enumerate(looks, start=1):
            until = time.monotonic() + interval
            while True:
                live.update(
                    _screen(stats, sorted(rows, key=SORT_ORDERS[order][1]), order), refresh=True
                )
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
    """Read keys without Enter; yield a function that waits some seconds for a key."""
    try:
        import termios
        import tty

        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
        tty.setcbreak(descriptor)
    except (ImportError, OSError, ValueError):
        # Keys can't be read from this input: only Ctrl-C ends the command.
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


_COLUMNS: Final = (
    "address",
    "from",
    "in/s",
    "out/s",
    "bytes in/s",
    "bytes out/s",
    "waiting",
    "of",
    "mailbox",
    "errors",
    "state",
)


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
        f"{row.mailbox_held} of {row.mailbox_window}" if row.mailbox_window else "",
        str(row.errors),
        row.state,
    )


#: The order in which columns are omitted if the screen is too narrow. The column by
#: which the rows are sorted is omitted last.
_LEAST: Final = (
    "of",
    "from",
    "bytes in/s",
    "bytes out/s",
    "errors",
    "out/s",
    "in/s",
    "mailbox",
    "state",
    "waiting",
)
_SORTED_BY: Final = {
    "waiting": {"waiting"},
    "in": {"in/s"},
    "out": {"out/s"},
    "bytes": {"bytes in/s", "bytes out/s"},
    "errors": {"errors"},
}
#: The gap between two columns, in characters, and the width of the address column below
#: which another column is omitted.
_GAP: Final = 2
_ADDRESS: Final = 12


def columns_in(width: int, needed: Mapping[str, int], order: str) -> list[str]:
    """Return the columns that fit side by side; only the address may be shortened.

    Args:
        width: That of the screen, in characters.
        needed: The width of each column.
        order: The sort order of the rows.
    """
    columns = list(needed)
    kept = _SORTED_BY.get(order, set())
    for least in (
        *(column for column in _LEAST if column not in kept),
        *(column for column in _LEAST if column in kept),
    ):
        total = sum(needed[column] for column in columns[1:]) + min(needed[columns[0]], _ADDRESS)
        if total + _GAP * (len(columns) - 1) <= width:
            break
        columns.remove(least)
    return columns


def _table(rows: Sequence[Row], order: str, width: int) -> Table:
    cells = [dict(zip(_COLUMNS, _cells(row), strict=True)) for row in rows]
    needed = {
        column: max([len(column), *(len(texts[column]) for texts in cells)]) for column in _COLUMNS
    }
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    columns = columns_in(width, needed, order)
    # The address gets the width that the other columns leave.
    needed["address"] = min(
        needed["address"], width - sum(needed[column] + _GAP for column in columns[1:])
    )
    for column in columns:
        kind: Any = "left" if column in ("address", "from", "state") else "right"
        table.add_column(column, justify=kind, no_wrap=True, width=needed[column])
    for row, texts in zip(rows, cells, strict=True):
        style = "bold red" if row.slow else "yellow" if row.held else ""
        table.add_row(*(Text(texts[column]) for column in columns), style=style)
    return table


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _heading(stats: Mapping[str, Any]) -> Text:
    waiting = stats.get("requests_waiting")
    return Text(
        f"brokerd {stats['version']}, {stats['online']} of {stats['clients']} clients online, "
        f"{_counted(stats['connections'], 'connection')}, "
        f"{as_bytes(stats['waiting_bytes'])} waiting"
        + (f", {_counted(waiting, 'request')} waiting" if waiting else "")
        + _in_mailboxes(stats.get("mailboxes") or {})
        + (", draining" if stats["draining"] else ""),
        style="bold",
        no_wrap=True,
        overflow="ellipsis",
    )


def _in_mailboxes(counts: Mapping[str, int]) -> str:
    """Return how many messages are in all mailboxes, by state."""
    words = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f", mailboxes: {words}" if words else ""


def _screen(stats: Mapping[str, Any], rows: Sequence[Row], order: str) -> Group:
    keys = "  ".join(f"{key} {name}" for name, (key, _) in SORT_ORDERS.items())
    footer = Text(
        f"sorted by {order}.  q quit  {keys}", style="dim", no_wrap=True, overflow="ellipsis"
    )
    # The lines above and below the rows take the rest of the screen.
    shown = rows[: max(1, console.height - 3)]
    return Group(_heading(stats), _table(shown, order, console.width), footer)


COMMANDS: Final = (top,)
