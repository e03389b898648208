"""The handshake seen from outside, by peers that are right, wrong, old, slow, silent or
hostile.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Client
from time import monotonic
from typing import Any

import pytest
from support.keys import key_of
from support.raw_client import (
    CHALLENGE,
    FAILURE,
    HEADER,
    MESSAGE,
    WELCOME,
    Raw,
    Rejected,
    login,
    packed,
    prefixed,
)
from support.running_daemon import RunningDaemon, configuration, running_daemon

from brokerd.net.handshake import admission, handshakes
from brokerd.net.handshake import penalties as failures
from brokerd.net.handshake.keyring import KeySearch
from brokerd_client.address import Address

REJECTION = prefixed(FAILURE)
#: Before 3.12 the standard library knows HMAC-MD5 only.
STOCK_IS_MD5 = sys.version_info < (3, 12)


def served(clients: Any = "alice bob carol", listen: Any = "127.0.0.1:0", **more: Any) -> Any:
    return running_daemon(configuration(listen, clients, **more))


def rejection(address: Address, key: bytes, name: bytes = b"", **how: Any) -> bytes:
    """Return every byte that the broker sent instead of #WELCOME#, until the end."""
    with pytest.raises(Rejected) as caught:
        login(address, key, name, **how)
    return bytes(caught.value.args[0])


def last_refusal(broker: RunningDaemon, count: int = 1) -> dict[str, Any]:
    return broker.log.wait("client.refused", count)[count - 1].fields


# Identification


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix", "@"])
def test_handshake_stock_client_is_accepted(listen: str, socket_dir: Any) -> None:
    """Two clients of multiprocessing.connection.Client that have only their keys
    exchange messages.
    """
    listen = {"unix": str(socket_dir / "s"), "@": "@brokerd-" + os.urandom(6).hex()}.get(
        listen, listen
    )
    clients = {name: {"allow_md5": STOCK_IS_MD5} for name in ("alice", "bob")}
    with (
        served(clients, listen) as broker,
        Client(broker.address.sockaddr, authkey=key_of("alice")) as alice,
        Client(broker.address.sockaddr, authkey=key_of("bob")) as bob,
    ):
        alice.send_bytes(struct.pack("!BBBBQ", 1, 0, 0, 3, 0) + b"bob" + b"hello")
        assert bob.recv_bytes() == HEADER.pack(1, 0, 0, 5, 0) + b"alice" + b"hello"


@pytest.mark.parametrize("name", [b"", b"bob"], ids=["by key", "by name"])
@pytest.mark.parametrize("challenge", ["sha256", "sha384", "sha3_256", "sha3_384"])
@pytest.mark.parametrize("digest", ["sha256", "sha384", "sha3_256", "sha3_384"])
def test_handshake_digest_of_standard_library_is_accepted(
    name: bytes, challenge: str, digest: str
) -> None:
    """A peer may answer with, and ask for, any digest of the standard library's newer
    handshake.
    """
    with (
        served() as broker,
        login(
            broker.address, key_of("bob"), name, digest=digest, challenge_digest=challenge
        ) as bob,
    ):
        assert bob.ask("whoami").json["name"] == "bob"


def test_handshake_name_with_key_of_another_client_is_rejected() -> None:
    """With a name only that client's keys count, even if the key is a valid one of
    another client.
    """
    with served() as broker:
        assert rejection(broker.address, key_of("alice"), b"bob") == REJECTION


@pytest.mark.parametrize(
    "name",
    [
        b"",
        b"alice",
        b"nobody",
        b"$broker",
        b"alice/1",
        b"\xff\xfe",
        b"a" * 200,
        b"alice\n",
        b"alice\0",
    ],
)
def test_handshake_wrong_key_gets_same_answer_for_every_name(name: bytes) -> None:
    """The bytes are #FAILURE# and the end, for a name that exists and for one that does
    not.
    """
    with served() as broker:
        assert rejection(broker.address, b"a key nobody has", name) == REJECTION
        assert broker.log.wait("client.refused")[0].fields["peer"].startswith("127.0.0.1:")


