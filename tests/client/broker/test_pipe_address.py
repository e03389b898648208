"""A named pipe as the address of a broker client: both faces, over a pipe played by
Python objects.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
from collections.abc import Callable, Iterator

import pytest
from support.fake_pipe import FakePipeServer
from support.keys import key_of
from support.running_daemon import configuration, running_daemon

import brokerd_client
from brokerd.net.listen import listener as listening
from brokerd.net.listen.named_pipes import PipeListener
from brokerd_client import aio
from brokerd_client._common import pipe_bridge as bridge
from brokerd_client.address import Address, parse
from brokerd_client.aio import transport as aio_transport
from brokerd_client.blocking import transport as channel
from brokerd_client.errors import AddressError, Disconnected

PIPE = r"\\.\pipe\brokerd-test"
TIMEOUT_S = 30.0


@pytest.fixture
def dialed(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Callable[[str], bridge.BridgedSocket]], None]:
    """Call it with what is to dial a pipe in Windows' place."""

    def install(dial: Callable[[str], bridge.BridgedSocket]) -> None:
        for module in (aio_transport, channel):
            monkeypatch.setattr(module, "dial_pipe", dial)
            monkeypatch.setattr(module, "validate_family", lambda family: None)

    return install


@pytest.fixture
def at_pipe(
    monkeypatch: pytest.MonkeyPatch, dialed: Callable[..., None]
) -> Iterator[FakePipeServer]:
    """A broker that serves alice and bob at a pipe, which is busy at every other try."""
    door = FakePipeServer()
    tries = iter(range(1000))

    def dial(name: str) -> bridge.BridgedSocket:
        assert name == PIPE
        if next(tries) % 2 == 0:
            raise BlockingIOError(errno.EAGAIN, "busy")
        return bridge.bridge(door.dial())

    dialed(dial)
    monkeypatch.setattr(listening, "open_pipe", lambda name: PipeListener(door, name))
    config = configuration("127.0.0.1:0")
    listen = dataclasses.replace(config.listen[0], address=Address("AF_PIPE", path=PIPE))
    with running_daemon(dataclasses.replace(config, listen=(listen,))):
        yield door


@pytest.mark.usefixtures("at_pipe")
def test_client_pipe_connects_both_faces() -> None:
    """The blocking and the asyncio client exchange messages and requests, large ones
    too, over a pipe each.
    """
    big = bytes(2 * 2**20)

    async def ask() -> list[object]:
        async with await aio.connect(PIPE, name="bob", key=key_of("bob"), timeout=TIMEOUT_S) as bob:
            reply = await bob.request("alice", big, timeout=TIMEOUT_S)
            await bob.send("alice", "thanks")
            return [reply.payload]

    with brokerd_client.connect(
        PIPE, name="alice", key=key_of("alice"), timeout=TIMEOUT_S
    ) as alice:
        alice.on_request(lambda message: message.payload + b"!")
        assert asyncio.run(ask()) == [big + b"!"]
        assert alice.recv(timeout=TIMEOUT_S).payload == "thanks"


def connect_blocking() -> None:
    brokerd_client.connect(PIPE, name="alice", key="k", timeout=TIMEOUT_S)


def connect_aio() -> None:
    async def connect() -> None:
        await aio.connect(PIPE, name="alice", key="k", timeout=TIMEOUT_S)

    asyncio.run(connect())


@pytest.mark.parametrize("connect", [connect_blocking, connect_aio])
def test_client_pipe_without_listener_is_disconnected(
    dialed: Callable[..., None], connect: Callable[[], None]
) -> None:
    """A pipe without a listener raises the error of any address without a listener."""

    def dial(name: str) -> bridge.BridgedSocket:
        raise FileNotFoundError(errno.ENOENT, "no such pipe")

    dialed(dial)
    with pytest.raises(Disconnected, match="no such pipe"):
        connect()


def test_client_pipe_outside_windows_raises() -> None:
    """Outside Windows both faces refuse such an address."""
    with pytest.raises(AddressError, match="Windows only"):
        connect_blocking()
    with pytest.raises(AddressError, match="Windows only"):
        connect_aio()
    with pytest.raises(AddressError, match="Windows only"):
        bridge.dial_pipe(parse(PIPE).path)


def test_aio_transport_passes_bytes_of_each_read() -> None:
    """The next read does not change them, though it uses the same buffer."""
    heard: list[bytes] = []

    class Heard:
        def _on_data(self, link: object, data: bytes) -> None:
            heard.append(data)

    async def main() -> None:
        transport = aio_transport.Transport(Heard())  # type: ignore[arg-type]
        for data in (b"some bytes", b"others"):
            transport.get_buffer(-1)[: len(data)] = data
            transport.buffer_updated(len(data))

    asyncio.run(main())
    assert heard == [b"some bytes", b"others"]
    assert {type(data) for data in heard} == {bytes}
