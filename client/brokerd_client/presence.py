"""Who is here: the ``clients`` list joined with the presence events, so that nobody is missed or told twice.

Rules: docs/protocol.md, "The broker as a client". A watch subscribes first and asks for the list second, on one
connection, so the list's answer says everything about the events before it, and nothing about those after it.
No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from brokerd_client.errors import ProtocolError
from brokerd_client.wire.envelope import is_name

__all__ = ["OFFLINE_PREFIX", "ONLINE_PREFIX", "PATTERNS", "ClientInfo", "Presence", "Watch", "client_list"]

ONLINE_PREFIX: Final = "$broker.online."
OFFLINE_PREFIX: Final = "$broker.offline."
#: A client's name may hold dots, which a topic takes for more tokens.
PATTERNS: Final = (ONLINE_PREFIX + ">", OFFLINE_PREFIX + ">")
#: Names that one watch remembers at most: ten times as many as a broker was ever tried with.
_MOST: Final = 2**20
#: Seconds since the epoch that a time is below: some 30,000 years.
_END_OF_TIME: Final = 1e12


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """A client this one may send to.

    since: when it came or went, in seconds since the epoch; None where the broker doesn't know.
    """

    name: str
    online: bool
    since: float | None = None


@dataclass(frozen=True, slots=True)
class Presence:
    """A client is online now, or offline now."""

    name: str
    online: bool


def client_list(answer: Mapping[str, Any]) -> list[ClientInfo]:
    """Return the clients in the answer of the ``clients`` operation. Raises ProtocolError."""
    clients = answer.get("clients")
    if not isinstance(clients, list):
        raise ProtocolError("the broker's list of clients is not a list")
    return [_client(entry) for entry in clients]


def _client(entry: object) -> ClientInfo:
    if not isinstance(entry, dict):
        raise ProtocolError("the broker's list of clients has an entry that is not an object")
    name, online, since = entry.get("name"), entry.get("online"), entry.get("since")
    if not isinstance(name, str) or not is_name(name):
        raise ProtocolError("the broker's list of clients has an entry without a valid name")
    if not isinstance(online, bool):
        raise ProtocolError(f"the broker's list of clients does not say whether {name} is online")
    if since is not None and not (type(since) in (int, float) and abs(since) < _END_OF_TIME):
        raise ProtocolError(f"the broker's list of clients has a time for {name} that is not valid")
    return ClientInfo(name, online, since)


class Watch:
    """One watcher's picture of who is online.

    sink: whom the changes are for; this class never looks at it.
    """

    __slots__ = ("_known", "_synced", "sink")

    def __init__(self, sink: object) -> None:
        self.sink = sink
        self._known: dict[str, bool] = {}
        self._synced = False

    def snapshot(self, clients: Iterable[ClientInfo]) -> list[Presence]:
        """Take in the list; return what it says that the watcher has not been told.

        A client that is no longer in the list can't be seen any more: it counts as offline.
        """
        self._synced = True
        fresh = {client.name: client.online for client in clients}
        gone = [name for name, online in self._known.items() if online and name not in fresh]
        changes = [Presence(name, online) for name, online in fresh.items() if self._known.get(name) is not online]
        self._known = fresh
        return [Presence(name, online=False) for name in gone] + changes

    def event(self, topic: str) -> Presence | None:
        """Return the change a presence event tells, or None where it is none.

        An event before the list came is told by the list. Raises ProtocolError.
        """
        online = topic.startswith(ONLINE_PREFIX)
        name = topic[len(ONLINE_PREFIX if online else OFFLINE_PREFIX) :]
        if not self._synced or self._known.get(name) is online or not is_name(name):
            return None
        if len(self._known) >= _MOST and name not in self._known:
            raise ProtocolError(f"the broker has named more than {_MOST} clients")
        self._known[name] = online
        return Presence(name, online)

    def disconnected(self) -> None:
        """Trust no event until the next list: some may have been missed."""
        self._synced = False
