"""Tasks of the asyncio client, cancelled at every step of the loop, including the step
in which their result arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from support.fake_broker import FakeServer
from support.memory_broker import PATIENCE, MemoryBroker, play

from brokerd_client import aio
from brokerd_client.errors import Closed, TimedOut

#: An upper limit of the loop's steps per call.
MOST_STEPS = 60


class Cancelling:
    """Starts a call as a task, and cancels it at one of many moments.

    Each moment needs an instance.

    Args:
        step: Steps of the loop after which the task is cancelled.
        delivery: Number of the delivery, counted from 0, in whose callback the task is
            cancelled.
        early: Whether to cancel before the bytes are handed over, or just after.
        again: Steps after which a second cancel follows.
    """

    def __init__(
        self,
        network: MemoryBroker,
        *,
        step: int = -1,
        delivery: int = -1,
        early: bool = False,
        again: int = -1,
    ) -> None:
        self._network = network
        self._step = step
        self._delivery = delivery
        self._early = early
        self._again = again

    async def run(self, call: Callable[[], Awaitable[Any]]) -> bool:
        """Return whether the call was over before it could be cancelled."""

        async def act() -> Any:
            return await call()

        task = asyncio.get_running_loop().create_task(act())
        seen = 0

        def count(name: str) -> None:
            nonlocal seen
            if seen == self._delivery:
                task.cancel()
            seen += 1

        if self._delivery >= 0:
            setattr(self._network, "before" if self._early else "after", count)
        for step in range(MOST_STEPS):
            if step == self._step:
                task.cancel()
            if self._again >= 0 and step == self._step + self._again:
                task.cancel()
            if task.done():
                break
            await asyncio.sleep(0)
        self._network.before = self._network.after = lambda name: None
        try:
            await task
        except asyncio.CancelledError:
            return False
        return True


def moments(network: MemoryBroker, *, twice: bool = False) -> list[Cancelling]:
    """Return a Cancelling for each moment of a call."""
    if twice:
        return [
            Cancelling(network, step=step, again=again)
            for step in range(40)
            for again in range(1, 4)
        ]
    found = [Cancelling(network, step=step) for step in range(40)]
    for early in (True, False):
        found += [Cancelling(network, delivery=number, early=early) for number in range(6)]
    return found


def require_nothing_left(client: aio.Client, network: MemoryBroker) -> None:
    """Raise AssertionError if the client or the broker still holds state of a call."""
    dialog = client._dialog
    assert len(dialog.pending_calls) == 0
    assert len(dialog.subscriptions) == 0
    assert dialog._watches == {}
    assert client._subscriptions == set()
    assert client._clear_waiters == []
    assert not client._inbox._waiters
    assert network.broker.online[client.name].subscriptions == []


Call = Callable[[aio.Client], Awaitable[Any]]
CALLS: dict[str, Call] = {
    "ping": lambda alice: alice.ping(),
    "clients": lambda alice: alice.clients(),
    "request": lambda alice: alice.request("bob", "question"),
    "send_confirmed": lambda alice: alice.send_confirmed("bob", "x"),
    "send_many_confirmed": lambda alice: alice.send_many_confirmed([("bob", "x")] * 3),
    "publish_confirmed": lambda alice: alice.publish_confirmed("a.b", "x"),
}


async def _enter(opening: Any) -> None:
    async with opening:
        await asyncio.sleep(0)


OPENINGS: dict[str, Call] = {
    "subscribe": lambda alice: _close_after(alice.subscribe("a.>")),
    "watch_presence": lambda alice: _close_after(alice.watch_presence()),
    "async with subscribe": lambda alice: _enter(alice.subscribe("a.>", "group")),
    "async with watch_presence": lambda alice: _enter(alice.watch_presence()),
}


async def _close_after(opening: Any) -> None:
    # No step between: what was opened can be closed.
    opened = await opening
    await opened.close()


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("call", [*CALLS.values(), *OPENINGS.values()], ids=[*CALLS, *OPENINGS])
def test_aio_call_cancelled_at_any_step_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, call: Call, twice: bool
) -> None:
    """The client's tables and the broker's subscriptions are empty after each
    cancellation, and the client works on.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            bob.on_request(lambda message: "answer")
            outcomes = set()
            for cancelling in moments(network, twice=twice):
                outcomes.add(await cancelling.run(lambda: call(alice)))
                await alice.ping()
                require_nothing_left(alice, network)
            # The moments cover the whole call: some cancels come in time, some too
            # late.
            assert outcomes == {True, False}

    play(monkeypatch, scenario)


def test_aio_subscription_cancelled_at_answer_gets_no_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Events of a subscription that its task never got do not fill the inbox."""

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice", inbox=1 << 14) as alice, network.join("bob") as bob:
            for delivery in range(3):
                for opening in (lambda: alice.subscribe("a"), lambda: alice.watch_presence()):
                    await Cancelling(network, delivery=delivery).run(
                        lambda opening=opening: _close_after(opening())
                    )
            for _ in range(100):
                await bob.publish("a", bytes(1000))
            await bob.send("alice", "still here")
            assert (await alice.recv(PATIENCE)).payload == "still here"
            assert alice._meter.held <= 1 << 14

    play(monkeypatch, scenario)


def test_aio_unsubscribe_cancelled_ends_subscription(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The broker gets the unsubscribe whether or not the calling task waits for the
    answer.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice:
            for twice in (False, True):
                for cancelling in moments(network, twice=twice):
                    subscription = await alice.subscribe("a.>")
                    await cancelling.run(subscription.unsubscribe)
                    if not subscription.queue.ended:
                        # Cancelled before its first step.
                        await subscription.unsubscribe()
                    await alice.ping()
                    require_nothing_left(alice, network)

    play(monkeypatch, scenario)


def test_aio_connect_cancelled_at_any_step_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection stays open, and no task runs (see play)."""

    async def scenario(network: MemoryBroker) -> None:
        for twice in (False, True):
            outcomes = set()
            for cancelling in moments(network, twice=twice):
                outcomes.add(await cancelling.run(lambda: _enter(network.join("alice"))))
                for _ in range(5):
                    await asyncio.sleep(0)
                assert network.transports == set()
            assert outcomes == {True, False}

    play(monkeypatch, scenario)


