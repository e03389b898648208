"""Unexpected exceptions in callbacks of the asyncio client: they cost it the
connection, and never end the client.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from support.fake_broker import Session
from support.memory_broker import PATIENCE, MemoryBroker, play

from brokerd_client import aio
from brokerd_client.aio import base as aio_base
from brokerd_client.errors import BrokerdError, Disconnected, TimedOut
from brokerd_client.wire.envelope import Envelope, Kind


class PanicException(BaseException):
    """What pyo3 raises where Rust panics: not an Exception."""


ERRORS: list[Callable[[], BaseException]] = [
    lambda: LookupError("unforeseen"),
    lambda: PanicException("unforeseen"),
    lambda: asyncio.CancelledError("unforeseen"),
    lambda: AssertionError("unforeseen"),
]
IDS = ["LookupError", "panic", "CancelledError", "AssertionError"]


@pytest.fixture(autouse=True)
def reconnect_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make clients reconnect at once."""
    monkeypatch.setattr(aio_base, "jitter", lambda: 0.0)


async def until(condition: Callable[[], bool]) -> None:
    """Run the loop until the condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.001)


def once(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, error: BaseException
) -> list[BaseException]:
    """Make a method raise the error at its next call; return a list that is empty once
    it has.
    """
    left = [error]
    method = getattr(owner, name)

    def act(*args: Any, **options: Any) -> Any:
        if left:
            raise left.pop()
        return method(*args, **options)

    monkeypatch.setattr(owner, name, act)
    return left


#: The object and the method that raise, and the action that makes the loop call the
#: method.
PLACES: dict[str, tuple[Callable[[aio.Client], object], str, Callable[[aio.Client], object]]] = {
    "data received": (lambda client: client._dialog, "receive", lambda client: None),
    "one message received": (lambda client: client._dialog, "lone_message", lambda client: None),
    "messages passed on": (lambda client: client, "_apply", lambda client: None),
    "writing": (lambda client: client._transport.asyncio_transport, "write", lambda client: None),  # type: ignore[union-attr]
    "writable": (
        lambda client: client,
        "_on_writable",
        lambda client: client._transport.pause_writing(),
    ),  # type: ignore[union-attr]
    "check of the peer": (
        lambda client: Peer,
        "remaining_s",
        lambda client: client._transport._check_peer(None, Peer()),  # type: ignore[union-attr, arg-type]
    ),
    "the timer": (lambda client: client._dialog, "tick", lambda client: client._tick()),
}


class Peer:
    """Stands in for keepalive.Silence."""

    def remaining_s(self, *args: object) -> float:
        """Return that the peer answers."""
        return math.inf


@pytest.mark.parametrize("make", ERRORS, ids=IDS)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_aio_callback_raising_is_lost_connection(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: Any,
    make: Callable[[], BaseException],
) -> None:
    """A waiting call gets an error, the log has the exception, and the client
    reconnects.
    """
    owner, method, provoke = place

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            subscription = await alice.subscribe("a")
            # Bob answers nothing.
            request = asyncio.ensure_future(alice.request("bob", 1, timeout=None))
            await bob.recv(PATIENCE)
            left = once(monkeypatch, owner(alice), method, make())
            provoke(alice)
            await alice.send("bob", 1)
            await alice.send_many([("alice", 1), ("alice", 2)])
            await until(lambda: not left)
            with pytest.raises(Disconnected):
                await request
            await until(lambda: alice.connected)
            monkeypatch.undo()
            monkeypatch.setattr(aio_base, "dial", network.dial)
            assert await alice.ping() >= 0
            await bob.publish("a", "event")
            assert (await subscription.recv(PATIENCE)).payload == "event"
            assert alice.counters["losses"] == 1

    play(monkeypatch, scenario)
    assert "unforeseen" in caplog.text


@pytest.mark.parametrize("make", ERRORS, ids=IDS)
@pytest.mark.parametrize("step", ["opened", "dial"])
def test_aio_reconnect_raising_is_lost_connection(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    step: str,
    make: Callable[[], BaseException],
) -> None:
    """The loss is counted, the log has the exception, and the client tries again."""

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice:
            left = once(
                monkeypatch,
                *((alice._dialog, "opened") if step == "opened" else (alice, "_dial")),
                make(),
            )
            network.drop("alice")
            await until(lambda: not left and alice.connected)
            assert await alice.ping() >= 0
            assert alice.counters["losses"] == alice.counters["failed_attempts"] == 1

    play(monkeypatch, scenario)
    assert "unforeseen" in caplog.text


@pytest.mark.parametrize("make", ERRORS, ids=IDS)
def test_aio_connect_raising_is_cause_of_disconnected(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], BaseException]
) -> None:
    """connect() raises Disconnected, and the exception is its cause."""

    async def scenario(network: MemoryBroker) -> None:
        for name in ("nonce", "dial"):
            error = make()

            def fail(*args: object, error: BaseException = error) -> Any:
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(aio_base, name, fail)
                with pytest.raises(Disconnected, match="unforeseen") as caught:
                    await network.join("alice", timeout=5)
                assert caught.value.__cause__ is error

    play(monkeypatch, scenario)


def test_aio_loss_handling_raising_ends_client(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that can't reconnect leaves no task waiting: every call raises
    Disconnected.
    """

    async def scenario(network: MemoryBroker) -> None:
        alice = await network.join("alice")
        tasks = [
            asyncio.ensure_future(alice.recv()),
            asyncio.ensure_future(alice.request("alice", 1, timeout=None)),
            asyncio.ensure_future(anext(await alice.subscribe("a"))),
        ]
        await asyncio.sleep(0)
        once(monkeypatch, alice._dialog, "lost", LookupError("unforeseen"))
        network.drop("alice")
        # The request comes back to alice itself, as a message for the first of the
        # tasks.
        for task in tasks[1:]:
            with pytest.raises(Disconnected, match="unforeseen"):
                await asyncio.wait_for(task, PATIENCE)
        with pytest.raises(Disconnected):
            await alice.send("bob", 1)
        await alice.close()

    play(monkeypatch, scenario)
    assert "unforeseen" in caplog.text


