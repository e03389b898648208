"""Socket activation: sockets that the service manager passes, and their ``listen``
entries.

They are received as sd_listen_fds(3) says: LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES,
descriptors from 3 on. Their addresses, files, modes and groups belong to the service
manager. This module binds, changes or removes none of them. They stay open, and
connections wait in them, while the broker restarts.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, replace
from typing import Final, Self

from brokerd.config.values import ListenConfig
from brokerd.net.listen.listener import ListenError, Listening, Resolved, listen
from brokerd_client.address import Address, parse

__all__ = [
    "ActivatedSocket",
    "ActivatedSockets",
    "SocketActivationError",
    "listen_at",
    "listen_for",
]

#: The first descriptor that is passed, SD_LISTEN_FDS_START.
_FIRST: Final = 3
_VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


class SocketActivationError(ListenError):
    """The sockets of the service manager do not fit the configuration.

    Starting the broker again does not help.
    """


@dataclass(frozen=True, slots=True, eq=False)
class ActivatedSocket:
    """One listening socket.

    name: the name that the service manager gives it (FileDescriptorName=).
    """

    sock: socket.socket
    name: str
    address: Address

    def __str__(self) -> str:
        return f"{self.address} ({self.name})"


class ActivatedSockets:
    """The sockets passed to this process; they are kept until it ends."""

    def __init__(self, sockets: Iterable[ActivatedSocket] = ()) -> None:
        self.sockets = tuple(sockets)

    @classmethod
    def take(cls, environ: MutableMapping[str, str], pid: int) -> Self:
        """Return the sockets that these variables pass to this process, and remove the
        variables.

        Child processes must not see them. Raises SocketActivationError for a descriptor
        that is not a listening stream socket.
        """
        variables = {variable: environ.pop(variable, "") for variable in _VARIABLES}
        if variables["LISTEN_PID"] != str(pid):
            return cls()
        try:
            count = int(variables["LISTEN_FDS"])
        except ValueError:
            raise SocketActivationError(
                f"LISTEN_FDS={variables['LISTEN_FDS']!r} is not a number"
                " (start brokerd by a .socket unit)"
            ) from None
        names = variables["LISTEN_FDNAMES"].split(":") if variables["LISTEN_FDNAMES"] else []
        names += ["unknown"] * (count - len(names))
        return cls(_taken(_FIRST + number, names[number]) for number in range(count))

    def assign(self, entries: Iterable[ListenConfig]) -> dict[ListenConfig, list[ActivatedSocket]]:
        """Return the sockets of each entry; an entry without sockets has to listen by
        itself.

        A socket belongs to the entry whose address it is bound to, else to the entry
        that has its name. Raises SocketActivationError with every socket that belongs
        to no entry. A client that connected there would get no answer.
        """
        if not self.sockets:
            return {}
        entries = list(entries)
        by_address = {place: entry for entry in entries for place in _places(entry.address)}
        by_name = {entry.name: entry for entry in entries if entry.name is not None}
        assigned: dict[ListenConfig, list[ActivatedSocket]] = {}
        left = []
        for activated in self.sockets:
            entry = by_address.get(_place(activated.address)) or by_name.get(activated.name)
            if entry is None:
                left.append(activated)
            else:
                assigned.setdefault(entry, []).append(activated)
        if left:
            raise SocketActivationError("; ".join(map(_unclaimed, left)))
        return assigned

    def unmatched(
        self, entries: Iterable[ListenConfig], assigned: Iterable[ListenConfig]
    ) -> list[ListenConfig]:
        """Return the entries that name a socket which the service manager did not pass."""
        met = set(assigned)
        return [
            entry
            for entry in entries
            if self.sockets and entry.name is not None and entry not in met
        ]


def listen_at(entry: ListenConfig, sockets: Iterable[ActivatedSocket]) -> list[Listening]:
    """Return an entry's listening sockets.

    They are duplicates, so that a reload can remove the entry and add it again.
    """
    tls = entry.tls is not None
    return [
        Listening(entry, activated.sock.dup(), replace(activated.address, tls=tls))
        for activated in sockets
    ]


def listen_for(
    entries: Iterable[ListenConfig],
    assigned: dict[ListenConfig, list[ActivatedSocket]],
    resolved: Resolved | None = None,
) -> list[Listening]:
    """Return the listening sockets of all entries.

    Raises ListenError; then none is left open.

    assigned: the entries whose sockets the service manager passes.
    resolved: the result of ``look_up``, or None.
    """
    opened: list[Listening] = []
    try:
        for entry in entries:
            opened += (
                listen_at(entry, assigned[entry]) if entry in assigned else listen(entry, resolved)
            )
    except ListenError:
        for listening in opened:
            listening.close()
        raise
    return opened


def _taken(fd: int, name: str) -> ActivatedSocket:
    os.set_inheritable(fd, False)
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise SocketActivationError(_no_listener(fd, name)) from error
    families = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
    accepts = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.type != socket.SOCK_STREAM or sock.family not in families or not accepts:
        sock.close()
        raise SocketActivationError(_no_listener(fd, name))
    sock.setblocking(False)
    return ActivatedSocket(sock, name, _address_of(sock))


def _no_listener(fd: int, name: str) -> str:
    return (
        f"descriptor {fd} ({name}), handed over by the service manager, is not a listening stream"
        " socket (use ListenStream= and Accept=no in the .socket unit)"
    )


def _address_of(sock: socket.socket) -> Address:
    bound = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return Address("AF_UNIX", path=os.fsdecode(bound))
    return parse(bound[:2])


def _unclaimed(activated: ActivatedSocket) -> str:
    # As it is written in YAML, where "[" and "@" have another meaning.
    address = (
        f'"{activated.address}"' if str(activated.address)[0] in "[@" else str(activated.address)
    )
    return (
        f"the service manager hands over a socket at {activated.address}, called {activated.name},"
        f" that no listen entry is for (add `- {address}` to listen, or `name: {activated.name}` to"
        " the entry it is for, or take the socket out of the .socket unit)"
    )


def _place(address: Address) -> tuple[str, int]:
    """Return a value that is the same for two addresses of the same place."""
    if address.is_file:
        return os.path.realpath(address.path), 0
    return (address.path, 0) if address.path else (address.host, address.port)


def _places(address: Address) -> set[tuple[str, int]]:
    """Return every place of a configured address: a host name may have several."""
    if address.family not in ("AF_INET", "AF_INET6"):
        return {_place(address)}
    if address.port == 0:
        # Any port: no socket is bound to port 0.
        return set()
    # A name that can't be resolved is reported when the entry listens by itself.
    with contextlib.suppress(OSError):
        results = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        return {(str(sockaddr[0]), address.port) for *_, sockaddr in results}
    return set()
