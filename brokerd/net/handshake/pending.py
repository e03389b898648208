"""One pending connection: its handshake is not over.

``handshakes`` exchanges its frames. Source: docs/protocol.md, "Handshake".
"""

from __future__ import annotations

import os
import socket
from typing import Final

from brokerd.config.values import TlsConfig
from brokerd.net.byte_stream import ByteStream
from brokerd.net.counters import HandshakeOutcome
from brokerd.net.handshake.admission import Rank
from brokerd.net.handshake.keyring import Credential, Keyring
from brokerd.net.handshake.peer_uid import peer_uid
from brokerd.net.handshake.penalties import origin_of
from brokerd.net.handshake.tls import NO_TLS, tls_stream
from brokerd_client.address import format_peer
from brokerd_client.wire.framing import FrameReader
from brokerd_client.wire.handshake import NONCE_SIZE, Proof, as_listener

__all__ = ["PendingConnection"]

# Until Python 3.12, reading a member of an enumeration takes as long as ten attributes.
_REJECTED: Final = HandshakeOutcome.REJECTED
_SILENT: Final = Rank.SILENT


class PendingConnection:
    """One connection that has not proved its identity yet.

    peer: the peer's address, for people.
    uid: the user at the other end of a Unix socket, else None.
    listener: the address at which the connection was accepted.
    origin: the key by which its failures are counted.
    silent: whether the peer has sent nothing yet.
    claimed: the name that its answer carried, in ASCII with escapes; "" without one.
    is_channel: whether the word ``channel`` stood behind that name: its first frame must
        be OPEN or JOIN.
    nonce: the random part of the broker's challenge.
    heard: every byte that the peer has sent.
    unsent: frames that are sent to the peer at the end of this turn.
    spoken: number of frames sent to the peer, with the unsent ones. With nonce and heard,
        another process can continue: see PendingHandshakes.take_over.
    muted: number of frames that were sent already, and are not sent again.
    slowed: the peer has failed and is told so later; until then its input is ignored.
    tls: the TLS settings, None without TLS.
    sock: the socket.
    stream: the bytes to read and write: of the socket, or of TLS over it.
    tls_stream: the same stream, None without TLS.
    tls_peer: the facts that TLS proved about the peer.
    rank, moved_at: how far the peer has got, and since when: see Admission.
    keyring: the keyring in which its key was searched for; None if another process did.
    can_hand_over: another process could continue with the socket and with the state
        kept here.
    """

    __slots__ = (
        "allow_md5",
        "claimed",
        "credential",
        "deadline",
        "done",
        "fd",
        "heard",
        "is_channel",
        "keyring",
        "listener",
        "moved_at",
        "muted",
        "nonce",
        "origin",
        "outcome",
        "peer",
        "proof",
        "rank",
        "reader",
        "refusal",
        "silent",
        "slowed",
        "sock",
        "spoken",
        "steps",
        "stream",
        "tls",
        "tls_peer",
        "tls_stream",
        "uid",
        "unsent",
    )

    def __init__(
        self,
        sock: socket.socket,
        peer: object,
        listener: str,
        *,
        allow_md5: bool,
        deadline: float,
        nonce: bytes | None = None,
        tls: TlsConfig | None = None,
    ) -> None:
        self.tls = tls
        self.sock = sock
        self.tls_stream = None if tls is None else tls_stream(sock, tls)
        self.stream: ByteStream = self.tls_stream or sock
        self.tls_peer = NO_TLS
        self.fd = sock.fileno()
        # The peer of a Unix socket has no pair of address and port.
        self.uid = None if isinstance(peer, tuple) else peer_uid(sock)
        self.peer = format_peer(peer) if self.uid is None else f"unix uid={self.uid}"
        self.origin = origin_of(peer, self.uid)
        self.listener = listener
        self.allow_md5 = allow_md5
        self.deadline = deadline
        self.reader = FrameReader()
        # Whether MD5 may be used is decided when the client is known: see KeySearch.
        self.nonce = nonce or os.urandom(NONCE_SIZE)
        self.steps = as_listener(self.nonce, allow_md5=True, named=True)
        self.heard = bytearray()
        self.unsent = b""
        self.spoken = 0
        self.muted = 0
        self.slowed = False
        self.proof: Proof | None = None
        self.claimed = ""
        self.is_channel = False
        self.credential: Credential | None = None
        self.keyring: Keyring | None = None
        self.refusal = ""
        self.silent = True
        #: The outcome that a failure would count as.
        self.outcome = _REJECTED
        self.done = False
        self.rank = _SILENT
        self.moved_at = 0.0

    @property
    def can_hand_over(self) -> bool:
        """Whether another process could continue: not over TLS, whose keys are in this
        process.
        """
        return self.tls is None
