"""Both roles of ``multiprocessing.connection``'s mutual HMAC challenge, as generators.

Source: CPython, Lib/multiprocessing/connection.py, ``deliver_challenge`` and
``answer_challenge``, and the protocol description beside them. The answer with a name
is brokerd's own addition (docs/protocol.md, "Handshake").

A generator yields each step for its caller, and is resumed with the result:

    Send(body)      send one frame; resumed with None
    RECEIVE         resumed with the body of the next frame, read under LIMIT
    Proof(...)      the peer answered the challenge; resumed with the key that made the
                    answer, or None. If the proof has a binding, it is resumed with the
                    key bound for BROKER

A generator returns a result if the handshake succeeded, and raises AuthenticationError
if not. Before it raises, it yields the ``#FAILURE#`` that the peer has to get. Nonces
and keys are arguments; no key, MAC or nonce ever appears in an exception.
"""

from __future__ import annotations

import hmac
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Final, Optional, Union

from brokerd_client._compat import slotted
from brokerd_client.errors import AuthenticationError, FrameError, KeyRejected
from brokerd_client.wire.channel_binding import (
    BROKER,
    CLIENT,
    Bindings,
    bound_key,
    choose,
    marked,
    unmarked,
)
from brokerd_client.wire.foreign_protocols import foreign_speech
from brokerd_client.wire.framing import FrameReader

__all__ = [
    "CHALLENGE",
    "CLIENT_MARK",
    "DIGESTS",
    "FAILURE",
    "LIMIT",
    "NONCE_SIZE",
    "RECEIVE",
    "WELCOME",
    "Established",
    "Handshake",
    "Proof",
    "Receive",
    "Send",
    "answer_challenge",
    "as_dialer",
    "as_listener",
    "deliver_challenge",
    "next_message",
    "unframed",
]

#: Largest frame of a handshake, in bytes: CPython's ``recv_bytes(256)``.
LIMIT: Final = 256
#: Random bytes of a challenge: CPython's MESSAGE_LENGTH.
NONCE_SIZE: Final = 40
CHALLENGE: Final = b"#CHALLENGE#"
WELCOME: Final = b"#WELCOME#"
FAILURE: Final = b"#FAILURE#"
#: The end of a client's challenge. No client answers a challenge with this end.
#: Otherwise a listener without the key could get one client's challenge answered by
#: another client.
CLIENT_MARK: Final = b"\0client"

#: Digest name to MAC size in bytes: CPython's _ALLOWED_DIGESTS.
DIGESTS: Final = {"md5": 16, "sha256": 32, "sha384": 48, "sha3_256": 32, "sha3_384": 48}
_LONGEST_DIGEST_NAME: Final = max(map(len, DIGESTS))
#: A challenge of this size comes from a Python that knows only HMAC-MD5 (3.11 and
#: older).
_LEGACY_CHALLENGE_SIZE: Final = 20
_LEGACY_MAC_SIZE: Final = 16


# Not frozen, like Envelope: a frozen object takes some times as long to create.
@slotted
@dataclass(unsafe_hash=True)
class Send:
    """Send this body as one frame."""

    body: bytes = field(repr=False)


class Receive:
    """Resume with the body of the peer's next frame."""

    __slots__ = ()


RECEIVE: Final = Receive()


@slotted
@dataclass(unsafe_hash=True)
class Proof:
    """The peer's answer to the challenge: resume with the key that made it, or None.

    Attributes:
        challenge: The input of the MAC.
        digest: A name of DIGESTS.
        mac: The peer's MAC.
        name: The client's name if the answer carried one, else b"".
        binding: The kind of channel binding (wire.channel_binding), "" for an unbound
            key. With a binding, the answer was made with the key bound for CLIENT;
            resume with the key bound for BROKER.
    """

    challenge: bytes = field(repr=False)
    digest: str
    mac: bytes = field(repr=False)
    name: bytes = b""
    binding: str = ""

    def made_with(self, key: bytes) -> bool:
        """Return whether ``key`` made this answer; the MACs are compared in constant
        time.
        """
        return self.maker((key,)) == 0

    def maker(self, keys: Iterable[bytes]) -> int | None:
        """Return the position of the first of ``keys`` that made this answer, or None;
        see made_with.
        """
        # A search can try a thousand keys: look up each name only once.
        challenge, digest, mac = self.challenge, self.digest, self.mac
        are_equal, make_mac = hmac.compare_digest, hmac.digest
        try:
            for position, key in enumerate(keys):
                if are_equal(make_mac(key, challenge, digest), mac):
                    return position
        except ValueError as error:
            raise _unavailable(digest) from error
        return None


@slotted
@dataclass(unsafe_hash=True)
class Established:
    """Both sides have proved that they know the key.

    Attributes:
        key: The key with which the listener answers; over TLS it is bound to the
            channel.
        digest: The digest of the peer's answer.
        name: The name in that answer, or b"".
    """

    key: bytes = field(repr=False)
    digest: str = "sha256"
    name: bytes = b""


Handshake = Generator[Union[Send, Receive, Proof], Optional[bytes], Established]


