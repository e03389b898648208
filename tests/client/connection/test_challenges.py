"""deliver_challenge and answer_challenge, for those who shake hands themselves; XmlListener and XmlClient."""

from __future__ import annotations

import multiprocessing
import xml.parsers.expat
from typing import Any

import pytest

from brokerd_client import errors
from brokerd_client.connection import (
    AuthenticationError,
    InvalidKey,
    Pipe,
    XmlClient,
    XmlListener,
    answer_challenge,
    answerChallenge,
    deliver_challenge,
    deliverChallenge,
    wait,
)

TIMEOUT_S = 30


@pytest.mark.parametrize(
    ("deliver", "answer"), [(deliver_challenge, answer_challenge), (deliverChallenge, answerChallenge)]
)
@pytest.mark.parametrize("digest", ["sha256", "sha384", "sha3_256", "sha3_384", "md5"])
def test_same_key_is_accepted(deliver: Any, answer: Any, digest: str, aside: Any) -> None:
    """Both names of both functions agree on a key, with every digest, given as text and as bytes."""
    one, other = Pipe()
    with one, other:
        delivered = aside(deliver, one, "kéy", digest)
        answer(other, "kéy".encode())
        assert delivered.result(TIMEOUT_S) is None


def test_other_key_is_rejected_on_both_sides(aside: Any) -> None:
    """With different keys both functions raise the standard library's AuthenticationError, and tell who rejected."""
    one, other = Pipe()
    with one, other:
        delivered = aside(deliver_challenge, one, b"one key")
        with pytest.raises(multiprocessing.AuthenticationError, match="the peer rejected our answer"):
            answer_challenge(other, b"another key")
        error = delivered.exception(TIMEOUT_S)
        assert isinstance(error, multiprocessing.AuthenticationError)
        assert "not accepted here" in str(error)


def test_md5_can_be_switched_off(aside: Any) -> None:
    """With allow_md5=False an answer made with HMAC-MD5 is not good enough."""
    one, other = Pipe()
    with one, other:
        delivered = aside(deliver_challenge, one, b"key", "md5", allow_md5=False)
        with pytest.raises(AuthenticationError, match="the peer rejected"):
            answer_challenge(other, b"key")
        with pytest.raises(AuthenticationError, match="allow_md5"):
            delivered.result(TIMEOUT_S)


def test_empty_key_challenges_nobody() -> None:
    """An empty key is refused before anything is sent."""
    one, other = Pipe()
    with one, other:
        for function in (deliver_challenge, answer_challenge):
            with pytest.raises(InvalidKey):
                function(one, b"")
        assert not other.poll()


def test_errors_are_the_libraries_own() -> None:
    """The exceptions of this module are those of brokerd_client.errors, and the standard library's too."""
    assert AuthenticationError is errors.AuthenticationError
    assert issubclass(AuthenticationError, multiprocessing.AuthenticationError)
    assert issubclass(errors.BufferTooShort, multiprocessing.BufferTooShort)


def test_xml_carries_plain_values(aside: Any) -> None:
    """XmlListener and XmlClient pass what XML-RPC has values for, and raw messages beside them."""
    with XmlListener(authkey="k") as listener:
        accepting = aside(listener.accept, TIMEOUT_S)
        with XmlClient(listener.address, authkey="k", timeout=TIMEOUT_S) as dialer, accepting.result() as accepted:
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


def test_xml_runs_nothing(aside: Any) -> None:
    """A pickle sent to an XML connection is an error of the parser, and is not unpickled."""
    with XmlListener() as listener, XmlClient(listener.address) as dialer, listener.accept(TIMEOUT_S) as accepted:
        dialer._connection.send({"a": "pickle"})
        with pytest.raises((xml.parsers.expat.ExpatError, UnicodeDecodeError)):
            accepted.recv()
