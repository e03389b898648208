"""What only the asyncio face has: tasks that are cancelled, loops that differ, things
to be opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import select
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from support.fake_broker import FakeServer

from brokerd_client import aio
from brokerd_client._common.keepalive import Silence
from brokerd_client.address import Address
from brokerd_client.aio import base as aio_base
from brokerd_client.aio import transport as aio_transport
from brokerd_client.aio.transport import Transport, dial
from brokerd_client.errors import (
    AddressError,
    AuthenticationError,
    Closed,
    Disconnected,
    InDoubt,
    TimedOut,
    WrongProcess,
)

PATIENCE = 20.0


def wait_until_gone(name: str, server: FakeServer) -> None:
    """Wait until the fake broker has closed that connection; no loop turns meanwhile."""
    deadline = time.monotonic() + PATIENCE
    while name in server.broker.online:
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.005)


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run a scenario on a fresh loop, which must be left without a task."""

    async def watched() -> None:
        async with asyncio.timeout(PATIENCE):
            await main()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(watched())


def join(name: str, server: FakeServer, **options: Any) -> aio.Opening[aio.Client]:
    """Connect to the fake broker, once opened."""
    return aio.connect(server.path, name, name, **options)


def crowd(path: str, stack: contextlib.ExitStack) -> None:
    """Connect until the listener's queue has no more room."""
    while True:
        extra = stack.enter_context(socket.socket(socket.AF_UNIX))
        extra.setblocking(False)
        try:
            extra.connect(path)
        except BlockingIOError:
            return


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, within the scenario's bounds."""
    while not condition():  # noqa: ASYNC110 - a condition of the test, which no event tells
        await asyncio.sleep(0.002)


def test_aio_client_every_way_to_open_closes_at_end(server: FakeServer) -> None:
    """await, async with, async with await, and async for: what is opened is closed at
    the end.
    """

    async def main() -> None:
        client = await join("alice", server)
        await client.close()
        async with await join("alice", server) as client, join("bob", server) as bob:
            async with bob.subscribe("a.>") as feed, await bob.subscribe("b"):
                await client.publish("a.x", 1)
                assert (await feed.recv(PATIENCE)).topic == "a.x"
            told = []
            async for presence in client.watch_presence():
                told.append(presence.name)
                if len(told) == 3:
                    break
            assert told == ["alice", "bob", "carol"]
            await bob.send_many([("alice", number) for number in range(10)])
            got = []
            async for message in client:
                got.append(message.payload)
                if len(got) == 10:
                    break
            assert got == list(range(10))
        assert client.closed

    run(main)


def test_aio_connect_not_awaited_does_nothing(server: FakeServer) -> None:
    """A connect() that is not awaited opens nothing, and warns of nothing."""
    aio.connect(server.path, "alice", "alice")
    assert server.broker.online == {}


def test_aio_request_cancelled_leaves_nothing(server: FakeServer) -> None:
    """However many requests are cancelled, at whatever point, the tables are empty and
    late replies only counted.
    """

    async def main() -> None:
        async with join("alice", server) as alice, join("bob", server) as bob:
            tasks = [
                asyncio.create_task(alice.request("bob", number, timeout=None))
                for number in range(200)
            ]
            await asyncio.sleep(0)
            for task in tasks[:100]:
                task.cancel()
            requests = [await bob.recv(PATIENCE) for _ in range(200)]
            for task in tasks[100:]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)
            assert len(alice._dialog.pending_calls) == 0
            for request in requests:
                await request.reply("late")
            await until(lambda: alice.counters["late"] == 200)

    run(main)


def test_aio_subscription_cancelled_is_unsubscribed(server: FakeServer) -> None:
    """The subscription is ended at the broker, and no event is delivered here."""

    async def main() -> None:
        async with join("alice", server) as alice:
            for subscribe in (lambda: alice.subscribe("a"), lambda: alice.watch_presence()):

                async def subscribed(subscribe: Callable[[], Any] = subscribe) -> Any:
                    return await subscribe()

                task = asyncio.create_task(subscribed())
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await alice.ping()
            assert server.broker.online["alice"].subscriptions == []
            assert len(alice._dialog.subscriptions) == 0
            assert alice._subscriptions == set()

    run(main)


