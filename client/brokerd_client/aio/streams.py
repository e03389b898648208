"""Streams of an asyncio client's channels: asyncio's reader and writer, and the protocol.

A part of the asyncio face. ``tls_streams`` has the protocol of streams over TLS.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from brokerd_client.wire.channel_binding import Bindings

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Stream", "StreamProtocol"]


class Stream(tuple[asyncio.StreamReader, asyncio.StreamWriter]):  # noqa: SLOT001 - it has attributes
    """A channel: a pair of asyncio's stream reader and writer.

    Attributes:
        reader: The stream of bytes from the other client.
        writer: The stream of bytes to the other client.
        peer: The address of the other client.
    """

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    peer: str

    def __new__(cls, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str) -> Self:
        self = super().__new__(cls, (reader, writer))
        self.reader, self.writer, self.peer = reader, writer, peer
        return self

    def __repr__(self) -> str:
        return f"<Stream to {self.peer}>"


class StreamProtocol(asyncio.StreamReaderProtocol):
    """The protocol of a stream, which keeps the transport.

    ``bindings`` are the channel bindings of the key: none without TLS.
    """

    transport: asyncio.Transport

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.reader = asyncio.StreamReader(loop=loop)
        self.bindings: Bindings = {}
        super().__init__(self.reader, loop=loop)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio.Protocol: connected."""
        self.transport = cast("asyncio.Transport", transport)
        super().connection_made(transport)

    async def opened(self) -> None:
        """Wait until bytes can be read and written."""

    def take_stream(self, peer: str) -> Stream:
        """Return the stream to the client ``peer``.

        The protocol forgets the reader: asyncio closes a stream whose reader and writer
        are dropped.
        """
        reader = self.reader
        del self.reader
        loop = asyncio.get_running_loop()
        return Stream(reader, asyncio.StreamWriter(self.transport, self, reader, loop), peer)
