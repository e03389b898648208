"""Pools that share work, requests that nobody waits for, and a service's graceful stop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.client_faces import PATIENCE, Asyncio, Blocking, Face
from support.waiting import until

import brokerd_client
from brokerd.testing import RunningBroker, running
from brokerd_client.blocking import handlers
from brokerd_client.errors import Cancelled, Closed, Expired, Offline, TimedOut

ENTRIES: dict[str, dict[str, Any]] = {
    "alice": {"connections": 20},
    "bob": {},
    "worker": {"connections": 8},
    "narrow": {"connections": 8, "in_flight": 1},
}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(clients=ENTRIES) as broker:
        yield broker


@pytest.fixture(params=[Blocking, Asyncio], ids=["blocking", "asyncio"])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    face: Face = request.param()
    yield face
    face.close()


class Service:
    """A client whose handler works until it may finish.

    begun: payloads of the requests that its handler began. ended: how each of them
    ended.
    """

    def __init__(self, face: Face, broker: RunningBroker, name: str, **options: Any) -> None:
        self.begun: list[Any] = []
        self.ended: list[str] = []
        self.messages: list[Any] = []
        self.may_finish = threading.Event()
        self.client = face.connect(broker.address, name, broker.key(name), **options)
        is_async = isinstance(face, Asyncio)
        self.client.on_request(self.work_async if is_async else self.work)

    def work(self, message: Any) -> Any:
        self.messages.append(message)
        self.begun.append(message.payload)
        until(lambda: self.may_finish.is_set() or message.cancelled)
        self.ended.append("cancelled" if message.cancelled else "done")
        return message.payload

    async def work_async(self, message: Any) -> Any:
        self.messages.append(message)
        self.begun.append(message.payload)
        try:
            while not self.may_finish.is_set():  # noqa: ASYNC110 - set in another thread
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        self.ended.append("done")
        return message.payload


@pytest.fixture
def alice(broker: RunningBroker) -> Iterator[brokerd_client.Client]:
    with brokerd_client.connect(broker.address, "alice", broker.key("alice")) as client:
        yield client


@pytest.fixture
def callers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as executor:
        yield executor


def test_pool_with_a_busy_member_gives_its_requests_to_free_members(
    face: Face, broker: RunningBroker, alice: brokerd_client.Client, callers: ThreadPoolExecutor
) -> None:
    slow, quick = Service(face, broker, "narrow"), Service(face, broker, "narrow")
    quick.may_finish.set()
    answers = [callers.submit(alice.request, "narrow", number) for number in range(11)]
    until(lambda: sum(answer.done() for answer in answers) == 10)
    until(lambda: len(slow.begun) == 1)
    slow.may_finish.set()
    assert sorted(answer.result(PATIENCE).payload for answer in answers) == list(range(11))


def test_client_with_a_request_handler_gets_as_many_requests_as_it_has_handlers(
    face: Face, broker: RunningBroker, alice: brokerd_client.Client, callers: ThreadPoolExecutor
) -> None:
    one = Service(face, broker, "worker", handlers=2)
    other = Service(face, broker, "worker", handlers=2)
    answers = [callers.submit(alice.request, "worker", number) for number in range(10)]
    until(lambda: len(one.begun) == len(other.begun) == 2)
    one.may_finish.set()
    other.may_finish.set()
    assert sorted(answer.result(PATIENCE).payload for answer in answers) == list(range(10))


def test_in_flight_limit_that_nested_requests_have_raised_is_lowered_after_them(
    broker: RunningBroker,
    alice: brokerd_client.Client,
    callers: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handlers, "_REVIEW_S", 0.05)
    face = Blocking()
    nested = Service(face, broker, "bob")
    worker = face.connect(broker.address, "worker", broker.key("worker"), handlers=1)
    worker.on_request(lambda message: worker.request("bob", message.payload).payload)
    answers = [callers.submit(alice.request, "worker", number) for number in range(4)]
    until(lambda: len(nested.begun) == 4)
    assert worker._dialog._in_flight >= 4
    nested.may_finish.set()
    assert sorted(answer.result(PATIENCE).payload for answer in answers) == list(range(4))
    until(lambda: worker._dialog._in_flight == 1)
    worker.ping()
    begun, may_finish = [], threading.Event()

    @worker.on_request
    def hold(message: Any) -> None:
        begun.append(message)
        may_finish.wait(PATIENCE)

    answers = [callers.submit(alice.request, "worker", number) for number in range(3)]
    until(lambda: broker.stats()["requests_waiting"] == 2)
    until(lambda: (len(begun), len(worker._requests.inbox.items)) == (1, 0))
    may_finish.set()
    assert [answer.result(PATIENCE).payload for answer in answers] == [None] * 3
    face.close()


def test_in_flight_limit_that_nested_requests_have_raised_is_checked_until_they_end(
    broker: RunningBroker,
    alice: brokerd_client.Client,
    callers: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They take longer than the time between two checks."""
    monkeypatch.setattr(handlers, "_REVIEW_S", 0.05)
    face = Blocking()
    nested = Service(face, broker, "bob")
    worker = face.connect(broker.address, "worker", broker.key("worker"), handlers=1)
    checks: list[None] = []
    check = worker._for_requests._on_review
    monkeypatch.setattr(worker._for_requests, "_on_review", lambda: (checks.append(None), check()))
    worker.on_request(lambda message: worker.request("bob", message.payload).payload)
    answers = [callers.submit(alice.request, "worker", number) for number in range(4)]
    until(lambda: len(nested.begun) == 4)
    checked = len(checks)
    until(lambda: len(checks) >= checked + 3)
    assert worker._dialog._in_flight >= 4
    nested.may_finish.set()
    assert sorted(answer.result(PATIENCE).payload for answer in answers) == list(range(4))
    until(lambda: worker._dialog._in_flight == 1)
    face.close()


