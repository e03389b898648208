"""The model of a configuration: the form of the file, every default, and the resulting
values.

The pydantic models define the file's form. The JSON Schema (``json_schema``) and the
tables of docs/configuration.md follow them. Checks that need several entries, another file or a
key's bytes are in ``validator``, ``builder`` and ``key_files``. Nothing here opens a
file. No error of these models repeats a value from a place where a key may stand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.json_schema import JsonSchemaValue

from brokerd.config import units
from brokerd.config.fields import (
    Admin,
    Advertised,
    AnySize,
    ByteRate,
    Duration,
    Fingerprints,
    Group,
    Host,
    HostName,
    KeyBytes,
    MailboxWhenFull,
    Mode,
    Moment,
    Name,
    NamePattern,
    NatsServer,
    NonEmpty,
    Percent,
    PublishPattern,
    Rate,
    Several,
    Size,
    SocketName,
    Subject,
    SubjectPrefix,
    SubscribePattern,
    Timeout,
    TlsVersion,
    UserId,
    Where,
    false_as_none,
)
from brokerd.config.values import (
    ClientConfig,
    ClusterConfig,
    Key,
    ListenConfig,
    LogFormat,
    LogLevel,
    MailboxConfig,
    MonitorConfig,
    RateConfig,
    Requirement,
    Rule,
    Source,
    StoreConfig,
    TapScope,
    WhenConnected,
    WhenFull,
)

__all__ = [
    "KEY_FIELDS",
    "KEY_ITEM_FIELDS",
    "ClientConfig",
    "ClientEntry",
    "ClusterConfig",
    "ClusterEntry",
    "Config",
    "File",
    "IncludedFile",
    "Key",
    "KeyEntry",
    "Limits",
    "ListenConfig",
    "ListenEntry",
    "Log",
    "LogAreas",
    "LogFormat",
    "LogLevel",
    "MailboxConfig",
    "MailboxEntry",
    "MonitorConfig",
    "MonitorEntry",
    "RateConfig",
    "RateEntry",
    "Requirement",
    "Rule",
    "Source",
    "StoreConfig",
    "StoreEntry",
    "TlsEntry",
    "WhenConnected",
    "WhenFull",
]

#: The fields that give a client's key; a client has at most one of them.
KEY_FIELDS: Final = ("key", "key_file", "key_env", "key_credential", "keys")
#: The fields that give the key in one entry of ``keys``.
KEY_ITEM_FIELDS: Final = ("file", "key", "env", "credential")


def _written(default: str, read: Callable[[str], object]) -> Any:
    """Return a field with its default in readable form, as the JSON Schema shows it."""
    # The default is read once, here: to validate the defaults of every client would
    # take longer than to validate its own entries.
    return Field(default=read(default), json_schema_extra={"default": default})


class _Entry(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        hide_input_in_errors=True,
        # A start needs few of the models. The docstrings are read by json_schema:
        # pydantic would parse this file once for each class.
        defer_build=True,
    )


def _with_short_form(core_schema: Any, handler: Any, *short: JsonSchemaValue) -> JsonSchemaValue:
    """Return the schema of a mapping that may also be written in a short form."""
    schema = handler.resolve_ref_schema(handler(core_schema))
    long = {
        key: schema[key]
        for key in ("type", "properties", "required", "additionalProperties")
        if key in schema
    }
    return {
        "title": schema["title"],
        "description": schema["description"],
        "anyOf": [*short, long],
    }


class _AddressEntry(_Entry):
    """An address alone, or a mapping with its options."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        """Return the long form of an entry that is only an address."""
        return value if isinstance(value, Mapping) else {"address": value}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> JsonSchemaValue:
        """Return the schema of both forms."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        return _with_short_form(core_schema, handler, *schema["properties"]["address"]["anyOf"])


class TlsEntry(_Entry):
    """TLS at a listener: its certificate, and what it requires of clients."""

    certificate: NonEmpty
    """A file with the certificate chain in PEM, the server's own first, relative to this file."""
    key: NonEmpty
    """A file with the certificate's private key in PEM, which only its owner can read."""
    client_ca: NonEmpty | None = None
    """A file with the CA certificates, in PEM, that clients' certificates must be issued by."""
    client_certificate: Annotated[Requirement, Field(strict=False)] | None = None
    """With client_ca, whether clients must show a certificate: required (default) or optional."""
    minimum: TlsVersion = _written("1.3", str)
    """The lowest TLS version that is accepted: 1.2 or 1.3."""
    channel_binding: Annotated[Requirement, Field(strict=False)] = Requirement.OPTIONAL
    """Whether clients must bind their key to the TLS channel: required or optional."""


