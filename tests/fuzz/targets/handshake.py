"""Both roles of the handshake against a peer that the bytes describe: an accepted peer
has used the key.

The peer may send the messages of a peer with the key, the same damaged, those of a peer
with another key, our own messages, or arbitrary bytes. Its proof is checked again here,
with nothing of ``wire``.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections import deque
from collections.abc import Iterator

from support.fuzz.script import Script, item

from brokerd_client.errors import AuthenticationError
from brokerd_client.wire.channel_binding import (
    BROKER,
    CLIENT,
    END_POINT,
    EXPORTER,
    bound_key,
    offer,
)
from brokerd_client.wire.handshake import (
    CHALLENGE,
    FAILURE,
    LIMIT,
    NONCE_SIZE,
    WELCOME,
    Established,
    Handshake,
    Proof,
    Receive,
    Send,
    as_dialer,
    as_listener,
)

#: No random input finds them, and they are the same in every run, so that an input
#: means the same.
KEY = hashlib.sha256(b"the key of the target").digest()
OTHER_KEY = hashlib.sha256(b"a stranger's key").digest()
OUR_NONCE = hashlib.shake_256(b"ours").digest(NONCE_SIZE)
THEIR_NONCE = hashlib.shake_256(b"theirs").digest(NONCE_SIZE)
CHANNEL = {EXPORTER: b"exported keying material", END_POINT: b"digest of a certificate"}
DIGESTS = ("md5", "sha256", "sha384", "sha3_256", "sha3_384")
NAME = b"alice"

LISTENER, NAMED, MD5, EXPORTED, CERTIFIED, WITH_NAME = (1 << bit for bit in range(6))
RAW, HONEST, DAMAGED, CUT, LONGER, REFLECTED, STRANGE, PROOF, ASK = range(9)


class _Peer:
    """The other side, with a key: it gets our messages, and returns its own."""

    def __init__(self, generator: Handshake) -> None:
        self._generator = generator
        self._heard: deque[bytes] = deque()
        self._step: object = None
        self._go_on(None)

    def hear(self, body: bytes) -> None:
        self._heard.append(body)

    def say(self) -> bytes:
        """Return its next frame, b"" if it has none."""
        while isinstance(self._step, Receive) and self._heard:
            self._go_on(self._heard.popleft())
        if not isinstance(self._step, Send):
            return b""
        body = self._step.body
        self._go_on(None)
        return body

    def _go_on(self, result: bytes | None) -> None:
        try:
            self._step = self._generator.send(result)
            while isinstance(self._step, Proof):
                proof = self._step
                pairs = [(KEY, KEY)]
                for kind, data in CHANNEL.items():
                    pairs.append(
                        (bound_key(KEY, kind, data, CLIENT), bound_key(KEY, kind, data, BROKER))
                    )
                self._step = self._generator.send(
                    next((to for of, to in pairs if proof.made_with(of)), None)
                )
        except (AuthenticationError, StopIteration):
            self._step = None


def target(data: bytes) -> None:
    """Run one side against the peer: it raises AuthenticationError, waits, or accepts a
    peer with the key.
    """
    script = Script(data)
    flags = script.number()
    listening, named, md5 = bool(flags & LISTENER), bool(flags & NAMED), bool(flags & MD5)
    channel = {
        kind: CHANNEL[kind]
        for kind, bit in ((EXPORTER, EXPORTED), (END_POINT, CERTIFIED))
        if flags & bit
    }
    name = NAME if flags & WITH_NAME else b""
    peers = []
    for key in (KEY, OTHER_KEY):
        if listening:
            peers.append(_Peer(as_dialer(key, THEIR_NONCE, name=name, bindings=channel)))
        else:
            peers.append(_Peer(as_listener(THEIR_NONCE + offer(channel), named=True)))
    if listening:
        ours = as_listener(OUR_NONCE + offer(channel), allow_md5=md5, named=named)
    else:
        ours = as_dialer(KEY, OUR_NONCE, name=name, allow_md5=md5, bindings=channel)

    said: list[bytes] = []
    heard: list[bytes] = []
    honest = True
    result: bytes | None = None
    end: Established | None = None
    rejected = False
    try:
        while True:
            step = ours.send(result)
            result = None
            if isinstance(step, Send):
                assert not rejected or step.body == FAILURE
                rejected = False
                assert len(step.body) <= LIMIT
                assert KEY not in step.body
                said.append(step.body)
                for peer in peers:
                    peer.hear(step.body)
            elif isinstance(step, Proof):
                key = to = KEY
                if step.binding:
                    data = channel.get(step.binding)
                    key = bound_key(KEY, step.binding, data, CLIENT) if data else b""
                    to = bound_key(KEY, step.binding, data, BROKER) if data else b""
                result = to if key and step.made_with(key) else None
                rejected = result is None
            else:
                if not script.left:
                    ours.close()
                    return
                result, was_honest = frame_of(script, peers, said)
                honest = honest and was_honest
                heard.append(result)
    except AuthenticationError as error:
        assert str(error).isprintable()
        assert not rejected
    except StopIteration as stop:
        end = stop.value
    if end is None:
        # What an honest peer says is only refused where the answer may not carry what
        # it carries.
        assert not honest or (listening and not named and (name or channel))
        return
    assert end.key in (KEY, *(bound_key(KEY, kind, data, BROKER) for kind, data in channel.items()))
    challenge = next(body for body in said if body.startswith(CHALLENGE))[len(CHALLENGE) :]
    if listening:
        answer, last = heard[0], heard[-1]
    else:
        answer, last = heard[2], heard[1]
    assert last == WELCOME
    marked = challenge.endswith(b"\0client")
    assert marked is not listening
    if not listening:
        # A client answers no client's challenge.
        assert not heard[0].endswith(b"\0client")
    direction = b"client" if listening else b"broker"
    assert proves(
        challenge,
        answer,
        channel,
        direction,
        md5=md5 and (listening or not channel),
        rest=listening and named,
    )
    if not listening and channel:
        # There is no way back to a key that is not bound.
        assert end.key != KEY


def frame_of(script: Script, peers: list[_Peer], said: list[bytes]) -> tuple[bytes, bool]:
    """Return the peer's next frame, and whether an honest peer would send it."""
    act = script.number()
    if act == HONEST:
        return peers[0].say(), True
    if act == DAMAGED:
        body = bytearray(peers[0].say())
        at, mask = script.number(), script.number()
        if body:
            body[at % len(body)] ^= mask
        return bytes(body), False
    if act == CUT:
        return peers[0].say()[: script.number()], False
    if act == LONGER:
        return (peers[0].say() + script.item())[:LIMIT], False
    if act == REFLECTED:
        return (said[script.number() % len(said)] if said else b""), False
    if act == STRANGE:
        return peers[1].say(), False
    if act == PROOF:
        digest = DIGESTS[script.number() % len(DIGESTS)]
        bare = script.number() & 1
        challenges = [body[len(CHALLENGE) :] for body in said if body.startswith(CHALLENGE)]
        mac = hmac.new(KEY, challenges[-1] if challenges else b"", digest).digest()
        return (mac if bare else b"{%s}%s" % (digest.encode(), mac)), False
    if act == ASK:
        digest, size = DIGESTS[script.number() % len(DIGESTS)], script.number() % 64
        return CHALLENGE + (b"{%s}" % digest.encode() if size != 20 else b"") + THEIR_NONCE[
            :size
        ], False
    return script.item()[:LIMIT], False


