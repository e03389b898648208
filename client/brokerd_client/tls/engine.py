"""TLS without I/O: encryption of one connection's bytes, and errors with helpful texts.

An Engine turns bytes to send into bytes for the wire, and back. The caller moves them,
through a socket (tls/stream.py) or an asyncio transport (aio/tls_transport.py). This
module is imported only if TLS is used, because the ssl module is slow to load.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
from typing import Final, cast

from brokerd_client.errors import TlsError
from brokerd_client.wire import certificate
from brokerd_client.wire.channel_binding import END_POINT, EXPORTER
from brokerd_client.wire.foreign_protocols import foreign_speech

__all__ = ["Engine", "explain", "thread_buffer"]

#: The first byte of a record: change_cipher_spec, alert, handshake or application_data
#: (RFC 8446, 5.1).
_RECORD_TYPES: Final = range(0x14, 0x18)
#: Most bytes decrypted at once, if the caller has no buffer of its own.
_PIECE: Final = 64 * 1024


class Engine:
    """One end of one TLS connection.

    The attribute ``more`` tells whether input may be readable before more bytes are
    fed. The attribute ``ended`` tells whether the peer has ended its side, or is gone.

    Args:
        context: The context of a client or a listener, according to ``end_point``.
        hostname: For a client, the name of the host that it connects to.
        end_point: For a listener, the binding data of its certificate; None for a
            client, which computes them.
    """

    __slots__ = (
        "_end_point",
        "_error",
        "_heard",
        "_incoming",
        "_outgoing",
        "_ssl",
        "ended",
        "more",
        "ready",
    )

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        hostname: str | None = None,
        end_point: bytes | None = None,
    ) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._ssl = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=end_point is not None,
            server_hostname=hostname,
        )
        self._end_point = end_point
        self._heard = False
        self._error: TlsError | None = None
        self.ready = False
        self.more = False
        self.ended = False

    def feed(self, data: bytes | memoryview) -> None:
        """Feed bytes from the wire. Raises TlsError if they are not TLS at all."""
        if not self._heard and data:
            self._heard = True
            if data[0] not in _RECORD_TYPES:
                protocol = "" if self._end_point is not None else foreign_speech(data)
                raise TlsError(protocol or _NO_TLS[self._end_point is not None])
        self._incoming.write(data)

    def feed_end(self) -> None:
        """Feed the end of the bytes from the wire."""
        self._incoming.write_eof()

    @property
    def heard(self) -> bool:
        """Whether any bytes have come from the wire."""
        return self._heard

    def output(self) -> bytes:
        """Return the bytes to write to the wire now.

        After an error there may be some too: an alert for the peer.
        """
        return self._outgoing.read()

    def handshake(self) -> bool:
        """Advance the handshake with the bytes fed so far; return whether it is over.

        Raises TlsError.
        """
        try:
            self._ssl.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise self._error_for(error) from error
        except ValueError as error:
            # No certificate can have this hostname.
            raise TlsError(str(error)) from error
        self.ready = True
        # Bytes that followed the handshake's last bytes have been fed with them.
        self.more = self._incoming.pending > 0
        return True

    def read_into(self, view: memoryview) -> int:
        """Decrypt into ``view``, which must not be empty; return the number of bytes.

        Raises TlsError, but only after the bytes before the error have been returned.
        """
        if self._error is not None:
            raise self._error
        count, size = 0, len(view)
        self.more = False
        try:
            while count < size:
                # With a buffer, read() returns the number of bytes that it has put
                # there.
                added = cast("int", self._ssl.read(size - count, cast("bytearray", view[count:])))
                if not added:
                    self.ended = True
                    return count
                count += added
            self.more = True
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            # No message of this protocol ends with the stream, so a missing closing
            # alert (close_notify) can't hide a truncation.
            self.ended = True
        except ssl.SSLError as error:
            self._error = self._error_for(error)
            if not count:
                raise self._error from error
            self.more = True
        return count

    def read(self) -> bytes:
        """Return all bytes that have arrived.

        Raises TlsError, but only after the bytes before the error have been returned.
        """
        pieces: list[bytes] = []
        buffer = thread_buffer()
        self.more = True
        while self.more and not (pieces and self._error is not None):
            pieces.append(bytes(buffer[: self.read_into(buffer)]))
        return b"".join(pieces)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt bytes to send. Raises TlsError."""
        try:
            view = memoryview(data)
            while view:
                view = view[self._ssl.write(cast("bytes", view)) :]
        except ssl.SSLError as error:
            raise self._error_for(error) from error

    def _error_for(self, error: ssl.SSLError) -> TlsError:
        if self.ready and isinstance(error, ssl.SSLEOFError):
            return TlsError("the peer has closed the connection")
        if self.ready and getattr(error, "reason", None) in _VERSION_REASONS:
            # Both ends had agreed on a version before.
            return TlsError("TLS failed: the received bytes are not TLS")
        return explain(error, listener=self._end_point is not None)

    def finish(self) -> None:
        """End the sending side, with TLS's closing alert (close_notify)."""
        # The peer may not have ended its side yet, or may send more first: this does
        # not wait.
        with contextlib.suppress(ssl.SSLError, ValueError):
            self._ssl.unwrap()

    @property
    def bindings(self) -> dict[str, bytes]:
        """The channel bindings, available after the handshake. Raises TlsError."""
        if self._end_point is not None:
            bindings = {END_POINT: self._end_point}
        else:
            der = self._ssl.getpeercert(binary_form=True)
            if der is None:
                raise TlsError(
                    "the listener sent no certificate, so the key can't be bound to its TLS"
                    " connection"
                )
            try:
                bindings = {END_POINT: certificate.end_point(der)}
            except ValueError as error:
                raise TlsError(f"the listener's certificate can't be read: {error}") from error
        if EXPORTER in ssl.CHANNEL_BINDING_TYPES:
            data = self._ssl.get_channel_binding(EXPORTER)
            if data:
                bindings[EXPORTER] = data
        return bindings

    @property
    def version(self) -> str:
        """The version of TLS, such as ``TLSv1.3``; "" before it is agreed on."""
        return self._ssl.version() or ""

    @property
    def peer_certificate(self) -> bytes | None:
        """The peer's verified certificate in DER; None if the peer has sent none."""
        return self._ssl.getpeercert(binary_form=True)

    @property
    def peer_subject(self) -> tuple[tuple[str, str], ...]:
        """The subject of the peer's certificate: OpenSSL's names and their values, in
        order.
        """
        fields = self._ssl.getpeercert() or {}
        parts = fields.get("subject", ())
        return tuple((name, value) for part in parts for name, value in part)  # type: ignore[misc,str-unpack,unused-ignore]


