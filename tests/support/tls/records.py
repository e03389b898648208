"""A client of TLS 1.3 that makes its own records, so that it can send what no library
would.

The handshake and all reading are the ssl module's. Written data is encrypted here, with
the key that the ssl module writes to its key log file. Source: RFC 8446, 4.6.3 (updates
of keys), 5 (records) and 7 (keys).
"""

from __future__ import annotations

import hmac
import os
import socket
import ssl
import struct
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from support.keys import key_of
from support.tls.raw_client import TlsRaw

from brokerd_client.address import Address

__all__ = ["APPLICATION_DATA", "HANDSHAKE", "Forger", "forger_of"]

HANDSHAKE, APPLICATION_DATA = 22, 23
_LARGEST = 2**14


class Forger(TlsRaw):
    """One connection over TLS 1.3.

    Args:
        notes: A file for its secrets, which no other connection writes to.
    """

    def __init__(self, address: Address, context: ssl.SSLContext, notes: Path) -> None:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.keylog_filename = str(notes)
        super().__init__(address, context)
        # The last connection's are the last.
        words = [line.split() for line in notes.read_text().splitlines()]
        secret = [word[2] for word in words if word[0] == "CLIENT_TRAFFIC_SECRET_0"][-1]
        cipher = self.sock.cipher()  # type: ignore[attr-defined]
        self._digest = "sha384" if "384" in cipher[0] else "sha256"
        self._key_size = cipher[2] // 8
        self._bare = socket.socket(fileno=os.dup(self.sock.fileno()))
        self._use(bytes.fromhex(secret))

    def close(self) -> None:
        self._bare.close()
        super().close()

    def _use(self, secret: bytes) -> None:
        self._secret, self._number = secret, 0
        self._cipher = AESGCM(self._expand("key", self._key_size))
        self._start = int.from_bytes(self._expand("iv", 12), "big")

    def _expand(self, label: str, size: int) -> bytes:
        what = b"tls13 " + label.encode()
        info = struct.pack("!HB", size, len(what)) + what + b"\0"
        return hmac.digest(self._secret, info + b"\1", self._digest)[:size]

    def record(self, kind: int, content: bytes) -> bytes:
        """Return one record."""
        inner = content + bytes((kind,))
        header = struct.pack("!BHH", APPLICATION_DATA, 0x0303, len(inner) + 16)
        nonce = (self._start ^ self._number).to_bytes(12, "big")
        self._number += 1
        return header + self._cipher.encrypt(nonce, inner, header)

    def records(self, data: bytes, size: int = _LARGEST) -> bytes:
        """Return the data in records of ``size`` bytes each."""
        return b"".join(
            self.record(APPLICATION_DATA, data[start : start + size])
            for start in range(0, len(data), size)
        )

    def key_update(self, *, answered: bool = False) -> bytes:
        """Return a record after which other keys are used.

        Args:
            answered: Whether the other end is asked to update its keys too.
        """
        made = self.record(HANDSHAKE, struct.pack("!BBHB", 24, 0, 1, answered))
        self._use(
            self._expand("traffic upd", hmac.new(self._secret, b"", self._digest).digest_size)
        )
        return made

    def write(self, data: bytes) -> None:
        self.write_bare(self.records(data))

    def write_bare(self, data: bytes) -> None:
        """Write bytes of TLS as they are."""
        self._bare.sendall(data)


def forger_of(address: Address, context: ssl.SSLContext, notes: Path, name: str) -> Forger:
    """Return a connection of this client."""
    forger = Forger(address, context, notes)
    try:
        forger.log_in(key_of(name), name.encode())
    except BaseException:
        forger.close()
        raise
    return forger
