"""The ssl context of `brokerctl`, from options and environment: trusted CAs,
certificate.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from brokerd.ctl.status import Failure, Status
from brokerd_client._common.ssl_errors import ssl_fault

if TYPE_CHECKING:
    from ssl import SSLContext

__all__ = ["context_of"]


def context_of(
    address: str | None, ca: str | None, cert: str | None, cert_key: str | None
) -> SSLContext | None:
    """Return the context for a connection; None without TLS or without TLS settings.

    An option overrides its variable: BROKERD_ADDRESS, BROKERD_CA, BROKERD_CERT,
    BROKERD_CERT_KEY. The variables are ignored for an address without TLS. Raises
    Failure.
    """
    options = ca or cert or cert_key
    if not (address or os.environ.get("BROKERD_ADDRESS", "")).startswith("tls://"):
        if options:
            raise Failure(
                Status.USAGE,
                "--ca, --cert and --cert-key are for TLS: give --address tls://HOST:PORT",
            )
        return None
    ca = ca or os.environ.get("BROKERD_CA")
    cert = cert or os.environ.get("BROKERD_CERT")
    cert_key = cert_key or os.environ.get("BROKERD_CERT_KEY")
    if cert_key and not cert:
        raise Failure(Status.USAGE, "--cert-key is the key of a certificate: give --cert too")
    if not (ca or cert):
        return None
    # Imported here, because it is slow to load.
    import ssl

    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise Failure(
            Status.USAGE, f"--ca {ca} can't be used: {ssl_fault(error)}; give certificates in PEM"
        ) from error
    try:
        if cert:
            context.load_cert_chain(cert, cert_key)
    except OSError as error:
        files = f"--cert {cert}" + (f" with --cert-key {cert_key}" if cert_key else "")
        raise Failure(
            Status.USAGE, f"{files} can't be used: {ssl_fault(error)}; give both in PEM"
        ) from error
    return context
