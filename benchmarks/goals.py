"""What is to be reached: ratios of medians from one run, with everything switched on."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["GOALS", "REMARKS", "Goal", "Verdict"]

#: Workload, then entrant, to its values.
Values = Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a goal. ratio: None where it could not be measured."""

    goal: Goal
    ratio: float | None

    @property
    def passed(self) -> bool:
        """Whether the goal was measured and reached."""
        return self.ratio is not None and self.goal.reached(self.ratio)

    @property
    def word(self) -> str:
        """Return it in a word or two."""
        if self.ratio is None:
            return "not measured"
        if self.passed:
            return "pass"
        return f"**miss**, by {abs(self.ratio / self.goal.bound - 1):.0%}"


@dataclass(frozen=True, slots=True)
class Goal:
    """One ratio, ours to theirs, both of one workload. at_least: whether the bound is the least or the most allowed."""

    work: str
    against: str
    workload: str
    ours: str
    theirs: str
    bound: float
    at_least: bool = True

    def reached(self, ratio: float) -> bool:
        """Return whether such a ratio is good enough."""
        return ratio >= self.bound if self.at_least else ratio <= self.bound

    def judge(self, values: Values) -> Verdict:
        """Return what came of it."""
        measured = values.get(self.workload, {})
        ours, theirs = measured.get(self.ours), measured.get(self.theirs)
        if not ours or not theirs:
            return Verdict(self, None)
        return Verdict(self, statistics.median(ours) / statistics.median(theirs))


GOALS: Final = (
    Goal("1 to 1, 16 B", "nats-server", "1to1-16", "brokerd", "nats", 12),
    Goal("1 to 1, 16 B", "raw relay", "1to1-16", "brokerd", "relay", 0.45),
    Goal("1 to 1, 1 KiB", "nats-server", "1to1-1k", "brokerd", "nats", 1.4),
    Goal("1 to 1, 64 KiB", "nats-server", "1to1-64k", "brokerd", "nats", 1.2),
    Goal("4 senders to 1, 16 B", "nats-server", "4to1-16", "brokerd", "nats", 10),
    Goal("1 to 1,000 receivers in shuffled order, 16 B", "nats-server", "1to1000-16", "brokerd", "nats", 3),
    Goal("1 event to 100 subscribers, 16 B", "nats-server", "events", "brokerd", "nats", 4),
    Goal("round trip, p50, TCP", "nats-server", "roundtrip", "brokerd", "nats", 0.75, at_least=False),
    Goal("idle authenticated connection, memory", "nats-server", "memory", "brokerd", "nats", 0.2, at_least=False),
    Goal(
        "new authenticated connections/s (1,000 configured clients, stock handshake)",
        "nats-server, password",
        "connect",
        "brokerd/stock handshake",
        "nats",
        1.5,
    ),
    Goal("Python to Python, 16 B, separate processes", "nats-py", "python", "brokerd-client", "nats-py", 8),
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

#: What a profile shows to be in the way of a goal, by (workload, theirs); shown on the page while the goal is missed.
REMARKS: Final[dict[tuple[str, str], str]] = {}
