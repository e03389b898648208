"""A broker drains under load: every plain send arrives, or its sender gets one error
for it.
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
from support.outages.drain_load import BURST, TIMEOUT_S, SendAccount, run_asyncio, run_blocking

from brokerd.testing import RunningBroker
from brokerd_client import Client
from brokerd_client.aio import Client as AsyncClient
from brokerd_client.blocking.base import BaseClient
from brokerd_client.protocol import backoff

CLIENTS = {"alice": {}, "absent": {}, "bob": {"queue": "64MiB"}, "ops": {"admin": True}}


class InProcessBroker:
    """A broker in this process, with the options to connect to it."""

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
        """Stop the broker, by turns with its own stop() and by the operation of
        ``brokerctl drain``.
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
        """Let the broker send its goaway, and return when it has."""
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
def stoppable(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[InProcessBroker]:
    """Return a broker with clients that reconnect at once, so that many stops take
    little time.
    """
    monkeypatch.setattr(backoff, "delay", lambda attempt, chance: 0.01)
    if request.param == "plain":
        with RunningBroker(CLIENTS, limits={"drain_timeout": "20s"}) as broker:
            yield InProcessBroker(broker, {})
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
        yield InProcessBroker(broker, {"ssl": context})


def test_goaway_unread_by_blocking_client_reports_each_send(
    stoppable: InProcessBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker has sent its goaway, and the client has not read it yet. The client
    gets the outcome of each send.
    """
    broker, account = stoppable.broker, SendAccount()
    alice = broker.connect("alice", **stoppable.options)
    alice.on_undelivered(account.report)
    alice.ping()
    reads_on = threading.Event()
    act = BaseClient._on_ready

    def late(self: BaseClient, *, readable: bool, writable: bool) -> None:
        reads_on.wait(TIMEOUT_S)
        act(self, readable=readable, writable=writable)

    monkeypatch.setattr(BaseClient, "_on_ready", late)
    stoppable.begin_to_stop()
    for _ in range(BURST):
        account.note(alice.send("absent", account.next_body()))
    reads_on.set()
    stoppable.end_stop()
    broker.start()
    alice.ping()
    alice.close()
    assert account.reported == dict.fromkeys(account.sent, 1)


def test_goaway_unread_by_asyncio_client_reports_each_send(stoppable: InProcessBroker) -> None:
    """The broker has sent its goaway, and the client has not read it yet. The client
    gets the outcome of each send.
    """
    broker, account = stoppable.broker, SendAccount()

    async def run() -> None:
        alice = await broker.connect_async("alice", **stoppable.options)
        alice.on_undelivered(account.report)
        await alice.ping()
        # The client's event loop stands still meanwhile, and writes what is sent before
        # it reads.
        stoppable.begin_to_stop()
        for _ in range(BURST):
            account.note(await alice.send("absent", account.next_body()))
        await asyncio.to_thread(stoppable.end_stop)
        await asyncio.to_thread(broker.start)
        await alice.ping()
        await alice.close()

    asyncio.run(run())
    assert account.reported == dict.fromkeys(account.sent, 1)


def test_drain_under_load_of_blocking_client_loses_nothing(stoppable: InProcessBroker) -> None:
    run_blocking(stoppable, 2)


def test_drain_under_load_of_asyncio_client_loses_nothing(stoppable: InProcessBroker) -> None:
    asyncio.run(run_asyncio(stoppable, 2))


@pytest.mark.slow
def test_drain_300_times_under_load_of_blocking_client_loses_nothing(
    stoppable: InProcessBroker,
) -> None:
    run_blocking(stoppable, 300)


@pytest.mark.slow
def test_drain_300_times_under_load_of_asyncio_client_loses_nothing(
    stoppable: InProcessBroker,
) -> None:
    asyncio.run(run_asyncio(stoppable, 300))
