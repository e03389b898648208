"""The most memory that a broker with this configuration can come to hold, whatever its clients and strangers do.

Every term is a limit of the configuration times what one of it costs in the worst case: the shortest messages, the
longest topics, every queue full. It is a bound and no forecast; a broker whose clients read holds little more
than :data:`BASE`. What the system keeps for each socket is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Final

from brokerd.config.model import Config
from brokerd.config.values import ClientConfig, WhenFull

__all__ = ["BASE", "Bound", "memory_bound"]

_KIB: Final = 1024
_MIB: Final = 1024 * 1024

#: The interpreter, the libraries, the code, the log's own queue, and what is remembered of topics (core.topics).
BASE: Final = 128 * _MIB
#: The allocator rounds up, and keeps holes between what is still used.
_ALLOCATOR: Final = 1.5
#: A queue whose frames are kept one by one, holding nothing but the shortest, costs this many times its bytes.
_SINGLE_FRAMES: Final = 10
#: When a recipient goes, each message that waited for it comes back as an error, to somebody who may not read either.
#: The sender sends no more then, so every byte that waits is answered for once: the shortest by so many bytes.
_OUTCOMES: Final = 12
#: The broker's own answers that may wait beyond a client's queue (core.broker), and the read buffer's size.
_RESERVE: Final = 256 * _KIB
_READ_BUFFER: Final = 256 * _KIB
#: One connection, one that has not proved who it is, and the caches of one that publishes.
_CONNECTION: Final = 16 * _KIB
_HANDSHAKE: Final = 16 * _KIB
_PUBLISHED: Final = 2 * _MIB
#: TLS for one of either: OpenSSL's own state, and bytes under way in both directions (brokerd_client.tls.stream).
_TLS: Final = 256 * _KIB
#: A subscription of 128 tokens that shares none with another; a request that is not answered.
_SUBSCRIPTION: Final = 12 * _KIB
_REQUEST: Final = 640
#: A configured client, and one remembered by a connection that has sent to it.
_CLIENT: Final = 8 * _KIB
_REACHED: Final = 320


@dataclass(frozen=True, slots=True)
class Bound:
    """Bytes, by what they are for. total: of all of them together."""

    base: int
    clients: int
    handshakes: int
    queues: int
    partial_messages: int
    subscriptions: int
    requests: int
    caches: int
    tls: int

    @property
    def total(self) -> int:
        """The bound."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return each part by a name for people."""
        return {part.name.replace("_", " "): getattr(self, part.name) for part in fields(self)}


def memory_bound(config: Config) -> Bound:
    """Return the bound for a configuration."""
    limits = config.limits
    connections = list(_most_costly(config))
    known = len(config.clients)
    return Bound(
        base=BASE,
        clients=known * _CLIENT,
        handshakes=limits.handshakes * _HANDSHAKE,
        queues=_sum(_queue(client, limits.max_message) for client in connections),
        partial_messages=_sum(max(limits.max_message + _KIB, _READ_BUFFER) for _ in connections),
        subscriptions=sum(client.subscriptions * _SUBSCRIPTION for client in connections),
        requests=sum(client.requests * _REQUEST for client in connections),
        tls=_TLS * (limits.handshakes + len(connections)) * any(listen.tls is not None for listen in config.listen),
        caches=sum(_CONNECTION + _PUBLISHED * bool(client.publish) + known * _REACHED for client in connections),
    )


def _sum(sizes: Iterator[int]) -> int:
    return int(sum(sizes) * _ALLOCATOR)


def _queue(client: ClientConfig, max_message: int) -> int:
    """Return what may wait for one connection: its queue, or one message that is longer; and the broker's answers."""
    single = client.connections > 1 or client.when_full is WhenFull.DROP_OLDEST
    waiting = max(client.queue, max_message + _KIB) + _RESERVE
    return waiting * (_OUTCOMES + (_SINGLE_FRAMES if single else 1))


def _most_costly(config: Config) -> Iterator[ClientConfig]:
    """Yield the client of each connection there can be at once, those that cost most first."""

    def cost(client: ClientConfig) -> int:
        held = client.subscriptions * _SUBSCRIPTION + client.requests * _REQUEST
        return _queue(client, config.limits.max_message) + held

    room = config.limits.connections
    for client in sorted(config.clients.values(), key=cost, reverse=True):
        for _ in range(min(client.connections, room)):
            yield client
        room -= min(client.connections, room)
