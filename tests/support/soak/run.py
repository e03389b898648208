"""One soak: a real daemon under mixed work, sampled each second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.broker_process import PROGRAM, BrokerProcess
from support.soak.flatness import Bound, Verdict, judge
from support.soak.work import CLIENTS, LIMITS, Work

__all__ = ["SERIES", "Series", "Soak", "process_figures", "soak"]

PAIR = Path(__file__).with_name("pair.py")
_MIB = 2**20


@dataclass(frozen=True)
class Series:
    """One sampled quantity.

    Attributes:
        key: Its key in a sample.
        bound: Its allowed rise.
        why: The reason for that bound.
    """

    key: str
    title: str
    unit: str
    bound: Bound
    why: str


#: A leak of 3 bytes for each of some 1300 messages a second is 3.5 MB in the 15 minutes
#: that count in 20.
_MEMORY = Bound(0.03, 1.0)
_MEMORY_WHY = (
    "the allocator's arenas move by less; 3 bytes lost with each message are more in 20 minutes"
)
SERIES = (
    Series("rss", "resident memory", "MiB", _MEMORY, _MEMORY_WHY),
    Series("anonymous", "anonymous memory", "MiB", _MEMORY, _MEMORY_WHY),
    Series(
        "fds",
        "descriptors",
        "",
        Bound(0.0, 2.0),
        "connections come and go; one lost in five minutes is more",
    ),
    Series(
        "median_ratio",
        "round trip, median, to the control's",
        "x",
        Bound(0.25, 0.2),
        "the machine does other things, which the control feels too",
    ),
    Series(
        "p99_ratio",
        "round trip, 99th percentile, to the control's",
        "x",
        Bound(0.5, 0.5),
        "the same, at the edge",
    ),
)


@dataclass
class Soak:
    """The results.

    Attributes:
        samples: One value a second, by name.
        account: Counters of the work.
        upgraded_at: Second of the upgrade, None for never.
    """

    seconds: float
    samples: dict[str, list[float]] = field(default_factory=dict)
    account: Counter[str] = field(default_factory=Counter)
    upgraded_at: float | None = None
    seed: int = 0

    def verdicts(self) -> dict[str, Verdict]:
        """Return the verdict on each series."""
        return {each.key: judge(self.samples[each.key], each.bound) for each in SERIES}


def soak(
    directory: Path, seconds: float, seed: int, *, program: str = PROGRAM, upgrade: bool = True
) -> Soak:
    """Run for ``seconds``, and return the results.

    The first error of any message is raised.

    Args:
        upgrade: The broker replaces itself after a tenth of the time, before the
            samples that count, and at the end. In between a new process would hide what
            the old one had lost.
    """
    seen = Soak(seconds, seed=seed)
    with BrokerProcess(
        directory,
        CLIENTS,
        listen=["127.0.0.1:0"],
        limits=LIMITS,
        store={"path": "store", "min_free": 0},
        log={"level": "error", "areas": {"daemon": "info"}},
        program=program,
    ) as broker:
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, str(PAIR), str(broker.addresses()[0].path)]
        pair = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
        )
        try:
            assert pair.stdout is not None
            assert pair.stdout.readline() == "ready\n"
            latest: list[dict[str, float]] = []
            reader = threading.Thread(target=_read, args=(pair, latest), daemon=True)
            reader.start()
            with Work(broker, seed) as work:
                _sample(broker, work, seen, latest, upgrade=upgrade)
                if upgrade:
                    work.upgrade()
            seen.account = work.account
            # That of the pair, too, outlived the upgrade.
            count = len(latest)
            _until(lambda: len(latest) > count)
            pair.communicate("\n", timeout=30)
        finally:
            pair.kill()
            pair.communicate()
        assert not broker.events("daemon.bug")
        broker.signal()
        assert broker.exit_status() == 0
    return seen


def _read(pair: subprocess.Popen[str], into: list[dict[str, float]]) -> None:
    assert pair.stdout is not None
    for line in pair.stdout:
        figures = json.loads(line)
        into.append(figures)


def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _sample(
    broker: BrokerProcess, work: Work, seen: Soak, latest: list[dict[str, float]], *, upgrade: bool
) -> None:
    _until(lambda: bool(latest))
    began = time.monotonic()
    while (now := time.monotonic() - began) < seen.seconds:
        work.check()
        if upgrade and seen.upgraded_at is None and now > seen.seconds / 10:
            work.upgrade()
            seen.upgraded_at = now
        pid = (broker.successors() or [broker.popen.pid])[-1]
        sample = {"at": now, **process_figures(pid), **latest[-1]}
        sample["median_ratio"] = sample["median"] / sample["control_median"]
        sample["p99_ratio"] = sample["p99"] / sample["control_p99"]
        for key, value in sample.items():
            seen.samples.setdefault(key, []).append(value)
        count = len(latest)
        _until(lambda: len(latest) > count)  # noqa: B023


def process_figures(pid: int) -> dict[str, Any]:
    """Return the memory of a process in MiB, and its number of descriptors."""
    sizes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, size = line.partition(":")
        sizes[name] = int(size.split()[0]) * 1024 / _MIB
    return {
        "rss": sizes["Rss"],
        "anonymous": sizes["Anonymous"],
        "fds": len(list(Path(f"/proc/{pid}/fd").iterdir())),
    }
