"""Calls that do not fit their object say so, instead of doing nothing or the wrong thing."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from support.client_faces import PATIENCE, Asyncio, Blocking, Face
from support.fake_broker import FakeServer

from brokerd_client import aio
from brokerd_client import connect as blocking_connect
from brokerd_client.errors import TimedOut, WrongUse


@pytest.fixture(params=[Blocking, Asyncio])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    """One kind of client; all clients are closed at the end."""
    face: Face = request.param()
    yield face
    face.close()


@pytest.fixture
def clients(face: Face, server: FakeServer) -> tuple[Any, Any]:
    """Alice and bob."""
    return tuple(face.connect(server.path, name, name) for name in ("alice", "bob"))


def test_reply_to_message_raises_wrong_use(clients: tuple[Any, Any]) -> None:
    """Nothing is sent: the next frame is the message that follows."""
    alice, bob = clients
    alice.send("bob", "hello")
    message = bob.recv(PATIENCE)
    for answer in (
        lambda: message.reply("hello"),
        lambda: message.fail("no"),
        lambda: bob.reply(message, "hello"),
    ):
        with pytest.raises(WrongUse, match=r"a MESSAGE of alice can't be answered.*use send"):
            answer()
    bob.send("alice", "next")
    assert alice.recv(PATIENCE).payload == "next"
    assert alice.counters["late"] == 0


def test_reply_to_event_or_reply_raises_wrong_use(clients: tuple[Any, Any]) -> None:
    alice, bob = clients
    bob.on_request(lambda message: "answer")
    events = bob.subscribe("news")
    alice.publish("news", 1)
    for message in (alice.request("bob", "?", timeout=PATIENCE), events.recv(PATIENCE)):
        with pytest.raises(WrongUse, match="can't be answered"):
            message.reply("hello")


def test_timed_out_call_says_after_how_long(clients: tuple[Any, Any]) -> None:
    alice, _ = clients
    with pytest.raises(TimedOut, match=r"no answer from bob to \d+ within 0\.01 s"):
        alice.request("bob", "?", timeout=0.01)
    with pytest.raises(TimedOut, match=r"within 0\.01 s"):
        alice.recv(0.01)


def test_recv_of_subscription_with_callback_raises_wrong_use(clients: tuple[Any, Any]) -> None:
    """It would wait for events that the callback gets."""
    alice, _ = clients
    events = alice.subscribe("news", callback=print)
    with pytest.raises(WrongUse, match="this subscription has a callback"):
        events.recv(0)


def test_connect_without_await_names_remedy() -> None:
    def forget_to_await() -> None:
        opening: Any = aio.connect("@nowhere", "alice", "k")
        with pytest.raises(AttributeError, match=r"'send' before it is awaited.*'await connect"):
            opening.send("bob", "hello")
        with pytest.raises(AttributeError, match="_private"):
            opening._private()
        del opening
        gc.collect()

    with pytest.warns(RuntimeWarning, match=r"connect\(\) was never awaited"):
        forget_to_await()


def test_subscribe_without_await_warns(server: FakeServer) -> None:
    """A subscription with a callback looks complete without its await."""
    face = Asyncio()
    client = face.connect(server.path, "alice", "alice")
    with pytest.warns(RuntimeWarning, match=r"subscribe\(\) was never awaited"):
        face.run(lambda: str(client._inner.subscribe("a", callback=print)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        client.subscribe("a", callback=print)
        client.watch_presence()
    face.close()


@pytest.mark.parametrize(
    "register", ["on_request", "on_message", "on_undelivered", "on_connection"]
)
def test_blocking_handler_that_no_thread_can_call_is_refused(
    server: FakeServer, register: str
) -> None:
    """A coroutine function would return at once, and its message would count as handled."""

    async def handler(item: object) -> None: ...

    with blocking_connect(server.path, "alice", "alice") as alice:
        with pytest.raises(TypeError, match=r"handler is a coroutine function.*asyncio client"):
            getattr(alice, register)(handler)
        with pytest.raises(TypeError, match="a handler is a function, not NoneType"):
            getattr(alice, register)(None)
        with pytest.raises(TypeError, match="handler is a coroutine function"):
            alice.subscribe("a", callback=handler)
        assert alice.ping() > 0
