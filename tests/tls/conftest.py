"""Makes the helpers importable, and one CA for all tests of TLS: making certificates
takes its time.
"""

from __future__ import annotations

import ssl

import pytest
from support.tls.authority import Authority, Issued


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The CA that everybody trusts."""
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="session")
def server(authority: Authority) -> Issued:
    """The listener's certificate, for this machine."""
    return authority.issue("server")


@pytest.fixture
def trusting(authority: Authority) -> ssl.SSLContext:
    """A client's context that trusts the CA."""
    return authority.context()