def test_aio_recv_cancelled_loses_no_message(server: FakeServer) -> None:
    """A message that arrives as its taker is cancelled goes to the next taker."""

    async def main() -> None:
        async with join("alice", server) as alice, join("bob", server) as bob:
            for number in range(50):
                first, second = asyncio.create_task(bob.recv()), asyncio.create_task(bob.recv())
                await asyncio.sleep(0)
                await alice.send("bob", number)
                # Cancelled in the very turn in which it is woken, or before.
                bob._inbox.on_put = first.cancel
                assert (await second).payload == number
                bob._inbox.on_put = None
                with contextlib.suppress(asyncio.CancelledError):
                    await first
            assert not bob._inbox._waiters

    run(main)


def test_aio_recv_timed_out_leaves_no_waiter(server: FakeServer) -> None:
    """Polling with a timeout does not pile anything up."""

    async def main() -> None:
        async with join("alice", server) as alice:
            for _ in range(20):
                with pytest.raises(TimedOut):
                    await alice.recv(0.001)
            assert not alice._inbox._waiters

    run(main)


def test_aio_sends_of_one_turn_share_one_write(server: FakeServer) -> None:
    """What many tasks send in one turn of the loop is written at once."""

    async def main() -> None:
        async with join("alice", server) as alice, join("bob", server) as bob:
            assert alice._transport is not None
            writes: list[int] = []
            write = alice._transport.asyncio_transport.write
            alice._transport.asyncio_transport.write = lambda data: (
                writes.append(len(data)),
                write(data),
            )[1]  # type: ignore
            await asyncio.gather(*(alice.send("bob", number) for number in range(100)))
            assert [(await bob.recv(PATIENCE)).payload for _ in range(100)] == list(range(100))
            assert len(writes) == 1

    run(main)


def test_aio_send_waits_while_broker_reads_nothing(server: FakeServer) -> None:
    """Above the socket's buffer a send waits; its timeout means that it was not sent;
    what was given is in doubt.
    """

    async def main() -> None:
        async with join("alice", server) as alice:
            told: list[Any] = []
            alice.on_undelivered(told.append)
            server.act(lambda broker: setattr(server, "reading", False))
            message_id = await alice.send("bob", b"x" * 5_000_000)
            await until(lambda: not alice._clear)
            with pytest.raises(TimedOut, match="not sent"):
                await alice.send("bob", 1, timeout=0.02)
            server.drop("alice")
            await until(lambda: bool(told))
            assert [(type(error), error.message_id) for error in told] == [(InDoubt, message_id)]
            server.reading = True

    run(main)


def test_aio_request_in_flight_at_loss_is_in_doubt(server: FakeServer) -> None:
    """It is not repeated on the next connection, which comes by itself."""

    async def main() -> None:
        async with join("alice", server) as alice, join("bob", server) as bob:
            asking = asyncio.create_task(alice.request("bob", "once"))
            assert (await bob.recv(PATIENCE)).payload == "once"
            server.drop("alice")
            with pytest.raises(InDoubt):
                await asking
            await until(lambda: alice.connected)
            with pytest.raises(TimedOut):
                await bob.recv(0.05)

    run(main)


def test_aio_request_handlers_run_concurrently(server: FakeServer) -> None:
    """A request does not wait for the one before it; messages do, in order."""

    async def main() -> None:
        async with join("alice", server) as alice, join("bob", server) as bob:
            together = asyncio.Barrier(10)
            seen: list[int] = []

            @bob.on_request
            async def answer(message: aio.Message) -> object:
                await together.wait()
                return message.payload

            @bob.on_message
            async def note(message: aio.Message) -> None:
                await asyncio.sleep(0)
                seen.append(message.payload)

            replies = await asyncio.gather(*(alice.request("bob", number) for number in range(10)))
            assert [reply.payload for reply in replies] == list(range(10))
            await alice.send_many([("bob", number) for number in range(50)])
            await until(lambda: len(seen) == 50)
            assert seen == list(range(50))

    run(main)


def test_aio_close_ends_handlers_and_waiting_calls(server: FakeServer) -> None:
    """A handler that hangs is cancelled, a call that waits is Closed, and no task stays
    (see run).
    """

    async def main() -> None:
        alice, bob = await join("alice", server), await join("bob", server)

        @bob.on_request
        async def hang(message: aio.Message) -> None:
            await asyncio.get_running_loop().create_future()

        asking = asyncio.create_task(alice.request("bob", 1))
        await until(lambda: bool(bob._workers[bob._requests]))
        await bob.close()
        await alice.close()
        with pytest.raises(Closed):
            await asking
        await alice.close()

    run(main)


