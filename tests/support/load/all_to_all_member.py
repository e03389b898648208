"""A process with some of the clients of test_all_to_all.py, blocking and asyncio ones.

python all_to_all_member.py PLAN

PLAN is JSON: address, keys (name to key), recipients (all names), blocking and asyncio
(names of this process), count, seed. The process prints ``ready`` when all its clients
are connected, and begins at a line on its standard input. At the end it prints for
every client what it sent, with the outcomes, by (recipient, number), and what it
received, in order of arrival.
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


class MemberRecord:
    """The messages that one client sent and received."""

    def __init__(self, name: str, plan: dict[str, Any]) -> None:
        self.name = name
        random_ = random.Random(f"{plan['seed']} {name}")
        self.recipients = random_.choices(plan["recipients"], k=plan["count"])
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
    record: MemberRecord, plan: dict[str, Any], started: threading.Barrier, done: threading.Event
) -> None:
    with connect(plan["address"], record.name, plan["keys"][record.name]) as client:
        client.on_message(record.take)
        client.on_undelivered(record.fail)
        started.wait(SETTLED_S)
        started.wait(SETTLED_S)
        for recipient, body, number in record.messages():
            record.sent[client.send(recipient, body)] = (recipient, number)
        client.ping()
        done.wait(SETTLED_S)


async def in_loop(
    record: MemberRecord,
    plan: dict[str, Any],
    go: asyncio.Event,
    all_connected: asyncio.Event,
    done: asyncio.Event,
    missing: set[str],
) -> None:
    async with aio.connect(plan["address"], record.name, plan["keys"][record.name]) as client:
        client.on_message(record.take)
        client.on_undelivered(record.fail)
        missing.discard(record.name)
        if not missing:
            all_connected.set()
        await go.wait()
        for recipient, body, number in record.messages():
            record.sent[await client.send(recipient, body)] = (recipient, number)
        await client.ping()
        await done.wait()


async def main(plan: dict[str, Any]) -> None:
    threads = [MemberRecord(name, plan) for name in plan["blocking"]]
    tasks = [MemberRecord(name, plan) for name in plan["asyncio"]]
    barrier = threading.Barrier(len(threads) + 1)
    stopping, go, done, all_connected = (
        threading.Event(),
        asyncio.Event(),
        asyncio.Event(),
        asyncio.Event(),
    )
    missing = set(plan["asyncio"])
    running = [
        threading.Thread(target=in_thread, args=(record, plan, barrier, stopping))
        for record in threads
    ]
    for thread in running:
        thread.start()
    group = [
        asyncio.create_task(in_loop(record, plan, go, all_connected, done, missing))
        for record in tasks
    ]
    await asyncio.to_thread(barrier.wait, SETTLED_S)
    await asyncio.wait_for(all_connected.wait(), SETTLED_S)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    go.set()
    await asyncio.to_thread(barrier.wait, SETTLED_S)
    # The test says when all clients have sent and received everything; until then it asks
    # for the counts.
    while (await asyncio.to_thread(sys.stdin.readline)).strip() == "count":
        records = threads + tasks
        failed = sum(len(each.errors) for each in records)
        print(
            sum(len(each.sent) for each in records),
            sum(each.total for each in records),
            failed,
            flush=True,
        )
    stopping.set()
    done.set()
    await asyncio.gather(*group)
    for thread in running:
        await asyncio.to_thread(thread.join, SETTLED_S)
    print(json.dumps([record.report() for record in threads + tasks]), flush=True)


asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
