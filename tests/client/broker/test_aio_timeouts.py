"""Timeouts of the asyncio client: every number is either used or refused, and a step of
an iterator that times out ends nothing.
"""

# ruff: noqa: ASYNC109 - timeouts are passed on to calls that take them
from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from support.client_faces import Asyncio, Face
from support.fake_broker import FakeServer
from support.memory_broker import PATIENCE, MemoryBroker, play

from brokerd_client import aio
from brokerd_client.errors import Denied, TimedOut

#: Every call that takes a timeout.
CALLS: dict[str, Callable[[aio.Client, Any], Awaitable[Any]]] = {
    "send": lambda client, timeout: client.send("bob", 1, timeout=timeout),
    "send_confirmed": lambda client, timeout: client.send_confirmed("bob", 1, timeout=timeout),
    "send_many": lambda client, timeout: client.send_many([("bob", 1)], timeout=timeout),
    "send_many_confirmed": lambda client, timeout: client.send_many_confirmed(
        [("bob", 1)], timeout=timeout
    ),
    "request": lambda client, timeout: client.request("bob", 1, timeout=timeout),
    "publish": lambda client, timeout: client.publish("t", 1, timeout=timeout),
    "publish_confirmed": lambda client, timeout: client.publish_confirmed("t", 1, timeout=timeout),
    "recv": lambda client, timeout: client.recv(timeout),
    "subscribe": lambda client, timeout: _closed(client.subscribe("t", timeout=timeout)),
    "watch_presence": lambda client, timeout: _closed(client.watch_presence(timeout=timeout)),
    "control": lambda client, timeout: client.control("ping", timeout=timeout),
    "subscription": lambda client, timeout: _received(client, timeout),
}


async def _closed(opening: Any) -> None:
    await (await opening).close()


async def _received(client: aio.Client, timeout: Any) -> None:
    async with client.subscribe("to.me") as subscription:
        await client.publish("to.me", 1)
        await subscription.recv(timeout)


def uvloop_face() -> Face:
    """Return the asyncio client on uvloop."""
    return Asyncio(pytest.importorskip("uvloop").new_event_loop)


@pytest.mark.parametrize("make", [Asyncio, uvloop_face], ids=["asyncio", "uvloop"])
def test_timeout_infinite_or_huge_is_accepted(server: FakeServer, make: Callable[[], Face]) -> None:
    """With infinity, 1e10 and more every call works as with a small number, connect()
    too.
    """
    face = make()
    try:
        bob = face.connect(server.path, "bob", "bob")
        bob.on_request(lambda message: message.payload)
        for timeout in (math.inf, 1e10, 10**400, 1e300, 1 << 40, None):
            alice = face.connect(server.path, "alice", "alice", timeout=timeout)
            for name, call in CALLS.items():
                if name == "recv":
                    bob.send("alice", 1)
                face.run(
                    lambda call=call, client=alice._inner, timeout=timeout: call(client, timeout)
                )  # type: ignore[misc]
            alice.close()
    finally:
        face.close()


@pytest.mark.parametrize("timeout", [math.nan, -1, -0.001, -math.inf, -(10**400)])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_timeout_invalid_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[aio.Client, Any], Awaitable[Any]],
    timeout: float,
) -> None:
    """The ValueError says what a timeout is. Nothing was sent, and nothing is left."""

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob"):
            network.broker.seen.clear()
            with pytest.raises(
                ValueError, match="a timeout is a number of seconds of at least 0, not"
            ):
                await call(alice, timeout)
            assert not any(
                envelope.name == "bob" or envelope.topic == "t" for envelope in network.broker.seen
            )
            assert len(alice._dialog.pending_calls) == 0
            with pytest.raises(
                TypeError, match="a timeout is a number of seconds or None, not str"
            ):
                await call(alice, "5")

    play(monkeypatch, scenario)


def test_connect_timeout_invalid_is_refused() -> None:
    """The error comes before anything is opened."""
    for timeout in (math.nan, -1):
        with pytest.raises(ValueError, match="timeout"):
            aio.connect("/nowhere", "alice", "k", timeout=timeout)


