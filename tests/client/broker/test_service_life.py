"""A service's life at a real broker, in both faces: members that die, lost connections
with their reasons, and an end of reconnecting.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.client_faces import PATIENCE, Asyncio, Blocking, Face
from support.waiting import until

import brokerd_client
from brokerd.testing import RunningBroker, running
from brokerd_client.errors import (
    Abandoned,
    Disconnected,
    DisconnectedByOperator,
    KeyRemoved,
    Replaced,
    ShuttingDown,
)

ENTRIES: dict[str, dict[str, Any]] = {
    "alice": {"when_connected": "replace", "connections": 20},
    "bob": {"when_connected": "replace"},
    "worker": {"connections": 4},
    "ops": {"admin": True},
}


@pytest.fixture
def broker() -> Iterator[RunningBroker]:
    with running(clients=ENTRIES) as broker:
        yield broker


@pytest.fixture(params=[Blocking, Asyncio], ids=["blocking", "asyncio"])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    face: Face = request.param()
    yield face
    face.close()


def test_pool_of_4_in_which_one_dies_fails_only_the_request_that_it_had_begun(
    face: Face, broker: RunningBroker
) -> None:
    """Of 40 requests 39 are answered, although each member would have got 10 of them."""
    begun: list[int] = []
    may_finish = threading.Event()

    def work(message: Any) -> Any:
        begun.append(message.payload)
        until(lambda: may_finish.is_set() or message.cancelled)
        return message.payload

    async def work_async(message: Any) -> Any:
        begun.append(message.payload)
        while not may_finish.is_set():  # noqa: ASYNC110 - set in another thread
            await asyncio.sleep(0.005)
        return message.payload

    members = [
        face.connect(broker.address, "worker", broker.key("worker"), handlers=1, reconnect=False)
        for _ in range(4)
    ]
    for member in members:
        member.on_request(work_async if isinstance(face, Asyncio) else work)
    with (
        brokerd_client.connect(broker.address, "alice", broker.key("alice")) as alice,
        brokerd_client.connect(broker.address, "ops", broker.key("ops")) as ops,
        ThreadPoolExecutor(40) as callers,
    ):
        calls = [callers.submit(alice.request, "worker", number) for number in range(40)]
        until(lambda: len(begun) == 4)
        ops.control("disconnect", address=members[0].address)
        until(lambda: any(call.done() for call in calls))
        may_finish.set()
        errors = [call.exception(PATIENCE) for call in calls]
    assert [type(error) for error in errors if error is not None] == [Abandoned]
    assert sorted(begun) == list(range(40))


def replace_bob(broker: RunningBroker) -> None:
    brokerd_client.connect(broker.address, "bob", broker.key("bob")).close()


def change_key(broker: RunningBroker) -> None:
    broker.add("bob", key="another key")


def disconnect(broker: RunningBroker) -> None:
    with brokerd_client.connect(broker.address, "ops", broker.key("ops")) as ops:
        ops.control("disconnect", address="bob")


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        pytest.param(replace_bob, Replaced, id="replaced"),
        pytest.param(change_key, KeyRemoved, id="key_removed"),
        pytest.param(disconnect, DisconnectedByOperator, id="disconnected"),
        pytest.param(lambda broker: broker.stop(), ShuttingDown, id="shutting_down"),
    ],
)
def test_client_that_the_broker_disconnects_is_told_why(
    face: Face, broker: RunningBroker, act: Callable[[RunningBroker], None], reason: type
) -> None:
    """The event has the reason, and so has the error of a call that waits."""
    bob = face.connect(broker.address, "bob", broker.key("bob"), reconnect=False)
    events: list[Any] = []
    bob.on_connection(events.append)
    with ThreadPoolExecutor(1) as caller:
        waiting = caller.submit(bob.recv)
        act(broker)
        error = waiting.exception(PATIENCE)
    assert type(error) is Disconnected
    assert type(error.__cause__) is reason
    until(lambda: bool(events) and events[-1].final)
    states = [event.state for event in events]
    drains = ["draining"] if reason is ShuttingDown else []
    assert states == ["connected", *drains, "lost"]
    assert type(events[-1].reason.__cause__) is reason


def test_client_with_give_up_after_raises_in_the_call_that_waits(
    face: Face, broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call ends, and the last event is final."""
    monkeypatch.setattr("brokerd_client.protocol.backoff.CAP_S", 0.01)
    bob = face.connect(broker.address, "bob", broker.key("bob"), give_up_after=0.1)
    events: list[Any] = []
    bob.on_connection(events.append)
    broker.kill()
    with pytest.raises(Disconnected):
        bob.recv(PATIENCE)
    until(lambda: bool(events) and events[-1].final)
    assert bob.closed
