"""Whole brokers of one cluster, in threads of the test, over a real NATS server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from support.keys import key_of
from support.nats_server import NatsServer, free_port
from support.running_daemon import RunningDaemon, configuration, running_daemon
from support.waiting import until

import brokerd_client

__all__ = ["Brokers", "brokers", "links"]


class Brokers:
    """The hosts of a cluster, by name, and the clients that connect to them.

    Attributes:
        hosts: The brokers.
        server: The NATS server.
    """

    def __init__(self, server: NatsServer, stack: ExitStack) -> None:
        self.server = server
        self.hosts: dict[str, RunningDaemon] = {}
        self._stack = stack

    def connect(self, name: str, host: str, **options: Any) -> brokerd_client.Client:
        """Return a client that is connected to a host; it is closed at the end."""
        client = brokerd_client.connect(
            str(self.hosts[host].address), name, key_of(name), **options
        )
        self._stack.callback(client.close)
        return client

    def sees(self, client: brokerd_client.Client, name: str, *, online: bool = True) -> None:
        """Wait until a client's host knows that a name is online, or is not."""
        until(lambda: name in {each.name for each in client.clients() if each.online is online})

    def meet(self) -> None:
        """Wait until all hosts have met."""
        for name, host in self.hosts.items():
            others = self.hosts.keys() - {name}
            until(lambda host=host, others=others: set(links(host)) == others)


def links(host: RunningDaemon) -> dict[str, str]:
    """Return the state of each other host that a broker knows."""
    traffic = host.daemon.broker.traffic
    assert traffic is not None
    return host.call(lambda: {each["host"]: each["state"] for each in traffic.cluster.hosts(0.0)})


@contextmanager
def brokers(
    server: NatsServer,
    clients: Mapping[str, Any] | str = "alice bob carol",
    names: str = "ab",
    *,
    folder: Path | None = None,
    stores: Mapping[str, Any] | None = None,
    limits: Mapping[str, Any] | None = None,
    **cluster: Any,
) -> Iterator[Brokers]:
    """Run a broker for each host, which have met each other.

    folder: the parent of their stores; None for brokers without mailboxes.
    stores: the store of each host that has one, instead of ``folder``.
    """
    with ExitStack() as stack:
        running = Brokers(server, stack)
        for name in names:
            address = f"127.0.0.1:{free_port()}"
            place = {"host": name, "nats": [server.url], "advertise": [address]}
            config = configuration(
                address,
                clients,
                limits=limits,
                store=(stores or {}).get(name) if folder is None else str(folder / name),
                cluster={**place, **cluster},
            )
            running.hosts[name] = stack.enter_context(running_daemon(config))
        running.meet()
        yield running
