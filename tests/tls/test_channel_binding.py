"""Keys bound to the TLS channel: nobody in the middle can use what the client proves,
whatever certificate he has.
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
def here(server: Issued) -> Iterator[RunningDaemon]:
    """A broker with a TLS listener and, beside it, a plain one."""
    listen = [{"address": "127.0.0.1:0", "tls": server.entry()}, "127.0.0.1:0"]
    with running_daemon(configuration(listen)) as here:
        yield here


@pytest.fixture(params=[Blocking, Asyncio])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    face: Face = request.param()
    yield face
    face.close()


def refusal(here: RunningDaemon) -> str:
    return str(here.log.wait("client.refused")[0].fields["reason"])


def test_library_binds_its_key(here: RunningDaemon, face: Face, trusting: ssl.SSLContext) -> None:
    """The broker's log says what version is spoken and what the key is bound to."""
    face.connect(str(here.address), "alice", key_of("alice"), ssl=trusting)

    fields = here.log.wait("client.connected")[0].fields
    assert (fields["tls"], fields["bound_to"]) == ("TLSv1.3", END_POINT)


def test_key_alone_is_found_when_it_is_bound(
    here: RunningDaemon, face: Face, trusting: ssl.SSLContext
) -> None:
    """A client that does not say its name is found by its bound key."""
    assert face.connect(str(here.address), key=key_of("bob"), ssl=trusting).name == "bob"


def test_relay_with_the_listener_s_own_certificate_is_a_mere_pipe(
    here: RunningDaemon, face: Face, server: Issued, trusting: ssl.SSLContext
) -> None:
    """The relay of these tests passes everything on rightly: with the same certificate
    the handshake succeeds.
    """
    with Relay(here.address, server, trusting) as relay:
        # It ends after the handshake, so that the introduction never comes.
        with pytest.raises(BrokerdError):
            face.connect(relay.address, "alice", key_of("alice"), ssl=trusting, reconnect=False)
        here.log.wait("client.connected")


def test_relay_with_another_certificate_fails(
    here: RunningDaemon, face: Face, authority: Authority, trusting: ssl.SSLContext
) -> None:
    """Though the client trusts the certificate of who is in the middle, the broker
    turns him away.
    """
    rejected = pytest.raises(AuthenticationError, match="rejected our answer")
    with Relay(here.address, authority.issue("middle"), trusting) as relay, rejected:
        face.connect(relay.address, "alice", key_of("alice"), ssl=trusting)
    assert refusal(here) == "wrong key for the given name"
    assert here.log.named("client.connected") == []


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
def test_mark_can_t_be_stripped_or_changed(
    here: RunningDaemon,
    face: Face,
    authority: Authority,
    trusting: ssl.SSLContext,
    answer: Callable[[bytes], bytes],
    reason: str,
) -> None:
    """An answer made with a bound key is good for nothing without its mark, or with
    another.
    """
    relay = Relay(here.address, authority.issue("middle"), trusting, answer=answer)
    with relay, pytest.raises(AuthenticationError):
        face.connect(relay.address, "alice", key_of("alice"), ssl=trusting)
    assert reason in refusal(here)


def test_offer_can_t_be_stripped(
    here: RunningDaemon, face: Face, server: Issued, trusting: ssl.SSLContext
) -> None:
    """Even with the listener's own certificate, a challenge without its offer is not
    answered.
    """

    def strip(challenge: bytes) -> bytes:
        assert challenge.endswith(b"\0tls-server-end-point 2")
        return challenge.removesuffix(b"\0tls-server-end-point 2")

    refused = pytest.raises(AuthenticationError, match="version 2")
    with Relay(here.address, server, trusting, alter=strip) as relay, refused:
        face.connect(relay.address, "alice", key_of("alice"), ssl=trusting)


def test_offer_can_t_be_altered(
    here: RunningDaemon, face: Face, server: Issued, trusting: ssl.SSLContext
) -> None:
    """Even with the listener's own certificate, a change of the offer in the challenge
    spoils the answer.
    """

    def alter(challenge: bytes) -> bytes:
        return challenge.replace(b"tls-server-end-point", b"tls-unheard-of")

    with (
        Relay(here.address, server, trusting, alter=alter) as relay,
        pytest.raises(AuthenticationError),
    ):
        face.connect(relay.address, "alice", key_of("alice"), ssl=trusting)
    assert refusal(here) == "wrong key for the given name"


def test_relay_to_a_plain_listener_fails(
    here: RunningDaemon, face: Face, authority: Authority, trusting: ssl.SSLContext
) -> None:
    """That a plain listener of the same broker offers nothing to bind to does not make
    the client show a bare key.
    """
    for alter in (bytes, lambda challenge: challenge + b"\0tls-server-end-point 2"):
        relay = Relay(here.addresses[1], authority.issue("middle"), None, alter=alter)
        with relay, pytest.raises(AuthenticationError):
            face.connect(relay.address, "alice", key_of("alice"), ssl=trusting)
    assert "but this connection has none" in refusal(here)


def test_client_accepts_no_broker_that_proves_the_bare_key(
    face: Face, server: Issued, trusting: ssl.SSLContext
) -> None:
    """A listener that knows the key and does not bind it is refused: it would be one
    that somebody is in front of.
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
                # It welcomes whatever the client answers, and then answers with the
                # bare key itself.
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


def test_client_without_binding_is_let_in(here: RunningDaemon, trusting: ssl.SSLContext) -> None:
    """Stock Python behind a program that adds TLS can still connect, with its bare key,
    unless that is forbidden.
    """
    with tls_login(here.address, trusting, "alice") as alice:
        assert alice.ask("whoami").json["name"] == "alice"
    assert here.log.wait("client.connected")[0].fields["bound_to"] == "nothing"


@pytest.mark.parametrize("by", ["listener", "client"])
def test_binding_can_be_demanded(
    by: str, server: Issued, face: Face, trusting: ssl.SSLContext
) -> None:
    """With channel_binding: required a client that does not bind is turned away, and
    one that does comes in.
    """
    need = {"channel_binding": "required"}
    tls = server.entry(**(need if by == "listener" else {}))
    clients = {"alice": need if by == "client" else {}}
    with running_daemon(
        configuration([{"address": "127.0.0.1:0", "tls": tls}, "127.0.0.1:0"], clients)
    ) as here:
        with pytest.raises(Rejected):
            tls_login(here.address, trusting, "alice")
        assert "channel_binding: required" in refusal(here)
        face.connect(str(here.address), "alice", key_of("alice"), ssl=trusting)
        if by == "client":
            with pytest.raises(AuthenticationError):
                face.connect(str(here.addresses[1]), "alice", key_of("alice"))
            reason = here.log.wait("client.refused", 2)[1].fields["reason"]
            assert "connection is not over TLS" in reason
