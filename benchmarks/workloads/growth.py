"""The server's processor time, and how it grows: one table and one curve for each system.

Each entrant has a size: how many topics, patterns, connections or clients there are.
"""

from __future__ import annotations

import contextlib
import itertools
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.systems import SYSTEMS, Setup
from benchmarks.workloads.applications import Pool
from benchmarks.workloads.bulk import pump
from benchmarks.workloads.connections import Connecting
from benchmarks.workloads.stage import MIB, Entrant, Result, Spoilt, Stage, Timing, Workload, client

__all__ = [
    "Beside",
    "Fanout",
    "FirstPublish",
    "Growth",
    "Keepalive",
    "LogShare",
    "PoolPaced",
    "PoolSize",
    "StartTime",
    "StockHandshake",
    "Subscribing",
    "Topics",
    "Unmatched",
]

_PAYLOAD = b"x" * 16
#: Seconds that a message may take to arrive.
_ARRIVAL_S = 20.0
_BOTH = ("brokerd", "nats")


class Growth(Workload):
    """One kind of work in several sizes."""

    unit = "µs"
    higher = False
    most_rounds = 3

    def __init__(
        self,
        key: str,
        title: str,
        what: str,
        sizes: Sequence[int],
        systems: Sequence[str] = _BOTH,
    ) -> None:
        self.key, self.title = key, title
        self.entrants = tuple(
            Entrant(system, f"{size:,} {what}", size) for system in systems for size in sizes
        )

    def size(self, entrant: Entrant, timing: Timing) -> int:
        """Return the size that is measured."""
        return min(entrant.size, 20) if timing.small else entrant.size

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        return [client(0), client(1)]


def _per_writing(stage: Stage, timing: Timing, publications: int, deliveries: int) -> Result:
    """Measure the members of a stage: the server's µs for each publication.

    publications, deliveries: how many of each a writing of the sender's file makes.
    """
    more = pump(stage, timing).more
    return Result(more["window_ns"] / 1000 * deliveries / publications, more)


