"""A mixed load for a broker while it is upgraded, and the account of every message.

Each part is a thread with connections of its own, which never reconnects. A connection
that ends, or a frame that is missing, repeated or out of order, ends the part with an
error, which ``finish`` raises.
"""

from __future__ import annotations

import multiprocessing.connection
import struct
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, Self

from support.broker_process import BrokerProcess
from support.keys import key_of
from support.raw_client import (
    ERROR,
    EVENT,
    MESSAGE,
    RECEIPT,
    REPLY,
    REQUEST,
    WANT_RECEIPT,
    Raw,
    packed,
)

import brokerd_client

MEMBER = Path(__file__).with_name("flood_member.py")
TESTS = Path(__file__).resolve().parents[2]
NUMBER = struct.Struct("!Q")
END = b"end"
WAIT_S = 60.0

CLIENTS: dict[str, Any] = {
    "ops": {"admin": True},
    **{f"{end}{number}": None for number in range(2) for end in ("from", "to")},
    "asker": None,
    "answerer": {"connections": 3},
    "publisher": None,
    "reader": None,
    "member1": None,
    "member2": None,
    "boss": None,
    "crew": {"connections": 3},
    "pusher": None,
    "slow": {"queue": "64KiB"},
    "dropper": None,
    "dropped": {"queue": "64KiB", "when_full": "drop_oldest"},
    "giver": None,
    "taker": None,
    "stock1": {"allow_md5": True},
    "stock2": {"allow_md5": True},
    "library1": None,
    "library2": None,
    "watcher": None,
    "newcomer": {"connections": 64},
}


def offline_until(changes: Iterable[Any], last: str) -> Iterator[str]:
    """Yield the clients that were online and went offline; ``last`` is the last of
    them.
    """
    there: set[str] = set()
    for change in changes:
        if change.online:
            there.add(change.name)
        elif change.name in there:
            yield change.name
            if change.name == last:
                return


