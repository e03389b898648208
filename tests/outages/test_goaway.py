"""A broker that is stopped under load: every plain send arrives, or its sender hears that it did not, once."""

from __future__ import annotations

import asyncio
import itertools
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from brokerd.testing import RunningBroker
from brokerd_client import backoff
from brokerd_client.blocking_link import Link
from brokerd_client.errors import BrokerdError

TIMEOUT_S = 30.0
BURST = 20
#: Bursts that are sent before each stop.
BURSTS_BEFORE = 5

CLIENTS = {"alice": {}, "absent": {}, "bob": {"queue": "64MiB"}, "ops": {"admin": True}}
WAYS = ["stop", "drain"]


class Place:
    """A broker, and what its clients need to reach it."""

    def __init__(self, broker: RunningBroker, options: dict[str, Any]) -> None:
        self.broker = broker
        self.options = options

    def stop(self, way: str) -> None:
        """Have the broker end: by its own stop(), or asked for by an administrator as ``brokerctl drain`` does."""
        daemon = self.broker._daemon
        assert daemon is not None
        if way == "drain":
            with self.broker.connect("ops", **self.options) as ops:
                assert ops.control("drain") == {"draining": True}
                self.broker._on_loop(daemon.stopped.wait())
            self.broker._daemon = None
        else:
            self.broker.stop()

    def begin_to_stop(self) -> None:
        """Have the broker tell its clients that it ends, and return when it has."""
        daemon = self.broker._daemon
        assert daemon is not None

        async def begin() -> None:
            daemon.stop_soon("the test says so")
            for _ in range(50):
                await asyncio.sleep(0.001)

        self.broker._on_loop(begin())

    def end_stop(self) -> None:
        daemon = self.broker._daemon
        assert daemon is not None
        self.broker._on_loop(daemon.stopped.wait())
        self.broker._daemon = None


