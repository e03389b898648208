"""The configuration as the daemon uses it: plain, immutable values that are complete.

Keys are read, durations are seconds, sizes are bytes. Nothing here reads a file or has
a default. ``brokerd.config.model`` defines the form of the file and every default, and
exports these names too.

Values are compared by their meaning, without the place of an entry in its file. So a
reload does not disconnect a client whose lines only moved.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from brokerd_client.address import Address

if TYPE_CHECKING:
    import ssl

__all__ = [
    "CertificateConfig",
    "ClientConfig",
    "ClusterConfig",
    "Key",
    "ListenConfig",
    "LogFormat",
    "LogLevel",
    "MailboxConfig",
    "MonitorConfig",
    "NatsTlsConfig",
    "RateConfig",
    "Requirement",
    "Rule",
    "Source",
    "StoreConfig",
    "TapScope",
    "TlsConfig",
    "WhenConnected",
    "WhenFull",
]

_KEY_ID_PREFIX: Final = b"brokerd key id\0"


@functools.lru_cache(maxsize=1024)
def _key_id(key: bytes) -> str:
    return hashlib.sha256(_KEY_ID_PREFIX + key).hexdigest()[:8]


class WhenFull(StrEnum):
    """The treatment of a message whose recipient's queue is full."""

    WAIT = "wait"
    """The sender is held, then refused after ``limits.wait_timeout``."""
    REFUSE = "refuse"
    """The sender gets ``full`` at once."""
    DROP_OLDEST = "drop_oldest"
    """The oldest waiting messages make room."""
    DISCONNECT = "disconnect"
    """The recipient is disconnected."""


class TapScope(StrEnum):
    """The parts of a client's messages that `brokerctl tap` may show."""

    HEADERS = "headers"
    """Names, topics, sizes and outcomes."""
    PAYLOAD = "payload"
    """The payload too."""


class WhenConnected(StrEnum):
    """The treatment of a connection beyond those that a client may have."""

    REFUSE = "refuse"
    """The new connection is refused."""
    REPLACE = "replace"
    """The oldest connection is closed."""


class Requirement(StrEnum):
    """Whether a property of a connection is required."""

    REQUIRED = "required"
    """A connection without it is refused."""
    OPTIONAL = "optional"
    """It is used if the client has it."""


class LogLevel(StrEnum):
    """The least important event that is still logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """The form of a log line."""

    AUTO = "auto"
    """Console on a terminal, the journal's own form where standard error is the
    journal, JSON elsewhere.
    """
    CONSOLE = "console"
    JSON = "json"


class Source(NamedTuple):
    """A place in a file. line: counted from 1; 0 without a file."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Rule:
    """One pattern that grants access.

    source: its place in the file, None for a default.
    """

    pattern: str
    source: Source | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.pattern


@dataclass(frozen=True, slots=True)
class Key:
    """One key and its validity period; neither str nor repr shows the key.

    not_before, not_after: with their time zone, None where the period is open.
    source: the key's origin, such as ``key_file keys/alice``; never the key.
    """

    value: bytes = field(repr=False)
    not_before: datetime | None = None
    not_after: datetime | None = None
    source: str = field(default="", compare=False)

    @property
    def key_id(self) -> str:
        """Eight hexadecimal digits that identify the key in a log but do not reveal it."""
        return _key_id(self.value)

    def valid_at(self, now: datetime) -> bool:
        """Return whether the key is accepted at ``now``, a time with its zone.

        Both ends belong to the validity period.
        """
        return not self.expired_at(now) and (self.not_before is None or self.not_before <= now)

    def expired_at(self, now: datetime) -> bool:
        """Return whether the key has expired at ``now``; it is never accepted again."""
        return self.not_after is not None and now > self.not_after


