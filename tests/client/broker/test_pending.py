"""The table of pending calls, and the order of their deadlines."""

from __future__ import annotations

import random

import pytest
from support.seeds import random_seeds

from brokerd_client.protocol.pending import Pending, PendingTable, Purpose


@pytest.mark.parametrize("seed", random_seeds(5))
def test_pending_table_of_any_calls_knows_earliest_deadline(seed: int) -> None:
    """Calls begin with deadlines in any order or without one, and end at any time."""
    rng = random.Random(seed)
    table = PendingTable()
    for message_id in range(2000):
        deadline = rng.choice((None, rng.random(), message_id / 1000))
        table.add(Pending(message_id, Purpose.REQUEST, "bob", 0, None, deadline))
        while len(table) > 30 or (table and rng.random() < 0.3):
            del table[rng.choice(list(table))]
        if rng.random() < 0.3:
            deadlines = [call.deadline for call in table.values() if call.deadline is not None]
            assert table.deadline() == min(deadlines, default=None)
        if rng.random() < 0.05:
            now = rng.random()
            due = {
                call.id
                for call in table.values()
                if call.deadline is not None and call.deadline <= now
            }
            overdue = table.overdue(now)
            assert {call.id for call in overdue} == due
            assert overdue == sorted(overdue, key=lambda call: call.deadline or 0)
            assert not due & set(table)
    assert len(table._deadlines) < 200
