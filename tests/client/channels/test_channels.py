"""Channels of both faces: open, listen, refuse, and what each end sees of the other."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.waiting import until

from brokerd.testing import RunningBroker
from brokerd_client import (
    Closed,
    Disconnected,
    Expired,
    NoSuchClient,
    Offline,
    PayloadError,
    RequestFailed,
    TimedOut,
    UndecodablePayload,
    WrongUse,
    aio,
)
from brokerd_client.connection import Connection

TIMEOUT_S = 30


def pair(broker: RunningBroker, **options: Any) -> tuple[Connection, Connection]:
    """Return both ends of a channel from alice to bob, whose clients are closed."""
    with (
        broker.connect("alice", **options) as alice,
        broker.connect("bob", **options) as bob,
        bob.listen() as listener,
        ThreadPoolExecutor(1) as other,
    ):
        accepted = other.submit(listener.accept, TIMEOUT_S)
        caller = alice.open("bob")
        return caller, accepted.result(TIMEOUT_S)


def test_channel_carries_messages_both_ways(broker: RunningBroker) -> None:
    """A channel is a Connection, and each end knows the other's name."""
    caller, callee = pair(broker)
    with caller, callee:
        assert type(caller) is type(callee) is Connection
        assert (caller.peer, callee.peer) == ("bob", "alice")
        caller.send_bytes(b"question")
        assert callee.recv_bytes() == b"question"
        callee.send_bytes(b"answer" * 10_000)
        assert caller.recv_bytes() == b"answer" * 10_000


def test_channel_end_is_seen_by_the_other_end(broker: RunningBroker) -> None:
    """What was sent before a close arrives, then EOFError."""
    caller, callee = pair(broker)
    caller.send_bytes(b"last words")
    caller.close()
    assert callee.recv_bytes() == b"last words"
    with pytest.raises(EOFError):
        callee.recv_bytes()
    callee.close()


def test_channel_outlives_the_clients_that_made_it(broker: RunningBroker) -> None:
    caller, callee = pair(broker)
    with caller, callee:
        until(lambda: broker.stats()["connections"] == 0)
        caller.send_bytes(b"still here")
        assert callee.recv_bytes() == b"still here"


def test_channel_carries_messages_of_30_mebibytes(broker: RunningBroker) -> None:
    """A message in a channel may be longer than the broker's max_message."""
    caller, callee = pair(broker)
    body = bytes(30 * 2**20)
    with caller, callee, ThreadPoolExecutor(1) as other:
        sent = other.submit(caller.send_bytes, body)
        assert callee.recv_bytes() == body
        sent.result(TIMEOUT_S)


def test_channel_of_a_peer_that_does_not_read_holds_its_sender_alone(
    broker: RunningBroker,
) -> None:
    """The sender waits for the reader; messages and other channels do not."""
    full, other_end = pair(broker), pair(broker)
    body = bytes(8 * 2**20)
    with full[0], full[1], other_end[0], other_end[1], ThreadPoolExecutor(1) as other:
        sent = other.submit(full[0].send_bytes, body)
        other_end[0].send_bytes(b"x")
        assert other_end[1].recv_bytes() == b"x"
        with broker.connect("alice") as alice, broker.connect("bob") as bob:
            alice.send("bob", "y")
            assert bob.recv(TIMEOUT_S).payload == "y"
        assert not sent.done()
        assert full[1].recv_bytes() == body
        sent.result(TIMEOUT_S)


def test_channel_of_a_killed_process_ends(broker: RunningBroker) -> None:
    """The other end sees the end of a process that was killed."""
    program = "import brokerd_client, time\n"
    program += "connection = brokerd_client.connect().open('bob')\n"
    program += "connection.send_bytes(b'alive')\ntime.sleep(60)\n"
    with broker.connect("bob") as bob, bob.listen() as listener:
        process = subprocess.Popen(
            [sys.executable, "-c", program], env={**os.environ, **broker.environ("alice")}
        )
        try:
            with listener.accept(TIMEOUT_S) as connection:
                assert connection.recv_bytes() == b"alive"
                process.kill()
                with pytest.raises((EOFError, ConnectionResetError)):
                    connection.recv_bytes()
        finally:
            process.kill()
            process.wait(TIMEOUT_S)


