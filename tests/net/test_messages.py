"""What becomes of a frame: delivered, answered or refused, and never silently dropped.
Also how frames may arrive.
"""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.keys import key_of
from support.raw_client import (
    ACK,
    ERROR,
    EVENT,
    EXTENSION,
    JSON,
    MESSAGE,
    RECEIPT,
    REPLY,
    REQUEST,
    WANT_ACK,
    WANT_RECEIPT,
    Frame,
    login,
    packed,
    prefixed,
)
from support.running_daemon import configuration, running_daemon

from brokerd.core import broker as broker_module
from brokerd.core import session as session_module
from brokerd.core.operations import Operations
from brokerd.core.session import Session
from brokerd.net.connection import connection as connection_module
from brokerd.net.connection.connection import Connection

MAX_ID = 2**64 - 1


def served(clients: Any = "alice bob carol", listen: Any = "127.0.0.1:0", **more: Any) -> Any:
    return running_daemon(configuration(listen, clients, **more))


def extension(**keys: Any) -> bytes:
    data = json.dumps(keys).encode()
    return struct.pack("!H", len(data)) + data


def topic(name: bytes) -> bytes:
    return bytes([len(name)]) + name


# Delivered


@pytest.mark.parametrize("kind", [MESSAGE, REQUEST])
@pytest.mark.parametrize("codec", [0, 1, 2, 3, 4, 127, 128, 255])
@pytest.mark.parametrize("message_id", [0, 1, MAX_ID])
def test_frame_is_delivered_with_kind_codec_id_and_payload(
    kind: int, codec: int, message_id: int
) -> None:
    """Kind, codec, id and payload pass unchanged. The name becomes the authenticated
    sender's.
    """
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        alice.send(kind, "bob", b"\x00\xffpayload", message_id=message_id, codec=codec)
        assert bob.recv() == Frame(kind, 0, codec, "alice", message_id, b"\x00\xffpayload")


def test_message_with_empty_payload_is_delivered() -> None:
    """A payload of no bytes arrives."""
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        alice.send(MESSAGE, "bob")
        assert bob.recv() == Frame(MESSAGE, 0, 0, "alice", 0, b"")


def test_message_to_own_name_is_delivered() -> None:
    """A sender's own name is a recipient like any other."""
    with served() as broker, broker.login("alice") as alice:
        alice.send(MESSAGE, "alice", b"note", flags=WANT_RECEIPT, message_id=3)
        assert {(frame.kind, frame.name) for frame in (alice.recv(), alice.recv())} == {
            (MESSAGE, "alice"),
            (RECEIPT, "$broker"),
        }


def test_receipt_is_sent_for_queued_message() -> None:
    """With the flag RECEIPT the sender gets a receipt with the message's id. The
    recipient does not see the flag.
    """
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        alice.send(MESSAGE, "bob", b"x", message_id=99, flags=WANT_RECEIPT)
        assert alice.recv() == Frame(RECEIPT, 0, 0, "$broker", 99, b"")
        assert bob.recv() == Frame(MESSAGE, 0, 0, "alice", 99, b"x")


def test_reply_is_delivered_to_requester() -> None:
    """A REPLY with the request's id reaches the client that sent the request."""
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        alice.send(REQUEST, "bob", b"question", message_id=5)
        question = bob.recv()
        bob.send(REPLY, question.name, b"answer", message_id=question.id)
        assert alice.recv() == Frame(REPLY, 0, 0, "bob", 5, b"answer")


def test_reply_as_error_is_delivered_to_requester() -> None:
    """An ERROR sent in reply to a request passes with its payload."""
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        alice.send(REQUEST, "bob", b"question", message_id=5)
        bob.recv()
        payload = json.dumps({"code": "failed", "message": "no", "name": ""}).encode()
        bob.send(ERROR, "alice", payload, message_id=5, codec=JSON)
        assert alice.recv() == Frame(ERROR, 0, JSON, "bob", 5, payload)


def test_request_of_disconnected_recipient_is_abandoned() -> None:
    """When the recipient disconnects, the requester gets ``abandoned`` with the
    request's id.
    """
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        alice.send(REQUEST, "bob", b"question", message_id=5)
        bob.recv()
        bob.close()
        error = alice.recv()
        assert (error.id, error.code) == (5, "abandoned")


