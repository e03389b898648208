"""When garbage is collected in the daemon's own process."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator

import pytest

from brokerd.daemon import garbage


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """The generations that are collected, one entry for each collection."""
    begun: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            begun.append(info["generation"])

    gc.callbacks.append(note)
    yield begun
    gc.callbacks.remove(note)


def test_garbage_tended_process_begins_no_full_collection(collections: list[int]) -> None:
    """No number of new objects starts one. After the block the collector is as before
    it.
    """
    before = gc.get_threshold()
    with garbage.tended():
        kept = [[number] for number in range(300_000)]
        assert 2 not in collections
        assert 1 in collections
        assert len(kept) == 300_000
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def test_garbage_undisturbed_work_is_not_collected() -> None:
    """In a tended process the objects of such work are frozen. In another process the
    program's own objects are not.
    """
    with garbage.tended():
        frozen = gc.get_freeze_count()
        with garbage.undisturbed():
            assert not gc.isenabled()
            kept = [[number] for number in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= frozen + len(kept)
    with garbage.undisturbed():
        kept = [[number] for number in range(1000)]
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize(("size", "full"), [(1000, True), (1001, False)])
def test_garbage_sweeper_collects_fully_while_daemon_is_small(
    collections: list[int], monkeypatch: pytest.MonkeyPatch, size: int, full: bool
) -> None:
    """The sweeper makes full collections in a daemon with few connections and
    subscriptions, but not in a large one.
    """
    monkeypatch.setattr(garbage, "_EVERY_S", 0.01)

    async def run() -> None:
        counted = asyncio.Event()

        def count_objects() -> int:
            counted.set()
            return size

        sweeper = garbage.Sweeper(asyncio.get_running_loop(), count_objects)
        await asyncio.wait_for(counted.wait(), 10)
        await asyncio.sleep(0)
        sweeper.close()

    with garbage.tended():
        collections.clear()
        asyncio.run(run())
        assert (2 in collections) is full
