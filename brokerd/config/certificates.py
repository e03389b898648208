"""A listener's certificate, private key and CA: read, checked to match and to be in
date.

The result is ready to use, so a file damaged later affects only the next reload. Each
file is opened once, so that the checked content is the content used. The private key
file must be protected like any key file (``key_files``). Nothing here shows the key.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import ssl
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Final

from brokerd.config.file_reader import FileKind, Unreadable, read_file
from brokerd.config.key_files import read_private
from brokerd.config.model import NatsTlsEntry, TlsEntry
from brokerd.config.paths import joined
from brokerd.config.values import Requirement, TlsConfig
from brokerd_client._common.paths import is_plainly_a_path
from brokerd_client._common.ssl_errors import ssl_fault
from brokerd_client.wire import certificate

__all__ = ["MAX_PEM", "load_client_tls", "load_tls"]

#: Limits a file of certificates, in bytes. A system's whole list of CAs is a quarter of
#: it.
MAX_PEM: Final = 1024 * 1024
_KIND: Final = FileKind(
    MAX_PEM, remedy="give the file that holds the certificate", forbidden="let this user read it"
)
_BEGIN: Final = "-----BEGIN CERTIFICATE-----"
_END: Final = "-----END CERTIFICATE-----"
_MAKE_KEY: Final = "give the file that openssl or your CA's program wrote beside the certificate"

#: Called for each fault with the entry's field, and the fault with its remedy in
#: brackets.
Complain = Callable[[str, str], None]


def load_tls(
    entry: TlsEntry, base: str, environ: Mapping[str, str], complain: Complain
) -> TlsConfig | None:
    """Return a listener's TLS settings, or None after reporting a fault to
    ``complain``.

    Args:
        base: The directory of relative paths.
        environ: For CREDENTIALS_DIRECTORY, as in key_files.read_private.
    """
    paths = {
        field: joined(base, value)
        for field in ("certificate", "key", "client_ca")
        if (value := getattr(entry, field)) is not None
    }
    if entry.client_certificate is not None and entry.client_ca is None:
        complain(
            "client_certificate",
            "has no effect without client_ca (give client_ca, or take this out)",
        )
    contents: dict[str, bytes] = {}
    ders: dict[str, list[bytes]] = {}
    for field, path in paths.items():
        try:
            if field == "key":
                contents[field] = read_private(path, environ, _MAKE_KEY, entry.key)
            else:
                content, _ = read_file(
                    path, _KIND, is_shown=is_plainly_a_path(getattr(entry, field))
                )
                ders[field] = _certificates(path, content)
                contents[field] = content
        except Unreadable as error:
            complain(field, str(error))
    if "certificate" in ders:
        wrong = _out_of_time(paths["certificate"], ders["certificate"][0])
        if wrong:
            complain("certificate", wrong)
    if contents.keys() != paths.keys():
        return None
    context = _context(entry, paths, contents, ders.get("client_ca"), complain)
    if context is None:
        return None
    der = ders["certificate"][0]
    settings = repr((entry.client_certificate, entry.minimum))
    digest = hashlib.sha256(settings.encode())
    for content in contents.values():
        digest.update(hashlib.sha256(content).digest())
    return TlsConfig(
        context=context,
        end_point=certificate.end_point(der),
        content=digest.hexdigest(),
        not_after=certificate.validity(der)[1],
        client_ca=entry.client_ca is not None,
        binding=entry.channel_binding,
    )


def load_client_tls(
    entry: NatsTlsEntry, base: str, environ: Mapping[str, str], complain: Complain
) -> tuple[ssl.SSLContext, str] | None:
    """Return the context of connections to a server, and a digest of its files.

    Return None after reporting a fault to ``complain``. The arguments are those of
    ``load_tls``.
    """
    for given, needed in (("certificate", "key"), ("key", "certificate")):
        if getattr(entry, given) is not None and getattr(entry, needed) is None:
            complain(given, f"has no {needed} (give both, or neither)")
            return None
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    digest = hashlib.sha256()
    contents: dict[str, bytes] = {}
    for field in ("ca", "certificate", "key"):
        written = getattr(entry, field)
        if written is None:
            continue
        path = joined(base, written)
        try:
            if field == "key":
                contents[field] = read_private(path, environ, _MAKE_KEY, written)
            else:
                contents[field], _ = read_file(path, _KIND, is_shown=is_plainly_a_path(written))
                ders = _certificates(path, contents[field])
                wrong = _out_of_time(path, ders[0])
                if wrong:
                    complain(field, wrong)
                    return None
        except Unreadable as error:
            complain(field, str(error))
            return None
        digest.update(hashlib.sha256(contents[field]).digest())
        if field == "ca":
            context = ssl.create_default_context(cadata=b"".join(ders))
    if "key" in contents and entry.certificate is not None and entry.key is not None:
        paths = {"certificate": joined(base, entry.certificate), "key": joined(base, entry.key)}
        if not _load_chain(context, paths, contents, complain):
            return None
    return context, digest.hexdigest()


def _context(
    entry: TlsEntry,
    paths: Mapping[str, str],
    contents: Mapping[str, bytes],
    issuers: list[bytes] | None,
    complain: Complain,
) -> ssl.SSLContext | None:
    """Return the listener's context, or None after reporting a fault.

    issuers: the certificates of client_ca, in DER.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = (
        ssl.TLSVersion.TLSv1_2 if entry.minimum == "1.2" else ssl.TLSVersion.TLSv1_3
    )
    # TLS sessions are never resumed: each new connection shows its certificate again,
    # and it is checked against the CA in use then.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    if not _load_chain(context, paths, contents, complain):
        return None
    if issuers is not None:
        try:
            context.load_verify_locations(cadata=b"".join(issuers))
        except (ssl.SSLError, OSError) as error:
            complain(
                "client_ca",
                f"{paths['client_ca']} can't be used: {ssl_fault(error)} (give it in PEM)",
            )
            return None
        optional = entry.client_certificate is Requirement.OPTIONAL
        context.verify_mode = ssl.CERT_OPTIONAL if optional else ssl.CERT_REQUIRED
    return context


