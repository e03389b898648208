"""The handshake without a socket: both roles joined, in pieces of any size, with wrong
messages and with garbage.
"""

from __future__ import annotations

import hmac
import traceback
from collections.abc import Callable, Iterable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokerd_client.errors import AuthenticationError, FrameTooBig
from brokerd_client.wire import handshake
from brokerd_client.wire.framing import FrameReader, frame
from brokerd_client.wire.handshake import (
    CHALLENGE,
    DIGESTS,
    FAILURE,
    LIMIT,
    NONCE_SIZE,
    RECEIVE,
    WELCOME,
    Established,
    Handshake,
    Proof,
    Send,
    answer_challenge,
    as_dialer,
    as_listener,
    deliver_challenge,
)

KEY = b"alice's key"
NONCE = bytes(range(NONCE_SIZE))
OTHER_NONCE = bytes(range(100, 100 + NONCE_SIZE))


class Side:
    """One end of a handshake: bytes in, bytes out, and at the end a result or an error.

    Args:
        keys: The keys against which a Proof is checked, to find the key of an answer.
    """

    def __init__(self, conversation: Handshake, keys: Iterable[bytes] = (KEY,)) -> None:
        self._conversation = conversation
        self._keys = list(keys)
        self.reader = FrameReader()
        self.outgoing = bytearray()
        self.sent: list[bytes] = []
        self.proofs: list[Proof] = []
        self.result: Established | None = None
        self.error: AuthenticationError | None = None
        self._waiting = False
        self._resume(None)

    def feed(self, data: bytes) -> None:
        """Take bytes from the stream, as far as the conversation wants them."""
        self.reader.feed(data)
        while self._waiting:
            body = self.reader.next_frame(LIMIT)
            if body is None:
                return
            self._waiting = False
            self._resume(body)

    def take_outgoing(self) -> bytes:
        """Return the bytes to be sent, and remove them."""
        data = bytes(self.outgoing)
        self.outgoing.clear()
        return data

    @property
    def done(self) -> bool:
        """Whether the conversation is over, with a result or an error."""
        return self.result is not None or self.error is not None

    def _resume(self, value: bytes | None) -> None:
        try:
            while True:
                step = self._conversation.send(value)
                value = None
                if isinstance(step, Send):
                    self.sent.append(step.body)
                    self.outgoing += frame(step.body)
                elif isinstance(step, Proof):
                    self.proofs.append(step)
                    value = next((key for key in self._keys if step.made_with(key)), None)
                else:
                    assert step is RECEIVE
                    self._waiting = True
                    return
        except StopIteration as end:
            self.result = end.value
        except AuthenticationError as error:
            self.error = error


def converse(listener: Side, dialer: Side, *, step: int = 4096, tail: bytes = b"") -> None:
    """Carry bytes both ways, ``step`` at a time, until neither side has any.

    ``tail`` follows the dialer's last bytes.
    """
    tail_sent = False
    while listener.outgoing or dialer.outgoing:
        for source, target in ((listener, dialer), (dialer, listener)):
            data = source.take_outgoing()
            if source is dialer and dialer.done and not tail_sent:
                data += tail
                tail_sent = True
            for start in range(0, len(data), step):
                target.feed(data[start : start + step])


def join(
    listener: Handshake,
    dialer: Handshake,
    *,
    keys: Iterable[bytes] = (KEY,),
    step: int = 4096,
    tail: bytes = b"",
) -> tuple[Side, Side]:
    """Return both sides after the handshake."""
    listening, dialing = Side(listener, keys), Side(dialer)
    converse(listening, dialing, step=step, tail=tail)
    return listening, dialing


def old_dialer(key: bytes, nonce: bytes) -> Handshake:
    """Play the dialer of Python 3.11 and older: HMAC-MD5, with no prefix anywhere."""
    message = yield RECEIVE
    assert message is not None
    assert message.startswith(CHALLENGE)
    yield Send(hmac.digest(key, message[len(CHALLENGE) :], "md5"))
    assert (yield RECEIVE) == WELCOME
    yield Send(CHALLENGE + nonce[:20])
    assert (yield RECEIVE) == hmac.digest(key, nonce[:20], "md5")
    yield Send(WELCOME)
    return Established(key, "md5")


