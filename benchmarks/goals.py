"""The goals: ratios of medians from one run, with everything switched on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

__all__ = ["GOALS", "REMARKS", "Goal", "GoalResult"]

#: The median of a workload, an entrant and one of its figures; None if it was not
#: measured.
Median = Callable[[str, str, str], float | None]


@dataclass(frozen=True, slots=True)
class GoalResult:
    """The measured ratio of a goal; None where it could not be measured."""

    goal: Goal
    ratio: float | None

    @property
    def passed(self) -> bool:
        """Whether the goal was measured and reached."""
        return self.ratio is not None and self.goal.accepts(self.ratio)

    @property
    def word(self) -> str:
        """The result in a word or two."""
        if self.ratio is None:
            return "not measured"
        if self.passed:
            return "pass"
        return f"**miss**, by {abs(self.ratio / self.goal.bound - 1):.0%}"


@dataclass(frozen=True, slots=True)
class Goal:
    """One ratio, ours to theirs, both of one workload.

    Attributes:
        theirs: Empty where our figure itself is the goal.
        at_least: Whether the bound is the least or the most allowed.
        of: The figure that is compared; empty for the workload's own.
        unit: The unit of the bound.
    """

    work: str
    against: str
    workload: str
    ours: str
    theirs: str
    bound: float
    at_least: bool = True
    of: str = ""
    unit: str = "x"

    def accepts(self, ratio: float) -> bool:
        """Return whether such a ratio is good enough."""
        return ratio >= self.bound if self.at_least else ratio <= self.bound

    def evaluate(self, median: Median) -> GoalResult:
        """Return the result of the goal with these medians."""
        ours = median(self.workload, self.ours, self.of)
        theirs = median(self.workload, self.theirs, self.of) if self.theirs else 1.0
        return GoalResult(self, ours / theirs if ours is not None and theirs else None)


GOALS: Final = (
    Goal("request and reply, 100 under way", "nats-server", "requests-100", "brokerd", "nats", 1.5),
    Goal("the same, 1 under way", "nats-server", "requests-1", "brokerd", "nats", 1.2),
    Goal(
        "round trip, p50, TCP", "nats-server", "roundtrip", "brokerd", "nats", 0.75, at_least=False
    ),
    Goal("1 to a pool of 4", "nats-server, queue group", "pool-4", "brokerd", "nats", 1.5),
    Goal("1 to a pool of 32", "nats-server, queue group", "pool-32", "brokerd", "nats", 1.5),
    Goal(
        "messages with a receipt, 100 under way",
        "nats-server, verbose",
        "receipts-100",
        "brokerd",
        "nats",
        0.8,
    ),
    Goal(
        "the same, 10,000 under way", "nats-server, verbose", "receipts-10000", "brokerd", "nats", 1
    ),
    Goal(
        "messages with an extension, a traceparent",
        "nats-server, header",
        "extension",
        "brokerd",
        "nats",
        4,
    ),
    Goal(
        "asyncio, 100 requests under way",
        "nats-py",
        "python-requests-100",
        "brokerd-client/asyncio",
        "nats-py/asyncio",
        2,
    ),
    Goal(
        "the same with uvloop",
        "nats-py",
        "python-requests-100",
        "brokerd-client/uvloop",
        "nats-py/uvloop",
        2,
    ),
    Goal(
        "asyncio, one request at a time",
        "nats-py",
        "python-requests-1",
        "brokerd-client/asyncio",
        "nats-py/asyncio",
        1.5,
    ),
    Goal(
        "the same with uvloop",
        "nats-py",
        "python-requests-1",
        "brokerd-client/uvloop",
        "nats-py/uvloop",
        1.5,
    ),
    Goal(
        "blocking client, one request at a time",
        "two stock Connections",
        "python-blocking",
        "brokerd-client/blocking",
        "stock-client",
        0.75,
    ),
    Goal(
        "asyncio, confirmed sends, a call for each",
        "none",
        "python-receipts",
        "brokerd-client/a call for each",
        "",
        100_000,
        unit="/s",
    ),
    Goal(
        "Python to Python, 16 B, separate processes",
        "nats-py",
        "python",
        "brokerd-client",
        "nats-py",
        8,
    ),
    Goal("the same", "zenoh through its router", "python", "brokerd-client", "zenoh", 2),
    Goal("1 to 1, 16 B", "nats-server", "1to1-16", "brokerd", "nats", 12),
    Goal("1 to 1, 16 B", "raw relay", "1to1-16", "brokerd", "relay", 0.45),
    Goal("1 to 1, 1 KiB", "nats-server", "1to1-1k", "brokerd", "nats", 1.4),
    Goal("1 to 1, 64 KiB", "nats-server", "1to1-64k", "brokerd", "nats", 1.2),
    Goal("4 senders to 1, 16 B", "nats-server", "4to1-16", "brokerd", "nats", 10),
    Goal(
        "1 to 1,000 receivers in shuffled order, 16 B",
        "nats-server",
        "1to1000-16",
        "brokerd",
        "nats",
        3,
    ),
    Goal("1 event to 100 subscribers, 16 B", "nats-server", "events", "brokerd", "nats", 4),
    Goal("1 to 1, 16 B, sender never pauses", "nats-server", "unpaused-16", "brokerd", "nats", 12),
    Goal(
        "1 to 1, 64 KiB, sender never pauses",
        "nats-server",
        "unpaused-64k",
        "brokerd",
        "nats",
        1.2,
    ),
    Goal(
        "1 event to 100 subscribers, 16 B, sender never pauses",
        "nats-server",
        "unpaused-events",
        "brokerd",
        "nats",
        4,
    ),
    Goal(
        "throughput of 49 pairs while a 50th does not read",
        "all 50 read",
        "slow_reader",
        "brokerd/1 does not read",
        "brokerd/all read",
        0.9,
    ),
    *(
        goal
        for window in ("1000", "10000")
        for goal in (
            Goal(
                f"stored before the receipt, 128 B, {int(window):,} under way",
                "JetStream, sync_interval: always",
                f"stored-{window}",
                "brokerd-mailbox",
                "jetstream-synced",
                40,
            ),
            Goal(
                "the same",
                "JetStream, not synced",
                f"stored-{window}",
                "brokerd-mailbox",
                "jetstream",
                0.8,
            ),
            Goal(
                "the same",
                "Redis stream, appendfsync always",
                f"stored-{window}",
                "brokerd-mailbox",
                "redis-synced",
                1,
            ),
        )
    ),
    Goal(
        "the same, one at a time",
        "one fdatasync and one live round trip",
        "stored-1",
        "brokerd-mailbox",
        "",
        1.5,
        at_least=False,
        of="times_least",
    ),
    Goal(
        "delivered and acknowledged, window 1,000",
        "JetStream pull consumer",
        "drained",
        "brokerd-mailbox",
        "jetstream",
        3,
    ),
    Goal(
        "round trip of a live message beside full speed into a mailbox, p99",
        "nothing beside it",
        "live-beside-stored",
        "brokerd-mailbox/saturated",
        "brokerd-mailbox/idle",
        2,
        at_least=False,
    ),
    Goal(
        "idle authenticated connection, memory",
        "nats-server",
        "memory",
        "brokerd",
        "nats",
        0.2,
        at_least=False,
    ),
    Goal(
        "new authenticated connections/s (1,000 configured clients, stock handshake)",
        "nats-server, password",
        "connect",
        "brokerd/stock handshake",
        "nats",
        1.5,
    ),
    Goal(
        "processor time of a new connection by name",
        "nats-server, password",
        "connect",
        "brokerd/handshake with name",
        "nats",
        1,
        at_least=False,
        of="server_us",
    ),
    Goal(
        "routing cost per message, 100,000 clients configured",
        "10 configured",
        "configured",
        "brokerd/100,000 clients",
        "brokerd/10 clients",
        1.3,
        at_least=False,
    ),
    Goal(
        "processor time of a connection by name and its end",
        "none",
        "connect-log",
        "brokerd/by name, log level info",
        "",
        300,
        at_least=False,
        unit="µs",
    ),
    Goal(
        "the same with its log lines",
        "without them",
        "connect-log",
        "brokerd/by name, log level info",
        "brokerd/by name, log level error",
        1.1,
        at_least=False,
    ),
    Goal(
        "event to 1,100 topics in turn",
        "1,000 topics",
        "topics",
        "brokerd/1,100 topics",
        "brokerd/1,000 topics",
        2,
        at_least=False,
    ),
    Goal(
        "event to 100,000 topics in turn",
        "1,000 topics",
        "topics",
        "brokerd/100,000 topics",
        "brokerd/1,000 topics",
        2,
        at_least=False,
    ),
    Goal(
        "event to 17 topics in turn, 1,000 matches",
        "nats-server",
        "fanout",
        "brokerd/17 topics",
        "nats/17 topics",
        1,
        at_least=False,
    ),
    Goal(
        "event to 100 topics in turn, 1,000 matches",
        "nats-server",
        "fanout",
        "brokerd/100 topics",
        "nats/100 topics",
        1,
        at_least=False,
    ),
    Goal(
        "event without a match, 1,000 topics in turn",
        "none",
        "unmatched",
        "brokerd/1,000 topics",
        "",
        1,
        at_least=False,
        unit="µs",
    ),
    Goal(
        "event without a match, 100,000 topics in turn",
        "none",
        "unmatched",
        "brokerd/100,000 topics",
        "",
        1,
        at_least=False,
        unit="µs",
    ),
    Goal(
        "event beside 1,000 subscription changes/s",
        "without changes",
        "beside",
        "brokerd/1,000 changes/s",
        "brokerd/0 changes/s",
        2,
        at_least=False,
    ),
    Goal(
        "first event to a topic, 4,096 wildcard patterns",
        "none",
        "first-publish",
        "brokerd/4,096 wildcard patterns",
        "",
        1000,
        at_least=False,
        unit="µs",
    ),
    Goal(
        "subscribing, with 1,000 subscriptions",
        "none",
        "subscribe",
        "brokerd/1,000 subscriptions before",
        "",
        10,
        at_least=False,
        unit="µs",
    ),
    Goal(
        "unsubscribing, with 1,000 subscriptions",
        "none",
        "subscribe",
        "brokerd/1,000 subscriptions before",
        "",
        10,
        at_least=False,
        of="unsubscribe_us",
        unit="µs",
    ),
    Goal(
        "message to a pool of 1,000",
        "a pool of 4",
        "pool-size",
        "brokerd/1,000 members",
        "brokerd/4 members",
        1.3,
        at_least=False,
    ),
    Goal(
        "the same, one at a time",
        "a pool of 4",
        "pool-paced",
        "brokerd/1,000 members",
        "brokerd/4 members",
        1.3,
        at_least=False,
    ),
    Goal(
        "handshake by key, 10,000 clients configured",
        "none",
        "handshake",
        "brokerd/10,000 clients",
        "",
        2,
        at_least=False,
        unit="ms",
    ),
    Goal(
        "keepalive of 1 s, 9,000 connections",
        "none",
        "keepalive",
        "brokerd/9,000 connections",
        "",
        20,
        at_least=False,
        unit="ms/s",
    ),
    Goal(
        "start to first connection",
        "none",
        "start",
        "brokerd/10 clients",
        "",
        150,
        at_least=False,
        unit="ms",
    ),
    Goal(
        "the same, 100,000 clients configured",
        "none",
        "start",
        "brokerd/100,000 clients",
        "",
        2500,
        at_least=False,
        unit="ms",
    ),
    Goal(
        "longest ping during a reload, 100,000 clients, 1 changed",
        "none",
        "reload",
        "brokerd/100,000 clients",
        "",
        20,
        at_least=False,
        unit="ms",
    ),
    Goal(
        "the same, all changed",
        "none",
        "reload-all",
        "brokerd/100,000 clients",
        "",
        20,
        at_least=False,
        unit="ms",
    ),
    Goal(
        "longest ping during the operation `clients`, 100,000 clients",
        "none",
        "clients",
        "brokerd/100,000 clients",
        "",
        20,
        at_least=False,
        unit="ms",
    ),
    Goal(
        "longest ping while 9,000 connections end",
        "none",
        "ending",
        "brokerd/9,000 connections",
        "",
        20,
        at_least=False,
        unit="ms",
    ),
    Goal(
        "64 MiB messages, GiB/s",
        "nats-server",
        "large",
        "brokerd/64 MiB",
        "nats/64 MiB",
        1.2,
    ),
    Goal(
        "longest ping beside 64 MiB messages",
        "none",
        "large",
        "brokerd/64 MiB",
        "",
        20,
        at_least=False,
        of="longest",
        unit="ms",
    ),
    Goal(
        "100 polite request clients beside bulk, p50",
        "nats-server",
        "polite",
        "brokerd/beside bulk",
        "nats/beside bulk",
        2,
        at_least=False,
    ),
    Goal(
        "100 polite request clients beside a pool's, p50",
        "nats-server",
        "polite",
        "brokerd/beside a pool's",
        "nats/beside a pool's",
        2,
        at_least=False,
    ),
    Goal(
        "100 polite request clients beside receipts, p50",
        "nats-server",
        "polite",
        "brokerd/beside receipts",
        "nats/beside receipts",
        2,
        at_least=False,
    ),
    Goal(
        "100 polite request clients beside subscriptions, p50",
        "nats-server",
        "polite",
        "brokerd/beside subscriptions",
        "nats/beside subscriptions",
        2,
        at_least=False,
    ),
    Goal(
        "100 polite request clients beside refusals, p50",
        "nats-server beside bulk",
        "polite",
        "brokerd/beside refusals",
        "nats/beside bulk",
        2,
        at_least=False,
    ),
    Goal(
        "100 polite request clients beside client lists, p50",
        "nats-server beside bulk",
        "polite",
        "brokerd/beside client lists",
        "nats/beside bulk",
        2,
        at_least=False,
    ),
)

#: What a profile shows to be in the way of a goal, by (workload, theirs); shown on the
#: page while the goal is missed.
REMARKS: Final[dict[tuple[str, str], str]] = {
    ("1to1-16", "nats"): (
        "nats-server varies. In three whole runs it took 410 to 484 ns of processor time for a"
        " message, and brokerd 21 to 26. The ratio was 14.7 and 17.7 x where nats-server took 480"
        " ns and more, and 12 x where it took 410."
    ),
    ("roundtrip", "nats"): (
        "two process wake-ups per message take most of the time. The relay, which parses nothing,"
        " reaches 0.6 to 0.7 x. Per round trip it spends 17 µs of processor time, brokerd 33 and"
        " nats-server 43. brokerd makes the same three system calls per message as the relay (wait,"
        " receive, send). A message costs 8 µs more than in the relay: Python takes 3 of them, and"
        " a profile shows the rest spread over many places. On a machine with other work, the ratio"
        " varied from 0.72 to 1.15 x."
    ),
    ("python-requests-100", "nats-py/uvloop"): (
        "the three processes take half of the processor time that nats-py and its server take,"
        " and used 1.4 of two processors where those used 1.8. A hundred requests travel in a few"
        " batches, and a process without a batch waits. Smaller batches cost more system calls."
    ),
    ("python-requests-1", "nats-py/uvloop"): (
        "a request costs each client three system calls (wait, read, write), and 33 to 38 µs of"
        " processor time with uvloop; nats-py takes 70 to 100. But nats-py works on after its"
        " write, while its server does. The broker's 60 µs for two messages and four wake-ups are"
        " the rest, which a faster client does not shorten."
    ),
    ("python-blocking", "stock-client"): (
        "both libraries make three system calls per request at each end. The rest is Python: 13 µs"
        " at each end, where a Connection takes 3. These are 20 calls of functions at the sender"
        " and 29 at the other end, for timeouts, threads, interrupts, cancelled requests and"
        " reconnects. A thread that waits polls for a moment, so that its processor need not wake"
        " up. Where other programs keep the processors, it does not. Then both rates depend on"
        " where the system runs the three processes."
    ),
    ("connect", "nats"): (
        "a connection by name and its end are three sends, three receives, two log lines, a"
        " conversation and a session. Python takes 60% of the processor time, and the system 37%,"
        " more than half of all that nats-server needs. That has one send and two receives"
        " fewer, and compares a password. Without a name, the broker searches for the key: a try"
        " takes 0.08 µs, so that 500 of a thousand, and the list of the keys, take some 60 µs more."
        " The Python is some 260 short calls, none of which stands out. To compile them as they are"
        " takes longer: Python 3.11 looks attributes and methods up once, compiled code each time."
    ),
    ("connect-log", "brokerd/by name, log level error"): (
        "the two log lines. In a process that does nothing else, three quarters of their time make"
        " and write the lines, in the log's thread, and a quarter queues two events in the thread"
        " of the event loop. Beside connections they take longer, which shows up in no function."
        " To make the lines in the event loop's thread, one by one or 32 at once, saves nothing"
        " that can be measured."
    ),
    ("pool-size", "brokerd/4 members"): (
        "the writes. Without them a message costs less than 30 ns, to one of a thousand members"
        " or of 4: where one read has many messages for each member, a member gets some of them"
        " in a row, so that its outbox comes into the processor's cache once. But each member has"
        " a socket of its own. A write to it takes some 9 µs, 7 of them in the system. With at"
        " most 4 MiB under way, a write carries some 220 messages for one of a thousand members,"
        " and thousands for one of 4. So the writes alone take 40 ns for a message. nats-server's"
        " cost grows as much, as the table shows. Longer runs would need fewer writes. But then"
        " some members would have hundreds of messages while others wait for work."
    ),
    ("pool-paced", "brokerd/4 members"): (
        "the system. A profile shows four fifths of the difference there, most of it in the"
        " write. A member of a thousand gets a message every half second. The data of its socket,"
        " at both ends, is not in the processor's nearest caches by then. The rest is the"
        " broker's own data of that connection. nats-server's cost grows alike, as the table"
        " shows."
    ),
    ("stored-1", ""): (
        "the processor time of two processes in Python, and two wake-ups. Where a processor is"
        " spare, the broker polls for the answer of the store process. That polls for the next"
        " message, so that neither is woken by the other. With the processors to themselves,"
        " 100 of some 270 µs are the fdatasync. The broker works for 55, and the store process"
        " for 65. The other 50 are the client's, and pass until the broker and the client are"
        " awake. Behind each wait for the disk, the processors are slower: a commit takes 28 µs"
        " of processor time, and 45 behind an fdatasync. It writes two pages, which takes no"
        " longer than to write 128 bytes."
        " JetStream and Redis write to the disk in the thread that serves their clients, which"
        " get no answer meanwhile."
    ),
    ("live-beside-stored", "brokerd-mailbox/idle"): (
        "a trace of the scheduler and of system calls showed where the message waits, beside a"
        " million stored ones per second. It waited for the broker's own work for 0.03 ms in the"
        " median, 0.23 at p90 and 0.57 at p99. With one read or one answer of the store in each"
        " turn, the p90 of the round trip has halved since. Smaller reads, of 16 KiB, and"
        " receipts written in pieces gained nothing more. The broker also waits for a processor,"
        " at p99 for 0.3 to 0.9 ms, though another processor may be idle. The store process, the"
        " kernel's own work for the disk or another program has its processor. The kernel of"
        " this machine does not preempt itself (PREEMPT_NONE), not even for the client with"
        " real-time priority. A lower priority of the store process (nice 5 and 10,"
        " SCHED_BATCH), a shorter time slice for the broker, and one processor for each of the"
        " two did not help: p99 stayed between 0.4 and 1.1 ms, or rose. With live messages"
        " instead, the turns of a busy broker are the wait: see the row beside it."
    ),
    ("start", ""): (
        "to start the interpreter and to import asyncio, uvloop, pydantic, structlog and PyYAML"
        " takes half of the time, and the broker's own 200 modules take a third. Of both, the"
        " methods of dataclasses take a sixth of all: Python 3.11 compiles them one by one."
        " With 100,000 clients, PyYAML's parser takes a fifth of the time, making values of its"
        " events another, and checking the entries a third."
    ),
}
