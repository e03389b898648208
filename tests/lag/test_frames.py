"""No frame blocks the event loop: every kind of frame, to every kind of queue, full of
the shortest frames.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
from support.lag.crowded_broker import QUEUES, Crowded, queue_of
from support.raw_client import EVENT, JSON, packed

from brokerd.config.values import WhenFull
from brokerd.core.outbox import FrameOutbox, Outbox, Queued
from brokerd.core.session import Session
from brokerd_client.wire.envelope import Kind

#: Frames of each kind that are sent to a full queue.
SENT = 1000
TOPIC = b"\x03t.x"
#: What is sent of each kind: to a recipient, the n-th.
FRAMES: dict[int, Callable[[str, int], bytes]] = {
    Kind.MESSAGE: lambda to, number: packed(Kind.MESSAGE, to, message_id=number, flags=number % 2),
    Kind.REQUEST: lambda to, number: packed(Kind.REQUEST, to, message_id=number),
    Kind.REPLY: lambda to, number: packed(Kind.REPLY, to, message_id=number),
    Kind.ERROR: lambda to, number: packed(Kind.ERROR, to, b"{}", message_id=number, codec=JSON),
    Kind.EVENT: lambda to, number: packed(EVENT, "", between=TOPIC, message_id=number),
    Kind.RECEIPT: lambda to, number: packed(Kind.RECEIPT, to, message_id=number),
    Kind.ACK: lambda to, number: packed(Kind.ACK, to, message_id=number),
}
#: Kinds that answer a request of the recipient's.
ANSWERS = (Kind.REPLY, Kind.ERROR)


def fill_outbox(outbox: Outbox, kept: bool, most: int) -> None:
    """Fill a queue to its limit with the shortest messages.

    Args:
        kept: Whether the frames are never dropped.
        most: The greatest number of frames.
    """
    frame = packed(Kind.MESSAGE, "sender")
    for _ in range(most):
        if not outbox.reserve(len(frame)):
            return
        if isinstance(outbox, FrameOutbox):
            outbox.put(Queued(frame, kept=kept))
        else:
            outbox.append(frame)
    # The rest in one piece.
    outbox.append(
        packed(Kind.MESSAGE, "sender", bytes(max(outbox.limit - outbox.waiting - len(frame), 0)))
    )


@contextlib.contextmanager
def recipient_not_reading(
    broker: Crowded, name: str, requests: int, to: str, *, kept: bool, most: int
) -> Iterator[Session]:
    """Log in a recipient that sends ``requests`` requests to a sender and then reads
    nothing; its queue is full then.
    """
    with broker.login(name) as recipient:
        address = recipient.ask("whoami").json["address"]
        recipient.ask("subscribe", topic="t.>")
        recipient.write(
            b"".join(packed(Kind.REQUEST, to, message_id=number) for number in range(requests))
        )
        session = broker.session(address)
        broker.wait_until_routed(session)

        def fill() -> None:
            # The kernel's buffers take some bytes; the first that they do not take blocks the
            # outbox.
            while not session.outbox.blocked:
                for _ in range(1000):
                    session.outbox.append(packed(Kind.MESSAGE, "sender", bytes(1000)))
                broker.daemon.broker.replies.touch(session)
                broker.daemon.server.settle()
            fill_outbox(session.outbox, kept, most)

        broker.call(fill)
        yield session


def test_frame_kinds_all_have_a_case() -> None:
    """A new kind of frame must be measured too. OPEN and JOIN only begin a connection."""
    assert set(FRAMES) == set(Kind) - {Kind.OPEN, Kind.JOIN}


@pytest.mark.parametrize(
    "most",
    [
        pytest.param(2_000, id="some"),
        pytest.param(500_000, id="as many as fit", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("when_full", "pool", "kept"),
    [
        pytest.param(
            when_full,
            pool,
            kept,
            id=f"{queue_of(when_full, pool)}{'-kept' * kept}",
            # These differ only where something is dropped.
            marks=[pytest.mark.slow] if kept and when_full is not WhenFull.DROP_OLDEST else [],
        )
        for when_full, pool in QUEUES
        for kept in (False, True)
        if not kept or pool or when_full is WhenFull.DROP_OLDEST
    ],
)
def test_event_loop_with_frames_to_full_queue_stays_responsive(
    broker: Crowded, when_full: WhenFull, pool: bool, kept: bool, most: int
) -> None:
    """Frames of every kind, and then the end of the recipient with its full queue."""
    name = queue_of(when_full, pool)
    for kind, make in FRAMES.items():
        if most > SENT * 10 and kind not in (Kind.MESSAGE, Kind.REPLY, Kind.EVENT):
            # Returning so many frames takes too long for every kind.
            continue
        print(f"\n{Kind(kind).name} to {name}")
        with broker.login("crowd") as sender:
            source = broker.session(sender.ask("whoami").json["address"])
            requests = SENT if kind in ANSWERS else 0
            with recipient_not_reading(
                broker, name, requests, source.address, kept=kept, most=most
            ) as target:
                broker.meter.reset()
                sender.write(b"".join(make(target.address, number) for number in range(SENT)))
                broker.wait_until_routed(source)
                broker.meter.check()
            broker.until(lambda: not target.open)
        broker.until(lambda: not source.open)  # noqa: B023 - called at once
        broker.idle()
        broker.meter.check()
