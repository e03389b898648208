"""Policies: the rules of one client, compiled.

`send_to` holds shell-style patterns of names; `publish` and `subscribe` hold topic
patterns (docs/configuration.md, "clients"). Every method returns the rule that allows
the action, or None.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import translate

from brokerd.config.values import ClientConfig, Rule
from brokerd.core.topics import covers
from brokerd_client.topics import matches

__all__ = ["Policy"]


class Policy:
    """The compiled rules of one client."""

    __slots__ = ("_everyone", "_publish", "_send_to", "_subscribe", "admin")

    def __init__(self, config: ClientConfig) -> None:
        self.admin = config.admin
        self._send_to = tuple(
            (rule, re.compile(translate(rule.pattern)).match) for rule in config.send_to
        )
        self._everyone = next((rule for rule in config.send_to if rule.pattern == "*"), None)
        self._publish = config.publish
        self._subscribe = config.subscribe

    def sending(self, name: str) -> Rule | None:
        """Return the rule that allows sending to the client ``name``, or None."""
        if self._everyone is not None:
            return self._everyone
        return next((rule for rule, match in self._send_to if match(name)), None)

    def publishing(self, topic: str) -> Rule | None:
        """Return the rule that allows publishing on ``topic``, or None.

        No rule allows topics that begin with ``$``.
        """
        return (
            None
            if topic.startswith("$")
            else _first(self._publish, lambda rule: matches(rule, topic))
        )

    def subscribing(self, pattern: str) -> Rule | None:
        """Return the rule that allows the whole of ``pattern``, or None."""
        return _first(self._subscribe, lambda rule: covers(rule, pattern))


def _first(rules: Iterable[Rule], allows: Callable[[str], bool]) -> Rule | None:
    return next((rule for rule in rules if allows(rule.pattern)), None)
