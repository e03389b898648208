"""One crowded broker for all tests that leave it unchanged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.lag.crowded_broker import CONNECTED, Crowded, crowded, large_config


@pytest.fixture(scope="package")
def shared_broker() -> Iterator[Crowded]:
    """A broker with 10,000 clients, most of them connected."""
    with crowded(large_config()) as broker:
        broker.fill(CONNECTED)
        yield broker


@pytest.fixture
def broker(shared_broker: Crowded) -> Crowded:
    """The shared broker, idle and with an empty meter."""
    shared_broker.idle()
    shared_broker.meter.reset()
    return shared_broker
