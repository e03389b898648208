"""A broker drains under clients of the library: they are notified, and reconnect when
another broker serves.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from brokerd.testing import RunningBroker
from brokerd_client.errors import BrokerdError, Offline

TIMEOUT_S = 30.0


def test_drain_event_reaches_blocking_client_which_reconnects() -> None:
    """The event is its last message. Then calls fail until a broker is there again, and
    the subscription is made again.
    """
    with RunningBroker({"alice": {}, "bob": {}}) as broker:
        alice, bob = broker.connect("alice"), broker.connect("bob")
        draining = bob.subscribe("$broker.draining")
        broker.stop()
        assert draining.recv(timeout=TIMEOUT_S).topic == "$broker.draining"
        broker.start()
        _until_it_succeeds(lambda: alice.ping())
        _until_it_succeeds(lambda: bob.ping())
        alice.send_confirmed("bob", b"back", timeout=TIMEOUT_S)
        assert bob.recv(timeout=TIMEOUT_S).payload == b"back"
        broker.stop()
        assert draining.recv(timeout=TIMEOUT_S).topic == "$broker.draining"


def test_drain_event_reaches_asyncio_client_which_reconnects() -> None:
    """The same with asyncio."""

    async def run(broker: RunningBroker) -> None:
        alice, bob = await broker.connect_async("alice"), await broker.connect_async("bob")
        async with alice, bob:
            draining = await bob.subscribe("$broker.draining")
            await asyncio.to_thread(broker.stop)
            assert (await draining.recv(timeout=TIMEOUT_S)).topic == "$broker.draining"
            await asyncio.to_thread(broker.start)
            await _until_it_succeeds_aio(lambda: alice.ping())
            await _until_it_succeeds_aio(lambda: bob.ping())
            await alice.send_confirmed("bob", b"back", timeout=TIMEOUT_S)
            assert (await bob.recv(timeout=TIMEOUT_S)).payload == b"back"

    with RunningBroker({"alice": {}, "bob": {}}) as broker:
        asyncio.run(run(broker))


def test_drain_reports_undelivered_messages_to_sender() -> None:
    """If the recipient does not read, the sender's on_undelivered gets each message
    before the connection ends.
    """
    reported: list[BrokerdError] = []
    done = threading.Event()

    def report(error: BrokerdError) -> None:
        reported.append(error)
        done.set()

    with RunningBroker({"alice": {}, "bob": {}}, limits={"drain_timeout": "300ms"}) as broker:
        alice = broker.connect("alice")
        alice.on_undelivered(report)
        # A client of the library reads on until its inbox is full: more than that, and
        # than the system takes.
        broker.connect("bob", inbox=1)
        for _ in range(80):
            alice.send("bob", bytes(100_000))
        alice.ping()
        broker.stop()
        assert done.wait(TIMEOUT_S)
        assert {type(error) for error in reported} == {Offline}
        assert len(reported) > 1


def _until_it_succeeds(call: Callable[[], object]) -> None:
    for _ in range(1000):
        try:
            call()
        except BrokerdError:
            threading.Event().wait(0.05)
        else:
            return
    pytest.fail("it does not come back")


async def _until_it_succeeds_aio(call: Callable[[], Awaitable[object]]) -> None:
    for _ in range(1000):
        try:
            await call()
        except BrokerdError:
            await asyncio.sleep(0.05)
        else:
            return
    pytest.fail("it does not come back")
