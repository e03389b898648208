"""The broker's end of a real store process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from support.store_requests import append, database_file, overwrite

from brokerd.core.mailboxes.journal import (
    Batch,
    Buried,
    Committed,
    Failed,
    FailureKind,
    Remove,
    Row,
)
from brokerd.store.connection import StoreConnection, StoreSettings
from brokerd.store.directory import Refused


class _Answers:
    """Notes the answers of the store."""

    def __init__(self) -> None:
        self.answers: list[object] = []
        self._arrived = asyncio.Event()

    def committed(self, answer: Committed) -> None:
        self._add(answer)

    def failed(self, answer: Failed) -> None:
        self._add(answer)

    def rows(self, request: int, rows: Sequence[Row]) -> None:
        self._add((request, [(row.seq, row.frame) for row in rows]))

    def key_looked_up(self, request: int, known: bool) -> None:
        self._add((request, known))

    def purged(self, request: int, count: int, size: int) -> None:
        self._add((request, count, size))

    def forgotten(self, keys: Sequence[tuple[str, int]]) -> None:
        self._add(tuple(keys))

    def buried(self, buried: Buried) -> None:
        self._add(buried)

    def _add(self, answer: object) -> None:
        self.answers.append(answer)
        self._arrived.set()

    async def take(self, count: int) -> list[object]:
        """Return that many answers."""
        while len(self.answers) < count:
            self._arrived.clear()
            await self._arrived.wait()
        taken, self.answers = self.answers[:count], self.answers[count:]
        return taken


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncIterator[tuple[StoreConnection, _Answers]]:
    """Open a store process; close it at the end."""
    connection = StoreConnection(StoreSettings(path, 0, 3600.0), lambda: None)
    await connection.open()
    answers = _Answers()
    connection.serve(answers)
    try:
        yield connection, answers
    finally:
        await connection.close(30.0)


def test_connection_requests_are_answered_in_order(tmp_path: Path) -> None:
    """Each request has its answer, and the answers keep the order of the requests."""

    async def run() -> None:
        async with opened(tmp_path) as (connection, answers):
            connection.commit(
                Batch(1, (append("bob", 1, b"one", b"two", key="k", at=time.time()),))
            )
            connection.read(7, "bob", "ready", (0.0, 0), 9, 99)
            connection.look_up_key(8, "bob", "alice", "k1")
            connection.commit(Batch(2, (Remove("bob", ((1, 1),)),)))
            connection.purge(9, "bob", None, 99, ())

            assert await answers.take(5) == [
                Committed(1),
                (7, [(1, b"one"), (2, b"two")]),
                (8, True),
                Committed(2),
                (9, 1, 3),
            ]

    asyncio.run(run())


def test_connection_closed_store_keeps_its_messages(tmp_path: Path) -> None:
    """A store that is closed commits what it has received; the next one finds it."""

    async def run() -> None:
        async with opened(tmp_path) as (connection, _):
            connection.commit(Batch(1, (append("bob", 1, b"one"),)))
        again = StoreConnection(connection.settings, lambda: None)
        (bob,) = await again.open()
        assert (bob.mailbox, bob.next_seq, bob.ready) == ("bob", 2, 1)
        assert await again.close(30.0)

    asyncio.run(run())


def test_connection_left_store_commits_what_it_has_received(tmp_path: Path) -> None:
    """A killed broker's batches are on disk once the store has ended."""

    async def run() -> None:
        async with opened(tmp_path) as (connection, _):
            connection.commit(Batch(1, (append("bob", 1, b"one"),)))
            connection.kill()
        again = StoreConnection(connection.settings, lambda: None)
        (bob,) = await again.open()
        assert bob.ready == 1
        assert await again.close(30.0)

    asyncio.run(run())


def test_connection_long_frames_arrive_whole(tmp_path: Path) -> None:
    """Batches that the socket does not take at once wait, and are written in order."""

    async def run() -> None:
        async with opened(tmp_path) as (connection, answers):
            frames = [bytes([at]) * 3_000_000 for at in range(6)]
            for number, frame in enumerate(frames, 1):
                connection.commit(Batch(number, (append("bob", number, frame),)))
            assert await answers.take(6) == [Committed(number) for number in range(1, 7)]
            for number in range(6):
                connection.read(number, "bob", "ready", (0.0, number), 1, 1)
            assert await answers.take(6) == [
                (at, [(at + 1, frame)]) for at, frame in enumerate(frames)
            ]

    asyncio.run(run())


def test_connection_killed_store_fails_batches(tmp_path: Path) -> None:
    """Without its store process, the broker knows of no batch whether it is on disk."""

    async def run() -> None:
        async with opened(tmp_path) as (connection, answers):
            os.kill(connection.pid, signal.SIGSTOP)
            connection.commit(Batch(1, (append("bob", 1, b"one"),)))
            connection.read(2, "bob", "ready", (0.0, 0), 1, 1)
            os.kill(connection.pid, signal.SIGKILL)
            ended = "the store process ended with status -9"
            assert await answers.take(2) == [Failed(1, FailureKind.IO, ended), (2, [])]

            connection.commit(Batch(2, ()))
            connection.look_up_key(3, "bob", "alice", "k")
            assert answers.answers == []
            assert await answers.take(2) == [Failed(2, FailureKind.IO, ended), (3, False)]
            assert connection.failure == ended

    asyncio.run(run())


