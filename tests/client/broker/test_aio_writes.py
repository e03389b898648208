"""Writes of the asyncio client: one for each turn of the loop, and no turn too late."""

from __future__ import annotations

import asyncio
import sys

import pytest
from support.memory_broker import MemoryBroker, play

from brokerd_client import aio
from brokerd_client.aio.wakeups import Wakeups


def watch_writes(client: aio.Client) -> list[asyncio.Task[object] | None]:
    """Return a list that gets the task of each write from now on.

    None stands for a callback of the loop.
    """
    assert client._transport is not None
    transport = client._transport.asyncio_transport
    write = transport.write
    writes: list[asyncio.Task[object] | None] = []

    def watched(data: bytes) -> None:
        writes.append(asyncio.current_task())
        write(data)

    transport.write = watched  # type: ignore[method-assign,assignment]
    return writes


@pytest.mark.parametrize("before", [0, 1, 3])
def test_aio_requests_of_one_turn_share_one_write(
    monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    """The requests of many tasks are written at once, after exchanges of single frames
    too.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            bob.on_request(lambda request: request.payload)
            for _ in range(before):
                await alice.request("bob", 0)
            writes = watch_writes(alice)
            calls = [alice.request("bob", number) for number in range(100)]
            replies = await asyncio.gather(*calls)
            assert [reply.payload for reply in replies] == list(range(100))
            assert len(writes) == 1

    play(monkeypatch, scenario)


def test_aio_frames_of_tasks_woken_by_one_read_leave_in_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other end begins with the first frames while the client goes on."""

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:

            async def ask() -> None:
                for number in range(2):
                    await alice.request("bob", number)

            tasks = [asyncio.create_task(ask()) for _ in range(100)]
            requests = [await bob.recv() for _ in tasks]
            writes = watch_writes(alice)
            await asyncio.gather(*(request.reply(0) for request in requests))
            requests = [await bob.recv() for _ in tasks]
            assert len(writes) == 3
            await asyncio.gather(*(request.reply(0) for request in requests))
            await asyncio.gather(*tasks)

    play(monkeypatch, scenario)


def test_aio_answers_to_requests_of_one_read_leave_in_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            bob.on_request(lambda request: request.payload)
            await alice.request("bob", 0)
            for count, expected in ((32, 1), (65, 2), (100, 3)):
                writes = watch_writes(bob)
                await asyncio.gather(*(alice.request("bob", 0) for _ in range(count)))
                assert len(writes) == expected

    play(monkeypatch, scenario)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks are in Python 3.12 and later")
def test_aio_requests_of_eager_tasks_share_two_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first can't know that others follow in the same step of the loop."""

    async def scenario(network: MemoryBroker) -> None:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        async with network.join("alice") as alice, network.join("bob") as bob:
            bob.on_request(lambda request: request.payload)
            await alice.request("bob", 0)
            # Not at the end of the read of that answer, which has a write of its own.
            await asyncio.sleep(0)
            writes = watch_writes(alice)
            await asyncio.gather(*(alice.request("bob", number) for number in range(100)))
            assert len(writes) == 2

    play(monkeypatch, scenario)


def test_aio_requests_one_at_a_time_are_written_by_their_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task that exchanges single frames does not wait for another turn of the loop,
    from its second request on.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            bob.on_request(lambda request: request.payload)
            task = asyncio.create_task(alice.request("bob", 0))
            await task
            writes = watch_writes(alice)
            for number in range(3):
                task = asyncio.create_task(alice.request("bob", number))
                await task
                assert (len(writes), writes[-1]) == (number + 1, task)

    play(monkeypatch, scenario)


def test_aio_only_task_of_a_read_writes_before_it_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The peer works on its frame meanwhile. Further frames of that step leave together."""

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            bob.on_request(lambda request: request.payload)
            await alice.request("bob", 0)
            writes = watch_writes(alice)
            seen: list[int] = []

            async def ask() -> None:
                for number in range(4):
                    assert (await alice.request("bob", number)).payload == number

            run = Wakeups.run

            def watched(wakeups: Wakeups) -> None:
                before = len(writes)
                run(wakeups)
                if wakeups is alice._wakeups:
                    seen.append(len(writes) - before)

            monkeypatch.setattr(Wakeups, "run", watched)
            task = asyncio.create_task(ask())
            await task
            # The last answer wakes the task for the last time.
            assert (seen, writes[1:]) == ([1, 1, 1, 0], [task] * 3)

    play(monkeypatch, scenario)
