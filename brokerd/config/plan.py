"""What a reload would change: two configurations compared, nothing carried out."""

from __future__ import annotations

from dataclasses import dataclass

from brokerd.config.model import Config
from brokerd.config.values import ListenConfig

__all__ = ["Plan", "compare"]


@dataclass(frozen=True, slots=True)
class Plan:
    """The differences between the running configuration and a new one.

    added, changed, removed: names of clients. opened, closed: ``listen`` entries by their address;
    altered: entries whose address stays and whose other settings change.
    limits, log: whether that section changes.
    """

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    opened: tuple[ListenConfig, ...]
    closed: tuple[ListenConfig, ...]
    altered: tuple[ListenConfig, ...]
    limits: bool
    log: bool


def compare(running: Config, new: Config) -> Plan:
    """Return what would change."""
    before, after = running.clients, new.clients
    listening = {entry.address: entry for entry in running.listen}
    wanted = {entry.address: entry for entry in new.listen}
    return Plan(
        added=tuple(name for name in after if name not in before),
        changed=tuple(name for name in after if name in before and after[name] != before[name]),
        removed=tuple(name for name in before if name not in after),
        opened=tuple(entry for address, entry in wanted.items() if address not in listening),
        closed=tuple(entry for address, entry in listening.items() if address not in wanted),
        altered=tuple(entry for address, entry in wanted.items() if listening.get(address, entry) != entry),
        limits=new.limits != running.limits,
        log=new.log != running.log,
    )
