"""deliver_challenge and answer_challenge, for those who shake hands themselves;
XmlListener and XmlClient.
"""

from __future__ import annotations

import contextlib
import hmac
import multiprocessing
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokerd_client import errors
from brokerd_client.connection import (
    AuthenticationError,
    Client,
    Listener,
    Pipe,
    UndecodablePayload,
    XmlClient,
    XmlConnection,
    XmlListener,
    answer_challenge,
    answerChallenge,
    deliver_challenge,
    deliverChallenge,
    wait,
)

TIMEOUT_S = 30


@pytest.mark.parametrize(
    ("deliver", "answer"),
    [(deliver_challenge, answer_challenge), (deliverChallenge, answerChallenge)],
)
@pytest.mark.parametrize("digest", ["sha256", "sha384", "sha3_256", "sha3_384", "md5"])
def test_challenge_same_key_is_accepted(deliver: Any, answer: Any, digest: str, aside: Any) -> None:
    """Both names of both functions agree on a key, with every digest, given as text and
    as bytes.
    """
    one, other = Pipe()
    with one, other:
        delivered = aside(deliver, one, "kéy", digest)
        answer(other, "kéy".encode())
        assert delivered.result(TIMEOUT_S) is None


def test_challenge_other_key_is_rejected_on_both_sides(aside: Any) -> None:
    """With different keys both functions raise the standard library's
    AuthenticationError, and tell who rejected.
    """
    one, other = Pipe()
    with one, other:
        delivered = aside(deliver_challenge, one, b"one key")
        with pytest.raises(
            multiprocessing.AuthenticationError, match="the peer rejected our answer"
        ):
            answer_challenge(other, b"another key")
        error = delivered.exception(TIMEOUT_S)
        assert isinstance(error, multiprocessing.AuthenticationError)
        assert "not accepted here" in str(error)


def test_challenge_md5_switched_off_is_refused(aside: Any) -> None:
    """With allow_md5=False an answer made with HMAC-MD5 is not good enough."""
    one, other = Pipe()
    with one, other:
        delivered = aside(deliver_challenge, one, b"key", "md5", allow_md5=False)
        with pytest.raises(AuthenticationError, match="the peer rejected"):
            answer_challenge(other, b"key")
        with pytest.raises(AuthenticationError, match="allow_md5"):
            delivered.result(TIMEOUT_S)


def test_challenge_empty_key_authenticates(aside: Any) -> None:
    """An empty key meets an empty key, and no other."""
    for listeners, meets in ((b"", True), (b"key", False)):
        one, other = Pipe()
        with one, other:
            delivered = aside(deliver_challenge, one, listeners)
            if meets:
                answer_challenge(other, "")
                delivered.result(TIMEOUT_S)
            else:
                with pytest.raises(AuthenticationError):
                    answer_challenge(other, "")
                with pytest.raises(AuthenticationError):
                    delivered.result(TIMEOUT_S)


def test_challenge_calls_of_a_listener_authenticate_a_client(aside: Any) -> None:
    """deliver_challenge before answer_challenge makes a listener, which answers a
    Client's marked challenge.
    """
    with Listener() as listener:
        dialed = aside(Client, listener.address, authkey=b"key", timeout=TIMEOUT_S)
        with listener.accept(TIMEOUT_S) as accepted:
            deliver_challenge(accepted, b"key")
            answer_challenge(accepted, b"key")
            with dialed.result(TIMEOUT_S) as client:
                client.send(1)
                assert accepted.recv() == 1


def test_challenge_calls_of_a_client_authenticate_at_a_listener(aside: Any) -> None:
    """answer_challenge before deliver_challenge makes a client, whose challenge is
    marked.
    """
    with Listener(authkey=b"key") as listener:
        accepted = aside(listener.accept, TIMEOUT_S)
        with Client(listener.address) as client:
            answer_challenge(client, b"key")
            deliver_challenge(client, b"key")
            with accepted.result(TIMEOUT_S) as server:
                server.send(1)
                assert client.recv() == 1


def test_challenge_calls_mark_the_client_s_challenge_only(aside: Any) -> None:
    """A listener's challenge is the standard library's; a client's has the mark."""
    one, other = Pipe()
    with one, other:
        delivered = aside(deliver_challenge, one, b"key")
        challenge = other.recv_bytes()
        assert len(challenge) == len(b"#CHALLENGE#{sha256}") + 40
        other.send_bytes(b"{sha256}" + hmac.digest(b"key", challenge[11:], "sha256"))
        assert other.recv_bytes() == b"#WELCOME#"
        delivered.result(TIMEOUT_S)
    one, other = Pipe()
    with one, other:
        other.send_bytes(b"#CHALLENGE#{sha256}" + bytes(40))
        other.send_bytes(b"#WELCOME#")
        answer_challenge(one, b"key")
        delivered = aside(deliver_challenge, one, b"key")
        other.recv_bytes()
        challenge = other.recv_bytes()
        assert challenge.endswith(b"\0client")
        assert len(challenge) == len(b"#CHALLENGE#{sha256}") + 40 + len(b"\0client")
        other.send_bytes(b"{sha256}" + hmac.digest(b"key", challenge[11:], "sha256"))
        delivered.result(TIMEOUT_S)


