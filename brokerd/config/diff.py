"""The differences between two configurations: what a reload would change. Nothing is
applied.

Every change is a readable phrase, ``queue: 8MiB -> 16MiB``. A phrase shows the id of a
key, never the key.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from datetime import datetime
from typing import Any, Final, NamedTuple, TypeAlias

from brokerd.config.address_check import may_overlap
from brokerd.config.model import Config, Limits, Log
from brokerd.config.values import (
    ClientConfig,
    ClusterConfig,
    Key,
    ListenConfig,
    MailboxConfig,
    MonitorConfig,
    RateConfig,
    StoreConfig,
)
from brokerd_client.address import Address

__all__ = ["Plan", "compare", "merge", "overlaps"]

#: The fields of a configuration that a reload applies. A change of any other field
#: needs a restart.
_RELOADED: Final = frozenset(
    {
        "path",
        "listen",
        "clients",
        "limits",
        "log",
        "monitor",
        "store",
        "cluster",
        "files",
        "warnings",
        "private",
        "unmatched",
    }
)
#: The fields of a cluster that no phrase shows.
_SECRETS: Final = ("user", "password", "credentials", "nkey")
#: Limits the rules shown per phrase.
_SHOWN: Final = 8


class Plan(NamedTuple):
    """The differences between the running configuration and a new one.

    Attributes:
        added, removed: Names of clients.
        changed: Names of clients, each with its changes.
        opened, closed: ``listen`` entries, by their address.
        altered: Entries with the same address but other settings, each with its
            changes.
        limits, log, monitor, store, cluster: The changes in that section.
        orphaned: Mailboxes that stay on disk although their client or its entry is gone.
        monitor_opened, monitor_closed: Where the monitor starts and stops listening.
        restart: Changes that a reload does not apply.
        refused: Changes for which a reload is refused.
    """

    added: tuple[str, ...]
    changed: Mapping[str, tuple[str, ...]]
    removed: tuple[str, ...]
    opened: tuple[ListenConfig, ...]
    closed: tuple[ListenConfig, ...]
    altered: tuple[tuple[ListenConfig, tuple[str, ...]], ...]
    limits: tuple[str, ...]
    log: tuple[str, ...]
    monitor: tuple[str, ...]
    store: tuple[str, ...]
    cluster: tuple[str, ...]
    orphaned: tuple[str, ...]
    monitor_opened: tuple[ListenConfig, ...]
    monitor_closed: tuple[ListenConfig, ...]
    restart: tuple[str, ...]
    refused: tuple[str, ...]

    def as_fields(self) -> dict[str, Any]:
        """Return the plan, for a reply or a log event, as lists and mappings of text."""
        return {
            "added": list(self.added),
            "changed": dict(self.changed),
            "removed": list(self.removed),
            "opened": [str(entry.address) for entry in self.opened],
            "closed": [str(entry.address) for entry in self.closed],
            "altered": {str(entry.address): list(changes) for entry, changes in self.altered},
            "limits": list(self.limits),
            "log": list(self.log),
            "monitor": list(self.monitor),
            "store": list(self.store),
            "cluster": list(self.cluster),
            "orphaned": list(self.orphaned),
            "restart": list(self.restart),
        }


def compare(running: Config, new: Config) -> Plan:
    """Return the differences between the running configuration and a new one."""
    before, after = running.clients, new.clients
    listening = {entry.address: entry for entry in running.listen}
    new_entries = {entry.address: entry for entry in new.listen}
    opened = tuple(entry for address, entry in new_entries.items() if address not in listening)
    closed = tuple(entry for address, entry in listening.items() if address not in new_entries)
    moves = _monitor_address(running) != _monitor_address(new)
    return Plan(
        added=tuple(name for name in after if name not in before),
        changed={
            name: tuple(_client_changes(before[name], entry))
            for name, entry in after.items()
            if name in before and entry != before[name]
        },
        removed=tuple(name for name in before if name not in after),
        opened=opened,
        closed=closed,
        altered=tuple(
            (entry, tuple(_changes(listening[address], entry, _LISTENER_WORDS)))
            for address, entry in new_entries.items()
            if listening.get(address, entry) != entry
        ),
        limits=tuple(_changes(running.limits, new.limits, _LIMIT_WORDS)),
        log=tuple(_changes(running.log, new.log, {})),
        monitor=tuple(_monitor_changes(running.monitor, new.monitor)),
        store=tuple(_store_changes(running.store, merge(running, new).store)),
        cluster=tuple(_cluster_changes(running.cluster, new.cluster)),
        orphaned=tuple(
            name
            for name, entry in before.items()
            if entry.mailbox is not None and (name not in after or after[name].mailbox is None)
        ),
        monitor_opened=(new.monitor.listen,) if new.monitor is not None and moves else (),
        monitor_closed=(running.monitor.listen,) if running.monitor is not None and moves else (),
        restart=tuple(f"{name} changes only with a restart" for name in _kept(running, new)),
        refused=tuple(_refused(running.cluster, new.cluster)),
    )


def _monitor_address(config: Config) -> Address | None:
    return None if config.monitor is None else config.monitor.address


def merge(running: Config, new: Config) -> Config:
    """Return the new configuration, but with the running values that need a restart."""
    kept = {name: getattr(running, name) for name in _kept(running, new)}
    return replace(new, **kept) if kept else new


def _kept(running: Config, new: Config) -> list[str]:
    names = [attribute.name for attribute in fields(Config) if attribute.name not in _RELOADED]
    kept = [name for name in names if getattr(running, name) != getattr(new, name)]
    # An open store stays where it is.
    before, after = running.store, new.store
    if before is not None and (after is None or after.path != before.path):
        kept.append("store")
    return kept


def _refused(before: ClusterConfig | None, after: ClusterConfig | None) -> Iterator[str]:
    """Yield the changes of a cluster that only a restart can make."""
    if before is None or after is None:
        if before is not after:
            yield "the section cluster is added or removed only by a restart (restart the broker)"
        return
    for name in ("host", "prefix"):
        if getattr(before, name) != getattr(after, name):
            yield f"cluster.{name} changes only with a restart (restart the broker)"


def overlaps(opened: Iterable[ListenConfig], closed: Collection[ListenConfig]) -> Iterator[str]:
    """Yield a phrase for each new address that is free only once an old address closes.

    That is so if one of the two addresses stands for every address of the machine.
    """
    for new in opened:
        for old in closed:
            if may_overlap(new.address, old.address):
                yield (
                    f"can't listen at {new.address} while this broker listens at {old.address}"
                    " (restart it)"
                )


# Phrases


def _client_changes(before: ClientConfig, after: ClientConfig) -> Iterator[str]:
    yield from _key_changes(before.keys, after.keys)
    if before.home and after.home and before.home != after.home:
        yield from _move(before, after)
    else:
        yield from _mailbox_changes(before.mailbox, after.mailbox)
    elsewhere = ("mailbox", "home", "home_subscribe")
    yield from _changes(before, after, _CLIENT_WORDS, without=("keys", *elsewhere))


def _move(before: ClientConfig, after: ClientConfig) -> Iterator[str]:
    """Yield what it means that a mailbox has another home."""
    yield f"home: {before.home} -> {after.home}"
    if before.mailbox is not None:
        yield (
            f"mailbox: its messages stay in the store of {before.home}, orphaned (move them:"
            " brokerctl mailbox export here, and import there)"
        )


def _mailbox_changes(before: MailboxConfig | None, after: MailboxConfig | None) -> Iterator[str]:
    if before is None and after is not None:
        yield "mailbox added"
    elif before is not None and after is None:
        yield "mailbox removed: its messages stay on disk until they are purged"
    elif before is not None and after is not None:
        for phrase in _changes(before, after, _MAILBOX_WORDS):
            yield f"mailbox.{phrase}"
        if after.size < before.size or after.messages < before.messages:
            yield "mailbox: a smaller size deletes no message"


def _store_changes(before: StoreConfig | None, after: StoreConfig | None) -> Iterator[str]:
    if before is None and after is not None:
        yield f"path: none -> {after.path}"
    elif before is not None and after is not None:
        yield from _changes(before, after, _STORE_WORDS)


def _cluster_changes(before: ClusterConfig | None, after: ClusterConfig | None) -> Iterator[str]:
    if before is None or after is None:
        return
    yield from _changes(before, after, _CLUSTER_WORDS, without=("host", "prefix", *_SECRETS))
    if before.login != after.login:
        yield f"login: {before.login} -> {after.login}"
    elif any(getattr(before, field) != getattr(after, field) for field in _SECRETS):
        yield f"login: {after.login}, with another secret"


def _key_changes(before: tuple[Key, ...], after: tuple[Key, ...]) -> Iterator[str]:
    if before == after:
        return
    old, new = {key.value: key for key in before}, {key.value: key for key in after}
    for value, key in new.items():
        if value not in old:
            yield f"key {key.key_id} added ({key.source})"
        elif old[value] != key:
            yield f"key {key.key_id}: accepted {_window(old[value])} -> {_window(key)}"
    for value, key in old.items():
        if value not in new:
            yield f"key {key.key_id} removed ({key.source})"
    if old == new:
        yield "keys: in another order"


def _window(key: Key) -> str:
    begin = f"from {_moment(key.not_before)}" if key.not_before else ""
    end = f"until {_moment(key.not_after)}" if key.not_after else ""
    return " ".join(filter(None, (begin, end))) or "always"


def _moment(when: datetime) -> str:
    return when.isoformat(timespec="seconds").replace("+00:00", "Z")


_Words = Mapping[str, Callable[[Any], str]]
_Section: TypeAlias = (
    ClientConfig | ListenConfig | Limits | Log | MailboxConfig | StoreConfig | ClusterConfig
)


def _changes(
    before: _Section,
    after: _Section,
    words: _Words,
    without: tuple[str, ...] = (),
) -> Iterator[str]:
    """Yield a phrase for every field that differs."""
    if isinstance(before, (Limits, Log)):
        names = list(type(before).model_fields)
    else:
        names = [
            attribute.name
            for attribute in fields(before)
            if attribute.compare and attribute.name not in without
        ]
    for name in names:
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            words_of = words.get(name, _said)
            yield f"{name}: {words_of(old)} -> {words_of(new)}"


def _monitor_changes(before: MonitorConfig | None, after: MonitorConfig | None) -> Iterator[str]:
    for name, off in (("address", None), ("per_client", False), ("hosts", ()), ("page", True)):
        old, new = getattr(before, name, off), getattr(after, name, off)
        if old != new:
            yield f"{name}: {_said(old)} -> {_said(new)}"
    if getattr(before, "password", None) != getattr(after, "password", None):
        yield "password: changed"


def _said(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, tuple):
        shown = ", ".join(str(item) for item in value[:_SHOWN])
        return f"[{shown}{f', and {len(value) - _SHOWN} more' if len(value) > _SHOWN else ''}]"
    return str(value)


def _size(count: int) -> str:
    for unit, power in (("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if count and count % 1024**power == 0:
            return f"{count // 1024**power}{unit}"
    return f"{count} bytes"


def _seconds(duration: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if duration and duration % length == 0:
            return f"{duration / length:g}{unit}"
    return f"{duration:g}s"


def _mode(mode: int | None) -> str:
    return "none" if mode is None else f"{mode:04o}"


def _rate(rate: RateConfig) -> str:
    messages = "" if rate.messages is None else f"{rate.messages:g} messages/s"
    size = "" if rate.bytes is None else f"{rate.bytes:g} bytes/s"
    return ", ".join(filter(None, (messages, size))) or "no limit"


_CLIENT_WORDS: Final[_Words] = {
    "queue": _size,
    "rate": _rate,
    "peer_uid": lambda users: "all" if users is None else _said(users),
}
_MAILBOX_WORDS: Final[_Words] = {
    "size": _size,
    "max_message": _size,
    "ttl": lambda ttl: "none" if ttl is None else _seconds(ttl),
    "ack_timeout": lambda timeout: "none" if timeout is None else _seconds(timeout),
    "dead": lambda share: f"{share:.0%}",
}
_STORE_WORDS: Final[_Words] = {"min_free": _size, "dedup": _seconds}
_CLUSTER_WORDS: Final[_Words] = {"unanswered": _size}
_LISTENER_WORDS: Final[_Words] = {
    "mode": _mode,
    "group": lambda group: "the broker's own" if group is None else str(group),
}
_LIMIT_WORDS: Final[_Words] = {
    "max_message": _size,
    "handshake_timeout": _seconds,
    "keepalive": _seconds,
    "open_timeout": _seconds,
    "wait_timeout": _seconds,
    "drain_timeout": _seconds,
    "expiry_warning": _seconds,
    "return_grace": _seconds,
    "remote_timeout": _seconds,
}
