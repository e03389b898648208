"""The upper bound of a broker's memory, whatever its clients and unknown peers do.

Every term is a limit of the configuration, times the worst-case cost of one unit. The
worst case is the shortest messages, the longest topics, and every queue full. The bound
is not a forecast: a broker whose clients read holds little more than :data:`BASE`. The
system's own memory for each socket is not included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Final

from brokerd.config.model import Config
from brokerd.config.values import ClientConfig, ClusterConfig, WhenFull

__all__ = ["BASE", "Bound", "memory_bound"]

_KIB: Final = 1024
_MIB: Final = 1024 * 1024

#: Bytes of the interpreter, the libraries, the code, the log's queue, the cache of
#: topics (core.topics), and the samples of the monitor's page.
BASE: Final = 128 * _MIB
#: Bytes of the incidents that the broker keeps (core.incidents): 4096 of two KiB.
_INCIDENTS: Final = 8 * _MIB
#: Factor for the allocator, which rounds up and leaves holes between live objects.
_ALLOCATOR: Final = 1.5
#: Memory per byte of a queue that keeps its frames one by one, if all are the shortest.
_SINGLE_FRAMES: Final = 10
#: Bytes of error reports per queued byte, for the shortest messages. When a recipient
#: disconnects, each message queued for it is reported as an error to its sender, which
#: may not read either. That sender then sends no more, so each byte is reported once.
_OUTCOMES: Final = 12
#: Bytes of the broker's own answers that may wait beyond a client's queue
#: (core.broker), and of the read buffer.
_RESERVE: Final = 256 * _KIB
_READ_BUFFER: Final = 256 * _KIB
#: Bytes of two large messages whose memory is kept for the next ones (core.large_frame).
_SPARE: Final = 144 * _MIB
#: Bytes per connection, per pending connection, and for the caches of a connection that
#: publishes.
_CONNECTION: Final = 16 * _KIB
_HANDSHAKE: Final = 16 * _KIB
_PUBLISHED: Final = 2 * _MIB
#: Bytes per channel, besides those that wait in each direction.
_CHANNEL: Final = 8 * _KIB
#: Bytes of TLS per connection, pending or not: OpenSSL's own state, and the bytes in
#: flight in both directions (brokerd_client.tls.stream).
_TLS: Final = 256 * _KIB
#: Bytes per subscription of 128 tokens that shares none with another, and per
#: unanswered request.
_SUBSCRIPTION: Final = 12 * _KIB
_REQUEST: Final = 1024
#: Bytes per configured client, and per client in the cache of a connection that has
#: sent to it.
_CLIENT: Final = 8 * _KIB
_REACHED: Final = 320
#: Bytes per mailbox in memory: messages read ahead, and delayed ones that are due next
#: (core.mailboxes.mailbox).
_MAILBOX: Final = 4 * _MIB
#: Most messages that one connection holds, and bytes of each beside its frame.
_HELD_MESSAGES: Final = 10_000
_HELD: Final = 320
#: Bytes of messages on their way to the disk, in the core and in the store's socket
#: (core.mailboxes.commits).
_UNCOMMITTED: Final = 2 * 64 * _MIB
#: Times ``unanswered`` that the frames for and from one other host take at most: those
#: that wait, those without an outcome, those that came, and outcomes kept for inquiries.
_PER_HOST: Final = 4
#: Bytes per client that another host has announced (core.cluster).
_ANNOUNCED: Final = 1024


@dataclass(frozen=True, slots=True)
class Bound:
    """The bound in bytes, by purpose. total: the sum."""

    base: int
    incidents: int
    clients: int
    handshakes: int
    channels: int
    queues: int
    partial_messages: int
    subscriptions: int
    requests: int
    caches: int
    tls: int
    mailboxes: int
    cluster: int

    @property
    def total(self) -> int:
        """The bound of all parts together, in bytes."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return each part by its readable name."""
        return {part.name.replace("_", " "): getattr(self, part.name) for part in fields(self)}