@pytest.mark.parametrize(
    ("name", "claimed", "exists"),
    [
        (b"alice", "alice", True),
        (b"nobody", "nobody", False),
        (b"\xff\n", "\\xff\n", False),
        ("\u0430lice".encode(), "\\xd0\\xb0lice", False),
    ],
)
def test_handshake_wrong_key_logs_claimed_name_and_its_existence(
    name: bytes, claimed: str, exists: bool
) -> None:
    """The claimed name is escaped, because a peer without a key chose it."""
    with served() as broker:
        rejection(broker.address, b"a key nobody has", name)
        fields = broker.log.wait("client.refused")[0].fields
    assert (fields["claimed"], fields["exists"]) == (claimed, exists)
    assert "name" not in fields


def test_handshake_wrong_key_without_name_logs_no_claim() -> None:
    """An answer without a name claims none."""
    with served() as broker:
        rejection(broker.address, b"a key nobody has")
        fields = broker.log.wait("client.refused")[0].fields
    assert not {"name", "claimed", "exists"} & fields.keys()


def test_handshake_wrong_key_tries_same_number_of_keys_for_every_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many keys are tried for an unknown name as for the name with the most keys."""
    tried: list[int] = []

    class CountedSearch(KeySearch):
        def step(self) -> Any:
            found = super().step()
            tried.append(self.tried)
            return found

    monkeypatch.setattr(handshakes, "KeySearch", CountedSearch)
    keys = [{"key": f"key {number}"} for number in range(5)]
    with served({"alice": {"keys": keys}, "bob": None}) as broker:
        for name in (b"alice", b"bob", b"nobody"):
            rejection(broker.address, b"wrong", name)
    assert tried == [5, 5, 5]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"#WELCOME#",
        b"x" * 16,
        b"x" * 256,
        b"{sha256}",
        b"{sha256}" + b"x" * 31,
        b"{sha1}" + b"x" * 20,
        b"{sha384}" + b"x" * 32,
        b"{sha256" + b"x" * 40,
        b"{md5}" + b"x" * 16,
    ],
)
def test_handshake_invalid_answer_gets_failure(answer: bytes) -> None:
    """Any frame that is not a right answer gets #FAILURE# and no more."""
    with served() as broker, broker.raw() as peer:
        assert peer.read_body().startswith(CHALLENGE)
        peer.write(prefixed(answer))
        assert peer.read_to_end() == REJECTION


def test_handshake_replayed_answer_is_rejected() -> None:
    """The challenge is new each time, so that a recorded answer is worthless later."""
    with served() as broker, broker.raw() as first, broker.raw() as second:
        answer = first.answer(key_of("alice"))
        assert answer != second.answer(key_of("alice"))
        second.write(prefixed(answer))
        assert second.read_to_end() == REJECTION


def test_handshake_reflected_challenge_is_rejected() -> None:
    """A peer that sends the broker's challenge back learns no answer. The broker
    answers authenticated peers only.
    """
    with served() as broker, broker.raw() as peer:
        challenge = peer.read_body()
        peer.write(prefixed(challenge))
        assert peer.read_to_end() == REJECTION


def test_handshake_rejected_by_client_closes_connection() -> None:
    """A client may send #FAILURE# to the broker. The connection is closed, and the log
    says which side rejected the other.
    """
    with served() as broker, broker.raw() as peer:
        peer.write(prefixed(peer.answer(key_of("alice"))))
        assert peer.read_body() == WELCOME
        peer.write(prefixed(CHALLENGE + b"{sha256}" + b"x" * 40))
        peer.read_body()
        peer.write(prefixed(FAILURE))
        assert peer.read_to_end() == b""
        refusal = last_refusal(broker)
        assert "rejected" in refusal["reason"]
        assert refusal["name"] == "alice"


# MD5


@pytest.mark.parametrize(("digest", "name"), [(None, b""), ("md5", b""), ("md5", b"alice")])
def test_handshake_md5_is_rejected_and_log_names_allow_md5(digest: str | None, name: bytes) -> None:
    """A right key by HMAC-MD5 gets #FAILURE#, and the log line for the operator names
    allow_md5.
    """
    with served() as broker:
        assert rejection(broker.address, key_of("alice"), name, digest=digest) == REJECTION
        refusal = last_refusal(broker)
        assert "allow_md5" in refusal["reason"]
        assert refusal["name"] == "alice"


