"""What a configuration allows and its author hardly meant: warnings, one a line. Refuses nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import datetime, timedelta

from brokerd.config.model import ClientConfig, Config, ListenConfig, MonitorConfig
from brokerd.config.problems import one_line
from brokerd.config.validity import let_in_until

__all__ = ["advice"]


def advice(config: Config, now: datetime) -> list[str]:
    """Return the warnings, as ``FILE:LINE: what is odd (what would be right)``. now: with its time zone."""
    warnings = [one_line(warning) for listen in config.listen for warning in _about_listener(listen)]
    if config.monitor is not None:
        warnings += map(one_line, _about_monitor(config.monitor))
    if not config.clients:
        warnings.append(one_line(f"{config.path}: there are no clients: nobody can connect (add some to clients:)"))
    for client in config.clients.values():
        warnings += map(one_line, _about_client(client, now, timedelta(seconds=config.limits.expiry_warning)))
    return warnings


def _about_listener(listen: ListenConfig) -> Iterator[str]:
    if isinstance(listen.group, str) and not _group_exists(listen.group):
        yield f"{listen.source}: this machine has no group {listen.group!r} (make it, or give another)"


def _about_monitor(monitor: MonitorConfig) -> Iterator[str]:
    if not monitor.is_local:
        yield (
            f"{monitor.source}: the monitor at {monitor.address} asks nobody for a password: whoever reaches it reads "
            f"the metrics (give 127.0.0.1:{monitor.address.port}, or keep others away with a firewall)"
        )


def _about_client(client: ClientConfig, now: datetime, warned_before: timedelta) -> Iterator[str]:
    where = f"{client.source}: client {client.name!r}"
    if client.keys and not any(key.valid_at(now) for key in client.keys):
        if all(key.expired_at(now) for key in client.keys):
            last = max(key.not_after for key in client.keys if key.not_after is not None)
            yield f"{where} can't connect: its last key expired at {last.isoformat()} (give it a new one)"
        else:
            yield f"{where} can't connect now: none of its keys is valid yet, or still (see not_before, not_after)"
    last_key = let_in_until(client.keys, now)
    if last_key is not None and last_key.not_after is not None and last_key.not_after - now <= warned_before:
        until = last_key.not_after.isoformat()
        yield f"{where} can't connect after {until}: its last key expires then (give it one that begins before)"


def _group_exists(group: str) -> bool:
    if sys.platform == "win32":
        return True
    import grp

    try:
        grp.getgrnam(group)
    except KeyError:
        return False
    return True
