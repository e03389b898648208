"""The types of the configuration's values, each with its check and its JSON Schema.

Every check raises ValueError, with the fault and, in brackets, its remedy. The text
never repeats a value that might be a key.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time
from typing import Annotated, Any, Final, TypeAlias, TypeVar

from pydantic import BeforeValidator, Field
from pydantic.json_schema import WithJsonSchema
from pydantic_core.core_schema import CoreSchema, any_schema

from brokerd.config import cert_subjects as subjects
from brokerd.config import units
from brokerd.config.values import WhenFull
from brokerd_client import address as addresses
from brokerd_client.address import Address
from brokerd_client.errors import AddressError, InvalidName
from brokerd_client.wire import envelope

__all__ = [
    "Admin",
    "Advertised",
    "AnySize",
    "ByteRate",
    "Duration",
    "Fingerprints",
    "Group",
    "Host",
    "HostName",
    "KeyBytes",
    "MailboxWhenFull",
    "Mode",
    "Moment",
    "Name",
    "NamePattern",
    "NatsServer",
    "NonEmpty",
    "Percent",
    "PublishPattern",
    "Rate",
    "Several",
    "Size",
    "SocketName",
    "Subject",
    "SubjectPrefix",
    "SubscribePattern",
    "Timeout",
    "TlsVersion",
    "UserId",
    "Where",
    "false_as_none",
]

_MODE: Final = re.compile(r"0?[0-7]{3}")
#: Matches a path with "/" or a socket's file extension, @ABSTRACT, a pipe, or a host
#: and a port. The loader checks more.
_ADDRESS_PATTERN: Final = r"^([^/:]*/.*|[^/:]*\.sock(et)?|@.+|\\\\.+|[^/]+:[0-9]{1,5})$"
#: _SOCKET_NAME matches the names that systemd accepts for FileDescriptorName=.
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_.])?")
_SOCKET_NAME: Final = re.compile(r"[ -9;-~]{1,255}")
#: The name of a host in a cluster. "all" stands for every host in subjects.
_HOST: Final = re.compile(r"[0-9a-z]{1,8}")
_EVERY_HOST: Final = "all"
_NATS_SCHEME: Final = re.compile(r"(nats|tls)://")
_NATS_PORT: Final = 4222
#: Subjects with a prefix longer than this leave too little room for names and topics.
_PREFIX: Final = re.compile(r"(?=.{1,64}$)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def _right(error: ValueError) -> ValueError:
    """Return the library's error in this package's form: the fault (its remedy)."""
    wrong, colon, remedy = str(error).rpartition(": ")
    return ValueError(f"{wrong} ({remedy})" if colon else str(error))


def _address(value: object) -> Address:
    if isinstance(value, list) and len(value) != 2:
        raise ValueError(
            f"a list of {len(value)} is not a valid address (give a host and a port number)"
        )
    try:
        address = addresses.parse(value)  # type: ignore[arg-type]  # it judges whatever it is given
        addresses.validate_family(address.family)
    except AddressError as error:
        raise _right(error) from None
    if address.tls:
        raise ValueError(
            "tls:// belongs in a client's address (give HOST:PORT, and tls: {certificate: FILE,"
            " key: FILE})"
        )
    return address


def _mode(value: object) -> int:
    if not isinstance(value, str) or not _MODE.fullmatch(value):
        raise ValueError(
            'is not a valid file mode (give three octal digits in quotes, such as "0600" or "0660")'
        )
    return int(value, 8)


def _group(value: object) -> str | int:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32 - 1:
        return value
    raise ValueError("is not a valid group (give a group's name or number)")


def _socket_name(value: object) -> str:
    if not isinstance(value, str) or not _SOCKET_NAME.fullmatch(value):
        raise ValueError(
            "is not a valid socket name (give FileDescriptorName= of the .socket unit: ASCII"
            " without a colon)"
        )
    return value


def _key(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError("is not text (put the key in quotes)")
    return value.encode()


def _moment(value: object) -> datetime:
    remedy = "give a date and time such as 2026-12-31T00:00:00Z"
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"is not a valid date and time ({remedy})") from None
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if not isinstance(value, datetime):
        raise ValueError(f"is not a valid date and time ({remedy})")
    return value if value.tzinfo is not None else value.replace(tzinfo=UTC)


def _timeout(value: object) -> float:
    seconds = units.duration(value)
    if not seconds:
        raise ValueError("is not a valid time limit (give more than 0, such as 5s)")
    return seconds


def _positive_size(value: object) -> int:
    size = units.size(value)
    if not size:
        raise ValueError("is not a valid size limit (give more than 0, such as 8MiB)")
    return size


def _mailbox_when_full(value: object) -> WhenFull:
    if value not in (WhenFull.REFUSE, WhenFull.WAIT):
        raise ValueError(
            "is not a valid treatment of messages to a full mailbox (give refuse or wait)"
        )
    return WhenFull(str(value))


def _admin(value: object) -> object:
    if isinstance(value, bool) or value == "payload":
        return value
    raise ValueError("is neither true nor false (give true, false or payload)")


def false_as_none(value: object) -> object:
    """Return None for ``false``: the entry is absent."""
    return None if value is False else value


def _publish_pattern(value: object) -> str:
    pattern = _topic_pattern(value)
    if pattern.startswith("$"):
        raise ValueError("is reserved for the broker (only the broker publishes below '$')")
    return pattern


def _topic_pattern(value: object) -> str:
    try:
        return envelope.check_pattern(_text(value))
    except InvalidName as error:
        raise _right(error) from None


def _name_pattern(value: object) -> str:
    text = _text(value)
    if text.startswith("$"):
        raise ValueError("is the broker itself (take it out: every client may send to $broker)")
    # Square brackets hold a set of characters, as in a shell.
    outside = re.sub(r"\[!?\]?[^\]]*\]", "", text)
    if not text or not re.fullmatch(r"[A-Za-z0-9_.*?-]*", outside):
        raise ValueError(
            "can't match any client (give a client's name, or a pattern such as report.*)"
        )
    return text


def _host_name(value: object) -> str:
    text = _text(value)
    if not _HOST_NAME.fullmatch(text):
        raise ValueError(
            "is not a valid host name (give a name without a port, such as broker.example)"
        )
    return text


def _host(value: object) -> str:
    text = _text(value)
    if not _HOST.fullmatch(text) or text == _EVERY_HOST:
        raise ValueError(
            "is not a valid name of a host (give 1 to 8 small letters or digits, such as a;"
            f" {_EVERY_HOST!r} stands for every host)"
        )
    return text


def _subject_prefix(value: object) -> str:
    text = _text(value)
    if not _PREFIX.fullmatch(text):
        raise ValueError(
            "is not a valid prefix of NATS subjects (give letters, digits, '_' and '-', in parts"
            " joined by dots, such as brokerd; at most 64 characters)"
        )
    return text


def _nats_server(value: object) -> str:
    """Return the URL of a NATS server, with its port."""
    text = _text(value)
    scheme = _NATS_SCHEME.match(text)
    if scheme is None:
        raise ValueError(
            "is not the URL of a NATS server (give nats://HOST:PORT, or tls://HOST:PORT for TLS)"
        )
    rest = text[scheme.end() :]
    if "@" in rest:
        raise ValueError("holds a user or password (give user, and password_file)")
    has_port = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*):[0-9]+", rest)
    try:
        server = addresses.parse(f"tls://{rest if has_port else f'{rest}:{_NATS_PORT}'}")
    except AddressError:
        server = None
    if server is None or not server.host or not server.port:
        raise ValueError("is not the URL of a NATS server (give nats://HOST:PORT)")
    return str(server).replace("tls://", scheme[0])


def _advertised(value: object) -> str:
    """Return an address that clients on other machines can connect to."""
    try:
        address = addresses.parse(_text(value))
    except AddressError as error:
        raise _right(error) from None
    if address.family not in ("AF_INET", "AF_INET6"):
        raise ValueError("can't be reached from another host (give HOST:PORT or tls://HOST:PORT)")
    if address.host in ("", "0.0.0.0", "::") or not address.port:  # noqa: S104 - it is refused
        raise ValueError(
            "is not an address to connect to (give the host's name or address and the port)"
        )
    return str(address)


def _tls_version(value: object) -> str:
    # Without quotes, YAML reads the version as a number; that is accepted too.
    text = str(value) if isinstance(value, (str, float)) else ""
    if text not in ("1.2", "1.3"):
        raise ValueError('is not a supported TLS version (give "1.3" or "1.2")')
    return text


def _subject(value: object) -> tuple[tuple[str, str], ...]:
    return subjects.parse(_text(value))


def _fingerprints(value: object) -> tuple[str, ...]:
    listed = value if isinstance(value, (list, tuple)) else [value]
    fingerprints = [_text(entry).replace(":", "").replace(" ", "").lower() for entry in listed]
    if not fingerprints or not all(
        re.fullmatch(r"[0-9a-f]{64}", fingerprint) for fingerprint in fingerprints
    ):
        raise ValueError(
            "is not a valid SHA-256 fingerprint (give 64 hexadecimal digits: openssl x509 -noout"
            " -fingerprint -sha256 -in FILE)"
        )
    return tuple(fingerprints)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("is not text (put it in quotes)")
    return value


class _AsChecked:
    """Accepts what a check before it has returned; pydantic would model the class, too."""

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> CoreSchema:
        """Return the schema of anything."""
        return any_schema()


Duration: TypeAlias = Annotated[
    float,
    BeforeValidator(units.duration),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0},
                {"type": "string", "pattern": units.DURATION_PATTERN},
            ]
        }
    ),
]
Timeout: TypeAlias = Annotated[
    float,
    BeforeValidator(_timeout),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0},
                {"type": "string", "pattern": units.DURATION_PATTERN},
            ]
        }
    ),
]
Size: TypeAlias = Annotated[
    int,
    BeforeValidator(_positive_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": units.SIZE_PATTERN},
            ]
        }
    ),
]
#: The same, where 0 means no limit.
AnySize: TypeAlias = Annotated[
    int,
    BeforeValidator(units.size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": units.SIZE_PATTERN},
            ]
        }
    ),
]
MailboxWhenFull: TypeAlias = Annotated[
    WhenFull,
    BeforeValidator(_mailbox_when_full),
    WithJsonSchema({"enum": ["refuse", "wait"]}),
]
Admin: TypeAlias = Annotated[
    # One validator for both types, as for Group.
    Any,
    BeforeValidator(_admin),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"const": "payload"}]}),
]
Percent: TypeAlias = Annotated[
    float,
    BeforeValidator(units.percent),
    WithJsonSchema({"type": "string", "pattern": units.PERCENT_PATTERN}),
]
Rate: TypeAlias = Annotated[
    float,
    BeforeValidator(units.rate),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0},
                {"type": "string", "pattern": units.RATE_PATTERN},
            ]
        }
    ),
]
ByteRate: TypeAlias = Annotated[
    float,
    BeforeValidator(units.byte_rate),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0},
                {"type": "string", "pattern": units.BYTE_RATE_PATTERN},
            ]
        }
    ),
]
Where: TypeAlias = Annotated[
    Address,
    _AsChecked(),
    BeforeValidator(_address),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": _ADDRESS_PATTERN},
                {
                    "type": "array",
                    "prefixItems": [
                        {"type": "string"},
                        {"type": "integer", "minimum": 0, "maximum": 65535},
                    ],
                    "minItems": 2,
                    "maxItems": 2,
                },
            ]
        }
    ),
]
Mode: TypeAlias = Annotated[
    int, BeforeValidator(_mode), WithJsonSchema({"type": "string", "pattern": f"^{_MODE.pattern}$"})
]
Group: TypeAlias = Annotated[
    # One validator for both types: a union would report every member's error.
    Any,
    BeforeValidator(_group),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}]}
    ),
]
SocketName: TypeAlias = Annotated[
    str,
    BeforeValidator(_socket_name),
    WithJsonSchema({"type": "string", "pattern": f"^{_SOCKET_NAME.pattern}$"}),
]
HostName: TypeAlias = Annotated[
    str,
    BeforeValidator(_host_name),
    WithJsonSchema({"type": "string", "pattern": f"^{_HOST_NAME.pattern}$"}),
]
Host: TypeAlias = Annotated[
    str,
    BeforeValidator(_host),
    WithJsonSchema(
        {"type": "string", "pattern": f"^{_HOST.pattern}$", "not": {"const": _EVERY_HOST}}
    ),
]
NatsServer: TypeAlias = Annotated[
    str,
    BeforeValidator(_nats_server),
    WithJsonSchema({"type": "string", "pattern": f"^{_NATS_SCHEME.pattern}[^@/]+$"}),
]
SubjectPrefix: TypeAlias = Annotated[
    str,
    BeforeValidator(_subject_prefix),
    WithJsonSchema({"type": "string", "pattern": f"^{_PREFIX.pattern}$"}),
]
Advertised: TypeAlias = Annotated[
    str,
    BeforeValidator(_advertised),
    WithJsonSchema({"type": "string", "pattern": r"^(tls://)?[^/]+:[0-9]{1,5}$"}),
]
TlsVersion: TypeAlias = Annotated[
    str, BeforeValidator(_tls_version), WithJsonSchema({"enum": ["1.2", "1.3", 1.2, 1.3]})
]
Subject: TypeAlias = Annotated[
    Any, BeforeValidator(_subject), WithJsonSchema({"type": "string", "pattern": r"^[^=,]+=[^,]"})
]
_FINGERPRINT: Final = {"type": "string", "pattern": r"^[0-9A-Fa-f]{2}([: ]?[0-9A-Fa-f]{2}){31}$"}
Fingerprints: TypeAlias = Annotated[
    Any,
    BeforeValidator(_fingerprints),
    WithJsonSchema(
        {"anyOf": [_FINGERPRINT, {"type": "array", "items": _FINGERPRINT, "minItems": 1}]}
    ),
]
KeyBytes: TypeAlias = Annotated[
    bytes,
    BeforeValidator(_key),
    WithJsonSchema({"type": "string", "minLength": 1, "writeOnly": True}),
]
Moment: TypeAlias = Annotated[
    datetime,
    BeforeValidator(_moment),
    # Some YAML readers turn it into a timestamp before a JSON Schema validator sees it.
    # A timestamp is not a JSON type.
    WithJsonSchema({"not": {"type": ["number", "boolean", "array", "object", "null"]}}),
]
_Item = TypeVar("_Item")
#: A list in the file becomes a tuple: a validated value is never changed.
Several: TypeAlias = Annotated[tuple[_Item, ...], Field(strict=False)]
NonEmpty: TypeAlias = Annotated[str, Field(min_length=1)]
UserId: TypeAlias = Annotated[int, Field(ge=0, lt=2**32 - 1)]
NamePattern: TypeAlias = Annotated[
    str, BeforeValidator(_name_pattern), WithJsonSchema({"type": "string", "pattern": r"^[^$]"})
]
PublishPattern: TypeAlias = Annotated[
    str, BeforeValidator(_publish_pattern), WithJsonSchema({"type": "string", "pattern": r"^[^$]"})
]
SubscribePattern: TypeAlias = Annotated[
    str, BeforeValidator(_topic_pattern), WithJsonSchema({"type": "string", "minLength": 1})
]
Name: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")]