@pytest.mark.parametrize("digest", [None, "md5"], ids=["bare", "prefixed"])
def test_handshake_md5_allowed_for_client_is_accepted(digest: str | None) -> None:
    """The option allow_md5 of a client holds for that client only."""
    with served({"old": {"allow_md5": True}, "young": None}) as broker:
        with login(broker.address, key_of("old"), digest=digest, challenge_digest=digest) as old:
            assert old.ask("whoami").json["name"] == "old"
        assert rejection(broker.address, key_of("young"), digest=digest) == REJECTION


@pytest.mark.parametrize("digest", [None, "md5"], ids=["bare", "prefixed"])
def test_handshake_md5_allowed_at_listener_is_accepted(digest: str | None) -> None:
    """The option allow_md5 of a listener holds for all connections there, and at no
    other listener.
    """
    with served(listen=[{"address": "127.0.0.1:0", "allow_md5": True}, "127.0.0.1:0"]) as broker:
        inside, outside = broker.addresses
        with login(inside, key_of("alice"), digest=digest, challenge_digest=digest) as alice:
            alice.ping()
        assert rejection(outside, key_of("bob"), digest=digest) == REJECTION


def test_handshake_md5_challenge_after_better_digest_is_rejected() -> None:
    """Where MD5 is off the broker does not answer an MD5 challenge either."""
    with served() as broker, broker.raw() as peer:
        peer.write(prefixed(peer.answer(key_of("alice"))))
        assert peer.read_body() == WELCOME
        peer.write(prefixed(CHALLENGE + b"x" * 20))
        assert peer.read_to_end() == REJECTION
        assert "allow_md5" in last_refusal(broker)["reason"]


@pytest.mark.parametrize(
    "said",
    [
        prefixed(b""),
        prefixed(b"nonsense"),
        prefixed(CHALLENGE),
        prefixed(CHALLENGE + b"{sha1}" + b"x" * 40),
        prefixed(WELCOME),
        prefixed(b"x" * 257),
        b"\xff\xff\xff\xfe",
    ],
    ids=[
        "empty",
        "nonsense",
        "short",
        "unknown digest",
        "welcome",
        "too long",
        "impossible length",
    ],
)
def test_handshake_second_half_invalid_gets_failure(said: bytes) -> None:
    """After the broker's #WELCOME# too, any mistake of the client gets #FAILURE#."""
    with served() as broker, broker.raw() as peer:
        peer.write(prefixed(peer.answer(key_of("alice"))))
        assert peer.read_body() == WELCOME
        peer.write(said)
        assert peer.read_to_end() == REJECTION
    with served() as broker, broker.raw() as peer:
        peer.write(prefixed(peer.answer(key_of("alice"))))
        assert peer.read_body() == WELCOME
        peer.write(prefixed(CHALLENGE + b"{sha256}" + b"x" * 40))
        peer.read_body()
        peer.write(prefixed(b"no verdict"))
        assert peer.read_to_end() == REJECTION


# Keys


def window(before: timedelta | None, after: timedelta | None) -> dict[str, Any]:
    now = datetime.now(UTC)
    entry: dict[str, Any] = {"key": "windowed"}
    if before is not None:
        entry["not_before"] = (now + before).isoformat()
    if after is not None:
        entry["not_after"] = (now + after).isoformat()
    return entry


HOUR = timedelta(hours=1)


@pytest.mark.parametrize("name", [b"", b"alice"], ids=["by key", "by name"])
@pytest.mark.parametrize(
    ("before", "after", "welcome"),
    [
        (-HOUR, HOUR, True),
        (None, HOUR, True),
        (-HOUR, None, True),
        (HOUR, None, False),
        (None, -HOUR, False),
    ],
)
def test_handshake_key_outside_its_time_is_rejected(
    before: timedelta | None, after: timedelta | None, welcome: bool, name: bytes
) -> None:
    """Before not_before and after not_after a key is refused like a wrong one. The log
    says that its time is the reason.
    """
    with served({"alice": {"keys": [window(before, after), {"key": "other"}]}}) as broker:
        if welcome:
            login(broker.address, b"windowed", name).close()
            return
        assert rejection(broker.address, b"windowed", name) == REJECTION
        assert "not_after" in last_refusal(broker)["reason"]
        login(broker.address, b"other", name).close()


def test_handshake_broker_answers_with_key_of_client() -> None:
    """If a client has several keys, the broker answers with the key that this peer
    used.
    """
    with served({"alice": {"keys": [{"key": "new"}, {"key": "old"}], "connections": 2}}) as broker:
        for key in (b"old", b"new"):
            login(broker.address, key).close()


