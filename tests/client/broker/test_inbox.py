"""The inbox and its meter: the bytes held, in whatever order items are taken."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from brokerd_client.protocol.inbox import Inbox, InboxMeter


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 100), st.integers(0, 6)), max_size=30))
def test_inbox_meter_settled_counts_batches_with_items_left(
    steps: list[tuple[int, int, int]],
) -> None:
    """After settling, the meter counts exactly the batches that still have an item in
    the queue.
    """
    meter = InboxMeter(10)
    inbox: Inbox[tuple[int, int]] = Inbox(meter)
    sizes = {}
    for number, (count, size, taken) in enumerate(steps):
        sizes[number] = size
        inbox.put([(number, index) for index in range(count)], size)
        for _ in range(min(taken, len(inbox.items))):
            inbox.items.popleft()
        inbox.settle()
        left = {effects for effects, _ in inbox.items}
        assert meter.held == sum(sizes[effects] for effects in left)
        # Taking the items down to the mark releases at least one batch.
        if inbox.items:
            assert 0 <= inbox.mark < len(inbox.items)
    inbox.clear()
    assert (meter.held, inbox.mark) == (0, -1)


def test_inbox_meter_sum_above_limit_is_full() -> None:
    """The limit holds for all inboxes of a client together. Taking an item makes room
    again.
    """
    meter = InboxMeter(10)
    first: Inbox[int] = Inbox(meter)
    second: Inbox[int] = Inbox(meter)
    first.put([1], 6)
    assert not meter.weigh((first, second), limit=10)
    second.put([2], 6)
    assert meter.weigh((first, second), limit=10)
    assert meter.full
    first.items.popleft()
    assert not meter.weigh((first, second), limit=10)
    assert meter.held == 6


def test_inbox_released_counts_nothing_and_keeps_items() -> None:
    """Items that are left, taken or not yet settled, are uncounted once. Later items
    are not counted.
    """
    meter = InboxMeter(100)
    other: Inbox[int] = Inbox(meter)
    other.put([0], 7)
    inbox: Inbox[int] = Inbox(meter)
    inbox.put([1, 2], 50)
    inbox.put([3], 30)
    inbox.items.popleft()
    inbox.release()
    assert meter.held == 7
    inbox.put([4], 1000)
    inbox.settle()
    assert meter.held == 7
    inbox.release()
    assert inbox.take_all() == [2, 3, 4]
    assert meter.held == 7