@pytest.fixture(params=["plain", "tls"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Return a broker with clients that connect again at once: many stops are not to take their waits."""
    monkeypatch.setattr(backoff, "delay", lambda attempt, chance: 0.01)
    if request.param == "plain":
        with RunningBroker(CLIENTS, limits={"drain_timeout": "20s"}) as broker:
            yield Place(broker, {})
        return
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    certificate, key = tmp_path / "s.pem", tmp_path / "s.key"
    made.cert_chain_pems[0].write_to_path(certificate)
    key.touch(mode=0o600)
    made.private_key_pem.write_to_path(key)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    tls = {"certificate": str(certificate), "key": str(key)}
    with RunningBroker(CLIENTS, limits={"drain_timeout": "20s"}, tls=tls) as broker:
        yield Place(broker, {"ssl": context})


class Account:
    """What was sent, by id; what arrived and what was reported."""

    def __init__(self) -> None:
        self.sent: dict[int, bytes] = {}
        self.arrived: Counter[bytes] = Counter()
        self.reported: Counter[int] = Counter()

    def hear(self, error: BrokerdError) -> None:
        self.reported[getattr(error, "id", -1)] += 1

    def note(self, id: int) -> None:
        self.sent[id] = self.next_body()

    def next_body(self) -> bytes:
        return b"%d" % len(self.sent)

    def is_settled(self) -> bool:
        return len(self.arrived) + len(self.reported) >= len(self.sent)

    def check(self) -> None:
        """Hold every send to exactly one outcome."""
        assert max(self.arrived.values(), default=1) == 1
        assert max(self.reported.values(), default=1) == 1
        missing = [id for id, body in self.sent.items() if not self.arrived[body] and not self.reported[id]]
        both = [id for id, body in self.sent.items() if self.arrived[body] and self.reported[id]]
        assert (len(missing), len(both)) == (0, 0), f"of {len(self.sent)} sent"
        assert set(self.reported) <= set(self.sent)


def run_blocking(place: Place, stops: int) -> None:
    broker, account = place.broker, Account()
    alice, bob = broker.connect("alice", **place.options), broker.connect("bob", **place.options)
    alice.on_undelivered(account.hear)
    ended = threading.Event()
    bursts = [0]

    def send() -> None:
        for number in itertools.count():
            if ended.is_set():
                return
            for _ in range(BURST):
                body = b"%d" % len(account.sent)
                account.sent[alice.send("bob", body, timeout=TIMEOUT_S)] = body
            bursts[0] = number
            threading.Event().wait(0.0005)

    def receive() -> None:
        for message in bob:
            account.arrived[message.body] += 1

    threads = [threading.Thread(target=send), threading.Thread(target=receive)]
    for thread in threads:
        thread.start()
    for number in range(stops):
        before = bursts[0]
        while bursts[0] < before + BURSTS_BEFORE:
            threading.Event().wait(0.001)
        place.stop(WAYS[number % 2])
        broker.start()
    ended.set()
    threads[0].join()
    alice.ping()
    for _ in range(int(TIMEOUT_S * 100)):
        if account.is_settled():
            break
        threading.Event().wait(0.01)
    bob.close()
    threads[1].join()
    alice.close()
    account.check()


async def run_asyncio(place: Place, stops: int) -> None:
    broker, account = place.broker, Account()
    alice = await broker.connect_async("alice", **place.options)
    bob = await broker.connect_async("bob", **place.options)
    alice.on_undelivered(account.hear)
    bob.on_message(lambda message: account.arrived.update([message.body]))
    ended = asyncio.Event()
    bursts = [0]

    async def send() -> None:
        for number in itertools.count():
            if ended.is_set():
                return
            for _ in range(BURST):
                body = b"%d" % len(account.sent)
                account.sent[await alice.send("bob", body, timeout=TIMEOUT_S)] = body
            bursts[0] = number
            await asyncio.sleep(0.0005)

    sending = asyncio.create_task(send())
    for number in range(stops):
        before = bursts[0]
        while bursts[0] < before + BURSTS_BEFORE:  # noqa: ASYNC110 - counted by a task beside
            await asyncio.sleep(0.001)
        await asyncio.to_thread(place.stop, WAYS[number % 2])
        await asyncio.to_thread(broker.start)
    ended.set()
    await sending
    await alice.ping()
    for _ in range(int(TIMEOUT_S * 100)):
        if account.is_settled():
            break
        await asyncio.sleep(0.01)
    await bob.close()
    await alice.close()
    account.check()


def test_sends_before_a_stop_is_noticed_by_blocking_client_are_reported(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker has said that it ends, and the client has not read it yet: it hears what becomes of each send."""
    broker, account = place.broker, Account()
    alice = broker.connect("alice", **place.options)
    alice.on_undelivered(account.hear)
    alice.ping()
    reads_on = threading.Event()
    act = Link.act

    def late(self: Link, *, readable: bool, writable: bool) -> None:
        reads_on.wait(TIMEOUT_S)
        act(self, readable=readable, writable=writable)

    monkeypatch.setattr(Link, "act", late)
    place.begin_to_stop()
    for _ in range(BURST):
        account.note(alice.send("absent", account.next_body()))
    reads_on.set()
    place.end_stop()
    broker.start()
    alice.ping()
    alice.close()
    assert account.reported == dict.fromkeys(account.sent, 1)


def test_sends_before_a_stop_is_noticed_by_asyncio_client_are_reported(place: Place) -> None:
    """The broker has said that it ends, and the client has not read it yet: it hears what becomes of each send."""
    broker, account = place.broker, Account()

    async def run() -> None:
        alice = await broker.connect_async("alice", **place.options)
        alice.on_undelivered(account.hear)
        await alice.ping()
        # The client's event loop stands still meanwhile, and writes what is sent before it reads.
        place.begin_to_stop()
        for _ in range(BURST):
            account.note(await alice.send("absent", account.next_body()))
        await asyncio.to_thread(place.end_stop)
        await asyncio.to_thread(broker.start)
        await alice.ping()
        await alice.close()

    asyncio.run(run())
    assert account.reported == dict.fromkeys(account.sent, 1)


def test_stops_under_load_of_blocking_client_lose_nothing(place: Place) -> None:
    run_blocking(place, 2)


def test_stops_under_load_of_asyncio_client_lose_nothing(place: Place) -> None:
    asyncio.run(run_asyncio(place, 2))


@pytest.mark.slow
def test_many_stops_under_load_of_blocking_client_lose_nothing(place: Place) -> None:
    run_blocking(place, 300)


@pytest.mark.slow
def test_many_stops_under_load_of_asyncio_client_lose_nothing(place: Place) -> None:
    asyncio.run(run_asyncio(place, 300))
