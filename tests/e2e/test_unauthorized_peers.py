"""A client with the right key connects and sends among hundreds of unauthorized peers,
as if they were not there.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import pytest
from support.broker_process import BrokerProcess
from support.keys import key_of
from support.raw_client import MESSAGE, Rejected, login

PEERS = Path(__file__).resolve().parents[1] / "support" / "unauthorized_peers.py"
TRIES = 15
#: Tries that may fail while peers reconnect: a busy machine may not let the client
#: answer in time.
MAX_REFUSED = TRIES // 3


@contextmanager
def unauthorized_peers(broker: BrokerProcess, each: int, reconnect: bool) -> Iterator[None]:
    """Run ``each`` peers of each kind."""
    with subprocess.Popen(
        [sys.executable, str(PEERS), str(broker.socket), str(each), str(int(reconnect))],
        stdin=-1,
        stdout=-1,
        text=True,
    ) as peers:
        assert peers.stdin is not None
        assert peers.stdout is not None
        try:
            assert peers.stdout.readline() == "ready\n"
            yield
            peers.stdin.close()
            print("connections of unauthorized peers:", peers.stdout.readline().strip())
        finally:
            peers.kill()


def measure(broker: BrokerProcess, name: bytes) -> dict[str, float]:
    """Return medians in milliseconds, to connect and for a message to oneself and back,
    and the number of refusals.
    """
    connects, round_trips = [], []
    refused = 0
    while len(connects) < TRIES:
        began = perf_counter()
        try:
            alice = login(broker.address, key_of("alice"), name)
        except (Rejected, EOFError, ConnectionError):
            refused += 1
            assert refused < TRIES
            continue
        with alice:
            connects.append(perf_counter() - began)
            for number in range(10):
                began = perf_counter()
                alice.send(MESSAGE, "alice", b"x", message_id=number)
                assert alice.recv().id == number
                round_trips.append(perf_counter() - began)
    return {
        "connect_ms": round(statistics.median(connects) * 1000, 2),
        "connect_max_ms": round(max(connects) * 1000, 2),
        "round_trip_ms": round(statistics.median(round_trips) * 1000, 3),
        "refused": refused,
    }


@pytest.mark.parametrize(
    ("each", "reconnect"),
    [
        pytest.param(500, False, id="1500, once"),
        pytest.param(100, True, id="300, again and again"),
        pytest.param(500, True, id="1500, again and again", marks=pytest.mark.slow),
    ],
)
def test_handshake_among_unauthorized_peers_succeeds(
    socket_dir: Path, each: int, reconnect: bool
) -> None:
    """Silent peers, as many that send random bytes and as many with a wrong key keep no
    client out, even if they reconnect all the time.
    """
    names = ["alice", *(f"c{number}" for number in range(1000))]
    with BrokerProcess(socket_dir, names) as broker:
        broker.wait("daemon.started")
        print()
        for name in (b"alice", b""):
            how = "by name" if name else "by key"
            print("idle broker,", how, measure(broker, name))
            with unauthorized_peers(broker, each, reconnect):
                figures = measure(broker, name)
                print(f"among {3 * each} unauthorized peers,", how, figures)
                assert figures["refused"] <= (MAX_REFUSED if reconnect else 0)