def old_listener(key: bytes, nonce: bytes) -> Handshake:
    """Play the listener of Python 3.11 and older."""
    yield Send(CHALLENGE + nonce[:20])
    assert (yield RECEIVE) == hmac.digest(key, nonce[:20], "md5")
    yield Send(WELCOME)
    message = yield RECEIVE
    assert message is not None
    yield Send(hmac.digest(key, message[len(CHALLENGE) :], "md5"))
    assert (yield RECEIVE) == WELCOME
    return Established(key, "md5")


# -- What succeeds


@pytest.mark.parametrize("step", [1, 3, 4096])
@pytest.mark.parametrize("name", [b"", b"alice"], ids=["unnamed", "named"])
def test_handshake_ends_with_same_key_on_both_sides(step: int, name: bytes) -> None:
    """The two roles agree, in any pieces. The listener learns the key and the name that
    were used.
    """
    listener, dialer = join(
        as_listener(NONCE, named=True),
        as_dialer(KEY, OTHER_NONCE, name=name),
        keys=[b"another", KEY],
        step=step,
    )

    assert listener.result == Established(KEY, "sha256", name)
    assert dialer.result == Established(KEY, "sha256", name)


def test_handshake_is_six_documented_messages() -> None:
    """Challenge, answer and welcome in each direction, byte for byte."""
    listener, dialer = join(
        as_listener(NONCE, named=True), as_dialer(KEY, OTHER_NONCE, name=b"alice")
    )

    ours, theirs = b"{sha256}" + NONCE, b"{sha256}" + OTHER_NONCE + b"\0client"
    assert listener.sent == [
        CHALLENGE + ours,
        WELCOME,
        b"{sha256}" + hmac.digest(KEY, theirs, "sha256"),
    ]
    assert dialer.sent == [
        b"{sha256}" + hmac.digest(KEY, ours, "sha256") + b"alice",
        CHALLENGE + theirs,
        WELCOME,
    ]


@pytest.mark.parametrize("digest", DIGESTS)
@pytest.mark.parametrize("step", [1, 4096])
def test_handshake_with_each_digest_authenticates(digest: str, step: int) -> None:
    """The challenged side uses the digest that the challenge names."""
    listener, dialer = join(
        deliver_challenge(NONCE, digest=digest), answer_challenge(KEY), step=step
    )

    assert listener.result == Established(KEY, digest)
    assert dialer.result == Established(KEY, digest)
    assert dialer.sent == [
        b"{%s}" % digest.encode() + hmac.digest(KEY, listener.proofs[0].challenge, digest)
    ]


@pytest.mark.parametrize("digest", sorted(set(DIGESTS) - {"md5"}))
def test_handshake_answer_with_other_digest_is_accepted(digest: str) -> None:
    """A peer may answer a sha256 challenge with another known digest, and is checked by
    that digest.
    """
    listener = Side(deliver_challenge(NONCE, named=True))

    listener.feed(
        frame(b"{%s}" % digest.encode() + hmac.digest(KEY, b"{sha256}" + NONCE, digest) + b"alice")
    )

    assert listener.result == Established(KEY, digest, b"alice")


@pytest.mark.parametrize("step", [1, 3, 4096])
def test_handshake_old_dialer_with_md5_allowed_is_accepted(step: int) -> None:
    """Python 3.11 and older know only HMAC-MD5. The listener answers their challenge
    the same way.
    """
    listener, dialer = join(as_listener(NONCE), old_dialer(KEY, OTHER_NONCE), step=step)

    assert listener.result == Established(KEY, "md5")
    assert dialer.result == Established(KEY, "md5")