def test_listener_listens_again_when_the_broker_is_back(broker: RunningBroker) -> None:
    """A broker that is killed ends its channels. After its restart the next caller
    reaches the same listener.
    """
    with (
        broker.connect("alice") as alice,
        broker.connect("bob") as bob,
        bob.listen() as listener,
        ThreadPoolExecutor(1) as other,
    ):
        opened = other.submit(alice.open, "bob")
        with listener.accept(TIMEOUT_S) as channel, opened.result(TIMEOUT_S):
            broker.kill()
            with pytest.raises((EOFError, OSError)):
                channel.recv_bytes()
        broker.start()
        accepted = other.submit(listener.accept, TIMEOUT_S)

        def opens() -> bool:
            try:
                alice.open("bob").close()
            except (Offline, Disconnected):
                return False
            return True

        until(opens)
        accepted.result(TIMEOUT_S).close()


def test_channel_recv_of_untrusted_peer_is_refused_and_keeps_the_message(
    broker: RunningBroker,
) -> None:
    """recv() of a pickle needs trust; the message stays for recv_bytes."""
    caller, callee = pair(broker)
    with caller, callee:
        caller.send([1])
        with pytest.raises(UndecodablePayload, match="pickles from alice are not read"):
            callee.recv()
        assert b"\x94" in callee.recv_bytes()


def test_channel_recv_of_trusted_peer_unpickles(broker: RunningBroker) -> None:
    caller, callee = pair(broker, allow_pickle_from=["alice"])
    with caller, callee:
        caller.send({"anything": [1, 2.5, None]})
        assert callee.recv() == {"anything": [1, 2.5, None]}
        callee.send(1)
        with pytest.raises(UndecodablePayload):
            caller.recv()


def test_listener_knows_who_was_accepted_last(broker: RunningBroker) -> None:
    bob = broker.connect("bob")
    with bob.listen() as listener, ThreadPoolExecutor(1) as other:
        assert listener.last_accepted is None
        for name in ("alice", "carol"):
            opened = other.submit(broker.connect(name).open, "bob")
            with listener.accept(TIMEOUT_S) as channel:
                assert listener.last_accepted == channel.peer == name
            opened.result(TIMEOUT_S).close()


def test_listener_iterates_over_channels_until_it_is_closed(broker: RunningBroker) -> None:
    alice, bob = broker.connect("alice"), broker.connect("bob")
    listener = bob.listen()
    seen = []

    def serve() -> None:
        for channel in listener:
            seen.append(channel.recv_bytes())
            channel.close()

    with ThreadPoolExecutor(1) as other:
        served = other.submit(serve)
        for number in (b"1", b"2"):
            with alice.open("bob") as channel:
                channel.send_bytes(number)
                with pytest.raises(EOFError):
                    channel.recv_bytes()
        listener.close()
        served.result(TIMEOUT_S)
    assert seen == [b"1", b"2"]
    with pytest.raises(Closed):
        listener.accept()


def test_listener_accept_without_caller_times_out(broker: RunningBroker) -> None:
    with broker.connect("bob").listen() as listener, pytest.raises(TimedOut):
        listener.accept(timeout=0)


def test_listener_is_one_for_each_client(broker: RunningBroker) -> None:
    """While a client listens, it can't listen again. Once its listener is closed, it
    can.
    """
    alice, bob = broker.connect("alice"), broker.connect("bob")
    with bob.listen() as first, ThreadPoolExecutor(1) as other:
        with pytest.raises(WrongUse, match="listens already"):
            bob.listen()
        opened = other.submit(alice.open, "bob")
        first.accept(TIMEOUT_S).close()
        opened.result(TIMEOUT_S).close()
    with bob.listen():
        pass


def test_open_shows_its_payload_and_is_refused_with_a_reason(broker: RunningBroker) -> None:
    alice, bob = broker.connect("alice"), broker.connect("bob")
    with bob.listen() as listener, ThreadPoolExecutor(1) as other:
        opened = other.submit(alice.open, "bob", b"for tea")
        offer = listener.recv(TIMEOUT_S)
        assert (offer.sender, offer.payload) == ("alice", b"for tea")
        assert str(offer.token) not in repr(offer)
        listener.refuse(offer, "only coffee", "teapot")
        with pytest.raises(RequestFailed, match="only coffee") as caught:
            opened.result(TIMEOUT_S)
        assert caught.value.code == "teapot"
        with pytest.raises(Expired):
            listener.join(offer)


