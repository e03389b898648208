"""Every fault that has to do with connections happens to plain ones and to those over
TLS.
"""

from __future__ import annotations

import pytest
from support.outages.transports import Way, tls_way


@pytest.fixture(scope="session")
def over_tls(tmp_path_factory: pytest.TempPathFactory) -> Way:
    """TLS, with one CA for all."""
    return tls_way(tmp_path_factory.mktemp("ca"))


@pytest.fixture(params=["plain", "tls"])
def way(request: pytest.FixtureRequest, over_tls: Way) -> Way:
    """How the clients come."""
    return over_tls if request.param == "tls" else Way()