class Topics(Growth):
    """Events to topics in turn, each of which some connections get by one wildcard."""

    subscribers = 1

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        subscribers = min(self.subscribers, 10) if timing.small else self.subscribers
        return [client(number) for number in range(1 + subscribers)]

    def prepare(self, stage: Stage, timing: Timing) -> None:
        dialect, count = stage.running.dialect, self.size(stage.entrant, timing)
        sender, *subscribers = self.names(stage.entrant, timing)
        stage.connect(sender)
        for name in subscribers:
            dialect.subscribe(stage.connect(name), "t.*")
        events = [dialect.event(f"t.{number:06d}", _PAYLOAD) for number in range(count)]
        stage.size = len(stage.probe(sender, events[0], subscribers, _PAYLOAD))
        times = max(1, 1000 // count // len(subscribers))
        file = stage.file("sender", b"".join(events) * times)
        size = stage.size * count * times
        stage.members = [
            f"s:{stage.connections[sender].fileno()}:{file}:{size * len(subscribers)}",
            *(f"r:{stage.connections[name].fileno()}:0:{size}" for name in subscribers),
        ]

    def measure(self, stage: Stage, timing: Timing) -> Result:
        return _per_writing(stage, timing, 1, len(stage.members) - 1)


class Fanout(Topics):
    """The same to a thousand connections."""

    subscribers = 1000


class Unmatched(Growth):
    """Events to topics in turn to which no client has subscribed.

    After a hundred of them one event is delivered, so that what was done can be counted.
    """

    _UNMATCHED = 100

    def prepare(self, stage: Stage, timing: Timing) -> None:
        dialect, count = stage.running.dialect, self.size(stage.entrant, timing)
        sender, subscriber = self.names(stage.entrant, timing)
        stage.connect(sender)
        dialect.subscribe(stage.connect(subscriber), "counted.*")
        counted = dialect.event("counted.one", _PAYLOAD)
        stage.size = len(stage.probe(sender, counted, [subscriber], _PAYLOAD))
        turns = -(-count // self._UNMATCHED)
        numbers = itertools.cycle(range(count))
        data = b"".join(
            b"".join(
                dialect.event(f"t.{number:06d}", _PAYLOAD)
                for number in itertools.islice(numbers, self._UNMATCHED)
            )
            + counted
            for _ in range(turns)
        )
        file = stage.file("sender", data)
        stage.members = [
            f"s:{stage.connections[sender].fileno()}:{file}:{turns * stage.size}",
            f"r:{stage.connections[subscriber].fileno()}:0:{turns * stage.size}",
        ]

    def measure(self, stage: Stage, timing: Timing) -> Result:
        return _per_writing(stage, timing, self._UNMATCHED + 1, 1)


class Beside(Topics):
    """Events to topics in turn, beside changes of subscriptions that do not match any.

    The size is how many of these changes another client makes in a second.
    """

    _TOPICS, _CHANGER = 1000, "other"
    #: How often the changes are sent.
    _TURN_S = 0.01

    def size(self, entrant: Entrant, timing: Timing) -> int:
        return 20 if timing.small else self._TOPICS

    def setup(self, entrant: Entrant, timing: Timing, directory: Path) -> Setup:
        return Setup([*self.names(entrant, timing), self._CHANGER], directory)

    def measure(self, stage: Stage, timing: Timing) -> Result:
        over, made = threading.Event(), 0
        sock = stage.connections.get(self._CHANGER) or stage.connect(self._CHANGER)
        sock.setblocking(True)

        def change() -> None:
            """Send what is due, and throw the answers away."""
            nonlocal made
            began = time.monotonic()
            while not over.wait(self._TURN_S):
                # A subscription and its end are two changes.
                due = int((time.monotonic() - began) * stage.entrant.size / 2) * 2 - made
                for number in range(due // 2):
                    sock.sendall(
                        stage.running.dialect.change(f"other.{(made // 2 + number) % 1000}")
                    )
                made += due
                with contextlib.suppress(BlockingIOError):
                    while sock.recv(MIB, socket.MSG_DONTWAIT):
                        pass

        thread = threading.Thread(target=change)
        began = time.monotonic()
        thread.start()
        try:
            result = _per_writing(stage, timing, 1, 1)
        finally:
            over.set()
            thread.join()
        rate = made / (time.monotonic() - began)
        if rate < 0.8 * stage.entrant.size:
            raise Spoilt(f"only {rate:.0f} changes were made in a second")
        return Result(result.value, {**result.more, "changes": rate})


class FirstPublish(Growth):
    """The first event to a topic, with many wildcards that have to be looked at.

    Each token of the topic but the last ones is matched by itself and by ``*``, in every
    combination: the size is a power of two. The last token of these patterns never
    matches. One more pattern does, so that every event arrives once.
    """

    _EVENTS = 1000

    def prepare(self, stage: Stage, timing: Timing) -> None:
        dialect = stage.running.dialect
        sender, subscriber = self.names(stage.entrant, timing)
        stage.connect(sender)
        sock = stage.connect(subscriber)
        tokens = self.size(stage.entrant, timing).bit_length() - 1
        patterns = [".".join([*every, "end"]) for every in itertools.product("x*", repeat=tokens)]
        dialect.subscribe_all(sock, patterns)
        dialect.subscribe(sock, "x." * tokens + ">")

    def measure(self, stage: Stage, timing: Timing) -> Result:
        dialect, events = stage.running.dialect, self._EVENTS
        sender, subscriber = self.names(stage.entrant, timing)
        tokens = "x." * (self.size(stage.entrant, timing).bit_length() - 1)
        first, stage.count = stage.count, stage.count + events
        data = b"".join(
            dialect.event(f"{tokens}{first + number:06d}", b"=%015d" % number)
            for number in range(events)
        )
        before = stage.running.process.cpu_s()
        stage.connections[sender].sendall(data)
        last = b"=%015d" % (events - 1)
        arrived = stage.arrival(stage.connections[subscriber], last, data.endswith(b"\r\n"))
        used = stage.running.process.cpu_s() - before
        if any(arrived.count(b"=%015d" % number) != 1 for number in range(events)):
            raise Spoilt("not every event arrived once")
        return Result(used / events * 1e6)


class Subscribing(Growth):
    """A client that has many subscriptions makes more of them, and ends these again."""

    also = (("unsubscribe_us", "unsubscribing, µs"),)
    _CHANGES = 500

    def prepare(self, stage: Stage, timing: Timing) -> None:
        sock = stage.connect(client(0))
        count = self.size(stage.entrant, timing)
        stage.running.dialect.subscribe_all(sock, [f"have.{number}" for number in range(count)])

    def measure(self, stage: Stage, timing: Timing) -> Result:
        dialect, sock = stage.running.dialect, stage.connections[client(0)]
        topics = [f"more.{number}" for number in range(self._CHANGES)]
        process = stage.running.process
        times = [process.cpu_s()]
        dialect.subscribe_all(sock, topics)
        times.append(process.cpu_s())
        dialect.unsubscribe_all(sock, topics)
        times.append(process.cpu_s())
        subscribed, unsubscribed = (b - a for a, b in itertools.pairwise(times))
        return Result(
            subscribed / len(topics) * 1e6, {"unsubscribe_us": unsubscribed / len(topics) * 1e6}
        )


class PoolSize(Growth, Pool):
    """Messages to a pool, by the number of its members."""

    shows_growth = True

    def members(self, entrant: Entrant, timing: Timing) -> int:
        return self.size(entrant, timing)

    def measure(self, stage: Stage, timing: Timing) -> Result:
        more = Pool.measure(self, stage, timing).more
        return Result(more["window_ns"] / 1000, more)


class PoolPaced(PoolSize):
    """The same work, with one message under way at a time.

    The server sleeps between two messages. So each costs a wake-up, a read and a write,
    whatever the size of the pool.
    """

    _PAUSE_S = 0.0005

    def measure(self, stage: Stage, timing: Timing) -> Result:
        name, pool = self.names(stage.entrant, timing)
        sender, message = stage.connections[name], stage.running.dialect.message(pool, _PAYLOAD)
        process, count = stage.running.process, int(timing.seconds / self._PAUSE_S)
        with selectors.DefaultSelector() as selector:
            for member, sock in stage.connections.items():
                if member != name:
                    selector.register(sock, selectors.EVENT_READ, sock)
            before = process.cpu_s()
            for _ in range(count):
                sender.sendall(message)
                while True:
                    ready = selector.select(_ARRIVAL_S)
                    if not ready:
                        raise Spoilt("a message did not arrive")
                    # Other bytes are what a server may send unasked.
                    if _PAYLOAD in ready[0][0].data.recv(MIB):
                        break
                time.sleep(self._PAUSE_S)
            used = process.cpu_s() - before
        return Result(used / count * 1e6)


class StockHandshake(Growth, Connecting):
    """A connection by key alone, in random order, by the number of clients configured."""

    unit = "ms"
    also = ()

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        return [f"c{number:05d}" for number in range(self.size(entrant, timing))]

    def setup(self, entrant: Entrant, timing: Timing, directory: Path) -> Setup:
        names = self.names(entrant, timing)
        return Setup(names, directory, limits={"identify_by_key": len(names)})

    def measure(self, stage: Stage, timing: Timing) -> Result:
        more = Connecting.measure(self, stage, timing).more
        return Result(more["server_us"] / 1000, more)


class LogShare(Connecting):
    """A connection by name and its end, with and without their log lines."""

    key = "connect-log"
    title = "connection by name and its end"
    unit = "µs"
    higher = False
    also = ()
    entrants = (
        Entrant("brokerd", "by name, log level info"),
        Entrant("brokerd", "by name, log level error"),
        Entrant("nats"),
    )

    def setup(self, entrant: Entrant, timing: Timing, directory: Path) -> Setup:
        level = "error" if "error" in entrant.variant else "info"
        return Setup(self.names(entrant, timing), directory, log=level)

    def measure(self, stage: Stage, timing: Timing) -> Result:
        more = super().measure(stage, timing).more
        return Result(more["server_us"], more)


class Keepalive(Growth):
    """Idle connections that are probed every second."""

    unit = "ms/s"

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        return [f"c{number:05d}" for number in range(self.size(entrant, timing))]

    def setup(self, entrant: Entrant, timing: Timing, directory: Path) -> Setup:
        return Setup(self.names(entrant, timing), directory, limits={"keepalive": "1s"})

    def prepare(self, stage: Stage, timing: Timing) -> None:
        for name in self.names(stage.entrant, timing):
            stage.connect(name)

    def measure(self, stage: Stage, timing: Timing) -> Result:
        process = stage.running.process
        # Whole seconds, as it works once in a second.
        seconds = 1 if timing.small else 3
        time.sleep(timing.warm_s)
        before, began = process.cpu_s(), time.monotonic()
        time.sleep(seconds)
        used = (process.cpu_s() - before) / (time.monotonic() - began)
        return Result(used * 1000)


class StartTime(Growth):
    """The time from a server's start to its first authenticated client."""

    unit = "ms"

    def measure(self, stage: Stage, timing: Timing) -> Result:
        stage.count += 1
        names = [f"c{number:05d}" for number in range(self.size(stage.entrant, timing))]
        setup = Setup(names, stage.directory / f"start-{stage.count}")
        running = SYSTEMS[stage.entrant.system].started(setup)
        try:
            running.connect(names[-1]).close()
            took = time.monotonic() - running.process.began
            cpu = running.process.cpu_s()
        finally:
            running.process.stop()
        return Result(took * 1000, {"server_ms": cpu * 1000})
