"""The workloads: the work of each system, and how each is measured.

A workload prepares a stage for an entrant: a system that is started and connected. It
measures the entrant once per call. A measurement that lost a message, or got one too
many, is not valid: it raises Spoilt.
"""

from __future__ import annotations

from typing import Final

from benchmarks.workloads.applications import Extended, Pool, Receipts, Requests
from benchmarks.workloads.bulk import (
    PEERS,
    Configured,
    Events,
    RoundTrip,
    SlowReader,
    Stream,
)
from benchmarks.workloads.connections import Connecting, IdleMemory
from benchmarks.workloads.growth import (
    Beside,
    Fanout,
    FirstPublish,
    Keepalive,
    LogShare,
    PoolPaced,
    PoolSize,
    StartTime,
    StockHandshake,
    Subscribing,
    Topics,
    Unmatched,
)
from benchmarks.workloads.mailboxes import Drained, LiveBeside, OneAtATime, StoredStream
from benchmarks.workloads.python_clients import PythonCalls, PythonToPython
from benchmarks.workloads.stage import Entrant, Result, Spoilt, Stage, Timing, Workload
from benchmarks.workloads.stalls import ClientList, Ending, LargeMessages, Polite, Reload

__all__ = ["CHAPTERS", "WORKLOADS", "Entrant", "Result", "Spoilt", "Stage", "Timing", "Workload"]

_TOPICS: Final = (10, 100, 1000, 1100, 10_000, 20_000, 100_000)
_CLIENTS: Final = (1000, 10_000, 100_000)
_LIBRARIES: Final = tuple(
    Entrant(library, loop)
    for loop in ("asyncio", "uvloop")
    for library in ("brokerd-client", "nats-py")
)

#: The chapters of the page, as the command line calls them, and the workloads of each.
CHAPTERS: Final[dict[str, tuple[Workload, ...]]] = {
    "applications": (
        Requests(100),
        Requests(1),
        RoundTrip(),
        Pool(4),
        Pool(32),
        Receipts(100),
        Receipts(10_000),
        Extended(),
        PythonCalls("python-requests-100", "asyncio, 100 requests under way", _LIBRARIES, 100),
        PythonCalls("python-requests-1", "asyncio, one request at a time", _LIBRARIES),
        PythonCalls(
            "python-blocking",
            "blocking client, one request at a time",
            (Entrant("brokerd-client", "blocking"), Entrant("stock-client")),
        ),
        PythonCalls(
            "python-receipts",
            "asyncio, 1,000 confirmed sends at once",
            (
                Entrant("brokerd-client", "a call for each"),
                Entrant("brokerd-client", "one call for many"),
            ),
        ),
        PythonToPython(
            "python",
            "Python to Python, 16 B, separate processes",
            tuple(
                Entrant(system)
                for system in (
                    "brokerd-client",
                    "brokerd-client-unix",
                    "nats-py",
                    "zenoh",
                    "pyzmq",
                    "redis-py",
                )
            ),
        ),
    ),
    "bulk": (
        Stream("1to1-16", "1 to 1, 16 B", 16),
        Stream("1to1-1k", "1 to 1, 1 KiB", 1024),
        Stream("1to1-64k", "1 to 1, 64 KiB", 64 * 1024),
        Stream("4to1-16", "4 senders to 1, 16 B", 16, senders=4, systems=PEERS),
        Stream(
            "1to1000-16",
            "1 to 1,000 receivers in shuffled order, 16 B",
            16,
            receivers=1000,
            systems=PEERS,
        ),
        Events(
            "events",
            "1 event to 100 subscribers, 16 B",
            ("brokerd", "brokerd-unix", "nats", "redis", "mosquitto"),
        ),
        Stream(
            "unpaused-16",
            "1 to 1, 16 B, sender never pauses",
            16,
            systems=("brokerd", "nats"),
            pauses=False,
        ),
        Stream(
            "unpaused-64k",
            "1 to 1, 64 KiB, sender never pauses",
            64 * 1024,
            systems=("brokerd", "nats"),
            pauses=False,
        ),
        Events(
            "unpaused-events",
            "1 event to 100 subscribers, 16 B, sender never pauses",
            ("brokerd", "nats"),
            pauses=False,
        ),
        SlowReader(),
    ),
    "mailboxes": (
        StoredStream(1000),
        StoredStream(10_000),
        OneAtATime(),
        Drained(),
        LiveBeside(),
    ),
    "connections": (IdleMemory(), Connecting(), LogShare(), Configured()),
    "growth": (
        Topics("topics", "event to topics in turn, 1 match", "topics", _TOPICS),
        Fanout("fanout", "event to topics in turn, 1,000 matches", "topics", (15, 17, 100)),
        Unmatched(
            "unmatched", "event without a match, topics in turn", "topics", (10, 1000, 100_000)
        ),
        Beside("beside", "event beside subscription changes", "changes/s", (0, 300, 1000)),
        FirstPublish(
            "first-publish", "first event to a topic", "wildcard patterns", (16, 256, 4096)
        ),
        Subscribing("subscribe", "subscription", "subscriptions before", (10, 1000, 9000)),
        PoolSize("pool-size", "message to a pool", "members", (4, 10, 100, 1000)),
        PoolPaced("pool-paced", "message to a pool, one at a time", "members", (4, 1000)),
        StockHandshake("handshake", "handshake by key", "clients", (100, 1000, 10_000)),
        Keepalive("keepalive", "keepalive of 1 s", "connections", (1000, 9000), ("brokerd",)),
        StartTime("start", "start to first connection", "clients", (10, 1000, 100_000)),
        Reload("reload", "longest ping, reload, 1 changed", _CLIENTS, changed="one"),
        Reload("reload-all", "longest ping, reload, all changed", _CLIENTS, changed="all"),
        ClientList("clients", "longest ping, `clients`", "clients", _CLIENTS, ("brokerd",)),
        Ending(
            "ending", "longest ping, connections ending", "connections", (1000, 9000), ("brokerd",)
        ),
        LargeMessages(),
        Polite(),
    ),
}

WORKLOADS: Final[dict[str, Workload]] = {
    workload.key: workload for workloads in CHAPTERS.values() for workload in workloads
}
