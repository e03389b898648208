"""Both clients at a port of another protocol's server: the error names the protocol."""

from __future__ import annotations

import ssl
from collections.abc import Iterator

import pytest
from support.client_faces import Asyncio, Blocking, Face
from support.wrong_ports import SPEECHES, speaking

from brokerd_client.errors import AuthenticationError, TimedOut, TlsError


@pytest.fixture(params=[Blocking, Asyncio])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    face: Face = request.param()
    yield face
    face.close()


@pytest.mark.parametrize(("speech", "name"), SPEECHES)
def test_connect_to_wrong_port_names_protocol(face: Face, speech: bytes, name: str) -> None:
    """The first bytes of a server of another protocol are recognised."""
    with (
        speaking(speech) as (host, port),
        pytest.raises(AuthenticationError, match=f"the peer speaks {name}"),
    ):
        face.connect(f"{host}:{port}", "alice", b"key", timeout=10)


@pytest.mark.parametrize(
    ("speech", "name"), [(speech, name) for speech, name in SPEECHES if name != "TLS"]
)
def test_connect_tls_to_wrong_port_names_protocol(face: Face, speech: bytes, name: str) -> None:
    """A server that answers a TLS handshake in its own protocol is recognised too."""
    context = ssl.create_default_context()
    with (
        speaking(speech, len(speech)) as (host, port),
        pytest.raises(TlsError, match=f"the peer speaks {name}"),
    ):
        face.connect(f"tls://{host}:{port}", "alice", b"key", ssl=context, timeout=10)


def test_connect_to_silent_port_reports_no_challenge(face: Face) -> None:
    """Servers of HTTP, TLS and Redis wait for the client's first message. A listener
    without keys waits for one too.
    """
    with speaking(b"") as (host, port), pytest.raises(TimedOut, match="no challenge came"):
        face.connect(f"{host}:{port}", "alice", b"key", timeout=0.3)
