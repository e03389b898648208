"""Channels over TLS: the same calls, bytes and ends as without."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import multiprocessing
import os
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.tls.authority import Authority
from support.waiting import until

from brokerd.testing import RunningBroker, running
from brokerd_client import TlsError, aio
from brokerd_client.connection import Client, Connection, Listener

TIMEOUT_S = 30
SIZE = 5_000_000


@pytest.fixture(scope="module")
def contexts(authority: Authority) -> dict[str, ssl.SSLContext]:
    """Contexts of clients, by the version of TLS."""
    made = {}
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = authority.context()
        context.minimum_version = context.maximum_version = version
        made[version.name] = context
    return made


@pytest.fixture(scope="module")
def broker(authority: Authority) -> Iterator[RunningBroker]:
    """A broker that speaks TLS."""
    server = authority.issue("broker")
    with running({"alice": {}, "bob": {}}, tls=server.entry(minimum="1.2")) as broker:
        yield broker


def pair(broker: RunningBroker, context: ssl.SSLContext) -> tuple[Connection, Connection]:
    """Return both ends of a channel from alice to bob."""
    with (
        broker.connect("alice", ssl=context) as alice,
        broker.connect("bob", ssl=context) as bob,
        bob.listen() as listener,
        ThreadPoolExecutor(1) as other,
    ):
        accepted = other.submit(listener.accept, TIMEOUT_S)
        caller = alice.open("bob")
        return caller, accepted.result(TIMEOUT_S)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_tls_channel_carries_large_messages_both_ways_at_once(
    broker: RunningBroker, contexts: dict[str, ssl.SSLContext], version: str
) -> None:
    ends = pair(broker, contexts[version])
    bodies = [os.urandom(SIZE), os.urandom(SIZE)]
    with ends[0], ends[1], ThreadPoolExecutor(4) as threads:
        for end, body in zip(ends, bodies, strict=True):
            threads.submit(end.send_bytes, body)
        received = [threads.submit(end.recv_bytes) for end in ends]
        digests = [hashlib.sha256(each.result(TIMEOUT_S)).digest() for each in received]
    assert digests == [hashlib.sha256(body).digest() for body in reversed(bodies)]


def test_tls_channel_close_delivers_what_was_sent(
    broker: RunningBroker, contexts: dict[str, ssl.SSLContext]
) -> None:
    caller, callee = pair(broker, contexts["TLSv1_3"])
    body = os.urandom(SIZE)
    with ThreadPoolExecutor(1) as other:
        received = other.submit(callee.recv_bytes)
        caller.send_bytes(body)
        caller.close()
        assert received.result(TIMEOUT_S) == body
    with pytest.raises(EOFError):
        callee.recv_bytes()
    callee.close()


def test_tls_channel_to_a_peer_that_has_closed_ends(
    broker: RunningBroker, contexts: dict[str, ssl.SSLContext]
) -> None:
    """An end that does not read sees the end of the other one when it sends."""
    caller, callee = pair(broker, contexts["TLSv1_3"])
    caller.send_bytes(b"unread")
    callee.close()

    def fails() -> bool:
        try:
            caller.send_bytes(b"x" * 100_000)
        except OSError:
            return True
        return False

    until(fails)
    caller.close()


def _answer(connection: Connection, inherited: Connection) -> None:
    inherited.close()  # the fork has a copy of the other end
    connection.send_bytes(connection.recv_bytes().upper())
    try:
        connection.recv_bytes()
    except EOFError:
        os._exit(0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_tls_channel_works_in_a_child(
    broker: RunningBroker, contexts: dict[str, ssl.SSLContext]
) -> None:
    """The thread that encrypts stays in this process. The child sees the channel's end."""
    caller, callee = pair(broker, contexts["TLSv1_3"])
    with caller:
        child = multiprocessing.get_context("fork").Process(target=_answer, args=(callee, caller))
        child.start()
        callee.close()
        caller.send_bytes(b"from the parent")
        assert caller.recv_bytes() == b"FROM THE PARENT"
    child.join(TIMEOUT_S)
    assert child.exitcode == 0


def test_tls_channel_without_trust_is_refused(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The direct API trusts the system's authorities only."""
    for variable, value in broker.environ("alice").items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(TlsError, match="certificate"):
        Client("broker://bob", timeout=TIMEOUT_S)


def test_tls_channel_of_direct_api_trusts_the_systems_authorities(
    broker: RunningBroker, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    for variable, value in broker.environ("bob").items():
        monkeypatch.setenv(variable, value)
    with Listener("broker://bob", authkey=b"key") as listener, ThreadPoolExecutor(1) as other:
        for variable, value in broker.environ("alice").items():
            monkeypatch.setenv(variable, value)
        dialed = other.submit(Client, "broker://bob", authkey=b"key", timeout=TIMEOUT_S)
        with listener.accept(TIMEOUT_S) as accepted, dialed.result(TIMEOUT_S) as client:
            client.send({"a": 1})
            assert (accepted.recv(), listener.last_accepted) == ({"a": 1}, "alice")


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_tls_streams_carry_bytes(
    broker: RunningBroker, contexts: dict[str, ssl.SSLContext], version: str, loop: str
) -> None:
    """Half-closes pass over TLS 1.3 only."""
    body = os.urandom(SIZE)
    context = contexts[version]

    async def serve(listener: aio.Listener) -> None:
        reader, writer = await listener.accept(TIMEOUT_S)
        if version == "TLSv1_3":
            received = await reader.read()
        else:
            received = await reader.readexactly(SIZE)
        assert received == body
        writer.write(hashlib.sha256(received).digest())
        writer.close()
        await writer.wait_closed()

    async def run() -> None:
        async with (
            aio.connect(broker.address, "alice", broker.key("alice"), ssl=context) as alice,
            aio.connect(broker.address, "bob", broker.key("bob"), ssl=context) as bob,
            bob.listen() as listener,
        ):
            serving = asyncio.ensure_future(serve(listener))
            reader, writer = await alice.open_stream("bob")
            writer.write(body)
            await writer.drain()
            if version == "TLSv1_3":
                writer.write_eof()
            assert await reader.read() == hashlib.sha256(body).digest()
            writer.close()
            await serving

    module = pytest.importorskip(loop)
    with contextlib.closing(module.new_event_loop()) as event_loop:
        event_loop.run_until_complete(asyncio.wait_for(run(), TIMEOUT_S))
