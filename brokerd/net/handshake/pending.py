"""One unfinished handshake: a connection that has not proved yet who it is, and all that is known of it.

What it says and hears is the business of ``pending_handshakes``. Source: docs/protocol.md, "Handshake".
"""

from __future__ import annotations

import os
import socket

from brokerd.config.values import TlsConfig
from brokerd.net.counters import HandshakeOutcome
from brokerd.net.handshake.admission import Rank
from brokerd.net.handshake.keyring import Credential
from brokerd.net.handshake.peer_uid import peer_uid
from brokerd.net.handshake.penalties import origin_of
from brokerd.net.handshake.tls import NO_TLS
from brokerd_client.address import format_peer
from brokerd_client.tls.stream import TlsStream
from brokerd_client.wire.framing import FrameReader
from brokerd_client.wire.handshake import NONCE_SIZE, Proof, as_listener

__all__ = ["PendingConnection"]


class PendingConnection:
    """One connection that has not proved yet who it is.

    peer: where it comes from, for people. uid: the user at the other end of a Unix socket, else None.
    listener: the address it came in by. origin: by what its failures are counted.
    silent: whether it has sent nothing yet.
    nonce: what it was challenged with. heard: every byte it has said; spoken: frames said to it. With these
        another process can come to the same point: see Door.take_over.
    muted: frames that were said already, and are not said again.
    slowed: it has failed, and is told so later; until then nothing it says is listened to.
    tls, stream: how TLS is spoken with it, and the TLS that is, None without. channel: what is known by that.
    rank, moved_at: how far it has got, and since when: see Admission.
    can_hand_over: another process could go on with the socket and with what is kept here.
    """

    __slots__ = (
        "allow_md5",
        "credential",
        "deadline",
        "done",
        "fd",
        "heard",
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
        "uid",
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
        self.stream = None if tls is None else TlsStream(sock, tls.context, end_point=tls.end_point)
        self.sock: socket.socket | TlsStream = self.stream or sock
        self.tls_peer = NO_TLS
        self.fd = sock.fileno()
        self.uid = peer_uid(sock)
        self.peer = format_peer(peer) if self.uid is None else f"unix uid={self.uid}"
        self.origin = origin_of(peer, self.uid)
        self.listener = listener
        self.allow_md5 = allow_md5
        self.deadline = deadline
        self.reader = FrameReader()
        # Whether MD5 may be used is decided when the client is known: see Search.
        self.nonce = nonce or os.urandom(NONCE_SIZE)
        self.steps = as_listener(self.nonce, allow_md5=True, named=True)
        self.heard = bytearray()
        self.spoken = 0
        self.muted = 0
        self.slowed = False
        self.proof: Proof | None = None
        self.credential: Credential | None = None
        self.refusal = ""
        self.silent = True
        #: What a failure would be counted as.
        self.outcome = HandshakeOutcome.REJECTED
        self.done = False
        self.rank = Rank.SILENT
        self.moved_at = 0.0

    @property
    def can_hand_over(self) -> bool:
        """As a link's: not over TLS, whose keys are in this process."""
        return self.tls is None
