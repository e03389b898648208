"""The subscription table: local routing of events, by their topic alone. No I/O.

The broker sends an event once per connection, even if several of its subscriptions
match. The table finds every local subscription that matches. Subscriptions of one group
and pattern take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from brokerd_client.topics import has_wildcard, matches

__all__ = ["SubscriptionEntry", "SubscriptionTable"]

#: Most topics remembered with their entries; when there are more, all are forgotten.
_REMEMBERED: Final = 4096


class SubscriptionEntry:
    """One subscription at the broker, and its local subscriptions (sinks).

    group: "" for a plain subscription. The table never inspects a sink.
    """

    __slots__ = ("group", "pattern", "sinks", "turn")

    def __init__(self, pattern: str, group: str) -> None:
        self.pattern = pattern
        self.group = group
        self.sinks: list[object] = []
        self.turn = 0

    @property
    def arguments(self) -> dict[str, str]:
        """The arguments of the operations subscribe and unsubscribe."""
        return (
            {"topic": self.pattern, "group": self.group} if self.group else {"topic": self.pattern}
        )

    def next_recipients(self) -> list[object]:
        """Return the sinks of the next event: all, or in a group the sink whose turn it
        is.
        """
        if not self.group:
            return self.sinks
        self.turn = (self.turn + 1) % len(self.sinks)
        return [self.sinks[self.turn]]


class SubscriptionTable:
    """The subscription entries of one client.

    An entry exists as long as it has a sink.
    """

    __slots__ = ("_by_key", "_literal", "_remembered", "_wild")

    def __init__(self) -> None:
        self._by_key: dict[tuple[str, str], SubscriptionEntry] = {}
        #: Entries whose pattern is a plain topic, by that topic. Entries with wildcards
        #: are matched one after the other.
        self._literal: dict[str, list[SubscriptionEntry]] = {}
        self._wild: list[SubscriptionEntry] = []
        self._remembered: dict[str, list[SubscriptionEntry]] = {}

    def __iter__(self) -> Iterator[SubscriptionEntry]:
        return iter(self._by_key.values())

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, pattern: str, group: str, sink: object) -> SubscriptionEntry:
        """Add the sink to the entry of the pattern and group; return the entry."""
        entry = self._by_key.get((pattern, group))
        if entry is None:
            entry = self._by_key[pattern, group] = SubscriptionEntry(pattern, group)
            self._siblings(pattern).append(entry)
            self._remembered.clear()
        entry.sinks.append(sink)
        return entry

    def discard(self, entry: SubscriptionEntry, sink: object) -> bool:
        """Remove the sink from the entry; return whether it was the entry's last sink.

        If so, the broker has to be told.
        """
        if sink not in entry.sinks:
            return False
        entry.sinks.remove(sink)
        if entry.sinks:
            return False
        del self._by_key[entry.pattern, entry.group]
        siblings = self._siblings(entry.pattern)
        siblings.remove(entry)
        if not siblings:
            self._literal.pop(entry.pattern, None)
        self._remembered.clear()
        return True

    def of(self, topic: str) -> list[SubscriptionEntry]:
        """Return the entries whose pattern matches the topic."""
        entries = self._remembered.get(topic)
        if entries is None:
            entries = self._literal.get(topic, []) + [
                entry for entry in self._wild if matches(entry.pattern, topic)
            ]
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            self._remembered[topic] = entries
        return entries

    def _siblings(self, pattern: str) -> list[SubscriptionEntry]:
        return self._wild if has_wildcard(pattern) else self._literal.setdefault(pattern, [])