def _load_chain(
    context: ssl.SSLContext,
    paths: Mapping[str, str],
    contents: Mapping[str, bytes],
    complain: Complain,
) -> bool:
    """Give a context its certificate and private key, or report a fault and return False."""
    try:
        with (
            _named(contents["certificate"], paths["certificate"]) as chain,
            _named(contents["key"], paths["key"]) as key,
        ):
            context.load_cert_chain(chain, key, password=_no_password)
    except Unreadable as error:
        complain("key", f"{paths['key']} {error}")
        return False
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            complain(
                "key",
                f"{paths['key']} is not the key of {paths['certificate']} (give the two that belong"
                " together)",
            )
        elif error.reason in ("CA_MD_TOO_WEAK", "EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL"):
            complain(
                "certificate",
                f"{paths['certificate']} is too weak: {ssl_fault(error)} (get a stronger one)",
            )
        else:
            complain(
                "key",
                f"{paths['key']} holds no usable private key: {ssl_fault(error)} (give it in PEM)",
            )
        return False
    except OSError as error:
        complain("key", f"{paths['key']} can't be read: {error.strerror} (check the disk)")
        return False
    return True


@contextlib.contextmanager
def _named(content: bytes, path: str) -> Iterator[str]:
    """Yield a file name under which the content read from ``path`` can be opened.

    The ssl module accepts a certificate and its key only by file name. The name is that
    of a file in memory, or ``path`` itself on a system without such files.
    """
    with contextlib.ExitStack() as stack:
        name = path
        if hasattr(os, "memfd_create"):
            with contextlib.suppress(OSError):
                memory = stack.enter_context(
                    os.fdopen(os.memfd_create("brokerd"), "wb", buffering=0)
                )
                own = f"/proc/self/fd/{memory.fileno()}"
                if memory.write(content) == len(content) and os.access(own, os.R_OK):
                    name = own
        yield name


def _no_password() -> str:
    raise Unreadable(
        "is encrypted, and the broker can't ask for its password (openssl pkey -in FILE -out PLAIN)"
    )


def _certificates(path: str, content: bytes) -> list[bytes]:
    """Return the certificates of a PEM file, at least one, in DER.

    Raises Unreadable.
    """
    certificates = []
    for piece in content.decode("latin-1").split(_BEGIN)[1:]:
        text, end, _ = piece.partition(_END)
        try:
            der = ssl.PEM_cert_to_DER_cert(f"{_BEGIN}{text}{end}\n")
            certificate.validity(der)
            certificate.signature_hash(der)
        except (ValueError, LookupError):
            raise Unreadable(f"{path} holds a damaged certificate (copy it again)") from None
        certificates.append(der)
    if not certificates:
        raise Unreadable(
            f"{path} holds no certificate (give it in PEM, which begins with {_BEGIN})"
        )
    return certificates


def _out_of_time(path: str, der: bytes) -> str:
    begin, end = certificate.validity(der)
    now = datetime.now(UTC)
    if now > end:
        return f"{path} expired at {end.isoformat()} (get a new one)"
    if now < begin:
        return (
            f"{path} is not valid before {begin.isoformat()} (wait until then, or set the clock"
            " right)"
        )
    return ""
