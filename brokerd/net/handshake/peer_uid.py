"""The user at the other end of a Unix socket, and the users that can be told apart
there.

A process in a user namespace of its own (systemd's PrivateUsers=yes) sees only some
users. All other users appear to it as the overflow user, 65534. If the broker took that
for a user, it would take every user for it. Source: user_namespaces(7).
"""

from __future__ import annotations

import functools
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from brokerd.config.values import ClientConfig
from brokerd_client._common.pipe_bridge import BridgedSocket

__all__ = ["is_seen", "peer_uid", "ranges_of", "unseen"]

_UID_MAP: Final = "/proc/self/uid_map"
_UCRED: Final = struct.Struct("3i")


def ranges_of(uid_map: str) -> tuple[range, ...]:
    """Return the user ids that a process with this uid_map sees."""
    lines = (line.split() for line in uid_map.splitlines())
    return tuple(range(int(first), int(first) + int(count)) for first, _, count in lines)


@functools.cache
def _seen() -> tuple[range, ...] | None:
    try:
        return ranges_of(Path(_UID_MAP).read_text(encoding="ascii"))
    except OSError:
        # A system without user namespaces.
        return None


def is_seen(uid: int, visible: tuple[range, ...] | None = None) -> bool:
    """Return whether this process can tell this user from all others.

    visible: the ranges of visible users, by default those of this process.
    """
    visible = _seen() if visible is None else visible
    return visible is None or any(uid in users for users in visible)


def unseen(
    clients: Mapping[str, ClientConfig], visible: tuple[range, ...] | None = None
) -> dict[str, list[int]]:
    """Return the clients whose peer_uid has users that can't be seen, and those users.

    visible: as for ``is_seen``.
    """
    unseen_users: dict[str, list[int]] = {}
    for name, client in clients.items():
        missing = [uid for uid in client.peer_uid or () if not is_seen(uid, visible)]
        if missing:
            unseen_users[name] = missing
    return unseen_users


def peer_uid(sock: socket.socket) -> int | None:
    """Return the user id at the other end of a Unix socket, or None.

    None: the socket or the system does not tell, or the user can't be seen.
    """
    # The other end of a bridged socket is this process, no matter which process uses
    # the pipe.
    if (
        not hasattr(socket, "SO_PEERCRED")
        or sock.family != socket.AF_UNIX
        or isinstance(sock, BridgedSocket)
    ):
        return None
    uid = int(_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1])
    return uid if is_seen(uid) else None