class ListenEntry(_AddressEntry):
    """A place to listen at: an address alone, or a mapping with its options."""

    address: Where
    r"""HOST:PORT, [IPV6]:PORT, [HOST, PORT], @ABSTRACT, \\.\pipe\NAME, or a Unix socket's path."""
    allow_md5: bool = False
    """Whether every client may use HMAC-MD5 here, the only digest Python 3.11 and older know."""
    mode: Mode = _written("0600", lambda digits: int(digits, 8))
    """File mode of a Unix socket, as octal digits in quotes."""
    group: Group | None = None
    """Group that gets the Unix socket's file: a name or a number."""
    name: SocketName | None = None
    """The FileDescriptorName= of the systemd socket for this entry, if its address differs."""
    tls: TlsEntry | None = None
    """TLS, on TCP: the certificate, its key, and what is required of clients."""
    plain: bool = False
    """Confirms that TCP without TLS is intended, and silences the warning about it."""


class KeyEntry(_Entry):
    """One of a client's keys: where it is, and when it is accepted."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": [field]} for field in KEY_ITEM_FIELDS]},
    )

    file: NonEmpty | None = None
    """A file that holds the key, relative to this file; one trailing newline is cut."""
    key: KeyBytes | None = Field(default=None, repr=False)
    """The key itself, in a file that only its owner can read."""
    env: NonEmpty | None = None
    """The environment variable that holds the key."""
    credential: NonEmpty | None = None
    """The name of a systemd credential: a file in $CREDENTIALS_DIRECTORY."""
    not_before: Moment | None = None
    """The key is accepted from this time on; in UTC unless it has a zone."""
    not_after: Moment | None = None
    """The key is accepted up to this time; in UTC unless it has a zone."""


class RateEntry(_Entry):
    """Most messages and bytes that a client may send per second."""

    messages: Rate | None = None
    """Messages per second, such as 10000/s; without it, no limit."""
    bytes: ByteRate | None = None
    """Bytes per second, such as 50MiB/s; without it, no limit."""


class CertificateEntry(_Entry):
    """Requirements for a client's certificate, in addition to the client's key."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["subject"]}, {"required": ["fingerprint"]}]}
    )

    subject: Subject | None = None
    """The whole subject, such as CN=alice,O=Example, in any order."""
    fingerprint: Fingerprints | None = None
    """The certificate's SHA-256 in hexadecimal digits, or a list of those that are accepted."""


