"""Addresses at which the broker can't listen, as far as that shows without trying.

Nothing is opened but files of /proc, and no name is looked up.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from pathlib import Path
from typing import Final, TypeAlias

from brokerd_client.address import Address

__all__ = ["may_overlap", "obstacle", "overlapping", "same"]

_IP: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_TCP: Final = ("AF_INET", "AF_INET6")
#: Addresses that mean every address of the machine.
_EVERYWHERE: Final = frozenset({"0.0.0.0", "::", ""})  # noqa: S104 - compared with, never bound
#: The hosts that the name localhost may stand for.
_THIS_MACHINE: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_PROC: Final = Path("/proc")
#: Directories below it are made when a service starts.
_RUN: Final = ("/run/", "/var/run/")


def same(one: Address, other: Address) -> bool:
    """Return whether two TCP addresses certainly are one, though written differently.

    Names are not looked up: ``localhost`` is 127.0.0.1, and perhaps more.
    """
    ip = _ip_of(one)
    return ip is not None and one.port == other.port != 0 and ip == _ip_of(other)


def overlapping(one: Address, other: Address) -> bool:
    """Return whether one of two TCP addresses certainly includes the other."""
    first, second = _ip_of(one), _ip_of(other)
    if first is None or second is None or first.version != second.version:
        return False
    return one.port == other.port != 0 and (first.is_unspecified or second.is_unspecified)


def obstacle(address: Address, *, privileged: bool) -> str:
    """Return what would prevent the broker from listening there, or "" if nothing is seen.

    privileged: whether the broker may use the system's own ports.
    """
    if address.is_file:
        return _about_file(Path(os.path.abspath(address.path)))  # noqa: PTH100 - as written
    if address.family not in _TCP:
        return ""
    return _about_port(address.port, privileged=privileged) or _about_host(address.host)


def _about_file(path: Path) -> str:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return "a file that is not a socket is there (choose another path, or remove it)"
    except OSError:
        pass
    if path.parent.is_dir() or str(path).startswith(_RUN):
        return ""
    return f"there is no directory {path.parent} (make it)"


def _about_port(port: int, *, privileged: bool) -> str:
    first = _read("sys/net/ipv4/ip_unprivileged_port_start").strip()
    if privileged or not port or not first.isdigit() or port >= int(first):
        return ""
    return (
        f"only root and CAP_NET_BIND_SERVICE may use ports below {first} (choose another, or give"
        " the service that capability)"
    )


def _about_host(host: str) -> str:
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return ""
    if ip.is_loopback or ip.is_unspecified or ip.is_link_local:
        return ""
    family = f"ipv{ip.version}"
    if _read(f"sys/net/{family}/ip_nonlocal_bind").strip() == "1":
        return ""
    if ip.version == 4:
        local = _read("net/fib_trie").split()
        is_known, has = bool(local), str(ip) in local
    else:
        words = [line.split()[0] for line in _read("net/if_inet6").splitlines()]
        is_known, has = bool(words), ip.exploded.replace(":", "") in words
    if has or not is_known:
        return ""
    return "no interface of this machine has that address (give another)"


def _read(name: str) -> str:
    """Return the text of a file below /proc; "" if there is none."""
    try:
        return (_PROC / name).read_text(encoding="ascii")
    except (OSError, UnicodeError):
        return ""


def may_overlap(one: Address, other: Address) -> bool:
    """Return whether two TCP addresses may include one address, as localhost and ::1."""
    if not {one.family, other.family} <= {*_TCP} or one.port != other.port or not one.port:
        return False
    hosts = {one.host, other.host}
    if len(hosts) == 1 or ("localhost" in hosts and hosts <= _THIS_MACHINE):
        return True
    return bool(hosts & _EVERYWHERE) and (one.family == other.family or "localhost" in hosts)


def _ip_of(address: Address) -> _IP | None:
    if address.family not in _TCP:
        return None
    host = "127.0.0.1" if address.host == "localhost" else address.host
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
