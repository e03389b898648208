"""A bound on the work that a peer's TLS causes without carrying payload.

A peer may send many bytes with little or no payload: key updates, or records of one
byte. Each costs this end some microseconds. No I/O.
"""

from __future__ import annotations

from typing import Final

from brokerd_client.errors import TlsError

__all__ = ["MOST_EMPTY", "RecordBudget"]

#: Most bytes in a row that are read from an authenticated peer without any payload.
MOST_EMPTY: Final = 64 * 1024
#: Most bytes read at once if the last ones were mostly TLS's own. Key updates of this
#: size take a millisecond.
_SMALL_READ: Final = 4 * 1024
#: The share of payload below which a read counts as mostly TLS's own. The smallest
#: frames, each in its own record, have twice that share.
_LEAST_PAYLOAD: Final = 1 / 5
#: Bytes of the longest record (RFC 5246, 6.2.3). Its content can be read only when all
#: of it has arrived.
_RECORD: Final = 5 + 16 * 1024 + 2048


class RecordBudget:
    """The budget of one peer.

    most_empty: most bytes in a row that are read without any payload.
    """

    __slots__ = ("_empty", "_small_reads", "most_empty")

    def __init__(self, most_empty: int = MOST_EMPTY) -> None:
        self.most_empty = most_empty
        #: Bytes received since the last payload.
        self._empty = 0
        #: Whether little is read at once, because the last bytes were mostly TLS's own.
        self._small_reads = True

    def read_size(self, room: int, most: int) -> int:
        """Return how many bytes to read from the wire at once.

        room: the payload that the caller has room for. During a handshake that is
        little, so little is decrypted for it.
        """
        return min(_SMALL_READ, 2 * room) if self._small_reads else most

    def charge(self, payload: int, received: int) -> None:
        """Charge the bytes received from the wire, and the payload in them.

        Raises TlsError if the peer has sent too many bytes without any payload.
        """
        if received and payload >= received * _LEAST_PAYLOAD:
            self._small_reads = False
        elif received > _RECORD:
            self._small_reads = True
        self._empty = 0 if payload else self._empty + received
        if self._empty > self.most_empty:
            raise TlsError(f"the peer has sent {self._empty} bytes of TLS with nothing in them")
