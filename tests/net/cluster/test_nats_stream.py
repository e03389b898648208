"""NATS's protocol on a connection that nats-py has made."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from brokerd.net.cluster import nats_stream
from brokerd.net.cluster.nats_stream import NatsStream


class Transport:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.writes: list[int] = []
        self.is_aborted = False

    def set_protocol(self, protocol: asyncio.Protocol) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def write(self, data: bytes) -> None:
        self.written += data
        self.writes.append(1)

    def writelines(self, pieces: list[bytes]) -> None:
        self.written += b"".join(pieces)
        self.writes.append(len(pieces))

    def abort(self) -> None:
        self.is_aborted = True


class Ends:
    """A stream, its transport, and what it reported."""

    def __init__(self, early: bytes = b"", parsed: bytes = b"") -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.reads = 0
        self.subjects: list[str] = []
        self.errors: list[str] = []
        self.lost: list[str] = []
        self.transport = Transport()
        self.stream = NatsStream(
            read_subject=self._read_subject,
            on_message=lambda origin, kind, payload: self.messages.append((origin, payload)),
            on_read=self._on_read,
            on_error=self.errors.append,
            on_lost=self.lost.append,
        )
        self.stream.take_over(_client(self.transport, early, parsed))

    def _read_subject(self, subject: str) -> tuple[str, str] | None:
        self.subjects.append(subject)
        return None if subject == "foreign" else (subject, "data")

    def _on_read(self) -> None:
        self.reads += 1


def _client(transport: Transport, early: bytes, parsed: bytes) -> Any:
    """Return what is used of a connected client of nats-py."""

    class Anything:
        def cancel(self) -> None:
            pass

    client, streams = Anything(), Anything()
    streams._io_writer, streams._io_reader = Anything(), Anything()  # type: ignore[attr-defined]
    streams._io_writer.transport = transport  # type: ignore[attr-defined]
    streams._io_reader._buffer = bytearray(early)  # type: ignore[attr-defined]
    client._ps = Anything()  # type: ignore[attr-defined]
    client._ps.buf = bytearray(parsed)  # type: ignore[attr-defined]
    client._transport = streams  # type: ignore[attr-defined]
    for name in ("_reading_task", "_ping_interval_task", "_flusher_task"):
        setattr(client, name, Anything())
    return client


LINES = b"MSG a.b.c 1 5\r\nhe\r\no\r\n+OK\r\nMSG x 2 inbox.1 0\r\n\r\nPING\r\nINFO {}\r\n"


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_messages_are_taken_whatever_their_pieces(size: int) -> None:
    ends = Ends()
    for start in range(0, len(LINES), size):
        ends.stream.data_received(LINES[start : start + size])
    assert ends.messages == [("a.b.c", b"he\r\no"), ("x", b"")]
    assert ends.transport.written == b"PONG\r\n"
    assert not ends.lost


def test_bytes_that_the_client_has_read_come_first() -> None:
    ends = Ends(parsed=LINES[:4], early=LINES[4:20])
    ends.stream.data_received(LINES[20:])
    assert ends.messages == [("a.b.c", b"he\r\no"), ("x", b"")]


def test_read_is_reported_once_for_its_messages() -> None:
    ends = Ends()
    before = ends.reads
    ends.stream.data_received(b"MSG a 1 0\r\n\r\n" * 3)
    assert len(ends.messages) == 3
    assert ends.reads == before + 1


def test_message_with_headers_is_skipped() -> None:
    ends = Ends()
    ends.stream.data_received(b"HMSG a 1 12 14\r\nNATS/1.0\r\n\r\nhi\r\nMSG b 1 1\r\nx\r\n")
    assert ends.messages == [("b", b"x")]


def test_subject_is_read_once_until_too_many_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nats_stream, "_MOST_SOURCES", 2)
    ends = Ends()
    for subject in ("a", "foreign", "a", "foreign", "b", "a"):
        ends.stream.data_received(f"MSG {subject} 1 1\r\nx\r\n".encode())
    assert ends.subjects == ["a", "foreign", "b", "a"]
    assert [origin for origin, _ in ends.messages] == ["a", "a", "b", "a"]


def test_messages_and_subscriptions_are_written() -> None:
    ends = Ends()
    ends.stream.subscribe(["p.*.a.>", "p.*.all.>"])
    ends.stream.publish([(b"p.a.b.data", b"hello"), (b"p.a.c.ping", b"")])
    ends.stream.publish([])
    assert ends.transport.written == (
        b"SUB p.*.a.> 1\r\nSUB p.*.all.> 2\r\nPUB p.a.b.data 5\r\nhello\r\nPUB p.a.c.ping 0\r\n\r\n"
    )


def test_publish_joins_short_messages_and_does_not_copy_long_ones() -> None:
    ends = Ends()
    ends.stream.publish([(b"a", b"x" * 100), (b"b", b"y")])
    ends.stream.publish([(b"a", b"x" * 10_000)])
    assert ends.transport.writes == [1, 3]


@pytest.mark.parametrize(
    "line", [b"MSG a\r\n", b"MSG a 1 x\r\n", b"MSG\r\n", b"HELLO\r\n", b"\r\n", b"MSG \xff 1 1\r\n"]
)
def test_line_that_is_not_nats_ends_the_connection(line: bytes) -> None:
    ends = Ends()
    ends.stream.data_received(line + b"MSG a 1 0\r\n\r\n")
    assert ends.lost == ["the server has sent a line that is not NATS's protocol"]
    assert ends.transport.is_aborted
    assert not ends.messages


def test_line_without_end_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nats_stream, "_LONGEST_LINE", 100)
    ends = Ends()
    ends.stream.data_received(b"x" * 101)
    assert ends.lost == ["a line of the server is too long"]


def test_error_of_server_is_reported_without_quotes() -> None:
    ends = Ends()
    ends.stream.data_received(b"-ERR 'Permissions Violation for Publish to \"a\"'\r\n-ERR\r\n")
    assert ends.errors == ['permissions violation for publish to "a"', "-err"]
    assert not ends.lost


def test_end_of_connection_is_reported_once_and_ends_flush() -> None:
    async def main() -> None:
        ends = Ends()
        flush = asyncio.ensure_future(ends.stream.flush())
        await asyncio.sleep(0)
        ends.stream.connection_lost(OSError("it was reset"))
        ends.stream.connection_lost(None)
        assert ends.lost == ["it was reset"]
        with pytest.raises(ConnectionError, match="it was reset"):
            await flush
        with pytest.raises(ConnectionError, match="has ended"):
            await ends.stream.flush()
        ends.stream.publish([(b"a", b"x")])
        assert b"PUB" not in ends.transport.written

    asyncio.run(main())


def test_flush_waits_for_its_own_pong() -> None:
    async def main() -> None:
        ends = Ends()
        ends.stream.keep_alive(100.0, 2)
        flush = asyncio.ensure_future(ends.stream.flush())
        await asyncio.sleep(0)
        ends.stream.data_received(b"PONG\r\n")
        await asyncio.sleep(0)
        assert not flush.done()
        ends.stream.data_received(b"PONG\r\nPONG\r\n")
        await flush
        ends.stream.abort()

    asyncio.run(main())


def test_server_that_does_not_answer_pings_is_lost() -> None:
    async def main() -> None:
        ends = Ends()
        while not ends.lost:
            ends.stream.keep_alive(100.0, 2)
        assert ends.lost == ["the server does not answer"]
        assert ends.transport.written == b"PING\r\n" * 2
        assert ends.transport.is_aborted

    asyncio.run(main())