def test_keyring_identify_by_key_bounds_search() -> None:
    """Past the limit a key is not found without a name. With its name the key is always
    found, and is then recently used.
    """
    names = [f"c{number}" for number in range(45)]
    with served(dict.fromkeys(names), limits={"identify_by_key": 40}) as broker:

        def gets_in(name: str, said: bytes) -> bool:
            try:
                login(broker.address, key_of(name), said).close()
            except Rejected:
                return False
            return True

        found = {name for name in names if gets_in(name, b"")}
        assert len(found) == 40
        unfound = next(name for name in names if name not in found)
        assert gets_in(unfound, unfound.encode())
        assert gets_in(unfound, b"")
        assert sum(gets_in(name, b"") for name in found) == 39


def test_keyring_unused_keys_are_tried_in_order_of_file() -> None:
    """With two tries the first two clients are found. The third is found after a login
    with its name, in place of the second.
    """
    with served(limits={"identify_by_key": 2}) as broker:
        broker.login("carol").close()
        broker.log.wait("client.disconnected", 1)
        for count, name in enumerate(["carol", "alice"], start=2):
            login(broker.address, key_of(name)).close()
            broker.log.wait("client.disconnected", count)
        assert rejection(broker.address, key_of("bob")) == REJECTION


def test_keyring_identify_by_key_zero_requires_name() -> None:
    """With `identify_by_key: 0` only clients that give their name are accepted."""
    with served(limits={"identify_by_key": 0}) as broker:
        assert rejection(broker.address, key_of("alice")) == REJECTION
        broker.login("alice").close()


def test_handshake_peer_uid_of_another_user_is_rejected(socket_dir: Any) -> None:
    """A client with peer_uid is accepted for that user only, and over a Unix socket
    only.
    """
    clients = {
        "me": {"peer_uid": [os.getuid()]},
        "you": {"peer_uid": [os.getuid() + 1], "key": "k"},
    }
    with served(clients, [str(socket_dir / "s"), "127.0.0.1:0"]) as broker:
        unix, tcp = broker.addresses
        with login(unix, b"me", b"me") as me:
            assert me.ask("whoami").json["name"] == "me"
        assert rejection(unix, b"k", b"you") == REJECTION
        assert "peer_uid" in last_refusal(broker)["reason"]
        assert rejection(tcp, b"me", b"me") == REJECTION


# Peers that break the protocol


def test_handshake_sent_byte_by_byte_is_accepted() -> None:
    """A handshake and a message in segments of one byte are understood."""
    with served() as broker, broker.raw() as alice, broker.login("bob") as bob:
        alice.write_bytewise(prefixed(alice.answer(key_of("alice"), b"alice")))
        assert alice.read_body() == WELCOME
        message = b"{sha256}" + b"n" * 40
        alice.write_bytewise(prefixed(CHALLENGE + message))
        alice.read_body()
        alice.write_bytewise(prefixed(WELCOME) + packed(MESSAGE, "bob", b"slowly"))
        assert bob.recv().body == b"slowly"


@pytest.mark.parametrize("size", [10, 300, 70_000, 1_000_000])
def test_handshake_frame_in_same_segment_as_welcome_is_delivered(size: int) -> None:
    """A frame of any length right behind the last #WELCOME# reaches its recipient."""
    with served() as broker, broker.login("bob") as bob:
        payload = os.urandom(size)
        with login(
            broker.address, key_of("alice"), b"alice", behind=packed(MESSAGE, "bob", payload) * 2
        ):
            assert bob.recv().body == payload
            assert bob.recv().body == payload


def test_handshake_sent_without_reading_is_accepted() -> None:
    """A client sends its answer, challenge, welcome and messages before it reads
    anything. Nothing of that is lost.
    """
    with (
        served({f"c{n}": None for n in range(200)} | {"bob": None}) as broker,
        broker.login("bob") as bob,
    ):
        for named in (b"", b"c5"):
            with broker.raw() as hasty:
                answer = hasty.answer(key_of("c5"), named)
                message = b"{sha256}" + b"n" * 40
                hasty.write(
                    prefixed(answer)
                    + prefixed(CHALLENGE + message)
                    + prefixed(WELCOME)
                    + b"".join(
                        packed(MESSAGE, "bob", b"%d" % number, message_id=number)
                        for number in range(1000)
                    )
                )
                assert [bob.recv().id for _ in range(1000)] == list(range(1000))
                assert hasty.read_body() == WELCOME
                hasty.read_body()
                hasty.ping()