@pytest.mark.parametrize("step", [1, 3, 4096])
def test_handshake_old_listener_with_md5_allowed_is_accepted(step: int) -> None:
    """The dialer answers a bare challenge of 20 bytes with a bare HMAC-MD5, and accepts
    one for its own.
    """
    listener, dialer = join(
        old_listener(KEY, NONCE), as_dialer(KEY, OTHER_NONCE, name=b"alice"), step=step
    )

    assert dialer.result == Established(KEY, "md5", b"alice")
    assert listener.result == Established(KEY, "md5")


@pytest.mark.parametrize("step", [1, 3, 4096])
def test_handshake_frame_right_after_welcome_is_kept(step: int) -> None:
    """A frame in the same segment as the last #WELCOME# is kept for the next reader,
    though it is large.
    """
    large = frame(b"A" * 1000)

    listener, _ = join(as_listener(NONCE), as_dialer(KEY, OTHER_NONCE), step=step, tail=large)

    assert listener.result is not None
    assert listener.reader.next_frame(1000) == b"A" * 1000
    assert listener.reader.take_rest() == b""


# -- What is refused


def test_handshake_dialer_with_wrong_key_is_refused() -> None:
    """The dialer gets #FAILURE#. Both errors say which side rejected the other."""
    listener, dialer = join(as_listener(NONCE), as_dialer(b"wrong", OTHER_NONCE))

    assert listener.sent[-1] == FAILURE
    assert "a key that is not accepted here" in str(listener.error)
    assert "the peer rejected our answer" in str(dialer.error)


def test_handshake_listener_with_wrong_key_is_refused() -> None:
    """A listener that welcomes every peer must still prove that it has the key."""
    dialer = Side(as_dialer(KEY, OTHER_NONCE))
    dialer.feed(frame(CHALLENGE + b"{sha256}" + NONCE) + frame(WELCOME))

    dialer.feed(frame(b"{sha256}" + hmac.digest(b"wrong", b"{sha256}" + OTHER_NONCE, "sha256")))

    assert dialer.sent[-1] == FAILURE
    assert "a key that is not accepted here" in str(dialer.error)


def test_handshake_name_outside_broker_is_refused() -> None:
    """Outside a broker an answer is exactly the standard library's."""
    listener, dialer = join(
        as_listener(NONCE, named=False), as_dialer(KEY, OTHER_NONCE, name=b"alice")
    )

    assert "37 bytes instead of 32" in str(listener.error)
    assert dialer.error is not None


def test_handshake_md5_not_allowed_is_refused_from_dialer() -> None:
    """The error, which is logged, names the option that allows MD5."""
    listener = Side(as_listener(NONCE, allow_md5=False))
    listener.feed(frame(hmac.digest(KEY, b"{sha256}" + NONCE, "md5")))

    assert listener.sent[-1] == FAILURE
    assert listener.proofs == []
    assert "allow_md5" in str(listener.error)


def test_handshake_md5_not_allowed_with_prefix_is_refused() -> None:
    """The modern spelling of MD5 is MD5 too."""
    listener = Side(as_listener(NONCE, allow_md5=False))
    listener.feed(frame(b"{md5}" + hmac.digest(KEY, b"{sha256}" + NONCE, "md5")))

    assert listener.sent[-1] == FAILURE
    assert "allow_md5" in str(listener.error)


@pytest.mark.parametrize("challenge", [NONCE[:20], b"{md5}" + NONCE], ids=["bare", "prefixed"])
def test_handshake_md5_not_allowed_is_refused_from_listener(challenge: bytes) -> None:
    """A dialer that does not allow MD5 answers no challenge that asks for it."""
    dialer = Side(as_dialer(KEY, OTHER_NONCE, allow_md5=False))
    dialer.feed(frame(CHALLENGE + challenge))

    assert dialer.sent == []
    assert "allow_md5" in str(dialer.error)


