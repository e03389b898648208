"""Warnings about valid settings that are probably mistakes, one a line.

Nothing is refused.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Final

from brokerd.config.key_validity import let_in_until
from brokerd.config.model import ClientConfig, Config, ListenConfig, MonitorConfig, Requirement
from brokerd.config.problems import one_line
from brokerd_client.address import Address

__all__ = ["about_plain", "is_exposed", "lint_warnings"]

#: A warning is given from this long before a certificate expires.
_SOON: Final = timedelta(days=14)


def lint_warnings(config: Config, now: datetime) -> list[str]:
    """Return the warnings, as ``FILE:LINE: what is odd (what would be right)``.

    now: the current time, with its time zone.
    """
    warnings = [*config.warnings]
    warnings += [
        one_line(warning) for listen in config.listen for warning in _about_listener(listen)
    ]
    if config.monitor is not None:
        warnings += map(one_line, _about_monitor(config.monitor))
    if not config.clients:
        warnings.append(
            one_line(
                f"{config.path}: there are no clients, so no connection is accepted (add some to"
                " clients:)"
            )
        )
    seen = any(listen.tls is not None and listen.tls.client_ca for listen in config.listen)
    bound = any(listen.tls is not None for listen in config.listen)
    for listen in config.listen:
        warnings += map(one_line, _about_certificate(listen, now))
    warnings += map(one_line, _about_cluster(config))
    for client in config.clients.values():
        warnings += map(
            one_line, _about_client(client, now, timedelta(seconds=config.limits.expiry_warning))
        )
        subject = f"{client.source}: client {client.name!r} can't connect"
        if client.certificate is not None and not seen:
            warnings.append(
                one_line(
                    f"{subject}: no listener asks for its certificate (give one tls: client_ca)"
                )
            )
        elif client.binding is Requirement.REQUIRED and not bound:
            warnings.append(one_line(f"{subject}: no listener speaks TLS (give one tls:)"))
    return warnings


def is_exposed(address: Address) -> bool:
    """Return whether other machines may reach a TCP address.

    Every host name but localhost counts as reachable.
    """
    if address.family not in ("AF_INET", "AF_INET6") or address.host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(address.host.partition("%")[0]).is_loopback
    except ValueError:
        return True


def about_plain(listen: ListenConfig, address: Address) -> str:
    """Return the warning about a listener without TLS at this address, or ""."""
    if listen.tls is not None or listen.plain or not is_exposed(address):
        return ""
    return (
        "plain TCP that other machines can reach: machines on the way can read and change its"
        " traffic (give the listen entry tls: {certificate: FILE, key: FILE}, or plain: true if"
        " that is intended)"
    )


def _about_listener(listen: ListenConfig) -> Iterator[str]:
    if isinstance(listen.group, str) and not _group_exists(listen.group):
        yield (
            f"{listen.source}: this machine has no group {listen.group!r} (make it, or give"
            " another)"
        )
    plain = about_plain(listen, listen.address)
    if plain:
        yield f"{listen.source}: {listen.address} is {plain}"


def _about_certificate(listen: ListenConfig, now: datetime) -> Iterator[str]:
    if listen.tls is not None and listen.tls.not_after - now < _SOON:
        end = listen.tls.not_after.isoformat()
        yield (
            f"{listen.source}: the certificate of {listen.address} expires at {end} (get a new one,"
            " and reload)"
        )


def _about_monitor(monitor: MonitorConfig) -> Iterator[str]:
    if not monitor.is_local:
        yield (
            f"{monitor.source}: the monitor at {monitor.address} has no password: every"
            f" machine that reaches it can read the metrics (give 127.0.0.1:{monitor.address.port},"
            " or restrict access with a firewall)"
        )


def _about_cluster(config: Config) -> Iterator[str]:
    if config.cluster is None or config.cluster.advertise:
        return
    kept = next((each for each in config.clients.values() if each.mailbox is not None), None)
    if kept is not None:
        yield (
            f"{kept.source}: client {kept.name!r} can receive from its mailbox at this host only:"
            " clients that are connected elsewhere are not told where this broker is (give"
            " cluster.advertise: [HOST:PORT])"
        )


def _about_client(client: ClientConfig, now: datetime, warned_before: timedelta) -> Iterator[str]:
    subject = f"{client.source}: client {client.name!r}"
    if client.keys and not any(key.valid_at(now) for key in client.keys):
        if all(key.expired_at(now) for key in client.keys):
            last = max(key.not_after for key in client.keys if key.not_after is not None)
            yield (
                f"{subject} can't connect: its last key expired at {last.isoformat()} (give it a"
                " new one)"
            )
        else:
            yield (
                f"{subject} can't connect now: none of its keys is valid at this time (see"
                " not_before, not_after)"
            )
    last_key = let_in_until(client.keys, now)
    if (
        last_key is not None
        and last_key.not_after is not None
        and last_key.not_after - now <= warned_before
    ):
        until = last_key.not_after.isoformat()
        yield (
            f"{subject} can't connect after {until}: its last key expires then (give it a key that"
            " begins before)"
        )


def _group_exists(group: str) -> bool:
    if sys.platform == "win32":
        return True
    import grp

    try:
        grp.getgrnam(group)
    except KeyError:
        return False
    return True
