"""Every fault of a connection happens to plain connections and to connections over TLS."""

from __future__ import annotations

import pytest
from support.outages.transports import Transport, tls_transport


@pytest.fixture(scope="session")
def over_tls(tmp_path_factory: pytest.TempPathFactory) -> Transport:
    """TLS, with one CA for all tests."""
    return tls_transport(tmp_path_factory.mktemp("ca"))


@pytest.fixture(params=["plain", "tls"])
def transport(request: pytest.FixtureRequest, over_tls: Transport) -> Transport:
    """The connections of the clients: plain or TLS."""
    return over_tls if request.param == "tls" else Transport()