class Load:
    """All parts, running.

    Attributes:
        account: Numbers of messages, by part.
    """

    def __init__(self, broker: BrokerProcess, pairs: int = 2) -> None:
        self.broker = broker
        self.account: Counter[str] = Counter()
        self.stop = threading.Event()
        self._failures: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        self._stack = ExitStack()
        self._pairs = pairs
        self._floods: list[tuple[subprocess.Popen[str], subprocess.Popen[str]]] = []

    def __enter__(self) -> Self:
        for number in range(self._pairs):
            receiver = self._flood("receive", f"to{number}", f"from{number}")
            sender = self._flood("send", f"from{number}", f"to{number}")
            self._floods.append((sender, receiver))
        parts = (
            self._requests,
            self._events,
            self._pool,
            self._slow,
            self._drop_oldest,
            self._large,
            self._stock,
            self._library,
            self._newcomers,
        )
        for part in parts:
            ready = threading.Event()
            thread = threading.Thread(target=self._guarded, args=(part, ready), name=part.__name__)
            self._threads.append(thread)
            thread.start()
            assert ready.wait(WAIT_S), part.__name__
        self.check()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join(WAIT_S)
        for flood in self._floods:
            for member in flood:
                member.kill()
                member.communicate()
        self._stack.close()

    def check(self) -> None:
        """Raise the error that ended a part, if one has ended."""
        if self._failures:
            raise self._failures[0]
        for flood in self._floods:
            assert all(member.poll() is None for member in flood), "an end of a flood has ended"

    def finish(self) -> None:
        """Stop, wait until everything has arrived, and raise the first error."""
        self.stop.set()
        for number, (sender, receiver) in enumerate(self._floods):
            sent, _ = sender.communicate("\n", WAIT_S)
            received, _ = receiver.communicate(sent, WAIT_S)
            assert int(sent) == int(received), f"pair {number}"
            self.account["flood: sent, and received once and in order"] += int(received)
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive(), thread.name
        if self._failures:
            raise self._failures[0]

    # Floods, each end a process

    def _flood(self, role: str, name: str, other: str) -> subprocess.Popen[str]:
        # One of the pairs over TCP.
        address = str(self.broker.addresses()[name.endswith("1")])
        command = [sys.executable, str(MEMBER), role, address, name, key_of(name).decode(), other]
        member = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": str(TESTS)},
        )
        assert member.stdout is not None
        assert member.stdout.readline() == "ready\n"
        return member

    # The parts

    def _guarded(self, part: Callable[[threading.Event], None], ready: threading.Event) -> None:
        try:
            part(ready)
        except BaseException as error:  # noqa: BLE001 - raised again by check and finish
            error.add_note(part.__name__)
            self._failures.append(error)
        finally:
            ready.set()

    def _login(self, name: str) -> Raw:
        raw = self._stack.enter_context(self.broker.login(name))
        raw.sock.settimeout(WAIT_S)
        return raw

    def _numbers(self) -> Iterator[int]:
        """Count until the load is stopped."""
        number = 0
        while not self.stop.is_set():
            yield number
            number += 1

    def _beside(self, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(
            target=self._guarded, args=(lambda ready: work(), threading.Event())
        )
        thread.start()
        return thread

    def _requests(self, ready: threading.Event) -> None:
        """Send requests, 16 at a time; a pool answers each of them once."""
        asker, answerers = self._login("asker"), [self._login("answerer") for _ in range(3)]
        addresses = [raw.ask("whoami").json["address"] for raw in answerers]

        def answer(raw: Raw) -> None:
            while (request := raw.recv()).body != END:
                raw.send(REPLY, request.name, request.body, message_id=request.id)

        threads = [self._beside(lambda raw=raw: answer(raw)) for raw in answerers]  # type: ignore[misc]
        waiting: set[int] = set()
        ready.set()
        for number in self._numbers():
            asker.send(REQUEST, "answerer", NUMBER.pack(number), message_id=number)
            waiting.add(number)
            while len(waiting) >= 16:
                self._answered(asker, waiting)
        while waiting:
            self._answered(asker, waiting)
        for address in addresses:
            asker.send(MESSAGE, address, END)
        for thread in threads:
            thread.join(WAIT_S)

    def _answered(self, asker: Raw, waiting: set[int]) -> None:
        reply = asker.recv()
        assert (reply.kind, reply.body) == (REPLY, NUMBER.pack(reply.id)), reply
        waiting.remove(reply.id)
        self.account["requests: each answered once"] += 1

    def _events(self, ready: threading.Event) -> None:
        """Publish events: one subscriber gets all, and two members of a group get each
        event between them.
        """
        publisher, everything = self._login("publisher"), self._login("reader")
        group = [self._login("member1"), self._login("member2")]
        everything.ask("subscribe", topic="news.>")
        for raw in group:
            raw.ask("subscribe", topic="news.*", group="g")
        seen: list[list[int]] = [[], [], []]

        def read(raw: Raw, into: list[int]) -> None:
            while (event := raw.recv()).body[9:] != END:
                assert event.kind == EVENT
                into.append(NUMBER.unpack(event.body[9:])[0])

        threads = [
            self._beside(lambda raw=raw, into=into: read(raw, into))  # type: ignore[misc]
            for raw, into in zip([everything, *group], seen, strict=True)
        ]
        ready.set()
        sent = 0
        for number in self._numbers():
            publisher.send(EVENT, "", NUMBER.pack(number), between=b"\x08news.new")
            sent += 1
            if number % 50 == 0:
                publisher.ping()
        for name in ("reader", "member1", "member2"):
            publisher.send(MESSAGE, name, b"." * 9 + END)
        for thread in threads:
            thread.join(WAIT_S)
        assert seen[0] == list(range(sent))
        assert sorted(seen[1] + seen[2]) == list(range(sent))
        assert seen[1] == sorted(seen[1])
        assert seen[2] == sorted(seen[2])
        self.account["events: seen by all, and by one of each group"] += sent

    def _pool(self, ready: threading.Event) -> None:
        """Send messages to a pool: each goes to one member and has a receipt, and each
        member gets its messages in order.
        """
        boss, crew = self._login("boss"), [self._login("crew") for _ in range(3)]
        addresses = [raw.ask("whoami").json["address"] for raw in crew]
        taken: dict[int, list[int]] = defaultdict(list)

        def work(which: int) -> None:
            while (job := crew[which].recv()).body != END:
                taken[which].append(NUMBER.unpack(job.body)[0])

        threads = [self._beside(lambda which=which: work(which)) for which in range(3)]  # type: ignore[misc]
        ready.set()
        sent = 0
        for number in self._numbers():
            boss.send(MESSAGE, "crew", NUMBER.pack(number), message_id=number, flags=WANT_RECEIPT)
            receipt = boss.recv()
            assert (receipt.kind, receipt.id) == (RECEIPT, number), receipt
            sent += 1
        for address in addresses:
            boss.send(MESSAGE, address, END)
        for thread in threads:
            thread.join(WAIT_S)
        assert sorted(chain.from_iterable(taken.values())) == list(range(sent))
        assert all(numbers == sorted(numbers) for numbers in taken.values())
        self.account["pool: each taken by one member, with a receipt"] += sent

    def _slow(self, ready: threading.Event) -> None:
        """Send to a slow consumer: its queue is full, and its sender is held again and
        again; both go on.
        """
        pusher, slow = self._login("pusher"), self._login("slow")
        filler = bytes(1000)
        sent = 0

        def push() -> None:
            nonlocal sent
            for number in self._numbers():
                pusher.send(MESSAGE, "slow", NUMBER.pack(number) + filler)
                sent += 1
            pusher.send(MESSAGE, "slow", END)

        thread = self._beside(push)
        ready.set()
        expected = 0
        while (message := slow.recv()).body != END:
            assert NUMBER.unpack(message.body[:8])[0] == expected
            expected += 1
            if not self.stop.is_set() and expected % 20 == 0:
                self.stop.wait(0.01)
        thread.join(WAIT_S)
        assert expected == sent
        self.account["slow reader, held sender: received once and in order"] += expected

    def _drop_oldest(self, ready: threading.Event) -> None:
        """Send to a queue with drop_oldest: a message that makes room comes back as an
        error; each has one outcome.
        """
        dropper, dropped = self._login("dropper"), self._login("dropped")
        got: set[int] = set()
        refused: set[int] = set()

        def take(raw: Raw) -> None:
            while (frame := raw.recv()).body != END:
                if frame.kind == ERROR:
                    assert frame.code == "full", frame
                    refused.add(frame.id)

        def read() -> None:
            while (message := dropped.recv()).body != END:
                got.add(NUMBER.unpack(message.body[:8])[0])
                if not self.stop.is_set() and len(got) % 10 == 0:
                    self.stop.wait(0.01)

        threads = [self._beside(lambda: take(dropper)), self._beside(read)]
        ready.set()
        sent = 0
        for number in self._numbers():
            dropper.send(
                MESSAGE,
                "dropped",
                NUMBER.pack(number) + bytes(1000),
                message_id=number,
                flags=WANT_RECEIPT,
            )
            sent += 1
            if number % 10 == 0:
                self.stop.wait(0.001)
        # With an empty queue, this one drops nothing.
        while len(got) + len(refused) < sent:
            self._check_time()
        dropper.send(MESSAGE, "dropped", END)
        dropper.send(MESSAGE, "dropper", END)
        for thread in threads:
            thread.join(WAIT_S)
        assert not got & refused
        assert got | refused == set(range(sent))
        self.account["drop_oldest: received"] += len(got)
        self.account["drop_oldest: came back as an error"] += len(refused)

    def _check_time(self) -> None:
        threading.Event().wait(0.005)

    def _large(self, ready: threading.Event) -> None:
        """Send frames of 5 MB in pieces, with pauses between them; they arrive whole."""
        giver, taker = self._login("giver"), self._login("taker")
        sent = 0

        def give() -> None:
            nonlocal sent
            for number in self._numbers():
                frame = packed(MESSAGE, "taker", NUMBER.pack(number) * 655_360)
                for start in range(0, len(frame), 262_144):
                    giver.write(frame[start : start + 262_144])
                    self.stop.wait(0.005)
                # And a small one in two halves.
                small = packed(MESSAGE, "taker", NUMBER.pack(number))
                giver.write(small[:9])
                self.stop.wait(0.02)
                giver.write(small[9:])
                sent += 1
            giver.send(MESSAGE, "taker", END)

        thread = self._beside(give)
        ready.set()
        received = 0
        while (message := taker.recv()).body != END:
            assert message.body == NUMBER.pack(received) * 655_360
            assert taker.recv().body == NUMBER.pack(received)
            received += 1
        thread.join(WAIT_S)
        assert received == sent
        self.account["5 MB frames in pieces: arrived whole"] += received

    def _stock(self, ready: threading.Event) -> None:
        """Let two clients of the standard library send each other messages."""
        ends = [
            multiprocessing.connection.Client(
                str(self.broker.socket), "AF_UNIX", authkey=key_of(name)
            )
            for name in ("stock1", "stock2")
        ]
        with ends[0] as first, ends[1] as second:
            ready.set()
            for number in self._numbers():
                for giver, to, taker in ((first, b"stock2", second), (second, b"stock1", first)):
                    giver.send_bytes(
                        struct.pack("!BBBBQ", MESSAGE, 0, 0, 6, number) + to + NUMBER.pack(number)
                    )
                    assert taker.poll(WAIT_S)
                    frame = taker.recv_bytes()
                    assert (frame[0], frame[-8:]) == (MESSAGE, NUMBER.pack(number)), frame
                    self.account["multiprocessing.connection: received once"] += 1

    def _library(self, ready: threading.Event) -> None:
        """Let two clients of the library send with receipts; a third one watches that
        none of them disconnects.
        """

        def connect(name: str) -> brokerd_client.Client:
            socket, key = str(self.broker.socket), key_of(name)
            return brokerd_client.connect(socket, name, key=key, reconnect=False, timeout=WAIT_S)

        first, second = connect("library1"), connect("library2")
        with first, second, connect("watcher") as watcher, watcher.watch_presence() as changes:
            ready.set()
            for number in self._numbers():
                first.send_confirmed("library2", number, timeout=WAIT_S)
                assert second.recv(timeout=WAIT_S).payload == number
                self.account["library: sent with a receipt and received"] += 1
            second.close()
            # At the end, these have gone too.
            ended = {"newcomer", "stock1", "stock2", "from0", "to0", "from1", "to1"}
            offline = set(offline_until(changes, "library2"))
            assert offline - ended == {"library2"}, f"{offline} were seen to go"

    def _newcomers(self, ready: threading.Event) -> None:
        """Connect new clients all the time; each is accepted and gets an answer."""
        ready.set()
        for _ in self._numbers():
            with self.broker.login("newcomer") as raw:
                raw.ping()
            self.account["newcomers: let in"] += 1