def test_aio_close_cancelled_at_any_step_closes_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks waiting for a message or an answer get Closed, and the connection ends."""

    async def scenario(network: MemoryBroker) -> None:
        for twice in (False, True):
            for cancelling in moments(network, twice=twice):
                alice = await network.join("alice")
                waiting = asyncio.ensure_future(alice.recv())
                request = asyncio.ensure_future(alice.request("alice", "question", timeout=None))
                await asyncio.sleep(0)
                network.transports.copy().pop()._reading = False
                if not await cancelling.run(alice.close) and not alice.closed:
                    # Cancelled before its first step.
                    await alice.close()
                for task in (waiting, request):
                    with pytest.raises(Closed):
                        await asyncio.wait_for(task, PATIENCE)
                for _ in range(5):
                    await asyncio.sleep(0)
                assert network.transports == set()
                await alice.close()

    play(monkeypatch, scenario)


def test_aio_close_cancelled_during_flush_closes_client(server: FakeServer) -> None:
    """A broker that reads nothing delays close(). The cancelled close() has closed the
    client all the same.
    """

    async def main() -> None:
        alice = await aio.connect(server.path, "alice", "alice")
        waiting = asyncio.ensure_future(alice.recv())
        server.act(lambda broker: setattr(server, "reading", False))
        await alice.send("bob", bytes(5_000_000))
        closing = asyncio.ensure_future(alice.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert alice.closed
        with pytest.raises(Closed):
            await asyncio.wait_for(waiting, PATIENCE)
        await alice.close()

    asyncio.run(main())


@pytest.mark.parametrize("how", ["recv", "recv in time", "anext", "subscription"])
def test_aio_recv_cancelled_at_any_step_loses_no_message(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Each message is returned by one call, in order, whichever calls are cancelled and
    at whatever step.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            subscription = await bob.subscribe("a")
            take: Callable[[], Awaitable[Any]] = {
                "recv": lambda: bob.recv(),
                "recv in time": lambda: bob.recv(PATIENCE),
                "anext": lambda: anext(bob),
                "subscription": lambda: subscription.recv(),
            }[how]
            got: list[int] = []
            sent = 0

            async def taking() -> None:
                # Kept in the same step: a result that the caller never sees is lost to
                # it by its own doing.
                got.append((await take()).payload)

            for cancelling in [*moments(network), *moments(network, twice=True)]:
                if how == "subscription":
                    await alice.publish("a", sent)
                else:
                    await alice.send("bob", sent)
                sent += 1
                await cancelling.run(taking)
            await alice.ping()
            await bob.ping()
            while len(got) < sent:
                got.append((await asyncio.wait_for(take(), PATIENCE)).payload)
            assert got == list(range(sent))
            await subscription.close()
            require_nothing_left(bob, network)

    play(monkeypatch, scenario)


def test_aio_recv_with_closed_coroutine_takes_no_wakeup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A recv() with a closed coroutine is not woken instead of a recv() that waits."""

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            abandoned = bob.recv()
            abandoned.send(None)
            waiting = asyncio.ensure_future(bob.recv())
            await asyncio.sleep(0)
            abandoned.close()
            await alice.send("bob", "x")
            assert (await asyncio.wait_for(waiting, PATIENCE)).payload == "x"

    play(monkeypatch, scenario)


@pytest.mark.slow
def test_aio_calls_cancelled_at_random_leave_nothing(server: FakeServer) -> None:
    """Thousands of calls run over a real socket, each cancelled at a random moment.
    Nothing is left in the tables, and no call hangs.
    """
    random_moment = random.Random(29)

    async def one(alice: aio.Client, bob: aio.Client) -> None:
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: _close_after(alice.subscribe("a.>")),
            lambda: _close_after(alice.watch_presence()),
            lambda: _enter(alice.subscribe("b", "group")),
            lambda: alice.request("bob", 1),
            lambda: alice.send_confirmed("bob", 1),
            lambda: alice.recv(0.01),
        ]

        async def act() -> None:
            with contextlib.suppress(TimedOut):
                await random_moment.choice(calls)()

        task = asyncio.get_running_loop().create_task(act())
        for _ in range(random_moment.choice((1, 2, 5, 20))):
            await asyncio.sleep(random_moment.choice((0, 0, 0.0005)))
        task.cancel()
        if random_moment.random() < 0.3:
            await asyncio.sleep(0)
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def main() -> None:
        async with (
            aio.connect(server.path, "alice", "alice", inbox=1 << 16) as alice,
            aio.connect(server.path, "bob", "bob") as bob,
        ):
            bob.on_request(lambda message: message.payload)
            bob.on_message(lambda message: None)
            loop = asyncio.get_running_loop()
            ends = loop.time() + 25
            done = 0
            while loop.time() < ends:
                await asyncio.gather(*(one(alice, bob) for _ in range(20)))
                await bob.publish("a.b", bytes(500))
                done += 20
            await alice.ping()
            assert done > 1000
            assert len(alice._dialog.pending_calls) == 0
            assert len(alice._dialog.subscriptions) == 0
            assert alice._dialog._watches == {}
            assert alice._subscriptions == set()
            assert server.broker.online["alice"].subscriptions == []

    asyncio.run(main())