def next_message(reader: FrameReader) -> bytes | None:
    """Return the next message of a handshake, or None if more bytes are needed.

    Raises AuthenticationError: the peer speaks another protocol, which the message
    names. Raises FrameError: the bytes are not a frame of a handshake.
    """
    try:
        return reader.next_frame(LIMIT)
    except FrameError as error:
        raise unframed(reader, error) from error


def unframed(reader: FrameReader, error: FrameError) -> AuthenticationError | FrameError:
    """Return the error for bytes that are not a frame; it names the peer's protocol if
    known.
    """
    speech = foreign_speech(reader.peek(4))
    return AuthenticationError(speech) if speech else error


def as_listener(nonce: bytes, *, allow_md5: bool = True, named: bool = False) -> Handshake:
    """Return the listening side of a handshake: challenge the peer, then answer its
    challenge.

    Args:
        nonce: NONCE_SIZE fresh random bytes; over TLS followed by
            ``channel_binding.offer``.
        allow_md5: Whether HMAC-MD5 may be used, in either direction.
        named: Whether an answer may carry the client's name and the mark of a channel
            binding.

    Raises:
        AuthenticationError: From the generator, when either side rejects the other.
    """
    established = yield from deliver_challenge(nonce, allow_md5=allow_md5, named=named)
    try:
        # A peer that used a better digest itself has no honest reason to ask for MD5.
        yield from _prove(established.key, allow_md5=established.digest == "md5")
        result = yield RECEIVE
        if result != FAILURE:
            _check_result(result)
    except AuthenticationError:
        yield Send(FAILURE)
        raise
    _check_result(result)
    return established


def as_dialer(
    key: bytes,
    nonce: bytes,
    *,
    name: bytes = b"",
    allow_md5: bool = True,
    bindings: Bindings | None = None,
) -> Handshake:
    """Return the dialing side of a handshake: answer the challenge, then challenge the
    peer.

    Args:
        key: The key; it may be empty, though no broker accepts that.
        nonce: NONCE_SIZE fresh random bytes.
        name: Sent after the MAC, so that a broker need not search for the key; b"" for
            the standard library's answer.
        allow_md5: Whether HMAC-MD5 may be used, in either direction.
        bindings: Over TLS, the channel's binding data. The key is then bound to the
            channel, in both directions, without a fallback to an unbound key.

    Raises:
        AuthenticationError: From the generator, when either side rejects the other.
    """
    # The key with which the listener has to answer.
    key = (
        yield from answer_challenge(
            key, name=name, allow_md5=allow_md5, bindings=bindings, dialing=True
        )
    ).key
    challenged = deliver_challenge(nonce + CLIENT_MARK, allow_md5=allow_md5)
    step = next(challenged)
    while True:
        # The key is known here, so the proof is not yielded to the caller.
        result = (key if step.made_with(key) else None) if isinstance(step, Proof) else (yield step)
        try:
            step = challenged.send(result)
        except StopIteration as end:
            established: Established = end.value
            return Established(key, established.digest, name)


def deliver_challenge(
    nonce: bytes, *, digest: str = "sha256", allow_md5: bool = True, named: bool = False
) -> Handshake:
    """Challenge the peer, yield its proof to get the key, and send the peer the result.

    A peer that does not know digest prefixes takes the prefix as a part of the
    challenge. It then answers with a bare HMAC-MD5. So one form serves both kinds of
    peers.
    """
    challenge = b"{%s}%s" % (digest.encode("ascii"), nonce)
    yield Send(CHALLENGE + challenge)
    answer = yield RECEIVE
    assert answer is not None
    try:
        proof = _read_answer(challenge, answer, allow_md5=allow_md5, named=named)
        key = yield proof
        if key is None:
            raise AuthenticationError(
                "the peer's answer was made with a key that is not accepted here"
            )
    except AuthenticationError:
        yield Send(FAILURE)
        raise
    yield Send(WELCOME)
    return Established(key, proof.digest, proof.name)


def answer_challenge(
    key: bytes,
    *,
    name: bytes = b"",
    allow_md5: bool = True,
    bindings: Bindings | None = None,
    dialing: bool = False,
) -> Handshake:
    """Answer the peer's challenge with ``key``, and wait for its welcome.

    Args:
        bindings: If given, the key is bound to the channel.
        dialing: Whether this end is the client, which answers no challenge of another
            client.

    The result holds the key with which the peer has to answer.
    """
    established = yield from _prove(
        key, name=name, allow_md5=allow_md5, bindings=bindings, dialing=dialing
    )
    result = yield RECEIVE
    _check_result(result)
    return established


