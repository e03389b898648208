"""What a TlsStream keeps of answers that TLS itself gives, and that the peer does not read."""

from __future__ import annotations

import contextlib
import socket
import ssl

import pytest

from brokerd_client.errors import TlsError
from brokerd_client.tls_stream import TlsStream


class Answering:
    """An engine whose peer asks it for answers, as it may by updates of its keys, and sends nothing else."""

    more = ended = False

    def read_into(self, view: memoryview) -> int:
        """Nothing for anybody."""
        return 0

    def output(self) -> bytes:
        """An answer, each time."""
        return bytes(32 * 1024)


def test_answers_that_nobody_reads_are_bounded(trusting: ssl.SSLContext) -> None:
    """A peer that has TLS answer again and again and does not read is given up; little is kept until then."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(bytes(65536))
        stream = TlsStream(ours, trusting, hostname="localhost")
        stream.engine = Answering()  # type: ignore[assignment]
        for _ in range(2):
            with pytest.raises(BlockingIOError):
                stream.recv_into(memoryview(bytearray(1024)))
        with pytest.raises(TlsError, match="does not read the answers"):
            stream.recv_into(memoryview(bytearray(1024)))
