"""Handlers of the asyncio client: whatever they raise, every request is answered and
every message is handled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from support.memory_broker import PATIENCE, MemoryBroker, play

from brokerd_client import aio
from brokerd_client.errors import Disconnected, RequestFailed


class PanicException(BaseException):
    """What pyo3 raises where Rust panics: not an Exception."""


ERRORS: list[Callable[[], BaseException]] = [
    lambda: PanicException("panic"),
    lambda: pytest.fail.Exception("failed"),
    lambda: asyncio.CancelledError(),
    lambda: Disconnected("from another client of the handler's"),
    lambda: IndexError("an ordinary one"),
    lambda: StopAsyncIteration(),
    lambda: GeneratorExit(),
]
IDS = [
    "panic",
    "pytest.fail",
    "CancelledError",
    "Disconnected",
    "IndexError",
    "StopAsyncIteration",
    "GeneratorExit",
]


async def until(condition: Callable[[], bool]) -> None:
    """Run the loop until the condition holds."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the condition did not come true")


def handler_that_raises(
    make: Callable[[], BaseException], seen: list[Any], kind: str
) -> Callable[[Any], Any]:
    """Return a handler, as a function or a coroutine function.

    It appends each payload to ``seen``, and raises for the payload "raise".
    """

    def handle(message: aio.Message) -> object:
        seen.append(message.payload)
        if message.payload == "raise":
            raise make()
        return message.payload

    async def handle_later(message: aio.Message) -> object:
        if message.payload == "raise" and make is ERRORS[2]:
            cancelled = asyncio.get_running_loop().create_future()
            cancelled.cancel()
            seen.append(message.payload)
            await cancelled
        await asyncio.sleep(0)
        return handle(message)

    return handle if kind == "function" else handle_later


@pytest.mark.parametrize("kind", ["function", "coroutine"])
@pytest.mark.parametrize("make", ERRORS, ids=IDS)
def test_aio_request_handler_raising_is_answered(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[], BaseException],
    kind: str,
) -> None:
    """The requester gets RequestFailed with the name of the exception's type at once.
    The log has the rest, and the next request is answered.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            bob.on_request(handler_that_raises(make, [], kind))
            for _ in range(70):
                with pytest.raises(RequestFailed, match=type(make()).__name__):
                    await alice.request("bob", "raise", timeout=PATIENCE)
            assert (await alice.request("bob", "fine", timeout=PATIENCE)).payload == "fine"

    play(monkeypatch, scenario)
    assert type(make()).__name__ in caplog.text


def test_aio_plain_handler_of_one_request_at_a_time_needs_no_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It answers before the read ends. What it returns to be awaited runs in a task, and
    so does a coroutine function from its beginning.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            tasks: list[tuple[str, bool]] = []

            def note(where: str) -> None:
                tasks.append((where, asyncio.current_task() is not None))

            async def later(payload: object) -> object:
                note("awaited")
                await asyncio.sleep(0)
                return payload

            def handle(request: aio.Message) -> object:
                note("called")
                return later(request.payload) if request.payload == "later" else request.payload

            async def handle_in_task(request: aio.Message) -> object:
                note("coroutine")
                return request.payload

            bob.on_request(handle)
            for payload in ("first", "second", "later", "third"):
                assert (await alice.request("bob", payload, timeout=5)).payload == payload
            assert tasks == [
                ("called", True),
                ("called", False),
                ("called", False),
                ("awaited", True),
                ("called", False),
            ]
            tasks.clear()
            bob.on_request(handle_in_task)
            for payload in ("first", "second"):
                assert (await alice.request("bob", payload, timeout=5)).payload == payload
            assert tasks == [("coroutine", True)] * 2

    play(monkeypatch, scenario)


def test_aio_plain_handler_answers_in_order_with_requests_that_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob", handlers=1) as bob:
            seen: list[object] = []
            gate = asyncio.Event()

            async def wait(payload: object) -> object:
                await gate.wait()
                return payload

            def handle(request: aio.Message) -> object:
                seen.append(request.payload)
                return wait(request.payload) if request.payload == 1 else request.payload

            bob.on_request(handle)
            await alice.request("bob", 0)
            calls = []
            for number in (1, 2, 3):
                calls.append(asyncio.create_task(alice.request("bob", number)))
                for _ in range(20):
                    # Enough turns of the loop for the request to arrive.
                    await asyncio.sleep(0)
            # The one handler that the client runs at a time waits.
            assert seen == [0, 1]
            gate.set()
            assert [(await call).payload for call in calls] == [1, 2, 3]
            assert seen == [0, 1, 2, 3]

    play(monkeypatch, scenario)


@pytest.mark.parametrize("kind", ["function", "coroutine"])
@pytest.mark.parametrize("make", ERRORS, ids=IDS)
def test_aio_handler_raising_handles_rest_of_batch(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[], BaseException],
    kind: str,
) -> None:
    """After an exception the remaining jobs are handled without another message.

    They are messages, events for a callback and failed sends.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            seen: list[Any] = []
            bob.on_message(handler_that_raises(make, seen, kind))
            await alice.send_many([("bob", payload) for payload in ("raise", 1, "raise", 2, 3)])
            await until(lambda: len(seen) == 5)
            assert seen == ["raise", 1, "raise", 2, 3]

            events: list[Any] = []
            async with bob.subscribe("a", callback=handler_that_raises(make, events, kind)):
                for payload in ("raise", 1, "raise", 2):
                    await alice.publish("a", payload)
                await until(lambda: len(events) == 4)

            failures: list[int] = []

            def undelivered(error: Any) -> None:
                failures.append(error.message_id)
                raise make()

            bob.on_undelivered(undelivered)
            ids = await bob.send_many([("nobody", 1)] * 4)
            await until(lambda: failures == ids)

    play(monkeypatch, scenario)
    assert type(make()).__name__ in caplog.text


