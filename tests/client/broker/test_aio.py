"""Features of the asyncio client alone: cancelled tasks, several loops, and objects
that are opened.
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


def wait_until_disconnected(name: str, server: FakeServer) -> None:
    """Wait until the fake broker has closed that connection, without running a loop."""
    deadline = time.monotonic() + PATIENCE
    while name in server.broker.online:
        assert time.monotonic() < deadline, "the connection did not end in time"
        time.sleep(0.005)


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run a scenario on a new loop; afterwards the loop must have no task."""

    async def watched() -> None:
        async with asyncio.timeout(PATIENCE):
            await main()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(watched())


def join(name: str, server: FakeServer, **options: Any) -> aio.Opening[aio.Client]:
    """Return a client of the fake broker, which connects when it is opened."""
    return aio.connect(server.path, name, name, **options)


def fill_listener_queue(path: str, stack: contextlib.ExitStack) -> None:
    """Connect until the listener's queue is full."""
    while True:
        extra = stack.enter_context(socket.socket(socket.AF_UNIX))
        extra.setblocking(False)
        try:
            extra.connect(path)
        except BlockingIOError:
            return


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, within the scenario's bounds."""
    while not condition():  # noqa: ASYNC110 - a condition of the test, which sets no event
        await asyncio.sleep(0.002)


def test_aio_client_every_way_to_open_closes_at_end(server: FakeServer) -> None:
    """The ways are await, async with, async with await, and async for. Each closes at
    the end what it opened.
    """

    async def main() -> None:
        client = await join("alice", server)
        await client.close()
        async with await join("alice", server) as client, join("bob", server) as bob:
            async with bob.subscribe("a.>") as subscription, await bob.subscribe("b"):
                await client.publish("a.x", 1)
                assert (await subscription.recv(PATIENCE)).topic == "a.x"
            received = []
            async for presence in client.watch_presence():
                received.append(presence.name)
                if len(received) == 3:
                    break
            assert received == ["alice", "bob", "carol"]
            await bob.send_many([("alice", number) for number in range(10)])
            got = []
            async for message in client:
                got.append(message.payload)
                if len(got) == 10:
                    break
            assert got == list(range(10))
        assert client.closed

    run(main)


def test_aio_connect_not_awaited_warns_and_does_nothing(server: FakeServer) -> None:
    """A connect() that is not awaited opens nothing, as its warning says."""
    with pytest.warns(RuntimeWarning, match="never awaited"):
        aio.connect(server.path, "alice", "alice")
    assert server.broker.online == {}


