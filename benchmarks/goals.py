"""The goals: ratios of medians from one run, with everything switched on."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["GOALS", "REMARKS", "Goal", "GoalResult"]

#: Workload, then entrant, to its values.
Values = Mapping[str, Mapping[str, Sequence[float]]]


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

    at_least: whether the bound is the least or the most allowed.
    """

    work: str
    against: str
    workload: str
    ours: str
    theirs: str
    bound: float
    at_least: bool = True

    def accepts(self, ratio: float) -> bool:
        """Return whether such a ratio is good enough."""
        return ratio >= self.bound if self.at_least else ratio <= self.bound

    def evaluate(self, values: Values) -> GoalResult:
        """Return the result of the goal with these values."""
        measured = values.get(self.workload, {})
        ours, theirs = measured.get(self.ours), measured.get(self.theirs)
        if not ours or not theirs:
            return GoalResult(self, None)
        return GoalResult(self, statistics.median(ours) / statistics.median(theirs))


GOALS: Final = (
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
    Goal(
        "round trip, p50, TCP", "nats-server", "roundtrip", "brokerd", "nats", 0.75, at_least=False
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
        "Python to Python, 16 B, separate processes",
        "nats-py",
        "python",
        "brokerd-client",
        "nats-py",
        8,
    ),
    Goal("the same", "zenoh through its router", "python", "brokerd-client", "zenoh", 2),
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
        "throughput of 49 pairs while a 50th does not read",
        "all 50 read",
        "slow_reader",
        "brokerd/1 does not read",
        "brokerd/all read",
        0.9,
    ),
)

#: What a profile shows to be in the way of a goal, by (workload, theirs); shown on the
#: page while the goal is missed.
REMARKS: Final[dict[tuple[str, str], str]] = {
    ("roundtrip", "nats"): (
        "two process wake-ups per message take most of the time. The relay, which parses nothing,"
        " reaches 0.6 to 0.7 x. Per round trip it spends 17 µs of processor time, brokerd 33 and"
        " nats-server 43. brokerd makes the same three system calls per message as the relay (wait,"
        " receive, send). A message costs 8 µs more than in the relay: Python takes 3 of them, and"
        " a profile shows the rest spread over many places. On a machine with other work, the ratio"
        " varied from 0.72 to 1.15 x."
    ),
    ("connect", "nats"): (
        "the key of an answer without a name must be searched for, with 500 tries on average. A try"
        " takes 1.85 µs, of which 1.5 are the standard library's HMAC: 1 ms of the 1.5 that a"
        " connection costs. With a name it costs 0.3 ms: three sends, three receives, two log"
        " lines, and a conversation in Python. nats-server, which compares a password, takes 0.14"
        " ms."
    ),
}