@pytest.mark.parametrize("waits", [False, True])
def test_aio_handlers_of_one_read_have_as_many_tasks_as_needed(
    monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    """One task is enough for handlers that do not wait; those that wait run at the same
    time.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            tasks: set[object] = set()
            running = most = 0
            all_run = asyncio.Event()

            async def handle(message: aio.Message) -> object:
                nonlocal running, most
                tasks.add(asyncio.current_task())
                running += 1
                most = max(most, running)
                if running == 256:
                    all_run.set()
                if waits:
                    await all_run.wait()
                running -= 1
                return message.payload

            bob.on_request(handle)
            count = 300 if waits else 100
            calls = [alice.request("bob", number) for number in range(count)]
            replies = await asyncio.gather(*calls)
            assert [reply.payload for reply in replies] == list(range(count))
            # The bytes of a hundred requests come in two pieces.
            assert (most, len(tasks) <= 2) == ((256, False) if waits else (1, True))

    play(monkeypatch, scenario)


def test_aio_handler_cancelled_is_answered_and_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A handler's task ends when the handler or another task cancels it. The next jobs
    get another task.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            seen: list[Any] = []

            async def handle(message: aio.Message) -> object:
                seen.append(message.payload)
                if message.payload == "cancel":
                    task = asyncio.current_task()
                    assert task is not None
                    task.cancel()
                    await asyncio.sleep(0)
                return message.payload

            bob.on_request(handle)
            with pytest.raises(RequestFailed, match="CancelledError"):
                await alice.request("bob", "cancel", timeout=PATIENCE)
            assert (await alice.request("bob", 1, timeout=PATIENCE)).payload == 1
            seen.clear()
            bob.on_message(handle)
            await alice.send_many([("bob", payload) for payload in ("cancel", 1, "cancel", 2)])
            await until(lambda: len(seen) == 4)

    play(monkeypatch, scenario)


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_aio_handler_raising_exit_is_answered_and_ends_loop(
    error: type[BaseException], before: int
) -> None:
    """The exit leaves the loop, as in every task. If the loop is run again, the client
    works on.
    """
    monkeypatch = pytest.MonkeyPatch()
    seen: list[Any] = []
    answers: list[Any] = []

    async def begin() -> tuple[aio.Client, aio.Client]:
        network = MemoryBroker("alice", "bob")
        monkeypatch.setattr("brokerd_client.aio.base.dial", network.dial)
        alice, bob = await network.join("alice"), await network.join("bob")

        def handle(message: aio.Message) -> object:
            seen.append(message.payload)
            if message.payload == "exit":
                raise error
            return message.payload

        bob.on_message(handle)
        bob.on_request(handle)
        return alice, bob

    async def ask(client: aio.Client, payload: str) -> None:
        try:
            answers.append((await client.request("bob", payload, timeout=PATIENCE)).payload)
        except RequestFailed as failed:
            answers.append(str(failed))

    async def close(*clients: aio.Client) -> None:
        for client in clients:
            await client.close()

    loop = asyncio.new_event_loop()
    try:
        alice, bob = loop.run_until_complete(begin())
        for _ in range(before):
            # After an answer, the handler's function is called outside of a task.
            loop.run_until_complete(ask(alice, "before"))
        seen.clear()
        answers.clear()
        request = loop.create_task(ask(alice, "exit"))
        with pytest.raises(error):
            loop.run_until_complete(request)
        loop.run_until_complete(request)
        assert error.__name__ in answers[0]
        sending = loop.create_task(
            alice.send_many([("bob", payload) for payload in ("exit", "more")])
        )
        loop.run_until_complete(sending)
        with pytest.raises(error):
            loop.run_until_complete(asyncio.sleep(0.05))
        loop.run_until_complete(ask(alice, "after"))
        assert answers[1:] == ["after"]
        assert seen == ["exit", "exit", "more", "after"]
        loop.run_until_complete(close(alice, bob))
    finally:
        monkeypatch.undo()
        loop.close()


def test_aio_handler_jobs_left_at_end_of_run_warn_of_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio.run cancels every task of an unclosed client. No task is started for the
    jobs that are left.
    """

    async def main() -> None:
        network = MemoryBroker("alice", "bob")
        monkeypatch.setattr("brokerd_client.aio.base.dial", network.dial)
        alice, bob = await network.join("alice"), await network.join("bob")
        begun = asyncio.Event()

        async def hang(message: aio.Message) -> None:
            begun.set()
            await asyncio.Event().wait()

        bob.on_message(hang)
        bob.on_request(hang)
        await alice.send_many([("bob", 1)] * 3)
        await begun.wait()

    asyncio.run(main())
    assert caplog.records == []


def run_eager(
    scenario: Callable[[MemoryBroker], Awaitable[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a scenario where create_task begins each task at once."""
    factory = getattr(asyncio, "eager_task_factory", None)
    if factory is None:
        pytest.skip("eager tasks are in Python 3.12 and later")

    async def eager(network: MemoryBroker) -> None:
        asyncio.get_running_loop().set_task_factory(factory)
        await scenario(network)

    play(monkeypatch, eager)


@pytest.mark.parametrize("kind", ["function", "coroutine"])
def test_aio_eager_handlers_of_one_read_are_all_called(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Messages, requests and events of one read are all handled, even if nothing else
    arrives.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            seen: list[Any] = []

            def note(message: aio.Message) -> object:
                seen.append(message.payload)
                return message.payload

            async def note_later(message: aio.Message) -> object:
                await asyncio.sleep(0)
                return note(message)

            handler = note if kind == "function" else note_later
            bob.on_message(handler)
            bob.on_request(handler)
            first, second = (
                await bob.subscribe("a", callback=handler),
                await bob.subscribe("b", callback=handler),
            )
            tasks = [
                asyncio.get_running_loop().create_task(
                    alice.request("bob", number, timeout=PATIENCE)
                )
                for number in range(70)
            ]
            await alice.publish("a", "a")
            await alice.publish("b", "b")
            await alice.send("bob", "message")
            replies = await asyncio.gather(*tasks)
            assert [reply.payload for reply in replies] == list(range(70))
            await until(lambda: len(seen) == 73)
            assert {"a", "b", "message"} <= set(seen)
            await first.close()
            await second.close()
            assert all(not workers for workers in bob._workers.values())

    run_eager(scenario, monkeypatch)


@pytest.mark.parametrize("make", ERRORS, ids=IDS)
def test_aio_eager_handler_raising_is_answered(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], BaseException]
) -> None:
    """Eager tasks behave like tasks that begin at the loop's next step."""

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            bob.on_request(handler_that_raises(make, [], "function"))
            for _ in range(70):
                with pytest.raises(RequestFailed):
                    await alice.request("bob", "raise", timeout=PATIENCE)
            assert (await alice.request("bob", "fine", timeout=PATIENCE)).payload == "fine"

    run_eager(scenario, monkeypatch)


def test_aio_eager_handler_closing_client_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """close() is called while the client still passes on the read that brought the
    message.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice:
            bob = await network.join("bob")

            async def handle(message: aio.Message) -> None:
                await bob.close()

            bob.on_message(handle)
            await alice.send_many([("bob", 1)] * 3)
            await until(lambda: bob.closed and not bob._transports)
            await bob.close()

    run_eager(scenario, monkeypatch)
