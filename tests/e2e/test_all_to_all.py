"""All clients write to all clients: each message arrives once and in order, or its
sender has an error for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from support.broker_process import BrokerProcess
from support.keys import key_of

MEMBER = Path(__file__).resolve().parents[1] / "support" / "load" / "all_to_all_member.py"
SETTLED_S = 90.0


def all_to_all(
    directory: Path, clients: int, count: int, processes: int, address: str = "unix"
) -> dict[str, Any]:
    """Let ``clients`` clients send ``count`` messages each; check the account, and
    return it.
    """
    names = [f"c{number}" for number in range(clients)]
    # One is never there, and one is not configured.
    recipients = [*names, "absent", "unknown"]
    with BrokerProcess(directory, [*names, "absent"], listen=["127.0.0.1:0"]) as broker:
        unix, tcp = broker.addresses()
        members = []
        for number in range(processes):
            names_of_member = names[number::processes]
            plan = {
                "address": str(unix if number % 2 else tcp),
                "keys": {name: key_of(name).decode() for name in names_of_member},
                "recipients": recipients,
                "blocking": names_of_member[::2],
                "asyncio": names_of_member[1::2],
                "count": count,
                "seed": 1,
            }
            path = directory / f"plan{number}.json"
            path.write_text(json.dumps(plan))
            members.append(
                subprocess.Popen(
                    [sys.executable, str(MEMBER), str(path)],
                    stdin=-1,
                    stdout=-1,
                    text=True,
                    bufsize=1,
                )
            )
        try:
            for member in members:
                assert ask_member(member, "") == "ready"
            began = monotonic()
            for member in members:
                tell_member(member, "go")
            total = clients * count
            while True:
                counted = [
                    tuple(map(int, ask_member(member, "count").split())) for member in members
                ]
                sent, received, failed = (sum(column) for column in zip(*counted, strict=True))
                if sent == total and received + failed >= total:
                    break
                assert monotonic() - began < SETTLED_S, (
                    total,
                    sent,
                    received,
                    failed,
                    broker.lines[-3:],
                )
                # Counting takes the members' time.
                threading.Event().wait(0.1)
            seconds = monotonic() - began
            reports = [
                report for member in members for report in json.loads(ask_member(member, "done"))
            ]
        finally:
            for member in members:
                if member.poll() is None and sys.exc_info()[0] is not None:
                    member.kill()
                member.wait(30)
                for stream in (member.stdin, member.stdout):
                    assert stream is not None
                    stream.close()
        broker.signal()
        assert broker.exit_status() == 0
        routed = broker.events("daemon.stopped")[0]["messages"]
    arrived: Counter[tuple[str, str, int]] = Counter()
    for report in reports:
        for sender, numbers in report["received"].items():
            assert numbers == sorted(set(numbers)), (
                f"{sender} to {report['name']}: out of order or twice"
            )
            arrived.update((sender, report["name"], number) for number in numbers)
    errors: Counter[str] = Counter()
    for report in reports:
        assert len(report["sent"]) == count
        for message_id, recipient, number in report["sent"]:
            error = report["errors"].get(str(message_id))
            delivered = arrived[(report["name"], recipient, number)]
            assert (delivered == 1) != (error is not None), (
                report["name"],
                recipient,
                number,
                delivered,
                error,
            )
            assert (error is not None) == (recipient in ("absent", "unknown")), (recipient, error)
            if error is not None:
                errors[error] += 1
    assert arrived.total() + errors.total() == total
    assert routed >= total
    return {
        "sent": total,
        "arrived": arrived.total(),
        "errors": dict(errors),
        "seconds": round(seconds, 2),
    }


def ask_member(member: subprocess.Popen[str], line: str) -> str:
    """Send the member a line, if there is one, and return its next line."""
    if line:
        tell_member(member, line)
    assert member.stdout is not None
    return member.stdout.readline().strip()


def tell_member(member: subprocess.Popen[str], line: str) -> None:
    assert member.stdin is not None
    member.stdin.write(line + "\n")
    member.stdin.flush()


def test_messages_of_20_clients_are_all_accounted_for(socket_dir: Path) -> None:
    """20 clients in two processes, 200 messages each, over TCP and a Unix socket."""
    print(all_to_all(socket_dir, clients=20, count=200, processes=2))


@pytest.mark.slow
def test_messages_of_200_clients_are_all_accounted_for(socket_dir: Path) -> None:
    """200 clients in four processes, 1,000 messages each. BROKERD_TEST_CROWD sets
    another number of messages for each.
    """
    count = int(os.environ.get("BROKERD_TEST_CROWD", "1000"))
    print(all_to_all(socket_dir, clients=200, count=count, processes=4))
