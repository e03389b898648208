"""Store processes that are killed at random, with an account of what they confirmed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.store_requests import append

from brokerd.core.mailboxes.journal import Batch, Buried, Committed, Contents, Failed, Remove, Row
from brokerd.store.connection import StoreConnection, StoreSettings

#: Batches that are under way at most.
_UNDER_WAY = 8


class _Account:
    """What was confirmed, kept outside of the store. It receives the store's answers.

    Attributes:
        stored: By seq, the frames of messages that are on disk.
        removed: Seqs of messages whose removal is on disk.
        doubtful: Seqs of messages whose storing or removal is not known.
    """

    def __init__(self) -> None:
        self.stored: dict[int, bytes] = {}
        self.removed: set[int] = set()
        self.doubtful: set[int] = set()
        self.under_way: dict[int, tuple[dict[int, bytes], list[int]]] = {}
        self.numbers = 0
        self.next_seq = 1
        self.rows_read: asyncio.Queue[Sequence[Row]] = asyncio.Queue()

    def batch(self, chance: random.Random) -> Batch:
        """Return new messages, with the removal of some that are on disk."""
        self.numbers += 1
        count = chance.choice((1, 1, 5, 200))
        first, self.next_seq = self.next_seq, self.next_seq + count
        frames = {first + at: b"%d " % (first + at) * chance.choice((1, 50)) for at in range(count)}
        gone = [seq for seq in self.stored if chance.random() < 0.3]
        self.under_way[self.numbers] = (frames, gone)
        removal = Remove("bob", tuple((seq, seq) for seq in gone))
        return Batch(self.numbers, (removal, append("bob", first, *frames.values())))

    def committed(self, answer: Committed) -> None:
        frames, gone = self.under_way.pop(answer.number)
        self.stored.update(frames)
        for seq in gone:
            self.stored.pop(seq, None)
        self.removed.update(gone)

    def failed(self, answer: Failed) -> None:
        frames, gone = self.under_way.pop(answer.number)
        self.doubtful.update(frames, gone)
        for seq in gone:
            self.stored.pop(seq, None)

    def rows(self, request: int, rows: Sequence[Row]) -> None:
        self.rows_read.put_nowait(rows)

    def key_looked_up(self, request: int, known: bool) -> None:
        raise NotImplementedError

    def purged(self, request: int, count: int, size: int) -> None:
        raise NotImplementedError

    def forgotten(self, keys: Sequence[tuple[str, int]]) -> None:
        raise NotImplementedError

    def buried(self, buried: Buried) -> None:
        raise NotImplementedError

    def check(self, rows: Sequence[Row], contents: Sequence[Contents]) -> None:
        """Compare with what a store has; what was doubtful is known then."""
        there = {row.seq: row.frame for row in rows}
        assert [row.seq for row in rows] == sorted(there)
        assert self.stored.items() <= there.items()
        assert there.keys() <= self.stored.keys() | self.doubtful
        assert not there.keys() & (self.removed - self.doubtful)
        for bob in contents:
            assert bob.ready == len(rows)
            # A removed message was confirmed, and its seq is not used again.
            assert bob.next_seq > max([*self.stored, *self.removed, 0])
            self.next_seq = max(self.next_seq, bob.next_seq)
        self.stored, self.doubtful = there, set()


async def kill_at_random(path: Path, chance: random.Random, kills: int) -> int:
    """Kill store processes that write; return how many messages were confirmed."""
    account = _Account()
    settings = StoreSettings(path, 0, 3600.0)
    for _ in range(kills + 1):
        connection = StoreConnection(settings, lambda: None)
        contents = await connection.open()
        connection.serve(account)
        connection.read(1, "bob", "ready", (0.0, 0), 1 << 30, 1 << 40)
        account.check(await account.rows_read.get(), contents)
        last = account.numbers + chance.randint(1, 60)
        while account.numbers < last:
            while account.numbers < last and len(account.under_way) < _UNDER_WAY:
                connection.commit(account.batch(chance))
            await asyncio.sleep(0)
        # Up to eight batches are under way.
        os.kill(connection.pid, signal.SIGKILL)
        await connection.close(30.0)
        assert not account.under_way
    return len(account.removed) + len(account.stored)


def test_killed_store_keeps_what_it_confirmed(tmp_path: Path) -> None:
    """After each kill, the database agrees with the account."""
    assert asyncio.run(kill_at_random(tmp_path, random.Random(7), 2)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_store_keeps_what_it_confirmed_many_times(tmp_path: Path, seed: int) -> None:
    """The same 300 times."""
    assert asyncio.run(kill_at_random(tmp_path, random.Random(seed), 30)) > 0
