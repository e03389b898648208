"""TLS, sans-I/O: what the ssl module does to the bytes of one connection, and its errors in words that help.

An Engine turns bytes to send into bytes for the wire and back; who moves them is the caller's business: a socket
(tls_stream) or a transport (aio_tls). Imported only where TLS is used: the ssl module takes its time to load.
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

__all__ = ["Engine", "explained", "room"]

#: The first byte of a record: change_cipher_spec, alert, handshake or application_data (RFC 8446, 5.1).
_RECORD_TYPES: Final = range(0x14, 0x18)
#: Bytes decrypted at once where the caller has no buffer of its own.
_PIECE: Final = 64 * 1024


class Engine:
    """One end of one TLS channel.

    context: a client's or a listener's, as ``end_point`` says. hostname: for a client, whom it wants to talk to.
    end_point: for a listener, the binding data of its certificate; None for a client, who computes them.
    more: whether there may be something to read before any more is fed.
    ended: whether the peer has said that nothing more comes, or is gone.
    """

    __slots__ = ("_end_point", "_error", "_heard", "_incoming", "_outgoing", "_ssl", "ended", "more", "ready")

    def __init__(self, context: ssl.SSLContext, *, hostname: str | None = None, end_point: bytes | None = None) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._ssl = context.wrap_bio(
            self._incoming, self._outgoing, server_side=end_point is not None, server_hostname=hostname
        )
        self._end_point = end_point
        self._heard = False
        self._error: TlsError | None = None
        self.ready = False
        self.more = False
        self.ended = False

    def feed(self, data: bytes | memoryview) -> None:
        """Take in bytes from the wire. Raises TlsError: they are not TLS at all."""
        if not self._heard and data:
            self._heard = True
            if data[0] not in _RECORD_TYPES:
                speech = "" if self._end_point is not None else foreign_speech(data)
                raise TlsError(speech or _NO_TLS[self._end_point is not None])
        self._incoming.write(data)

    def feed_end(self) -> None:
        """Nothing more comes from the wire."""
        self._incoming.write_eof()

    @property
    def heard(self) -> bool:
        """Whether anything has come from the wire."""
        return self._heard

    def output(self) -> bytes:
        """Return what is to be put on the wire now, also after an error: it may be what the peer is to know of it."""
        return self._outgoing.read()

    def handshake(self) -> bool:
        """Go on with the handshake as far as the bytes that have come allow; return whether it is over.

        Raises TlsError.
        """
        try:
            self._ssl.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise self._explained(error) from error
        except ValueError as error:
            # A hostname that no certificate can have.
            raise TlsError(str(error)) from error
        self.ready = True
        # What came behind the handshake's last bytes has been taken in with them.
        self.more = self._incoming.pending > 0
        return True

    def read_into(self, view: memoryview) -> int:
        """Decrypt into ``view``, never empty; return how many bytes. Raises TlsError, after what came before it."""
        if self._error is not None:
            raise self._error
        got, size = 0, len(view)
        self.more = False
        try:
            while got < size:
                # With a buffer it returns how many bytes it has put there.
                count = cast("int", self._ssl.read(size - got, cast("bytearray", view[got:])))
                if not count:
                    self.ended = True
                    return got
                got += count
            self.more = True
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            # Nothing in this protocol is ended by the end of the stream, so that a missing goodbye hides nothing.
            self.ended = True
        except ssl.SSLError as error:
            self._error = self._explained(error)
            if not got:
                raise self._error from error
            self.more = True
        return got

    def read(self) -> bytes:
        """Return everything that has arrived. Raises TlsError, after what came before."""
        pieces: list[bytes] = []
        buffer = room()
        self.more = True
        while self.more and not (pieces and self._error is not None):
            pieces.append(bytes(buffer[: self.read_into(buffer)]))
        return b"".join(pieces)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt. Raises TlsError."""
        try:
            view = memoryview(data)
            while view:
                view = view[self._ssl.write(cast("bytes", view)) :]
        except ssl.SSLError as error:
            raise self._explained(error) from error

    def _explained(self, error: ssl.SSLError) -> TlsError:
        if self.ready and isinstance(error, ssl.SSLEOFError):
            return TlsError("the peer has closed the connection")
        if self.ready and getattr(error, "reason", None) in _VERSION_REASONS:
            # There was one that both speak.
            return TlsError("TLS failed: what came is not TLS")
        return explained(error, listener=self._end_point is not None)

    def finish(self) -> None:
        """Say goodbye: nothing more is written here."""
        # The peer has not said it yet, or has other things to say first: nobody waits for that here.
        with contextlib.suppress(ssl.SSLError, ValueError):
            self._ssl.unwrap()

    @property
    def bindings(self) -> dict[str, bytes]:
        """What this channel can be bound to, once the handshake is over. Raises TlsError."""
        if self._end_point is not None:
            found = {END_POINT: self._end_point}
        else:
            der = self._ssl.getpeercert(binary_form=True)
            if der is None:
                raise TlsError("the listener shows no certificate, so that the key can't be bound to its channel")
            try:
                found = {END_POINT: certificate.end_point(der)}
            except ValueError as error:
                raise TlsError(f"the listener's certificate can't be read: {error}") from error
        if EXPORTER in ssl.CHANNEL_BINDING_TYPES:
            data = self._ssl.get_channel_binding(EXPORTER)
            if data:
                found[EXPORTER] = data
        return found

    @property
    def version(self) -> str:
        """The version of TLS, such as ``TLSv1.3``; "" before it is agreed on."""
        return self._ssl.version() or ""

    @property
    def peer_certificate(self) -> bytes | None:
        """The peer's certificate, verified, in DER; None where it has shown none."""
        return self._ssl.getpeercert(binary_form=True)

    @property
    def peer_subject(self) -> tuple[tuple[str, str], ...]:
        """Whom the peer's certificate is about: names, as OpenSSL writes them out, and values, in its order."""
        found = self._ssl.getpeercert() or {}
        parts = found.get("subject", ())
        return tuple((name, value) for part in parts for name, value in part)  # type: ignore[misc,str-unpack,unused-ignore]


