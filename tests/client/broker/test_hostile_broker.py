"""A broker that knows the key and breaks the rules: both faces end every call, and say
so with documented errors.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.client_faces import PATIENCE, Asyncio, Blocking, Face
from support.fake_broker import FakeServer, Session

from brokerd_client.errors import (
    AuthenticationError,
    Disconnected,
    Offline,
    ProtocolError,
    RateLimited,
    RequestFailed,
    TimedOut,
)
from brokerd_client.wire.envelope import HEADER, Envelope, ErrorCode, Kind, encode
from brokerd_client.wire.framing import frame

#: What connect() may raise when its arguments are right: docs/client.md, "Connecting".
DOCUMENTED = (AuthenticationError, Disconnected, TimedOut, ProtocolError)
IDENTITY = {"name": "alice", "address": "alice", "version": "0", "protocol": 1, "limits": {}}


@pytest.fixture(params=[Blocking, Asyncio], ids=["blocking", "asyncio"])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    """Each of the two faces."""
    face: Face = request.param()
    yield face
    face.close()


def answering(
    op: str, answer: Callable[[Envelope], bytes]
) -> Callable[[Session, Envelope], object]:
    """Return an intercept that answers one operation with these bytes, a frame or not."""

    def intercept(session: Session, envelope: Envelope) -> object:
        if envelope.name != "$broker" or json.loads(envelope.payload).get("op") != op:
            return False
        session.out += answer(envelope)
        return True

    return intercept


def reply(payload: bytes) -> Callable[[Envelope], bytes]:
    """Return what makes the broker's REPLY with this payload."""
    return lambda envelope: frame(encode(Envelope(Kind.REPLY, envelope.id, "$broker", payload, 2)))


def said(**changes: Any) -> Callable[[Envelope], bytes]:
    """Return what makes an introduction with these changes; None takes a field away."""
    answer = {key: value for key, value in {**IDENTITY, **changes}.items() if value is not None}
    return reply(json.dumps(answer).encode())


def extended(raw: bytes) -> Callable[[Envelope], bytes]:
    """Return what makes a REPLY with these bytes for its extension."""
    return lambda envelope: frame(
        HEADER.pack(Kind.REPLY, 2, 2, 7, envelope.id),
        b"$broker",
        len(raw).to_bytes(2, "big"),
        raw,
        b"{}",
    )


INTRODUCTIONS: dict[str, Callable[[Envelope], bytes]] = {
    "empty": reply(b""),
    "list": reply(b"[1]"),
    "number": reply(b"7"),
    "no json": reply(b"{"),
    "no text": reply(b"\xff\xfe\xfd"),
    "deep": reply(b"[" * 100_000),
    "digits": reply(b'{"name":' + b"9" * 5000 + b"}"),
    "long": said(version="x" * 2**20),
    "no name": said(name=None),
    "name not text": said(name=5),
    "name of others": said(name="bob", address="bob"),
    "name with a surrogate": said(name="\ud800", address="\ud800"),
    "name of the broker": said(name="$broker", address="$broker"),
    "name too long": said(name="a" * 65, address="a" * 65),
    "no address": said(address=None),
    "address not text": said(address=["alice"]),
    "address of others": said(address="bob"),
    "address with a surrogate": said(address="alice/\ud800"),
    "address of no instance": said(address="alice/"),
    "limits not an object": said(limits=[1]),
    "limit not a number": said(limits={"max_message": "16MiB"}),
    "limit not an integer": said(limits={"max_message": 1.5}),
    "limit below zero": said(limits={"max_message": -1}),
    "extension": extended(b"{"),
    "deep extension": extended(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"),
    "length": lambda envelope: b"\xff\xff\xff\xfe",
    "announced": lambda envelope: b"\x7f\xff\xff\xff" + b"x" * 100_000,
    "long announced": lambda envelope: b"\xff" * 12,
    "refused": lambda envelope: frame(
        encode(Envelope(Kind.ERROR, envelope.id, "$broker", b'{"code":"denied","message":"no"}', 2))
    ),
    "refused without a word": lambda envelope: frame(
        encode(Envelope(Kind.ERROR, envelope.id, "$broker", b"", 2))
    ),
    "refused deeply": lambda envelope: frame(
        encode(
            Envelope(
                Kind.ERROR, envelope.id, "$broker", b'{"code":' + b"[" * 900 + b"]" * 900 + b"}", 2
            )
        )
    ),
}


@pytest.mark.parametrize("wrong", INTRODUCTIONS)
def test_connect_answered_with_nonsense_raises_a_documented_error(
    face: Face, server: FakeServer, wrong: str
) -> None:
    """Whatever the broker answers to whoami, the errors of connect() are a closed set."""
    server.broker.intercept = answering("whoami", INTRODUCTIONS[wrong])
    with pytest.raises(DOCUMENTED) as caught:
        face.connect(server.path, "alice", b"alice", timeout=PATIENCE)
    assert type(caught.value) is (Disconnected if wrong.startswith("refused") else ProtocolError)


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\xff" * 100,
        b"\0" * 100,
        b"\0\0\0\x05hello",
    ],
)
def test_connect_to_no_broker_raises_a_documented_error(
    face: Face, server: FakeServer, said: bytes
) -> None:
    """The handshake's mistakes are among them."""

    def speak(session: Session) -> None:
        session.out[:] = said

    begin = Session.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Session, "__init__", lambda self, broker: (begin(self, broker), speak(self))[0]
        )
        with pytest.raises(DOCUMENTED) as caught:
            face.connect(server.path, "alice", b"alice", timeout=PATIENCE)
    assert not isinstance(caught.value, TimedOut)