@pytest.mark.parametrize("how", ["subscription", "aiter", "opening", "messages"])
def test_anext_timed_out_keeps_iterator(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The next step returns the next item, and ``async for`` goes on with the items
    after it.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            subscription = await alice.subscribe("a")
            iterator: Any = {
                "subscription": subscription,
                "aiter": aiter(subscription),
                "opening": aiter(alice.subscribe("a")),
                "messages": alice,
            }[how]

            async def send(number: int) -> None:
                await (bob.send("alice", number) if how == "messages" else bob.publish("a", number))

            for number in range(3):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(iterator), 0.01)
                await send(number)
                assert (await asyncio.wait_for(anext(iterator), PATIENCE)).payload == number
            for number in range(3, 6):
                await send(number)
            got = []
            async for message in iterator:
                got.append(message.payload)
                if len(got) == 3:
                    break
            assert got == [3, 4, 5]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(iterator), 0.01)
            await alice.close()
            with pytest.raises(StopAsyncIteration):
                await anext(iterator)

    play(monkeypatch, scenario)


@pytest.mark.parametrize("opened", [True, False], ids=["watch", "opening"])
def test_presence_anext_timed_out_keeps_iterator(
    monkeypatch: pytest.MonkeyPatch, opened: bool
) -> None:
    """A later change of presence is still returned."""

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice:
            iterator: Any = (
                await alice.watch_presence() if opened else aiter(alice.watch_presence())
            )
            first = [(await asyncio.wait_for(anext(iterator), PATIENCE)).name for _ in range(3)]
            assert sorted(first) == ["alice", "bob", "carol"]
            for online in (True, False):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(iterator), 0.01)
                if online:
                    bob = await network.join("bob")
                else:
                    await bob.close()
                change = await asyncio.wait_for(anext(iterator), PATIENCE)
                assert (change.name, change.online) == ("bob", online)
            if opened:
                await iterator.close()
            else:
                await iterator.aclose()

    play(monkeypatch, scenario)


def test_iterator_dropped_closes_subscription(monkeypatch: pytest.MonkeyPatch) -> None:
    """The subscription ends after break and after aclose(). It also ends when the
    iterator's first step is cancelled before it exists.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            subscriptions = network.broker.online["alice"].subscriptions

            async def require_none() -> None:
                for _ in range(20):
                    await asyncio.sleep(0)
                assert subscriptions == []
                assert alice._subscriptions == set()

            sending = asyncio.ensure_future(_publish_often(bob))
            async for event in alice.subscribe("a"):
                assert subscriptions == [("a", "")]
                assert event.topic == "a"
                break
            sending.cancel()
            await require_none()

            iterator: Any = aiter(alice.subscribe("a"))
            for _ in range(3):
                task = asyncio.ensure_future(anext(iterator))
                await asyncio.sleep(0)
                task.cancel()
                await require_none()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(iterator), 0.01)
            assert subscriptions == [("a", "")]
            await iterator.aclose()
            await require_none()
            with pytest.raises(StopAsyncIteration):
                await anext(iterator)

            denied: Any = aiter(alice.subscribe("denied"))
            with pytest.raises(Denied):
                await anext(denied)
            with pytest.raises(StopAsyncIteration):
                await anext(denied)
            await require_none()

    play(monkeypatch, scenario)


async def _publish_often(client: aio.Client) -> None:
    while True:
        await client.publish("a", 1)
        await asyncio.sleep(0.001)


def test_subscription_recv_timed_out_keeps_subscription(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timeout of 0 takes what is there, and TimedOut ends nothing."""

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, alice.subscribe("a") as subscription:
            for number in range(3):
                with pytest.raises(TimedOut):
                    await subscription.recv(0)
                await alice.publish("a", number)
                await alice.ping()
                assert (await subscription.recv(0)).payload == number

    play(monkeypatch, scenario)
