"""One crowded broker for all tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.lag.crowded_broker import CONNECTED, Crowded, crowded, large_config


@pytest.fixture(scope="package")
def everyday() -> Iterator[Crowded]:
    """A broker with 10,000 clients, most of them connected."""
    with crowded(large_config()) as broker:
        broker.fill(CONNECTED)
        yield broker


@pytest.fixture
def broker(everyday: Crowded) -> Crowded:
    """The same, with nothing measured yet and nothing left to be done."""
    everyday.idle()
    everyday.meter.reset()
    return everyday