def test_request_that_times_out_is_cancelled_in_its_handler_and_not_begun_later(
    face: Face, broker: RunningBroker, alice: brokerd_client.Client, callers: ThreadPoolExecutor
) -> None:
    """A longer ttl shows that the cancel ends the handler, and not the broker's clock."""
    service = Service(face, broker, "narrow")
    calls = [callers.submit(alice.request, "narrow", "begun", timeout=3, ttl=600)]
    until(lambda: service.begun == ["begun"])
    calls += [callers.submit(alice.request, "narrow", n, timeout=0.1) for n in range(3)]
    for call in calls:
        assert isinstance(call.exception(PATIENCE), TimedOut)
    until(lambda: service.ended == ["cancelled"])
    service.may_finish.set()
    assert alice.request("narrow", "next", timeout=PATIENCE).payload == "next"
    assert len(service.begun) == 2


def test_request_whose_requester_disconnects_is_cancelled_in_its_handler(
    face: Face, broker: RunningBroker, alice: brokerd_client.Client, callers: ThreadPoolExecutor
) -> None:
    service = Service(face, broker, "bob")
    requester = brokerd_client.connect(broker.address, "alice", broker.key("alice"))
    call = callers.submit(requester.request, "bob", "begun")
    until(lambda: service.begun == ["begun"])
    requester.close()
    until(lambda: service.ended == ["cancelled"])
    assert isinstance(call.exception(PATIENCE), Closed)
    service.may_finish.set()
    assert alice.request("bob", "next", timeout=PATIENCE).payload == "next"


def test_request_with_a_ttl_of_its_own_raises_expired(
    face: Face, broker: RunningBroker, alice: brokerd_client.Client
) -> None:
    service = Service(face, broker, "bob")
    with pytest.raises(Expired):
        alice.request("bob", 1, ttl=2, timeout=PATIENCE)
    until(lambda: service.ended == ["cancelled"])


