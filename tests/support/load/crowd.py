"""Clients that send each other numbered messages as fast as they can, and the account
of every one of them.

What happens to the broker meanwhile is the test's. Each message asks for a receipt; for
each sender and recipient the numbers go up by one, so that a loss, a repetition and a
change of order all show.
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
#: Messages of one call, which are under way at once.
_AT_ONCE = 32


@dataclass
class CrowdLedger:
    """What one client sent, what came of it, and what it received.

    All by (other side, number).
    """

    name: str
    numbers: Counter[str] = field(default_factory=Counter)
    ids: dict[int, tuple[str, int]] = field(default_factory=dict)
    taken: set[tuple[str, int]] = field(default_factory=set)
    failed: dict[tuple[str, int], str] = field(default_factory=dict)
    received: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def fail(self, error: Any) -> None:
        self.failed[self.ids[error.message_id]] = type(error).__name__


class Crowd:
    """Clients that stay connected and send to each other and to ``others``, who may
    come and go.
    """

    def __init__(self, address: str, keys: Mapping[str, bytes], seed: int) -> None:
        self.address = address
        self.keys = dict(keys)
        self.ledgers: dict[str, CrowdLedger] = {}
        self.others: list[str] = []
        self._random = random.Random(seed)
        self._over = asyncio.Event()
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._clients: dict[str, Any] = {}
        self.refused: list[str] = []
        self.knocks = 0
        self.keys_used: set[tuple[str, bytes]] = set()
        self._knocking: list[str] = []
        self._came: Counter[str] = Counter()

    async def enter(self, name: str, *, sends: bool = True) -> Any:
        """Connect a client; it sends from now on, unless it only listens."""
        client = await aio.connect(
            self.address, name, self.keys[name], reconnect=False, timeout=TIMEOUT_S
        )
        ledger = self.ledgers.setdefault(name, CrowdLedger(name))

        def take(message: Any) -> None:
            ledger.received[message.sender].append(int(message.body))
            self._news.set()

        client.on_message(take)
        client.on_undelivered(ledger.fail)
        self._clients[name] = client
        if sends:
            self._tasks.append(asyncio.create_task(self._send(client, ledger)))
        return client

    def knock(self, name: str) -> None:
        """Have a client connect, ask something and go again, without end; whoever is
        refused is noted.
        """
        self._knocking.append(name)
        self._tasks.append(asyncio.create_task(self._knock(name)))

    async def _knock(self, name: str) -> None:
        while not self._over.is_set():
            key = self.keys[name]
            try:
                async with aio.connect(self.address, name, key, reconnect=False) as client:
                    await client.ping()
                self.keys_used.add((name, key))
                self.knocks += 1
                self._came[name] += 1
                self._news.set()
            except (BrokerdError, OSError) as error:
                self.refused.append(f"{name}: {error!r}")

    async def everybody_has_come_again(self) -> None:
        """Return when everybody who knocks has begun to do so, and was let in, since
        this was called.
        """
        before = dict(self._came)
        # Twice: the first time it may have begun earlier.
        while any(self._came[name] < before.get(name, 0) + 2 for name in self._knocking):
            self._news.clear()
            await self._news.wait()

    async def _send(self, client: Any, ledger: CrowdLedger) -> None:
        while not self._over.is_set():
            to = [name for name in self.ledgers if name not in self.others] + self.others
            batch = []
            for recipient in self._random.choices(to, k=_AT_ONCE):
                batch.append((recipient, ledger.numbers[recipient]))
                ledger.numbers[recipient] += 1
            outcomes = await client.send_many_confirmed(
                [(name, b"%d" % number) for name, number in batch]
            )
            for sent, outcome in zip(batch, outcomes, strict=True):
                if isinstance(outcome, Receipt):
                    ledger.taken.add(sent)
                    ledger.ids[outcome.id] = sent
                else:
                    ledger.failed[sent] = type(outcome).__name__

    async def finish(self) -> None:
        """Send no more; return when everything that was taken for those who stayed has
        arrived.
        """
        self._over.set()
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.gather(*self._tasks)
            for client in self._clients.values():
                # What was sent to it before this answer has arrived with it.
                with suppress(BrokerdError):
                    await client.ping()
            while self.on_the_way():
                self._news.clear()
                await self._news.wait()
            for client in self._clients.values():
                await client.close()

    def on_the_way(self) -> int:
        """Return how many messages that were taken for those who stayed have not been
        handed over yet.
        """
        return sum(
            len([sent for sent in ledger.taken if sent[0] == name and sent not in ledger.failed])
            - len(receiver.received.get(ledger.name, ()))
            for ledger in self.ledgers.values()
            for name, receiver in self.ledgers.items()
            if name not in self.others
        )

    def account(self) -> dict[str, int]:
        """Return the account of all messages; every sentence of it that must hold is
        asserted.
        """
        account: Counter[str] = Counter(
            sent=0, delivered=0, reported=0, twice=0, out_of_order=0, unaccounted=0
        )
        for ledger in self.ledgers.values():
            account["sent"] += ledger.numbers.total()
            for name, count in ledger.numbers.items():
                receiver = self.ledgers.get(name)
                got = [] if receiver is None else receiver.received.get(ledger.name, [])
                account["delivered"] += len(set(got))
                account["twice"] += len(got) - len(set(got))
                account["out_of_order"] += sum(
                    later <= earlier for earlier, later in itertools.pairwise(got)
                )
                reported = {number for number in range(count) if (name, number) in ledger.failed}
                account["reported"] += len(reported)
                account["unaccounted"] += len(set(range(count)) - set(got) - reported)
                account["delivered_and_reported"] += len(set(got) & reported)
        return dict(account)


def write_whole(path: Path, text: str) -> None:
    """Replace a file as an editor does: nobody sees half of it."""
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.chmod(0o600)
    temporary.rename(path)
