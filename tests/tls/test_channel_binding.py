"""Keys bound to the TLS channel: no relay can use the client's proof, whatever
certificate the relay has.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.client_faces import Asyncio, Blocking, Face
from support.keys import key_of
from support.raw_client import Rejected
from support.running_daemon import RunningDaemon, configuration, running_daemon
from support.tls.authority import Authority, Issued
from support.tls.raw_client import tls_login
from support.tls.relay import Relay, read_frame

from brokerd_client.errors import AuthenticationError, BrokerdError
from brokerd_client.wire.channel_binding import END_POINT, offer
from brokerd_client.wire.handshake import Proof, Receive, as_listener


@pytest.fixture
def broker(server: Issued) -> Iterator[RunningDaemon]:
    """A broker with a TLS listener and a plain one."""
    listen = [{"address": "127.0.0.1:0", "tls": server.entry()}, "127.0.0.1:0"]
    with running_daemon(configuration(listen)) as broker:
        yield broker


@pytest.fixture(params=[Blocking, Asyncio])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    face: Face = request.param()
    yield face
    face.close()


def refusal(broker: RunningDaemon) -> str:
    return str(broker.log.wait("client.refused")[0].fields["reason"])


def test_channel_binding_of_library_client_is_logged(
    broker: RunningDaemon, face: Face, trusting: ssl.SSLContext
) -> None:
    """The broker's log has the TLS version and what the key is bound to."""
    face.connect(str(broker.address), "alice", key_of("alice"), ssl=trusting)

    fields = broker.log.wait("client.connected")[0].fields
    assert (fields["tls"], fields["bound_to"]) == ("TLSv1.3", END_POINT)


def test_channel_binding_key_without_name_is_found(
    broker: RunningDaemon, face: Face, trusting: ssl.SSLContext
) -> None:
    """A client that does not give its name is found by its bound key."""
    assert face.connect(str(broker.address), key=key_of("bob"), ssl=trusting).name == "bob"


def test_channel_binding_relay_with_listener_certificate_succeeds(
    broker: RunningDaemon, face: Face, server: Issued, trusting: ssl.SSLContext
) -> None:
    """This relay passes everything on unchanged. With the listener's own certificate
    the handshake succeeds.
    """
    with Relay(broker.address, server, trusting) as relay:
        # The relay ends after the handshake, so that the reply to whoami never comes.
        with pytest.raises(BrokerdError):
            face.connect(relay.address, "alice", key_of("alice"), ssl=trusting, reconnect=False)
        broker.log.wait("client.connected")


def test_channel_binding_relay_with_another_certificate_is_rejected(
    broker: RunningDaemon, face: Face, authority: Authority, trusting: ssl.SSLContext
) -> None:
    """The client trusts the relay's certificate, but the broker rejects the relay."""
    rejected = pytest.raises(AuthenticationError, match="rejected our answer")
    with Relay(broker.address, authority.issue("middle"), trusting) as relay, rejected:
        face.connect(relay.address, "alice", key_of("alice"), ssl=trusting)
    assert refusal(broker) == "wrong key for the given name"
    assert broker.log.named("client.connected") == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda body: body.partition(b"\0tls")[0], "wrong key"),
        (
            lambda body: body.replace(b"tls-server-end-point", b"tls-exporter"),
            "bound to a TLS channel",
        ),
        (lambda body: body.replace(b"tls-server-end-point", b"tls-unheard-of"), "not known here"),
    ],
    ids=["stripped", "another kind", "unknown kind"],
)
def test_channel_binding_answer_without_its_mark_is_rejected(
    broker: RunningDaemon,
    face: Face,
    authority: Authority,
    trusting: ssl.SSLContext,
    answer: Callable[[bytes], bytes],
    reason: str,
) -> None:
    """An answer made with a bound key is invalid without its mark, and with another
    mark.
    """
    relay = Relay(broker.address, authority.issue("middle"), trusting, answer=answer)
    with relay, pytest.raises(AuthenticationError):
        face.connect(relay.address, "alice", key_of("alice"), ssl=trusting)
    assert reason in refusal(broker)


def test_channel_binding_challenge_without_offer_is_not_answered(
    broker: RunningDaemon, face: Face, server: Issued, trusting: ssl.SSLContext
) -> None:
    """This holds even with the listener's own certificate."""

    def strip(challenge: bytes) -> bytes:
        assert challenge.endswith(b"\0tls-server-end-point 2")
        return challenge.removesuffix(b"\0tls-server-end-point 2")

    refused = pytest.raises(AuthenticationError, match="version 2")
    with Relay(broker.address, server, trusting, alter=strip) as relay, refused:
        face.connect(relay.address, "alice", key_of("alice"), ssl=trusting)


