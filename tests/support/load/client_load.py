"""Clients that send each other numbered messages as fast as they can, and the account
of every message.

The test decides what happens to the broker meanwhile. Each message asks for a receipt.
For each sender and recipient the numbers go up by one, so that a loss, a repetition and
a change of order all show.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from brokerd_client import Receipt, aio
from brokerd_client.errors import BrokerdError

TIMEOUT_S = 60.0
#: Messages of one call, which are in flight together.
_AT_ONCE = 32


@dataclass
class ClientRecord:
    """The messages that one client sent, their outcomes, and the messages that it
    received.

    All by (other client, number).
    """

    name: str
    numbers: Counter[str] = field(default_factory=Counter)
    ids: dict[int, tuple[str, int]] = field(default_factory=dict)
    accepted: set[tuple[str, int]] = field(default_factory=set)
    failed: dict[tuple[str, int], str] = field(default_factory=dict)
    received: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def fail(self, error: Any) -> None:
        self.failed[self.ids[error.message_id]] = type(error).__name__


class ClientLoad:
    """Clients that stay connected and send to each other and to ``others``, which may
    connect and disconnect.
    """

    def __init__(self, address: str, keys: Mapping[str, bytes], seed: int) -> None:
        self.address = address
        self.keys = dict(keys)
        self.records: dict[str, ClientRecord] = {}
        self.others: list[str] = []
        self._random = random.Random(seed)
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._clients: dict[str, Any] = {}
        self.refused: list[str] = []
        self.reconnections = 0
        self.keys_used: set[tuple[str, bytes]] = set()
        self._reconnecting: list[str] = []
        self._reconnections_of: Counter[str] = Counter()

    async def connect(self, name: str, *, sends: bool = True) -> Any:
        """Connect a client. Unless it only receives, it sends from now on."""
        client = await aio.connect(
            self.address, name, self.keys[name], reconnect=False, timeout=TIMEOUT_S
        )
        record = self.records.setdefault(name, ClientRecord(name))

        def take(message: Any) -> None:
            record.received[message.sender].append(int(message.body))
            self._changed.set()

        client.on_message(take)
        client.on_undelivered(record.fail)
        self._clients[name] = client
        if sends:
            self._tasks.append(asyncio.create_task(self._send(client, record)))
        return client

    def connect_repeatedly(self, name: str) -> None:
        """Let a client connect, ping and disconnect, again and again, until ``finish``.
        Each refusal is noted.
        """
        self._reconnecting.append(name)
        self._tasks.append(asyncio.create_task(self._connect_repeatedly(name)))

    async def _connect_repeatedly(self, name: str) -> None:
        while not self._stopping.is_set():
            key = self.keys[name]
            try:
                async with aio.connect(self.address, name, key, reconnect=False) as client:
                    await client.ping()
                self.keys_used.add((name, key))
                self.reconnections += 1
                self._reconnections_of[name] += 1
                self._changed.set()
            except (BrokerdError, OSError) as error:
                self.refused.append(f"{name}: {error!r}")

    async def until_all_reconnected(self) -> None:
        """Wait until each client of ``connect_repeatedly`` has begun a new connection
        and was accepted.
        """
        before = dict(self._reconnections_of)
        # Twice, because the first connection may have begun earlier.
        while any(
            self._reconnections_of[name] < before.get(name, 0) + 2 for name in self._reconnecting
        ):
            self._changed.clear()
            await self._changed.wait()

    async def _send(self, client: Any, record: ClientRecord) -> None:
        while not self._stopping.is_set():
            to = [name for name in self.records if name not in self.others] + self.others
            batch = []
            for recipient in self._random.choices(to, k=_AT_ONCE):
                batch.append((recipient, record.numbers[recipient]))
                record.numbers[recipient] += 1
            outcomes = await client.send_many_confirmed(
                [(name, b"%d" % number) for name, number in batch]
            )
            for sent, outcome in zip(batch, outcomes, strict=True):
                if isinstance(outcome, Receipt):
                    record.accepted.add(sent)
                    record.ids[outcome.id] = sent
                else:
                    record.failed[sent] = type(outcome).__name__

    async def finish(self) -> None:
        """Stop sending; return when all accepted messages for the clients that stayed
        have arrived.
        """
        self._stopping.set()
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.gather(*self._tasks)
            for client in self._clients.values():
                # Messages sent to it before this answer have arrived with it.
                with suppress(BrokerdError):
                    await client.ping()
            while self.in_flight():
                self._changed.clear()
                await self._changed.wait()
            for client in self._clients.values():
                await client.close()

    def in_flight(self) -> int:
        """Return how many accepted messages for the clients that stayed have not
        arrived yet.
        """
        return sum(
            len([sent for sent in record.accepted if sent[0] == name and sent not in record.failed])
            - len(receiver.received.get(record.name, ()))
            for record in self.records.values()
            for name, receiver in self.records.items()
            if name not in self.others
        )

    def account(self) -> dict[str, int]:
        """Return the account of all messages."""
        account: Counter[str] = Counter(
            sent=0, delivered=0, reported=0, twice=0, out_of_order=0, unaccounted=0
        )
        for record in self.records.values():
            account["sent"] += record.numbers.total()
            for name, count in record.numbers.items():
                receiver = self.records.get(name)
                received = [] if receiver is None else receiver.received.get(record.name, [])
                account["delivered"] += len(set(received))
                account["twice"] += len(received) - len(set(received))
                account["out_of_order"] += sum(
                    later <= earlier for earlier, later in itertools.pairwise(received)
                )
                reported = {number for number in range(count) if (name, number) in record.failed}
                account["reported"] += len(reported)
                account["unaccounted"] += len(set(range(count)) - set(received) - reported)
                account["delivered_and_reported"] += len(set(received) & reported)
        return dict(account)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as an editor does: no reader sees half of it."""
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.chmod(0o600)
    temporary.rename(path)
