"""All attacks at once: the broker's memory stays under the bound of its configuration,
and others are served.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from e2e.process import Process, key_of
from hostile.attackers import ATTACKS, MAX_MESSAGE, Siege
from net.raw import Raw, login

from brokerd.config.load import load
from brokerd.config.memory_bound import memory_bound

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is read from /proc"
)

BYSTANDER = Path(__file__).with_name("bystander.py")
LIMITS = {
    "max_message": MAX_MESSAGE,
    "connections": 40,
    "handshakes": 32,
    "handshake_timeout": "1s",
    "wait_timeout": "500ms",
}
#: What becomes of connections, and nothing of the thousands of messages.
LOG = {"level": "info", "areas": {"message": "error"}}
SMALL = {"queue": "256KiB", "subscriptions": 200, "requests": 2000}


def clients() -> dict[str, dict[str, Any]]:
    ordinary = [f"mean{number}" for number in range(1, 8)] + [
        f"slow{number}" for number in range(8)
    ]
    ordinary += ["deaf", "silent", "comes-and-goes", "listener1", "listener2", "good", "friend"]
    entries: dict[str, dict[str, Any]] = {name: dict(SMALL) for name in ordinary}
    entries["dropper"] = {**SMALL, "when_full": "drop_oldest"}
    entries["crowd"] = {**SMALL, "connections": 3}
    return entries


def resident(pid: int) -> int:
    """Return how much memory a process holds, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def until_listening(broker: Process) -> None:
    """Wait until it takes connections."""
    broker.wait("daemon.started")


def besiege(broker: Process, seconds: float) -> tuple[list[tuple[float, int]], list[float]]:
    """Attack for so long; return (seconds, bytes) samples of its memory, and how long
    each good message took.
    """

    # Not the process's own login, which reads the whole log for the line that says
    # where it listens.
    def enter(name: str) -> Raw:
        return login(broker.address, key_of(name), name.encode())

    command = [sys.executable, BYSTANDER, str(broker.socket), str(seconds)]
    environ = {**os.environ, "PYTHONPATH": str(BYSTANDER.parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as bystander:
        assert bystander.stdout is not None
        assert bystander.stdout.readline() == "ready\n"
        siege = Siege(enter, lambda: Raw(broker.address), seconds)
        began = time.monotonic()
        siege.begin()
        samples = []
        while siege.on:
            samples.append((time.monotonic() - began, resident(broker.popen.pid)))
            time.sleep(0.05)
        siege.end()
        told = bystander.communicate(timeout=60)[0]
    assert bystander.returncode == 0, [
        line for line in broker.lines if '"good"' in line or '"friend"' in line
    ]
    took = json.loads(told)
    assert all(siege.rounds[name] for name in ATTACKS), siege.rounds
    return samples, sorted(took)


@pytest.mark.parametrize(
    "seconds", [pytest.param(4, id="short"), pytest.param(60, id="long", marks=pytest.mark.slow)]
)
def test_memory_stays_under_the_bound(socket_dir: Path, seconds: int) -> None:
    """Under every attack at once the broker holds less than its configuration allows,
    and a good pair goes on.
    """
    seconds = int(os.environ.get("BROKERD_SIEGE_S", seconds))
    with Process(socket_dir, clients(), limits=LIMITS, log=LOG) as broker:
        until_listening(broker)
        bound = memory_bound(load(broker.config)).total

        samples, took = besiege(broker, seconds)

        most = max(size for _, size in samples)
        took.sort()
        print(
            f"\n{seconds} s: at most {most / 2**20:.0f} MiB, bound {bound / 2**20:.0f} MiB;"
            f" {len(took)} good messages,"
        )
        print(f"median {took[len(took) // 2] * 1e3:.2f} ms, longest {took[-1] * 1e3:.0f} ms")
        assert most < bound
        assert len(took) > 20 * seconds
        broker.signal()
        assert broker.exit_status() == 0
