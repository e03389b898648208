"""How long until a name that moved is found: ``python -m benchmarks.cluster_move``.

Three brokers and one nats-server run on this machine. A client leaves one host and
connects to another; a client at the third host sends to it until a message is accepted.
The figures are in docs/cluster.md.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import brokerd_client
from benchmarks.cluster import running_host, running_nats

_MOVES: Final = 200


def main() -> None:
    """Print the figures."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bd-")))
        nats_port = stack.enter_context(running_nats(folder))
        addresses = [
            str(stack.enter_context(running_host(folder, host, nats_port)).address)
            for host in "abc"
        ]
        alice = stack.enter_context(brokerd_client.connect(addresses[0], "alice", "alice" * 8))
        times = []
        for number in range(_MOVES + 2):
            with brokerd_client.connect(addresses[1 + number % 2], "bob", "bob" * 8) as bob:
                began = time.perf_counter()
                while not _is_accepted(alice):
                    pass
                times.append(time.perf_counter() - began)
                assert bob.recv(timeout=10).payload == "x"
        # The first two wait for the hosts to meet.
        times = sorted(times[2:])
        print(
            f"{_MOVES} moves: found after {statistics.median(times) * 1000:.1f} ms (median),"
            f" {times[len(times) * 99 // 100] * 1000:.1f} ms (99th percentile)"
        )


def _is_accepted(alice: brokerd_client.Client) -> bool:
    try:
        alice.send_confirmed("bob", "x", timeout=10)
    except brokerd_client.Offline:
        return False
    return True


if __name__ == "__main__":
    main()
