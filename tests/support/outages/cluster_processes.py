"""A cluster as processes: NATS servers that are one cluster, and a broker at each host.

    with ClusterProcesses(folder, {"a": "x", "b": "yz"}) as cluster:

runs the NATS servers x, y and z. The broker a connects to x, the broker b to y or z. The
clients are those of :mod:`support.outages.traffic`; each has its host.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Self

from support.broker_process import BrokerProcess
from support.nats_server import NatsServer
from support.outages.traffic import Traffic
from support.system.network import Link
from support.waiting import until

__all__ = ["ClusterProcesses"]

#: A server finds within some seconds that another one, or a broker, is gone.
_NATS: Final = "ping_interval: 1s\nping_max: 2"


class ClusterProcesses:
    """The processes of a cluster.

    Attributes:
        servers: The NATS servers, by name.
        brokers: The brokers, by host.

    Args:
        hosts: The NATS servers that each broker knows, in order, each a letter.
        link: The network of each server and broker; without it all are on this machine.
        clients: The names that may connect, with their configuration.
        timeout: The brokers' limits.remote_timeout.
    """

    def __init__(
        self,
        folder: Path,
        hosts: Mapping[str, str],
        clients: Mapping[str, Any] | Iterable[str],
        *,
        link: Link | None = None,
        timeout: str = "1s",
    ) -> None:
        self._folder = folder
        self._hosts = hosts
        self._clients = clients
        self._link = link
        self._timeout = timeout
        self._stack = ExitStack()
        self.servers: dict[str, NatsServer] = {}
        self.brokers: dict[str, BrokerProcess] = {}

    def __enter__(self) -> Self:
        with self._stack:
            for name in sorted(set("".join(self._hosts.values()))):
                self._start_server(name)
            for host in self._hosts:
                self.start(host)
            self.meet()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _start_server(self, name: str) -> None:
        routes = tuple(server.route for server in self.servers.values())
        place: dict[str, Any] = {}
        if self._link is not None:
            place = {"address": self._link.addresses[name], "inside": self._link.inside(name)}
        server = NatsServer(self._folder / name, config=_NATS, routes=routes, **place)
        self._stack.callback(server.kill)
        server.start()
        self.servers[name] = server

    def start(self, host: str) -> BrokerProcess:
        """Start a host's broker, perhaps in place of one that was killed."""
        (self._folder / host).mkdir(exist_ok=True)
        urls = [self.servers[name].url for name in self._hosts[host]]
        broker = BrokerProcess(
            self._folder / host,
            self._clients,
            preexec=None if self._link is None else self._link.inside(host),
            cluster={"host": host, "nats": urls, **self._without_login()},
            limits={"remote_timeout": self._timeout, "wait_timeout": "1s"},
            log={
                "level": "error",
                "areas": {"daemon": "info", "client": "info", "cluster": "info"},
            },
        )
        self.brokers[host] = self._stack.enter_context(broker)
        return broker

    def _without_login(self) -> dict[str, Any]:
        """Return what a NATS server beyond loopback needs; nobody else is in these networks."""
        if self._link is None:
            return {}
        return {"plain": True, "user": "any", "password_file": str(self._password())}

    def _password(self) -> Path:
        file = self._folder / "password"
        if not file.exists():
            file.touch(mode=0o600)
            file.write_text("any")
        return file

    def address(self, host: str) -> str:
        """Return the address of a host's broker for clients."""
        return str(self._folder / host / "brokerd.sock")

    def sees(self, host: str, other: str) -> bool:
        """Return whether a broker hears another one now."""
        for line in reversed(list(self.brokers[host].lines)):
            event = json.loads(line) if line.startswith("{") else {}
            name = event.get("event")
            if name in ("cluster.host_found", "cluster.host_lost") and event["host"] == other:
                return bool(name == "cluster.host_found")
        return False

    def meet(self, hosts: Iterable[str] = ()) -> None:
        """Wait until these hosts, by default all, hear each other."""
        for host, other in itertools.permutations(hosts or self._hosts, 2):
            until(lambda: self.sees(host, other), f"{host} does not hear {other}")  # noqa: B023

    def lose(self, host: str, other: str) -> None:
        """Wait until a host no longer hears another."""
        until(lambda: not self.sees(host, other), f"{host} still hears {other}")

    def traffic(self, places: Mapping[str, str], **more: Any) -> Traffic:
        """Return traffic between clients.

        Args:
            places: The host of each sender (s0, ...) and recipient (r0, ...).
        """
        return Traffic(
            self._folder,
            {name: self.address(host) for name, host in places.items()},
            senders=[name for name in places if name.startswith("s")],
            recipients=[name for name in places if name.startswith("r")],
            **more,
        )