@pytest.mark.parametrize("challenge", [NONCE[:20], b"{md5}" + NONCE], ids=["bare", "prefixed"])
def test_handshake_md5_challenge_after_sha256_answer_is_refused(challenge: bytes) -> None:
    """A peer that knows a better digest has no honest reason to ask for MD5 afterwards."""
    listener = Side(as_listener(NONCE, allow_md5=True))
    listener.feed(frame(b"{sha256}" + hmac.digest(KEY, b"{sha256}" + NONCE, "sha256")))
    assert listener.sent[-1] == WELCOME

    listener.feed(frame(CHALLENGE + challenge))

    assert listener.sent[-2:] == [WELCOME, FAILURE]
    assert "HMAC-MD5" in str(listener.error)


@pytest.mark.parametrize(
    "words",
    [
        [b"nonsense"],
        [b""],
        [FAILURE],
        [CHALLENGE + b"short"],
        [CHALLENGE + b"{unheard-of}" + NONCE],
        [CHALLENGE + b"{sha256}" + NONCE, b"nonsense"],
        [CHALLENGE + b"{sha256}" + NONCE, CHALLENGE + NONCE],
    ],
    ids=[
        "no challenge",
        "empty",
        "failure",
        "short",
        "unknown digest",
        "no verdict",
        "second challenge",
    ],
)
def test_handshake_listener_second_half_broken_sends_failure(words: list[bytes]) -> None:
    """After its #WELCOME# too, a listener sends #FAILURE# last to a peer that breaks
    the rules.
    """
    listener = Side(as_listener(NONCE))
    listener.feed(frame(b"{sha256}" + hmac.digest(KEY, b"{sha256}" + NONCE, "sha256")))
    assert listener.sent[-1] == WELCOME

    for word in words:
        listener.feed(frame(word))

    assert listener.sent[-1] == FAILURE
    assert listener.error is not None


def test_handshake_listener_rejected_sends_nothing_more() -> None:
    """A client's #FAILURE# is the last word of a handshake."""
    listener = Side(as_listener(NONCE))
    listener.feed(frame(b"{sha256}" + hmac.digest(KEY, b"{sha256}" + NONCE, "sha256")))
    listener.feed(frame(CHALLENGE + b"{sha256}" + OTHER_NONCE))
    listener.feed(frame(FAILURE))

    assert listener.sent[-1] == b"{sha256}" + hmac.digest(KEY, b"{sha256}" + OTHER_NONCE, "sha256")
    assert "rejected our answer" in str(listener.error)


# -- Reflection


def test_handshake_dialer_refuses_marked_challenge() -> None:
    """A client never answers another client's challenge, however it arrives."""
    first = Side(as_dialer(KEY, OTHER_NONCE))
    first.feed(frame(CHALLENGE + b"{sha256}" + NONCE))
    first.feed(frame(WELCOME))
    challenge = first.sent[-1]
    assert challenge.endswith(b"\0client")
    assert len(challenge) == len(CHALLENGE) + len("{sha256}") + 40 + 7

    second = Side(as_dialer(KEY, NONCE))
    second.feed(frame(challenge))

    assert second.sent == []
    assert "client's challenge" in str(second.error)


def test_handshake_listener_answers_marked_and_bare_challenge() -> None:
    """A stock client marks nothing, so the mark is optional."""
    for mark in (b"", b"\0client"):
        challenge = b"{sha256}" + OTHER_NONCE + mark
        listener = Side(as_listener(NONCE))
        listener.feed(frame(b"{sha256}" + hmac.digest(KEY, b"{sha256}" + NONCE, "sha256")))
        listener.feed(frame(CHALLENGE + challenge))
        assert listener.sent[-1] == b"{sha256}" + hmac.digest(KEY, challenge, "sha256")