def test_extension_with_unknown_keys_passes_unchanged() -> None:
    """The broker passes unknown keys of an extension on, byte for byte."""
    data = b'{ "traceparent" : "00-ab", "x":[1,2] }'
    between = struct.pack("!H", len(data)) + data
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        alice.send(MESSAGE, "bob", b"payload", flags=EXTENSION, between=between)
        assert bob.recv() == Frame(MESSAGE, EXTENSION, 0, "alice", 0, between + b"payload")


def test_event_is_delivered_once_to_each_subscriber() -> None:
    """An EVENT reaches each subscriber once, with its publisher's name, and no other
    client.
    """
    with (
        served() as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
        broker.login("carol") as carol,
    ):
        for pattern in ("jobs.*", "jobs.>"):
            assert bob.ask("subscribe", topic=pattern).kind == REPLY
        alice.send(
            EVENT, "", b"payload", between=topic(b"jobs.new"), message_id=3, flags=WANT_RECEIPT
        )
        assert alice.recv().kind == RECEIPT
        assert bob.recv() == Frame(EVENT, 0, 0, "alice", 3, topic(b"jobs.new") + b"payload")
        bob.ping()
        carol.ping()
        bob.ask("unsubscribe", topic="jobs.*")
        bob.ask("unsubscribe", topic="jobs.>")
        alice.send(EVENT, "", b"payload", between=topic(b"jobs.new"))
        alice.ping()
        bob.ping()


# Refused


def test_message_to_disconnected_client_is_offline() -> None:
    """For a configured client that is not connected the sender gets ``offline``, with
    the message's id.
    """
    with served() as broker, broker.login("alice") as alice:
        for kind in (MESSAGE, REQUEST):
            alice.send(kind, "bob", b"x", message_id=kind)
            error = alice.recv()
            assert (error.id, error.name, error.codec, error.code) == (
                kind,
                "$broker",
                JSON,
                "offline",
            )
            assert error.json.keys() == {"code", "message", "name"}
            assert error.json["name"] == "bob"


@pytest.mark.parametrize("name", ["nobody", "$other", "bobb", "BOB"])
def test_message_to_unknown_name_is_no_such_client(name: str) -> None:
    """The configuration does not have the name, and the sender may send to every name."""
    with served() as broker, broker.login("alice") as alice:
        alice.send(MESSAGE, name, b"x", message_id=1)
        assert alice.recv().code == "no_such_client"


def test_message_denied_does_not_reveal_whether_name_exists() -> None:
    """A sender that may not send there gets the same words for existing and missing
    names.
    """
    with (
        served({"alice": {"send_to": ["carol"]}, "bob": None, "carol": None}) as broker,
        broker.login("alice") as alice,
        broker.login("bob"),
    ):
        said = []
        for name in ("bob", "rob", "bob/1", "rob/1"):
            alice.send(MESSAGE, name, b"x", message_id=1)
            error = alice.recv()
            assert error.code == "denied"
            said.append(
                error.body.replace(name.encode(), b"NAME").replace(name.encode()[:3], b"NAME")
            )
        assert said[0] == said[1]
        assert said[2] == said[3]