def test_connection_stop_of_the_service_does_not_end_the_store(tmp_path: Path) -> None:
    """Signals that reach all processes of a service leave the end to the broker."""

    async def run() -> None:
        async with opened(tmp_path) as (connection, answers):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(connection.pid, number)
            connection.commit(Batch(1, (append("bob", 1, b"one"),)))
            assert await answers.take(1) == [Committed(1)]

    asyncio.run(run())


def test_connection_damaged_database_is_refused(tmp_path: Path) -> None:
    """The reason says what is damaged, what to do, and that nothing was changed."""

    async def run() -> None:
        async with opened(tmp_path) as (connection, _):
            pass
        file = database_file(tmp_path)
        overwrite(file, 0)
        before = file.read_bytes()
        with pytest.raises(Refused, match=r"mailboxes\.db is damaged: .*Put a backup in its"):
            await StoreConnection(connection.settings, lambda: None).open()
        assert file.read_bytes() == before

    asyncio.run(run())


def test_connection_unusable_directory_is_refused(tmp_path: Path) -> None:
    """The reason names the path."""
    (tmp_path / "file").touch()

    async def run() -> None:
        settings = StoreSettings(tmp_path / "file" / "store", 0, 1.0)
        with pytest.raises(Refused, match=r"file/store: Not a directory"):
            await StoreConnection(settings, lambda: None).open()

    asyncio.run(run())


def test_connection_many_answers_are_passed_on_in_turns(tmp_path: Path) -> None:
    """Other work of the loop goes on between answers that arrive together."""

    async def run() -> None:
        async with opened(tmp_path) as (connection, answers):
            turns: list[int] = []
            committed = answers.committed

            def slowly(answer: Committed) -> None:
                end = time.monotonic() + 0.002
                while time.monotonic() < end:
                    pass
                committed(answer)
                turns.append(ticks)

            answers.committed = slowly  # type: ignore[method-assign]
            os.kill(connection.pid, signal.SIGSTOP)
            for number in range(1, 9):
                connection.commit(Batch(number, (append("bob", number, b"one"),)))
            os.kill(connection.pid, signal.SIGCONT)
            ticks = 0
            while len(turns) < 8:
                ticks += 1
                await asyncio.sleep(0)

            assert len(set(turns)) == 8

    asyncio.run(run())


def test_connection_on_another_system_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a process can't be given a socket, the reason says so."""

    async def run() -> None:
        monkeypatch.setattr("brokerd.store.connection.os.name", "nt")
        with pytest.raises(Refused, match="mailboxes need a POSIX system"):
            await StoreConnection(StoreSettings(tmp_path, 0, 1.0), lambda: None).open()

    asyncio.run(run())


def test_connection_shared_store_serves_another_connection(tmp_path: Path) -> None:
    """An upgrade hands the socket of the store over; the process stays."""

    async def run() -> None:
        async with opened(tmp_path) as (connection, answers):
            connection.commit(Batch(1, (append("bob", 1, b"one"),)))
            assert await answers.take(1) == [Committed(1)]
            shared = connection.shared()
            assert shared is not None
            facts, sock = shared

            other, its_answers = StoreConnection(connection.settings, lambda: None), _Answers()
            other.attach(facts["pid"], sock.dup(), facts["version"])
            other.serve(its_answers)
            connection.kill()
            other.commit(Batch(2, (append("bob", 2, b"two"),)))

            assert await its_answers.take(1) == [Committed(2)]
            assert other.pid == facts["pid"]
            assert await other.close(30.0)
        assert connection.shared() is None

    asyncio.run(run())


def test_connection_to_store_of_another_version_waits_for_its_renewal(tmp_path: Path) -> None:
    """The other store process gets no request, whose form it may not know."""

    async def run() -> None:
        async with opened(tmp_path) as (connection, answers):
            connection.commit(Batch(1, (append("bob", 1, b"one"),)))
            assert await answers.take(1) == [Committed(1)]
            shared = connection.shared()
            assert shared is not None
            facts, sock = shared
            other, its_answers = StoreConnection(connection.settings, lambda: None), _Answers()
            other.attach(facts["pid"], sock.dup(), facts["version"] + 1)
            other.serve(its_answers)
            connection.kill()
            other.commit(Batch(2, (append("bob", 2, b"two"),)))
            assert not other._unsent
            await other.renew()

            assert await its_answers.take(1) == [Committed(2)]
            assert other.pid != facts["pid"]
            assert await other.close(30.0)

    asyncio.run(run())


def test_connection_renewed_store_loses_no_request(tmp_path: Path) -> None:
    """Another store process takes over; requests in between wait for it."""

    async def run() -> None:
        async with opened(tmp_path) as (connection, answers):
            pid = connection.pid
            connection.commit(Batch(1, (append("bob", 1, b"one"),)))
            renewing = asyncio.create_task(connection.renew())
            await asyncio.sleep(0)
            connection.commit(Batch(2, (append("bob", 2, b"two"),)))
            connection.read(3, "bob", "ready", (0.0, 0), 9, 99)

            assert await answers.take(3) == [
                Committed(1),
                Committed(2),
                (3, [(1, b"one"), (2, b"two")]),
            ]
            await renewing
            assert connection.pid != pid
            assert connection.failure == ""

    asyncio.run(run())
