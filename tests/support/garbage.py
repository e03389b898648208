"""Objects of the broker that wait for the garbage collector."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from support.running_daemon import RunningDaemon


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect what there is, and nothing more until the end."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def objects() -> Counter[str]:
    """Return how many objects of each of the broker's own types there are."""
    kinds = map(type, gc.get_objects())
    named = (f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    return Counter(
        name for name in named if name.startswith(("brokerd.", "brokerd_client.tls.engine"))
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
                or server.broker.has_deferred_work
            )
        )
    )