def test_handshake_missing_digest_raises_authentication_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In FIPS mode there is no MD5. The handshake refuses with its own error, not with
    a ValueError.
    """

    def no_md5(key: bytes, message: bytes, digest: str) -> bytes:
        raise ValueError("[digital envelope routines] unsupported")

    monkeypatch.setattr(handshake.hmac, "digest", no_md5)
    dialer = Side(as_dialer(KEY, OTHER_NONCE))

    dialer.feed(frame(CHALLENGE + NONCE[:20]))

    assert "HMAC-md5 is not available" in str(dialer.error)
    with pytest.raises(AuthenticationError, match="HMAC-md5 is not available"):
        Proof(NONCE, "md5", bytes(16)).maker([KEY])


def test_handshake_with_empty_key_authenticates() -> None:
    """An empty key is a key like any other; the configuration decides whether a client
    may have it.
    """
    listener, dialer = join(as_listener(NONCE), as_dialer(b"", OTHER_NONCE), keys=[b""])
    assert listener.result == dialer.result == Established(b"", "sha256")
    listener, dialer = join(as_listener(NONCE), as_dialer(b"", OTHER_NONCE), keys=[KEY])
    assert listener.error is not None
    assert dialer.error is not None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "not a valid proof"),
        (b"x" * 15, "not a valid proof"),
        (b"x" * 17, "not a valid proof"),
        (b"{sha256" + b"x" * 32, "not a valid proof"),
        (b"{}" + b"x" * 32, "not a valid proof"),
        (b"{sha1}" + b"x" * 20, "not a valid proof"),
        (b"{SHA256}" + b"x" * 32, "not a valid proof"),
        (b"{\xff\xfe}" + b"x" * 32, "not a valid proof"),
        (b"{sha256}", "0 bytes instead of 32"),
        (b"{sha256}" + b"x" * 31, "31 bytes instead of 32"),
        (b"{sha256}" + b"x" * 33, "33 bytes instead of 32"),
        (b"{sha384}" + b"x" * 32, "32 bytes instead of 48"),
        (b"{sha256}" + b"x" * 32, "a key that is not accepted here"),
        (b"x" * 16, "a key that is not accepted here"),
        (WELCOME, "not a valid proof"),
        (FAILURE, "not a valid proof"),
    ],
)
def test_handshake_malformed_answer_is_refused(answer: bytes, reason: str) -> None:
    """Each malformed answer gets #FAILURE#, and the error gives the reason."""
    listener = Side(as_listener(NONCE))

    listener.feed(frame(answer))

    assert listener.sent[-1] == FAILURE
    assert reason in str(listener.error)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", "expected a challenge"),
        (WELCOME, "expected a challenge"),
        (b"#challenge#" + NONCE, "expected a challenge"),
        (CHALLENGE, "too short"),
        (CHALLENGE + NONCE[:19], "too short"),
        (CHALLENGE + NONCE[:21], "names no digest"),
        (CHALLENGE + NONCE, "names no digest"),
        (CHALLENGE + b"{sha1}" + NONCE, "names no digest"),
        (CHALLENGE + b"{sha256" + NONCE, "names no digest"),
    ],
)
def test_handshake_malformed_challenge_is_not_answered(message: bytes, reason: str) -> None:
    """No MAC is ever computed for a message that is not a valid challenge."""
    dialer = Side(as_dialer(KEY, OTHER_NONCE))

    dialer.feed(frame(message))

    assert dialer.sent == []
    assert reason in str(dialer.error)


@pytest.mark.parametrize("verdict", [b"", b"#WELCOME", WELCOME + b"#", b"x" * 256])
def test_handshake_unknown_verdict_is_refused(verdict: bytes) -> None:
    """A verdict is #WELCOME# or #FAILURE#; anything else is an error."""
    dialer = Side(as_dialer(KEY, OTHER_NONCE))

    dialer.feed(frame(CHALLENGE + b"{sha256}" + NONCE) + frame(verdict))

    assert "neither #WELCOME# nor #FAILURE#" in str(dialer.error)


def test_handshake_message_above_256_bytes_is_refused_by_length() -> None:
    """Before authentication a peer can't make us store more than the standard library
    would.
    """
    listener = Side(as_listener(NONCE))

    with pytest.raises(FrameTooBig):
        listener.feed(frame(b"x" * 257)[:4])