def test_message_deadline_is_the_time_when_the_requester_stops_waiting(
    face: Face, broker: RunningBroker, alice: brokerd_client.Client
) -> None:
    service = Service(face, broker, "bob")
    service.may_finish.set()
    before = time.monotonic()
    alice.request("bob", 1, timeout=15)
    alice.request("bob", 2, timeout=None)
    timed, endless = service.messages
    assert endless.deadline is None
    assert before + 15 <= timed.deadline <= time.monotonic() + 15


def test_asyncio_request_that_is_cancelled_cancels_its_handler(broker: RunningBroker) -> None:
    face = Asyncio()
    service = Service(face, broker, "bob")
    alice = face.connect(broker.address, "alice", broker.key("alice"))

    async def give_up() -> None:
        task = asyncio.ensure_future(alice._inner.request("bob", 1, timeout=None))
        while not service.begun:  # noqa: ASYNC110 - filled by a handler
            await asyncio.sleep(0.005)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    face.run(give_up)
    until(lambda: service.ended == ["cancelled"])
    service.may_finish.set()
    assert alice.request("bob", 2).payload == 2
    assert alice.counters["undelivered"] == 0
    face.close()


def test_asyncio_handler_that_survives_its_cancellation_does_not_hurt_the_next(
    broker: RunningBroker, alice: brokerd_client.Client
) -> None:
    face = Asyncio()
    bob = face.connect(broker.address, "bob", broker.key("bob"))
    survived = []

    async def stubborn(message: Any) -> Any:
        if message.payload == "next":
            await asyncio.sleep(0.01)
            return "fine"
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(PATIENCE)
        survived.append(message.payload)
        return "too late"

    bob.on_request(stubborn)
    with pytest.raises(TimedOut):
        alice.request("bob", "first", timeout=3)
    until(lambda: survived == ["first"])
    assert alice.request("bob", "next").payload == "fine"
    face.close()


def test_answer_to_a_cancelled_request_is_discarded_and_counted(
    broker: RunningBroker, alice: brokerd_client.Client
) -> None:
    with brokerd_client.connect(broker.address, "bob", broker.key("bob")) as bob:
        with ThreadPoolExecutor(1) as caller:
            call = caller.submit(alice.request, "bob", 1, timeout=2, ttl=PATIENCE)
            request = bob.recv(PATIENCE)
            assert isinstance(call.exception(PATIENCE), TimedOut)
        until(lambda: request.cancelled)
        request.reply("late")
        assert bob.counters["late"] == 1


def test_drain_finishes_what_runs_and_returns_what_waits(
    face: Face, broker: RunningBroker, alice: brokerd_client.Client, callers: ThreadPoolExecutor
) -> None:
    leaving = Service(face, broker, "narrow")
    first = callers.submit(alice.request, "narrow", "first")
    until(lambda: leaving.begun == ["first"])
    waiting = callers.submit(alice.request, "narrow", "second")
    drained = callers.submit(leaving.client.drain, PATIENCE)
    staying = Service(face, broker, "narrow")
    staying.may_finish.set()
    assert waiting.result(PATIENCE).payload == "second"
    leaving.may_finish.set()
    assert first.result(PATIENCE).payload == "first"
    assert drained.result(PATIENCE) is True
    assert leaving.client.closed
    assert (leaving.begun, staying.begun) == (["first"], ["second"])


def test_drain_returns_requests_that_no_handler_has_begun(
    broker: RunningBroker, alice: brokerd_client.Client, callers: ThreadPoolExecutor
) -> None:
    with brokerd_client.connect(broker.address, "worker", broker.key("worker")) as leaving:
        calls = [callers.submit(alice.request, "worker", number) for number in range(3)]
        taken = leaving.recv(PATIENCE)
        until(lambda: len(leaving._inbox.inbox.items) == 2)
        with brokerd_client.connect(broker.address, "worker", broker.key("worker")) as staying:
            staying.on_request(lambda message: "by another member")
            taken.reply("by this one")
            assert leaving.drain(PATIENCE)
            results = sorted(call.result(PATIENCE).payload for call in calls)
    assert results == ["by another member", "by another member", "by this one"]