@pytest.mark.parametrize("claim", [257, 70_000, 2**31 - 1])
def test_handshake_frame_over_256_bytes_closes_connection(claim: int) -> None:
    """The connection ends when the length is announced, before the first byte of the
    frame arrives.
    """
    with served() as broker, broker.raw() as peer:
        peer.read_body()
        peer.write(struct.pack("!i", claim))
        assert peer.is_refused()
        assert str(claim) in last_refusal(broker)["reason"]


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(506),
        b"SSH-2.0-OpenSSH_9.6\r\n",
        struct.pack("!i", -2),
        struct.pack("!iQ", -1, 2**63),
        struct.pack("!iQ", -1, 2**64 - 1),
        b"\xff" * 4000,
    ],
    ids=["http", "tls", "ssh", "-2", "2**63", "2**64-1", "ff"],
)
def test_handshake_of_foreign_protocol_is_closed(garbage: bytes) -> None:
    """A peer that speaks another protocol is disconnected at once and logged."""
    with served() as broker, broker.raw() as peer:
        peer.read_body()
        peer.write(garbage)
        assert peer.is_refused()
        reason = last_refusal(broker)["reason"]
        assert (
            "peer speaks TLS, and this listener does not" in reason
            if garbage[0] == 0x16
            else "not a handshake" in reason
        )


@pytest.mark.parametrize(
    "stage", ["nothing", "half a length", "half an answer", "no challenge", "no welcome"]
)
def test_handshake_silent_peer_is_closed_after_handshake_timeout(stage: str) -> None:
    """At whatever step a peer stops sending, it is closed when limits.handshake_timeout
    is over.
    """
    with served(limits={"handshake_timeout": "2s"}) as broker, broker.raw() as peer:
        answer = prefixed(peer.answer(key_of("alice")))
        peer.write(
            {"nothing": b"", "half a length": answer[:2], "half an answer": answer[:20]}.get(
                stage, answer
            )
        )
        if stage in ("no challenge", "no welcome"):
            assert peer.read_body() == WELCOME
        if stage == "no welcome":
            peer.challenge(key_of("alice"))
        assert peer.is_refused()
        assert "handshake_timeout" in last_refusal(broker)["reason"]


def test_handshake_slow_peer_does_not_extend_handshake_timeout() -> None:
    """The deadline is for the whole handshake: single bytes now and then do not extend
    it.
    """
    with served(limits={"handshake_timeout": "300ms"}) as broker, broker.raw() as peer:
        answer = prefixed(peer.answer(key_of("alice")))
        peer.sock.settimeout(0.02)
        closed = False
        for position in range(len(answer)):
            try:
                peer.write(answer[position : position + 1])
                closed = peer.sock.recv(1) == b""
            except TimeoutError:
                continue
            except OSError:
                closed = True
            if closed:
                break
        assert closed
        assert "handshake_timeout" in last_refusal(broker)["reason"]


