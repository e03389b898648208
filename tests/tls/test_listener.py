"""A listener with TLS: which clients are accepted, what rejected ones are told, and the
effect on other clients.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.client_faces import PATIENCE, Asyncio, Blocking, Face
from support.keys import key_of
from support.raw_client import (
    CHALLENGE,
    ERROR,
    MESSAGE,
    RECEIPT,
    WANT_RECEIPT,
    Raw,
    Rejected,
    packed,
    prefixed,
)
from support.running_daemon import RunningDaemon, configuration, running_daemon
from support.tls.authority import Authority, Issued
from support.tls.raw_client import TlsRaw, tls_login

import brokerd_client
from brokerd.config.values import WhenConnected
from brokerd.net.connection.tls import TlsConnection
from brokerd.net.handshake import admission, undecided
from brokerd.net.handshake.tls import TlsHandshakes
from brokerd_client import aio, blocking
from brokerd_client.errors import AuthenticationError, BrokerdError, Disconnected, TlsError
from brokerd_client.protocol import dialog


@pytest.fixture(params=[Blocking, Asyncio])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    face: Face = request.param()
    yield face
    face.close()


@pytest.fixture
def broker(server: Issued) -> Iterator[RunningDaemon]:
    """A broker with one TLS listener."""
    with running_daemon(configuration({"address": "127.0.0.1:0", "tls": server.entry()})) as broker:
        yield broker


def refusal(broker: RunningDaemon, number: int = 0) -> str:
    return str(broker.log.wait("client.refused", number + 1)[number].fields["reason"])


# Certificates of clients


def demanding(server: Issued, authority: Authority, alice: dict[str, Any], **tls: Any) -> Any:
    entry = {"address": "127.0.0.1:0", "tls": server.entry(client_ca=authority.file, **tls)}
    return configuration(entry, {"alice": alice, "bob": {}})


def test_client_certificate_of_right_subject_is_accepted(
    face: Face, server: Issued, authority: Authority
) -> None:
    """A client with the key and certificate that its entry demands is accepted. The log
    has the certificate's subject.
    """
    shown = authority.issue("alice", "alice.example", common_name="alice")
    demanded = {"certificate": {"fingerprint": shown.fingerprint.upper()}}
    with running_daemon(demanding(server, authority, demanded)) as broker:
        face.connect(str(broker.address), "alice", key_of("alice"), ssl=authority.context(shown))
        subject = broker.log.wait("client.connected")[0].fields["subject"]
    assert "CN=alice" in subject

    with running_daemon(
        demanding(server, authority, {"certificate": {"subject": subject}})
    ) as broker:
        face.connect(str(broker.address), "alice", key_of("alice"), ssl=authority.context(shown))


def test_client_certificate_does_not_replace_key(
    face: Face, server: Issued, authority: Authority
) -> None:
    """The right certificate with a wrong key is rejected."""
    shown = authority.issue("alice", "alice.example", common_name="alice")
    with running_daemon(
        demanding(server, authority, {"certificate": {"fingerprint": shown.fingerprint}})
    ) as broker:
        with pytest.raises(AuthenticationError):
            face.connect(str(broker.address), "alice", "not the key", ssl=authority.context(shown))
        assert refusal(broker) == "wrong key for the given name"


@pytest.mark.parametrize("demanded", ["subject", "fingerprint"])
def test_client_certificate_other_than_demanded_is_rejected(
    demanded: str, face: Face, server: Issued, authority: Authority
) -> None:
    """A certificate of another client is rejected although the CA issued it. The log
    has its subject or fingerprint.
    """
    theirs = authority.issue("mallory", "mallory.example", common_name="mallory")
    mine = authority.issue("alice", "alice.example", common_name="alice")
    right = "CN=alice,O=x" if demanded == "subject" else mine.fingerprint
    with running_daemon(demanding(server, authority, {"certificate": {demanded: right}})) as broker:
        with pytest.raises(AuthenticationError):
            face.connect(
                str(broker.address), "alice", key_of("alice"), ssl=authority.context(theirs)
            )
        assert f"(certificate: {demanded})" in refusal(broker)
        assert ("CN=mallory" if demanded == "subject" else theirs.fingerprint) in refusal(broker)
        assert broker.log.named("client.refused")[0].fields["name"] == "alice"


def test_client_certificate_missing_is_rejected(
    face: Face, server: Issued, authority: Authority
) -> None:
    """Both sides say that a client's certificate is missing."""
    with running_daemon(demanding(server, authority, {})) as broker:
        with pytest.raises(TlsError, match="requires a client certificate"):
            face.connect(str(broker.address), "alice", key_of("alice"), ssl=authority.context())
        assert (
            "the client sent no certificate, and this listener requires one (client_ca)"
            in refusal(broker)
        )


