"""Attackers, each of which tries to make the broker hold as much memory as possible;
bounded in time, loopback only.

An attacker is a function that runs until the ``Siege`` is over. An ERROR, a closed
connection or a full buffer does not stop it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator

from support.channels import JOIN, OPEN
from support.keys import key_of
from support.raw_client import EVENT, JSON, MESSAGE, REQUEST, Raw, Rejected, packed, prefixed

__all__ = ["ATTACKS", "MAX_MESSAGE", "Siege"]

MAX_MESSAGE = 64 * 1024
TROUBLE = (OSError, EOFError, Rejected, AssertionError)
_STEP_S = 0.2


class Siege:
    """The state that all attackers share.

    Args:
        login: Returns a connection of that client.
        open_: Returns a connection that has sent nothing.
    """

    def __init__(
        self, login: Callable[[str], Raw], open_: Callable[[], Raw], seconds: float
    ) -> None:
        self.login = login
        self.open = open_
        self.deadline = time.monotonic() + seconds
        self.rounds = dict.fromkeys(ATTACKS, 0)
        self._threads = [
            threading.Thread(target=self._run, args=(name,), name=name) for name in ATTACKS
        ]

    @property
    def on(self) -> bool:
        return time.monotonic() < self.deadline

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self.deadline = 0.0
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), thread.name

    def _run(self, name: str) -> None:
        rng = random.Random(name)
        while self.on:
            with contextlib.suppress(*TROUBLE):
                ATTACKS[name](self, rng)
            self.rounds[name] += 1

    @contextlib.contextmanager
    def client(self, name: str) -> Iterator[Raw]:
        with self.login(name) as raw:
            raw.sock.settimeout(_STEP_S)
            yield raw

    def flood(self, raw: Raw, data: bytes, *, reading: bool = False) -> None:
        """Write the same bytes for as long as the siege lasts.

        Args:
            reading: Whether to read the answers, and discard them.
        """
        raw.sock.setblocking(False)
        position = 0
        while self.on:
            try:
                position = (position + raw.sock.send(data[position:])) % len(data)
            except BlockingIOError:
                time.sleep(0.001)
            if reading:
                with contextlib.suppress(BlockingIOError):
                    while raw.sock.recv(1 << 16):
                        pass


def half_handshakes(siege: Siege, rng: random.Random) -> None:
    """Open more connections than are allowed, which send nothing, half an answer or
    garbage.
    """
    held = []
    try:
        for _ in range(200):
            raw = siege.open()
            held.append(raw)
            with contextlib.suppress(OSError):
                raw.sock.send(rng.choice([b"", b"\0\0", prefixed(b"x" * 200)[:-1], b"\xff" * 8]))
        time.sleep(_STEP_S)
    finally:
        for raw in held:
            raw.close()


def full_queue(siege: Siege, rng: random.Random) -> None:
    """Send the shortest messages to a client that never reads; the errors are not read
    either.
    """
    with siege.client("deaf"), siege.client("mean1") as raw:
        siege.flood(raw, packed(MESSAGE, "deaf", b"") * 1000)


def dropping_queue(siege: Siege, rng: random.Random) -> None:
    """Send the shortest messages to a queue with drop_oldest, and to a pool."""
    with (
        siege.client("dropper"),
        siege.client("crowd"),
        siege.client("crowd"),
        siege.client("mean2") as raw,
    ):
        siege.flood(
            raw,
            (packed(MESSAGE, "dropper", b"") + packed(MESSAGE, "crowd", b"")) * 500,
            reading=True,
        )


def leaving_queue(siege: Siege, rng: random.Random) -> None:
    """Fill the queue of a client that connects and disconnects again and again; the
    sender reads nothing.
    """
    with siege.client("mean3") as raw:
        raw.sock.setblocking(False)
        data = packed(MESSAGE, "comes-and-goes", b"") * 2000
        while siege.on:
            with contextlib.suppress(*TROUBLE), siege.client("comes-and-goes"):
                until = time.monotonic() + 0.05
                while time.monotonic() < until:
                    with contextlib.suppress(BlockingIOError):
                        raw.sock.send(data)


def subscriptions(siege: Siege, rng: random.Random) -> None:
    """Subscribe to long patterns that share no token, until the quota is used up and
    beyond.
    """
    with siege.client("listener1") as raw:
        for number in itertools.count():
            if not siege.on:
                return
            topic = ".".join(f"{rng.randrange(36**2):02x}"[:1] for _ in range(100)) + f".n{number}"
            raw.send(
                REQUEST,
                "$broker",
                json.dumps({"op": "subscribe", "topic": topic}).encode(),
                codec=JSON,
            )
            with contextlib.suppress(TimeoutError):
                raw.recv()
            if number > 2000:
                time.sleep(_STEP_S)


def endless_topics(siege: Siege, rng: random.Random) -> None:
    """Publish on long new topics, to subscribers of everything that do not read."""
    with siege.client("listener2") as deaf, siege.client("mean4") as raw:
        for group in (None, "g1", "g2"):
            deaf.ask("subscribe", topic=">", group=group)
        for number in itertools.count():
            topics = (f"{number}.{index}.{'x' * 200}".encode() for index in range(500))
            data = b"".join(
                packed(EVENT, "", b"", between=bytes([len(topic)]) + topic) for topic in topics
            )
            raw.sock.settimeout(_STEP_S)
            raw.write(data)
            if not siege.on:
                return


def unanswered(siege: Siege, rng: random.Random) -> None:
    """Send requests without end to a client that reads them and never answers."""
    with siege.client("silent") as silent, siege.client("mean5") as raw:
        ids = itertools.count()
        for sock in (silent.sock, raw.sock):
            sock.setblocking(False)
        while siege.on:
            data = b"".join(
                packed(REQUEST, "silent", b"", message_id=next(ids)) for _ in range(500)
            )
            with contextlib.suppress(BlockingIOError):
                raw.sock.sendall(data)
            for sock in (silent.sock, raw.sock):
                with contextlib.suppress(BlockingIOError):
                    while sock.recv(1 << 16):
                        pass


def unfinished_messages(siege: Siege, rng: random.Random) -> None:
    """Send messages of the greatest length without their last byte, and some that
    announce far more.
    """
    with contextlib.ExitStack() as stack:
        for number in range(8):
            raw = stack.enter_context(siege.client(f"slow{number}"))
            whole = packed(MESSAGE, "deaf", bytes(MAX_MESSAGE))
            with contextlib.suppress(TimeoutError):
                raw.write(
                    whole[:-1]
                    if number % 2
                    else b"\xff\xff\xff\xff" + (1 << 62).to_bytes(8, "big") + whole
                )
        while siege.on:
            time.sleep(_STEP_S)


def nonsense(siege: Siege, rng: random.Random) -> None:
    """Send authenticated garbage: bad kinds, flags and names, messages too long, and
    half frames.
    """
    with siege.client("mean6") as raw:
        while siege.on:
            header = bytes([rng.randrange(10), rng.randrange(256), 0, rng.randrange(256)])
            body = header + rng.randbytes(rng.choice([0, 7, 8, 40, 300]))
            raw.write(
                rng.choice([prefixed(body), packed(MESSAGE, "deaf", bytes(MAX_MESSAGE + 1)), body])
            )


def unread_answers(siege: Siege, rng: random.Random) -> None:
    """Ask for operations with long answers, and never read them."""
    with siege.client("mean7") as raw:
        siege.flood(
            raw,
            packed(REQUEST, "$broker", json.dumps({"op": "clients"}).encode(), codec=JSON) * 100,
        )


def unread_channels(siege: Siege, rng: random.Random) -> None:
    """Open channels beyond every limit, and fill both directions without reading."""

    def dial(name: str, first: bytes) -> Raw:
        raw = ends.enter_context(siege.open())
        raw.log_in(key_of(name), name.encode() + b" channel", behind=first)
        raw.sock.setblocking(False)
        return raw

    with siege.client("mean8") as listener, contextlib.ExitStack() as ends:
        listener.ask("listen")
        made: list[Raw] = []
        while siege.on:
            if len(made) < 100:
                made.append(dial("mean9", packed(OPEN, "mean8", bytes(1024), message_id=1)))
            with contextlib.suppress(TimeoutError):
                made.append(dial("mean8", packed(JOIN, "", message_id=listener.recv().id)))
            for raw in made:
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    while raw.sock.send(bytes(1 << 16)):
                        pass


ATTACKS: dict[str, Callable[[Siege, random.Random], None]] = {
    each.__name__: each
    for each in (
        half_handshakes,
        full_queue,
        dropping_queue,
        leaving_queue,
        subscriptions,
        endless_topics,
        unanswered,
        unfinished_messages,
        nonsense,
        unread_answers,
        unread_channels,
    )
}
