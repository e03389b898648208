"""Brokers of a cluster are upgraded under load: no other host notices it."""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
from support.broker_process import BrokerProcess
from support.nats_server import nats_server, needs_nats
from support.raw_client import (
    ERROR,
    EVENT,
    MESSAGE,
    RECEIPT,
    REPLY,
    REQUEST,
    WANT_RECEIPT,
    Raw,
)
from support.waiting import until

pytestmark = [
    needs_nats,
    pytest.mark.skipif(
        not sys.platform.startswith("linux"), reason="sockets are handed over on Linux only"
    ),
]

CLIENTS: Final = {
    "alice": {},
    "bob": {"mailbox": {"subscribe": ["stored.>"]}, "home": "b"},
    "carol": {},
    "eve": {},
    "ops-a": {"admin": True},
    "ops-b": {"admin": True},
}
#: The kinds of alice's frames, by the last digit of their ids; what each has to hear.
EXPECTED: Final = {
    MESSAGE: ["receipt"],
    REQUEST: ["receipt", "reply"],
    EVENT: ["receipt"],
}


class Pair:
    """Two brokers: alice sends from one; carol answers and bob's mailbox is at the other."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.stack = stack
        nats = stack.enter_context(nats_server(folder))
        self.brokers: dict[str, BrokerProcess] = {}
        for host in "ab":
            (folder / host).mkdir()
            self.brokers[host] = stack.enter_context(
                BrokerProcess(
                    folder / host,
                    CLIENTS,
                    cluster={"host": host, "nats": [nats.url]},
                    store={"path": "store", "min_free": 0},
                    log={"level": "info"},
                )
            )
        for broker in self.brokers.values():
            broker.wait("cluster.host_found")
        self.ops = {host: self.login(host, f"ops-{host}") for host in "ab"}
        self.alice, self.carol = self.login("a", "alice"), self.login("b", "carol")
        self.eves = [self.login(host, "eve") for host in "a"]
        until(self._sees_carol)
        for eve in self.eves:
            eve.ask("subscribe", topic="$broker.>")
        self.outcomes: defaultdict[int, list[str]] = defaultdict(list)
        self.delivered: list[int] = []
        self.sent: dict[int, int] = {}
        self._stops = threading.Event()
        self._sender = threading.Thread(target=self._send, daemon=True)
        for target in (self._hear, self._answer):
            threading.Thread(target=target, daemon=True).start()
        self._sender.start()

    def login(self, host: str, name: str) -> Raw:
        """Connect a client."""
        raw = self.brokers[host].login(name)
        self.stack.callback(raw.close)
        return raw

    def _sees_carol(self) -> bool:
        clients = self.alice.ask("clients").json["clients"]
        return any(each["name"] == "carol" and each["online"] for each in clients)

    def _send(self) -> None:
        number = 0
        while not self._stops.is_set():
            number += 1
            kind = (MESSAGE, REQUEST, MESSAGE, EVENT)[number % 4]
            self.sent[number] = kind
            if kind == EVENT:
                topic = b"stored.x"
                body = bytes((len(topic),)) + topic + b"kept"
                self.alice.send(EVENT, "", body, message_id=number, flags=WANT_RECEIPT)
            else:
                self.alice.send(kind, "carol", b"hello", message_id=number, flags=WANT_RECEIPT)
            if number % 10 == 0:
                time.sleep(0.002)

    def _hear(self) -> None:
        while True:
            try:
                frame = self.alice.recv()
            except (OSError, EOFError, ValueError):
                return
            if frame.kind == RECEIPT:
                self.outcomes[frame.id].append("receipt")
            elif frame.kind == REPLY:
                self.outcomes[frame.id].append("reply")
            elif frame.kind == ERROR:
                self.outcomes[frame.id].append(frame.code)

    def _answer(self) -> None:
        while True:
            try:
                frame = self.carol.recv()
                if frame.kind == REQUEST:
                    self.carol.send(REPLY, "alice", b"", message_id=frame.id)
            except (OSError, EOFError, ValueError):
                return
            self.delivered.append(frame.id)

    def upgrade(self, host: str) -> None:
        """Upgrade a broker, and wait until frames of the time after it have an outcome."""
        answer = self.ops[host].ask("upgrade").json
        assert answer["upgraded"], answer
        newest = max(self.sent)
        until(lambda: newest + 100 in self.outcomes, wait_s=20)

    def account(self) -> int:
        """Stop sending, and check the accounts; return how many frames there were."""
        self._stops.set()
        self._sender.join()
        until(lambda: all(self._is_over(number) for number in self.sent), wait_s=20)
        for number, kind in self.sent.items():
            assert self.outcomes[number] == EXPECTED[kind], (number, kind, self.outcomes[number])
        wanted = [number for number, kind in self.sent.items() if kind == MESSAGE]
        assert [number for number in self.delivered if self.sent[number] == MESSAGE] == wanted
        requests = [number for number, kind in self.sent.items() if kind == REQUEST]
        assert sorted(set(self.delivered) - set(wanted)) == requests
        stored = self.ops["b"].ask("mailboxes").json["mailboxes"][0]
        events = sum(kind == EVENT for kind in self.sent.values())
        assert (stored["name"], stored["ready"]) == ("bob", events)
        return len(self.sent)

    def _is_over(self, number: int) -> bool:
        return len(self.outcomes[number]) >= len(EXPECTED[self.sent[number]])

    def presence(self) -> list[str]:
        """Return the topics of the broker's events at the host of alice."""
        topics = []
        for eve in self.eves:
            eve.send(EVENT, "", b"\x01xx", message_id=1, flags=WANT_RECEIPT)
            while (frame := eve.recv()).kind != RECEIPT:
                topics.append(frame.body[1 : 1 + frame.body[0]].decode())
        return [topic for topic in topics if topic != "$broker.upgraded"]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Two brokers under load."""
    with ExitStack() as stack:
        yield Pair(tmp_path, stack)


@pytest.mark.slow
def test_upgrade_five_times_is_not_noticed_by_the_other_host(
    pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    """Messages, requests and stored events have the outcomes that they always have."""
    for host in "babab":
        pair.upgrade(host)
    count = pair.account()
    for broker in pair.brokers.values():
        assert not broker.events("cluster.host_lost")
        assert not broker.events("daemon.bug")
    assert pair.presence() == []
    with capsys.disabled():
        print(f"\n  5 upgrades, {count:,} frames")