@dataclass(frozen=True, slots=True)
class RateConfig:
    """Limits on what a client may send per second; None without a limit."""

    messages: float | None
    bytes: float | None


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """TLS at one listener, with its files read.

    Attributes:
        context: Used by new connections; it holds the private key, and never shows it.
        end_point: The channel binding's value (wire.channel_binding).
        content: A digest of the files and settings, for comparison.
        not_after: When the certificate expires.
        binding: Whether clients must bind their keys.
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
    """Requirements on a client's certificate.

    subject: the normal form of ``brokerd.config.cert_subjects``, () for any.
    fingerprints: SHA-256 in lower-case hexadecimal digits; one must match; () for any.
    """

    subject: tuple[tuple[str, str], ...] = ()
    fingerprints: tuple[str, ...] = ()

    def __str__(self) -> str:
        subject = ",".join(f"{name}={value}" for name, value in self.subject)
        return " and ".join(filter(None, (subject, " or ".join(self.fingerprints))))


@dataclass(frozen=True, slots=True)
class ListenConfig:
    """One listener.

    Attributes:
        mode: The file mode of a Unix socket's file, None for every other address.
        group: The name or number of the group that gets the file, or None.
        name: The name of the service manager's socket to use, if that is bound to
            another address; or None.
        tls: None without TLS.
        plain: Whether TLS is absent on purpose.
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
    """The address of the monitor, which answers over HTTP, and the scope of its
    metrics.

    Attributes:
        per_client: Whether there are metrics for each client.
        hosts: Accepted host names, besides that of the address.
        page: Whether there is a page for browsers.
        password: Demanded by all pages but the health checks; None for no password.
    """

    address: Address
    per_client: bool
    source: Source = field(compare=False)
    hosts: tuple[str, ...] = ()
    page: bool = True
    password: bytes | None = field(default=None, repr=False)

    @property
    def answered_hosts(self) -> frozenset[str]:
        """The names accepted in a request's Host header, in lower case."""
        return frozenset(host.rstrip(".").lower() for host in (*self.hosts, self.address.host))

    @property
    def listen(self) -> ListenConfig:
        """The same address as a listener.

        Only the owner can use a Unix socket's file.
        """
        mode = 0o600 if self.address.is_file else None
        return ListenConfig(
            self.address, mode=mode, group=None, allow_md5=False, source=self.source
        )

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine can reach the address."""
        if self.address.family == "AF_UNIX":
            return True
        try:
            return ipaddress.ip_address(self.address.host).is_loopback
        except ValueError:
            return self.address.host == "localhost"


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """The directory of the mailboxes on disk.

    Attributes:
        path: The directory.
        min_free: Bytes of the disk that mailboxes leave free.
        dedup: Seconds for which a deduplication key is remembered.
    """

    path: str
    min_free: int
    dedup: float


@dataclass(frozen=True, slots=True)
class NatsTlsConfig:
    """TLS towards NATS, with its files read.

    Attributes:
        context: A client's; it holds the private key, and never shows it.
        content: A digest of the files and settings, for comparison.
    """

    context: ssl.SSLContext = field(repr=False, compare=False)
    content: str

    def __str__(self) -> str:
        return self.content[:8]


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """This host's place in a cluster, and the NATS servers that connect it.

    Attributes:
        host: The name of this host in the cluster.
        nats: The addresses of the servers, nats://HOST:PORT, or tls://HOST:PORT for TLS.
        prefix: The first tokens of all subjects.
        unanswered: Bytes in flight per remote host.
        advertise: Where clients of other hosts can connect to this one.
        credentials: The text of a credentials file of NATS, or None.
        user, password: Or a user's name and password.
        nkey: Or the seed of an nkey.
        tls: The settings of TLS; None for those of the system.
        plain: Whether TLS is absent on purpose.
        hosts: Limits the other hosts.
        digest: Of the section ``clients``; equal where the sections mean the same.
    """

    host: str
    nats: tuple[str, ...]
    source: Source = field(compare=False)
    prefix: str = "brokerd"
    unanswered: int = 8 * 1024 * 1024
    advertise: tuple[str, ...] = ()
    credentials: bytes | None = field(default=None, repr=False)
    user: str = ""
    password: bytes | None = field(default=None, repr=False)
    nkey: bytes | None = field(default=None, repr=False)
    tls: NatsTlsConfig | None = None
    plain: bool = False
    hosts: int = 64
    digest: str = field(default="", compare=False)

    @property
    def login(self) -> str:
        """How the broker authenticates itself at NATS, without a secret."""
        if self.user:
            return f"user {self.user}"
        if self.credentials is not None:
            return "a credentials file"
        return "none" if self.nkey is None else "an nkey"


@dataclass(frozen=True, slots=True)
class MailboxConfig:
    """The mailbox of one client.

    Attributes:
        size, messages: Limit the bytes and messages in it, with dead letters.
        ttl: Seconds after which a message expires; None without a limit.
        subscribe: Topic patterns whose events are stored.
        window: Messages that a connection holds at most, if it names no number.
        attempts: Failed attempts after which a message becomes a dead letter.
        when_full: WAIT or REFUSE.
        dead: The share of ``size`` and ``messages`` that dead letters may use, 0 to 1.
        max_message: Payload bytes.
        ack_timeout: Seconds after which a held message is returned; None without.
    """

    size: int
    messages: int
    ttl: float | None
    subscribe: tuple[Rule, ...]
    window: int
    attempts: int
    when_full: WhenFull
    dead: float
    max_message: int
    ack_timeout: float | None


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """One client.

    Attributes:
        keys: Each is accepted within its validity period; empty only with ``peer_uid``.
        connections: Limits the connections that share the name.
        queue: Limits the bytes that may wait for the client.
        subscriptions, requests: Limits how many the broker stores per connection.
        in_flight: Limits the requests delivered to one connection without an outcome,
            None without a limit.
        channels: Limits the open channels at either end, and those that the client has
            asked for.
        mailbox: Its mailbox, or None. In a cluster it is None at other hosts than ``home``.
        home: The host of its mailbox in a cluster; "" without mailbox or without cluster.
        home_subscribe: The topics whose events its mailbox stores at another host.
        admin_payload: Whether it sees the payloads of others' messages, as an
            administrator.
        peer_uid: The users allowed as the peer of a Unix socket, None for all.
        certificate: The certificate required over TLS, None if none is required.
        binding: Whether the client must use TLS and bind its key to the channel.
        expected: Whether the client is meant to be online always.
        tap: What administrators may see of messages from and to the client.
    """

    name: str
    keys: tuple[Key, ...]
    source: Source = field(compare=False)
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
    certificate: CertificateConfig | None = None
    binding: Requirement = Requirement.OPTIONAL
    in_flight: int | None = None
    tap: TapScope = TapScope.HEADERS
    expected: bool = False
    open_from: tuple[Rule, ...] = (Rule("*"),)
    channels: int = 64
    mailbox: MailboxConfig | None = None
    admin_payload: bool = False
    home: str = ""
    home_subscribe: tuple[Rule, ...] = ()
