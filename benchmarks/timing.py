"""Whether the time of a refusal tells if a name exists: ``python -m
benchmarks.timing``.

A peer without a key tries a known and an unknown name, in random order. The time is
that of the broker's check: from sending the peer's answer to receiving #FAILURE#. Every
try comes from another address of 127.0.0.0/8, each of which has a few. So the broker's
penalties for repeated failures have no effect.

The two samples are compared by rank (Mann and Whitney's U): 0.5 means that neither sample
is faster: half of all pairs of refusals go each way.
"""

from __future__ import annotations

import argparse
import math
import random
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.systems import SYSTEMS, Setup
from brokerd_client.wire.handshake import FAILURE

__all__ = ["compare", "main"]

KNOWN, UNKNOWN = "c00000", "nobody"
#: Clients configured: their number must not matter either.
CLIENTS = 100
#: Tries from one address: the broker delays a peer that has failed ten times within a
#: minute.
TRIES = 5


def compare(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Return (how often a value of ``first`` is the smaller one, z, two-sided p) by
    Mann and Whitney's U.

    Ties share their rank; z is the normal approximation with the correction for ties,
    good from some 20 values on.
    """
    n, m = len(first), len(second)
    ordered = sorted([(value, 0) for value in first] + [(value, 1) for value in second])
    ranks = ties = 0.0
    start = 0
    while start < len(ordered):
        stop = start
        while stop < len(ordered) and ordered[stop][0] == ordered[start][0]:
            stop += 1
        tied = stop - start
        ranks += (start + stop + 1) / 2 * sum(1 for _, which in ordered[start:stop] if which == 0)
        ties += tied**3 - tied
        start = stop
    u = ranks - n * (n + 1) / 2
    total = n + m
    deviation = math.sqrt(n * m / 12 * (total + 1 - ties / (total * (total - 1))))
    z = (u - n * m / 2) / deviation if deviation else 0.0
    return 1 - u / (n * m), z, math.erfc(abs(z) / math.sqrt(2))


def _refusal_ns(port: int, source: str, name: str) -> int:
    """Return how long the broker took to refuse a wrong key under that name, in
    nanoseconds.
    """
    with socket.socket(socket.AF_INET) as sock:
        sock.settimeout(20)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind((source, 0))
        sock.connect(("127.0.0.1", port))
        _read_frame(sock)
        answer = b"{sha256}" + random.randbytes(32) + name.encode()
        packet = struct.pack("!i", len(answer)) + answer
        began = time.perf_counter_ns()
        sock.sendall(packet)
        refusal = _read_frame(sock)
        took = time.perf_counter_ns() - began
    if refusal != FAILURE:
        raise RuntimeError(f"a wrong key heard {refusal!r}")
    return took


def _read_frame(sock: socket.socket) -> bytes:
    size = struct.unpack("!i", _read(sock, 4))[0]
    return _read(sock, size)


def _read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError("the broker closed in the middle of a frame")
        data += piece
    return data


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status is 0 whatever the outcome, which people judge."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.timing", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--tries", type=int, default=10_000, help="for each of the two (default 10000)"
    )
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else random.randrange(2**32)
    order = random.Random(seed)
    names = [KNOWN, UNKNOWN] * options.tries
    order.shuffle(names)
    times: dict[str, list[float]] = {KNOWN: [], UNKNOWN: []}
    with tempfile.TemporaryDirectory(prefix="bd-") as directory:
        clients = [f"c{number:05}" for number in range(CLIENTS)]
        running = SYSTEMS["brokerd"].started(Setup(clients, Path(directory) / "b"))
        try:
            for number, name in enumerate(names):
                address = number // TRIES + 2
                source = f"127.{address >> 16 & 255}.{address >> 8 & 255}.{address & 255}"
                times[name].append(_refusal_ns(running.port, source, name) / 1000)
        finally:
            running.process.stop()
    share, z, p = compare(times[KNOWN], times[UNKNOWN])
    print(f"seed {seed}, {options.tries} tries each, {CLIENTS} clients configured; microseconds")
    for label, name in (("known name, wrong key", KNOWN), ("unknown name", UNKNOWN)):
        low, median, high = statistics.quantiles(times[name], n=4)
        print(f"{label:22} median {median:8.1f}   quartiles {low:.1f} to {high:.1f}")
    print(
        f"known is the faster one in {share:.4f} of all pairs; Mann-Whitney z = {z:+.2f}, p ="
        f" {p:.3f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
