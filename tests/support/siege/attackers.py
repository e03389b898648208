"""Peers that mean harm, each trying to make the broker hold as much as it will; bounded
in time, loopback only.

An attacker is a function that goes on until the ``Siege`` is over. What it meets on the
way (an ERROR, a closed connection, a full buffer) does not stop it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator

from support.raw_client import EVENT, JSON, MESSAGE, REQUEST, Raw, Rejected, packed, prefixed

__all__ = ["ATTACKS", "MAX_MESSAGE", "Siege"]

MAX_MESSAGE = 64 * 1024
TROUBLE = (OSError, EOFError, Rejected, AssertionError)
_STEP_S = 0.2


class Siege:
    """What the attackers share.

    login: returns a connection of that client. open_: returns a connection that has
    sent nothing.
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
        order = random.Random(name)
        while self.on:
            with contextlib.suppress(*TROUBLE):
                ATTACKS[name](self, order)
            self.rounds[name] += 1

    @contextlib.contextmanager
    def client(self, name: str) -> Iterator[Raw]:
        with self.login(name) as raw:
            raw.sock.settimeout(_STEP_S)
            yield raw

    def flood(self, raw: Raw, data: bytes, *, reading: bool = False) -> None:
        """Write the same bytes for as long as the broker takes them.

        reading: what comes back is thrown away.
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


def half_handshakes(siege: Siege, order: random.Random) -> None:
    """Connections that say nothing, half an answer, or garbage, more than are allowed
    at once.
    """
    held = []
    try:
        for _ in range(200):
            raw = siege.open()
            held.append(raw)
            with contextlib.suppress(OSError):
                raw.sock.send(order.choice([b"", b"\0\0", prefixed(b"x" * 200)[:-1], b"\xff" * 8]))
        time.sleep(_STEP_S)
    finally:
        for raw in held:
            raw.close()


def full_queue(siege: Siege, order: random.Random) -> None:
    """The shortest messages to somebody who never reads; the errors are not read
    either.
    """
    with siege.client("deaf"), siege.client("mean1") as raw:
        siege.flood(raw, packed(MESSAGE, "deaf", b"") * 1000)


def dropping_queue(siege: Siege, order: random.Random) -> None:
    """The same to one whose oldest messages give way, and to a pool."""
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


def leaving_queue(siege: Siege, order: random.Random) -> None:
    """A client that comes, has its queue filled, and goes, again and again; the sender
    reads nothing of it.
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


def subscriptions(siege: Siege, order: random.Random) -> None:
    """As many long patterns as are taken, none sharing a token with another, and then
    more.
    """
    with siege.client("listener1") as raw:
        for number in itertools.count():
            if not siege.on:
                return
            topic = (
                ".".join(f"{order.randrange(36**2):02x}"[:1] for _ in range(100)) + f".n{number}"
            )
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


def endless_topics(siege: Siege, order: random.Random) -> None:
    """Events on ever new long topics, to subscribers of everything who do not read."""
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


def unanswered(siege: Siege, order: random.Random) -> None:
    """Requests to somebody who reads them and never answers, without end."""
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


def unfinished_messages(siege: Siege, order: random.Random) -> None:
    """Messages as long as may be, of which the last byte never comes; and some that
    claim far more.
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


def nonsense(siege: Siege, order: random.Random) -> None:
    """Authenticated garbage: bad kinds, bad flags, bad names, too long messages, half
    frames and the end.
    """
    with siege.client("mean6") as raw:
        while siege.on:
            header = bytes([order.randrange(10), order.randrange(256), 0, order.randrange(256)])
            body = header + order.randbytes(order.choice([0, 7, 8, 40, 300]))
            raw.write(
                order.choice(
                    [prefixed(body), packed(MESSAGE, "deaf", bytes(MAX_MESSAGE + 1)), body]
                )
            )


def unread_answers(siege: Siege, order: random.Random) -> None:
    """Operations whose answers are long and are never read."""
    with siege.client("mean7") as raw:
        siege.flood(
            raw,
            packed(REQUEST, "$broker", json.dumps({"op": "clients"}).encode(), codec=JSON) * 100,
        )


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
    )
}
