"""A certificate authority for the tests: listeners' and clients' certificates in files,
and contexts that trust it.
"""

from __future__ import annotations

import hashlib
import ssl
from datetime import datetime
from pathlib import Path
from typing import Any

import trustme


class Authority:
    """One CA; its certificates are written below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ca = trustme.CA()
        self.file = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(self.file)

    def issue(
        self, name: str, *hosts: str, common_name: str | None = None, until: datetime | None = None
    ) -> Issued:
        """Return a certificate for these hosts, by default this machine, in files
        called ``name``.
        """
        made = self._ca.issue_cert(
            *(hosts or ("127.0.0.1", "localhost")), common_name=common_name, not_after=until
        )
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        key.touch(mode=0o600)
        made.private_key_pem.write_to_path(key)
        return Issued(certificate, key)

    def context(self, shown: Issued | None = None) -> ssl.SSLContext:
        """Return a client's context that trusts this CA, with the client's certificate."""
        context = ssl.create_default_context(cafile=str(self.file))
        if shown is not None:
            context.load_cert_chain(shown.certificate, shown.key)
        return context


class Issued:
    """A certificate and its key, in files."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self.certificate = certificate
        self.key = key

    @property
    def der(self) -> bytes:
        return ssl.PEM_cert_to_DER_cert(
            self.certificate.read_text().partition("-----END")[0] + "-----END CERTIFICATE-----"
        )

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.der).hexdigest()

    def entry(self, **more: Any) -> dict[str, Any]:
        """Return the ``tls`` section of a listen entry."""
        return {
            "certificate": str(self.certificate),
            "key": str(self.key),
            **{k: str(v) for k, v in more.items()},
        }
