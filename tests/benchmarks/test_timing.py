"""The comparison of two samples of times: checked with samples whose result is known."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.timing import compare


def test_timing_compare_equal_samples_do_not_differ() -> None:
    """The same values twice: as often faster as slower, z of 0."""
    share, z, p = compare([1, 2, 3, 4] * 10, [1, 2, 3, 4] * 10)
    assert (share, z, p) == (0.5, 0.0, 1.0)


def test_timing_compare_constant_samples_do_not_divide_by_zero() -> None:
    """All values tied is no difference."""
    assert compare([5] * 30, [5] * 30) == (0.5, 0.0, 1.0)


def test_timing_compare_gives_textbook_result() -> None:
    """U by hand: of the pairs of (1, 4, 6) and (2, 3, 5), the first is smaller in 4 of
    9.
    """
    share, z, _ = compare([1, 4, 6], [2, 3, 5])
    assert share == pytest.approx(4 / 9)
    assert z == pytest.approx(0.5 / (3 * 3 * 7 / 12) ** 0.5)


def test_timing_compare_detects_small_difference() -> None:
    """Enough tries detect that one sample is slower by two hundredths of a deviation."""
    order = random.Random(7)
    first = [order.gauss(100, 10) for _ in range(40_000)]
    second = [order.gauss(100.2, 10) for _ in range(40_000)]
    share, z, p = compare(first, second)
    assert share > 0.5
    assert z < -2
    assert p < 0.05
