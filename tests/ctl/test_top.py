"""top: rates from counters, the order of the rows, JSON lines, and the live screen on a
real terminal.
"""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from brokerd.ctl.status import Status
from brokerd.ctl.top import SORT_ORDERS, Rates, Row, _heading, columns_in

TIMEOUT_S = 30
Begin = Callable[[subprocess.Popen[bytes]], subprocess.Popen[bytes]]


def connection(address: str, *, since: float = 1.0, **counters: Any) -> dict[str, Any]:
    """Return a connection as the broker reports it."""
    return {
        "address": address,
        "peer": "unix",
        "since": since,
        "messages_in": 0,
        "bytes_in": 0,
        "messages_out": 0,
        "bytes_out": 0,
        "errors": 0,
        "waiting_bytes": 0,
        "queue": 100,
        "slow": False,
        "held": False,
        **counters,
    }


def row(address: str, *, waiting: int = 0, errors: int = 0, **rates: float) -> Row:
    """Return a row with some rates."""
    all_rates = dict.fromkeys(("messages_in", "bytes_in", "messages_out", "bytes_out"), 0.0) | rates
    return Row(
        address, "unix", waiting, 100, slow=False, held=False, errors=errors, rates=all_rates
    )


def test_ctl_top_rate_is_difference_per_second() -> None:
    """The difference of the counter is divided by the seconds between the answers."""
    rates = Rates()
    rates.rows([connection("bob", messages_in=100, bytes_out=1000)], now=10.0)

    (bob,) = rates.rows([connection("bob", messages_in=150, bytes_out=3000)], now=12.0)

    assert bob.rates == {
        "messages_in": 25.0,
        "bytes_in": 0.0,
        "messages_out": 0.0,
        "bytes_out": 1000.0,
    }


@pytest.mark.parametrize(("number", "noun"), [(0, "connections"), (1, "connection")])
def test_ctl_top_heading_counts_connections(number: int, noun: str) -> None:
    stats = {
        "version": "1",
        "online": number,
        "clients": 3,
        "connections": number,
        "waiting_bytes": 0,
        "draining": False,
    }
    assert f", {number} {noun}, 0 B waiting" in _heading(stats).plain


def test_ctl_top_new_connection_has_no_rate() -> None:
    """A connection that reconnected with its old address has none either: its counters
    begin again.
    """
    rates = Rates()
    (first,) = rates.rows([connection("bob", messages_in=100)], now=10.0)
    (reconnected,) = rates.rows([connection("bob", since=2.0, messages_in=5)], now=11.0)

    assert first.rates["messages_in"] == reconnected.rates["messages_in"] == 0.0


def test_ctl_top_state_of_slow_and_held_connection_is_slow() -> None:
    """Slow takes precedence over held: it is the cause."""
    states = [
        Rates().rows([connection("bob", slow=slow, held=held)], now=1.0)[0].state
        for slow, held in ((False, False), (False, True), (True, False), (True, True))
    ]

    slow = "slow: does not read"
    assert states == ["", "held by a full queue", slow, slow]


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({"slow": True, "holds": 3}, "slow: does not read, holds 3"),
        ({"held": True, "held_by": "bob"}, "held by bob"),
        ({"held": True, "held_by": "carol"}, "held: does not read answers"),
    ],
)
def test_ctl_top_state_names_cause(fields: dict[str, Any], state: str) -> None:
    """A slow client holds senders. Another client can hold a sender, or it holds itself."""
    (shown,) = Rates().rows([connection("carol", **fields)], now=1.0)

    assert shown.state == state
    assert shown.as_object()["holds"] == fields.get("holds", 0)


@pytest.mark.parametrize(
    ("order", "first"),
    [("waiting", "w"), ("in", "i"), ("out", "o"), ("bytes", "b"), ("errors", "e"), ("name", "a")],
)
def test_ctl_top_order_sorts_by_its_column(order: str, first: str) -> None:
    """The largest is first, except for names; equal rows are sorted by name."""
    rows = [
        row("w", waiting=5),
        row("i", messages_in=5),
        row("o", messages_out=5),
        row("b", bytes_in=3, bytes_out=4),
        row("e", errors=5),
        row("a"),
    ]

    ordered = [each.address for each in sorted(rows, key=SORT_ORDERS[order][1])]

    assert ordered[0] == first
    assert ordered[1:] == sorted(ordered[1:])


def test_ctl_top_orders_have_distinct_keys() -> None:
    """No two orders share a key, and none has the key that quits."""
    keys = [key for key, _ in SORT_ORDERS.values()]

    assert len({*keys, "q"}) == len(keys) + 1


def test_ctl_top_with_json_prints_object_per_interval(ctl: Any) -> None:
    """Each object lists every connection."""
    ctl.broker.add("ops", admin=True)
    ctl.broker.connect("bob")

    result = ctl("ops", "top", "--json", "--count", "2", "--interval", "0.1", "--sort", "name")

    assert result.exit_code == Status.DONE
    views = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(views) == 2
    assert [entry["address"] for entry in views[1]["connections"]] == ["bob", "ops"]
    assert views[1]["stats"]["connections"] == 2
    # The requests of top itself are messages of ops.
    assert views[1]["connections"][1]["messages_in_per_second"] > 0


def test_ctl_top_in_pipe_prints_once(ctl: Any) -> None:
    """Without a terminal there is nothing to keep up to date: it prints a header and
    one line per connection, and ends.
    """
    ctl.broker.add("ops", admin=True)

    result = ctl("ops", "top", "--interval", "0.1")

    assert result.exit_code == Status.DONE
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == [
        "address",
        "ops",
    ]
    assert result.stdout.splitlines()[0].endswith("\tstate")


