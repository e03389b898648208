"""Warnings about surroundings that do not match a configuration that comes into force.

This module checks and warns, and changes nothing. Warnings that need only the files are
in :mod:`brokerd.config.lint`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Final

from structlog.typing import FilteringBoundLogger

from brokerd.config.lint import about_plain
from brokerd.config.values import ListenConfig
from brokerd.net.bound_loggers import listener_logger
from brokerd.net.listen.listener import Listening
from brokerd.net.listen.socket_activation import ActivatedSockets
from brokerd_client.address import Address

__all__ = ["warn_of_keys", "warn_of_plain", "warn_of_surroundings"]

#: Warnings of one kind that are listed in one log event.
_SHOWN: Final = 20


def warn_of_surroundings(
    log: FilteringBoundLogger,
    listen: Iterable[ListenConfig],
    users_unseen: Mapping[str, list[int]],
    activated: ActivatedSockets,
    assigned: Iterable[ListenConfig],
) -> None:
    """Log what the configuration expects and the service manager does not provide.

    users_unseen: the clients with users that this process can't see, and those users.
    assigned: the entries of ``listen`` that have some of the activated sockets.
    """
    for entry in activated.unmatched(listen, assigned):
        reason = (
            f"the service manager hands over no socket called {entry.name}, and none at this"
            f" address (give the .socket unit FileDescriptorName={entry.name}, or take the name"
            " out)"
        )
        listener_logger(log, entry.address).warning(
            "listener.not_handed_over", name=entry.name, reason=reason
        )
    for name, users in users_unseen.items():
        reason = (
            "the process has a user namespace of its own and can't identify these users: they are"
            " refused (with systemd: PrivateUsers=no, as in brokerd-peer-uid.conf)"
        )
        log.warning("client.users_unseen", name=name, peer_uid=users, reason=reason)


def warn_of_keys(log: FilteringBoundLogger, warnings: Sequence[str]) -> None:
    """Log odd keys, and key files that another user can replace, in one event."""
    if warnings:
        log.warning("key.odd", count=len(warnings), warnings=list(warnings[:_SHOWN]))


def warn_of_plain(
    log: FilteringBoundLogger, listening: Iterable[Listening], among: Container[Address]
) -> None:
    """Log the listeners whose traffic other machines or users can read and alter.

    among: the configured addresses to check.
    """
    for listener in listening:
        reason = about_plain(listener.config, listener.address)
        if reason and listener.config.address in among:
            listener_logger(log, listener.address).warning("listener.plain", reason=reason)
