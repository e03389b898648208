"""Counters continue in another process, and values that it can't have counted are
refused.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from brokerd.core.snapshot_check import BadSnapshot
from brokerd.net.counters import Counters, HandshakeOutcome


def test_counters_of_another_process_are_added() -> None:
    """The counters arrive as plain values that JSON carries. What the new process has
    counted meanwhile stays.
    """
    one, other = Counters(pauses=2, bugs=1), Counters(pauses=3)
    one.handshakes[HandshakeOutcome.REJECTED] = 7
    other.handshakes[HandshakeOutcome.REJECTED] = 1
    other.go_on_from(json.loads(json.dumps(one.values())))
    assert (other.handshakes[HandshakeOutcome.REJECTED], other.pauses, other.bugs) == (8, 5, 1)


def test_counters_of_another_version_with_other_outcomes_are_accepted() -> None:
    """Unknown outcomes are ignored, and missing ones count as 0."""
    counters = Counters()
    counters.go_on_from({})
    counters.go_on_from(
        {"handshakes": {"accepted": 4, "by_owl": 3}, "others": {"bugs": 2, "owls": 1}, "more": {}}
    )
    assert counters.values() == {
        "handshakes": dict.fromkeys((each.value for each in HandshakeOutcome), 0) | {"accepted": 4},
        "others": {"pauses": 0, "bugs": 2},
    }


@pytest.mark.parametrize(
    "values",
    [
        {"handshakes": {"accepted": -1}},
        {"handshakes": {"accepted": 1.5}},
        {"handshakes": {"accepted": True}},
        {"handshakes": [1]},
        {"others": {"bugs": "1"}},
        {"others": {"pauses": 2**80}},
        [],
    ],
)
def test_counters_invalid_values_are_refused(values: Any) -> None:
    """The old process then continues to serve."""
    counters = Counters()
    with pytest.raises(BadSnapshot, match="tally"):
        counters.go_on_from(values)
    assert counters == Counters()