@pytest.mark.parametrize("connected", [True, False])
def test_aio_connect_task_cancelled_makes_calls_raise(
    monkeypatch: pytest.MonkeyPatch, connected: bool
) -> None:
    """A program that cancels every task also cancels the task that reconnects. From the
    next loss on every call raises Disconnected.
    """

    async def scenario(network: MemoryBroker) -> None:
        alice = await network.join("alice")
        waiting = asyncio.ensure_future(alice.recv())
        if not connected:
            monkeypatch.setattr(aio_base, "jitter", lambda: 0.99)
            network.drop("alice")
            await until(lambda: not alice.connected)
        alice._connect_task.cancel()
        await asyncio.sleep(0.01)
        if connected:
            assert await alice.ping() >= 0
            network.drop("alice")
        with pytest.raises(Disconnected, match="no longer reconnects"):
            await asyncio.wait_for(waiting, PATIENCE)
        with pytest.raises(Disconnected):
            await alice.ping()
        await alice.close()

    play(monkeypatch, scenario)


def test_aio_exit_in_callback_leaves_loop_and_loses_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A KeyboardInterrupt can come in the middle of a read. The rest of the stream is
    not read as the next message.
    """

    async def begin() -> tuple[MemoryBroker, aio.Client]:
        network = MemoryBroker("alice")
        monkeypatch.setattr(aio_base, "dial", network.dial)
        return network, await network.join("alice")

    async def reconnected(client: aio.Client) -> None:
        await until(lambda: client.connected and client.counters["losses"] == 1)
        assert await client.ping() >= 0
        await client.close()

    loop = asyncio.new_event_loop()
    try:
        _, alice = loop.run_until_complete(begin())
        once(monkeypatch, alice._dialog, "receive", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(alice.ping())
        monkeypatch.setattr(aio_base, "jitter", lambda: 0.0)
        loop.run_until_complete(reconnected(alice))
    finally:
        loop.close()


def test_aio_flush_lost_by_loop_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt in the event loop can cost it a callback. The next timeout or the
    next read flushes.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice, network.join("bob") as bob:
            alice._flushing = True
            with pytest.raises(TimedOut):
                await alice.request("bob", 1, timeout=0.05)
            assert (await bob.recv(PATIENCE)).payload == 1
            assert await alice.ping() >= 0

            alice._flushing = True
            await alice.send("bob", 2)
            await bob.send("alice", "wake up")
            assert (await bob.recv(PATIENCE)).payload == 2

    play(monkeypatch, scenario)


CALLS: dict[str, Callable[[aio.Client], Awaitable[Any]]] = {
    "send_confirmed": lambda client: client.send_confirmed("bob", 1, timeout=0.1),
    "send_many_confirmed": lambda client: client.send_many_confirmed([("bob", 1)] * 3, timeout=0.1),
    "request": lambda client: client.request("bob", 1, timeout=0.1),
    "publish_confirmed": lambda client: client.publish_confirmed("a", 1, timeout=0.1),
    "subscribe": lambda client: client.subscribe("a", timeout=0.1)._opener(),
    "watch_presence": lambda client: client.watch_presence(timeout=0.1)._opener(),
    "control": lambda client: client.control("ping", timeout=0.1),
}


@pytest.mark.timing
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_aio_call_missing_in_dialog_ends_at_timeout(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[aio.Client], Awaitable[Any]]
) -> None:
    """Whatever happened to the call inside the client, its task waits no longer than
    its timeout.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice:
            network.broker.intercept = lambda session, envelope: True
            calling = asyncio.ensure_future(call(alice))
            await asyncio.sleep(0.01)
            alice._dialog.pending_calls.take_all()
            began = time.monotonic()
            try:
                outcome = await asyncio.wait_for(calling, PATIENCE)
            except TimedOut as error:
                outcome = [error]
            assert {type(each) for each in outcome} == {TimedOut}
            assert time.monotonic() - began < PATIENCE / 2
            network.broker.intercept = None
            assert alice._subscriptions == set()
            assert len(alice._dialog.subscriptions) == 0

    play(monkeypatch, scenario)


