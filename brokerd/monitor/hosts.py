"""The check of a request's Host header, without I/O.

A web page can make its own domain's name resolve to this machine (DNS rebinding). A
browser then lets the page read the answers. The monitor refuses such requests, because
they carry that domain's name. A request for an IP address or for localhost can't be
such a request.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable

__all__ = ["fits"]


def fits(values: Iterable[str], names: Collection[str]) -> bool:
    """Return whether the monitor answers all the values.

    names: in lower case, without a port.
    """
    return all(_fits(value, names) for value in values)


def _fits(value: str, names: Collection[str]) -> bool:
    host = _without_port(value.strip()).lower().removesuffix(".")
    # A request without a host name can't be the result of DNS rebinding.
    return not host or host == "localhost" or host in names or _is_address(host)


def _without_port(value: str) -> str:
    if value.startswith("["):
        inside, _, port = value[1:].partition("]")
        return inside if not port or port.startswith(":") else value
    # More than one colon: an IPv6 address without brackets.
    return value if value.count(":") > 1 else value.partition(":")[0]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