class MailboxEntry(_Entry):
    """A mailbox: true for the defaults, or a mapping with its options."""

    size: Size = _written("1GiB", units.size)
    """Most bytes of messages in it, with 128 bytes for each deduplication key."""
    messages: Annotated[int, Field(ge=1, le=1_000_000_000)] = 1_000_000
    """Most messages in it."""
    ttl: Timeout | None = None
    """The longest time that a message is kept; without it, no limit."""
    subscribe: Several[SubscribePattern] = ()
    """Topic patterns whose events are stored, within the client's own rule ``subscribe``."""
    window: Annotated[int, Field(ge=1, le=10_000)] = 64
    """Most messages that a connection holds, unless it asks for another number."""
    attempts: Annotated[int, Field(ge=1, le=65_535)] = 10
    """Failed attempts after which a message becomes a dead letter."""
    when_full: MailboxWhenFull = WhenFull.REFUSE
    """Treatment of messages to a full mailbox: refuse, or wait up to limits.wait_timeout."""
    dead: Percent = _written("20%", units.percent)
    """The share of size and messages that dead letters may use."""
    max_message: Size = _written("1MiB", units.size)
    """The longest message that is stored, in bytes, without the broker's header."""
    ack_timeout: Timeout | None = None
    """A message held for longer is returned, and a warning logged; without it, no limit."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        """Return the long form of ``true``."""
        return {} if value is True else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> JsonSchemaValue:
        """Return the schema of both forms."""
        return _with_short_form(core_schema, handler, {"type": "boolean"})


class StoreEntry(_Entry):
    """Where mailboxes are kept: the path of a directory alone, or a mapping with its options."""

    path: NonEmpty | None = None
    """The directory, relative to this file; by default $STATE_DIRECTORY, which systemd sets."""
    min_free: AnySize = _written("256MiB", units.size)
    """Bytes of the disk that stay free: messages that need them are refused."""
    dedup: Duration = _written("1h", units.duration)
    """The time for which a message's deduplication key is remembered."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        """Return the long form of an entry that is only a path."""
        return {"path": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> JsonSchemaValue:
        """Return the schema of both forms."""
        return _with_short_form(core_schema, handler, {"type": "string", "minLength": 1})


class ClientEntry(_Entry):
    """One identity: its keys, rules and quotas."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"oneOf": [{"required": [field]} for field in KEY_FIELDS]},
                {
                    "required": ["peer_uid"],
                    "not": {"anyOf": [{"required": [field]} for field in KEY_FIELDS]},
                },
            ]
        },
    )

    key: KeyBytes | None = Field(default=None, repr=False)
    """The key itself, in a file that only its owner can read."""
    key_file: NonEmpty | None = None
    """A file that holds the key, relative to this file; one trailing newline is cut."""
    key_env: NonEmpty | None = None
    """The environment variable that holds the key."""
    key_credential: NonEmpty | None = None
    """The name of a systemd credential: a file in $CREDENTIALS_DIRECTORY."""
    keys: Annotated[Several[KeyEntry], Field(min_length=1)] | None = None
    """Several keys, any of which is accepted within its time."""
    connections: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """Most connections that may share the name at once."""
    send_to: Several[NamePattern] = ("*",)
    """Recipients that the client may send to: names, or shell-style patterns."""
    open_from: Several[NamePattern] = ("*",)
    """Clients that may open a channel to the client, of those that may send to it."""
    channels: Annotated[int, Field(ge=0, le=1_000_000)] = 64
    """Most open channels of the client, to and from it, with those that it has asked for."""
    publish: Several[PublishPattern] = (">",)
    """Topic patterns that the client may publish on."""
    subscribe: Several[SubscribePattern] = (">", "$broker.>")
    """Topic patterns that the client may subscribe to; $broker.> is other clients' presence."""
    queue: Size = _written("8MiB", units.size)
    """Most bytes that may wait for this client."""
    subscriptions: Annotated[int, Field(ge=0, le=10_000_000)] = 10000
    """Most subscriptions of each of its connections."""
    requests: Annotated[int, Field(ge=1, le=10_000_000)] = 10000
    """Most unanswered requests of each of its connections; one more ends the oldest."""
    in_flight: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Most requests delivered to one connection without an outcome; 32 for pools, else no limit."""
    when_full: Annotated[WhenFull, Field(strict=False)] = WhenFull.WAIT
    """Treatment of messages to a full queue: wait, refuse, drop_oldest or disconnect."""
    when_connected: Annotated[WhenConnected, Field(strict=False)] = WhenConnected.REFUSE
    """Treatment of a connection more than allowed: refuse it, or replace the oldest."""
    rate: RateEntry = RateEntry.model_construct()
    """Most messages and bytes that the client may send per second."""
    allow_md5: bool = False
    """Whether the client may use HMAC-MD5, the only digest Python 3.11 and older know."""
    peer_uid: Annotated[Several[UserId], Field(min_length=1)] | None = None
    """Users that may be this client, on a Unix socket only; a client without a key needs none."""
    certificate: CertificateEntry | None = None
    """The certificate that the client must show over TLS, in addition to its key."""
    channel_binding: Annotated[Requirement, Field(strict=False)] = Requirement.OPTIONAL
    """Whether the client must use TLS and bind its key to the channel: required or optional."""
    tap: Annotated[TapScope, Field(strict=False)] = TapScope.HEADERS
    """What brokerctl tap shows of its messages: headers, or payload too."""
    expected: bool = False
    """Whether the client is meant to be online always: a metric tells, and an alert watches it."""
    admin: Admin = False
    """Whether the client is an administrator; payload: it also sees payloads in mailboxes."""
    mailbox: Annotated[MailboxEntry | None, BeforeValidator(false_as_none)] = None
    """A mailbox on disk for messages to the client: true, or a mapping with its options."""
    home: Host | None = None
    """In a cluster, the host that keeps the client's mailbox."""


class Limits(_Entry):
    """Resource limits of the broker."""

    max_message: Size = _written("16MiB", units.size)
    """The longest message that is accepted, in bytes, without the broker's header."""
    connections: Annotated[int, Field(ge=1, le=10_000_000)] = 10000
    """Most connections at once."""
    handshake_timeout: Timeout = _written("5s", units.duration)
    """The time that a connection has for its handshake."""
    handshakes: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Most pending handshakes; one more connection waits, or replaces a silent peer."""
    identify_by_key: Annotated[int, Field(ge=0, le=10_000_000)] = 1000
    """Keys tried for a client that does not give its name."""
    keepalive: Duration = _written("30s", units.duration)
    """Disconnect a TCP client that answers nothing for this long; 0 leaves it to the system."""
    channels: Annotated[int, Field(ge=0, le=1_000_000)] = 1000
    """Most channels of all clients at once."""
    open_timeout: Timeout = _written("10s", units.duration)
    """The time that the recipient of a channel has to accept it."""
    wait_timeout: Duration = _written("30s", units.duration)
    """The longest time that a sender is held by a full queue (when_full: wait)."""
    drain_timeout: Duration = _written("8s", units.duration)
    """The time to deliver what is queued when the broker stops."""
    return_grace: Duration = _written("0s", units.duration)
    """After a restart, hold messages for clients that were online before, for so long; 0: don't."""
    expiry_warning: Duration = _written("14d", units.duration)
    """A client's last key is warned of this long before it expires; 0: only when it has."""
    remote_timeout: Timeout = _written("5s", units.duration)
    """In a cluster, the time in which another host has to answer; then its clients are offline."""


class LogAreas(_Entry):
    """Levels of some events, by the first word of their names; the rest have ``level``."""

    daemon: Annotated[LogLevel, Field(strict=False)] | None = None
    """Start, reload, stop."""
    client: Annotated[LogLevel, Field(strict=False)] | None = None
    """Clients that connect, are refused, are slow or leave."""
    channel: Annotated[LogLevel, Field(strict=False)] | None = None
    """Channels that are opened, refused or closed."""
    message: Annotated[LogLevel, Field(strict=False)] | None = None
    """Messages that are refused or dropped."""
    admin: Annotated[LogLevel, Field(strict=False)] | None = None
    """Administrators' commands."""
    listener: Annotated[LogLevel, Field(strict=False)] | None = None
    """Listening addresses."""
    key: Annotated[LogLevel, Field(strict=False)] | None = None
    """Keys that expire."""
    log: Annotated[LogLevel, Field(strict=False)] | None = None
    """The log itself."""
    mailbox: Annotated[LogLevel, Field(strict=False)] | None = None
    """Mailboxes and their store."""
    cluster: Annotated[LogLevel, Field(strict=False)] | None = None
    """Other hosts, and NATS."""
    monitor: Annotated[LogLevel, Field(strict=False)] | None = None
    """The pages over HTTP."""


class Log(_Entry):
    """Level, form and files of the log."""

    level: Annotated[LogLevel, Field(strict=False)] = LogLevel.INFO
    """The least important event that is still logged: debug, info, warning or error."""
    format: Annotated[LogFormat, Field(strict=False)] = LogFormat.AUTO
    """auto is console on a terminal, the journal's own form under systemd and JSON elsewhere."""
    areas: LogAreas = LogAreas.model_construct()
    """Levels of their own for some areas, such as {client: debug}."""
    audit: NonEmpty | None = None
    """File for connections, refusals, administrators' commands and changes: JSON lines."""


class MonitorEntry(_AddressEntry):
    """The monitor's HTTP address, alone or in a mapping with its options."""

    address: Where
    """HOST:PORT, [HOST, PORT], @ABSTRACT, or a Unix path."""
    per_client: bool = False
    """Whether each client has metrics of its own, some eight for each name."""
    hosts: Several[HostName] = ()
    """Accepted Host names without port; IP addresses, localhost and ``address`` need no entry."""
    page: bool = True
    """Whether / is a page for browsers; where other machines reach it, it needs a password."""
    password_file: NonEmpty | None = None
    """A file with the password of all pages but /livez and /readyz, relative to this file."""


class NatsTlsEntry(_Entry):
    """TLS to the NATS servers: whom to trust, and what to show."""

    ca: NonEmpty | None = None
    """A file with the CA certificates to trust, in PEM; without it, the system's."""
    certificate: NonEmpty | None = None
    """A file with the certificate to show, in PEM, followed by those that lead to its CA."""
    key: NonEmpty | None = None
    """A file with the certificate's private key in PEM, which only its owner can read."""


class ClusterEntry(_Entry):
    """Brokers on several hosts that share one name space, connected by NATS."""

    host: Host
    """This broker's name in the cluster, unique there: 1 to 8 small letters or digits."""
    nats: Annotated[Several[NatsServer], Field(min_length=1)]
    """The servers of one NATS cluster: nats://HOST:PORT, or tls://HOST:PORT for TLS."""
    credentials: NonEmpty | None = None
    """A NATS credentials file, which only its owner can read."""
    user: NonEmpty | None = None
    """A NATS user, with password_file."""
    password_file: NonEmpty | None = None
    """A file with the password of ``user``, which only its owner can read."""
    nkey_file: NonEmpty | None = None
    """A file with the seed of an nkey, which only its owner can read."""
    tls: NatsTlsEntry | None = None
    """TLS to all servers, with a CA or a certificate of its own."""
    prefix: SubjectPrefix = _written("brokerd", str)
    """The begin of all NATS subjects; several clusters can share a NATS."""
    unanswered: Size = _written("8MiB", units.size)
    """Most bytes in flight to each other host."""
    hosts: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Most other hosts; further ones are ignored."""
    advertise: Several[Advertised] = ()
    """Where clients of other hosts can connect to this broker: tls://HOST:PORT or HOST:PORT."""
    plain: bool = False
    """Confirms that NATS without TLS beyond this machine is intended."""


class IncludedFile(_Entry):
    """A file that another one includes: it adds listeners and clients, and may include
    further files.
    """

    listen: Several[ListenEntry] = ()
    """Addresses that clients connect to; at least one in all files together."""
    clients: dict[Name, ClientEntry] = Field(
        default={}, json_schema_extra={"additionalProperties": False}
    )
    """The clients that may connect, by name."""
    include: Several[NonEmpty] = ()
    """Further files, as paths or patterns relative to this file, that add to listen and clients."""


class File(IncludedFile):
    """The configuration of a broker."""

    model_config = ConfigDict(title="brokerd configuration")

    limits: Limits = Limits.model_construct()
    """Resource limits of the broker."""
    log: Log = Log.model_construct()
    """Level, form and files of the log."""
    monitor: MonitorEntry | None = None
    """HTTP address of the monitor: /, /livez, /readyz and /metrics; without it there is none."""
    store: StoreEntry | None = None
    """The directory of the mailboxes on disk; by default $STATE_DIRECTORY."""
    cluster: ClusterEntry | None = None
    """Other hosts, whose clients share one name space with those of this broker, over NATS."""


@dataclass(frozen=True, slots=True)
class Config:
    """A complete, checked configuration, as returned by ``brokerd.config.load.load``.

    Attributes:
        clients: By name, read-only.
        store: Where mailboxes are kept; None without mailboxes.
        cluster: The broker's place among other hosts; None for a broker of its own.
        path: The main file.
        files: Every file read, the main file first.
        warnings: About keys, and about users who can replace the files, a line each.
        private: The files that no other user may replace, each with the place that names it.
        unmatched: The entries of ``include`` that match no file, a line each.
    """

    path: str
    listen: tuple[ListenConfig, ...]
    clients: Mapping[str, ClientConfig]
    limits: Limits = field(default_factory=Limits)
    log: Log = field(default_factory=Log)
    monitor: MonitorConfig | None = None
    store: StoreConfig | None = None
    cluster: ClusterConfig | None = None
    files: tuple[str, ...] = field(default=(), compare=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)
    private: Mapping[str, str] = field(default_factory=dict, compare=False)
    unmatched: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "clients", MappingProxyType(dict(self.clients)))