def test_aio_connect_failed_leaves_nothing(server: FakeServer, tmp_path: Path) -> None:
    """A wrong key, nobody there, a silent listener, a pipe: the error of each, in time,
    and no task (see run).
    """

    async def main() -> None:
        with pytest.raises(AuthenticationError):
            await aio.connect(server.path, "alice", "wrong")
        with pytest.raises(Disconnected, match="no-such"):
            await aio.connect(str(tmp_path / "no-such"), "alice", "k")
        with pytest.raises(AddressError):
            await aio.connect(r"\\.\pipe\x", "alice", "k")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            with pytest.raises(TimedOut):
                await aio.connect(
                    ("127.0.0.1", listener.getsockname()[1]), "alice", "k", timeout=0.1
                )
        with socket.socket(socket.AF_UNIX) as crowded, contextlib.ExitStack() as stack:
            crowded.bind(str(tmp_path / "s"))
            crowded.listen(0)
            crowd(str(tmp_path / "s"), stack)
            with pytest.raises(TimedOut):
                await aio.connect(str(tmp_path / "s"), "alice", "k", timeout=0.1)

    run(main)


def test_aio_connect_cancelled_leaves_nothing(tmp_path: Path) -> None:
    """Giving up on a listener that says nothing closes what was opened."""

    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "s"))
            listener.listen()

            async def connect() -> None:
                await aio.connect(str(tmp_path / "s"), "alice", "k")

            task = asyncio.create_task(connect())
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main)


def test_aio_client_in_fork_raises_wrong_process(server: FakeServer) -> None:
    """A fork's copy refuses every call, and its close() does nothing."""

    async def main() -> None:
        async with join("alice", server) as alice:
            thread_id = alice._thread_id
            alice._forked, alice._thread_id = True, 0
            for act in (lambda: alice.ping(), lambda: alice.recv(), lambda: alice.send("bob", 1)):
                with pytest.raises(WrongProcess):
                    await act()
            await alice.close()
            alice._forked, alice._thread_id = False, thread_id
            assert await alice.ping() >= 0

    run(main)


