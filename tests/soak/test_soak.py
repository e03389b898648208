"""A short soak is flat, and the verdict detects series that are not."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from support.broker_process import PROGRAM
from support.nats_server import needs_nats
from support.soak.cluster import cluster_soak, cluster_table
from support.soak.flatness import Bound, judge, theil_sen
from support.soak.page import picture, table
from support.soak.run import SERIES, soak

BOUNDS = {each.key: each.bound for each in SERIES}
#: Loses a megabyte a second, as a daemon could that keeps something of every message.
LEAKING = f"""
import threading, time
lost = []
def lose():
    while True:
        lost.append(b"x" * 50_000)
        time.sleep(0.05)
threading.Thread(target=lose, daemon=True).start()
{PROGRAM}
"""


def memory(rng: random.Random, samples: int, lost_mib: float = 0.0) -> list[float]:
    """Return samples like a broker's memory: a lower beginning, noise, some peaks, and
    ``lost_mib`` lost in all.
    """
    return [
        50
        - 5 * (number < samples / 8)
        + rng.gauss(0, 0.2)
        + 20 * (rng.random() < 0.05)
        + lost_mib * number / samples
        for number in range(samples)
    ]


@pytest.mark.parametrize("samples", [60, 1200])
def test_soak_verdict_of_noise_and_peaks_is_flat(samples: int) -> None:
    """Memory that rises and falls again, or rises only at the beginning, does not count
    as a rise.
    """
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    assert judge(memory(random.Random(seed), samples), BOUNDS["rss"]).flat


@pytest.mark.parametrize("samples", [60, 1200])
def test_soak_verdict_of_leak_under_noise_is_not_flat(samples: int) -> None:
    """Four MiB lost in the whole time are found, whatever the noise."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    verdict = judge(memory(random.Random(seed), samples, lost_mib=4), BOUNDS["rss"])
    assert not verdict.flat
    assert 2 < verdict.rise < 4


def test_soak_verdict_of_lost_descriptors_and_delays_is_not_flat() -> None:
    """Four descriptors in the whole time, or a median that doubles."""
    assert not judge([30 + number // 150 for number in range(600)], BOUNDS["fds"]).flat
    assert not judge([5 + number / 120 for number in range(600)], BOUNDS["median_ratio"]).flat
    assert judge([30 + number % 7 for number in range(600)], BOUNDS["fds"]).flat


def test_soak_slope_is_median_of_pairs() -> None:
    """A straight line has its own slope, however many samples; outliers do not move it."""
    assert theil_sen([2.0 * number for number in range(10)]) == pytest.approx(2)
    assert theil_sen([2.0 * number for number in range(5000)]) == pytest.approx(2)
    assert theil_sen([0, 2, 4, 1000, 8, 10, -500, 14, 16, 18]) == pytest.approx(2)
    assert judge([1.0, 1.0, 1.0, 1.0], Bound(0, 0)).flat


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_soak_of_90_seconds_is_flat(socket_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mixed work with one upgrade: no message is lost, and memory and descriptors do
    not rise.
    """
    seed = random.randrange(2**32)
    result = soak(socket_dir, 90, seed)
    with capsys.disabled():
        print("", table(result), sep="\n")
    assert picture(result).count("<polyline") == 6
    verdicts = result.verdicts()
    # In so short a time, how fast a machine is that tests run on says nothing.
    assert [key for key in ("rss", "anonymous", "fds") if not verdicts[key].flat] == []


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_soak_of_leaking_daemon_is_not_flat(socket_dir: Path) -> None:
    """The same soak, shorter, of a daemon that keeps a megabyte a second."""
    result = soak(socket_dir, 20, random.randrange(2**32), program=LEAKING, upgrade=False)
    verdicts = result.verdicts()
    assert not verdicts["rss"].flat
    assert not verdicts["anonymous"].flat
    assert verdicts["fds"].flat


@pytest.mark.slow
@needs_nats
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_soak_of_cluster_for_30_seconds_balances(
    socket_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Descriptors do not rise; for memory the time is too short."""
    seen = cluster_soak(socket_dir, 30)
    with capsys.disabled():
        print("", cluster_table(seen), sep="\n")
    assert all(found.flat for _, title, _, found in seen.verdicts() if title == "descriptors")
    assert seen.ends > 0
    assert seen.roamings > 0
