"""An asyncio client outside its event loop: every public method raises WrongLoop, and
the error names the remedy.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.fake_broker import FakeServer
from support.memory_broker import MemoryBroker, play

from brokerd_client import aio
from brokerd_client.errors import WrongLoop

Use = Callable[[aio.Client, aio.Subscription, aio.PresenceWatch, aio.Message], Any]

CALLS: dict[str, Use] = {
    "send": lambda client, subscription, watch, request: client.send("bob", 1),
    "send_confirmed": lambda client, subscription, watch, request: client.send_confirmed("bob", 1),
    "post": lambda client, subscription, watch, request: client.post("bob", 1),
    "send_many": lambda client, subscription, watch, request: client.send_many([("bob", 1)]),
    "send_many_confirmed": lambda client, subscription, watch, request: client.send_many_confirmed(
        [("bob", 1)]
    ),
    "request": lambda client, subscription, watch, request: client.request("bob", 1),
    "open_stream": lambda client, subscription, watch, request: client.open_stream("bob"),
    "listen": lambda client, subscription, watch, request: client.listen(),
    "reply": lambda client, subscription, watch, request: client.reply(request, 1),
    "publish": lambda client, subscription, watch, request: client.publish("a", 1),
    "publish_confirmed": lambda client, subscription, watch, request: client.publish_confirmed(
        "a", 1
    ),
    "recv": lambda client, subscription, watch, request: client.recv(1),
    "__anext__": lambda client, subscription, watch, request: anext(client),
    "on_request": lambda client, subscription, watch, request: client.on_request(print),
    "on_message": lambda client, subscription, watch, request: client.on_message(print),
    "on_undelivered": lambda client, subscription, watch, request: client.on_undelivered(print),
    "on_connection": lambda client, subscription, watch, request: client.on_connection(print),
    "service": lambda client, subscription, watch, request: client.service(print),
    "subscribe": lambda client, subscription, watch, request: client.subscribe("b"),
    "watch_presence": lambda client, subscription, watch, request: client.watch_presence(),
    "control": lambda client, subscription, watch, request: client.control("ping"),
    "clients": lambda client, subscription, watch, request: client.clients(),
    "whoami": lambda client, subscription, watch, request: client.whoami(),
    "ping": lambda client, subscription, watch, request: client.ping(),
    "close": lambda client, subscription, watch, request: client.close(),
    "drain": lambda client, subscription, watch, request: client.drain(),
    "wait_until_ready": lambda client, subscription, watch, request: client.wait_until_ready(),
    "__aenter__": lambda client, subscription, watch, request: client.__aenter__(),
    "__aexit__": lambda client, subscription, watch, request: client.__aexit__(None, None, None),
    "message.reply": lambda client, subscription, watch, request: request.reply(1),
    "message.done": lambda client, subscription, watch, request: request.done(),
    "message.retry": lambda client, subscription, watch, request: request.retry(),
    "message.failed": lambda client, subscription, watch, request: request.failed("no"),
    "message.dead": lambda client, subscription, watch, request: request.dead("no"),
    "message.fail": lambda client, subscription, watch, request: request.fail("no"),
    "subscription.recv": lambda client, subscription, watch, request: subscription.recv(1),
    "subscription.__anext__": lambda client, subscription, watch, request: anext(subscription),
    "subscription.__aenter__": lambda client, subscription, watch, request: (
        subscription.__aenter__()
    ),
    "subscription.close": lambda client, subscription, watch, request: subscription.close(),
    "subscription.unsubscribe": lambda client, subscription, watch, request: (
        subscription.unsubscribe()
    ),
    "watch.recv": lambda client, subscription, watch, request: watch.recv(1),
    "watch.close": lambda client, subscription, watch, request: watch.close(),
}
#: Members that work in every loop, because they only return something.
HARMLESS = {"__aiter__", "closed", "forked", "name", "address", "connected", "counters", "proxy"}


def test_wrong_loop_calls_hold_every_public_method() -> None:
    """A method that is added to the client is added to CALLS too."""
    methods = {
        name for name, _ in inspect.getmembers(aio.Client, callable) if not name.startswith("_")
    }
    assert methods - HARMLESS <= set(CALLS)


async def awaited(result: Any) -> Any:
    """Return the result, awaited if it is awaitable."""
    return await result if inspect.isawaitable(result) else result


def messages_of(use: Callable[[Use], object]) -> dict[str, str]:
    """Return the text of the WrongLoop that each call raises."""
    found = {}
    for name, call in CALLS.items():
        with pytest.raises(WrongLoop) as caught:
            use(call)
        found[name] = str(caught.value)
    return found


async def prepared(
    server: FakeServer,
) -> tuple[aio.Client, aio.Subscription, aio.PresenceWatch, aio.Message, asyncio.Task[Any]]:
    """Return a client, its subscription, watch and message, and its open request."""
    client = await aio.connect(server.path, "alice", "alice")
    request = asyncio.ensure_future(client.request("alice", 1, timeout=None))
    return (
        client,
        await client.subscribe("a"),
        await client.watch_presence(),
        await client.recv(5),
        request,
    )


def test_aio_client_in_other_loop_of_thread_raises_wrong_loop(server: FakeServer) -> None:
    """This happens with two asyncio.run in a row. Nothing is sent, and the client still
    works in its own loop.
    """
    loop = asyncio.new_event_loop()
    try:
        *parts, request = loop.run_until_complete(prepared(server))
        client = parts[0]
        sent = len(server.broker.seen)
        found = messages_of(lambda call: asyncio.run(awaited_in_loop(lambda: call(*parts))))
        assert all("connect again in this loop" in text for text in found.values())
        assert len(server.broker.seen) == sent
        assert loop.run_until_complete(client.ping()) >= 0
        # Between two runs of its loop.
        client.on_message(print)
        loop.run_until_complete(client.close())
        with pytest.raises(OSError, match="closed"):
            loop.run_until_complete(request)
    finally:
        loop.close()


async def awaited_in_loop(make: Callable[[], Any]) -> Any:
    """Call ``make`` and await its result inside the running loop."""
    return await awaited(make())


def test_aio_client_in_other_thread_raises_wrong_loop(server: FakeServer) -> None:
    """The other thread has its own loop or none; the client's loop runs meanwhile."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        *parts, request = asyncio.run_coroutine_threadsafe(prepared(server), loop).result(10)

        def step(make: Callable[[], Any]) -> object:
            # The coroutine is driven without any loop.
            result = make()
            if inspect.isawaitable(result):
                iterator = result.__await__()
                try:
                    return next(iterator)
                finally:
                    iterator.close()
            return result

        in_loop = messages_of(lambda call: asyncio.run(awaited_in_loop(lambda: call(*parts))))
        without = messages_of(lambda call: step(lambda: call(*parts)))
        assert all(
            "run_coroutine_threadsafe" in text for text in (*in_loop.values(), *without.values())
        )
        asyncio.run_coroutine_threadsafe(parts[0].close(), loop).result(10)
        with pytest.raises(OSError, match="closed"):
            asyncio.run_coroutine_threadsafe(awaited(request), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def test_aio_client_with_closed_loop_raises_wrong_loop(server: FakeServer) -> None:
    """The error is WrongLoop, not the RuntimeError of the closed loop."""

    async def connect() -> aio.Client:
        client = await aio.connect(server.path, "alice", "alice")
        await client.close()
        return client

    client = asyncio.run(connect())
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: client.send("bob", 1),
        client.ping,
        client.close,
    ]
    for call in calls:
        with pytest.raises(WrongLoop):
            asyncio.run(awaited_in_loop(call))


def test_aio_other_thread_raises_wrong_loop_while_a_read_runs_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The woken task itself may send without a look at the running loop."""

    async def scenario(network: MemoryBroker) -> None:
        async with network.join("alice") as alice:
            await alice.ping()
            waking_thread = alice._waking_thread
            with ThreadPoolExecutor(1) as other_thread:
                sent = other_thread.submit(asyncio.run, alice.send("alice", 1))
                with pytest.raises(WrongLoop):
                    sent.result(10)
            assert waking_thread == threading.get_ident()
        assert alice._waking_thread == 0

    play(monkeypatch, scenario)


def test_docs_describe_wrong_loop() -> None:
    """docs/client.md has WrongLoop in its list of errors."""
    text = (Path(__file__).parents[3] / "docs" / "client.md").read_text()
    assert "WrongLoop" in text
