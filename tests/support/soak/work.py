"""Mixed work for a broker, for any length of time: each part is a thread, at a rate
that leaves room for the others.

Every part that sends counts its messages and checks those that arrive: once, in order,
or refused. A wrong result ends the part with an error, which ``check`` raises. Garbage,
and peers that break off, are parts too; nothing is expected of them.
"""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import yaml
from support.broker_process import BrokerProcess
from support.keys import key_of
from support.load.client_load import write_atomically
from support.raw_client import (
    ERROR,
    EVENT,
    MESSAGE,
    RECEIPT,
    WANT_RECEIPT,
    Raw,
    Rejected,
    login,
    packed,
    prefixed,
)
from support.waiting import until

import brokerd_client
from brokerd_client.address import Address

NUMBER = struct.Struct("!Q")
WAIT_S = 60.0
#: Seconds between two rounds of a part.
EVENTS_S, POSTS_S, REQUESTS_S, RECONNECTS_S, GARBAGE_S, RELOAD_S, LARGE_S = (
    0.005,
    0.005,
    0.005,
    0.05,
    0.05,
    3.0,
    0.5,
)

CLIENTS: dict[str, Any] = {
    "good": None,
    "friend": None,
    "ops": {"admin": True},
    "asker": None,
    "answerer": {"connections": 3},
    "publisher": None,
    "reader": None,
    "turner": None,
    "pusher": None,
    "slow": {"queue": "256KiB"},
    "dropper": None,
    "dropped": {"queue": "64KiB", "when_full": "drop_oldest"},
    "giver": None,
    "taker": None,
    "comer": {"connections": 16},
    "mean": {"connections": 16},
    "changing": {"queue": "1MiB"},
    "poster": None,
    "box": {"mailbox": {"messages": 10_000}},
}
LIMITS = {"handshake_timeout": "1s", "wait_timeout": "60s"}


