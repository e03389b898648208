"""TLS without any socket: both ends are in memory, and the test moves the bytes."""

from __future__ import annotations

import ssl
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.tls.authority import Issued

from brokerd_client.tls.engine import Engine


class Pair:
    """The engines of a client and a listener, with their handshake done."""

    def __init__(self, server: Issued, trusting: ssl.SSLContext) -> None:
        listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        listening.load_cert_chain(server.certificate, server.key)
        self.client = Engine(trusting, hostname="localhost")
        self.listener = Engine(listening, end_point=b"")
        ends = (self.client, self.listener)
        while not (self.client.ready and self.listener.ready):
            for end, other in (ends, ends[::-1]):
                if not end.ready:
                    end.handshake()
                other.feed(end.output())
        # Read the listener's session tickets.
        self.client.read()

    def carry(self, data: bytes) -> bytes:
        """Return what the client reads of what the listener wrote."""
        self.listener.write(data)
        self.client.feed(self.listener.output())
        return self.client.read()


@pytest.fixture
def pair(server: Issued, trusting: ssl.SSLContext) -> Pair:
    return Pair(server, trusting)


@pytest.fixture
def _traced() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [1, 16384, 65536, 65537, 1_000_000])
def test_engine_bytes_written_are_read(pair: Pair, size: int) -> None:
    """Less than a record, many records, more than is decrypted at once: all of it is
    read, and nothing is left.
    """
    data = bytes(number % 251 for number in range(size))
    assert pair.carry(data) == data
    assert not pair.client.more


@pytest.mark.usefixtures("_traced")
def test_engine_small_message_allocates_no_large_buffer(pair: Pair) -> None:
    """All connections decrypt through one shared buffer."""
    pair.carry(b"first")
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    assert pair.carry(b"second") == b"second"
    assert tracemalloc.get_traced_memory()[1] - before < 16 * 1024


def test_engine_decryption_buffer_is_not_shared_between_threads(
    server: Issued, trusting: ssl.SSLContext
) -> None:
    """Decrypting lets other threads run. Clients in two threads, at the same time, each
    read their own bytes.
    """
    begin = threading.Barrier(2)

    def read_much(letter: bytes) -> set[bytes]:
        pair = Pair(server, trusting)
        begin.wait(20)
        return {bytes(set(pair.carry(letter * 60_000))) for _ in range(200)}

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(read_much, [b"a", b"b"]))
    assert found == [{b"a"}, {b"b"}]
