"""How many bytes are held, however items are taken."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from brokerd_client.protocol.inbox import Inbox, InboxMeter


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 100), st.integers(0, 6)), max_size=30))
def test_held_bytes_are_those_of_batches_not_taken_whole(steps: list[tuple[int, int, int]]) -> None:
    """After settling, exactly the batches that still have an item in the queue are
    counted.
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
        # Taking down to the mark frees something.
        if inbox.items:
            assert 0 <= inbox.mark < len(inbox.items)
    inbox.clear()
    assert (meter.held, inbox.mark) == (0, -1)


def test_full_above_the_limit_of_all_inboxes_together() -> None:
    """The limit is the client's, not each inbox's; taking frees it again."""
    meter = InboxMeter(10)
    one: Inbox[int] = Inbox(meter)
    two: Inbox[int] = Inbox(meter)
    one.put([1], 6)
    assert not meter.weigh((one, two), limit=10)
    two.put([2], 6)
    assert meter.weigh((one, two), limit=10)
    assert meter.full
    one.items.popleft()
    assert not meter.weigh((one, two), limit=10)
    assert meter.held == 6


def test_released_inbox_counts_nothing_more_and_keeps_its_items() -> None:
    """What is left, taken or not yet settled, is uncounted once; what is put later is
    not counted.
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