def test_message_one_byte_over_max_message_is_too_large() -> None:
    """A message of limits.max_message bytes is accepted. One byte more is refused, and
    the connection stays.
    """
    with (
        served(limits={"max_message": 1000}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        alice.send(MESSAGE, "bob", b"x" * 1000, message_id=1)
        alice.send(MESSAGE, "bob", b"x" * 1001, message_id=2)
        alice.send(MESSAGE, "bob", b"last", message_id=3)
        assert [bob.recv().id for _ in range(2)] == [1, 3]
        error = alice.recv()
        assert (error.id, error.code, error.json["name"]) == (2, "too_large", "bob")


def test_message_above_configured_rate_is_rate_limited() -> None:
    """Each message above the configured rate is refused."""
    with (
        served({"alice": {"rate": {"messages": "10/s"}}, "bob": None}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        alice.write(
            b"".join(
                packed(MESSAGE, "bob", message_id=number, flags=WANT_RECEIPT)
                for number in range(200)
            )
        )
        outcomes = [alice.recv() for _ in range(200)]
        assert {frame.id for frame in outcomes} == set(range(200))
        refused = [frame for frame in outcomes if frame.kind == ERROR]
        assert {frame.code for frame in refused} == {"rate_limited"}
        assert 100 <= len(refused) <= 195
        assert len([bob.recv() for _ in range(200 - len(refused))]) == 200 - len(refused)


def test_message_past_its_ttl_is_expired() -> None:
    """A message whose ttl is over when it could be delivered is returned as
    ``expired``.
    """
    with served() as broker, broker.login("alice") as alice, broker.login("bob"):
        alice.send(MESSAGE, "bob", b"x", message_id=1, flags=EXTENSION, between=extension(ttl=0))
        assert alice.recv().code == "expired"
        alice.send(
            MESSAGE,
            "bob",
            b"x",
            message_id=2,
            flags=EXTENSION | WANT_RECEIPT,
            between=extension(ttl=60),
        )
        assert alice.recv().kind == RECEIPT


@pytest.mark.parametrize("ttl", ["soon", None, True, [1]])
def test_message_with_ttl_not_a_number_is_unsupported(ttl: Any) -> None:
    """The ttl is a number of seconds."""
    with served() as broker, broker.login("alice") as alice, broker.login("bob"):
        alice.send(MESSAGE, "bob", b"x", message_id=1, flags=EXTENSION, between=extension(ttl=ttl))
        assert alice.recv().code == "unsupported"


@pytest.mark.parametrize(
    ("kind", "to", "flags"),
    [
        (ACK, "", 0),
        (ACK, "bob", 0),
        (RECEIPT, "bob", 0),
        (MESSAGE, "bob", WANT_ACK),
        (MESSAGE, "$broker", 0),
        (REPLY, "$broker", 0),
    ],
)
def test_frame_not_supported_by_broker_is_unsupported(kind: int, to: str, flags: int) -> None:
    """Frames that the protocol defines and this broker does not handle are answered
    with ``unsupported``.
    """
    with served() as broker, broker.login("alice") as alice, broker.login("bob"):
        alice.send(kind, to, b"x", message_id=1, flags=flags)
        assert (alice.recv().code, alice.ask("ping").kind) == ("unsupported", REPLY)


@pytest.mark.parametrize("when_full", ["refuse", "wait"])
def test_message_to_full_queue_is_full(when_full: str) -> None:
    """The sender gets ``full``, at once or after limits.wait_timeout."""
    with (
        served(
            {"alice": None, "bob": {"queue": "64KiB", "when_full": when_full}},
            limits={"wait_timeout": "200ms"},
        ) as broker,
        broker.login("alice") as alice,
        broker.login("bob"),
    ):
        accepted = 0
        while True:
            alice.send(MESSAGE, "bob", bytes(60_000), message_id=accepted, flags=WANT_RECEIPT)
            outcome = alice.recv()
            assert outcome.id == accepted
            if outcome.kind == ERROR:
                break
            accepted += 1
            assert accepted < 1000
        assert outcome.code == "full"


# Malformed


def header(
    kind: int = 1, flags: int = 0, codec: int = 0, name_len: int = 0, message_id: int = 77
) -> bytes:
    return struct.pack("!BBBBQ", kind, flags, codec, name_len, message_id)


@pytest.mark.parametrize(
    ("body", "message_id"),
    [
        (b"", 0),
        (b"\x01", 0),
        (header()[:11], 0),
        (header(kind=0), 77),
        (header(kind=10), 77),
        (header(kind=255), 77),
        (header(flags=8), 77),
        (header(flags=128), 77),
        (header(name_len=3) + b"bo", 77),
        (header(name_len=0), 77),
        (header(name_len=1) + b"\xff", 77),
        (header(name_len=3) + b"a b", 77),
        (header(name_len=4) + b"-bob", 77),
        (header(name_len=4) + b"bob/", 77),
        (header(name_len=5) + b"bob/A", 77),
        (header(name_len=65) + b"b" * 65, 77),
        (header(name_len=4) + b"bob\n", 77),
        (header(flags=EXTENSION, name_len=3) + b"bob", 77),
        (header(flags=EXTENSION, name_len=3) + b"bob\x00\x05{}", 77),
        (header(flags=EXTENSION, name_len=3) + b"bob\x00\x02[]", 77),
        (header(flags=EXTENSION, name_len=3) + b"bob\x00\x02{,", 77),
        (header(kind=EVENT), 77),
        (header(kind=EVENT) + b"\x00", 77),
        (header(kind=EVENT) + b"\x09jobs", 77),
        (header(kind=EVENT) + b"\x03a..", 77),
        (header(kind=EVENT) + b"\x03a.*", 77),
        (header(kind=EVENT) + b"\x02\xff\xff", 77),
        (header(kind=EVENT, name_len=3) + b"bob\x04jobs", 77),
    ],
)
@pytest.mark.parametrize("step", [0, 1], ids=["whole", "bytewise"])
def test_frame_malformed_gets_error_and_closes_connection(
    body: bytes, message_id: int, step: int
) -> None:
    """The ERROR ``malformed`` has the id if one was readable. Then the connection ends,
    and later frames are ignored.
    """
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        if step:
            alice.write_bytewise(prefixed(body))
        else:
            alice.write(prefixed(body) + packed(MESSAGE, "bob", b"too late"))
        error = alice.recv()
        assert (error.id, error.code, error.name) == (message_id, "malformed", "$broker")
        assert alice.read_to_end() == b""
        assert broker.log.wait("client.disconnected")[0].fields["reason"] == "malformed"
        bob.ping()


@pytest.mark.parametrize("length", [-2, -(2**31), -257])
def test_frame_with_negative_length_is_malformed(length: int) -> None:
    """A negative length other than -1 ends the connection."""
    with served() as broker, broker.login("alice") as alice:
        alice.write(struct.pack("!i", length))
        assert (alice.recv().code, alice.read_to_end()) == ("malformed", b"")


def test_frame_malformed_error_is_sent_after_queued_messages() -> None:
    """The messages that wait for the client are written before the connection ends,
    however slowly it reads.
    """
    with (
        served({"alice": {"queue": "8MiB"}, "bob": None}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        for number in range(40):
            bob.send(MESSAGE, "alice", bytes(100_000), message_id=number, flags=WANT_RECEIPT)
            assert bob.recv().kind == RECEIPT
        # The broker will never read the many bytes after the bad frame.
        alice.sock.setblocking(False)
        data = prefixed(b"bad") + b"x" * 5_000_000
        while data:
            try:
                data = data[alice.sock.send(data) :]
            except BlockingIOError:
                break
        alice.sock.settimeout(30)
        assert [alice.recv().id for _ in range(40)] == list(range(40))
        assert alice.recv().code == "malformed"
        alice.read_to_end()


# How frames arrive


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix"])
def test_message_of_16_mib_is_delivered(listen: str, socket_dir: Path) -> None:
    """A message of 16 MiB, the default limit, arrives whole."""
    payload = os.urandom(1 << 20) * 16
    listen = str(socket_dir / "s") if listen == "unix" else listen
    with (
        served(listen=listen) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        alice.send(MESSAGE, "bob", payload, message_id=1)
        assert bob.recv() == Frame(MESSAGE, 0, 0, "alice", 1, payload)


def test_frame_received_byte_by_byte_is_delivered() -> None:
    """A frame in segments of one byte arrives like any other."""
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        alice.write_bytewise(
            packed(MESSAGE, "bob", b"hello", message_id=1)
            + packed(MESSAGE, "bob", b"again", message_id=2)
        )
        assert [bob.recv().body, bob.recv().body] == [b"hello", b"again"]


@pytest.mark.parametrize("seed", range(4))
def test_frames_split_into_random_segments_are_delivered_in_order(seed: int) -> None:
    """Frames of many sizes arrive in order, wherever the segments are cut."""
    random_ = random.Random(seed)  # the seed is in the test's name
    payloads = [
        random_.randbytes(random_.choice([0, 1, 11, 500, 70_000, 300_000])) for _ in range(60)
    ]
    stream = b"".join(
        packed(MESSAGE, "bob", payload, message_id=message_id)
        for message_id, payload in enumerate(payloads)
    )
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        position = 0
        received = []
        while position < len(stream):
            size = random_.choice([1, 3, 5, 13, 4096, 65536, 262144, 1_000_000])
            alice.write(stream[position : position + size])
            position += size
            while len(received) < len(payloads) and _readable(bob.sock):
                received.append(bob.recv())
        while len(received) < len(payloads):
            received.append(bob.recv())
        assert [frame.id for frame in received] == list(range(60))
        assert [frame.body for frame in received] == payloads


def _readable(sock: socket.socket) -> bool:
    import select

    return bool(select.select([sock], [], [], 0)[0])


def test_frames_thousands_in_one_segment_are_delivered_in_order() -> None:
    """Thousands of messages in one write arrive in order, and none twice."""
    count = 20_000
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        alice.write(
            b"".join(packed(MESSAGE, "bob", b"m", message_id=number) for number in range(count))
        )
        assert [bob.recv().id for _ in range(count)] == list(range(count))


def test_frame_short_with_long_form_of_length_is_delivered() -> None:
    """A short frame may announce its length in the long form too."""
    body = packed(MESSAGE, "bob", b"long form", message_id=1)[4:]
    for step in (0, 1):
        with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
            data = struct.pack("!iQ", -1, len(body)) + body
            alice.write_bytewise(data) if step else alice.write(data)
            assert bob.recv() == Frame(MESSAGE, 0, 0, "alice", 1, b"long form")


@pytest.mark.parametrize("form", ["short", "long"])
@pytest.mark.parametrize("step", ["whole", "bytewise", "length first"])
def test_frame_oversized_is_answered_and_skipped(form: str, step: str) -> None:
    """The error is sent before the frame's end has arrived. None of it is stored, and
    later frames are served.
    """
    size = 3_000_000
    body = packed(MESSAGE, "bob", bytes(size), message_id=9)[4:]
    length = struct.pack("!i", len(body)) if form == "short" else struct.pack("!iQ", -1, len(body))
    with (
        served(limits={"max_message": 1000}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        data = length + body
        head = len(length) + 12 + 3
        if step == "bytewise":
            alice.write_bytewise(data[:head])
        elif step == "length first":
            alice.write(data[: head - 3])
            # The reply to another client proves that the broker has handled these
            # bytes.
            bob.ping()
            alice.write(data[head - 3 : head])
        else:
            alice.write(data[:head])
        error = alice.recv()
        assert (error.id, error.code, error.json["name"]) == (9, "too_large", "bob")
        alice.write(data[head:])
        alice.ping()
        alice.send(MESSAGE, "bob", b"still here")
        assert bob.recv().body == b"still here"


@pytest.mark.parametrize("claim", [2**31 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("step", ["whole", "bytewise"])
def test_frame_with_absurd_length_uses_no_memory(claim: int, step: str) -> None:
    """Whatever length a frame announces, the broker answers and keeps none of its
    bytes.
    """
    body = packed(MESSAGE, "bob", b"", message_id=9)[4:]
    head = (struct.pack("!i", claim) if claim < 2**31 else struct.pack("!iQ", -1, claim)) + body
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        alice.write_bytewise(head) if step == "bytewise" else alice.write(head)
        error = alice.recv()
        assert (error.id, error.code) == (9, "too_large")
        for _ in range(40):
            alice.write(bytes(1 << 20))
        server = broker.daemon._server
        assert server is not None

        def kept() -> int:
            connections = [
                connection
                for connection in server.connections
                if connection.session.address == "alice"
            ]
            return len(connections[0].pending_input) + len(connections[0].large_frame or b"")

        bob.ping()
        assert broker.call(kept) < 1 << 20
        alice.close()
        broker.log.wait("client.disconnected")


def test_frame_oversized_in_pieces_is_not_buffered() -> None:
    """Its first bytes arrive alone, and many more follow. The broker keeps few of them."""
    with (
        served(limits={"max_message": 1000}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        server = broker.daemon._server
        assert server is not None
        body = packed(MESSAGE, "bob", bytes(50_000_000), message_id=9)
        alice.write(body[:10])
        bob.ping()
        alice.sock.settimeout(30)
        alice.write(body[10:])
        error = alice.recv()
        assert (error.id, error.code) == (9, "too_large")
        alice.ping()
        assert broker.call(
            lambda: [
                len(connection.pending_input) + len(connection.large_frame or b"")
                for connection in server.connections
            ]
        ) == [
            0,
            0,
        ]


# The broker as a client


def test_operation_whoami_returns_address_and_limits() -> None:
    """The reply has the name, address, version and limits."""
    with (
        served({"pool": {"connections": 3}}) as broker,
        broker.login("pool") as one,
        broker.login("pool") as other,
    ):
        first, second = one.ask("whoami").json, other.ask("whoami").json
        assert first["name"] == second["name"] == "pool"
        assert first["address"].startswith("pool/")
        assert first["address"] != second["address"]
        assert first["protocol"] == 1
        assert first["limits"]["max_message"] == 16 * 2**20


def test_operation_clients_lists_permitted_recipients() -> None:
    """Each entry has the keys online and since. Other clients are not named."""
    with (
        served({"alice": {"send_to": ["b*"]}, "bob": None, "bert": None, "carol": None}) as broker,
        broker.login("alice") as alice,
        broker.login("bob"),
    ):
        found = {each["name"]: each for each in alice.ask("clients").json["clients"]}
        assert {name: each["online"] for name, each in found.items()} == {
            "bob": True,
            "bert": False,
        }
        assert all(isinstance(each["since"], (int, float)) for each in found.values())


def test_operation_flood_of_one_client_does_not_delay_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A request amid thousands from another client is answered long before the last of
    those. All get a reply.
    """
    served_names: list[str] = []
    all_sent = threading.Event()

    serve = Operations.serve

    def note_and_serve(operations: Operations, source: Session, *rest: Any) -> None:
        if served_names:
            # Else the broker may be done with the first client before the other has sent.
            all_sent.wait(10)
        served_names.append(source.client.name)
        serve(operations, source, *rest)

    monkeypatch.setattr(Operations, "serve", note_and_serve)
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        monkeypatch.setattr(broker.daemon.server.context, "turn_budget", 2)
        # Else the system may keep the request for 40 ms: it waits for an ACK of TCP.
        bob.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        count = 3000
        ping = json.dumps({"op": "ping"}).encode()
        alice.write(
            b"".join(
                packed(REQUEST, "$broker", ping, message_id=number, codec=JSON)
                for number in range(count)
            )
        )
        bob.send(REQUEST, "$broker", ping, message_id=1, codec=JSON)
        all_sent.set()
        assert bob.recv().id == 1
        assert [alice.recv().id for _ in range(count)] == list(range(count))
    assert served_names.index("bob") < 100


def test_sender_disconnected_between_turns_has_all_frames_routed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Frames sent before the connection ended are delivered, however many turns it
    takes.
    """
    with served() as broker, broker.login("bob") as bob:
        monkeypatch.setattr(broker.daemon.server.context, "turn_budget", 1)
        alice = broker.login("alice")
        alice.write(b"".join(packed(REQUEST, "bob", message_id=number) for number in range(500)))
        alice.close()
        assert [bob.recv().id for _ in range(500)] == list(range(500))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"no json",
        b"[]",
        b"{}",
        b'{"op": 1}',
        b'{"op": "fly"}',
        b"[" * 100_000,
        b'{"op":"ping"}\xff',
        b"1" * 5000,
    ],
)
def test_operation_invalid_is_unsupported(payload: bytes) -> None:
    """To any invalid request the broker replies with the request's id, and the
    connection stays.
    """
    with served() as broker, broker.login("alice") as alice:
        alice.send(REQUEST, "$broker", payload, message_id=4, codec=JSON)
        error = alice.recv()
        assert (error.id, error.code) == (4, "unsupported")
        alice.ping()


@pytest.mark.parametrize("op", ["stats", "connections", "disconnect", "reload", "drain", "can"])
def test_operation_of_administrator_without_admin_is_denied(op: str) -> None:
    """Without `admin: true` the reply is ``denied``."""
    with served() as broker, broker.login("alice") as alice:
        assert alice.ask(op).code == "denied"


def test_operation_disconnect_closes_client() -> None:
    """The client's connection ends, and the log names the administrator."""
    with served({"root": {"admin": True}, "bob": None}) as broker, broker.login("root") as root:
        bob = broker.login("bob")
        assert root.ask("disconnect", address="bob").json == {
            "disconnected": ["bob"],
            "channels": 0,
        }
        assert bob.is_closed("disconnected")
        bob.close()
        assert "root" in broker.log.wait("client.disconnected")[0].fields["reason"]
        assert root.ask("disconnect", address="bob").code == "offline"
        assert root.ask("disconnect", address="nobody").code == "no_such_client"


def test_presence_events_arrive_in_order() -> None:
    """A subscriber gets an event for each connect and disconnect, as often as it
    happens.
    """
    with served() as broker, broker.login("alice") as alice:
        assert alice.ask("subscribe", topic="$broker.*.bob").kind == REPLY
        for number in range(5):
            broker.login("bob").close()
            broker.log.wait("client.disconnected", number + 1)
        events = [alice.recv() for _ in range(10)]
        assert [frame.body[1 : 1 + frame.body[0]] for frame in events] == [
            b"$broker.online.bob",
            b"$broker.offline.bob",
        ] * 5


@pytest.mark.parametrize("name", [b"$broker.online.eve", b"$x", b"$broker.draining"])
def test_event_with_reserved_topic_is_denied(name: bytes) -> None:
    """Topics that begin with a dollar sign belong to the broker."""
    with (
        served({"alice": {"publish": [">"]}, "bob": None}) as broker,
        broker.login("alice") as alice,
    ):
        alice.send(EVENT, "", b"lie", between=topic(name), message_id=1)
        assert alice.recv().code == "denied"


def test_subscription_ends_with_connection() -> None:
    """After a reconnect the same client has no subscriptions."""
    with served() as broker, broker.login("alice") as alice:
        bob = broker.login("bob")
        bob.ask("subscribe", topic="x")
        bob.close()
        broker.log.wait("client.disconnected")
        with broker.login("bob") as again:
            alice.send(EVENT, "", b"x", between=topic(b"x"))
            alice.ping()
            again.ping()


def test_frames_of_mixed_kinds_between_two_connections_keep_order() -> None:
    """Messages and requests arrive in the order sent, although receipts are mixed in."""
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        kinds = [MESSAGE, REQUEST, MESSAGE]
        alice.write(
            b"".join(
                packed(
                    kinds[number % 3],
                    "bob",
                    b"x" * (number % 50),
                    message_id=number,
                    flags=number % 2,
                )
                for number in range(3000)
            )
        )
        assert [bob.recv().id for _ in range(3000)] == list(range(3000))
        with login(broker.address, key_of("carol")) as carol:
            carol.ping()


def test_timer_deadline_in_past_ticks_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a busy machine a held sender's time may be over before the timer is set.
    Another deadline may be earlier still.
    """
    with served({"alice": None}) as broker:
        server = broker.daemon.server
        ticks: list[float] = []

        def set_twice() -> None:
            for seconds in (1.0, 2.0):
                deadline = server.loop.time() - seconds
                monkeypatch.setattr(
                    broker_module.Broker, "next_deadline", property(lambda self, at=deadline: at)
                )
                server.context.settlement._set_timer()
            monkeypatch.undo()
            monkeypatch.setattr(server.broker, "tick", ticks.append)

        broker.call(set_twice)
        broker.call(lambda: None)
        assert broker.call(lambda: len(ticks)) == 1


def test_message_queued_past_its_ttl_is_returned_expired(socket_dir: Path) -> None:
    """A message that waits in the broker for longer than its ttl is returned as
    `expired`. The others arrive.
    """
    with (
        served({"alice": None, "bob": None}, str(socket_dir / "s")) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        extension = b'{"ttl": 0.05}'
        # This is more than the system's buffers take, so that later messages wait in
        # the broker.
        for _ in range(40):
            alice.send(MESSAGE, "bob", bytes(100_000))
        for message_id in range(1, 4):
            between = len(extension).to_bytes(2) + extension
            alice.send(
                MESSAGE, "bob", b"late", message_id=message_id, flags=EXTENSION, between=between
            )
        alice.send(MESSAGE, "bob", b"the end", message_id=4)
        alice.ping()
        time.sleep(0.1)
        while (frame := bob.recv()).body != b"the end":
            assert len(frame.body) == 100_000
        errors = [alice.recv() for _ in range(3)]
        assert [(error.id, error.code) for error in errors] == [
            (1, "expired"),
            (2, "expired"),
            (3, "expired"),
        ]


@pytest.mark.parametrize("kind", [MESSAGE, REPLY])
def test_frame_whose_expiry_is_reported_to_its_recipient_leaves_its_connection_open(
    socket_dir: Path, kind: int
) -> None:
    """The ERROR about a message to oneself, and about an answer, goes into the outbox that
    is just being written.
    """
    # A Unix socket takes some 200 KB, TCP any number of megabytes.
    with (
        served("alice bob", str(socket_dir / "s")) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        alice.send(REQUEST, "bob", message_id=1)
        assert bob.recv().id == 1
        sender = bob if kind == REPLY else alice
        for _ in range(40):
            sender.send(MESSAGE, "alice", bytes(100_000))
        sender.send(MESSAGE, "alice", b"first")
        late = packed(kind, "alice", message_id=1, flags=EXTENSION, between=extension(ttl=0.05))
        sender.write(late + packed(MESSAGE, "alice", b"last"))
        sender.send(REQUEST, "bob", message_id=2)
        while bob.recv().id != 2:
            pass
        time.sleep(0.1)
        frames = [alice.recv() for _ in range(43)]
        assert [frame.body for frame in frames if frame.kind == MESSAGE][-2:] == [b"first", b"last"]
        assert [(frame.id, frame.code) for frame in frames if frame.kind == ERROR] == [
            (1, "expired")
        ]
        alice.ping()


def test_pinned_request_behind_a_cancel_does_not_overtake_one_that_waits() -> None:
    """The place that a cancel frees belongs to the request that waits for it."""
    clients = {"alice": None, "pool": {"connections": 2, "in_flight": 1}}
    with (
        served(clients) as broker,
        broker.login("alice") as alice,
        broker.login("pool") as member,
    ):
        to = member.ask("whoami").json["address"]
        alice.write(
            packed(REQUEST, to, message_id=1)
            + packed(REQUEST, to, message_id=2)
            + packed(ERROR, "$broker", b'{"code": "cancelled"}', message_id=1, codec=JSON)
            + packed(REQUEST, to, message_id=3)
        )
        assert [member.recv().id for _ in range(2)] == [1, 2]
        member.send(REPLY, "alice", message_id=2)
        assert member.recv().id == 3


def test_event_burst_to_many_subscribers_is_routed_in_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A read with many events is split where copying them would take long. All events
    arrive in order.
    """
    monkeypatch.setattr(connection_module, "NARROW", 2)
    monkeypatch.setattr(session_module, "NARROW", 2)
    monkeypatch.setattr(connection_module, "_COPIED", 300)
    taken = 0
    take_turn = Connection.take_turn

    def counted(self: Connection) -> None:
        nonlocal taken
        taken += self.waits
        take_turn(self)

    monkeypatch.setattr(Connection, "take_turn", counted)
    names = ["m0", "m1", "m2", "m3"]
    with served(" ".join(["alice", *names])) as broker, broker.login("alice") as alice:
        members = [broker.login(name) for name in names]
        for member in members:
            member.ask("subscribe", topic="t")
        alice.send(EVENT, "", b"\x01tfirst")
        alice.ping()
        event = struct.pack("!iBBBBQ", 12 + 2 + 4, EVENT, 0, 0, 0, 0) + b"\x01t"
        large = struct.pack("!iBBBBQ", 12 + 2 + 999, EVENT, 0, 0, 0, 0) + b"\x01t" + b"x" * 999
        alice.sock.sendall(
            b"".join(event + b"%04d" % number for number in range(50)) + large + event + b"last"
        )
        for member in members:
            got = [member.recv().body[2:] for _ in range(53)]
            assert got == [
                b"first",
                *(b"%04d" % number for number in range(50)),
                b"x" * 999,
                b"last",
            ]
            member.close()
    assert taken > 10


def test_message_that_stays_in_routing_loop_is_settled_by_its_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the read of such a message, the broker only writes. A frame that leaves the
    loop is settled whole.
    """
    looks = 0
    has_deferred_work = broker_module.Broker.has_deferred_work.fget
    assert has_deferred_work is not None

    def counted(broker: broker_module.Broker) -> Any:
        nonlocal looks
        looks += 1
        return has_deferred_work(broker)

    monkeypatch.setattr(broker_module.Broker, "has_deferred_work", property(counted))
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        alice.send(MESSAGE, "bob", b"first")
        alice.ping()
        assert bob.recv().body == b"first"
        before = broker.call(lambda: looks)
        for number in range(3):
            alice.send(MESSAGE, "bob", b"%d" % number)
            assert bob.recv().body == b"%d" % number
        assert broker.call(lambda: looks) == before
        alice.ping()
        assert broker.call(lambda: looks) > before