class Terminal:
    """A pseudo-terminal for one process; keeps everything shown on it."""

    def __init__(self, command: list[str], begin: Begin, **environ: str) -> None:
        self._control, terminal = pty.openpty()
        environment = {
            **os.environ,
            "TERM": "xterm-256color",
            "COLUMNS": "140",
            "LINES": "30",
            **environ,
        }
        for name in ("NO_COLOR", "FORCE_COLOR", "CI"):
            environment.pop(name, None)
        self.process = begin(
            subprocess.Popen(
                command,
                stdin=terminal,
                stdout=terminal,
                stderr=terminal,
                env=environment,
                start_new_session=True,
            )
        )
        os.close(terminal)
        self.shown = self.everything = b""

    def wait_for(self, text: bytes) -> None:
        """Wait until the text has been shown since the last call; forget everything before
        it.
        """
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self.shown:
            assert select.select([self._control], [], [], max(0.0, deadline - time.monotonic()))[
                0
            ], self.shown
            self.shown += self._read()
        self.shown = self.shown.partition(text)[2]

    def _read(self) -> bytes:
        data = os.read(self._control, 65536)
        self.everything += data
        return data

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._control, keys)

    def end(self) -> int:
        """Wait for the end of the process; return its exit status."""
        try:
            while self._read():
                pass
        except OSError:
            # Linux reports the closed other side as an error.
            pass
        os.close(self._control)
        return self.process.wait(TIMEOUT_S)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_ctl_top_on_terminal_is_live(ctl: Any, begin: Begin) -> None:
    """It shows the connections, a key changes the order, and q ends it."""
    ctl.broker.add("ops", admin=True)
    ctl.broker.connect("bob")
    command = [
        sys.executable,
        "-c",
        "from brokerd.ctl import main; main()",
        *ctl.access("ops"),
        "top",
    ]
    terminal = Terminal(command, begin)

    terminal.wait_for(b"2 of 2 clients online")
    terminal.wait_for(b"bob")
    terminal.wait_for(b"sorted by waiting")
    terminal.type(b"n")
    terminal.wait_for(b"sorted by name")
    terminal.type(b"q")

    assert terminal.end() == Status.DONE


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_ctl_top_on_dumb_terminal_scrolls(ctl: Any, begin: Begin) -> None:
    """With TERM=dumb each view is printed below the one before, without escapes, as
    often as --count says.
    """
    ctl.broker.add("ops", admin=True)
    ctl.broker.connect("bob")
    command = [
        sys.executable,
        "-c",
        "from brokerd.ctl import main; main()",
        *ctl.access("ops"),
        "top",
    ]
    terminal = Terminal(
        [*command, "--interval", "0.1", "--count", "3", "--sort", "name"], begin, TERM="dumb"
    )
    for _ in range(3):
        terminal.wait_for(b"2 of 2 clients online")
        terminal.wait_for(b"bob")
        terminal.wait_for(b"ops")
    assert terminal.end() == Status.DONE
    assert b"\x1b" not in terminal.everything


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_ctl_top_on_narrow_terminal_omits_columns(ctl: Any, begin: Begin) -> None:
    """At 40 columns some are omitted. Those shown are not cut, and the key that quits
    is still shown.
    """
    ctl.broker.add("ops", admin=True)
    command = [
        sys.executable,
        "-c",
        "from brokerd.ctl import main; main()",
        *ctl.access("ops"),
        "top",
    ]
    terminal = Terminal(command, begin, COLUMNS="40")
    terminal.wait_for(b"brokerd ")
    terminal.wait_for(b"address")
    terminal.wait_for(b"in/s")
    terminal.wait_for(b"waiting")
    terminal.wait_for(b"0 B")
    terminal.wait_for(b"sorted by waiting.  q quit")
    terminal.type(b"q")
    assert terminal.end() == Status.DONE


#: The widths of columns with large numbers.
NEEDED = {
    "address": 25,
    "from": 21,
    "in/s": 7,
    "out/s": 7,
    "bytes in/s": 10,
    "bytes out/s": 11,
    "waiting": 10,
    "of": 9,
    "mailbox": 14,
    "errors": 6,
    "state": 4,
}


@pytest.mark.parametrize("order", SORT_ORDERS)
@pytest.mark.parametrize("width", [300, 140, 100, 80, 60, 40, 30, 12, 1])
def test_ctl_top_columns_without_room_are_omitted(width: int, order: str) -> None:
    """The column that is sorted by stays longest, then the state. Enough of an address
    is shown to recognize it.
    """
    columns = columns_in(width, NEEDED, order)
    assert columns[0] == "address"
    assert [each for each in NEEDED if each in columns] == columns
    others = sum(NEEDED[each] + 2 for each in columns[1:])
    assert len(columns) == 1 or others + 12 <= width
    if width >= 40:
        # Rates in bytes are the widest, and there are two of them.
        assert "state" in columns or (width, order) == (40, "bytes")
        sorted_by = {"in": "in/s", "out": "out/s", "bytes": "bytes out/s", "name": "address"}.get(
            order, order
        )
        assert sorted_by in columns
    if width == 300:
        assert columns == list(NEEDED)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_ctl_listen_on_terminal_escapes_control_characters(ctl: Any, begin: Begin) -> None:
    """The control characters of a message are shown as escapes: a sender can't move the
    cursor or set the title.
    """
    alice = ctl.broker.connect("alice")
    command = [sys.executable, "-c", "from brokerd.ctl import main; main()", *ctl.access("bob")]
    terminal = Terminal([*command, "listen", "--count", "1"], begin)
    terminal.wait_for(b"listening as bob")

    alice.send("bob", "\x1b]0;pwned\x07\x9b2J")

    terminal.wait_for(rb"\x1b]0;pwned\x07\x9b2J")
    assert terminal.end() == Status.DONE
