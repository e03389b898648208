"""A broker that is stopped under load: every plain send arrives, or its sender hears
that it did not, once.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from support.outages.stops import BURST, TIMEOUT_S, StopAccount, run_asyncio, run_blocking

from brokerd.testing import RunningBroker
from brokerd_client import Client
from brokerd_client.aio import Client as AsyncClient
from brokerd_client.blocking.base import BaseClient
from brokerd_client.protocol import backoff

CLIENTS = {"alice": {}, "absent": {}, "bob": {"queue": "64MiB"}, "ops": {"admin": True}}


class Place:
    """A broker, and what its clients need to reach it."""

    def __init__(self, broker: RunningBroker, options: dict[str, Any]) -> None:
        self.broker = broker
        self.options = options

    def connect(self, name: str) -> Client:
        return self.broker.connect(name, **self.options)

    async def connect_async(self, name: str) -> AsyncClient:
        return await self.broker.connect_async(name, **self.options)

    def start(self) -> None:
        self.broker.start()

    def stop(self, number: int) -> None:
        """Have the broker end: by its own stop(), or asked for by an administrator as
        ``brokerctl drain`` does.
        """
        daemon = self.broker._daemon
        assert daemon is not None
        if number % 2:
            with self.connect("ops") as ops:
                assert ops.control("drain") == {"draining": True}
                self.broker._on_loop(daemon.stopped.wait())
            self.broker._daemon = None
        else:
            self.broker.stop()

    def begin_to_stop(self) -> None:
        """Have the broker tell its clients that it ends, and return when it has."""
        daemon = self.broker._daemon
        assert daemon is not None

        async def begin() -> None:
            daemon.stop_soon("the test says so")
            for _ in range(50):
                await asyncio.sleep(0.001)

        self.broker._on_loop(begin())

    def end_stop(self) -> None:
        daemon = self.broker._daemon
        assert daemon is not None
        self.broker._on_loop(daemon.stopped.wait())
        self.broker._daemon = None


@pytest.fixture(params=["plain", "tls"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """Return a broker with clients that connect again at once: many stops are not to
    take their waits.
    """
    monkeypatch.setattr(backoff, "delay", lambda attempt, chance: 0.01)
    if request.param == "plain":
        with RunningBroker(CLIENTS, limits={"drain_timeout": "20s"}) as broker:
            yield Place(broker, {})
        return
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    certificate, key = tmp_path / "s.pem", tmp_path / "s.key"
    made.cert_chain_pems[0].write_to_path(certificate)
    key.touch(mode=0o600)
    made.private_key_pem.write_to_path(key)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    tls = {"certificate": str(certificate), "key": str(key)}
    with RunningBroker(CLIENTS, limits={"drain_timeout": "20s"}, tls=tls) as broker:
        yield Place(broker, {"ssl": context})


def test_goaway_unread_by_blocking_client_reports_each_send(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker has sent its goaway, and the client has not read it yet. The client
    gets the outcome of each send.
    """
    broker, account = place.broker, StopAccount()
    alice = broker.connect("alice", **place.options)
    alice.on_undelivered(account.hear)
    alice.ping()
    reads_on = threading.Event()
    act = BaseClient._on_ready

    def late(self: BaseClient, *, readable: bool, writable: bool) -> None:
        reads_on.wait(TIMEOUT_S)
        act(self, readable=readable, writable=writable)

    monkeypatch.setattr(BaseClient, "_on_ready", late)
    place.begin_to_stop()
    for _ in range(BURST):
        account.note(alice.send("absent", account.next_body()))
    reads_on.set()
    place.end_stop()
    broker.start()
    alice.ping()
    alice.close()
    assert account.reported == dict.fromkeys(account.sent, 1)


def test_goaway_unread_by_asyncio_client_reports_each_send(place: Place) -> None:
    """The broker has sent its goaway, and the client has not read it yet. The client
    gets the outcome of each send.
    """
    broker, account = place.broker, StopAccount()

    async def run() -> None:
        alice = await broker.connect_async("alice", **place.options)
        alice.on_undelivered(account.hear)
        await alice.ping()
        # The client's event loop stands still meanwhile, and writes what is sent before
        # it reads.
        place.begin_to_stop()
        for _ in range(BURST):
            account.note(await alice.send("absent", account.next_body()))
        await asyncio.to_thread(place.end_stop)
        await asyncio.to_thread(broker.start)
        await alice.ping()
        await alice.close()

    asyncio.run(run())
    assert account.reported == dict.fromkeys(account.sent, 1)


def test_drain_under_load_of_blocking_client_loses_nothing(place: Place) -> None:
    run_blocking(place, 2)


def test_drain_under_load_of_asyncio_client_loses_nothing(place: Place) -> None:
    asyncio.run(run_asyncio(place, 2))


@pytest.mark.slow
def test_drain_300_times_under_load_of_blocking_client_loses_nothing(place: Place) -> None:
    run_blocking(place, 300)


@pytest.mark.slow
def test_drain_300_times_under_load_of_asyncio_client_loses_nothing(place: Place) -> None:
    asyncio.run(run_asyncio(place, 300))