def test_client_certificate_of_unknown_ca_is_rejected(
    face: Face, server: Issued, authority: Authority, tmp_path: Any
) -> None:
    """A certificate that client_ca did not issue is refused, and both sides say so."""
    stranger = Authority(tmp_path).issue("alice", "alice.example")
    with running_daemon(demanding(server, authority, {})) as broker:
        with pytest.raises(TlsError, match="does not accept our certificate"):
            face.connect(
                str(broker.address), "alice", key_of("alice"), ssl=authority.context(stranger)
            )
        assert "the client's certificate is not accepted" in refusal(broker)


def test_client_certificate_optional_is_needed_only_if_entry_demands_it(
    face: Face, server: Issued, authority: Authority
) -> None:
    """With `client_certificate: optional` only a client whose entry demands a
    certificate needs one.
    """
    shown = authority.issue("alice", "alice.example")
    alice = {"certificate": {"fingerprint": [shown.fingerprint, "0" * 64]}}
    with running_daemon(
        demanding(server, authority, alice, client_certificate="optional")
    ) as broker:
        face.connect(str(broker.address), "bob", key_of("bob"), ssl=authority.context())
        with pytest.raises(AuthenticationError):
            face.connect(str(broker.address), "alice", key_of("alice"), ssl=authority.context())
        assert "client shows no certificate, and its entry demands one" in refusal(broker)
        face.connect(str(broker.address), "alice", key_of("alice"), ssl=authority.context(shown))


def test_client_certificate_changed_by_reload_disconnects_client(
    server: Issued, authority: Authority
) -> None:
    """A reload that demands another certificate disconnects the client with the old one
    and gives the reason. Other clients stay.
    """
    shown = authority.issue("alice", "alice.example")
    context = authority.context(shown)
    with running_daemon(
        demanding(server, authority, {"certificate": {"fingerprint": shown.fingerprint}})
    ) as broker:
        url = str(broker.address)
        with (
            brokerd_client.connect(
                url, "alice", key_of("alice"), ssl=context, reconnect=False
            ) as alice,
            brokerd_client.connect(url, "bob", key_of("bob"), ssl=context, reconnect=False) as bob,
        ):
            changed = demanding(server, authority, {"certificate": {"fingerprint": "0" * 64}})
            broker.call(lambda: broker.daemon.apply(changed, "the test"))
            reason = broker.log.wait("client.disconnected")[0].fields["reason"]
            assert shown.fingerprint in reason
            with pytest.raises(Disconnected):
                alice.recv(PATIENCE)
            assert bob.ping() > 0


# Mismatch of protocol and version


def test_tls_listener_certificate_of_unknown_ca_is_reported_by_both_sides(
    broker: RunningDaemon, face: Face, tmp_path: Any
) -> None:
    """The client says that it can't verify the certificate, and what would help. The
    log says that it was not accepted.
    """
    with pytest.raises(TlsError, match=r"can't be verified.*cafile"):
        face.connect(
            str(broker.address), "alice", key_of("alice"), ssl=Authority(tmp_path).context()
        )
    assert "the client does not accept this listener's certificate" in refusal(broker)
    assert broker.log.named("client.refused")[0].fields["peer"].startswith("127.0.0.1:")


def test_tls_listener_certificate_of_another_host_is_rejected(
    face: Face, authority: Authority
) -> None:
    """The client's error names the host, and the broker's log has the refusal."""
    other = authority.issue("other", "other.example")
    with running_daemon(configuration({"address": "127.0.0.1:0", "tls": other.entry()})) as broker:
        with pytest.raises(TlsError, match=r"is for another host.*127\.0\.0\.1"):
            face.connect(str(broker.address), "alice", key_of("alice"), ssl=authority.context())
        assert "the client does not accept this listener's certificate" in refusal(broker)


def test_tls_client_at_plain_listener_is_error(face: Face, trusting: ssl.SSLContext) -> None:
    """Both sides say at once that the listener has no TLS, and what to do."""
    with running_daemon(configuration("127.0.0.1:0")) as broker:
        with pytest.raises(
            TlsError, match="does not speak TLS: a plain listener is reached without tls://"
        ):
            face.connect(f"tls://{broker.address}", "alice", key_of("alice"), ssl=trusting)
        assert "peer speaks TLS, and this listener does not" in refusal(broker)