def test_handshakes_above_limit_drop_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more than limits.handshakes drops the oldest one when its grace is over.
    Meanwhile a client with a key is accepted.
    """
    monkeypatch.setattr(admission, "GRACE_S", 0.1)
    with served(limits={"handshakes": 5}) as broker:
        silent = [broker.raw() for _ in range(8)]
        try:
            for peer in silent:
                peer.read_body()
            broker.log.wait("client.refused", 3)
            assert [peer.is_closed() for peer in silent[:3]] == [True] * 3
            with broker.login("alice") as alice:
                alice.ping()
            server = broker.daemon._server
            assert server is not None
            assert broker.call(lambda: len(server.pending_handshakes)) == 4
        finally:
            for peer in silent:
                peer.close()


def test_handshake_silent_peers_do_not_delay_accept() -> None:
    """Silent peers have connected first, and a client after them is accepted."""
    with served() as broker:
        silent = [broker.raw() for _ in range(20)]
        try:
            broker.login("alice").close()
        finally:
            for peer in silent:
                peer.close()


def test_handshakes_listed_for_new_process_have_sent_their_frames() -> None:
    """Frames wait for the end of the turn. Whatever counts as sent when an upgrade reads
    the state is sent: the new process does not send it again.
    """
    with served() as broker:
        handshakes = broker.daemon.server.pending_handshakes

        def begin() -> tuple[int, bytes]:
            own, peer = socket.socketpair()
            own.setblocking(False)
            with peer:
                handshakes.begin(own, "", "test", allow_md5=False)
                (pending,) = handshakes.pending_connections()
                return pending.spoken, peer.recv(1000, socket.MSG_DONTWAIT)

        spoken, received = broker.call(begin)
        assert spoken == 1
        assert received[4:].startswith(CHALLENGE)


def test_handshake_reset_by_peer_leaves_nothing_behind() -> None:
    """A reset in the middle of the handshake disturbs no other client, and no state of
    it is kept.
    """
    with served() as broker:
        for _ in range(20):
            peer = broker.raw()
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.write(b"\0\0")
            peer.close()
        # Chance decides whether the bytes are read before the reset, and which event is
        # logged.
        deadline = monotonic() + 30
        while broker.call(lambda: len(broker.daemon._server.pending_handshakes)):
            assert monotonic() < deadline
        broker.login("alice").close()


def test_handshake_reset_behind_last_frame_ends_connection() -> None:
    """The event loop may report the last frame and the reset at once, and only once. The
    session begins and ends, and the name is free.
    """
    with served() as broker:
        alice = broker.raw()
        alice.write(prefixed(alice.answer(key_of("alice"), b"alice")))
        assert alice.read_body() == WELCOME
        alice.challenge(key_of("alice"))
        alice.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        def finish() -> None:
            alice.write(prefixed(WELCOME))
            alice.close()

        # The event loop is busy until both have arrived.
        broker.call(finish)
        broker.log.wait("client.disconnected")
        broker.login("alice").close()


@pytest.mark.timing
def test_penalties_failing_address_is_delayed_and_right_key_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After ten failures #FAILURE# is sent later. The right key is accepted before
    that, even from the same address.
    """
    monkeypatch.setattr(failures, "_DELAY_STEP", 1.0)
    with served() as broker:
        began = monotonic()
        for _ in range(10):
            rejection(broker.address, b"wrong")
        assert monotonic() - began < 10
        peer = Raw(broker.address)
        began = monotonic()
        peer.write(prefixed(peer.answer(b"wrong")))
        broker.login("alice").close()
        peer.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            peer.sock.recv(1)
        peer.sock.settimeout(30)
        assert peer.read_to_end() == REJECTION
        assert monotonic() - began >= 0.99
        peer.close()


@pytest.mark.parametrize(
    ("peer", "uid", "origin"),
    [
        (("192.0.2.7", 4000), None, "192.0.2.7"),
        (("2001:db8:1:2:3:4:5:6", 4000, 0, 0), None, "2001:db8:1:2::/64"),
        (("2001:db8:1:2:ffff::", 4001, 0, 0), None, "2001:db8:1:2::/64"),
        (("2001:db8:1:3::1", 4000, 0, 0), None, "2001:db8:1:3::/64"),
        (("fe80::1%eth0", 4000, 0, 2), None, "fe80::/64"),
        (("::1", 4000, 0, 0), None, "::/64"),
        (("::ffff:192.0.2.7", 4000, 0, 0), None, "192.0.2.7"),
        ("", 1000, "uid 1000"),
        ("", None, "unix"),
    ],
)
def test_penalties_failures_are_counted_by_origin(
    peer: object, uid: int | None, origin: str
) -> None:
    """An IPv4 address counts by itself, also at a socket for both versions. IPv6
    addresses count by their /64, and Unix peers by their user.
    """
    assert failures.origin_of(peer, uid) == origin


def test_handshakes_pending_are_empty_after_all_peers_left() -> None:
    """No state of a handshake is kept when it is over, whether it succeeded or failed."""
    with served() as broker:
        broker.login("alice").close()
        rejection(broker.address, b"wrong")
        with broker.raw() as peer:
            peer.read_body()
        broker.log.wait("client.refused")
        broker.log.wait("client.left")
        server = broker.daemon._server
        assert server is not None
        assert broker.call(
            lambda: (len(server.pending_handshakes), server.pending_handshakes._searches)
        ) == (0, [])
