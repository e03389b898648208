"""Addresses of listeners: parse an address, infer its family, format it. Opens no file
or socket.

An address can be read in two ways, which differ for a plain string:

- :func:`infer_family` follows ``multiprocessing.connection``. A tuple is TCP. A string
  with two leading backslashes is a Windows named pipe. Any other string is a Unix
  socket's path.
- :func:`parse` reads the addresses of configuration files and command lines. There
  ``localhost:6000`` is TCP: see its docstring.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Union

from brokerd_client._compat import slotted
from brokerd_client.errors import AddressError

__all__ = [
    "BROKER_SCHEME",
    "Address",
    "Family",
    "SockAddr",
    "format_peer",
    "infer_family",
    "parse",
    "validate_family",
]

Family = Literal["AF_INET", "AF_INET6", "AF_UNIX", "AF_PIPE", "AF_BROKER"]
#: The argument of ``socket.bind`` and ``socket.connect``; a pipe's name for AF_PIPE.
SockAddr = Union[tuple[str, int], str]

_HOST_PORT: Final = re.compile(r"(?P<host>[^:/\[\]\s]+):(?P<port>[0-9]{1,5})")
_BRACKETED: Final = re.compile(r"\[(?P<host>[^\]\s]+)\]:(?P<port>[0-9]{1,5})")
_HOST: Final = re.compile(r"[^\W\d_][\w.-]*|" + r"[0-9]+(\.[0-9]+){3}")
_PATH_ENDS: Final = (".sock", ".socket")
#: Prefixes of paths in the addresses of other programs; here they are errors.
_PATH_SCHEMES: Final = ("unix:", "unix-connect:", "unix-listen:", "file:", "ipc:", "local:")
_LONGEST_PORT: Final = 5
_QUAD: Final = re.compile(r"[0-9]+(\.[0-9]+){3}")
_FORMS: Final = r"HOST:PORT, [IPV6]:PORT, a path, @ABSTRACT or \\.\pipe\NAME"
_TLS: Final = "tls://"
#: The begin of the address of a client of a broker, in the direct API.
BROKER_SCHEME: Final = "broker://"
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@slotted
@dataclass(frozen=True)
class Address:
    """An address to listen at or connect to.

    Attributes:
        family: Decides which of the other fields are used.
        host: The host, for AF_INET and AF_INET6.
        port: The port, for AF_INET and AF_INET6.
        path: The path, for AF_PIPE and AF_UNIX. An abstract name begins with a NUL
            character.
        tls: Whether connections to it use TLS.
    """

    family: Family
    host: str = ""
    port: int = 0
    path: str = ""
    tls: bool = False

    @property
    def sockaddr(self) -> SockAddr:
        """The address in the form that the socket module, or the pipe functions, take."""
        return (self.host, self.port) if self.family in ("AF_INET", "AF_INET6") else self.path

    @property
    def is_file(self) -> bool:
        """Whether listening here leaves a socket file behind."""
        return self.family == "AF_UNIX" and not self.path.startswith("\0")

    def __str__(self) -> str:
        if self.family in ("AF_INET", "AF_INET6"):
            host = f"[{self.host}]" if self.family == "AF_INET6" else self.host
            return f"{_TLS if self.tls else ''}{host}:{self.port}"
        return "@" + self.path[1:] if self.path.startswith("\0") else self.path


def parse(address: str | Sequence[Any] | Address) -> Address:
    r"""Return the address that a person wrote in any of the usual forms.

    The forms are ``host:port`` and ``[::1]:port``, each with ``tls://`` before it for
    TLS; a pair of host and port; ``@abstract``; ``\\.\pipe\name``; or the path of a
    Unix socket. A path contains a ``/``, or ends in ``.sock`` or ``.socket``. So a host
    without a port is not mistaken for a file.

    Args:
        address: The address as text, as a pair, or already parsed.

    Returns:
        The parsed address.

    Raises:
        AddressError: The address has none of the forms, which the message lists.
    """
    if isinstance(address, Address):
        return address
    if isinstance(address, (list, tuple)):
        return _from_pair(address)
    if not isinstance(address, str):
        raise AddressError(_not_text(address))
    if not address or address in ("@", "\0"):
        raise AddressError(f"an address can't be empty: give {_FORMS}")
    if address.startswith("\\\\"):
        return Address("AF_PIPE", path=address)
    if address[0] in "@\0":
        return Address("AF_UNIX", path="\0" + address[1:])
    tls = address.startswith(_TLS)
    host_and_port = address.removeprefix(_TLS) if tls else address
    bracketed = _BRACKETED.fullmatch(host_and_port)
    match = bracketed or _HOST_PORT.fullmatch(host_and_port)
    if match:
        if bracketed and ":" not in match["host"]:
            raise AddressError(_no_ipv6(match["host"]))
        return replace(_from_pair((match["host"], int(match["port"]))), tls=tls)
    if tls:
        raise AddressError(
            f"{address!r} is not a valid address: give tls://HOST:PORT or tls://[IPV6]:PORT"
        )
    if scheme := _SCHEME.match(address):
        raise AddressError(
            f"{address!r} is not a valid address: leave out {scheme[0]} and give {_FORMS}"
        )
    if "\0" in address:
        raise AddressError(f"{address!r} is not a valid address: a path can't hold a NUL character")
    _check_path(address)
    return Address("AF_UNIX", path=os.path.expanduser(address))  # noqa: PTH111 - a Path would drop a leading "./"


def _check_path(address: str) -> None:
    """Raise AddressError unless the text clearly is the path of a file."""
    first_part, slash, remainder = address.partition("/")
    if not slash and not address.endswith(_PATH_ENDS):
        raise AddressError(_incomplete(address))
    if not slash and ":" in address:
        raise AddressError(f"{address!r} is not a valid address: give {_FORMS}")
    if ":" in first_part:
        if first_part.lower() in _PATH_SCHEMES and remainder:
            raise AddressError(
                f"{address!r} is not a valid address: give {address[len(first_part) :]} without"
                f" {first_part!r}"
            )
        raise AddressError(
            f"{address!r} is not a valid address: give HOST:PORT alone, or begin a path with ./"
        )
    if address.endswith("/"):
        raise AddressError(f"{address!r} is a directory: give the path of a socket in it")


def _not_text(value: object) -> str:
    if type(value) is int and 0 < value < 10**_LONGEST_PORT:
        return _incomplete(str(value))
    return f"{value!r} is not a valid address: give {_FORMS}"


def _incomplete(address: str) -> str:
    """Return an error text for an address that is neither a path nor a host with a
    port.
    """
    if address.isascii() and address.isdecimal() and len(address) <= _LONGEST_PORT:
        return (
            f"{address} is a port without a host: give HOST:{address}, such as localhost:{address}"
        )
    unbracketed = address[1:-1] if address.startswith("[") and address.endswith("]") else address
    if ":" in unbracketed and _is_ip(unbracketed):
        return f"{address!r} has no port: give [HOST]:PORT, such as [{unbracketed}]:6000"
    if ":" in address or "[" in address or not _HOST.fullmatch(address):
        return f"{address!r} is not a valid address: give {_FORMS}"
    return (
        f"{address!r} has no port: give {address}:PORT, or ./{address} for the path of a Unix"
        " socket"
    )


def _from_pair(pair: Sequence[Any]) -> Address:
    if (
        len(pair) < 2
        or not isinstance(pair[0], str)
        or isinstance(pair[1], bool)
        or not isinstance(pair[1], int)
    ):
        raise AddressError(f"{list(pair)!r} is not a valid address: give a host and a port number")
    host, port = pair[0], pair[1]
    if not 0 <= port <= 65535:
        raise AddressError(f"{port} is not a valid port: give a number from 0 to 65535")
    if not _can_be_looked_up(host):
        raise AddressError(
            f"{host!r} is not a valid host: give a name whose parts have 1 to 63 characters, or"
            " an IP address"
        )
    if ":" in host and not _is_ip(host):
        raise AddressError(_no_ipv6(host))
    if _QUAD.fullmatch(host) and not _is_ip(host):
        raise AddressError(
            f"{host!r} is not a valid IPv4 address: give four numbers from 0 to 255, without"
            " zeros before them"
        )
    return Address("AF_INET6" if ":" in host else "AF_INET", host=host, port=port)


def _is_ip(host: str) -> bool:
    # Imported here: it takes some milliseconds, and most addresses are paths or names.
    import ipaddress

    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _no_ipv6(host: str) -> str:
    return (
        f"{host!r} is not a valid IPv6 address: give one such as [::1]:6000, or a name or an"
        " IPv4 address without brackets"
    )


def _can_be_looked_up(host: str) -> bool:
    """Return whether the resolver accepts the name; "" stands for every interface.

    For other names the resolver raises an error that is not an OSError.
    """
    if "\0" in host:
        return False
    if host.isascii():
        return not host or all(1 <= len(part) <= 63 for part in host.removesuffix(".").split("."))
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True


def infer_family(address: object) -> Family:
    """Return the family of an address of ``multiprocessing.connection``, by its form.

    A pair whose host holds a colon is AF_INET6, and broker://NAME is AF_BROKER, which the
    standard library does not infer.

    Args:
        address: A (host, port) pair, a path, the name of a pipe, or broker://NAME.

    Returns:
        The family's name.

    Raises:
        AddressError: The address has another form. It is a ValueError, as that of the
            standard library's ``address_type`` is.
    """
    if isinstance(address, tuple):
        return (
            "AF_INET6"
            if address and isinstance(address[0], str) and ":" in address[0]
            else "AF_INET"
        )
    if isinstance(address, str) and address.startswith("\\\\"):
        return "AF_PIPE"
    if isinstance(address, str) and address.startswith(BROKER_SCHEME):
        return "AF_BROKER"
    if isinstance(address, str) or (isinstance(address, bytes) and address[:1] == b"\0"):
        return "AF_UNIX"
    raise AddressError(
        f"address type of {address!r} unrecognized: give a (host, port) pair, a path or a pipe's"
        " name"
    )


def validate_family(family: str) -> None:
    """Check that this machine has the family.

    Args:
        family: The family's name.

    Raises:
        AddressError: The family is not known, or not available here.
    """
    if family not in ("AF_INET", "AF_INET6", "AF_UNIX", "AF_PIPE", "AF_BROKER"):
        raise AddressError(
            f"family {family} is not recognized: one of AF_INET, AF_INET6, AF_UNIX, AF_PIPE,"
            " AF_BROKER"
        )
    if family == "AF_PIPE" and sys.platform != "win32":
        raise AddressError(
            "family AF_PIPE is not recognized here: named pipes exist on Windows only"
        )
    if family == "AF_UNIX" and sys.platform == "win32":
        raise AddressError(
            "family AF_UNIX is not recognized here: use AF_PIPE or AF_INET on Windows"
        )


def format_peer(sockaddr: object) -> str:
    """Return a peer's address as text for people.

    Args:
        sockaddr: The address as the socket module returns it.

    Returns:
        ``host:port``, a path, ``@abstract``, or ``unix`` for a socket without a name.
    """
    if isinstance(sockaddr, tuple) and len(sockaddr) >= 2:
        host, port = sockaddr[0], sockaddr[1]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    if isinstance(sockaddr, bytes):
        sockaddr = sockaddr.decode(errors="replace")
    if isinstance(sockaddr, str) and sockaddr:
        return "@" + sockaddr[1:] if sockaddr.startswith("\0") else sockaddr
    return "unix"