def test_connection_errors_are_the_library_s() -> None:
    """The exceptions of this module are those of brokerd_client.errors, and the
    standard library's too.
    """
    assert AuthenticationError is errors.AuthenticationError
    assert issubclass(AuthenticationError, multiprocessing.AuthenticationError)
    assert issubclass(errors.BufferTooShort, multiprocessing.BufferTooShort)


TAGS = (
    *(
        "params",
        "param",
        "value",
        "array",
        "data",
        "struct",
        "member",
        "name",
        "fault",
        "methodResponse",
        "methodCall",
    ),
    *(
        "methodName",
        "nil",
        "int",
        "i4",
        "i8",
        "bigdecimal",
        "double",
        "boolean",
        "string",
        "base64",
        "dateTime.iso8601",
    ),
)
TOKENS = [
    *(form.encode() for tag in TAGS for form in (f"<{tag}>", f"</{tag}>", f"<{tag}/>")),
    *(
        b"1",
        b"x",
        b" ",
        b"\0",
        b"&lt;",
        b"&#0;",
        b"&unknown;",
        b"<!--",
        b"-->",
        b"<![CDATA[",
        b"]]>",
        b"<?xml version='1.0'?>",
    ),
    *(b"1e999", b"nan", b"20260101T00:00:00", b"faultCode", b"<ex:nil/>", b"9" * 5000),
]


def test_xml_carries_plain_values(aside: Any) -> None:
    """XmlListener and XmlClient pass what XML-RPC has values for, and raw messages
    beside them.
    """
    with XmlListener(authkey="k") as listener:
        accepting = aside(listener.accept, TIMEOUT_S)
        with (
            XmlClient(listener.address, authkey="k", timeout=TIMEOUT_S) as dialer,
            accepting.result() as accepted,
        ):
            value = [1, 2.5, "tèxt", None, {"key": [True]}]
            dialer.send(value)
            assert wait([accepted], TIMEOUT_S) == [accepted]
            assert accepted.recv() == value
            accepted.sendBytes(b"raw")
            assert dialer.poll(TIMEOUT_S)
            assert dialer.recv_bytes() == b"raw"
            with pytest.raises(TypeError):
                dialer.send(object)
        assert dialer.closed


def xml_of(message: bytes) -> Any:
    """Send the bytes to an XmlConnection; return what it makes of them, and see that it
    goes on.
    """
    one, other = Pipe()
    with one, other:
        one.send_bytes(message)
        XmlConnection(one).send("behind")
        receiver = XmlConnection(other)
        try:
            return receiver.recv()
        finally:
            assert receiver.recv() == "behind"


VALUE = b"<params><param><value>%s</value></param></params>"


@pytest.mark.parametrize(
    "message",
    [
        b"",
        pickle.dumps({"a": "pickle"}),
        b"not XML",
        b"\xff\xfe<\0",
        b"<params></params>",
        b"<params><param></param></params>",
        b"<params><param><value>1</value></param><param><value>2</value></param></params>",
        b"<methodCall><methodName>x</methodName>" + VALUE % b"1" + b"</methodCall>",
        (
            b"<methodResponse><fault><value><struct><member><name>faultCode</name><value><int>1</int></value></member>"
            b"<member><name>faultString</name><value>x</value></member></struct></value></fault></methodResponse>"
        ),
        b"<fault><value><int>1</int></value></fault>",
        VALUE % b"<int>one</int>",
        VALUE % (b"<int>" + b"9" * 5000 + b"</int>"),
        VALUE % b"<double>x</double>",
        VALUE % b"<boolean>7</boolean>",
        VALUE % b"<base64>abc</base64>",
        VALUE % b"<struct><member><value>1</value></member></struct>",
        VALUE % b"<struct><name>x</name></struct>",
        VALUE % b"<unheard-of>1</unheard-of>",
        b"<struct></value></struct>",
        b"<value><array><data></data></value></array>",
        b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>' + VALUE % b"&b;",
    ],
)
def test_xml_recv_of_hostile_bytes_raises_undecodable_payload(message: bytes) -> None:
    """Whatever the peer sends, the error is the documented one, and the next message is
    received.
    """
    with pytest.raises(UndecodablePayload):
        print(xml_of(message))


@given(st.lists(st.sampled_from(TOKENS), max_size=30).map(b"".join) | st.binary(max_size=60))
def test_xml_recv_of_anything_returns_or_raises_undecodable_payload(message: bytes) -> None:
    """Tags of XML-RPC in any order, and bytes: a value, or the documented error."""
    with contextlib.suppress(UndecodablePayload):
        xml_of(message)