def memory_bound(config: Config) -> Bound:
    """Return the memory bound for a configuration."""
    limits = config.limits
    connections = list(_most_costly(config))
    clients = len(config.clients)
    # Each channel counts for two clients.
    of_clients = sum(client.channels for client in config.clients.values()) // 2
    channels = min(limits.channels, of_clients)
    return Bound(
        base=BASE,
        incidents=_INCIDENTS,
        clients=clients * _CLIENT,
        # As many more connections may be undecided.
        handshakes=2 * limits.handshakes * _HANDSHAKE,
        channels=channels * (_CHANNEL + int(2 * _READ_BUFFER * _ALLOCATOR)),
        queues=_sum(_queue(client, limits.max_message) for client in connections)
        + _sum(
            _waiting(client, limits.max_message)
            for client in {client.name: client for client in connections}.values()
        ),
        partial_messages=_sum(max(limits.max_message + _KIB, _READ_BUFFER) for _ in connections)
        + min(2 * (limits.max_message + _KIB), _SPARE),
        subscriptions=sum(client.subscriptions * _SUBSCRIPTION for client in connections),
        requests=sum(client.requests * _REQUEST for client in connections),
        tls=_TLS
        * (2 * limits.handshakes + len(connections) + 2 * channels)
        * any(listen.tls is not None for listen in config.listen),
        mailboxes=_sum(_mailbox(client) for client in connections if client.mailbox is not None)
        + _sum(_MAILBOX for client in config.clients.values() if client.mailbox is not None)
        + _UNCOMMITTED * (config.store is not None),
        cluster=0 if config.cluster is None else _cluster(config.cluster, clients),
        caches=sum(
            _CONNECTION + _PUBLISHED * bool(client.publish) + clients * _REACHED
            for client in connections
        ),
    )


def _sum(sizes: Iterator[int]) -> int:
    return int(sum(sizes) * _ALLOCATOR)


def _queue(client: ClientConfig, max_message: int) -> int:
    """Return the bytes that may wait for one connection.

    They are its queue, or one longer message, and the broker's own answers.
    """
    single = client.connections > 1 or client.when_full is WhenFull.DROP_OLDEST
    waiting = max(client.queue, max_message + _KIB) + _RESERVE
    return waiting * (_OUTCOMES + (_SINGLE_FRAMES if single else 1))


def _waiting(client: ClientConfig, max_message: int) -> int:
    """Return the bytes of requests that may wait for one client or be kept for it.

    Requests beyond ``in_flight`` wait within the queue, or one longer message. A pool
    keeps as many bytes of delivered requests, for another member.
    """
    waiting = max(client.queue, max_message + _KIB) * (_OUTCOMES + _SINGLE_FRAMES)
    return waiting + client.queue * _SINGLE_FRAMES * (client.connections > 1)


def _mailbox(client: ClientConfig) -> int:
    """Return the bytes of messages that one connection holds, within its window."""
    return client.queue + _HELD_MESSAGES * _HELD


def _cluster(cluster: ClusterConfig, clients: int) -> int:
    """Return the bytes of what is kept about all other hosts, and of frames to and from them."""
    return int(cluster.hosts * (_PER_HOST * cluster.unanswered + clients * _ANNOUNCED) * _ALLOCATOR)


def _most_costly(config: Config) -> Iterator[ClientConfig]:
    """Yield the client of each possible simultaneous connection, the most costly first."""

    def cost(client: ClientConfig) -> int:
        held = client.subscriptions * _SUBSCRIPTION + client.requests * _REQUEST
        return _queue(client, config.limits.max_message) + held

    room = config.limits.connections
    for client in sorted(config.clients.values(), key=cost, reverse=True):
        for _ in range(min(client.connections, room)):
            yield client
        room -= min(client.connections, room)
