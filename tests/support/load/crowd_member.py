"""A process with some of the crowd's clients, blocking and asyncio ones; run by
test_everyone.py.

    python crowd_member.py PLAN

PLAN is JSON: address, keys (name to key), everyone (all names), blocking and asyncio
(names of ours), count, seed. It prints ``ready`` when all are connected, begins at a
line on its standard input, and prints for every client what it sent and what became of
it, by (recipient, number), and what it received, in order of arrival.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

from brokerd_client import aio, connect

SETTLED_S = 120.0


class MemberLedger:
    """What one client did and saw."""

    def __init__(self, name: str, plan: dict[str, Any]) -> None:
        self.name = name
        random_ = random.Random(f"{plan['seed']} {name}")
        self.recipients = random_.choices(plan["everyone"], k=plan["count"])
        self.sent: dict[int, tuple[str, int]] = {}
        self.errors: dict[int, str] = {}
        self.received: dict[str, list[int]] = defaultdict(list)
        self.total = 0

    def messages(self) -> list[tuple[str, bytes, int]]:
        numbers: dict[str, int] = defaultdict(int)
        messages = []
        for recipient in self.recipients:
            number = numbers[recipient]
            numbers[recipient] += 1
            messages.append((recipient, b"%d" % number, number))
        return messages

    def take(self, message: Any) -> None:
        self.received[message.sender].append(int(message.body))
        self.total += 1

    def fail(self, error: Any) -> None:
        assert error.message_id not in self.errors, "one outcome for one message"
        self.errors[error.message_id] = type(error).__name__

    def report(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sent": [[message_id, *sent] for message_id, sent in self.sent.items()],
            "errors": self.errors,
            "received": self.received,
        }


def in_thread(
    ledger: MemberLedger, plan: dict[str, Any], started: threading.Barrier, done: threading.Event
) -> None:
    with connect(plan["address"], ledger.name, plan["keys"][ledger.name]) as client:
        client.on_message(ledger.take)
        client.on_undelivered(ledger.fail)
        started.wait(SETTLED_S)
        started.wait(SETTLED_S)
        for recipient, body, number in ledger.messages():
            ledger.sent[client.send(recipient, body)] = (recipient, number)
        client.ping()
        done.wait(SETTLED_S)


async def in_loop(
    ledger: MemberLedger,
    plan: dict[str, Any],
    go: asyncio.Event,
    up: asyncio.Event,
    done: asyncio.Event,
    missing: set[str],
) -> None:
    async with aio.connect(plan["address"], ledger.name, plan["keys"][ledger.name]) as client:
        client.on_message(ledger.take)
        client.on_undelivered(ledger.fail)
        missing.discard(ledger.name)
        if not missing:
            up.set()
        await go.wait()
        for recipient, body, number in ledger.messages():
            ledger.sent[await client.send(recipient, body)] = (recipient, number)
        await client.ping()
        await done.wait()


async def main(plan: dict[str, Any]) -> None:
    threads = [MemberLedger(name, plan) for name in plan["blocking"]]
    tasks = [MemberLedger(name, plan) for name in plan["asyncio"]]
    barrier = threading.Barrier(len(threads) + 1)
    over, go, done, up = threading.Event(), asyncio.Event(), asyncio.Event(), asyncio.Event()
    missing = set(plan["asyncio"])
    running = [
        threading.Thread(target=in_thread, args=(ledger, plan, barrier, over)) for ledger in threads
    ]
    for thread in running:
        thread.start()
    group = [asyncio.create_task(in_loop(ledger, plan, go, up, done, missing)) for ledger in tasks]
    await asyncio.to_thread(barrier.wait, SETTLED_S)
    await asyncio.wait_for(up.wait(), SETTLED_S)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    go.set()
    await asyncio.to_thread(barrier.wait, SETTLED_S)
    # The test says when everybody has sent and received everything; until then it asks
    # how far we are.
    while (await asyncio.to_thread(sys.stdin.readline)).strip() == "count":
        ledgers = threads + tasks
        failed = sum(len(each.errors) for each in ledgers)
        print(
            sum(len(each.sent) for each in ledgers),
            sum(each.total for each in ledgers),
            failed,
            flush=True,
        )
    over.set()
    done.set()
    await asyncio.gather(*group)
    for thread in running:
        await asyncio.to_thread(thread.join, SETTLED_S)
    print(json.dumps([ledger.report() for ledger in threads + tasks]), flush=True)


asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
