"""The broker for other people's tests, used as its documentation says."""

from __future__ import annotations

import asyncio
import threading
from time import monotonic

import pytest

from brokerd.testing import RunningBroker, broker, running
from brokerd_client.errors import Denied, NoSuchClient

assert broker, "the fixture is used by name"


def test_clients_are_made_as_they_are_asked_for(broker: RunningBroker) -> None:
    """Two names never configured exchange a message through a real broker."""
    alice, bob = broker.connect("alice"), broker.connect("bob")
    alice.send("bob", "hello")
    assert bob.recv(timeout=5).payload == "hello"


def test_entries_are_those_of_the_configuration_file() -> None:
    """What the file could say of a client can be said here, before or while it runs."""
    with running({"alice": {"send_to": ["carol"]}, "bob": {}, "carol": {}}) as here:
        alice = here.connect("alice")
        with pytest.raises(Denied):
            alice.send_confirmed("bob", "hello")
        here.add("alice", send_to=["bob"])
        here.connect("bob")
        alice.send_confirmed("bob", "hello")


def test_asyncio_clients_connect_too(broker: RunningBroker) -> None:
    """An asyncio client and a blocking one meet at the same broker."""

    async def ask() -> object:
        client = await broker.connect_async("alice")
        async with client:
            return (await client.request("bob", "status?", timeout=5)).payload

    bob = broker.connect("bob")
    bob.on_request(lambda message: "fine")
    assert asyncio.run(ask()) == "fine"


def test_it_comes_back_at_the_same_address(broker: RunningBroker) -> None:
    """After a kill and a start the clients find it again by themselves."""
    alice = broker.connect("alice")
    address = broker.address
    broker.kill()
    broker.start()
    assert broker.address == address
    # What is asked before she knows of the kill may go to the connection that was lost,
    # and says so.
    deadline = monotonic() + 30
    while not alice.counters["losses"]:
        assert monotonic() < deadline
        threading.Event().wait(0.005)
    assert alice.control("whoami", timeout=10)["name"] == "alice"


def test_stats_are_the_brokers_own(broker: RunningBroker) -> None:
    """Counters can be asserted on without an administrator's client."""
    alice = broker.connect("alice")
    with pytest.raises(NoSuchClient):
        alice.send_confirmed("nobody", "hello")
    assert broker.stats()["refused"] == {"no_such_client": 1}
