"""Settings of a client, from arguments and the environment. Only a key file is opened.

Environment: ``BROKERD_ADDRESS``, ``BROKERD_NAME``, ``BROKERD_KEY_FILE``. An argument
overrides its variable.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Union

from brokerd_client._common.paths import is_plainly_a_path
from brokerd_client._compat import slotted
from brokerd_client.address import Address, parse
from brokerd_client.errors import (
    AddressError,
    BrokerdError,
    Disconnected,
    Elsewhere,
    InvalidKey,
    TlsError,
)
from brokerd_client.wire.envelope import MAX_WINDOW, check_name

if TYPE_CHECKING:
    from ssl import SSLContext

    from brokerd_client._common.tracing import TracerProvider
    from brokerd_client.json_codec import JsonCodec

__all__ = [
    "DEFAULT_ADDRESS",
    "DEFAULT_INBOX",
    "DEFAULT_TIMEOUT_S",
    "ENDLESS_S",
    "AnyAddress",
    "Settings",
    "broken",
    "channel_routes",
    "check_timeout",
    "no_connection",
    "resolve",
    "same_kind",
    "unreachable",
]

DEFAULT_ADDRESS: Final = "/run/brokerd/brokerd.sock"
#: Limit of connecting, the handshake and the first answer together, in seconds.
DEFAULT_TIMEOUT_S: Final = 10.0
#: Most bytes of messages kept in this process before the client stops reading its
#: socket.
DEFAULT_INBOX: Final = 8 * 2**20

#: Seconds, some three years. Longer timeouts count as infinite: system calls can't take
#: much more.
ENDLESS_S: Final = 1e8

AnyAddress = Union[str, Sequence[Any], Address]


@slotted
@dataclass(frozen=True)
class Settings:
    """The settings of one client and its connections. The key is never shown.

    Attributes:
        addresses: The broker's addresses, in the order in which they are tried.
        name: The client's name, or "".
        key: The client's key.
        without_key: Whether no key was given, and ``key`` is the client's name.
        timeout_s: Seconds for connecting, handshake and introduction together.
        reconnect: Whether another attempt follows a lost connection.
        allow_pickle_from: Names of clients whose pickles are decoded.
        inbox: Limit of the bytes of messages kept in this process.
        tls: The TLS context, or None without TLS.
        handlers: Requests that the client's handler works on at the same time, or None
            for the default of the face.
        wait_s: Seconds to wait for a broker that is not up yet.
        give_up_s: Seconds without a connection after which the client no longer
            reconnects, or None.
        json_codec: The JSON for payloads of more types, or None.
        tracing: A tracer provider, True for the one that the program has set, or False.
        window: Messages of the mailbox held without an acknowledgement, or None.
        window_bytes: The same in bytes, or None.
    """

    addresses: tuple[Address, ...]
    name: str
    key: bytes = field(repr=False)
    timeout_s: float = DEFAULT_TIMEOUT_S
    reconnect: bool = True
    allow_pickle_from: frozenset[str] = frozenset()
    inbox: int = DEFAULT_INBOX
    tls: SSLContext | None = field(default=None, repr=False)
    handlers: int | None = None
    without_key: bool = False
    wait_s: float = 0.0
    give_up_s: float | None = None
    json_codec: JsonCodec | None = None
    tracing: bool | TracerProvider = field(default=True, repr=False)
    window: int | None = None
    window_bytes: int | None = None


def check_timeout(timeout: float | None, what: str = "a timeout") -> float | None:
    """Return a caller's timeout in a form that system calls take.

    Args:
        timeout: Seconds. None, infinity, and ENDLESS_S and more are infinite.
        what: The argument, for the error.

    Returns:
        The timeout in seconds, or None if it is infinite.

    Raises:
        TypeError: The timeout is not a number.
        ValueError: The timeout is negative or nan.
    """
    if timeout is None:
        return None
    try:
        # float() would also accept text.
        seconds = timeout + 0.0
    except OverflowError:
        seconds = ENDLESS_S if timeout > 0 else -1.0
    except TypeError:
        raise TypeError(
            f"{what} is a number of seconds or None, not {type(timeout).__name__}"
        ) from None
    # "< 0" would accept nan, for which every comparison is false.
    if not seconds >= 0:
        raise ValueError(f"{what} is a number of seconds of at least 0, not {timeout}")
    return None if seconds >= ENDLESS_S else seconds


def resolve(
    address: AnyAddress | None,
    name: str | None,
    key: bytes | str | None,
    key_file: str | os.PathLike[str] | None,
    timeout: float | None,
    *,
    reconnect: bool,
    allow_pickle_from: Iterable[str],
    inbox: int,
    ssl: SSLContext | bool | None = None,
    handlers: int | None = None,
    wait: float | None = 0.0,
    give_up_after: float | None = None,
    codec: JsonCodec | None = None,
    tracing: bool | TracerProvider = True,
    window: int | None = None,
    window_bytes: int | None = None,
) -> Settings:
    """Return the settings, with defaults for missing arguments.

    Args:
        address: The broker's address, or several in a list or tuple; None for
            ``BROKERD_ADDRESS``, where commas separate addresses, or the default.
        name: The client's name; None for ``BROKERD_NAME``, or for none.
        key: The client's key; text is encoded in UTF-8.
        key_file: The path of a file with the key; None for ``BROKERD_KEY_FILE``.
        timeout: Seconds for connecting, handshake and introduction together.
        reconnect: Whether another attempt follows a lost connection.
        allow_pickle_from: Names of clients whose pickles are decoded.
        inbox: Limit of the bytes of messages kept in this process.
        ssl: A client's TLS context, or True for the default context. With None, the
            default context is used if the address begins with tls://.
        handlers: Requests that the client's handler works on at the same time; None for
            the default of the face.
        wait: Seconds to wait for a broker that is not up yet; None for no limit.
        give_up_after: Seconds without a connection after which the client no longer
            reconnects; None to give up only after several rejections of the key.
        codec: The JSON for payloads of more types.
        tracing: A tracer provider, True for the one that the program has set, or False.
        window: Messages of the mailbox held without an acknowledgement; None for the
            mailbox's own limit.
        window_bytes: The same in bytes.

    Returns:
        The settings.

    Raises:
        AddressError: The address is not valid, or does not fit ``ssl``.
        InvalidName: The name is not a valid client name.
        InvalidKey: The key is empty, missing or can't be read.
        TypeError: An argument has the wrong type.
        ValueError: A number is out of its range.
    """
    if isinstance(allow_pickle_from, str):
        raise TypeError(
            "allow_pickle_from takes several names: give a list, even for a single name"
        )
    if codec is not None and not (hasattr(codec, "decode") and hasattr(codec, "register")):
        raise TypeError(
            f"codec takes a JsonCodec, not {codec!r:.40}; give codec='msgpack' and the like to"
            " each call"
        )
    if inbox <= 0:
        raise ValueError(f"inbox is a number of bytes above 0, not {inbox}")
    if handlers is not None and handlers < 1:
        raise ValueError(f"handlers is a number of requests of at least 1, not {handlers}")
    if window is not None and not 1 <= window <= MAX_WINDOW:
        raise ValueError(f"window is a number of messages from 1 to {MAX_WINDOW}, not {window}")
    if window_bytes is not None and window_bytes < 1:
        raise ValueError(f"window_bytes is a number of bytes of at least 1, not {window_bytes}")
    if not isinstance(tracing, bool) and not hasattr(tracing, "get_tracer"):
        raise TypeError(
            f"tracing takes a TracerProvider, True or False, not {type(tracing).__name__}"
        )
    timeout_s, wait_s = check_timeout(timeout), check_timeout(wait, "wait")
    give_up_s = check_timeout(give_up_after, "give_up_after")
    if give_up_after is not None and give_up_s is None:
        give_up_s = ENDLESS_S
    name = name or os.environ.get("BROKERD_NAME") or ""
    if name:
        check_name(name)
    addresses, tls = _tls(_addresses(address), ssl)
    # A client that needs no key, because its Unix user identifies it, uses its name as
    # the key: docs/protocol.md, "Without a key".
    found_key = _key(key, key_file)
    without_key = (
        found_key is None and bool(name) and all(each.family == "AF_UNIX" for each in addresses)
    )
    if found_key is None and not without_key:
        raise InvalidKey(
            "no key: give key, key_file or the environment variable BROKERD_KEY_FILE; on a Unix"
            " socket a client configured with peer_uid and no key needs only its name"
        )
    return Settings(
        addresses,
        name,
        name.encode() if found_key is None else found_key,
        ENDLESS_S if timeout_s is None else timeout_s,
        reconnect,
        frozenset(allow_pickle_from),
        inbox,
        tls,
        handlers,
        without_key,
        ENDLESS_S if wait_s is None else wait_s,
        give_up_s,
        codec,
        tracing,
        window,
        window_bytes,
    )


def _addresses(address: AnyAddress | None) -> tuple[Address, ...]:
    """Return the addresses to try, in their order. Raises AddressError."""
    if address is None:
        variable = os.environ.get("BROKERD_ADDRESS") or DEFAULT_ADDRESS
        return tuple(parse(each.strip()) for each in variable.split(","))
    if not isinstance(address, (list, tuple)) or _is_pair(address):
        return (parse(address),)
    if not address:
        raise AddressError("a list of addresses can't be empty: give at least one address")
    return tuple(parse(each) for each in address)


def _is_pair(address: Sequence[Any]) -> bool:
    """Return whether the sequence is a host and a port, not several addresses."""
    return len(address) > 1 and not isinstance(address[1], (Sequence, Address))


def _tls(
    addresses: tuple[Address, ...], context: SSLContext | bool | None
) -> tuple[tuple[Address, ...], SSLContext | None]:
    """Return (the addresses with their ``tls`` field set, the TLS context to use)."""
    with_tls = [each for each in addresses if each.tls]
    if not with_tls and not context:
        return addresses, None
    for each in addresses:
        if each.family not in ("AF_INET", "AF_INET6"):
            raise AddressError(
                f"TLS is for TCP, and {each} is not a TCP address: omit ssl, or give"
                " tls://HOST:PORT"
            )
        if not each.tls and not context:
            raise AddressError(
                f"{with_tls[0]} asks for TLS, and {each} does not: give tls:// to all addresses"
                " or to none"
            )
    if context is False:
        raise AddressError(
            f"{with_tls[0]} asks for TLS, and ssl=False forbids it: leave out tls:// or ssl=False"
        )
    # Imported here, because it takes long to load.
    import ssl

    if context is None or context is True:
        context = ssl.create_default_context()
    if not isinstance(context, ssl.SSLContext):
        raise TypeError(f"ssl takes an ssl.SSLContext or True, not {type(context).__name__}")
    if context.protocol is ssl.PROTOCOL_TLS_SERVER:
        raise ValueError("ssl takes a client's context: ssl.create_default_context()")
    return tuple(replace(each, tls=True) for each in addresses), context


def _key(key: bytes | str | None, key_file: str | os.PathLike[str] | None) -> bytes | None:
    """Return the key to use, or None if none is given."""
    if key is not None and key_file is not None:
        raise InvalidKey("give key or key_file, not both")
    if key is not None:
        if not isinstance(key, (bytes, bytearray, memoryview, str)):
            raise TypeError(f"a key is bytes or text, not {type(key).__name__}")
        key_bytes = _encoded(key) if isinstance(key, str) else bytes(key)
        if key_bytes is None:
            raise InvalidKey("the key can't be written in UTF-8: give it as bytes")
        if not key_bytes:
            raise InvalidKey(
                "an empty key authenticates no client; give a key of at least one byte"
            )
        if isinstance(key, str) and os.sep in key and os.path.isfile(key):  # noqa: PTH113
            raise InvalidKey(
                "key is the key itself, and the path of a file was given: give key_file=PATH"
            )
        return key_bytes
    path = key_file or os.environ.get("BROKERD_KEY_FILE")
    if not path:
        return None
    try:
        # pathlib would take longer to import than the rest of this file.
        with open(path, "rb") as file:  # noqa: PTH123
            content = file.read()
    except OSError as error:
        if not is_plainly_a_path(os.fspath(path)):
            # The path may be the key itself, so the system's error is not shown either.
            raise InvalidKey(
                f"the key file can't be read: {error.strerror} (give the path of a file that holds"
                " the key)"
            ) from None
        raise InvalidKey(
            f"the key file {os.fspath(path)} can't be read: {error.strerror}"
        ) from error
    # Remove one line ending, LF or CRLF, as the daemon does.
    content = (
        content.removesuffix(b"\r\n") if content.endswith(b"\r\n") else content.removesuffix(b"\n")
    )
    if not content:
        raise InvalidKey(f"the key file {os.fspath(path)} is empty; a key has at least one byte")
    return content


def _encoded(key: str) -> bytes | None:
    """Return the key in UTF-8, or None if it can't be encoded.

    The exception is not passed on, because it would hold the whole key.
    """
    try:
        return key.encode()
    except UnicodeEncodeError:
        return None


def unreachable(address: Address, error: Exception) -> str:
    """Return the error text for a connection that could not be made."""
    code = error.errno if isinstance(error, OSError) else None
    reason = getattr(error, "strerror", None) or error
    refused = code in (errno.ENOENT, errno.ECONNREFUSED)
    hint = (
        " (is the broker running there? the address is an argument, or BROKERD_ADDRESS)"
        if refused
        else ""
    )
    return f"can't connect to {address}: {reason}{hint}"


def no_connection(address: Address, error: Exception) -> BrokerdError:
    """Return the error for a connection that could not be made."""
    text = unreachable(address, error)
    if isinstance(error, TlsError):
        failure: BrokerdError = TlsError(text)
        failure.cut_off = error.cut_off
    else:
        failure = Disconnected(text)
        failure.cut_off = isinstance(
            error, (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)
        )
    return failure


def broken(error: OSError) -> BrokerdError:
    """Return the error for a connection that broke after it was made."""
    return (
        error
        if isinstance(error, TlsError)
        else Disconnected(f"the connection broke: {error.strerror or error}")
    )


def channel_routes(error: Elsewhere, settings: Settings) -> Iterator[tuple[Address, Settings]]:
    """Yield where to open a channel to a client of another host, and how.

    Args:
        error: The broker's answer.
        settings: The client's own settings.
    """
    yield from ((address, settings) for address in same_kind(error.addresses, settings))
    if settings.tls is not None:
        return
    with_tls = [address for address in _parsed(error.addresses) if address.tls]
    if with_tls:
        # Imported here, because it takes long to load.
        import ssl

        trusting = replace(settings, tls=ssl.create_default_context())
        yield from ((address, trusting) for address in with_tls)


def same_kind(addresses: Iterable[str], settings: Settings) -> tuple[Address, ...]:
    """Return the addresses that need what the client has: TLS, or none.

    Args:
        addresses: As another broker has told them; those that can't be used are left out.
        settings: The client's own settings.
    """
    uses_tls = settings.tls is not None
    return tuple(address for address in _parsed(addresses) if address.tls is uses_tls)


def _parsed(addresses: Iterable[str]) -> Iterator[Address]:
    for text in addresses:
        try:
            address = parse(text)
        except AddressError:
            continue
        if address.family in ("AF_INET", "AF_INET6"):
            yield address
