"""How clients reach the broker in tests of faults: over a Unix socket, TCP or TLS."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.broker_process import BrokerProcess
from support.outages.traffic import Traffic
from support.tls.authority import Authority, Issued

from brokerd_client.address import Address

__all__ = ["Transport", "tls_transport"]


@dataclass(frozen=True)
class Transport:
    """A transport to the broker; over TLS if it has a certificate.

    Attributes:
        host: The host at which the broker listens, if not at its Unix socket.
    """

    host: str = ""
    authority: Authority | None = None
    issued: Issued | None = None

    def __str__(self) -> str:
        """Return the part of a test's name."""
        return "tls" if self.issued else "tcp" if self.host else "plain"

    def title(self, fault: str) -> str:
        """Return the title of the fault's row in docs/reliability.md."""
        return f"TLS: {fault}" if self.issued else fault

    def listen(self, port: int = 0, **more: Any) -> list[Any]:
        """Return the entries for ``listen`` in the configuration.

        Args:
            port: The port of an earlier broker, to listen there again.
        """
        if not self.host:
            return []
        tls = {"tls": self.issued.entry()} if self.issued else {}
        return [{"address": f"{self.host}:{port}", **tls, **more}]

    def address(self, broker: BrokerProcess) -> Address:
        """Return the address for clients, once the broker listens there."""
        broker.wait("daemon.started")
        return broker.addresses()[1] if self.host else broker.address

    def listen_again(self, broker: BrokerProcess) -> list[Any]:
        """Return the ``listen`` entries of a broker that takes this broker's place."""
        return self.listen(self.address(broker).port) if self.host else []

    @property
    def context(self) -> ssl.SSLContext | None:
        """The TLS context of a client, None without TLS."""
        return self.authority.context() if self.authority else None

    def traffic(
        self,
        directory: Path,
        broker: BrokerProcess,
        *,
        blocking: Iterable[str] = ("s1", "r1"),
        **more: Any,
    ) -> Traffic:
        """Return traffic over this transport.

        Args:
            blocking: The members that use the blocking client.
        """
        ca = self.authority.file if self.authority else None
        return Traffic(directory, str(self.address(broker)), ca=ca, blocking=blocking, **more)


def tls_transport(folder: Path, host: str = "127.0.0.1") -> Transport:
    """Return TLS to this host, with a certificate in this folder."""
    authority = Authority(folder)
    return Transport(host, authority, authority.issue("server", host, "localhost"))
