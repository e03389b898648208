"""The bound on TLS records that carry no payload."""

from __future__ import annotations

import pytest

from brokerd_client.errors import TlsError
from brokerd_client.tls.budget import MOST_EMPTY, RecordBudget

MOST = 32 * 1024


def test_record_budget_read_size_is_small_before_first_payload() -> None:
    """The first reads are small. Reads are large once most of the bytes are payload."""
    budget = RecordBudget()
    assert budget.read_size(100, MOST) == 200
    assert budget.read_size(MOST, MOST) == 4096

    budget.charge(payload=900, received=1000)

    assert budget.read_size(100, MOST) == MOST


def test_record_budget_read_size_is_small_after_record_with_little_payload() -> None:
    """More than a record with less than a fifth of payload makes the reads small again."""
    budget = RecordBudget()
    budget.charge(payload=900, received=1000)
    budget.charge(payload=1, received=1000)
    assert budget.read_size(MOST, MOST) == MOST

    budget.charge(payload=1, received=20_000)

    assert budget.read_size(MOST, MOST) == 4096


@pytest.mark.parametrize("most", [20 * 1024, MOST_EMPTY])
def test_record_budget_too_many_empty_bytes_raise(most: int) -> None:
    """Empty bytes add up until payload comes."""
    budget = RecordBudget(most)
    budget.charge(0, most)
    budget.charge(1, 1000)
    budget.charge(0, most)

    with pytest.raises(TlsError, match="with nothing in them"):
        budget.charge(0, 1)
