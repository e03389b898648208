"""Rates: how much a client may send per second."""

from __future__ import annotations

from support.fake_network import FakeNet, client, error_of

from brokerd.config.values import RateConfig
from brokerd.core.rate import Meter


def meter(messages: float | None = None, size: float | None = None) -> Meter:
    """Return a meter with these rates."""
    metered = Meter.for_rate(RateConfig(messages, size))
    assert metered is not None
    return metered


def test_rate_without_limits_has_no_meter() -> None:
    """A client without a rate is not metered at all."""
    assert Meter.for_rate(RateConfig(None, None)) is None


def test_rate_allows_messages_of_one_second_at_once() -> None:
    """As many messages as a second allows pass together; then one for each part of a
    second that has passed.
    """
    metered = meter(messages=4)
    assert [metered.allows(1, 10.0) for _ in range(5)] == [True] * 4 + [False]
    assert metered.allows(1, 10.25)
    assert not metered.allows(1, 10.25)
    assert [metered.allows(1, 100.0) for _ in range(5)] == [True] * 4 + [False]


def test_rate_clock_standing_still_or_going_back_allows_nothing() -> None:
    """Only time that has passed counts."""
    metered = meter(messages=1)
    assert metered.allows(1, 10.0)
    assert not metered.allows(1, 10.0)
    assert not metered.allows(1, 9.0)


def test_rate_message_larger_than_one_second_passes_when_unused() -> None:
    """A large message needs a full second's bytes to be left, and the bytes beyond are
    charged afterwards.
    """
    metered = meter(size=100)
    assert metered.allows(250, 10.0)
    assert not metered.allows(1, 11.0)
    assert not metered.allows(250, 11.5)
    assert metered.allows(1, 12.0)


def test_rate_message_refused_is_not_charged_to_other_rate() -> None:
    """A refused message costs nothing."""
    metered = meter(messages=1, size=100)
    assert metered.allows(60, 10.0)
    assert not metered.allows(10, 10.5)
    assert metered.allows(90, 11.0)


def test_rate_below_one_message_per_second_is_possible() -> None:
    """A rate below one allows a message when enough time has passed."""
    metered = meter(messages=0.5)
    assert metered.allows(1, 10.0)
    assert not metered.allows(1, 11.0)
    assert metered.allows(1, 12.0)


def test_rate_exceeded_is_reported_for_each_message() -> None:
    """Each message above the rate gets an ERROR, and none of them arrives; a pool
    shares its client's rate.
    """
    net = FakeNet(client("bob"), client("pool", connections=2, rate=RateConfig(2, None)))
    one, two, bob = net.connect("pool"), net.connect("pool"), net.connect("bob")
    one.message("bob", b"1", 1)
    two.message("bob", b"2", 2)
    one.message("bob", b"3", 3)
    two.publish("topic", b"4", 4)
    assert one.error() == (3, "rate_limited")
    assert two.error() == (4, "rate_limited")
    net.advance(1)
    one.message("bob", b"5", 5)
    assert bob.payloads() == [b"1", b"2", b"5"]
    assert one.take() == []


def test_rate_held_message_is_charged_once() -> None:
    """A held message was charged when it arrived, and is not charged again when it
    passes.
    """
    net = FakeNet(client("ann", rate=RateConfig(3, None)), client("bob", queue=50))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.block()
    ann.message("bob", b"x" * 20, 1)
    ann.message("bob", b"x" * 20, 2)
    assert ann.held
    bob.read()
    ann.message("bob", b"", 3)
    assert ann.take() == []
    ann.message("bob", b"", 4)
    assert ann.error() == (4, "rate_limited")


def test_rate_exceeded_is_reported_for_each_operation() -> None:
    """Operations count for the rate as messages do, and are not carried out above it."""
    net = FakeNet(client("ann", rate=RateConfig(2, None)))
    ann = net.connect("ann")
    for number in range(1, 4):
        ann.op("subscribe", number, topic=f"topic.{number}")
    *accepted, refused = ann.take()
    assert [answer.id for answer in accepted] == [1, 2]
    assert (refused.id, error_of(refused)) == (3, "rate_limited")
    assert len(ann.session.subscriptions) == 2
    net.advance(1)
    ann.op("ping", 4)
    assert [answer.id for answer in ann.take()] == [4]


def test_rate_of_bytes_sent_already_tells_how_long_their_debt_lasts() -> None:
    """A channel sends at once what a second allows, and then waits."""
    metered = meter(size=100)
    assert metered.burst == 100
    assert metered.charge(100, 10.0) == 0.0
    assert metered.charge(50, 10.0) == 0.5
    assert metered.charge(0, 10.5) == 0.0


def test_rate_without_bytes_leaves_no_debt() -> None:
    """A rate of messages alone does not limit bytes."""
    metered = meter(messages=1)
    assert metered.burst > 1 << 30
    assert metered.charge(1 << 20, 10.0) == 0.0
