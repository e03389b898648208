"""Load for a broker that drains and starts again, and the account of every plain send."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import Counter
from typing import Protocol

from brokerd_client import Client
from brokerd_client.aio import Client as AsyncClient
from brokerd_client.errors import BrokerdError

TIMEOUT_S = 30.0
BURST = 20
#: Bursts that are sent before each stop.
BURSTS_BEFORE = 5


class StoppableBroker(Protocol):
    """A broker with the clients alice and bob, which can be stopped and started again
    at the same address.
    """

    def connect(self, name: str) -> Client:
        """Return a connected blocking client."""

    async def connect_async(self, name: str) -> AsyncClient:
        """Return a connected asyncio client."""

    def stop(self, number: int) -> None:
        """Drain the broker, for the ``number``-th time, and return when it has ended."""

    def start(self) -> None:
        """Start the broker again."""


class SendAccount:
    """The messages sent, by id; those that arrived, and those that were reported."""

    def __init__(self) -> None:
        self.sent: dict[int, bytes] = {}
        self.arrived: Counter[bytes] = Counter()
        self.reported: Counter[int] = Counter()

    def report(self, error: BrokerdError) -> None:
        self.reported[getattr(error, "message_id", -1)] += 1

    def note(self, message_id: int) -> None:
        self.sent[message_id] = self.next_body()

    def next_body(self) -> bytes:
        return b"%d" % len(self.sent)

    def is_settled(self) -> bool:
        return len(self.arrived) + len(self.reported) >= len(self.sent)

    def check(self) -> None:
        """Check that every send has exactly one outcome."""
        assert max(self.arrived.values(), default=1) == 1
        assert max(self.reported.values(), default=1) == 1
        missing = [
            message_id
            for message_id, body in self.sent.items()
            if not self.arrived[body] and not self.reported[message_id]
        ]
        both = [
            message_id
            for message_id, body in self.sent.items()
            if self.arrived[body] and self.reported[message_id]
        ]
        assert (len(missing), len(both)) == (0, 0), f"of {len(self.sent)} sent"
        assert set(self.reported) <= set(self.sent)


def run_blocking(broker: StoppableBroker, count: int) -> None:
    account = SendAccount()
    alice, bob = broker.connect("alice"), broker.connect("bob")
    alice.on_undelivered(account.report)
    ended = threading.Event()
    bursts = [0]

    def send() -> None:
        for number in itertools.count():
            if ended.is_set():
                return
            for _ in range(BURST):
                body = b"%d" % len(account.sent)
                account.sent[alice.send("bob", body, timeout=TIMEOUT_S)] = body
            bursts[0] = number
            threading.Event().wait(0.0005)

    def receive() -> None:
        for message in bob:
            account.arrived[message.body] += 1

    threads = [threading.Thread(target=send), threading.Thread(target=receive)]
    for thread in threads:
        thread.start()
    for number in range(count):
        before = bursts[0]
        while bursts[0] < before + BURSTS_BEFORE:
            threading.Event().wait(0.001)
        broker.stop(number)
        broker.start()
    ended.set()
    threads[0].join()
    alice.ping()
    for _ in range(int(TIMEOUT_S * 100)):
        if account.is_settled():
            break
        threading.Event().wait(0.01)
    bob.close()
    threads[1].join()
    alice.close()
    account.check()


async def run_asyncio(broker: StoppableBroker, count: int) -> None:
    account = SendAccount()
    alice, bob = await broker.connect_async("alice"), await broker.connect_async("bob")
    alice.on_undelivered(account.report)
    bob.on_message(lambda message: account.arrived.update([message.body]))
    ended = asyncio.Event()
    bursts = [0]

    async def send() -> None:
        for number in itertools.count():
            if ended.is_set():
                return
            for _ in range(BURST):
                body = b"%d" % len(account.sent)
                account.sent[await alice.send("bob", body, timeout=TIMEOUT_S)] = body
            bursts[0] = number
            await asyncio.sleep(0.0005)

    sending = asyncio.create_task(send())
    for number in range(count):
        before = bursts[0]
        while bursts[0] < before + BURSTS_BEFORE:  # noqa: ASYNC110 - counted by a task beside
            await asyncio.sleep(0.001)
        await asyncio.to_thread(broker.stop, number)
        await asyncio.to_thread(broker.start)
    ended.set()
    await sending
    await alice.ping()
    for _ in range(int(TIMEOUT_S * 100)):
        if account.is_settled():
            break
        await asyncio.sleep(0.01)
    await bob.close()
    await alice.close()
    account.check()