class Work:
    """All parts, running.

    Attributes:
        account: Counters, by description.
    """

    def __init__(self, broker: BrokerProcess, seed: int) -> None:
        self.broker = broker
        self.account: Counter[str] = Counter()
        self.stop = threading.Event()
        self._one_at_a_time = threading.Lock()
        self._rng = random.Random(seed)
        self._failures: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        self._addresses: list[Address] = broker.addresses()

    def __enter__(self) -> Self:
        for part in (
            self._events,
            self._turns,
            self._requests,
            self._slow_reader,
            self._drop_oldest,
            self._large,
            self._reconnects,
            self._garbage,
            self._reloads,
            self._mailbox,
        ):
            self._beside(part)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join(2 * WAIT_S)
            assert not thread.is_alive(), thread.name
        if exc_info[0] is None:
            self.check()

    def check(self) -> None:
        """Raise the error that ended a part, if one has ended."""
        if self._failures:
            raise self._failures[0]

    def _beside(self, work: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised again by check
                error.add_note(getattr(work, "__name__", "a part"))
                self._failures.append(error)

        thread = threading.Thread(target=guarded, name=getattr(work, "__name__", None), daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _address(self) -> Address:
        return self._rng.choice(self._addresses)

    def _login(self, name: str, address: Address | None = None) -> Raw:
        raw = login(address or self._address(), key_of(name), name.encode())
        raw.sock.settimeout(WAIT_S)
        return raw

    def _connect(self, name: str, **how: Any) -> brokerd_client.Client:
        return brokerd_client.connect(
            str(self._address()), name, key=key_of(name), timeout=WAIT_S, **how
        )

    # Parts that keep accounts

    def _events(self) -> None:
        """Publish events; each reaches its subscriber once, in order."""
        with self._login("publisher") as publisher, self._login("reader") as reader:
            reader.ask("subscribe", topic="news.>")
            sent = 0
            while not self.stop.wait(EVENTS_S):
                publisher.send(EVENT, "", NUMBER.pack(sent), between=b"\x08news.new")
                event = reader.recv()
                assert (event.kind, event.body[-8:]) == (EVENT, NUMBER.pack(sent)), event
                sent += 1
            self.account["events, each received once and in order"] += sent

    def _turns(self) -> None:
        """Subscribe to new topics all the time, and unsubscribe again."""
        with self._connect("turner") as client:
            number = 0
            while not self.stop.wait(RECONNECTS_S):
                client.subscribe(f"turn.{number}.*").close()
                number += 1
        self.account["subscriptions made and ended"] += number

    def _requests(self) -> None:
        """Send requests to a pool of three, which answers each."""
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(self._connect("answerer")).on_request(
                    lambda message: message.payload
                )
            asker = stack.enter_context(self._connect("asker"))
            number = 0
            while not self.stop.wait(REQUESTS_S):
                assert asker.request("answerer", number, timeout=WAIT_S).payload == number
                number += 1
        self.account["requests, each answered once"] += number

    def _slow_reader(self) -> None:
        """Send to a slow consumer: its queue is full most of the time, and its sender
        is held. All messages arrive, in order.
        """
        # By the Unix socket: TCP's buffers would hold megabytes for it.
        with self._login("pusher") as pusher, self._login("slow", self._addresses[0]) as slow:
            sent = 0

            def push() -> None:
                nonlocal sent
                while not self.stop.is_set():
                    pusher.send(MESSAGE, "slow", NUMBER.pack(sent) + bytes(4000))
                    sent += 1
                pusher.send(MESSAGE, "slow", b"end")

            thread = self._beside(push)
            received = 0
            while (body := slow.recv().body) != b"end":
                assert NUMBER.unpack(body[:8])[0] == received
                received += 1
                if received % 50 == 0:
                    self.stop.wait(0.1)
            thread.join(WAIT_S)
            assert received == sent
        self.account["messages to a slow reader, each received once and in order"] += received

    def _drop_oldest(self) -> None:
        """Send to a queue with drop_oldest: each message arrives, in order, or comes
        back as full.
        """
        with (
            self._login("dropper") as dropper,
            self._login("dropped", self._addresses[0]) as dropped,
        ):
            got: list[int] = []
            refused: list[int] = []
            sent = 0

            def send() -> None:
                nonlocal sent
                while not self.stop.wait(0.005):
                    dropper.send(
                        MESSAGE,
                        "dropped",
                        NUMBER.pack(sent) + bytes(2000),
                        message_id=sent,
                        flags=WANT_RECEIPT,
                    )
                    sent += 1

            def hear() -> None:
                while (frame := dropper.recv()).kind in (RECEIPT, ERROR):
                    if frame.kind == ERROR:
                        assert frame.code == "full", frame
                        refused.append(frame.id)

            sender, hearer = self._beside(send), self._beside(hear)
            dropped.sock.settimeout(0.5)
            while sender.is_alive() or len(got) + len(refused) < sent:
                with contextlib.suppress(TimeoutError):
                    got.append(NUMBER.unpack(dropped.recv().body[:8])[0])
                    if len(got) % 100 == 0:
                        # More comes meanwhile than its queue holds.
                        self.stop.wait(1.0)
                self.check()
            dropper.send(MESSAGE, "dropper", b"end")
            hearer.join(WAIT_S)
            assert got == sorted(got)
            assert sorted(got + refused) == list(range(sent))
        self.account["messages with when_full: drop_oldest, received"] += len(got)
        self.account["messages with when_full: drop_oldest, reported as full"] += len(refused)

    def _large(self) -> None:
        """Send messages of a megabyte; they arrive whole."""
        with self._login("giver") as giver, self._login("taker") as taker:
            number = 0
            while not self.stop.wait(LARGE_S):
                thread = self._start_large(giver, number)
                assert taker.recv().body == NUMBER.pack(number) * 131_072
                thread.join(WAIT_S)
                number += 1
        self.account["messages of a megabyte, received whole"] += number

    def _start_large(self, giver: Raw, number: int) -> threading.Thread:
        thread = threading.Thread(
            target=lambda: giver.send(MESSAGE, "taker", NUMBER.pack(number) * 131_072)
        )
        thread.start()
        return thread

    def _mailbox(self) -> None:
        """Post to a mailbox. Its consumer fails some messages, and leaves again and again
        with messages in its window; each is acknowledged in the end.
        """
        posted = 0
        is_over = threading.Event()
        acknowledged: set[int] = set()

        def consume() -> None:
            while not (is_over.is_set() and len(acknowledged) == posted):
                with self._connect("box", window=20) as client:
                    for _ in range(300):
                        try:
                            message = client.recv(0.5)
                        except brokerd_client.TimedOut:
                            break
                        if message.payload % 40 == 7 and message.attempt == 1:
                            message.failed("the first attempt")
                        else:
                            assert message.payload not in acknowledged
                            message.done()
                            acknowledged.add(message.payload)

        thread = self._beside(consume)
        with self._connect("poster") as poster:
            while not self.stop.wait(POSTS_S):
                poster.post("box", posted, timeout=WAIT_S)
                posted += 1
        is_over.set()
        thread.join(WAIT_S)
        assert acknowledged == set(range(posted))
        self.account["messages posted to a mailbox, each acknowledged once"] += posted

    def _reconnects(self) -> None:
        """Connect, ping and disconnect all the time, sometimes with a reset."""
        number = 0
        while not self.stop.wait(RECONNECTS_S):
            with self._login("comer") as raw:
                raw.ping()
                if number % 3 == 0:
                    raw.sock.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
            number += 1
        self.account["clients that connected, were served, and left"] += number

    # Parts that mean harm

    def _garbage(self) -> None:
        """Connect peers, unauthorized and authenticated, that send garbage or nothing,
        or break off.
        """
        held: list[Raw] = []
        number = 0
        while not self.stop.wait(GARBAGE_S):
            with contextlib.suppress(OSError, EOFError, Rejected, AssertionError):
                raw = Raw(self._address(), timeout_s=2)
                held.append(raw)
                kind = number % 5
                if kind == 0:
                    raw.write(self._rng.randbytes(200))
                elif kind == 1:
                    raw.write(prefixed(b"x" * 100)[: self._rng.randrange(100)])
                elif kind == 2:
                    raw.write(prefixed(raw.answer(b"not the key", b"mean")))
                elif kind == 3:
                    raw.log_in(key_of("mean"), b"mean")
                    raw.write(prefixed(self._rng.randbytes(40)))
                else:
                    raw.log_in(key_of("mean"), b"mean")
                    raw.write(
                        packed(MESSAGE, "nobody", bytes(50_000))[: self._rng.randrange(50_000)]
                    )
            number += 1
            while len(held) > 8:
                held.pop(0).close()
        for raw in held:
            raw.close()
        self.account["peers that sent garbage or broke off"] += number

    # What the operator does

    def _reloads(self) -> None:
        """Change the configuration and reload it: a client's quota, and a listener that
        is added and removed.
        """
        text = self.broker.config.read_text()
        number = 0
        while not self.stop.wait(RELOAD_S):
            number += 1
            whole = yaml.safe_load(text)
            whole["clients"]["changing"]["queue"] = f"{1 + number % 2}MiB"
            if number % 2:
                whole["listen"].append(str(self.broker.directory / "second.sock"))
            write_atomically(self.broker.config, yaml.safe_dump(whole))
            with self._one_at_a_time:
                self.broker.signal(signal.SIGHUP)
                self.broker.wait("daemon.reloaded", number)
        self.account["reloads"] += number

    def upgrade(self) -> None:
        """Upgrade the broker under this load."""
        with self._one_at_a_time, self.broker.login("ops") as ops:
            answer = ops.ask("upgrade").json
            assert answer["upgraded"], answer
            # Signals go to the first process, and only once the PID holder is in its
            # place are they passed on for sure.
            cmdline = Path(f"/proc/{self.broker.popen.pid}/cmdline")
            until(
                lambda: b"pid_holder.py" in cmdline.read_bytes(),
                "no PID holder takes the first process's place",
            )
        self.account["upgrades under this load"] += 1
