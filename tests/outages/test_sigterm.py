"""SIGTERM to a broker process under load: every plain send arrives, or its sender hears
that it did not, once.
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
from support.outages.stops import run_asyncio, run_blocking
from support.outages.transports import Way

from brokerd_client import Client, connect
from brokerd_client.aio import Client as AsyncClient
from brokerd_client.aio import connect as connect_async
from brokerd_client.protocol import backoff

CLIENTS: dict[str, Any] = {"alice": {}, "bob": {"queue": "64MiB"}}


class Place:
    """A broker as a process of its own, and what its clients need to reach it."""

    def __init__(self, directory: Path, way: Way) -> None:
        self._directory = directory
        self._way = way
        self._listen = way.listen()
        self._broker = self._process()
        self._address = str(way.address(self._broker))
        self._listen = way.listen_again(self._broker)

    def _process(self) -> BrokerProcess:
        return BrokerProcess(
            self._directory, CLIENTS, listen=self._listen, limits={"drain_timeout": "20s"}
        )

    def connect(self, name: str) -> Client:
        return connect(self._address, name, key=key_of(name), ssl=self._way.context)

    async def connect_async(self, name: str) -> AsyncClient:
        return await connect_async(self._address, name, key=key_of(name), ssl=self._way.context)

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
def place(socket_dir: Path, way: Way, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Return a broker process with clients that connect again at once."""
    monkeypatch.setattr(backoff, "delay", lambda attempt, chance: 0.01)
    place = Place(socket_dir, way)
    try:
        yield place
    finally:
        place.close()


def test_sigterm_under_load_of_blocking_client_loses_nothing(place: Place) -> None:
    run_blocking(place, 1)


def test_sigterm_under_load_of_asyncio_client_loses_nothing(place: Place) -> None:
    asyncio.run(run_asyncio(place, 1))


@pytest.mark.slow
def test_sigterm_50_times_under_load_of_blocking_client_loses_nothing(place: Place) -> None:
    run_blocking(place, 50)


@pytest.mark.slow
def test_sigterm_50_times_under_load_of_asyncio_client_loses_nothing(place: Place) -> None:
    asyncio.run(run_asyncio(place, 50))
