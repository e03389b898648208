"""A manager of a stock, where a spawned child can import it."""

from __future__ import annotations

from typing import Any

from brokerd_client import managers


class Stock:
    """Counts of items."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def add(self, item: str, count: int) -> None:
        """Add items."""
        self.counts[item] = self.counts.get(item, 0) + count

    def count(self, item: str) -> int:
        """Return the number of items."""
        return self.counts[item]


class Shop(managers.BaseManager):
    """A manager of a stock."""


Shop.register("stock", Stock)


def add_two_apples(stock: Any) -> None:
    """Use a proxy, in a child."""
    stock.add("apple", 2)


def echo_to_peer(connection: Any) -> None:
    """Send the name of the peer and what it has sent, in a child."""
    connection.send([connection.peer, connection.recv()])
    connection.close()