def test_open_to_client_that_stops_listening_is_refused(broker: RunningBroker) -> None:
    """The requests that wait at the end of a listener are refused."""
    alice, bob = broker.connect("alice"), broker.connect("bob")
    listener = bob.listen()
    with ThreadPoolExecutor(1) as other:
        opened = other.submit(alice.open, "bob")
        until(lambda: len(listener.queue.inbox.items) == 1)
        listener.close()
        with pytest.raises((RequestFailed, Offline)) as caught:
            opened.result(TIMEOUT_S)
    assert caught.value.code == "offline"


def test_open_to_absent_client_says_why(broker: RunningBroker) -> None:
    alice, bob = broker.connect("alice"), broker.connect("bob")
    with pytest.raises(NoSuchClient):
        alice.open("zoe")
    with pytest.raises(Offline):
        alice.open("bob")
    with bob.listen():
        pass
    with pytest.raises(Offline):
        alice.open("bob")
    with pytest.raises(PayloadError):
        alice.open("bob", bytes(1025))


def test_open_that_is_not_accepted_times_out(broker: RunningBroker) -> None:
    alice, bob = broker.connect("alice"), broker.connect("bob")
    with bob.listen() as listener, pytest.raises(TimedOut, match="bob did not accept in time"):
        alice.open("bob", timeout=0.1)
    listener.close()


def test_open_after_close_raises_closed(broker: RunningBroker) -> None:
    alice = broker.connect("alice")
    alice.close()
    with pytest.raises(Closed):
        alice.open("bob")
    with pytest.raises(Closed):
        alice.listen()


def test_accept_skips_callers_that_have_gone(broker: RunningBroker) -> None:
    """A request that is not valid any more costs the next caller nothing."""
    alice, bob = broker.connect("alice"), broker.connect("bob")
    with bob.listen() as listener, ThreadPoolExecutor(1) as other:
        refused = other.submit(alice.open, "bob")
        offer = listener.recv(TIMEOUT_S)
        listener.refuse(offer, "no")
        with pytest.raises(RequestFailed):
            refused.result(TIMEOUT_S)
        listener.queue.put([offer], 1)
        opened = other.submit(broker.connect("carol").open, "bob")
        with listener.accept(TIMEOUT_S) as channel:
            assert channel.peer == "carol"
        opened.result(TIMEOUT_S).close()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_streams_of_asyncio_carry_bytes_and_half_closes(broker: RunningBroker, loop: str) -> None:
    """Both ends are asyncio's streams; the end of one direction leaves the other open."""

    async def serve(bob: aio.Client) -> list[str | None]:
        peers: list[str | None] = []
        async with bob.listen() as listener:
            async for stream in listener:
                reader, writer = stream
                peers += [stream.peer, listener.last_accepted]
                writer.write((await reader.read()).upper())
                writer.close()
                return peers
        return peers

    async def run() -> None:
        async with (
            aio.connect(broker.address, "alice", broker.key("alice")) as alice,
            aio.connect(broker.address, "bob", broker.key("bob")) as bob,
        ):
            serving = asyncio.ensure_future(serve(bob))
            while True:
                try:
                    stream = await alice.open_stream("bob")
                    break
                except Offline:
                    await asyncio.sleep(0.01)
            reader, writer = stream
            assert stream.peer == "bob"
            writer.write(b"hello " * 20_000)
            writer.write_eof()
            assert await reader.read() == b"HELLO " * 20_000
            writer.close()
            await writer.wait_closed()
            assert await serving == ["alice", "alice"]
            with pytest.raises(Offline):
                await alice.open_stream("bob")

    module = pytest.importorskip(loop)
    with contextlib.closing(module.new_event_loop()) as event_loop:
        event_loop.run_until_complete(asyncio.wait_for(run(), TIMEOUT_S))


def test_streams_of_asyncio_open_times_out_and_is_refused(broker: RunningBroker) -> None:
    async def run() -> None:
        async with (
            aio.connect(broker.address, "alice", broker.key("alice")) as alice,
            aio.connect(broker.address, "bob", broker.key("bob")) as bob,
            bob.listen() as listener,
        ):
            with pytest.raises(TimedOut):
                await alice.open_stream("bob", timeout=2)
            await listener.recv()
            opening = asyncio.ensure_future(alice.open_stream("bob", b"?"))
            offer = await listener.recv(TIMEOUT_S)
            await listener.refuse(offer, "no")
            with pytest.raises(RequestFailed, match="no"):
                await opening
            opening = asyncio.ensure_future(alice.open_stream("bob"))
            await listener.recv(TIMEOUT_S)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening

    asyncio.run(asyncio.wait_for(run(), TIMEOUT_S))
