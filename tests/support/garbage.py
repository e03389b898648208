"""Objects of the broker that only the garbage collector frees."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from support.running_daemon import RunningDaemon


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect garbage once, and then none until the block ends."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def objects() -> Counter[str]:
    """Return the number of objects of each of the broker's own types.

    Without those of the log's rate limiter: it has at most one for each event, and keeps
    it after the event was frequent.
    """
    kinds = map(type, gc.get_objects())
    named = (f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    return Counter(
        name
        for name in named
        if name.startswith(("brokerd.", "brokerd_client.tls.engine"))
        and name != "brokerd.log.rate_limit._Flow"
    )


def is_idle(broker: RunningDaemon) -> bool:
    """Return whether the broker has no connection, handshake or deferred work."""
    server = broker.daemon.server
    return broker.call(
        lambda: (
            not (
                server.connections
                or server.context.connections.lingering
                or len(server.pending_handshakes)
                or len(server.undecided)
                or server.context.connections.relays
                or server.broker.channels.pending
                or server.broker.has_deferred_work
            )
        )
    )
