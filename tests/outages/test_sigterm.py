"""SIGTERM to a broker process under load: every plain send arrives, or its sender gets
one error for it.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.broker_process import BrokerProcess
from support.keys import key_of
from support.outages.drain_load import run_asyncio, run_blocking
from support.outages.transports import Transport

from brokerd_client import Client, connect
from brokerd_client.aio import Client as AsyncClient
from brokerd_client.aio import connect as connect_async
from brokerd_client.protocol import backoff

CLIENTS: dict[str, Any] = {"alice": {}, "bob": {"queue": "64MiB"}}


class ProcessBroker:
    """A broker as a process of its own, with the options to connect to it."""

    def __init__(self, directory: Path, transport: Transport) -> None:
        self._directory = directory
        self._transport = transport
        self._listen = transport.listen()
        self._broker = self._process()
        self._address = str(transport.address(self._broker))
        self._listen = transport.listen_again(self._broker)

    def _process(self) -> BrokerProcess:
        return BrokerProcess(
            self._directory, CLIENTS, listen=self._listen, limits={"drain_timeout": "20s"}
        )

    def connect(self, name: str) -> Client:
        return connect(self._address, name, key=key_of(name), ssl=self._transport.context)

    async def connect_async(self, name: str) -> AsyncClient:
        return await connect_async(
            self._address, name, key=key_of(name), ssl=self._transport.context
        )

    def stop(self, number: int) -> None:
        self._broker.signal(signal.SIGTERM)
        assert self._broker.exit_status() == 0, f"stop {number}: {self._broker.lines}"
        [stopped] = self._broker.events("daemon.stopped")
        assert (stopped["lost"], stopped["cut_off"]) == (0, 0), (
            f"stop {number}: {self._broker.lines}"
        )
        self._broker.__exit__()

    def start(self) -> None:
        self._broker = self._process()
        self._broker.wait("daemon.started")

    def close(self) -> None:
        self._broker.__exit__()


@pytest.fixture
def stoppable(
    socket_dir: Path, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ProcessBroker]:
    """Return a broker process with clients that reconnect at once."""
    monkeypatch.setattr(backoff, "delay", lambda attempt, chance: 0.01)
    stoppable = ProcessBroker(socket_dir, transport)
    try:
        yield stoppable
    finally:
        stoppable.close()


def test_sigterm_under_load_of_blocking_client_loses_nothing(stoppable: ProcessBroker) -> None:
    run_blocking(stoppable, 1)


def test_sigterm_under_load_of_asyncio_client_loses_nothing(stoppable: ProcessBroker) -> None:
    asyncio.run(run_asyncio(stoppable, 1))


@pytest.mark.slow
def test_sigterm_50_times_under_load_of_blocking_client_loses_nothing(
    stoppable: ProcessBroker,
) -> None:
    run_blocking(stoppable, 50)


@pytest.mark.slow
def test_sigterm_50_times_under_load_of_asyncio_client_loses_nothing(
    stoppable: ProcessBroker,
) -> None:
    asyncio.run(run_asyncio(stoppable, 50))