def test_aio_connect_unexpected_error_is_cause_of_disconnected(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """connect() ends with what went wrong as the cause, which is logged too, instead of
    waiting for ever.
    """

    async def fail(*given: object) -> None:
        raise LookupError("nobody thought of this")

    monkeypatch.setattr(aio_base, "dial", fail)

    async def main() -> None:
        with pytest.raises(Disconnected, match="nobody thought of this") as caught:
            await join("alice", server)
        assert isinstance(caught.value.__cause__, LookupError)

    run(main)
    assert "LookupError" in caplog.text


def test_aio_reconnect_unexpected_error_is_repeated(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged and counted as a loss like any other, and another try follows."""
    dial = aio_base.dial
    failures: list[Exception] = [LookupError("nobody thought of this")]

    async def fail_once(*given: Any) -> None:
        if failures:
            raise failures.pop()
        await dial(*given)

    async def main() -> None:
        async with join("alice", server) as client:
            monkeypatch.setattr(aio_base, "dial", fail_once)
            server.drop("alice")
            await until(lambda: not failures and client.connected)
            assert client.counters["losses"] == 2

    run(main)
    assert "LookupError" in caplog.text


def test_aio_keepalive_peer_already_disconnected_is_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some systems refuse to set options then: connect() hears that the connection is
    gone.
    """

    def refuse(*given: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(aio_transport, "keep_alive", refuse)

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            opening = asyncio.ensure_future(
                aio.connect(listener.getsockname(), "alice", "k").__aenter__()
            )
            accepted = await asyncio.to_thread(listener.accept)
            # Another try finds no listener.
            listener.close()
            accepted[0].close()
            with pytest.raises(Disconnected):
                await opening

    run(main)


def test_aio_end_of_peer_that_does_not_read_is_noticed() -> None:
    """A peer, or somebody on the way, that says that nothing more comes and does not
    read is gone at once.
    """

    class Told:
        def __init__(self) -> None:
            self.lost = asyncio.get_running_loop().create_future()

        def _on_open(self, link: Transport) -> None:
            link.asyncio_transport.write(bytes(50_000_000))

        def _on_data(self, link: Transport, data: bytes) -> None: ...

        def _on_writable(self, link: Transport) -> None: ...

        def _on_lost(self, link: Transport, error: Exception | None) -> None:
            self.lost.set_result(error)

    async def main() -> None:
        told = Told()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            await dial(Address("AF_INET", *listener.getsockname()), lambda: Transport(told))
            peer, _ = listener.accept()
            with peer:
                peer.shutdown(socket.SHUT_WR)
                assert await asyncio.wait_for(told.lost, PATIENCE) is None

    run(main)


def test_aio_close_at_once_still_logs_failed_sends(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """What on_undelivered has not been called with yet is logged by close(), which ends
    the handlers.
    """

    async def main() -> None:
        alice, bob = await join("alice", server), await join("bob", server)
        held_up = asyncio.Event()

        async def hold_up(message: aio.Message) -> None:
            held_up.set()
            await asyncio.Event().wait()

        alice.on_message(hold_up)
        alice.on_undelivered(lambda error: None)
        await bob.send("alice", "x")
        await held_up.wait()
        ids = [await alice.send("nobody", number) for number in range(8)]
        await until(lambda: alice.counters["undelivered"] == 8)
        await alice.close()
        await bob.close()
        logged = [
            record.getMessage() for record in caplog.records if "delivered" in record.getMessage()
        ]
        assert [text.split()[1] for text in logged[:5]] == [
            str(message_id) for message_id in ids[:5]
        ]
        assert logged[5:] == ["3 more messages were not delivered: NoSuchClient nobody (3)"]

    run(main)


def test_aio_close_cancelled_counts_undelivered_in_log(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Though the loop may end before the next line is due."""

    async def main() -> None:
        alice = await join("alice", server, reconnect=False)
        server.act(lambda broker: setattr(server, "reading", False))
        await alice.send_many([("bob", bytes(5000))] * 1000)
        (link,) = alice._transports
        closing = asyncio.ensure_future(alice.close())
        # Its first turn: then it waits for the rest to leave.
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing, link.closed])
        texts = [
            record.getMessage() for record in caplog.records if "delivered" in record.getMessage()
        ]
        counts = [int(text.partition(" ")[0]) for text in texts if " more messages " in text]
        assert len(texts) - len(counts) + sum(counts) == alice.counters["undelivered"] > 100

    run(main)


def test_aio_keepalive_lost_peer_received_bytes_are_read() -> None:
    """Bytes that nobody wanted yet are here, and come before the news that the peer is
    gone.
    """

    class Gone(Silence):
        def lasts(self, sock: object, now: float) -> float:
            return 1000.0

    class Told:
        def __init__(self) -> None:
            self.heard: list[object] = []

        def _on_open(self, link: Transport) -> None:
            link.asyncio_transport.pause_reading()
            self.link = link

        def _on_data(self, link: Transport, data: bytes) -> None:
            self.heard.append(data)

        def _on_writable(self, link: Transport) -> None: ...

        def _on_lost(self, link: Transport, error: Exception | None) -> None:
            self.heard.append(type(error))

    async def main() -> None:
        told = Told()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            await dial(Address("AF_INET", *listener.getsockname()), lambda: Transport(told))
            peer, _ = listener.accept()
            with peer:
                peer.sendall(b"the last")
                fileno = told.link.asyncio_transport.get_extra_info("socket").fileno()
                assert await asyncio.to_thread(select.select, [fileno], [], [], PATIENCE)
                told.link._check_peer(told.link.asyncio_transport.get_extra_info("socket"), Gone())
                assert told.heard == [b"the last", TimeoutError]
                told.link.asyncio_transport.abort()
                await told.link.closed

    run(main)


def test_aio_send_on_lost_connection_is_undelivered(server: FakeServer) -> None:
    """What the loop could not take is no send that has left: on_undelivered hears of
    each.
    """

    async def main() -> None:
        alice = await join("alice", server)
        told: list[Any] = []
        alice.on_undelivered(told.append)
        server.drop("alice")
        # The loop stands still, so that a write is the first to find out.
        wait_until_gone("alice", server)
        ids = [await alice.send("bob", number) for number in range(3)]
        await until(lambda: len(told) == 3)
        assert [(type(error), error.message_id) for error in told] == [
            (InDoubt, message_id) for message_id in ids
        ]
        await alice.close()

    run(main)
