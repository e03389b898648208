"""Tasks of the asyncio client that are run at the end of a read, and its idle workers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from support.memory_broker import MemoryBroker, play

from brokerd_client.aio.wakeups import Wakeups


def in_callback(call: Callable[[], None]) -> Awaitable[None]:
    """Run ``call`` in a callback of the loop, outside of any task."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def run() -> None:
        try:
            call()
        finally:
            done.set_result(None)

    loop.call_soon(run)
    return done


async def start(*coroutines: Any) -> list[asyncio.Task[Any]]:
    """Return tasks that have made their first step."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    await asyncio.sleep(0)
    return tasks


def test_wakeups_collected_run_their_tasks_in_order() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        wakeups = Wakeups(loop)
        futures = [loop.create_future() for _ in range(3)]
        steps: list[object] = []

        async def wait(number: int) -> None:
            try:
                steps.append((await futures[number], asyncio.current_task()))
            except ValueError as error:
                steps.append((str(error), asyncio.current_task()))

        tasks = await start(*map(wait, range(3)))

        def read() -> None:
            assert wakeups.collect()
            assert not wakeups.collect()
            wakeups.settle(futures[2], "first")
            wakeups.settle_all([(futures[0], ValueError("second")), (futures[1], "third")])
            assert not any(future.done() for future in futures)
            wakeups.run()
            assert steps == [("first", tasks[2]), ("second", tasks[0]), ("third", tasks[1])]

        await in_callback(read)
        await asyncio.gather(*tasks)

    asyncio.run(main())


def test_wakeups_in_task_set_results_as_usual() -> None:
    """No task can run inside another one."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        wakeups = Wakeups(loop)
        assert not wakeups.collect()
        one, other = loop.create_future(), loop.create_future()
        wakeups.settle(one, 1)
        wakeups.settle(one, 2)
        wakeups.settle_all([(other, OSError("lost"))])
        assert await one == 1
        with pytest.raises(OSError, match="lost"):
            await other

    asyncio.run(main())


def test_wakeups_of_futures_without_task_set_their_results() -> None:
    """One future is cancelled by a task that runs earlier. Another has two callbacks."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        wakeups = Wakeups(loop)
        first, cancelled, alone, watched = (loop.create_future() for _ in range(4))
        called: list[object] = []
        for _ in range(2):
            watched.add_done_callback(called.append)

        async def cancel() -> None:
            await first
            cancelled.cancel()

        (task,) = await start(cancel())

        def read() -> None:
            wakeups.collect()
            wakeups.settle_all([(each, 1) for each in (first, cancelled, alone, watched)])
            wakeups.run()

        await in_callback(read)
        assert (cancelled.cancelled(), alone.result(), watched.result()) == (True, 1, 1)
        await task
        assert called == [watched, watched]

    asyncio.run(main())


def test_wakeups_exit_of_task_is_raised_by_loop() -> None:
    """The tasks behind it run all the same."""
    steps: list[object] = []
    tasks: list[asyncio.Task[None]] = []

    async def leave(future: asyncio.Future[Any]) -> None:
        await future
        raise SystemExit(3)

    async def go_on(future: asyncio.Future[Any]) -> None:
        steps.append(await future)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        wakeups = Wakeups(loop)
        one, other = loop.create_future(), loop.create_future()
        tasks.extend(await start(leave(one), go_on(other)))

        def read() -> None:
            wakeups.collect()
            wakeups.settle_all([(one, 1), (other, 2)])
            wakeups.run()
            assert steps == [2]

        await in_callback(read)
        await asyncio.gather(*tasks)

    with pytest.raises(SystemExit):
        asyncio.run(main())
    assert steps == [2]
    assert isinstance(tasks[0].exception(), SystemExit)


def test_wakeups_of_task_in_its_own_context_come_in_next_turn() -> None:
    """A context can't be entered twice at a time."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        wakeups = Wakeups(loop)
        future = loop.create_future()

        async def wait() -> object:
            return await future

        (task,) = await start(wait())
        ((_, context),) = future._callbacks

        def read() -> None:
            wakeups.collect()
            wakeups.settle(future, 1)
            wakeups.run()
            assert not task.done()

        loop.call_soon(read, context=context)
        assert await task == 1

    asyncio.run(main())


def test_aio_answers_of_one_read_run_their_tasks_in_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the tasks send next is written together, before another callback runs."""

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            bob.on_request(lambda request: request.payload)
            await alice.request("bob", 0)
            assert alice._transport is not None
            transport = alice._transport.asyncio_transport
            writes: list[int] = []
            write = transport.write
            transport.write = lambda data: (writes.append(len(data)), write(data))  # type: ignore[method-assign,assignment,func-returns-value]

            async def ask() -> None:
                for number in range(3):
                    assert (await alice.request("bob", number)).payload == number

            received = alice._on_data

            def note(*args: Any) -> None:
                before = len(writes)
                received(*args)
                turns.append(len(writes) - before)

            turns: list[int] = []
            alice._on_data = note  # type: ignore[method-assign]
            await asyncio.gather(*(ask() for _ in range(20)))
            assert (turns, len(writes)) == ([1, 1, 0], 3)

    play(monkeypatch, scenario)


def test_aio_receiver_cancelled_when_woken_leaves_message_to_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task that runs at the end of a read cancels another task of that read."""

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            got: list[object] = []
            tasks: list[asyncio.Task[None]] = []

            async def receive(number: int) -> None:
                message = await alice.recv()
                got.append((number, message.payload))
                tasks[1].cancel()

            tasks += await start(*map(receive, range(3)))
            await bob.send_many([("alice", "one"), ("alice", "two")])
            await asyncio.wait(tasks)
            assert got == [(0, "one"), (2, "two")]

    play(monkeypatch, scenario)


def test_aio_worker_that_is_idle_does_the_next_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with the client, and another one follows if it is cancelled."""

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice:
            async with network.join("bob") as bob:
                workers: list[asyncio.Task[Any] | None] = []

                async def answer(request: object) -> str:
                    workers.append(asyncio.current_task())
                    await asyncio.sleep(0)
                    return "answer"

                bob.on_request(answer)
                for _ in range(3):
                    await alice.request("bob", 0)
                assert workers[0] is workers[1] is workers[2] is not None
                assert not workers[0].done()
                workers[0].cancel()
                await asyncio.wait([workers[0]])
                await alice.request("bob", 0)
                worker = workers[3]
                assert worker is not None
                assert worker is not workers[0]
                # Requests at once get more workers, all but one of which end with them.
                await asyncio.gather(*(alice.request("bob", 0) for _ in range(5)))
                assert len({*workers[4:]}) > 1
                await asyncio.sleep(0)
                idle = bob._idle_workers[bob._requests][0]
                assert not idle.done()
                assert all(task is idle or (task and task.done()) for task in workers)
            assert idle.done()

    play(monkeypatch, scenario)
