"""`brokerctl bench`: measures throughput from this client to itself, and round trip
times.

The whole path is measured. This process encodes, sends, receives and decodes, and is
usually slower than the broker.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Final

import click
from rich.console import Console
from rich.progress import Progress

import brokerd_client
from brokerd.ctl.command import Access, connecting
from brokerd.ctl.output import as_bytes, print_json, print_values
from brokerd.ctl.seconds import Seconds
from brokerd.ctl.status import Failure, Status
from brokerd_client.errors import BrokerdError, TimedOut

__all__ = ["COMMANDS", "Result"]


@dataclass(frozen=True, slots=True)
class Result:
    """The measurements. Times are in seconds, rates per second."""

    messages: int
    size: int
    seconds: float
    messages_per_second: float
    bytes_per_second: float
    round_trip_median: float
    round_trip_p99: float


@click.command()
@click.option(
    "--messages",
    type=click.IntRange(min=1),
    default=50_000,
    show_default=True,
    help="Number of messages.",
)
@click.option(
    "--size", type=click.IntRange(min=0), default=16, show_default=True, help="Bytes per message."
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Messages per system call.",
)
@click.option(
    "--pings",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Number of round trips.",
)
@click.option(
    "--timeout",
    type=Seconds(min=0),
    default=60.0,
    show_default=True,
    help="Time limit in seconds.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connecting
@click.pass_obj
def bench(
    access: Access, messages: int, size: int, batch: int, pings: int, timeout: float, as_json: bool
) -> None:
    """Measure the path through the broker: messages from this client to itself, and
    round trips to the broker.

    The command fails if a message does not arrive.
    """
    with (
        access.connect() as client,
        Progress(
            console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
        ) as progress,
    ):
        round_trips = sorted(
            client.ping() for _ in progress.track(range(pings), description="round trips")
        )
        task = progress.add_task("messages", total=messages)
        seconds = _to_itself(
            client,
            messages,
            size,
            batch,
            timeout,
            lambda done: progress.update(task, completed=done),
        )
    result = Result(
        messages,
        size,
        seconds,
        messages / seconds,
        messages * size / seconds,
        statistics.median(round_trips),
        round_trips[min(len(round_trips) - 1, len(round_trips) * 99 // 100)],
    )
    if as_json:
        print_json(asdict(result))
        return
    print_values(
        {
            "messages": f"{messages:,} of {as_bytes(size)} in {seconds:.2f} s",
            "rate": (
                f"{result.messages_per_second:,.0f} messages/s,"
                f" {as_bytes(result.bytes_per_second)}/s"
            ),
            "round trip": f"median {result.round_trip_median * 1e6:.0f} us",
            "99 % within": f"{result.round_trip_p99 * 1e6:.0f} us",
        }
    )


def _to_itself(
    client: brokerd_client.Client,
    messages: int,
    size: int,
    batch: int,
    timeout: float,
    done: Callable[[int], object],
) -> float:
    """Return the seconds from the first send to the last arrival."""
    body = bytes(size)
    failures: list[BrokerdError] = []

    def send() -> None:
        try:
            for start in range(0, messages, batch):
                client.send_many(
                    [(client.address, body)] * min(batch, messages - start), codec="raw"
                )
        except BrokerdError as error:
            failures.append(error)

    client.on_undelivered(failures.append)
    sender = threading.Thread(target=send, name="bench-sender", daemon=True)
    started = time.perf_counter()
    sender.start()
    for arrived in range(messages):
        while True:
            left = started + timeout - time.perf_counter()
            if failures:
                raise failures[0]
            try:
                # Wait in short steps: a failure of the sender would be seen too late.
                client.recv(timeout=max(0.0, min(0.5, left)))
                break
            except TimedOut as error:
                if left <= 0:
                    message = f"timed out: {arrived} of {messages} messages arrived in {timeout} s"
                    raise Failure(Status.TIMED_OUT, message) from error
        if arrived % batch == 0:
            done(arrived)
    seconds = time.perf_counter() - started
    sender.join(timeout)
    return seconds


COMMANDS: Final = (bench,)
