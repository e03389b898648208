"""A broker for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from brokerd.testing import RunningBroker, running


@pytest.fixture
def broker() -> Iterator[RunningBroker]:
    """A broker with the clients alice, bob and carol."""
    with running({"alice": {}, "bob": {}, "carol": {}}) as broker:
        yield broker
