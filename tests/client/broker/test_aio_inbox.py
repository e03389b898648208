"""Bytes that the asyncio client counts against ``inbox``, and frames that it reads with
a full inbox.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from support.fake_broker import FakeServer, Session
from support.memory_broker import PATIENCE, MemoryBroker, play

from brokerd_client import aio
from brokerd_client.aio import base as aio_base
from brokerd_client.errors import Closed, Denied
from brokerd_client.wire.envelope import Envelope, ErrorCode, Kind

INBOX = 1 << 14


async def until(condition: Callable[[], bool]) -> None:
    """Run the loop until the condition holds."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.0005)
    raise AssertionError("the condition did not come true")


async def require_reading(alice: aio.Client, bob: aio.Client) -> None:
    """Raise AssertionError if the inbox counts as full although it is empty."""
    await bob.send("alice", "read")
    assert (await alice.recv(PATIENCE)).payload == "read"
    async with alice.subscribe("after") as subscription:
        await bob.publish("after", "event")
        assert (await subscription.recv(PATIENCE)).payload == "event"
    alice._update_reading()
    assert alice._meter.held <= 1000


def test_inbox_after_subscriptions_ended_has_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twelve subscriptions end, each with sixty events that no task took. Messages
    still arrive.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice", inbox=INBOX) as alice, network.join("bob") as bob:
            for _ in range(12):
                async with alice.subscribe("a.>") as subscription:
                    for number in range(61):
                        await bob.publish("a.b", bytes([number]) * 100)
                    assert (await subscription.recv(PATIENCE)).body[0] == 0
                    await until(
                        lambda subscription=subscription: len(subscription.queue.inbox.items) > 30
                    )  # type: ignore[misc]
            await require_reading(alice, bob)

    play(monkeypatch, scenario)


def test_inbox_after_presence_watches_ended_has_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A watch that ends with a hundred changes that no task took counts for nothing."""
    names = ["alice", "bob", *(f"other-{number}" for number in range(100))]

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice", inbox=INBOX) as alice, network.join("bob") as bob:
            for _ in range(5):
                async with alice.watch_presence() as watch:
                    await watch.recv(PATIENCE)
            await require_reading(alice, bob)

    play(monkeypatch, scenario, *names)


def test_inbox_after_subscription_denied_has_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A subscription that is refused on a new connection keeps its events, and they do
    not count.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice", inbox=INBOX) as alice, network.join("bob") as bob:
            subscription = await alice.subscribe("a")
            watch = await alice.watch_presence()
            for number in range(100):
                await bob.publish("a", bytes([number]) * 100)
            await until(lambda: alice._meter.full)

            def refuse(session: Session, envelope: Envelope) -> bool:
                if envelope.name == "$broker" and (
                    b'"topic":"a"' in envelope.payload or b"clients" in envelope.payload
                ):
                    network.broker.refuse(session, envelope, ErrorCode.DENIED)
                    return True
                return False

            network.broker.intercept = refuse
            network.drop("alice")
            await until(
                lambda: subscription.queue.ended is not None and watch.queue.ended is not None
            )
            await require_reading(alice, bob)
            left = [
                (await subscription.recv(PATIENCE)).body[0]
                for _ in range(len(subscription.queue.inbox.items))
            ]
            assert left == list(range(len(left)))
            assert len(left) > 10
            with pytest.raises(Denied):
                await subscription.recv(PATIENCE)

    play(monkeypatch, scenario)


def test_subscription_ended_still_returns_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterating over an ended subscription returns the events that had arrived, and
    then ends.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice", inbox=INBOX) as alice, network.join("bob") as bob:
            subscription = await alice.subscribe("a")
            for number in range(20):
                await bob.publish("a", number)
            await until(lambda: len(subscription.queue.inbox.items) == 20)
            await subscription.unsubscribe()
            assert [event.payload async for event in subscription] == list(range(20))
            with pytest.raises(Closed):
                await subscription.recv(PATIENCE)

    play(monkeypatch, scenario)


def test_inbox_full_client_reconnects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handshake and introduction are read whatever the inbox holds. Requests work, and
    no message is lost.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice", inbox=1 << 16) as alice, network.join("bob") as bob:
            bob.on_request(lambda message: message.payload)
            subscription = await alice.subscribe("a")
            for number in range(200):
                await bob.send("alice", bytes([number]) * 1000)
            await until(lambda: alice._meter.full)
            count = len(alice._inbox.inbox.items)
            assert count > 50
            for losses in (1, 2):
                network.drop("alice")
                await until(
                    lambda losses=losses: alice.connected and alice.counters["losses"] == losses
                )  # type: ignore[misc]
                assert (
                    await alice.request("bob", "still there", timeout=PATIENCE)
                ).payload == "still there"
            await bob.publish("a", "event")
            assert [(await alice.recv(PATIENCE)).body[0] for _ in range(count)] == list(
                range(count)
            )
            assert (await subscription.recv(PATIENCE)).payload == "event"

    play(monkeypatch, scenario)


def test_inbox_full_client_notices_end_of_connection(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that does not read reconnects without a call, and keeps the messages it
    had read.
    """
    monkeypatch.setattr(aio_base, "_END_CHECK_S", 0.01)

    async def main() -> None:
        async with (
            aio.connect(server.path, "alice", "alice", inbox=1 << 12) as alice,
            aio.connect(server.path, "bob", "bob") as bob,
        ):
            for number in range(100):
                await bob.send("alice", bytes([number]) * 1000)
            await until(lambda: alice._transport is not None and not alice._transport.reading)
            server.drop("alice")
            await until(lambda: alice.connected and alice.counters["losses"] == 1)
            count = len(alice._inbox.inbox.items)
            assert [(await alice.recv(PATIENCE)).body[0] for _ in range(count)] == list(
                range(count)
            )
            assert await alice.ping() >= 0

    asyncio.run(main())


def test_inbox_full_before_introduction_client_becomes_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Messages that come between handshake and introduction do not keep a client from
    becoming ready.
    """

    async def scenario(network: MemoryBroker) -> None:
        def flood(session: Session, envelope: Envelope) -> bool:
            if session.name == "alice" and b"whoami" in envelope.payload:
                for number in range(100):
                    session.deliver(Envelope(Kind.MESSAGE, number, "bob", bytes(1000)))
                    network.pump_all()
            return False

        network.broker.intercept = flood
        async with network.join("alice", inbox=1 << 12, timeout=5) as alice:
            network.broker.intercept = None
            assert [(await alice.recv(PATIENCE)).id for _ in range(100)] == list(range(100))
            assert alice.connected

    play(monkeypatch, scenario)


def test_inbox_full_socket_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit itself still holds: a ready connection reads nothing more until the
    inbox has room.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice", inbox=INBOX) as alice, network.join("bob") as bob:
            for _ in range(200):
                await bob.send("alice", bytes(1000))
                await asyncio.sleep(0)
            await bob.ping()
            held = alice._meter.held
            assert INBOX < held < 2 * INBOX
            assert [len((await alice.recv(PATIENCE)).body) for _ in range(200)] == [1000] * 200

    play(monkeypatch, scenario)
