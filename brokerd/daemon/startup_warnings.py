"""What an operator is warned of when a configuration comes into force: it counts on something that is not there.

Looks and warns, and changes nothing. What the files alone show is said by :mod:`brokerd.config.lint`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Final

from brokerd.config.lint import about_plain
from brokerd.config.values import ClientConfig, ListenConfig
from brokerd.log.api import Log
from brokerd.net.handshake.peer_uid import unseen
from brokerd.net.listen.listener import Listening
from brokerd.net.listen.socket_activation import ActivatedSockets
from brokerd_client.address import Address

__all__ = ["warn_of_keys", "warn_of_plain", "warn_of_surroundings"]

#: Warnings of one kind that one event of the log has.
_SHOWN: Final = 20


def warn_of_surroundings(
    log: Log,
    listen: Iterable[ListenConfig],
    clients: Mapping[str, ClientConfig],
    activated: ActivatedSockets,
    assigned: Iterable[ListenConfig],
) -> None:
    """Tell of what the configuration counts on and the service manager does not give.

    allotted: the entries of ``listen`` that have some of the sockets handed over.
    """
    for entry in activated.unmatched(listen, assigned):
        reason = (
            f"the service manager hands over no socket called {entry.name} nor one at this address "
            f"(give the .socket unit FileDescriptorName={entry.name}, or take the name out)"
        )
        log.warning("listener.not_handed_over", listener=str(entry.address), name=entry.name, reason=reason)
    for name, users in unseen(clients).items():
        reason = (
            "this process has a user namespace of its own and can't tell these users from others: nobody is "
            "let in as one of them (with systemd: PrivateUsers=no, as in brokerd-peer-uid.conf)"
        )
        log.warning("client.users_unseen", name=name, peer_uid=users, reason=reason)


def warn_of_keys(log: Log, warnings: Sequence[str]) -> None:
    """Tell of odd keys, and of files that another user can replace: one event, whatever their number."""
    if warnings:
        log.warning("key.odd", count=len(warnings), warnings=list(warnings[:_SHOWN]))


def warn_of_plain(log: Log, listening: Iterable[Listening], among: Container[Address]) -> None:
    """Tell of listeners, of those configured addresses, whose traffic others can read and alter."""
    for each in listening:
        reason = about_plain(each.config, each.address)
        if reason and each.config.address in among:
            log.warning("listener.plain", listener=str(each.address), reason=reason)
