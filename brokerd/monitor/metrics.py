"""The metrics: a reading of the counters as families with names, units and help texts.

Names follow Prometheus's rules: ``brokerd_`` in front, base units, ``_total`` behind a
value that only grows. The number of series is fixed, whatever clients do: labels have
values from closed lists. Only if the configuration asks for metrics of each client does
it grow with the number of configured names. docs/operations.md says of each metric what
it means and when to worry.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final, TypeAlias, TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from brokerd.core.channels import Channels
from brokerd.core.cluster.remote_traffic import RemoteTraffic
from brokerd.core.mailboxes.inspection import STATES
from brokerd.core.mailboxes.mailboxes import Mailboxes
from brokerd.monitor.collect import Reading, Share
from brokerd.monitor.key_expiry import Expiry
from brokerd.monitor.loop_lag import BOUNDS, Lag
from brokerd.monitor.sources import Sources
from brokerd.net.counters import HandshakeOutcome
from brokerd_client.wire.envelope import ErrorCode

__all__ = ["of_the_broker", "of_the_clients"]

#: Clients in one piece of a family, so that other tasks can run between two pieces.
_PIECE: Final = 256

_Item = TypeVar("_Item")
_PerClient: TypeAlias = tuple[
    type[CounterMetricFamily | GaugeMetricFamily], str, str, Callable[[Share], float]
]


def of_the_broker(
    sources: Sources, reading: Reading, lag: Lag, expiry: Expiry, *, python: str
) -> list[Metric]:
    """Return the families about the broker as a whole. python: its version."""
    broker, config = sources.broker, sources.config()
    counts = reading.counts
    info = InfoMetricFamily(
        "brokerd_build", "The version, the routing loop that runs and the version of Python."
    )
    info.add_metric(
        [], {"version": broker.status.version, "routing": broker.status.routing, "python": python}
    )
    return [
        info,
        _gauge(
            "start_time_seconds",
            "When the broker started, in seconds since the epoch.",
            broker.status.started_at,
        ),
        _counter(
            "upgrades",
            "Times the broker has replaced itself since it started.",
            broker.status.upgrades,
        ),
        _gauge(
            "ready",
            "1 while the broker takes clients, as /readyz says; 0 while it starts or drains.",
            not sources.not_ready(),
        ),
        _counter(
            "messages_received",
            "Messages, requests, replies and events that clients sent.",
            counts.messages_in,
        ),
        _counter("received_bytes", "Bytes of those, headers included.", counts.bytes_in),
        _counter(
            "messages_sent",
            "Messages put out for clients: an event once for each that gets it, the broker's own"
            " answers too.",
            counts.messages_out,
        ),
        _counter("sent_bytes", "Bytes of those, headers and lengths included.", counts.bytes_out),
        _labelled_counter(
            "refused",
            "Messages answered with an error, by its code.",
            "code",
            ErrorCode,
            reading.refused,
        ),
        _counter(
            "dropped",
            "Messages dropped without an error to any client: see when_full: drop_oldest.",
            reading.dropped,
        ),
        _gauge("clients", "Clients in the configuration.", len(broker.exchange.clients)),
        _gauge("clients_online", "Clients with at least one connection.", reading.online),
        _gauge("connections", "Connections.", reading.connections),
        _gauge("connections_limit", "limits.connections.", config.limits.connections),
        *_channel_metrics(broker.channels, config.limits.channels),
        _gauge("subscriptions", "Subscriptions to topics.", len(broker.topics)),
        _gauge("queued_bytes", "Bytes that wait for clients.", reading.queued_bytes),
        _gauge(
            "fullest_queue_ratio",
            "How full the fullest queue is; at 1 nothing more is taken.",
            reading.fullest,
        ),
        _gauge(
            "slow_connections", "Connections that take no more bytes at the moment.", reading.slow
        ),
        _gauge(
            "held_senders",
            "Connections not read from until a full queue has room.",
            reading.held,
        ),
        _gauge(
            "pending_requests",
            "Requests delivered and not answered yet.",
            reading.incoming_requests,
        ),
        _gauge(
            "waiting_requests",
            "Requests that wait until a recipient may receive one more (in_flight).",
            reading.waiting_requests,
        ),
        *_mailbox_metrics(broker.mailboxes, reading),
        *_cluster_metrics(broker.traffic, asyncio.get_running_loop().time()),
        *_handshake_metrics(sources),
        *_about_reloads(sources),
        _lag(lag),
        _counter(
            "log_lines_lost",
            "Lines of the log or the audit that could not be written.",
            sources.lost_lines(),
        ),
        _expected(sources),
        _gauge(
            "clients_expired",
            "Clients that can't connect because their last key has expired.",
            expiry.expired,
        ),
        _maybe_gauge(
            "next_client_expiry_timestamp_seconds",
            "When the last key of the next client expires; no sample where none has an end.",
            expiry.next,
        ),
    ]


def _channel_metrics(channels: Channels, limit: int) -> Iterator[Metric]:
    yield _gauge("channels", "Open channels.", len(channels.open))
    yield _gauge("channels_limit", "limits.channels.", limit)
    yield _gauge(
        "pending_channels", "Channels that their recipient has not accepted.", channels.pending
    )
    yield _counter("opened_channels", "Channels that were opened.", channels.opened)
    yield _counter(
        "relayed_bytes", "Bytes of channels, in both directions.", channels.all_relayed()
    )


def _mailbox_metrics(mailboxes: Mailboxes, reading: Reading) -> Iterator[Metric]:
    messages = GaugeMetricFamily(
        "brokerd_mailbox_messages", "Messages in all mailboxes, by state.", labels=["state"]
    )
    for state in STATES:
        messages.add_metric([state], reading.stored[state])
    yield messages
    yield _gauge("mailbox_bytes", "Bytes of the messages in all mailboxes.", reading.stored_bytes)
    yield _gauge(
        "mailbox_store_failed",
        "1 after an I/O error of the store: nothing is stored until a restart.",
        bool(mailboxes.commits.failure),
    )
    for name, words, value in (
        ("stored", "Messages accepted for mailboxes.", mailboxes.commits.accepted),
        ("delivered", "Deliveries from mailboxes.", mailboxes.feeding.delivered),
        ("acknowledged", "Stored messages that were done.", mailboxes.acknowledging.acknowledged),
        ("failed_attempts", "Attempts that failed.", mailboxes.acknowledging.failed),
        ("dead_letters", "Messages that became dead letters.", mailboxes.acknowledging.dead),
        ("expired", "Stored messages whose ttl was over.", mailboxes.feeding.expired),
    ):
        yield _counter(f"mailbox_{name}", words, value)


def _cluster_metrics(traffic: RemoteTraffic | None, now: float) -> Iterator[Metric]:
    """Yield the families about other hosts; without a cluster they have no samples."""
    yield _maybe_gauge(
        "nats_connected",
        "1 while this host of a cluster is connected to NATS.",
        None if traffic is None else float(traffic.cluster.is_connected),
    )
    hosts = [] if traffic is None else traffic.cluster.hosts(now)
    for make, name, words, value in _PER_HOST:
        family = make(f"brokerd_host_{name}", words, labels=["host"])
        for host in hosts:
            measured = value(host)
            if measured is not None:
                family.add_metric([host["host"]], measured)
        yield family


_PER_HOST: Final[
    tuple[
        tuple[
            type[CounterMetricFamily | GaugeMetricFamily],
            str,
            str,
            Callable[[Mapping[str, Any]], float | None],
        ],
        ...,
    ]
] = (
    (
        GaugeMetricFamily,
        "up",
        "1 while another host of the cluster is heard.",
        lambda host: float(host["state"] == "up"),
    ),
    (
        GaugeMetricFamily,
        "round_trip_seconds",
        "How long the host takes to answer.",
        lambda host: None if host["round_trip_ms"] is None else host["round_trip_ms"] / 1000,
    ),
    (
        GaugeMetricFamily,
        "in_flight_bytes",
        "Bytes sent to the host that it has not answered.",
        lambda host: host["in_flight"],
    ),
    (
        CounterMetricFamily,
        "in_doubt",
        "Messages to the host whose outcome stayed unknown.",
        lambda host: host["in_doubt"],
    ),
    (
        CounterMetricFamily,
        "refused",
        "Messages to the host that were refused.",
        lambda host: host["refused"],
    ),
)


def _handshake_metrics(sources: Sources) -> Iterator[Metric]:
    server = sources.server()
    counters = server.counters
    limits = sources.config().limits
    yield _gauge("listeners", "Sockets listened at.", len(server.listening))
    yield _labelled_counter(
        "handshakes",
        "Handshakes, by how they ended.",
        "result",
        HandshakeOutcome,
        counters.handshakes,
    )
    yield _gauge("pending_handshakes", "Handshakes that have not finished.", server.handshakes)
    yield _gauge("pending_handshakes_limit", "limits.handshakes.", limits.handshakes)
    yield _counter(
        "accept_pauses",
        "Times no connection was accepted for want of file descriptors.",
        counters.pauses,
    )
    yield _counter(
        "bugs",
        "Connections given up over a bug in the broker: see daemon.bug in the log.",
        counters.bugs,
    )


def _about_reloads(sources: Sources) -> Iterator[Metric]:
    yield _labelled_counter(
        "reloads",
        "Reloads of the configuration.",
        "result",
        ("accepted", "refused"),
        sources.reloads.results,
    )
    yield _gauge(
        "config_last_reload_successful",
        "0 while the configuration file is not the one in use because the last reload was refused.",
        not sources.reloads.was_refused,
    )
    yield _gauge(
        "config_loaded_timestamp_seconds",
        "When the configuration in use was taken over.",
        sources.reloads.accepted_at,
    )


def of_the_clients(
    reading: Reading, ends_of_keys: Sequence[tuple[str, str, float]]
) -> Iterator[Metric]:
    """Yield the families about each client, in pieces; consecutive ones with one name
    are one.

    ends_of_keys: (client, id of the key, end).
    """
    for make, name, words, value in _PER_CLIENT:
        for part in _pieces(reading.clients):
            family = make(f"brokerd_client_{name}", words, labels=["client"])
            for client in part:
                family.add_metric([client], value(reading.share(client)))
            yield family
    for keys in _pieces(ends_of_keys):
        ends = GaugeMetricFamily(
            "brokerd_key_expiry_timestamp_seconds",
            "When a key with not_after expires.",
            labels=["client", "key"],
        )
        for client, key, end in keys:
            ends.add_metric([client, key], end)
        yield ends


_PER_CLIENT: Final[tuple[_PerClient, ...]] = (
    (
        GaugeMetricFamily,
        "connections",
        "Connections of the client.",
        lambda share: share.connections,
    ),
    (
        GaugeMetricFamily,
        "queued_bytes",
        "Bytes that wait for the client.",
        lambda share: share.queued_bytes,
    ),
    (
        CounterMetricFamily,
        "messages_received",
        "Messages the client sent.",
        lambda share: share.counts.messages_in,
    ),
    (CounterMetricFamily, "received_bytes", "Bytes of those.", lambda share: share.counts.bytes_in),
    (
        CounterMetricFamily,
        "messages_sent",
        "Messages put out for the client.",
        lambda share: share.counts.messages_out,
    ),
    (CounterMetricFamily, "sent_bytes", "Bytes of those.", lambda share: share.counts.bytes_out),
    (
        CounterMetricFamily,
        "refused",
        "Messages of the client answered with an error.",
        lambda share: share.counts.errors,
    ),
)


def _gauge(name: str, words: str, value: float) -> Metric:
    return GaugeMetricFamily(f"brokerd_{name}", words, value=float(value))


def _maybe_gauge(name: str, words: str, value: float | None) -> Metric:
    return GaugeMetricFamily(f"brokerd_{name}", words, value=value)


def _counter(name: str, words: str, value: float) -> Metric:
    return CounterMetricFamily(f"brokerd_{name}", words, value=value)


def _labelled_counter(
    name: str, words: str, label: str, values: Iterable[str], counted: Mapping[Any, int]
) -> Metric:
    """Return a counter with a series for every possible value of the label.

    A series that has counted nothing yet is 0, not absent.
    """
    family = CounterMetricFamily(f"brokerd_{name}", words, labels=[label])
    for value in values:
        family.add_metric([str(value)], counted.get(value, 0))
    return family


def _expected(sources: Sources) -> Metric:
    """Return a gauge with a series for each client that must be online."""
    family = GaugeMetricFamily(
        "brokerd_expected_client_online",
        "1 while a client with expected: true has a connection, else 0.",
        labels=["client"],
    )
    for client in sources.broker.exchange.clients.values():
        if client.config.expected:
            family.add_metric([client.name], float(client.online))
    return family


def _lag(lag: Lag) -> Metric:
    bounds = [*map(str, BOUNDS), "+Inf"]
    return HistogramMetricFamily(
        "brokerd_event_loop_lag_seconds",
        "How late the event loop was, measured ten times a second: every message waits that long.",
        buckets=list(zip(bounds, accumulate(lag.counts), strict=True)),
        sum_value=lag.total,
    )


def _pieces(items: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
    """Yield parts of a sequence, or one empty part for an empty sequence."""
    for start in range(0, max(len(items), 1), _PIECE):
        yield items[start : start + _PIECE]
