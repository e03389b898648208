"""Which values of a request's Host header the monitor answers. No I/O.

A web page can have its own domain's name lead to this machine (DNS rebinding), and a browser then lets it read what is
answered. Its requests carry that name: what is asked for by an IP address, or as localhost, is no such request.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable

__all__ = ["fits"]


def fits(values: Iterable[str], names: Collection[str]) -> bool:
    """Return whether all the values may be answered. names: in small letters, without a port."""
    return all(_fits(value, names) for value in values)


def _fits(value: str, names: Collection[str]) -> bool:
    host = _without_port(value.strip()).lower().removesuffix(".")
    # Requests without a host have none to be misled by.
    return not host or host == "localhost" or host in names or _is_address(host)


def _without_port(value: str) -> str:
    if value.startswith("["):
        inside, _, rest = value[1:].partition("]")
        return inside if not rest or rest.startswith(":") else value
    # More than one colon: an IPv6 address without brackets.
    return value if value.count(":") > 1 else value.partition(":")[0]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
