"""The ways between clients and broker that faults happen to: in the clear over a Unix
socket, and TLS over TCP.
"""

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

__all__ = ["Way", "tls_way"]


@dataclass(frozen=True)
class Way:
    """In the clear, unless there is a certificate.

    host: where the broker listens, if not on its Unix socket.
    """

    host: str = ""
    authority: Authority | None = None
    shown: Issued | None = None

    def __str__(self) -> str:
        """Return it as part of a test's name."""
        return "tls" if self.shown else "tcp" if self.host else "plain"

    def title(self, fault: str) -> str:
        """Return the fault's row in the table."""
        return f"TLS: {fault}" if self.shown else fault

    def listen(self, port: int = 0, **more: Any) -> list[Any]:
        """Return what stands below ``listen``.

        port: the one that another broker had.
        """
        if not self.host:
            return []
        tls = {"tls": self.shown.entry()} if self.shown else {}
        return [{"address": f"{self.host}:{port}", **tls, **more}]

    def address(self, broker: BrokerProcess) -> Address:
        """Return where clients go, when they can."""
        broker.wait("daemon.started")
        return broker.addresses()[1] if self.host else broker.address

    def listen_again(self, broker: BrokerProcess) -> list[Any]:
        """Return what a broker that takes this one's place has below ``listen``."""
        return self.listen(self.address(broker).port) if self.host else []

    @property
    def context(self) -> ssl.SSLContext | None:
        """What a client connects with."""
        return self.authority.context() if self.authority else None

    def traffic(
        self,
        directory: Path,
        broker: BrokerProcess,
        *,
        blocking: Iterable[str] = ("s1", "r1"),
        **more: Any,
    ) -> Traffic:
        """Return traffic this way. blocking: whose clients are of that kind."""
        ca = self.authority.file if self.authority else None
        return Traffic(directory, str(self.address(broker)), ca=ca, blocking=blocking, **more)


def tls_way(folder: Path, host: str = "127.0.0.1") -> Way:
    """Return TLS to that address, with a certificate in that folder."""
    authority = Authority(folder)
    return Way(host, authority, authority.issue("server", host, "localhost"))
