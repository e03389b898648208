"""What the daemon holds of a configuration: plain, immutable values with nothing left to look up.

Keys are read, durations are seconds, sizes are bytes. Nothing here reads a file or knows a default: the
form of the file and every default are in ``brokerd.config.model``, which also hands these names on.

Two values are equal when they mean the same: where an entry stands in its file takes no part, so that
a reload does not disconnect a client whose lines only moved.
"""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from brokerd_client.address import Address

if TYPE_CHECKING:
    import ssl

__all__ = [
    "CertificateConfig",
    "ClientConfig",
    "Key",
    "ListenConfig",
    "LogFormat",
    "LogLevel",
    "MonitorConfig",
    "RateConfig",
    "Requirement",
    "Rule",
    "Source",
    "TlsConfig",
    "WhenConnected",
    "WhenFull",
]

_KEY_ID_PREFIX: Final = b"brokerd key id\0"


class WhenFull(StrEnum):
    """What becomes of a message whose recipient's queue is full."""

    WAIT = "wait"
    """The sender is held, then refused after ``limits.wait_timeout``."""
    REFUSE = "refuse"
    """The sender hears ``full`` at once."""
    DROP_OLDEST = "drop_oldest"
    """The oldest waiting messages make room."""
    DISCONNECT = "disconnect"
    """The recipient is disconnected."""


class WhenConnected(StrEnum):
    """What becomes of a further connection when all of a client's connections are taken."""

    REFUSE = "refuse"
    """The new one is refused."""
    REPLACE = "replace"
    """The oldest one is closed."""


class Requirement(StrEnum):
    """Whether something has to be there."""

    REQUIRED = "required"
    """Who comes without it is turned away."""
    OPTIONAL = "optional"
    """It is taken where it is there."""


class LogLevel(StrEnum):
    """The least important event that is still logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """How a line of the log is written."""

    AUTO = "auto"
    """Console on a terminal, the journal's own form where standard error is the journal, JSON elsewhere."""
    CONSOLE = "console"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Source:
    """Where something is written. line: counted from 1; 0 where there is no file."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Rule:
    """One pattern that allows something. source: where it is written, None for a default."""

    pattern: str
    source: Source | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.pattern


@dataclass(frozen=True, slots=True)
class Key:
    """One key and the time in which it is accepted; neither str nor repr shows it.

    not_before, not_after: with their time zone, None where the window is open.
    source: where it came from, such as ``key_file keys/alice``; never the key.
    """

    value: bytes = field(repr=False)
    not_before: datetime | None = None
    not_after: datetime | None = None
    source: str = field(default="", compare=False)

    @property
    def key_id(self) -> str:
        """Eight hexadecimal digits that tell keys apart in a log and do not lead back to the key."""
        return hashlib.sha256(_KEY_ID_PREFIX + self.value).hexdigest()[:8]

    def valid_at(self, now: datetime) -> bool:
        """Return whether the key is accepted at ``now``, a time with its zone; both ends belong to the window."""
        return not self.expired_at(now) and (self.not_before is None or self.not_before <= now)

    def expired_at(self, now: datetime) -> bool:
        """Return whether the key's time is over at ``now`` and will not come again."""
        return self.not_after is not None and now > self.not_after


@dataclass(frozen=True, slots=True)
class RateConfig:
    """What a client may send in a second; None where there is no limit."""

    messages: float | None
    bytes: float | None


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """TLS at one listener, its files read.

    context: what new connections use; it holds the private key, and shows it to nobody. end_point: what a channel is
    bound to (wire.binding). content: a digest of the files and settings, by which two are compared. not_after: the end
    of the certificate's time. binding: whether clients have to bind their keys.
    """

    context: ssl.SSLContext = field(repr=False, compare=False)
    end_point: bytes
    content: str
    not_after: datetime
    client_ca: bool = False
    binding: Requirement = Requirement.OPTIONAL

    def __str__(self) -> str:
        return f"{self.content[:8]}, good until {self.not_after:%Y-%m-%d}"


@dataclass(frozen=True, slots=True)
class CertificateConfig:
    """What a client's certificate has to be.

    subject: as ``brokerd.config.cert_subjects`` writes it, () for any. fingerprints: SHA-256 in lower-case hexadecimal
    digits, any of which will do; () for any.
    """

    subject: tuple[tuple[str, str], ...] = ()
    fingerprints: tuple[str, ...] = ()

    def __str__(self) -> str:
        subject = ",".join(f"{name}={value}" for name, value in self.subject)
        return " and ".join(filter(None, (subject, " or ".join(self.fingerprints))))


@dataclass(frozen=True, slots=True)
class ListenConfig:
    """One place to listen at.

    mode: the file mode of a Unix socket's file, None for every other address.
    group: the name or number of the group that gets the file, or None.
    name: of the service manager's socket to listen at, where that is bound to another address; or None.
    tls: None without. plain: whether it is meant to have none.
    """

    address: Address
    mode: int | None
    group: str | int | None
    allow_md5: bool
    source: Source = field(compare=False)
    name: str | None = None
    tls: TlsConfig | None = None
    plain: bool = False


@dataclass(frozen=True, slots=True)
class MonitorConfig:
    """Where the monitor answers over HTTP, and how much it tells.

    per_client: whether there are metrics for each client. hosts: names it answers by, besides that of the address.
    """

    address: Address
    per_client: bool
    source: Source = field(compare=False)
    hosts: tuple[str, ...] = ()

    @property
    def answered_hosts(self) -> frozenset[str]:
        """Every name that a request may have in its Host header, in small letters."""
        return frozenset(host.rstrip(".").lower() for host in (*self.hosts, self.address.host))

    @property
    def listen(self) -> ListenConfig:
        """The same place, as one to listen at. A Unix socket's file is its owner's alone."""
        mode = 0o600 if self.address.is_file else None
        return ListenConfig(self.address, mode=mode, group=None, allow_md5=False, source=self.source)

    @property
    def is_local(self) -> bool:
        """Whether nobody but this machine's own programs can get there."""
        if self.address.family == "AF_UNIX":
            return True
        try:
            return ipaddress.ip_address(self.address.host).is_loopback
        except ValueError:
            return self.address.host == "localhost"


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """One identity.

    keys: any of them is accepted within its window; empty only with ``peer_uid``.
    connections: how many may share the name. queue: bytes that may wait for the client.
    subscriptions, requests: how many of a connection's own the broker keeps in mind.
    peer_uid: the users a Unix socket's peer may be, None for all.
    certificate: what it has to show over TLS, None where nothing is demanded. binding: whether it has to come over TLS
    and bind its key to the channel.
    """

    name: str
    keys: tuple[Key, ...]
    connections: int
    send_to: tuple[Rule, ...]
    publish: tuple[Rule, ...]
    subscribe: tuple[Rule, ...]
    queue: int
    subscriptions: int
    requests: int
    when_full: WhenFull
    when_connected: WhenConnected
    rate: RateConfig
    allow_md5: bool
    peer_uid: tuple[int, ...] | None
    admin: bool
    source: Source = field(compare=False)
    certificate: CertificateConfig | None = None
    binding: Requirement = Requirement.OPTIONAL