@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
def test_handshake_echoed_challenge_is_refused(named: bool) -> None:
    """A peer that sends back what it was sent is refused in either role."""
    listener = Side(as_listener(NONCE, named=named))
    listener.feed(listener.take_outgoing())
    assert listener.sent[-1] == FAILURE

    dialer = Side(as_dialer(KEY, OTHER_NONCE))
    dialer.feed(frame(CHALLENGE + b"{sha256}" + NONCE))
    dialer.feed(frame(WELCOME))
    dialer.feed(frame(dialer.sent[0]))

    assert dialer.sent[-1] == FAILURE


def test_handshake_listener_answers_nothing_before_proof_of_dialer() -> None:
    """A dialer without a key can't have the listener compute a MAC for it to reflect."""
    listener = Side(as_listener(NONCE))

    listener.feed(frame(CHALLENGE + b"{sha256}" + NONCE))

    assert listener.sent == [CHALLENGE + b"{sha256}" + NONCE, FAILURE]
    assert listener.result is None
    assert listener.error is not None


def test_handshake_replayed_answer_is_refused() -> None:
    """A recorded answer is not valid for another nonce."""
    first, _ = join(as_listener(NONCE), as_dialer(KEY, OTHER_NONCE))
    recorded = b"{sha256}" + first.proofs[0].mac
    second = Side(as_listener(OTHER_NONCE))

    second.feed(frame(recorded))

    assert second.sent[-1] == FAILURE


# -- Garbage

ALMOST = st.one_of(
    st.binary(max_size=300),
    st.sampled_from([CHALLENGE, WELCOME, FAILURE]),
    st.builds(
        lambda start, digest, rest: start + b"{" + digest + b"}" + rest,
        st.sampled_from([b"", CHALLENGE]),
        st.sampled_from([name.encode() for name in DIGESTS]) | st.binary(max_size=10),
        st.binary(max_size=60),
    ),
)


@pytest.mark.parametrize(
    "start",
    [
        lambda: as_listener(NONCE),
        lambda: as_listener(NONCE, named=True, allow_md5=False),
        lambda: as_dialer(KEY, OTHER_NONCE),
        lambda: as_dialer(KEY, OTHER_NONCE, name=b"alice", allow_md5=False),
    ],
    ids=["listener", "broker", "dialer", "client"],
)
@given(messages=st.lists(ALMOST, max_size=6))
def test_handshake_garbage_never_authenticates(
    start: Callable[[], Handshake], messages: list[bytes]
) -> None:
    """Whatever arrives, only AuthenticationError or FrameTooBig is raised, and no peer
    is authenticated.
    """
    side = Side(start(), keys=[KEY])
    for message in messages:
        try:
            side.feed(frame(message))
        except FrameTooBig:
            break

    assert side.result is None


@pytest.mark.parametrize("error_of", ["listener", "dialer"])
def test_handshake_error_shows_no_key_or_mac(error_of: str) -> None:
    """Neither the message nor the traceback's values of our own objects hold a secret."""
    listener, dialer = join(as_listener(NONCE), as_dialer(b"wrong key", OTHER_NONCE))
    error: Mapping[str, AuthenticationError | None] = {
        "listener": listener.error,
        "dialer": dialer.error,
    }
    raised = error[error_of]
    trace = None if raised is None else raised.__traceback__
    text = (
        "".join(traceback.format_exception(None, raised, trace))
        + repr(listener.proofs)
        + repr(Established(b"wrong key"))
    )

    text += repr(Send(listener.proofs[0].mac))

    assert "wrong key" not in text
    assert repr(listener.proofs[0].mac)[2:-1] not in text


def test_handshake_proof_maker_returns_index_of_first_matching_key() -> None:
    """Return the index of the first key that made the answer, or None."""
    challenge = b"{sha256}" + bytes(40)
    proof = Proof(challenge, "sha256", hmac.digest(b"right", challenge, "sha256"))
    assert proof.maker([b"wrong", b"right", b"other", b"right"]) == 1
    assert proof.maker(iter([b"wrong", b"other"])) is None
    assert proof.maker([]) is None