def test_aio_request_cancelled_leaves_nothing(server: FakeServer) -> None:
    """However many requests are cancelled, and whenever, the tables are empty. Late
    replies are only counted.
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
    """The subscription is ended at the broker, and the client gets no event."""

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
    """If a recv() is cancelled as its message arrives, the next recv() gets the
    message.
    """

    async def main() -> None:
        async with join("alice", server) as alice, join("bob", server) as bob:
            for number in range(50):
                first, second = asyncio.create_task(bob.recv()), asyncio.create_task(bob.recv())
                await asyncio.sleep(0)
                await alice.send("bob", number)
                # Cancelled in the turn of the loop that wakes it, or before.
                bob._inbox.on_put = first.cancel
                assert (await second).payload == number
                bob._inbox.on_put = None
                with contextlib.suppress(asyncio.CancelledError):
                    await first
            assert not bob._inbox._waiters

    run(main)


def test_aio_recv_timed_out_leaves_no_waiter(server: FakeServer) -> None:
    """Polling with a timeout does not accumulate waiters."""

    async def main() -> None:
        async with join("alice", server) as alice:
            for _ in range(20):
                with pytest.raises(TimedOut):
                    await alice.recv(0.001)
            assert not alice._inbox._waiters

    run(main)


def test_aio_sends_of_one_turn_share_one_write(server: FakeServer) -> None:
    """The sends of many tasks in one turn of the loop are written at once."""

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
    """When the socket's buffer is full a send waits. Its timeout means that the message
    was not sent. Messages handed over before are in doubt.
    """

    async def main() -> None:
        async with join("alice", server) as alice:
            received: list[Any] = []
            alice.on_undelivered(received.append)
            server.act(lambda broker: setattr(server, "reading", False))
            message_id = await alice.send("bob", b"x" * 5_000_000)
            await until(lambda: not alice._clear)
            with pytest.raises(TimedOut, match="not sent"):
                await alice.send("bob", 1, timeout=0.02)
            server.drop("alice")
            await until(lambda: bool(received))
            assert [(type(error), error.message_id) for error in received] == [
                (InDoubt, message_id)
            ]
            server.reading = True

    run(main)


def test_aio_request_in_flight_at_loss_is_in_doubt(server: FakeServer) -> None:
    """The request is not repeated on the next connection, which the client makes by
    itself.
    """

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
    """A request does not wait for the one before it. Messages are handled in order."""

    async def main() -> None:
        async with join("alice", server) as alice, join("bob", server) as bob:
            all_run = asyncio.Event()
            running: list[object] = []
            seen: list[int] = []

            @bob.on_request
            async def answer(message: aio.Message) -> object:
                running.append(message.payload)
                if len(running) == 10:
                    all_run.set()
                await all_run.wait()
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
    """A handler that hangs is cancelled, and a waiting call raises Closed. No task is
    left (see run).
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
    """The cases are a wrong key, no listener, a pipe, a silent listener and a full one.
    Each raises its error in time, and no task is left (see run).
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
        with socket.socket(socket.AF_UNIX) as full_listener, contextlib.ExitStack() as stack:
            full_listener.bind(str(tmp_path / "s"))
            full_listener.listen(0)
            fill_listener_queue(str(tmp_path / "s"), stack)
            with pytest.raises(TimedOut):
                await aio.connect(str(tmp_path / "s"), "alice", "k", timeout=0.1)

    run(main)


def test_aio_connect_cancelled_leaves_nothing(tmp_path: Path) -> None:
    """If a connect() to a silent listener is cancelled, its connection is closed."""

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
    """In a forked process every call raises, and close() does nothing."""

    async def main() -> None:
        async with join("alice", server) as alice:
            alice._forked, alice._clear = True, False
            alice._note_state()
            for act in (lambda: alice.ping(), lambda: alice.recv(), lambda: alice.send("bob", 1)):
                with pytest.raises(WrongProcess):
                    await act()
            await alice.close()
            alice._forked, alice._clear = False, True
            assert await alice.ping() >= 0

    run(main)


def test_aio_connect_unexpected_error_is_cause_of_disconnected(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """connect() raises Disconnected with the error as its cause, instead of waiting
    forever. The error is logged too.
    """

    async def fail(*given: object) -> None:
        raise LookupError("unforeseen")

    monkeypatch.setattr(aio_base, "dial", fail)

    async def main() -> None:
        with pytest.raises(Disconnected, match="unforeseen") as caught:
            await join("alice", server)
        assert isinstance(caught.value.__cause__, LookupError)

    run(main)
    assert "LookupError" in caplog.text


def test_aio_reconnect_unexpected_error_is_tried_again(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged and counted as a failed attempt, and another attempt follows."""
    dial = aio_base.dial
    failures: list[Exception] = [LookupError("unforeseen")]

    async def fail_once(*given: Any) -> None:
        if failures:
            raise failures.pop()
        await dial(*given)

    async def main() -> None:
        async with join("alice", server) as client:
            monkeypatch.setattr(aio_base, "dial", fail_once)
            server.drop("alice")
            await until(lambda: not failures and client.connected)
            assert client.counters["losses"] == client.counters["failed_attempts"] == 1

    run(main)
    assert "LookupError" in caplog.text