def test_reconnect_with_another_name_is_given_up(face: Face, server: FakeServer) -> None:
    """The new connection is given up, the next is tried, and the name never becomes one
    that kills the client.
    """
    client = face.connect(server.path, "alice", b"alice", timeout=PATIENCE)
    server.broker.intercept = answering("whoami", said(name="\ud800", address="\ud800"))
    server.drop("alice")
    with pytest.raises(Disconnected):
        client.request("alice", "?", timeout=0.5)
    assert client.name == "alice"
    server.broker.intercept = None
    assert client.ping() < PATIENCE


@pytest.mark.parametrize("answer", [b"[1]", b"7", b"", b"\xff", b"{", b"[" * 50_000])
@pytest.mark.parametrize("op", ["ping", "clients", "subscribe", "whoami"])
def test_operation_answered_with_nonsense_raises(
    face: Face, server: FakeServer, op: str, answer: bytes
) -> None:
    """Its caller hears of it at once, with or without a timeout, and the client goes
    on.
    """
    client = face.connect(server.path, "alice", b"alice", timeout=PATIENCE)
    server.broker.intercept = answering(op, reply(answer))
    calls: dict[str, Callable[[], object]] = {
        "ping": client.ping,
        "clients": client.clients,
        "subscribe": lambda: client.subscribe("a", timeout=None),
        "whoami": lambda: client.control("whoami", timeout=None),
    }
    with pytest.raises(ProtocolError):
        calls[op]()
    server.broker.intercept = None
    client.ping()
    assert client.counters["losses"] == 0


def test_clients_answered_with_a_list_that_is_not_valid_raises(
    face: Face, server: FakeServer
) -> None:
    """What is no client's name or state is not handed out."""
    client = face.connect(server.path, "alice", b"alice", timeout=PATIENCE)
    for entry in ('{"name": 5, "online": true}', '{"name": "a", "online": "yes"}', "[]"):
        server.broker.intercept = answering(
            "clients", reply(b'{"clients":[' + entry.encode() + b"]}")
        )
        with pytest.raises(ProtocolError):
            client.clients()
        with pytest.raises(ProtocolError):
            client.watch_presence()


