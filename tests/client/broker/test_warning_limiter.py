"""Warnings of undelivered messages: lines while they are few, counts while they are
many.
"""

from __future__ import annotations

import random

from brokerd_client._common.warning_limiter import WarningLimiter


def test_warning_limiter_logs_first_few_and_counts_rest() -> None:
    """Five in a second have a line each; one line counts the rest when the second is
    over.
    """
    those = WarningLimiter()
    assert [those.note("Offline carol", 10.0 + number / 100) for number in range(8)] == [
        True
    ] * 5 + [False] * 3
    assert not those.note("Full bob", 10.5)
    assert those.due == 11.0
    assert those.more(11.0) == "4 more messages were not delivered: Offline carol (3), Full bob (1)"
    assert those.due is None


def test_warning_limiter_continued_flood_is_logged_less_often() -> None:
    """The period of a second becomes two, four, at last a minute; each has one line of
    its own besides.
    """
    those = WarningLimiter()
    now, lines, periods = 0.0, 0, []
    for _ in range(10):
        began = now
        while those.due is None or now < those.due:
            lines += those.note("Offline carol", now)
            now += 0.01
        periods.append(round(now - began))
        assert those.more(now)
    assert periods == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert lines == 5 + 9


def test_warning_limiter_flood_after_pause_starts_again() -> None:
    """A period without any warning is the end of the last flood."""
    those = WarningLimiter()
    for _ in range(9):
        those.note("Offline carol", 0.0)
    those.more(1.0)
    assert [those.note("Offline carol", 3.1) for _ in range(6)] == [True] * 5 + [False]
    assert those.due == 4.1


def test_warning_limiter_few_warnings_have_no_count() -> None:
    """Few messages have only their own lines, and asking for the rest changes nothing."""
    those = WarningLimiter()
    assert those.more(0.0) == ""
    assert all(those.note("Offline carol", 5.0) for _ in range(5))
    assert those.due is None
    assert those.more(6.0) == ""


def test_warning_limiter_reasons_are_bounded() -> None:
    """A sender to a million names that do not exist gets their number, and the
    commonest of the first known reasons.
    """
    those = WarningLimiter()
    for number in range(3000):
        those.note(f"NoSuchClient c{number}", 0.0)
    assert len(those._limit.counted) == 1001
    assert those.more(1.0).startswith(
        "2995 more messages were not delivered: others (1995), NoSuchClient c5 (1)"
    )


def test_warning_limiter_every_warning_is_logged_or_counted() -> None:
    """This holds for all times and reasons."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    jitter = random.Random(seed)
    those, now, told, noted = WarningLimiter(), 0.0, 0, 0
    for _ in range(20_000):
        now += jitter.choice([0, 0, 0.0001, 0.3])
        if those.due is not None and now >= those.due:
            told += int(those.more(now).partition(" ")[0])
        told += those.note(f"Offline c{jitter.randrange(5000)}", now)
        noted += 1
    told += int(those.more(now).partition(" ")[0] or 0)
    assert told == noted