def test_channel_binding_challenge_with_altered_offer_is_rejected(
    broker: RunningDaemon, face: Face, server: Issued, trusting: ssl.SSLContext
) -> None:
    """Even with the listener's own certificate, a change of the offer in the challenge
    makes the answer invalid.
    """

    def alter(challenge: bytes) -> bytes:
        return challenge.replace(b"tls-server-end-point", b"tls-unheard-of")

    with (
        Relay(broker.address, server, trusting, alter=alter) as relay,
        pytest.raises(AuthenticationError),
    ):
        face.connect(relay.address, "alice", key_of("alice"), ssl=trusting)
    assert refusal(broker) == "wrong key for the given name"


def test_channel_binding_relay_to_plain_listener_is_rejected(
    broker: RunningDaemon, face: Face, authority: Authority, trusting: ssl.SSLContext
) -> None:
    """A plain listener of the same broker offers no binding. That does not make the
    client use its bare key.
    """
    for alter in (bytes, lambda challenge: challenge + b"\0tls-server-end-point 2"):
        relay = Relay(broker.addresses[1], authority.issue("middle"), None, alter=alter)
        with relay, pytest.raises(AuthenticationError):
            face.connect(relay.address, "alice", key_of("alice"), ssl=trusting)
    assert "but this connection has none" in refusal(broker)


def test_channel_binding_broker_with_bare_key_is_rejected_by_client(
    face: Face, server: Issued, trusting: ssl.SSLContext
) -> None:
    """A listener that knows the key and does not bind it is refused, because a relay
    could stand in front of it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.certificate, server.key)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(20)

    def pretend() -> None:
        sock, _ = listener.accept()
        sock.settimeout(20)
        with context.wrap_socket(sock, server_side=True) as peer:
            steps = as_listener(bytes(40) + offer([END_POINT]), named=True)
            step: Any = next(steps)
            while True:
                # It accepts every answer of the client, and then answers with the bare
                # key itself.
                if isinstance(step, Proof):
                    step = steps.send(b"the key")
                elif isinstance(step, Receive):
                    try:
                        body = read_frame(peer)
                    except EOFError:
                        return
                    if body == b"#FAILURE#":
                        return
                    step = steps.send(body)
                else:
                    peer.sendall(len(step.body).to_bytes(4, "big") + step.body)
                    step = steps.send(None)

    thread = threading.Thread(target=pretend)
    thread.start()
    try:
        port = listener.getsockname()[1]
        with pytest.raises(AuthenticationError, match="not accepted here"):
            face.connect(f"tls://127.0.0.1:{port}", "alice", "the key", ssl=trusting)
    finally:
        thread.join(20)
        listener.close()
    assert not thread.is_alive()


def test_channel_binding_missing_is_accepted_by_default(
    broker: RunningDaemon, trusting: ssl.SSLContext
) -> None:
    """Stock Python behind a TLS proxy can connect with its bare key, unless that is
    forbidden.
    """
    with tls_login(broker.address, trusting, "alice") as alice:
        assert alice.ask("whoami").json["name"] == "alice"
    assert broker.log.wait("client.connected")[0].fields["bound_to"] == "nothing"


@pytest.mark.parametrize("by", ["listener", "client"])
def test_channel_binding_required_rejects_client_without_it(
    by: str, server: Issued, face: Face, trusting: ssl.SSLContext
) -> None:
    """With `channel_binding: required` a client that does not bind is rejected, and one
    that does is accepted.
    """
    need = {"channel_binding": "required"}
    tls = server.entry(**(need if by == "listener" else {}))
    clients = {"alice": need if by == "client" else {}}
    with running_daemon(
        configuration([{"address": "127.0.0.1:0", "tls": tls}, "127.0.0.1:0"], clients)
    ) as broker:
        with pytest.raises(Rejected):
            tls_login(broker.address, trusting, "alice")
        assert "channel_binding: required" in refusal(broker)
        face.connect(str(broker.address), "alice", key_of("alice"), ssl=trusting)
        if by == "client":
            with pytest.raises(AuthenticationError):
                face.connect(str(broker.addresses[1]), "alice", key_of("alice"))
            reason = broker.log.wait("client.refused", 2)[1].fields["reason"]
            assert "connection is not over TLS" in reason