class _ThreadBuffer(threading.local):
    """The buffer in which one thread decrypts input, for one engine after the other."""

    view: memoryview | None = None


_thread_buffer: Final = _ThreadBuffer()


def thread_buffer() -> memoryview:
    """Return this thread's buffer for decrypted bytes.

    It is made once, because making it costs as much as decrypting a small message.
    """
    if _thread_buffer.view is None:
        _thread_buffer.view = memoryview(bytearray(_PIECE))
    return _thread_buffer.view


#: The error texts, by whether this end is the listener.
_NO_TLS: Final = {
    False: "the peer does not speak TLS: a plain listener is reached without tls:// and ssl=",
    True: (
        "the client does not speak TLS, which this listener requires: give it the address"
        " tls://HOST:PORT, or another listener"
    ),
}
_VERSION: Final = {
    False: (
        "the broker supports no TLS version that is allowed here: see minimum in its listen entry"
    ),
    True: (
        "the client supports no TLS version that is allowed here: update the client, or set"
        ' minimum: "1.2" in the listen entry'
    ),
}
_VERSION_REASONS: Final = (
    "UNSUPPORTED_PROTOCOL",
    "WRONG_VERSION_NUMBER",
    "WRONG_SSL_VERSION",
    "NO_PROTOCOLS_AVAILABLE",
)
_CLOSED: Final = {
    False: "the broker closed the connection during the TLS handshake: see the broker's log",
    True: "the client closed the connection during the TLS handshake",
}
#: The alerts with which a peer rejects this end's certificate.
_ALERTS: Final = (
    "UNKNOWN_CA",
    "BAD_CERTIFICATE",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_UNKNOWN",
    "CERTIFICATE_REVOKED",
)


def explain(error: ssl.SSLError, *, listener: bool) -> TlsError:
    """Return an error whose text tells what would be right.

    Args:
        error: The error of the ssl module.
        listener: Whether this end is the listener.
    """
    reason = str(getattr(error, "reason", None) or "")
    if isinstance(error, ssl.SSLEOFError):
        closed = TlsError(_CLOSED[listener])
        closed.cut_off = True
        return closed
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = str(error.verify_message).rstrip(".")
        if listener:
            return TlsError(
                f"the client's certificate is not accepted: {reason} (client_ca names the accepted"
                " issuers)"
            )
        if "ismatch" in reason:
            return TlsError(
                f"the broker's certificate is for another host: {reason} (connect to a name that"
                " is in it)"
            )
        return TlsError(
            f"the broker's certificate can't be verified: {reason} (name the CA that issued it: "
            "ssl.create_default_context(cafile=...), brokerctl --ca)"
        )
    if "ALERT" in reason:
        return TlsError(_alert_text(reason.lower().replace("_", " "), reason, listener=listener))
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return TlsError(
            "the client sent no certificate, and this listener requires one (client_ca)"
        )
    if reason in _VERSION_REASONS:
        return TlsError(_VERSION[listener])
    return TlsError(f"TLS failed: {reason.lower().replace('_', ' ') or error}")


def _alert_text(alert: str, reason: str, *, listener: bool) -> str:
    if "PROTOCOL_VERSION" in reason:
        return _VERSION[listener]
    rejects_certificate = any(name in reason for name in _ALERTS)
    if listener:
        if rejects_certificate:
            return (
                f"the client does not accept this listener's certificate: {alert} (the client"
                " needs the CA that issued it, and must connect to a name that is in it)"
            )
        return f"the client ended TLS with an alert: {alert}"
    if "CERTIFICATE_REQUIRED" in reason:
        return (
            "the broker requires a client certificate (load one into the ssl context, brokerctl"
            " --cert)"
        )
    if rejects_certificate:
        return (
            f"the broker does not accept our certificate: {alert} (client_ca in its configuration"
            " names the accepted issuers)"
        )
    if "HANDSHAKE_FAILURE" in reason:
        return (
            f"the broker ended TLS with an alert: {alert} (it may require a client certificate;"
            " see its log)"
        )
    return f"the broker ended TLS with an alert: {alert}"
