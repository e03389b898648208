"""TLS handshakes, before a peer's key is asked for, and the facts that they prove about
a peer.

A handshake costs the listener a signature, some hundred microseconds. So the handshakes
take one step per turn of the event loop, in the order in which bytes arrived. During a
flood of unknown peers, established connections wait for one step only. Each peer waits
for all the other peers. Deadlines and the number of handshakes are the business of
`PendingHandshakes`. Source: docs/protocol.md, "Over TLS".
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from brokerd.config import cert_subjects as subjects
from brokerd.config.values import CertificateConfig, ClientConfig, Requirement, TlsConfig
from brokerd_client.tls.budget import RecordBudget
from brokerd_client.tls.stream import TlsStream
from brokerd_client.wire.channel_binding import offer
from brokerd_client.wire.framing import frame
from brokerd_client.wire.handshake import FAILURE, NONCE_SIZE

if TYPE_CHECKING:
    import asyncio

    from brokerd.net.handshake.pending import PendingConnection

__all__ = [
    "NO_TLS",
    "SPEAKS_TLS",
    "TlsHandshakes",
    "TlsPeer",
    "challenge_nonce",
    "is_client_hello",
    "tls_stream",
]

#: Most bytes in a row without any payload that are read from a peer before it is
#: authenticated. An authenticated peer has the larger budget of its TlsConnection.
_MOST_EMPTY: Final = 20 * 1024

#: Sent to a silent peer at a listener that waits for TLS: most likely a client without
#: TLS.
_SPEAK_TLS: Final = b" this listener speaks TLS: use tls://HOST:PORT, or another listener"
_SILENT: Final = (
    "no byte within limits.handshake_timeout: a client without TLS waits for the broker to"
    " speak first (give it the address tls://HOST:PORT, or another listener)"
)
#: The reason for refusing a peer that speaks TLS to a listener without it.
SPEAKS_TLS: Final = (
    "peer speaks TLS, and this listener does not (give the listen entry tls:, or the client the"
    " address without tls://)"
)


@dataclass(frozen=True, slots=True)
class TlsPeer:
    """The facts that TLS proved about the peer, independent of its key.

    bindings: the values to which its key may be bound (wire.channel_binding).
    bound: the kind of binding that its key has, or "".
    required: whether the listener demands a binding.
    subject, fingerprint: of its certificate; () and "" if it has shown none.
    version: of TLS, or "" without TLS.
    """

    bindings: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    bound: str = ""
    required: bool = False
    subject: subjects.Subject = ()
    fingerprint: str = ""
    version: str = ""

    def refusal(self, client: ClientConfig) -> str:
        """Return why the client may not connect over this channel, or ""."""
        if (self.required or client.binding is Requirement.REQUIRED) and not self.bound:
            if not self.version:
                return "connection is not over TLS, and channel_binding: required demands it"
            return "key is not bound to the TLS channel, and channel_binding: required demands it"
        return "" if client.certificate is None else self._misses(client.certificate)

    def _misses(self, demanded: CertificateConfig) -> str:
        if not self.fingerprint:
            return (
                "client shows no certificate, and its entry demands one (certificate; over TLS,"
                " with client_ca)"
            )
        if demanded.subject and demanded.subject != self.subject:
            shown = subjects.show(self.subject)
            return (
                f"subject of the certificate is not the configured one: {shown} (certificate:"
                " subject)"
            )
        if demanded.fingerprints and self.fingerprint not in demanded.fingerprints:
            return (
                f"certificate is not a configured one: {self.fingerprint} (certificate:"
                " fingerprint)"
            )
        return ""


NO_TLS: Final = TlsPeer()


def tls_stream(sock: socket.socket, tls: TlsConfig) -> TlsStream:
    """Return the stream of an accepted connection, with a small budget."""
    return TlsStream(sock, tls.context, end_point=tls.end_point, budget=RecordBudget(_MOST_EMPTY))


def tls_peer_of(stream: TlsStream, *, required: bool) -> TlsPeer:
    """Return the facts that a finished TLS handshake proved about the peer."""
    engine = stream.engine
    der = engine.peer_certificate
    return TlsPeer(
        bindings=engine.bindings,
        required=required,
        subject=subjects.normal(engine.peer_subject),
        fingerprint="" if der is None else hashlib.sha256(der).hexdigest(),
        version=engine.version,
    )


def challenge_nonce(tls_peer: TlsPeer) -> bytes:
    """Return the random part of a challenge; over TLS, followed by the offered channel
    bindings.
    """
    return os.urandom(NONCE_SIZE) + offer(tls_peer.bindings)


def is_client_hello(data: bytes) -> bool:
    """Return whether these first bytes are TLS (RFC 8446, 5.1).

    As a frame they would announce 350 MiB.
    """
    return data.startswith(b"\x16\x03")


class TlsHandshakes:
    """TLS handshakes in progress.

    on_ready: called when a handshake is complete, with its TlsPeer.
    on_failed: called when a handshake has failed, with the reason.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_ready: Callable[[PendingConnection, TlsPeer], None],
        on_failed: Callable[[PendingConnection, str], None],
    ) -> None:
        self._loop = loop
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._waiting: deque[PendingConnection] = deque()
        self._stepping = False

    def begin(self, pending: PendingConnection) -> None:
        """Wait for the peer's first bytes."""
        self._loop.add_reader(pending.fd, self._on_event, pending)

    def _on_event(self, pending: PendingConnection) -> None:
        """Queue the handshake for its turn; until then its socket is not watched."""
        self.leave(pending)
        self._waiting.append(pending)
        if not self._stepping:
            self._stepping = True
            self._loop.call_soon(self._step)

    def leave(self, pending: PendingConnection) -> None:
        """Stop watching the socket."""
        self._loop.remove_reader(pending.fd)
        self._loop.remove_writer(pending.fd)

    def _step(self) -> None:
        self._stepping = False
        while self._waiting:
            pending = self._waiting.popleft()
            if not pending.done:
                self._go_on(pending)
                break
        if self._waiting and not self._stepping:
            self._stepping = True
            self._loop.call_soon(self._step)

    def _go_on(self, pending: PendingConnection) -> None:
        stream, tls = pending.tls_stream, pending.tls
        assert stream is not None
        assert tls is not None
        try:
            ready = stream.handshake()
            if ready:
                tls_peer = tls_peer_of(stream, required=tls.binding is Requirement.REQUIRED)
        except OSError as error:
            self._on_failed(pending, error.strerror or type(error).__name__)
            return
        if ready:
            self._on_ready(pending, tls_peer)
            return
        self._loop.add_reader(pending.fd, self._on_event, pending)
        if stream.unsent:
            self._loop.add_writer(pending.fd, self._on_event, pending)

    def overdue(self, pending: PendingConnection) -> str:
        """Return why an overdue handshake is refused, or "" if TLS is not the reason.

        A peer that has sent nothing gets an explanation without TLS.
        """
        stream = pending.tls_stream
        if stream is None or stream.engine.ready:
            return ""
        if stream.engine.heard:
            return "TLS handshake not finished within limits.handshake_timeout"
        with contextlib.suppress(OSError):
            pending.sock.send(frame(FAILURE + _SPEAK_TLS))
        return _SILENT
