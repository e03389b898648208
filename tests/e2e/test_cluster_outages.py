"""Accounts of messages between two brokers, over faults of a broker and of NATS.

Each id has one outcome. No message is repeated or reordered, and none that was reported as
offline is delivered. Only an ERROR may follow a RECEIPT: its recipient's connection ended.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
from support.broker_process import BrokerProcess
from support.nats_server import nats_server, needs_nats
from support.raw_client import ERROR, MESSAGE, RECEIPT, WANT_RECEIPT, Raw

pytestmark = [needs_nats, pytest.mark.slow]

MESSAGES: Final = 1200


class Pair:
    """Two brokers on one NATS server, with alice at one and bob at the other."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.stack = stack
        self.nats = stack.enter_context(nats_server(folder))
        self.a, self.b = (self.start(folder, host) for host in "ab")
        for each in (self.a, self.b):
            each.wait("cluster.host_found")
        self.alice = self.login(self.a, "alice")
        self.bob = self.login(self.b, "bob")
        self.outcomes: defaultdict[int, list[str]] = defaultdict(list)
        self.delivered: list[int] = []
        while not self._sees_bob():
            time.sleep(0.02)
        for target in (self._read_outcomes, self._read_messages):
            threading.Thread(target=target, daemon=True).start()

    def start(self, folder: Path, host: str) -> BrokerProcess:
        """Start a broker."""
        (folder / host).mkdir(exist_ok=True)
        cluster = {"host": host, "nats": [self.nats.url]}
        broker = BrokerProcess(
            folder / host, cluster=cluster, limits={"remote_timeout": "1s"}, log={"level": "debug"}
        )
        self.stack.enter_context(broker)
        return broker

    def login(self, broker: BrokerProcess, name: str) -> Raw:
        """Connect a client."""
        raw = broker.login(name)
        self.stack.callback(raw.close)
        return raw

    def _sees_bob(self) -> bool:
        """Return whether bob is online at alice's broker; asked before the threads read."""
        clients = self.alice.ask("clients").json["clients"]
        return any(each["name"] == "bob" and each["online"] for each in clients)

    def _read_outcomes(self) -> None:
        while True:
            try:
                frame = self.alice.recv()
            except (OSError, EOFError, ValueError):
                return
            if frame.kind == RECEIPT:
                self.outcomes[frame.id].append("receipt")
            elif frame.kind == ERROR:
                self.outcomes[frame.id].append(frame.code)

    def _read_messages(self) -> None:
        while True:
            try:
                frame = self.bob.recv()
            except (OSError, EOFError, ValueError):
                return
            if frame.kind == MESSAGE:
                self.delivered.append(frame.id)

    def send_all(self, *faults: Callable[[], None]) -> None:
        """Send messages, with the faults at equal distances among them."""
        places = {
            MESSAGES * (place + 1) // (len(faults) + 1): fault for place, fault in enumerate(faults)
        }
        for number in range(1, MESSAGES + 1):
            self.alice.send(MESSAGE, "bob", b"hello", message_id=number, flags=WANT_RECEIPT)
            if number in places:
                places[number]()
            if number % 10 == 0:
                time.sleep(0.002)

    def account(self) -> set[str]:
        """Check the accounts; return the first outcomes that there were."""
        end = time.monotonic() + 20
        while len(self.outcomes) < MESSAGES:
            assert time.monotonic() < end, f"{MESSAGES - len(self.outcomes)} have no outcome"
            time.sleep(0.05)
        time.sleep(0.3)
        assert self.delivered == sorted(set(self.delivered))
        delivered = set(self.delivered)
        for number, outcomes in self.outcomes.items():
            assert len(outcomes) == 1 or outcomes == ["receipt", "offline"], (number, outcomes)
            if outcomes == ["offline"]:
                assert number not in delivered
        return {outcomes[0] for outcomes in self.outcomes.values()}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Two brokers that have met."""
    with ExitStack() as stack:
        yield Pair(tmp_path, stack)


def wait(seconds: float) -> Callable[[], None]:
    """Return a pause as a fault."""
    return lambda: time.sleep(seconds)


def test_owner_that_is_killed_leaves_one_outcome_for_each_id(pair: Pair) -> None:
    pair.send_all(pair.b.popen.kill, wait(1.5))
    outcomes = pair.account()
    assert outcomes >= {"receipt", "in_doubt", "offline"}


def test_owner_that_is_stopped_leaves_one_outcome_for_each_id(pair: Pair) -> None:
    stop, go_on = (
        lambda number=number: pair.b.popen.send_signal(number)
        for number in (signal.SIGSTOP, signal.SIGCONT)
    )
    pair.send_all(stop, wait(2.0), go_on, wait(2.5))
    outcomes = pair.account()
    assert outcomes >= {"receipt", "offline"}
    assert pair.outcomes[MESSAGES] == ["receipt"]


def test_origin_that_is_stopped_leaves_one_outcome_for_each_id(pair: Pair) -> None:
    def stop() -> None:
        pair.a.popen.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        pair.a.popen.send_signal(signal.SIGCONT)

    pair.send_all(stop, wait(3.0))
    pair.account()
    assert pair.outcomes[MESSAGES] == ["receipt"]


@pytest.mark.parametrize("pause", [0.1, 3.0])
def test_nats_that_is_killed_leaves_one_outcome_for_each_id(pair: Pair, pause: float) -> None:
    def restart() -> None:
        time.sleep(pause)
        pair.nats.start()
        time.sleep(2.0)

    pair.send_all(pair.nats.kill, restart)
    outcomes = pair.account()
    assert outcomes >= {"receipt", "offline"}
    assert pair.outcomes[MESSAGES] == ["receipt"]


@pytest.mark.parametrize("pause", [0.3, 3.0])
def test_nats_that_is_stopped_leaves_one_outcome_for_each_id(pair: Pair, pause: float) -> None:
    def go_on() -> None:
        time.sleep(pause)
        pair.nats.signal(signal.SIGCONT)
        time.sleep(3.0)

    pair.send_all(lambda: pair.nats.signal(signal.SIGSTOP), go_on)
    pair.account()
    assert pair.outcomes[MESSAGES] == ["receipt"]


def test_owner_that_is_upgraded_leaves_one_outcome_for_each_id(pair: Pair) -> None:
    def upgrade() -> None:
        pair.b.popen.send_signal(signal.SIGUSR2)
        pair.b.wait("daemon.upgraded")
        time.sleep(1.5)

    pair.send_all(upgrade)
    outcomes = pair.account()
    assert "in_doubt" not in outcomes
    assert pair.outcomes[MESSAGES] == ["receipt"]