def test_tls_listener_tells_silent_plain_client_at_handshake_timeout(
    face: Face, server: Issued
) -> None:
    """A plain client waits for the broker to speak first. At the deadline it gets a
    failure that says what would be right.
    """
    limits = {"handshake_timeout": "200ms"}
    with running_daemon(
        configuration({"address": "127.0.0.1:0", "tls": server.entry()}, limits=limits)
    ) as broker:
        with pytest.raises(
            AuthenticationError, match="this listener speaks TLS: use tls://HOST:PORT"
        ):
            face.connect(("127.0.0.1", broker.address.port), "alice", key_of("alice"))
        assert "a client without TLS waits for the broker to speak first" in refusal(broker)


def test_tls_listener_rejects_plain_client_that_sends_first(broker: RunningDaemon) -> None:
    """Bytes that are not TLS are refused with that reason."""
    with Raw(broker.address) as raw:
        raw.write(prefixed(CHALLENGE + b"{sha256}" + bytes(40)))
        raw.read_to_end()
    assert "the client does not speak TLS, which this listener requires" in refusal(broker)


@pytest.mark.parametrize("minimum", ["1.2", "1.3"])
def test_tls_listener_rejects_version_below_minimum(
    minimum: str, face: Face, server: Issued, authority: Authority
) -> None:
    """A client limited to TLS 1.2 is accepted only where minimum allows it. Otherwise
    both sides name the version.
    """
    context = authority.context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with running_daemon(
        configuration({"address": "127.0.0.1:0", "tls": server.entry(minimum=minimum)})
    ) as broker:
        if minimum == "1.2":
            face.connect(str(broker.address), "alice", key_of("alice"), ssl=context)
            assert broker.log.wait("client.connected")[0].fields["tls"] == "TLSv1.2"
        else:
            with pytest.raises(TlsError, match="no TLS version that is allowed"):
                face.connect(str(broker.address), "alice", key_of("alice"), ssl=context)
            assert 'minimum: "1.2"' in refusal(broker)


# Other clients are not delayed


