"""Warnings of undelivered messages: lines while they are few, counts while they are
many.
"""

from __future__ import annotations

import random

from brokerd_client._common.warning_limiter import WarningLimiter


def test_the_first_few_have_a_line_and_the_rest_is_counted() -> None:
    """Five in a second; then one line for all others, when the second is over."""
    those = WarningLimiter()
    assert [those.note("Offline carol", 10.0 + number / 100) for number in range(8)] == [
        True
    ] * 5 + [False] * 3
    assert not those.note("Full bob", 10.5)
    assert those.due == 11.0
    assert those.more(11.0) == "4 more messages were not delivered: Offline carol (3), Full bob (1)"
    assert those.due is None


def test_a_flood_that_goes_on_is_told_of_ever_more_rarely() -> None:
    """The second becomes two, four, at last a minute; each has one line of its own
    besides.
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


def test_a_flood_after_a_pause_is_a_new_one() -> None:
    """A period without any is the end of the last flood."""
    those = WarningLimiter()
    for _ in range(9):
        those.note("Offline carol", 0.0)
    those.more(1.0)
    assert [those.note("Offline carol", 3.1) for _ in range(6)] == [True] * 5 + [False]
    assert those.due == 4.1


def test_nothing_more_is_nothing_to_say() -> None:
    """Few messages are told of by their lines alone, and asking for the rest changes
    nothing.
    """
    those = WarningLimiter()
    assert those.more(0.0) == ""
    assert all(those.note("Offline carol", 5.0) for _ in range(5))
    assert those.due is None
    assert those.more(6.0) == ""


def test_only_so_many_reasons_are_kept_apart() -> None:
    """Whoever sends to a million names that do not exist has their number, and the
    commonest of those known first.
    """
    those = WarningLimiter()
    for number in range(3000):
        those.note(f"NoSuchClient c{number}", 0.0)
    assert len(those._limit.counted) == 1001
    assert those.more(1.0).startswith(
        "2995 more messages were not delivered: others (1995), NoSuchClient c5 (1)"
    )


def test_every_message_is_in_a_line_or_in_a_count() -> None:
    """Whatever their times and reasons."""
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
