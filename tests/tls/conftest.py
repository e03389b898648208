"""One certificate and one context for all tests of TLS."""

from __future__ import annotations

import ssl

import pytest
from support.tls.authority import Authority, Issued


@pytest.fixture(scope="session")
def server(authority: Authority) -> Issued:
    """The listener's certificate, for this machine."""
    return authority.issue("server")


@pytest.fixture
def trusting(authority: Authority) -> ssl.SSLContext:
    """A client's context that trusts the CA."""
    return authority.context()
