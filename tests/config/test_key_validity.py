"""How long keys admit their client."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from brokerd.config.key_validity import KeyState, let_in_until, state_of
from brokerd.config.lint import lint_warnings
from brokerd.config.load import load_text
from brokerd.config.values import Key

NOW = datetime(2026, 6, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def key(begin: int | None, end: int | None) -> Key:
    """Return a key that is valid from `begin` to `end` days from now."""
    return Key(
        f"{begin} {end}".encode(),
        None if begin is None else NOW + begin * DAY,
        None if end is None else NOW + end * DAY,
    )


def test_key_state_depends_on_validity_window() -> None:
    """A key is valid within its window, both ends included. Before the window it is not
    yet valid, after it expired.
    """
    assert state_of(key(None, None), NOW) is KeyState.VALID
    assert state_of(key(0, 0), NOW) is KeyState.VALID
    assert state_of(key(1, None), NOW) is KeyState.NOT_YET
    assert state_of(key(None, -1), NOW) is KeyState.EXPIRED


@pytest.mark.parametrize(
    ("keys", "last"),
    [
        ([], None),
        ([key(None, None)], None),
        ([key(None, 5)], key(None, 5)),
        ([key(None, 5), key(None, None)], None),
        ([key(None, 5), key(-3, 9)], key(-3, 9)),
        ([key(None, 9), key(2, 5)], key(None, 9)),
        ([key(None, 5), key(5, 8), key(7, 20)], key(7, 20)),
        ([key(None, 5), key(5, None)], None),
        ([key(None, 5), key(6, None)], key(None, 5)),
        ([key(None, -1), key(3, None)], None),
        ([key(None, -1)], None),
    ],
)
def test_key_validity_end_is_last_key_without_gap(keys: list[Key], last: Key | None) -> None:
    """Keys that follow each other without a gap count as one time. The result is None
    if that time has no end or hasn't begun.
    """
    assert let_in_until(keys, NOW) == last
    assert let_in_until(reversed(keys), NOW) == last


def test_check_last_key_expiring_is_warned_of() -> None:
    """The warning comes within limits.expiry_warning of the expiry, not before. A key
    that continues the time prevents it.
    """
    text = (
        "listen: [/run/b.sock]\nclients:\n"
        "  a: {keys: [{key: k, not_after: 2026-06-10}]}\n"
        "  b: {keys: [{key: l, not_after: 2026-06-10}, {key: m, not_before: 2026-06-09}]}\n"
        "  c: {keys: [{key: n, not_after: 2026-07-01}]}\n"
    )

    (warning,) = lint_warnings(load_text(text, "f"), NOW)
    assert warning == (
        "f:3: client 'a' can't connect after 2026-06-10T00:00:00+00:00: its last key expires then "
        "(give it a key that begins before)"
    )
    assert lint_warnings(load_text(text + "limits: {expiry_warning: 1d}\n", "f"), NOW) == []
    assert len(lint_warnings(load_text(text + "limits: {expiry_warning: 60d}\n", "f"), NOW)) == 2
