"""Host names of the asyncio face: a slow look-up holds up neither connect() nor the end
of the program.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.memory_broker import PATIENCE

from brokerd_client import aio
from brokerd_client.aio import transport as aio_transport
from brokerd_client.aio.transport import Resolver
from brokerd_client.errors import Disconnected, TimedOut


class SlowNames:
    """Replaces socket.getaddrinfo: look-ups of slow names block until ``released``."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.released = threading.Event()
        self.calls = 0
        self.answer: Any = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 9))]

    def __call__(self, host: Any, *args: Any, **options: Any) -> Any:
        if options.get("flags", 0) & socket.AI_NUMERICHOST or "slow" not in str(host):
            return self._real(host, *args, **options)
        self.calls += 1
        self.released.wait(20)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowNames]:
    """Block the look-up of every name that contains "slow"."""
    slow = SlowNames(socket.getaddrinfo)
    monkeypatch.setattr(socket, "getaddrinfo", slow)
    yield slow
    slow.released.set()
    for thread in threading.enumerate():
        if thread.name == "brokerd look-up":
            thread.join(20)


@pytest.mark.timing
@pytest.mark.parametrize("url", ["slow.example:6000", "tls://slow.example:6000"])
def test_connect_slow_lookup_times_out_and_loop_ends(names: SlowNames, url: str) -> None:
    """TimedOut is raised in time, and asyncio.run does not wait for the look-up."""

    async def main() -> float:
        began = time.monotonic()
        with pytest.raises(TimedOut):
            await aio.connect(url, "alice", "k", timeout=0.1)
        return time.monotonic() - began

    began = time.monotonic()
    assert asyncio.run(main()) < 10
    assert time.monotonic() - began < 20
    assert not names.released.is_set()


def test_resolver_lookup_longer_than_attempt_serves_next_attempt(names: SlowNames) -> None:
    """At most one thread runs, however often a client tries to connect meanwhile."""

    async def main() -> None:
        resolver = Resolver()
        for _ in range(5):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(resolver.find("slow.example", 1), 0.01)
        assert names.calls == 1
        names.released.set()
        assert await resolver.find("slow.example", 1) == [(socket.AF_INET, ("127.0.0.1", 9))]
        assert names.calls == 1
        await resolver.find("slow.example", 1)
        assert names.calls == 2

    asyncio.run(main())


def test_connect_host_without_address_is_disconnected(names: SlowNames) -> None:
    """The error has the system's own words, as Disconnected."""
    names.answer = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    names.released.set()

    async def main() -> None:
        with pytest.raises(Disconnected, match=r"slow\.example:6000: Name or service not known"):
            await aio.connect("slow.example:6000", "alice", "k", timeout=PATIENCE)

    asyncio.run(main())


def test_connect_host_with_several_addresses_tries_each(names: SlowNames) -> None:
    """The first accepting address is used. If none does, the last error is raised."""
    names.released.set()

    async def main() -> None:
        made: list[aio_transport.Transport] = []

        class Quiet(asyncio.Protocol):
            def __init__(self) -> None:
                made.append(self)  # type: ignore[arg-type]

        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            socket.create_server(("127.0.0.1", 0)) as closed,
        ):
            port, refusing = listener.getsockname()[1], closed.getsockname()[1]
            closed.close()
            entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
            names.answer = [(*entry, ("127.0.0.1", refusing)), (*entry, ("127.0.0.1", port))]
            address = aio_transport.Address("AF_INET", "slow.example", port)
            await aio_transport.dial(address, Quiet)  # type: ignore[arg-type]
            accepted, _ = listener.accept()
            accepted.close()
            assert len(made) == 1
            names.answer = names.answer[:1]
            with pytest.raises(ConnectionRefusedError):
                await aio_transport.dial(address, Quiet)  # type: ignore[arg-type]

    asyncio.run(main())


def test_connect_numeric_address_needs_no_thread(names: SlowNames) -> None:
    """This holds for IPv4 and IPv6."""

    async def main() -> None:
        for host in ("127.0.0.1", "::1"):
            assert [address[0] for _, address in await Resolver().find(host, 1)] == [host]
        assert not any(thread.name == "brokerd look-up" for thread in threading.enumerate())

    asyncio.run(main())
