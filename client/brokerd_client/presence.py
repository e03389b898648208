"""Presence: the ``clients`` list, joined with the presence events. No I/O.

So each change is reported exactly once. Rules: docs/protocol.md, "The broker as a
client". A watch first subscribes, and then requests the list, on one connection. The
list therefore includes all events that came before it, and none that come after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from brokerd_client._compat import slotted
from brokerd_client.errors import ProtocolError
from brokerd_client.wire.envelope import is_name

__all__ = [
    "OFFLINE_PREFIX",
    "ONLINE_PREFIX",
    "PATTERNS",
    "ClientInfo",
    "Presence",
    "Watch",
    "client_list",
]

ONLINE_PREFIX: Final = "$broker.online."
OFFLINE_PREFIX: Final = "$broker.offline."
#: They end in ">" because a client's name may contain dots, which make several tokens
#: of a topic.
PATTERNS: Final = (ONLINE_PREFIX + ">", OFFLINE_PREFIX + ">")
#: Most names per watch: ten times the number of clients that a broker was ever tested
#: with.
_MAX_NAMES: Final = 2**20
#: Upper limit of a time, in seconds since the epoch: some 30,000 years.
_MAX_TIME_S: Final = 1e12


@slotted
@dataclass(frozen=True)
class ClientInfo:
    """A client to which this client may send.

    Attributes:
        name: The client's name.
        online: Whether it is connected.
        since: When it came online or went offline, in seconds since the epoch. It is
            None if the broker does not know.
    """

    name: str
    online: bool
    since: float | None = None


@slotted
@dataclass(frozen=True)
class Presence:
    """A change of presence: a client is now online, or now offline.

    Attributes:
        name: The client's name.
        online: Whether it is connected now.
    """

    name: str
    online: bool


def client_list(answer: Mapping[str, Any]) -> list[ClientInfo]:
    """Return the clients in the answer of the ``clients`` operation.

    Args:
        answer: The decoded answer of the broker.

    Returns:
        The clients, in the order of the answer.

    Raises:
        ProtocolError: The answer is not a valid list.
    """
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
    if since is not None and not (type(since) in (int, float) and abs(since) < _MAX_TIME_S):
        raise ProtocolError(f"the broker's list of clients has a time for {name} that is not valid")
    return ClientInfo(name, online, since)


class Watch:
    """The online clients as one watch knows them.

    sink: the receiver of the changes; this class never inspects it.
    """

    __slots__ = ("_states", "_synced", "sink")

    def __init__(self, sink: object) -> None:
        self.sink = sink
        self._states: dict[str, bool] = {}
        self._synced = False

    def snapshot(self, clients: Iterable[ClientInfo]) -> list[Presence]:
        """Apply the list; return the changes that were not reported yet.

        A client that is no longer in the list is not visible any more, and counts as
        offline.
        """
        self._synced = True
        states = {client.name: client.online for client in clients}
        removed_names = [
            name for name, online in self._states.items() if online and name not in states
        ]
        changes = [
            Presence(name, online)
            for name, online in states.items()
            if self._states.get(name) is not online
        ]
        self._states = states
        return [Presence(name, online=False) for name in removed_names] + changes

    def event(self, topic: str) -> Presence | None:
        """Return the change that a presence event reports, or None if nothing changed.

        Events before the list are ignored, because the list includes them. Raises
        ProtocolError.
        """
        online = topic.startswith(ONLINE_PREFIX)
        name = topic[len(ONLINE_PREFIX if online else OFFLINE_PREFIX) :]
        if not self._synced or self._states.get(name) is online or not is_name(name):
            return None
        if len(self._states) >= _MAX_NAMES and name not in self._states:
            raise ProtocolError(f"the broker has named more than {_MAX_NAMES} clients")
        self._states[name] = online
        return Presence(name, online)

    def disconnected(self) -> None:
        """Ignore events until the next list, because some may have been missed."""
        self._synced = False