def test_message_unreadable_is_skipped(
    face: Face, server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged and counted, a request is answered, and the next message arrives on
    the same connection.
    """
    client = face.connect(server.path, "alice", b"alice", timeout=PATIENCE)
    raw = b'{"a":' + b"[" * 976 + b"]" * 976 + b"}"

    def send(broker: Any) -> None:
        for kind in (Kind.MESSAGE, Kind.REQUEST):
            broker.online["alice"].out += frame(
                HEADER.pack(kind, 2, 0, 3, 9), b"bob", len(raw).to_bytes(2, "big"), raw, b"x"
            )
        broker.online["alice"].deliver(Envelope(Kind.MESSAGE, 1, "bob", b"next"))

    server.broker.seen.clear()
    server.act(send)
    assert client.recv(PATIENCE).body == b"next"
    client.ping()
    answers = [
        json.loads(each.payload)["code"] for each in server.broker.seen if each.kind is Kind.ERROR
    ]
    assert answers == ["unreadable"]
    assert (client.counters["unreadable"], client.counters["losses"]) == (2, 0)
    assert [
        record.levelname for record in caplog.records if "was skipped" in record.getMessage()
    ] == ["WARNING"] * 2


@pytest.mark.parametrize(
    ("codec", "payload"), [(2, b"\xff"), (2, b"[" * 5000), (1, b"junk"), (3, b"\xc1"), (77, b"?")]
)
def test_request_with_undecodable_payload_is_answered(
    face: Face, server: FakeServer, codec: int, payload: bytes
) -> None:
    """The handler that looks at it fails, its requester hears of that, and the next
    request is handled.
    """
    client = face.connect(
        server.path, "alice", b"alice", timeout=PATIENCE, allow_pickle_from=["bob"]
    )
    client.on_request(lambda request: request.payload)
    server.broker.seen.clear()
    server.act(
        lambda broker: [
            broker.online["alice"].deliver(Envelope(Kind.REQUEST, 1, "bob", payload, codec)),
            broker.online["alice"].deliver(Envelope(Kind.REQUEST, 2, "bob", b"7", 2)),
        ]
    )
    end = time.monotonic() + PATIENCE
    answers: dict[int, Envelope] = {}
    while len(answers) < 2 and time.monotonic() < end:
        time.sleep(0.01)
        answers = {
            each.id: each for each in server.broker.seen if each.kind in (Kind.REPLY, Kind.ERROR)
        }
    assert (answers[1].kind, answers[2].kind, answers[2].payload) == (Kind.ERROR, Kind.REPLY, b"7")
    assert b"UndecodablePayload" in answers[1].payload
    assert client.counters["losses"] == 0


def test_error_without_payload_is_refusal(face: Face, server: FakeServer) -> None:
    """It still has a code and a text."""
    client = face.connect(server.path, "alice", b"alice", timeout=PATIENCE)

    def intercept(session: Session, envelope: Envelope) -> object:
        session.deliver(Envelope(Kind.ERROR, envelope.id, "$broker", b"", 2))
        return True

    server.broker.intercept = intercept
    with pytest.raises(RequestFailed, match="no reason was given") as caught:
        client.request("bob", "?", timeout=PATIENCE)
    assert caught.value.code == "failed"


def test_error_of_client_with_deep_payload_is_outcome(face: Face, server: FakeServer) -> None:
    """What another client puts into its ERROR can't end this client's connection."""
    client = face.connect(server.path, "alice", b"alice", timeout=PATIENCE)
    for payload in (
        b'{"code":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"message":"\\ud800","code":7}',
    ):

        def intercept(session: Session, envelope: Envelope, payload: bytes = payload) -> object:
            if envelope.name != "bob":
                return False
            session.deliver(Envelope(Kind.ERROR, envelope.id, "bob", payload, 2))
            return True

        server.broker.intercept = intercept
        with pytest.raises(RequestFailed) as caught:
            client.request("bob", "?", timeout=PATIENCE)
        str(caught.value).encode()
    assert client.counters["losses"] == 0


def test_error_text_is_cut(face: Face, server: FakeServer) -> None:
    """What an error says is for people: a broker can't fill memory with it."""
    client = face.connect(server.path, "alice", b"alice", timeout=PATIENCE)
    payload = json.dumps({"code": "offline", "message": "m" * 100_000, "name": "bob"}).encode()

    def intercept(session: Session, envelope: Envelope) -> object:
        session.deliver(Envelope(Kind.ERROR, envelope.id, "$broker", payload, 2))
        return True

    server.broker.intercept = intercept
    with pytest.raises(Offline) as caught:
        client.request("bob", "?", timeout=PATIENCE)
    assert len(str(caught.value)) == 1000


def test_introduction_refused_at_reconnect_is_repeated(face: Face, server: FakeServer) -> None:
    """A client that is over its rate when it connects again is let in later, and not
    given up.
    """
    client = face.connect(server.path, "alice", b"alice", timeout=PATIENCE)
    refused = 0

    def intercept(session: Session, envelope: Envelope) -> object:
        nonlocal refused
        if b"whoami" not in envelope.payload or refused == 2:
            return False
        refused += 1
        server.broker.refuse(session, envelope, ErrorCode.RATE_LIMITED)
        return True

    server.broker.intercept = intercept
    server.drop("alice")
    while client.counters["losses"] + client.counters["failed_attempts"] < 3:
        time.sleep(0.01)
    client.ping()
    assert refused == 2


def test_connect_refused_has_refusal_as_cause(face: Face, server: FakeServer) -> None:
    """The refusal itself is the cause of the error."""
    server.broker.intercept = lambda session, envelope: (
        server.broker.refuse(session, envelope, ErrorCode.RATE_LIMITED),
        True,
    )
    with pytest.raises(Disconnected, match="refused") as caught:
        face.connect(server.path, "alice", b"alice", timeout=PATIENCE)
    assert isinstance(caught.value.__cause__, RateLimited)


@pytest.mark.parametrize("seed", range(4))
def test_calls_answered_with_random_bytes_all_end(
    face: Face, server: FakeServer, seed: int
) -> None:
    """Whatever follows, a call returns or raises before its timeout is long over."""
    draw = random.Random(seed)
    client = face.connect(server.path, "alice", b"alice", timeout=PATIENCE)

    def intercept(session: Session, envelope: Envelope) -> object:
        if envelope.payload == b'{"op":"whoami"}':
            return False
        body = bytearray(encode(Envelope(Kind.REPLY, envelope.id, "$broker", b'{"clients":[]}', 2)))
        for _ in range(draw.randrange(3)):
            body[draw.randrange(len(body))] = draw.randrange(256)
        session.out += frame(bytes(body))
        return True

    server.broker.intercept = intercept
    for _ in range(30):
        with contextlib.suppress(ProtocolError, Disconnected, TimedOut, RequestFailed):
            client.control(draw.choice(["ping", "clients", "subscribe"]), timeout=0.05)