def _prove(
    key: bytes,
    *,
    name: bytes = b"",
    allow_md5: bool = True,
    bindings: Bindings | None = None,
    dialing: bool = False,
) -> Handshake:
    """Answer the peer's challenge."""
    message = yield RECEIVE
    assert message is not None
    challenge = _read_challenge(message)
    if dialing and challenge.endswith(CLIENT_MARK):
        raise AuthenticationError(
            "the peer sent a client's challenge, as no listener does: a client is at the other end,"
            " or a listener that passes on another client's challenge because it does not have"
            " the key"
        )
    digest, random = _challenge_digest(challenge)
    if digest == "md5" and not (allow_md5 and not bindings):
        raise AuthenticationError(
            "the peer asks for HMAC-MD5 (Python 3.11 or older knows nothing else), which is"
            " switched off here: see allow_md5"
        )
    peer_key = key
    if bindings:
        try:
            kind = choose(random[NONCE_SIZE:], bindings)
        except ValueError as error:
            raise AuthenticationError(str(error)) from error
        if kind not in bindings:
            raise AuthenticationError(
                "the listener offers no kind of channel binding that this channel has"
            )
        peer_key = bound_key(key, kind, bindings[kind], BROKER)
        key, name = bound_key(key, kind, bindings[kind], CLIENT), marked(name, kind)
    mac = _mac(key, challenge, digest)
    yield Send(
        mac
        if len(challenge) == _LEGACY_CHALLENGE_SIZE
        else b"{%s}%s%s" % (digest.encode("ascii"), mac, name)
    )
    return Established(peer_key, digest, name)


def _check_result(result: bytes | None) -> None:
    """Raise AuthenticationError unless the peer accepted this end's answer."""
    if result == FAILURE:
        raise KeyRejected("the peer rejected our answer: it does not accept the key used here")
    if result != WELCOME:
        raise AuthenticationError(
            "the peer answered neither #WELCOME# nor #FAILURE# to this end's proof: it is not a"
            " listener"
        )


def _mac(key: bytes, challenge: bytes, digest: str) -> bytes:
    try:
        return hmac.digest(key, challenge, digest)
    except ValueError as error:
        raise _unavailable(digest) from error


def _unavailable(digest: str) -> AuthenticationError:
    return AuthenticationError(
        f"HMAC-{digest} is not available on this machine; FIPS mode forbids MD5"
    )


def _read_challenge(message: bytes) -> bytes:
    if message.startswith(FAILURE):
        # A listener that refuses a connection before the handshake sends the reason
        # after the word.
        text = message[len(FAILURE) :].decode("ascii", "replace").strip() or "it gave no reason"
        reason = "".join(letter if letter.isprintable() else "?" for letter in text)
        raise AuthenticationError(
            f"the listener refused the connection before any key was shown: {reason}"
        )
    if not message.startswith(CHALLENGE):
        raise AuthenticationError(
            "expected a challenge from the peer and got something else: is authentication switched"
            " on at both ends?"
        )
    challenge = message[len(CHALLENGE) :]
    if len(challenge) < _LEGACY_CHALLENGE_SIZE:
        raise AuthenticationError(
            f"the peer's challenge is too short: {len(challenge)} bytes, not 20 or more"
        )
    return challenge


def _challenge_digest(challenge: bytes) -> tuple[str, bytes]:
    """Return (digest, the rest of the challenge)."""
    if len(challenge) == _LEGACY_CHALLENGE_SIZE:
        return "md5", challenge
    prefix = _digest_prefix(challenge)
    if prefix is None:
        raise AuthenticationError(
            "the peer's challenge names no digest known here (" + ", ".join(DIGESTS) + ")"
        )
    return prefix


def _digest_prefix(message: bytes) -> tuple[str, bytes] | None:
    """Return (digest, the rest) of ``{digest}...``, or None if the digest is not known."""
    if message[:1] != b"{":
        return None
    brace = message.find(b"}", 1, _LONGEST_DIGEST_NAME + 2)
    if brace < 0:
        return None
    # Latin-1 can decode every byte; an unknown name is not in DIGESTS.
    digest = message[1:brace].decode("latin-1")
    if digest not in DIGESTS:
        return None
    return digest, message[brace + 1 :]


def _read_answer(challenge: bytes, answer: bytes, *, allow_md5: bool, named: bool) -> Proof:
    """Return the parsed answer.

    Raises AuthenticationError if it is invalid or uses refused MD5.
    """
    if len(answer) == _LEGACY_MAC_SIZE:
        digest, mac, name = "md5", answer, b""
    else:
        prefix = _digest_prefix(answer)
        if prefix is None:
            raise AuthenticationError(
                "the peer's answer is not a valid proof: neither 16 bytes nor a known {digest}"
            )
        digest, mac_and_name = prefix
        mac, name = mac_and_name[: DIGESTS[digest]], mac_and_name[DIGESTS[digest] :]
        if len(mac) != DIGESTS[digest] or (name and not named):
            raise AuthenticationError(
                f"the peer's {digest} answer has {len(mac_and_name)} bytes instead of"
                f" {DIGESTS[digest]}"
            )
    try:
        name, binding = unmarked(name)
    except ValueError as error:
        raise AuthenticationError(str(error)) from error
    if digest == "md5" and not allow_md5:
        raise AuthenticationError(
            "the peer answered with HMAC-MD5 (Python 3.11 or older knows nothing else), which is"
            " switched off here: see allow_md5"
        )
    return Proof(challenge, digest, mac, name, binding)
