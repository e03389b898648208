"""Every scenario of both client faces through a real daemon, once more over TLS."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from typing import Any

import pytest
from client.broker.test_with_daemon import *  # noqa: F403 - whatever scenarios there are
from client.broker.test_with_daemon import ENTRIES, FACES, LIMITS
from support.client_faces import Face
from support.tls.authority import Issued

from brokerd.testing import RunningBroker, running


@pytest.fixture
def broker(server: Issued) -> Iterator[RunningBroker]:
    """The broker of the scenarios, listening with TLS."""
    with running(ENTRIES, limits=LIMITS, tls=server.entry()) as broker:
        assert broker.address.startswith("tls://")
        yield broker


@pytest.fixture(params=FACES, ids=["blocking", "asyncio", "uvloop"])
def face(request: pytest.FixtureRequest, trusting: ssl.SSLContext) -> Iterator[Face]:
    """One kind of client, which is given a context wherever the address asks for one."""
    face: Face = request.param()
    connect = face.connect

    def connect_over_tls(address: Any = None, *args: Any, **options: Any) -> Any:
        if str(address).startswith("tls://"):
            options.setdefault("ssl", trusting)
        return connect(address, *args, **options)

    face.connect = connect_over_tls  # type: ignore[method-assign]
    yield face
    face.close()
