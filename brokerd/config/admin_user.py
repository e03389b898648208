"""The administrator that a user of this machine is without a key: ``peer_uid`` and no key.

Only the main file is read, and a mistake elsewhere in it does not matter: the
administrator may be about to ask the broker for a list of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from brokerd.config.file_reader import Unreadable
from brokerd.config.listen_addresses import entrances
from brokerd.config.model import KEY_FIELDS
from brokerd.config.text_files import text_of
from brokerd.config.yaml_reader import read

__all__ = ["LocalAdmin", "local_admin"]


@dataclass(frozen=True, slots=True)
class LocalAdmin:
    """The client's name, and the path of the first Unix socket of the broker."""

    name: str
    socket: str


def local_admin(file: str, environ: Mapping[str, str], user: int) -> LocalAdmin | None:
    """Return the administrator that a user is, or None.

    Args:
        file: The main file, or ``text_files.IN_ENVIRON``.
        environ: The environment, for the latter.
        user: The user's id.
    """
    try:
        root = read(text_of(file, environ)[0], file).root
        listened = [each.address for each in entrances(file, environ)]
    except Unreadable:
        return None
    sockets = [each.path for each in listened if each.is_file]
    clients = root.get("clients") if isinstance(root, dict) else None
    if not sockets or not isinstance(clients, dict):
        return None
    for name, entry in clients.items():
        if not isinstance(entry, dict) or entry.get("admin") is not True:
            continue
        users = entry.get("peer_uid")
        if (
            isinstance(users, list)
            and user in users
            and not any(entry.get(field) is not None for field in KEY_FIELDS)
        ):
            return LocalAdmin(str(name), sockets[0])
    return None