def test_drain_of_a_single_client_tells_requesters_that_nothing_was_begun(
    broker: RunningBroker, alice: brokerd_client.Client, callers: ThreadPoolExecutor
) -> None:
    with brokerd_client.connect(broker.address, "bob", broker.key("bob")) as bob:
        call = callers.submit(alice.request, "bob", 1)
        until(lambda: len(bob._inbox.inbox.items) == 1)
        assert bob.drain(PATIENCE)
    assert isinstance(call.exception(PATIENCE), Offline)


def test_drain_that_takes_too_long_closes_and_returns_false(
    face: Face, broker: RunningBroker, alice: brokerd_client.Client, callers: ThreadPoolExecutor
) -> None:
    service = Service(face, broker, "bob")
    call = callers.submit(alice.request, "bob", 1)
    until(lambda: service.begun == [1])
    assert service.client.drain(0.1) is False
    assert service.client.closed
    service.may_finish.set()
    assert call.exception(PATIENCE) is not None


def test_drain_finishes_messages_that_were_received(face: Face, broker: RunningBroker) -> None:
    done: list[Any] = []
    bob = face.connect(broker.address, "bob", broker.key("bob"))
    began = threading.Event()
    go_on = threading.Event()

    def note(message: Any) -> None:
        began.set()
        go_on.wait(0.01)
        done.append(message.payload)

    bob.on_message(note)
    with brokerd_client.connect(broker.address, "alice", broker.key("alice")) as alice:
        alice.send_many([("bob", number) for number in range(20)])
        assert began.wait(PATIENCE)
    assert bob.drain(PATIENCE) is True
    assert done == list(range(20))


def test_rolling_restart_of_a_pool_under_load_fails_no_request(
    face: Face, broker: RunningBroker, callers: ThreadPoolExecutor
) -> None:
    def member() -> Any:
        client = face.connect(broker.address, "worker", broker.key("worker"))
        if isinstance(face, Asyncio):

            async def work(message: Any) -> Any:
                await asyncio.sleep(0.002)
                return message.payload

            client.on_request(work)
        else:

            def work_here(message: Any) -> Any:
                time.sleep(0.002)
                return message.payload

            client.on_request(work_here)
        return client

    stop = threading.Event()

    def load() -> int:
        count = 0
        with brokerd_client.connect(broker.address, "alice", broker.key("alice")) as client:
            while not stop.is_set():
                assert client.request("worker", count, timeout=PATIENCE).payload == count
                count += 1
        return count

    members = [member() for _ in range(4)]
    loads = [callers.submit(load) for _ in range(16)]
    try:
        for old in members:
            member()
            assert old.drain(PATIENCE)
    finally:
        stop.set()
    assert all(each.result(PATIENCE) > 0 for each in loads)


def test_handler_of_a_closed_client_ends_without_a_traceback(
    face: Face, broker: RunningBroker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "brokerd_client")
    began, closed = threading.Event(), threading.Event()
    client = face.connect(broker.address, "bob", broker.key("bob"))
    inner = getattr(client, "_inner", client)

    def work(message: Any) -> Any:
        began.set()
        closed.wait(PATIENCE)
        return inner.request("alice", 1)

    async def work_async(message: Any) -> Any:
        began.set()
        while not closed.is_set():
            try:
                await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                break
        return await inner.request("alice", 1)

    client.on_request(work_async if isinstance(face, Asyncio) else work)
    with (
        brokerd_client.connect(broker.address, "alice", broker.key("alice")) as alice,
        ThreadPoolExecutor(1) as caller,
    ):
        call = caller.submit(alice.request, "bob", 1)
        assert began.wait(PATIENCE)
        closing = threading.Thread(target=client.close)
        closing.start()
        until(lambda: client.closed)
        closed.set()
        closing.join(PATIENCE)
        assert call.exception(PATIENCE) is not None
    assert not [record for record in caplog.records if record.exc_info]


def test_cancelled_is_the_error_of_a_cancelled_request() -> None:
    assert Cancelled("x").code == "cancelled"
    assert issubclass(Closed, brokerd_client.BrokerdError)