def test_aio_keepalive_peer_already_disconnected_is_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some systems then refuse to set socket options. connect() raises Disconnected."""

    def refuse(*given: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(aio_transport, "keep_alive", refuse)

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            opening = asyncio.ensure_future(
                aio.connect(listener.getsockname(), "alice", "k").__aenter__()
            )
            accepted = await asyncio.to_thread(listener.accept)
            # The next attempt finds no listener.
            listener.close()
            accepted[0].close()
            with pytest.raises(Disconnected):
                await opening

    run(main)


def test_aio_peer_ended_without_reading_is_lost_at_once() -> None:
    """A peer or a proxy may end its stream and not read. The connection counts as lost
    at once.
    """

    class Recorder:
        def __init__(self) -> None:
            self.lost = asyncio.get_running_loop().create_future()

        def _on_open(self, link: Transport) -> None:
            link.asyncio_transport.write(bytes(50_000_000))

        def _on_data(self, link: Transport, data: bytes) -> None: ...

        def _on_writable(self, link: Transport) -> None: ...

        def _on_lost(self, link: Transport, error: Exception | None) -> None:
            self.lost.set_result(error)

    async def main() -> None:
        recorder = Recorder()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            await dial(Address("AF_INET", *listener.getsockname()), lambda: Transport(recorder))
            peer, _ = listener.accept()
            with peer:
                peer.shutdown(socket.SHUT_WR)
                assert await asyncio.wait_for(recorder.lost, PATIENCE) is None

    run(main)


def test_aio_close_at_once_still_logs_failed_sends(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """close() ends the handlers, and logs the failures that on_undelivered was not
    called with.
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
    """The counts are logged although the loop may end before the next line is due."""

    async def main() -> None:
        alice = await join("alice", server, reconnect=False)
        server.act(lambda broker: setattr(server, "reading", False))
        await alice.send_many([("bob", bytes(5000))] * 1000)
        (link,) = alice._transports
        closing = asyncio.ensure_future(alice.close())
        # After its first turn it waits until the remaining bytes are written.
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
    """Received bytes that were not read yet come before the error that the peer is
    lost.
    """

    class Expired(Silence):
        def remaining_s(self, sock: object, now: float, limit_s: float) -> float:
            return 0.0

    class Recorder:
        def __init__(self) -> None:
            self.events: list[object] = []

        def _on_open(self, link: Transport) -> None:
            self.link = link

        def _on_data(self, link: Transport, data: bytes) -> None:
            self.events.append(data)

        def _on_writable(self, link: Transport) -> None: ...

        def _on_lost(self, link: Transport, error: Exception | None) -> None:
            self.events.append(type(error))

    async def main() -> None:
        recorder = Recorder()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            await dial(Address("AF_INET", *listener.getsockname()), lambda: Transport(recorder))
            # Not in _on_open: before Python 3.11, asyncio begins to read after it.
            recorder.link.asyncio_transport.pause_reading()
            peer, _ = listener.accept()
            with peer:
                peer.sendall(b"the last")
                fileno = recorder.link.asyncio_transport.get_extra_info("socket").fileno()
                assert await asyncio.to_thread(select.select, [fileno], [], [], PATIENCE)
                recorder.link._check_peer(
                    recorder.link.asyncio_transport.get_extra_info("socket"), Expired()
                )
                assert recorder.events == [b"the last", TimeoutError]
                recorder.link.asyncio_transport.abort()
                await recorder.link.closed

    run(main)


def test_aio_send_on_lost_connection_is_undelivered(server: FakeServer) -> None:
    """Messages that the loop could not write do not count as sent. on_undelivered is
    called for each.
    """

    async def main() -> None:
        alice = await join("alice", server)
        received: list[Any] = []
        alice.on_undelivered(received.append)
        server.drop("alice")
        # The loop does not run, so that a write notices the loss first.
        wait_until_disconnected("alice", server)
        ids = [await alice.send("bob", number) for number in range(3)]
        await until(lambda: len(received) == 3)
        assert [(type(error), error.message_id) for error in received] == [
            (InDoubt, message_id) for message_id in ids
        ]
        await alice.close()

    run(main)