OPERATIONS: dict[str, Callable[[aio.Client], Awaitable[Any]]] = {
    "ping": lambda client: client.control("ping", timeout=0.1),
    "clients": lambda client: client.control("clients", timeout=0.1),
    "whoami": lambda client: client.control("whoami", timeout=0.1),
    "subscribe": lambda client: client.subscribe("a", timeout=0.1)._opener(),
    "watch_presence": lambda client: client.watch_presence(timeout=0.1)._opener(),
}


@pytest.mark.timing
@pytest.mark.parametrize("call", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize(
    "answer",
    [
        b"[1]",
        b"7",
        b"null",
        b"",
        b"\xff",
        b'{"clients": 7}',
        b'{"clients": [7]}',
        b"[" * 3000,
        b'{"a":' * 3000,
        b"9" * 5000,
    ],
    ids=lambda answer: answer[:16].decode(errors="replace"),
)
def test_aio_control_with_invalid_answer_has_outcome(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[aio.Client], Awaitable[Any]], answer: bytes
) -> None:
    """The call ends in time, whatever the broker answers. The client works on, on this
    connection or on the next.
    """

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice", timeout=PATIENCE) as alice:

            def answer_wrongly(session: Session, envelope: Envelope) -> bool:
                asked = json.loads(envelope.payload)
                if call is OPERATIONS["watch_presence"] and asked["op"] != "clients":
                    return False
                if asked["op"] == "subscribe":
                    session.subscriptions.append((asked["topic"], ""))
                session.deliver(Envelope(Kind.REPLY, envelope.id, "$broker", answer, 2))
                network.broker.intercept = None
                return True

            network.broker.intercept = answer_wrongly
            began = time.monotonic()
            try:
                opened = await asyncio.wait_for(call(alice), PATIENCE)
            except BrokerdError:
                opened = None
            assert time.monotonic() - began < PATIENCE / 2
            if isinstance(opened, (aio.Subscription, aio.PresenceWatch)):
                await opened.close()
            await until(lambda: alice.connected)
            assert await alice.ping() >= 0

    play(monkeypatch, scenario)
