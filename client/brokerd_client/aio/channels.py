"""Channels of an asyncio client: streams to other clients, through the broker.

A part of the asyncio face; the blocking face opens its channels in ``connection``. A
channel begins as a connection to the broker, with a handshake and one frame
(wire/first_frames.py). The bytes behind the broker's answer are those of the other
client.
"""

from __future__ import annotations

import asyncio
from typing import Any

from brokerd_client._common.keepalive import DEFAULT_S, keep_alive
from brokerd_client._common.random_numbers import nonce
from brokerd_client.address import Address
from brokerd_client.aio.streams import Stream, StreamProtocol
from brokerd_client.aio.transport import dial
from brokerd_client.errors import (
    AddressError,
    AuthenticationError,
    BrokerdError,
    Disconnected,
    FrameError,
    ProtocolError,
)
from brokerd_client.settings import Settings, broken, no_connection
from brokerd_client.wire import handshake
from brokerd_client.wire.first_frames import MAX_ANSWER, channel_name, peer_of
from brokerd_client.wire.framing import FrameReader, frame

__all__ = ["begin_channel"]


async def begin_channel(
    settings: Settings, address: Address, name: str, first: bytes, message_id: int
) -> Stream:
    """Return a channel that begins with the frame ``first``, whose id is given.

    Args:
        settings: The key and TLS.
        address: Where the broker listens.
        name: The name of this client, or "".
        first: The body of the frame: an OPEN or a JOIN.
        message_id: Its id.

    Raises:
        Refused: The broker or the other client refused.
        AuthenticationError: The broker or this client was not authenticated.
        Disconnected: The broker can't be reached, or has closed the connection.
        ProtocolError: The broker broke the rules of the protocol.
    """
    try:
        protocol = await _connect(address, settings)
    except AddressError:
        raise
    except OSError as error:
        raise no_connection(address, error) from error
    try:
        sock = protocol.transport.get_extra_info("socket")
        if sock is not None:
            keep_alive(sock, DEFAULT_S)
        await _authenticate(protocol, settings.key, name)
        protocol.transport.write(frame(first))
        peer = peer_of(await _next_frame(protocol.reader, MAX_ANSWER), message_id)
        return protocol.take_stream(peer)
    except BaseException as error:
        protocol.transport.abort()
        if isinstance(error, asyncio.IncompleteReadError):
            raise Disconnected(f"the broker at {address} closed the connection") from error
        if isinstance(error, FrameError):
            raise ProtocolError(f"the broker's answer can't be read: {error}") from error
        if isinstance(error, OSError) and not isinstance(error, BrokerdError):
            raise broken(error) from error
        raise


async def _connect(address: Address, settings: Settings) -> StreamProtocol:
    """Connect, TLS included. Raises OSError, AddressError."""
    if address.family == "AF_PIPE":
        raise AddressError(f"no channel goes over {address}: the broker has to listen on TCP too")
    protocols: list[StreamProtocol] = []

    def make() -> Any:
        if settings.tls is None:
            protocols.append(StreamProtocol())
        else:
            # Imported here, because it takes long to load.
            from brokerd_client.aio.tls_streams import TlsStreamProtocol

            protocols.append(TlsStreamProtocol(settings.tls, address.host))
        return protocols[-1]

    await dial(address, make)
    protocol = protocols[-1]
    try:
        await protocol.opened()
    except BaseException:
        protocol.transport.abort()
        raise
    return protocol


async def _authenticate(protocol: StreamProtocol, key: bytes, name: str) -> None:
    """Do the handshake. Raises AuthenticationError, IncompleteReadError, OSError."""
    steps = handshake.as_dialer(
        key, nonce(), name=channel_name(name), allow_md5=False, bindings=protocol.bindings
    )
    step: object = next(steps)
    try:
        while True:
            result: bytes | None = None
            if isinstance(step, handshake.Send):
                protocol.transport.write(frame(step.body))
            else:
                result = await _next_frame(protocol.reader, handshake.LIMIT)
            step = steps.send(result)
    except StopIteration:
        pass
    except FrameError as error:
        raise AuthenticationError(f"the broker's handshake can't be read: {error}") from error


async def _next_frame(reader: asyncio.StreamReader, limit: int) -> bytes:
    """Read one frame, and no byte more. Raises IncompleteReadError, FrameError."""
    frames = FrameReader()
    while missing := frames.missing(limit):
        frames.feed(await reader.readexactly(missing))
    body = frames.next_frame(limit)
    assert body is not None
    return body
