"""Measure what a cluster costs on one host: ``python -m benchmarks.cluster_local``.

A broker with ``cluster:`` is compared with one without. A second broker without shows the
noise: it differs from the first in nothing. Each round starts all of them again, in
another order. It measures them in this order and in the opposite one, several times. The
least time of each counts, so that other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import os
import selectors
import socket
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Final

from benchmarks.channels import REQUEST, Broker, read_frame, send
from benchmarks.cluster import (
    PAYLOAD,
    PINGS,
    answer_one,
    answering,
    median_round_trip,
    one_way,
    running_host,
    running_nats,
)

__all__ = ["main"]

#: The brokers, with their hosts in a cluster, or "".
_BROKERS: Final = {"with": "a", "without": "", "another without": ""}
_BASE: Final = "without"
#: Messages per turn, and turns of each broker in a round, in both orders.
_MESSAGES: Final = 500_000
_TURNS: Final = 6
_KINDS: Final = ("16 B", "a request", "a request to a pool")


class Ends:
    """Connections to one broker.

    Attributes:
        responders: Of a client, and of two members of a pool.
    """

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.alice, self.bob = broker.dial("alice"), broker.dial("bob")
        self.responders = [broker.dial(name) for name in ("carol", "pool", "pool")]

    def measure(self, kind: str) -> tuple[float, float]:
        """Return the seconds for a message or a request, and the broker's processor time."""
        process, before = self.broker.process, self.broker.process.cpu_s()
        if kind == "16 B":
            took, count = 1 / one_way(self.alice, self.bob, _MESSAGES), _MESSAGES
        else:
            name = "pool" if "pool" in kind else "carol"
            took, count = median_round_trip(lambda: self._ask(name)), PINGS
        return took, (process.cpu_s() - before) / count

    def _ask(self, name: str) -> None:
        send(self.alice, REQUEST, name, PAYLOAD)
        read_frame(self.alice)


def answer_all(socks: Sequence[socket.socket], is_there: Event) -> None:
    """Answer every request to some connections."""
    selector = selectors.DefaultSelector()
    for sock in socks:
        selector.register(sock, selectors.EVENT_READ)
    is_there.set()
    while True:
        for key, _ in selector.select():
            answer_one(key.fileobj)


def measure_round(number: int, directory: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """Start the brokers and measure each; return the least figures by kind and broker."""
    names = list(_BROKERS)
    names = names[number % 3 :] + names[: number % 3]
    if number % 2:
        names.reverse()
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    with ExitStack() as stack:
        port = stack.enter_context(running_nats(directory))
        ends = {}
        for name in names:
            folder = directory / name.replace(" ", "-")
            folder.mkdir()
            ends[name] = Ends(stack.enter_context(running_host(folder, _BROKERS[name], port)))
            stack.enter_context(answering(answer_all, ends[name].responders))
        for kind in _KINDS:
            for name in (*names, *reversed(names)) * _TURNS:
                found[kind, name].append(ends[name].measure(kind))
    return {
        key: (min(took for took, _ in pairs), min(cpu for _, cpu in pairs))
        for key, pairs in found.items()
    }


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster_local", description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    os.environ.pop("BROKERD_PURE", None)
    rounds = []
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory(prefix="bd-") as name:
            rounds.append(measure_round(number, Path(name)))
    for kind in _KINDS:
        for name in _BROKERS:
            if name != _BASE:
                print(f"{kind}: {name} to {_BASE} cluster:", flush=True)
                for what, place in (("time", 0), ("processor time of the broker", 1)):
                    ratios = [each[kind, name][place] / each[kind, _BASE][place] for each in rounds]
                    print(
                        f"  {what} {statistics.median(ratios):.3f} x"
                        f" ({min(ratios):.3f} to {max(ratios):.3f})"
                    )


if __name__ == "__main__":
    main()