def proves(
    challenge: bytes,
    answer: bytes,
    channel: dict[str, bytes],
    direction: bytes,
    *,
    md5: bool,
    rest: bool,
) -> bool:
    """Return whether the answer can only have been made with the key, for this
    challenge.
    """
    if len(answer) == 16:
        return md5 and answer == hmac.new(KEY, challenge, "md5").digest()
    found = re.match(rb"\{([a-z0-9_]+)\}", answer)
    if (
        found is None
        or (digest := found[1].decode()) not in DIGESTS
        or (digest == "md5" and not md5)
    ):
        return False
    size = hashlib.new(digest).digest_size
    mac, more = answer[found.end() : found.end() + size], answer[found.end() + size :]
    if more and not rest:
        return False
    keys = [KEY]
    for kind, data in channel.items():
        text = b"brokerd channel binding 2\0" + direction + b"\0" + kind.encode() + b"\0" + data
        bound = hmac.new(KEY, text, "sha256").digest()
        if not more or more.endswith(b"\0" + kind.encode() + b" 2"):
            keys.append(bound)
    return any(hmac.new(key, challenge, digest).digest() == mac for key in keys)


def seeds() -> Iterator[tuple[str, bytes]]:
    """Yield conversations in both roles: honest ones, and each with one mistake at each
    step.
    """
    honest = bytes([HONEST]) * 4
    for flags in (
        LISTENER,
        LISTENER | NAMED | WITH_NAME,
        LISTENER | NAMED | EXPORTED | CERTIFIED | WITH_NAME,
        LISTENER | NAMED | CERTIFIED,
    ):
        yield f"listener-{flags}", bytes([flags]) + honest
    for flags in (0, WITH_NAME, WITH_NAME | EXPORTED | CERTIFIED, CERTIFIED, MD5 | EXPORTED):
        yield f"dialer-{flags}", bytes([flags]) + honest
    for role, flags in (
        ("listener", LISTENER | NAMED | MD5),
        ("dialer", WITH_NAME | MD5),
        ("bound", EXPORTED),
    ):
        for step in range(3):
            before = bytes([flags]) + honest[:step]
            yield f"{role}-damaged-{step}", before + bytes([DAMAGED, 30, 1]) + honest
            yield f"{role}-cut-{step}", before + bytes([CUT, 12]) + honest
            yield (
                f"{role}-longer-{step}",
                before + bytes([LONGER]) + item(b"bob\0tls-exporter 2") + honest,
            )
            yield f"{role}-reflected-{step}", before + bytes([REFLECTED, 0]) + honest
            yield f"{role}-strange-{step}", before + bytes([STRANGE]) * 3
            yield f"{role}-raw-{step}", before + bytes([RAW]) + item(WELCOME) + honest
    for digest in range(len(DIGESTS)):
        for bare in (0, 1):
            yield f"proof-{digest}-{bare}", bytes([LISTENER | MD5, PROOF, digest, bare]) + honest
            yield (
                f"asked-{digest}-{bare}",
                bytes([MD5, ASK, digest, 20 if bare else 40, RAW]) + item(WELCOME) + honest,
            )
    yield "full", bytes([0, RAW]) + item(FAILURE + b" no place")
