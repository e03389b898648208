"""A siege: every attack at once on a broker with small limits, beside two well-behaved
clients.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from support.broker_process import BrokerProcess
from support.keys import key_of
from support.raw_client import Raw, login
from support.siege.attackers import ATTACKS, MAX_MESSAGE, Siege

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
SMALL = {"queue": "256KiB", "channels": 20, "subscriptions": 200, "requests": 2000}


def clients() -> dict[str, dict[str, Any]]:
    ordinary = [f"mean{number}" for number in range(1, 10)] + [
        f"slow{number}" for number in range(8)
    ]
    ordinary += ["deaf", "silent", "comes-and-goes", "listener1", "listener2", "good", "friend"]
    entries: dict[str, dict[str, Any]] = {name: dict(SMALL) for name in ordinary}
    entries["dropper"] = {**SMALL, "when_full": "drop_oldest"}
    entries["crowd"] = {**SMALL, "connections": 3}
    return entries


def resident(pid: int) -> int:
    """Return the resident memory of a process, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def until_listening(broker: BrokerProcess) -> None:
    """Wait until the broker accepts connections."""
    broker.wait("daemon.started")


def besiege(broker: BrokerProcess, seconds: float) -> tuple[list[tuple[float, int]], list[float]]:
    """Attack for ``seconds``; return (seconds, bytes) samples of the broker's memory,
    and the time of each message of the well-behaved clients.
    """

    # Not the process's own login, which reads the whole log for the line that says
    # where it listens.
    def connect(name: str) -> Raw:
        return login(broker.address, key_of(name), name.encode())

    command = [sys.executable, BYSTANDER, str(broker.socket), str(seconds)]
    environ = {**os.environ, "PYTHONPATH": str(BYSTANDER.parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as bystander:
        assert bystander.stdout is not None
        assert bystander.stdout.readline() == "ready\n"
        siege = Siege(connect, lambda: Raw(broker.address), seconds)
        began = time.monotonic()
        siege.begin()
        samples = []
        while siege.on:
            samples.append((time.monotonic() - began, resident(broker.popen.pid)))
            time.sleep(0.05)
        siege.end()
        output = bystander.communicate(timeout=60)[0]
    assert bystander.returncode == 0, [
        line for line in broker.lines if '"good"' in line or '"friend"' in line
    ]
    took = json.loads(output)
    assert all(siege.rounds[name] for name in ATTACKS), siege.rounds
    return samples, sorted(took)