class _Rooms(threading.local):
    """Where one thread decrypts what has arrived, for one engine after the other."""

    room: memoryview | None = None


_rooms: Final = _Rooms()


def room() -> memoryview:
    """Return this thread's buffer: made once, because making it costs as much as decrypting a small message."""
    if _rooms.room is None:
        _rooms.room = memoryview(bytearray(_PIECE))
    return _rooms.room


#: By whether this end listens.
_NO_TLS: Final = {
    False: "the peer does not speak TLS: a plain listener is reached without tls:// and ssl=",
    True: "it does not speak TLS, which this listener does: give it the address tls://HOST:PORT, or another listener",
}
_VERSION: Final = {
    False: "the broker speaks no version of TLS that is allowed here: its listen entry says which it does (minimum)",
    True: 'it speaks no version of TLS that is allowed here: it must be newer, or the listen entry say minimum: "1.2"',
}
_VERSION_REASONS: Final = (
    "UNSUPPORTED_PROTOCOL",
    "WRONG_VERSION_NUMBER",
    "WRONG_SSL_VERSION",
    "NO_PROTOCOLS_AVAILABLE",
)
_CLOSED: Final = {
    False: "the broker closed the connection during the TLS handshake: its log says why",
    True: "closed by the peer during the TLS handshake",
}
#: What a peer says of our certificate.
_ALERTS: Final = ("UNKNOWN_CA", "BAD_CERTIFICATE", "CERTIFICATE_EXPIRED", "CERTIFICATE_UNKNOWN", "CERTIFICATE_REVOKED")


def explained(error: ssl.SSLError, *, listener: bool) -> TlsError:
    """Return the error in words that say what would be right. listener: whether this end listens."""
    reason = str(getattr(error, "reason", None) or "")
    if isinstance(error, ssl.SSLEOFError):
        cut = TlsError(_CLOSED[listener])
        cut.cut_off = True
        return cut
    if isinstance(error, ssl.SSLCertVerificationError):
        what = str(error.verify_message).rstrip(".")
        if listener:
            return TlsError(f"its certificate is not accepted: {what} (client_ca says who may issue it)")
        if "ismatch" in what:
            return TlsError(f"the broker's certificate is for another host: {what} (connect to a name that is in it)")
        return TlsError(
            f"the broker's certificate can't be verified: {what} (name the CA that issued it: "
            "ssl.create_default_context(cafile=...), brokerctl --ca)"
        )
    if "ALERT" in reason:
        return TlsError(_alert(reason.lower().replace("_", " "), reason, listener=listener))
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return TlsError("it shows no certificate, and this listener demands one (client_ca)")
    if reason in _VERSION_REASONS:
        return TlsError(_VERSION[listener])
    return TlsError(f"TLS failed: {reason.lower().replace('_', ' ') or error}")


def _alert(said: str, reason: str, *, listener: bool) -> str:
    if "PROTOCOL_VERSION" in reason:
        return _VERSION[listener]
    if listener:
        if any(alert in reason for alert in _ALERTS):
            return (
                f"it does not accept this listener's certificate: {said} (it needs the CA that issued it, and to "
                "connect to a name that is in it)"
            )
        return f"it broke TLS off: {said}"
    if "CERTIFICATE_REQUIRED" in reason:
        return "the broker demands a client certificate (load one into the ssl context, brokerctl --cert)"
    if any(alert in reason for alert in _ALERTS):
        return f"the broker does not accept our certificate: {said} (its client_ca says who may issue it)"
    if "HANDSHAKE_FAILURE" in reason:
        return f"the broker broke TLS off: {said} (it may demand a client certificate; its log says why)"
    return f"the broker broke TLS off: {said}"
