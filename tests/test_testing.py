"""The broker for users' tests, used as its documentation says."""

from __future__ import annotations

import asyncio
import threading
from time import monotonic

import pytest

from brokerd.testing import RunningBroker, broker, running
from brokerd_client.errors import Denied, NoSuchClient

assert broker, "the fixture is used by name"


def test_testing_broker_connect_creates_client_on_demand(broker: RunningBroker) -> None:
    """Two clients without a configuration exchange a message through a real broker."""
    alice, bob = broker.connect("alice"), broker.connect("bob")
    alice.send("bob", "hello")
    assert bob.recv(timeout=5).payload == "hello"


def test_testing_broker_client_entry_takes_configuration_keys() -> None:
    """A client's entry takes the keys of the configuration file, before or while the
    broker runs.
    """
    with running({"alice": {"send_to": ["carol"]}, "bob": {}, "carol": {}}) as broker:
        alice = broker.connect("alice")
        with pytest.raises(Denied):
            alice.send_confirmed("bob", "hello")
        broker.add("alice", send_to=["bob"])
        broker.connect("bob")
        alice.send_confirmed("bob", "hello")


def test_testing_broker_connect_async_gives_aio_client(broker: RunningBroker) -> None:
    """An asyncio client and a blocking one use the same broker."""

    async def ask() -> object:
        client = await broker.connect_async("alice")
        async with client:
            return (await client.request("bob", "status?", timeout=5)).payload

    bob = broker.connect("bob")
    bob.on_request(lambda message: "fine")
    assert asyncio.run(ask()) == "fine"


def test_testing_broker_restarted_keeps_address(broker: RunningBroker) -> None:
    """After a kill and a start the clients reconnect by themselves."""
    alice = broker.connect("alice")
    address = broker.address
    broker.kill()
    broker.start()
    assert broker.address == address
    # A command sent before the client detects the kill may fail with the old connection.
    deadline = monotonic() + 30
    while not alice.counters["losses"]:
        assert monotonic() < deadline
        threading.Event().wait(0.005)
    assert alice.control("whoami", timeout=10)["name"] == "alice"


def test_testing_broker_stats_hold_broker_counters(broker: RunningBroker) -> None:
    """A test can assert on counters without an administrator's client."""
    alice = broker.connect("alice")
    with pytest.raises(NoSuchClient):
        alice.send_confirmed("nobody", "hello")
    assert broker.stats()["refused"] == {"no_such_client": 1}