@pytest.mark.timing
def test_tls_handshakes_unfinished_do_not_delay_other_clients(
    server: Issued, face: Face, trusting: ssl.SSLContext
) -> None:
    """Sixty peers begin TLS and stop, each at another point. New and open connections
    are served without delay.
    """
    listen = {"address": "127.0.0.1:0", "tls": server.entry()}
    with (
        running_daemon(configuration(listen, limits={"handshake_timeout": "60s"})) as broker,
        contextlib.ExitStack() as silent,
    ):
        first = face.connect(str(broker.address), "bob", key_of("bob"), ssl=trusting)
        hello = _client_hello(trusting)
        for number in range(60):
            raw = silent.enter_context(Raw(broker.address))
            raw.write(hello[: number * len(hello) // 59])
        began = time.monotonic()
        face.connect(str(broker.address), "alice", key_of("alice"), ssl=trusting)
        first.ping()
        assert time.monotonic() - began < 30
        assert broker.log.named("client.refused") == []


def test_tls_handshakes_are_answered_one_per_turn(
    broker: RunningDaemon, trusting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first bytes of forty peers are all there. The broker answers one of them, and
    then other connections have a turn.
    """
    turns = 0
    steps: list[int] = []
    go_on = TlsHandshakes._go_on

    def count() -> None:
        nonlocal turns
        turns += 1
        broker._loop.call_soon(count)

    def step(self: TlsHandshakes, pending: Any) -> None:
        steps.append(turns)
        go_on(self, pending)

    monkeypatch.setattr(TlsHandshakes, "_go_on", step)
    crowd = [Raw(broker.address) for _ in range(40)]
    hello = _client_hello(trusting)

    def write_hellos() -> None:
        # This runs in the broker's thread, so that all is sent before the broker reads.
        for raw in crowd:
            raw.write(hello)
        count()

    broker.call(write_hellos)
    for raw in crowd:
        assert raw.read(1) == b"\x16"
        raw.close()
    assert len(steps) >= 40
    assert len(set(steps[:40])) == 40


def test_tls_handshake_unfinished_is_closed_after_handshake_timeout(
    server: Issued, trusting: ssl.SSLContext
) -> None:
    """A peer that begins TLS and stops is disconnected when limits.handshake_timeout is
    over.
    """
    limits = {"handshake_timeout": "2s"}
    with running_daemon(
        configuration({"address": "127.0.0.1:0", "tls": server.entry()}, limits=limits)
    ) as broker:
        with Raw(broker.address) as raw:
            raw.write(_client_hello(trusting)[:50])
            raw.read_to_end()
        assert refusal(broker) == "TLS handshake not finished within limits.handshake_timeout"
        with TlsRaw(broker.address, trusting) as silent:
            silent.read_body()
            assert silent.read_to_end() == prefixed(b"#FAILURE#")
        assert refusal(broker, 1) == "handshake not finished within limits.handshake_timeout"


def test_tls_handshakes_above_limit_drop_oldest(
    server: Issued, trusting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more than limits.handshakes drops the oldest one when its grace is over."""
    monkeypatch.setattr(admission, "GRACE_S", 0.1)
    limits = {"handshakes": 3}
    with running_daemon(
        configuration({"address": "127.0.0.1:0", "tls": server.entry()}, limits=limits)
    ) as broker:
        crowd = [Raw(broker.address) for _ in range(4)]
        assert crowd[0].is_closed()
        assert "limits.handshakes" in refusal(broker)
        for raw in crowd:
            raw.close()


def _client_hello(context: ssl.SSLContext) -> bytes:
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1").do_handshake()
    return outgoing.read()


def test_tls_frames_in_same_record_as_welcome_are_routed(
    broker: RunningDaemon, trusting: ssl.SSLContext
) -> None:
    """They are more than one read of a pending connection, and all of them are routed."""
    count = 500
    with tls_login(broker.address, trusting, "bob") as bob:
        early = b"".join(
            packed(MESSAGE, "bob", b"%d" % number, message_id=number) for number in range(count)
        )
        with tls_login(broker.address, trusting, "alice", behind=early):
            assert [bob.recv().id for _ in range(count)] == list(range(count))


def test_tls_connection_second_of_same_name_gets_name_taken(
    broker: RunningDaemon, trusting: ssl.SSLContext
) -> None:
    with tls_login(broker.address, trusting, "alice") as alice:
        with tls_login(
            broker.address, trusting, "alice", behind=packed(MESSAGE, "alice", b"unread")
        ) as second:
            assert second.is_closed("name_taken")
        alice.ping()


def test_tls_connection_without_name_is_undecided_until_its_first_frame(
    broker: RunningDaemon, trusting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of the frame comes with the last bytes of the handshake."""
    monkeypatch.setattr(undecided, "SILENCE_S", dict.fromkeys(WhenConnected, 1000.0))
    whole = packed(MESSAGE, "alice", b"unread")
    with (
        tls_login(broker.address, trusting, "alice") as alice,
        TlsRaw(broker.address, trusting) as second,
    ):
        second.log_in(key_of("alice"), behind=whole[:3])
        broker.log.wait("client.undecided")
        second.write(whole[3:])
        assert second.is_closed("name_taken")
        alice.ping()


def test_tls_delayed_failure_is_not_shortened_by_more_bytes(
    broker: RunningDaemon, trusting: ssl.SSLContext
) -> None:
    """A peer that has failed often gets its failure late, even if it sends more than
    one read behind its answer.
    """
    pending_connections = 12
    for number in range(pending_connections):
        with TlsRaw(broker.address, trusting) as raw:
            raw.write(prefixed(raw.answer(b"wrong")) + prefixed(b"?") * 400)
            assert raw.read_to_end() == prefixed(b"#FAILURE#"), number
    assert {
        event.fields["reason"] for event in broker.log.wait("client.refused", pending_connections)
    } == {"unknown key"}


def test_tls_handshake_in_one_byte_records_is_accepted(
    broker: RunningDaemon, trusting: ssl.SSLContext
) -> None:
    """Records of single bytes are assembled, and so is a frame with a record for each
    byte.
    """
    with TlsRaw(broker.address, trusting) as raw:
        raw.write_bytewise(prefixed(raw.answer(key_of("alice"), b"alice")))
        assert raw.read_body() == b"#WELCOME#"
        raw.challenge(key_of("alice"))
        raw.write(prefixed(b"#WELCOME#"))
        raw.ping()


# Large messages and slow readers


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_large_messages_in_both_directions_arrive(
    version: ssl.TLSVersion, face: Face, server: Issued, authority: Authority
) -> None:
    """Megabytes in both directions at the same time, more than any buffer holds, arrive
    unchanged.
    """
    context = authority.context()
    context.minimum_version = context.maximum_version = version
    queue = {"queue": "64MiB"}
    entry = {"address": "127.0.0.1:0", "tls": server.entry(minimum="1.2")}
    with running_daemon(configuration(entry, {"alice": queue, "bob": queue})) as broker:
        clients = {
            name: face.connect(str(broker.address), name, key_of(name), ssl=context, inbox=2**26)
            for name in ("alice", "bob")
        }
        bodies = {name: [bytes([number]) * 3_000_001 for number in range(5)] for name in clients}

        def send(name: str, to: str) -> None:
            for body in bodies[name]:
                clients[name].send(to, body, timeout=PATIENCE)

        senders = [
            threading.Thread(target=send, args=pair)
            for pair in (("alice", "bob"), ("bob", "alice"))
        ]
        for thread in senders:
            thread.start()
        for name, other in (("alice", "bob"), ("bob", "alice")):
            assert [clients[name].recv(PATIENCE).body for _ in range(5)] == bodies[other]
        for thread in senders:
            thread.join(PATIENCE)


def test_tls_client_send_does_not_wait_for_bytes_inside_tls(
    broker: RunningDaemon, trusting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the transport has accepted all bytes of a send, further sends proceed. A
    piece may still wait inside TLS.
    """
    with brokerd_client.connect(
        str(broker.address), "alice", key_of("alice"), ssl=trusting
    ) as alice:
        with monkeypatch.context() as patched:
            patched.setattr(alice._transport, "unwritten", lambda: True)
            with alice._lock:
                alice._clear = False
            alice._flush()
            assert alice._clear
        assert alice.ping() > 0


@pytest.mark.parametrize("when_full", ["refuse", "drop_oldest", "wait"])
def test_tls_slow_consumer_gets_accepted_messages_in_order(
    when_full: str, server: Issued, trusting: ssl.SSLContext
) -> None:
    """The reader pauses. Every message that was not answered with an error arrives
    later, whole.
    """
    entry = {"address": "127.0.0.1:0", "tls": server.entry()}
    clients = {"alice": {"queue": "1MiB"}, "bob": {"queue": "256KiB", "when_full": when_full}}
    config = configuration(entry, clients, limits={"wait_timeout": "100ms"})
    with (
        running_daemon(config) as broker,
        tls_login(broker.address, trusting, "bob") as bob,
        tls_login(broker.address, trusting, "alice") as alice,
    ):
        answered: dict[int, int] = {}
        sent = 0
        # The sockets' own buffers hold megabytes.
        while ERROR not in answered.values():
            assert sent < 10_000, "the queue was never full"
            for _ in range(100):
                alice.send(
                    MESSAGE,
                    "bob",
                    sent.to_bytes(4, "big") * 1000,
                    message_id=sent,
                    flags=WANT_RECEIPT,
                )
                sent += 1
            while len(answered) < sent:
                frame = alice.recv()
                answered[frame.id] = frame.kind
        accepted = sorted(message_id for message_id, kind in answered.items() if kind == RECEIPT)
        got = []
        while len(got) < len(accepted):
            frame = bob.recv()
            assert frame.body == frame.id.to_bytes(4, "big") * 1000
            got.append(frame.id)
        assert got == accepted
        alice.ping()
        bob.ping()


def test_drain_over_tls_sends_close_notify_after_last_message(
    server: Issued, trusting: ssl.SSLContext
) -> None:
    """A draining broker writes the queued messages, ends TLS properly, and only then
    closes.
    """
    entry = {"address": "127.0.0.1:0", "tls": server.entry()}
    with (
        running_daemon(configuration(entry)) as broker,
        tls_login(broker.address, trusting, "bob") as bob,
    ):
        with tls_login(broker.address, trusting, "alice") as alice:
            for number in range(50):
                alice.send(1, "bob", b"x" * 10_000, message_id=number)
            alice.ping()
            broker.stop_soon()
            ids = [bob.recv().id for _ in range(50)]
        assert ids == list(range(50))
        # Without close_notify this raises an SSLError, because a cut must not pass for
        # the end.
        bob.sock.suppress_ragged_eofs = False  # type: ignore[attr-defined]
        assert bob.is_closed("shutting_down")


def test_drain_over_tls_waits_for_bytes_inside_tls(
    broker: RunningDaemon, trusting: ssl.SSLContext
) -> None:
    """When the outbox is empty and only TLS still holds bytes, a drain waits for those
    too.
    """

    def held() -> bool:
        (connection,) = [
            connection
            for connection in broker.daemon._server.connections
            if connection.session.address == "bob"
        ]  # type: ignore[union-attr]
        assert isinstance(connection, TlsConnection)
        return connection._stream.unsent and not connection.session.outbox.waiting

    with (
        tls_login(broker.address, trusting, "bob") as bob,
        tls_login(broker.address, trusting, "alice") as alice,
    ):
        count = 0
        while not broker.call(held):
            assert count < 10_000, "the sockets never filled"
            alice.send(MESSAGE, "bob", b"x" * 20_000, message_id=count)
            alice.ping()
            count += 1
        broker.stop_soon()
        # That was alice's connection. A turn of the loop later bob's is closing too.
        broker.log.wait("client.disconnected")
        broker.call(lambda: None)
        assert [bob.recv().id for _ in range(count)] == list(range(count))
        bob.sock.suppress_ragged_eofs = False  # type: ignore[attr-defined]
        assert bob.is_closed("shutting_down")


def test_tls_connection_reset_frees_name(broker: RunningDaemon, trusting: ssl.SSLContext) -> None:
    """A connection that is reset, or ends without close_notify, counts as closed by the
    client. The name is free again.
    """
    for _ in range(3):
        alice = tls_login(broker.address, trusting, "alice")
        alice.ping()
        bare = socket.socket(fileno=alice.sock.detach())
        bare.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        bare.close()
    broker.log.wait("client.disconnected", 3)
    with pytest.raises(Rejected), tls_login(broker.address, trusting, "nobody"):
        pass


def test_tls_connection_can_not_be_handed_over(
    broker: RunningDaemon, trusting: ssl.SSLContext
) -> None:
    """The connection reports that it stays in this process."""
    with tls_login(broker.address, trusting, "alice") as alice:
        alice.ping()
        (connection,) = broker.call(lambda: list(broker.daemon._server.connections))  # type: ignore[union-attr]
        assert connection.can_hand_over is False
    with running_daemon(configuration("127.0.0.1:0")) as plain, plain.login("alice") as raw:
        raw.ping()
        (connection,) = plain.call(lambda: list(plain.daemon._server.connections))  # type: ignore[union-attr]
        assert connection.can_hand_over is True


# Closing, and errors of the library


@pytest.mark.timing
def test_tls_client_close_delivers_sent_messages_without_delay(
    broker: RunningDaemon, face: Face, trusting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that sends and closes at once has everything delivered, and does not
    wait for a timeout.
    """
    for module in (dialog, aio.base, blocking.base):
        monkeypatch.setattr(module, "LINGER_S", 3 * PATIENCE)
    monkeypatch.setattr(blocking.base, "_THREAD_GRACE_S", 3 * PATIENCE)
    bob = face.connect(str(broker.address), "bob", key_of("bob"), ssl=trusting)
    alice = face.connect(str(broker.address), "alice", key_of("alice"), ssl=trusting)
    for number in range(200):
        alice.send("bob", number)
    began = time.monotonic()
    alice.close()
    assert time.monotonic() - began < 2 * PATIENCE
    assert [bob.recv(PATIENCE).payload for _ in range(200)] == list(range(200))


def test_tls_client_disconnected_reconnects(
    broker: RunningDaemon, face: Face, trusting: ssl.SSLContext
) -> None:
    """A lost connection is opened again, with TLS."""
    alice = face.connect(str(broker.address), "alice", key_of("alice"), ssl=trusting)
    broker.call(lambda: broker.daemon.cut_off("alice"))
    broker.log.wait("client.connected", 2)
    assert alice.ping() > 0


@pytest.mark.parametrize(
    ("address", "given", "error"),
    [
        ("/run/b.sock", True, "TLS is for TCP"),
        ("tls://h:1", False, "ssl=False forbids it"),
        ("h:1", "yes", r"an ssl\.SSLContext or True"),
        ("h:1", ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "a client's context"),
    ],
)
def test_tls_client_invalid_options_are_refused(address: str, given: Any, error: str) -> None:
    """An invalid combination is refused before any connection is opened, with what
    would be right.
    """
    with pytest.raises((BrokerdError, TypeError, ValueError), match=error):
        brokerd_client.connect(address, "alice", "k", ssl=given)


def test_tls_client_without_context_trusts_system_cas(broker: RunningDaemon) -> None:
    """An address with tls:// alone trusts the CAs of the system, which do not include
    this one. So does ssl=True.
    """
    for address, given in (
        (str(broker.address), None),
        (str(broker.address).removeprefix("tls://"), True),
    ):
        with pytest.raises(TlsError, match="can't be verified"):
            brokerd_client.connect(address, "alice", key_of("alice"), ssl=given)
