"""The section ``cluster``: its files, and what a connection to NATS must have.

Beyond this machine, a connection to NATS needs credentials. It needs TLS too, unless
``plain`` says that it is meant to have none. Nothing here connects, and no error shows a secret.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Final

from brokerd.config import key_files
from brokerd.config.certificates import load_client_tls
from brokerd.config.file_reader import Unreadable
from brokerd.config.lint import is_exposed
from brokerd.config.model import ClientConfig, ClusterEntry
from brokerd.config.paths import joined
from brokerd.config.values import ClusterConfig, MailboxConfig, NatsTlsConfig, Rule, Source
from brokerd_client import address as addresses

__all__ = ["clients_digest", "load_cluster"]

#: The command that installs what a cluster needs beyond the other dependencies.
_INSTALL: Final = "pip install 'nats-py[nkeys]'"
#: The files with secrets, and where each comes from.
_SECRETS: Final = {
    "password_file": "write the user's password into it",
    "credentials": "nsc generate creds writes one",
    "nkey_file": "nk -gen user writes one",
}
#: Hexadecimal digits of the digest of ``clients``.
_DIGITS: Final = 16

#: Called for each fault with the path below ``cluster``, and the fault with its remedy in
#: brackets.
Complain = Callable[[tuple[str | int, ...], str], None]


def load_cluster(
    entry: ClusterEntry,
    source: Source,
    base: str,
    environ: Mapping[str, str],
    complain: Complain,
) -> ClusterConfig | None:
    """Return the cluster's settings, or None after reporting a fault to ``complain``.

    base: the directory of relative paths.
    environ: for CREDENTIALS_DIRECTORY, as in key_files.read_private.
    """
    faults = 0

    def report(path: tuple[str | int, ...], fault: str) -> None:
        nonlocal faults
        faults += 1
        complain(path, fault)

    _check_packages(entry, report)
    _check_login(entry, report)
    secrets = {field: _secret(entry, field, base, environ, report) for field in _SECRETS}
    tls = _tls(entry, base, environ, report)
    _check_servers(entry, report)
    if faults:
        return None
    return ClusterConfig(
        host=entry.host,
        nats=tuple(
            server if entry.tls is None else server.replace("nats://", "tls://")
            for server in entry.nats
        ),
        source=source,
        prefix=entry.prefix,
        unanswered=entry.unanswered,
        advertise=tuple(entry.advertise),
        credentials=secrets["credentials"],
        user=entry.user or "",
        password=secrets["password_file"],
        nkey=secrets["nkey_file"],
        tls=tls,
        plain=entry.plain,
        hosts=entry.hosts,
    )


def _check_packages(entry: ClusterEntry, report: Complain) -> None:
    needed = {"nats": "nats-py"}
    if entry.credentials is not None or entry.nkey_file is not None:
        needed["nkeys"] = "nkeys"
    for module, package in needed.items():
        if importlib.util.find_spec(module) is None:
            report((), f"needs the package {package}, which is not installed ({_INSTALL})")


def _check_login(entry: ClusterEntry, report: Complain) -> None:
    given = [
        field for field in ("credentials", "user", "nkey_file") if getattr(entry, field) is not None
    ]
    if len(given) > 1:
        report((given[1],), f"{given[0]} is given too (keep one of {' and '.join(given)})")
    if entry.user is not None and entry.password_file is None:
        report(("user",), "has no password (give password_file)")
    if entry.password_file is not None and entry.user is None:
        report(("password_file",), "is the password of no user (give user)")


def _secret(
    entry: ClusterEntry, field: str, base: str, environ: Mapping[str, str], report: Complain
) -> bytes | None:
    """Return the content of a file with a secret, or None without such a file."""
    file = getattr(entry, field)
    if file is None:
        return None
    path = joined(base, file)
    try:
        content = key_files.read_private(path, environ, _SECRETS[field], file)
    except Unreadable as error:
        report((field,), str(error))
        return None
    if not content.strip():
        report((field,), f"{path} is empty ({_SECRETS[field]})")
    return content.rstrip(b"\r\n")


def _tls(
    entry: ClusterEntry, base: str, environ: Mapping[str, str], report: Complain
) -> NatsTlsConfig | None:
    if entry.tls is None:
        return None
    loaded = load_client_tls(
        entry.tls, base, environ, lambda field, fault: report(("tls", field), fault)
    )
    return None if loaded is None else NatsTlsConfig(*loaded)


def _check_servers(entry: ClusterEntry, report: Complain) -> None:
    """Report servers beyond this machine without credentials or without TLS."""
    has_login = (
        entry.credentials is not None
        or entry.user is not None
        or entry.nkey_file is not None
        or (entry.tls is not None and entry.tls.certificate is not None)
    )
    is_plain = False
    for number, server in enumerate(entry.nats):
        scheme, _, address = server.partition("://")
        exposed = is_exposed(addresses.parse(address))
        plain = scheme == "nats" and entry.tls is None
        is_plain = is_plain or plain
        if exposed and not has_login:
            report(
                ("nats", number),
                f"{server} is beyond this machine, and no credentials are given (give"
                " credentials, user and password_file, or nkey_file)",
            )
        if exposed and plain and not entry.plain:
            report(
                ("nats", number),
                f"{server} has no TLS: machines on the way can read and change all messages"
                " (give tls://HOST:PORT or tls:, or plain: true if that is intended)",
            )
    if entry.plain and not is_plain:
        report(("plain",), "means no TLS, but all servers have it (take it out)")


def clients_digest(clients: Mapping[str, ClientConfig], homes: Mapping[str, object]) -> str:
    """Return a digest of the section ``clients``: the same where it means the same.

    homes: the mailbox of each client that has one, whatever its host.
    """
    digest = hashlib.sha256()
    #: The patterns of rules by the id of their list: most clients share theirs.
    patterns: dict[int, str] = {}
    for name in sorted(clients):
        client = clients[name]
        parts = [getattr(client, field) for field in _OTHER_FIELDS]
        for field in _RULES:
            rules = getattr(client, field)
            text = patterns.get(id(rules))
            if text is None:
                text = patterns[id(rules)] = _patterns(rules)
            parts.append(text)
        keys = [(key.key_id, key.not_before, key.not_after) for key in client.keys]
        digest.update(f"{_plain(homes.get(name))}{parts}{keys}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def _patterns(rules: Iterable[Rule]) -> str:
    return "\n".join(rule.pattern for rule in rules)


def _plain(mailbox: object) -> object:
    """Return a mailbox's settings without their places in a file."""
    if not isinstance(mailbox, MailboxConfig):
        return None
    return replace(mailbox, subscribe=()), _patterns(mailbox.subscribe)


#: The fields of a client that are lists of rules, and all others but its keys. Where a
#: mailbox lives decides its place here, and is in ``homes``.
_RULES: Final = ("send_to", "open_from", "publish", "subscribe")
_OTHER_FIELDS: Final = tuple(
    field.name
    for field in fields(ClientConfig)
    if field.compare and field.name not in (*_RULES, "keys", "mailbox", "home_subscribe")
)
