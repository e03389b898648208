"""Crashes at each call of a commit: what had a receipt is there, and nothing else is wrong.

The calls of a store are recorded once. Every state in which a crash can leave its files
is made of them.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.crash_states import (
    Call,
    build_shim,
    recorded,
    run_recorded,
    states,
    write_crash,
)
from support.recorded_store import batches, main
from support.store_requests import LocalStore

from brokerd.store.check import content_problems_of, problems_of

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")

MAILBOXES = ("bob", "carol", "dave")

Found = list[tuple[object, ...]]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[Call]:
    """Return the recorded calls of a store."""
    directory = tmp_path_factory.mktemp("recorded")
    (directory / "store").mkdir()
    program = Path(main.__code__.co_filename)
    log = directory / "log"
    store = directory / "store"
    run_recorded(build_shim(directory), store, log, str(program), str(store))
    found = recorded(log)
    assert sum(call.kind == "s" for call in found) > len(batches())
    return [call for call in found if call.name != "mailboxes.reserve"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """Return what is there after each number of batches."""
    store = LocalStore(tmp_path_factory.mktemp("expected") / "store")
    after = [found(store)]
    for records in batches():
        store.commit(*records)
        after.append(found(store))
    store.close()
    return after


@pytest.fixture
def place() -> Iterator[Path]:
    """Return a directory in memory, where the files of a crash are opened."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as path:
        yield Path(path) / "store"


def found(store: LocalStore) -> Found:
    """Return everything that a store has."""
    return [
        (mailbox, row.seq, row.frame, row.state, row.attempts, row.due_at, row.reason)
        for mailbox in MAILBOXES
        for row in store.rows(mailbox, None)
    ]


def check(files: dict[str, bytes], receipts: int, expected: list[Found], place: Path) -> None:
    """Open the files of a crash: the batches with receipts are there, or one more."""
    write_crash(place, files)
    store = LocalStore(place)
    try:
        assert found(store) in expected[receipts : receipts + 2]
        assert [*problems_of(store.database.connection)] == []
        assert [*content_problems_of(store.database.connection)] == []
        # The next message has a seq that no message had.
        used = max((seq for _, seq, *_ in expected[receipts] if isinstance(seq, int)), default=0)
        assert store.contents.get("bob") is None or store.contents["bob"].next_seq > used
    finally:
        store.database.connection.close()
        store.directory.close()
        shutil.rmtree(place)


def crash(calls: list[Call], expected: list[Found], place: Path, step: int, seeds: int) -> None:
    """Crash at every ``step``-th call: by a kill, in the middle of it, by power losses."""
    receipts = 0
    for number, files, call in states(calls):
        receipts += (
            number > 0 and calls[number - 1].name == "receipts" and (calls[number - 1].kind == "w")
        )
        if number % step:
            continue
        killed = [files.after_kill(), files.after_kill(call)]
        lost = [files.after_power_loss(random.Random(f"{number} {seed}")) for seed in range(seeds)]
        for which, left in enumerate(killed + lost):
            left.pop("receipts", None)
            try:
                check(left, receipts, expected, place)
            except Exception as error:
                raise AssertionError(f"crash {which} before call {number}: {call}") from error


def test_crash_at_some_calls_loses_nothing(
    calls: list[Call], expected: list[Found], place: Path
) -> None:
    """Whenever the process or the power is gone, receipts hold."""
    crash(calls, expected, place, 61, 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_crash_at_every_call_loses_nothing(
    calls: list[Call], expected: list[Found], place: Path
) -> None:
    """The same at each call, with many ways in which the disk forgets."""
    crash(calls, expected, place, 1, 12)
